/*
 * The way weightcache uses the driver, in plain C, for the sanitizers: threads read into the slots of a registered
 * ring and copy each slot to device memory that was adopted, through one stream, with an event a slot.
 *
 * Arguments: "correct", or "hasty" to use a slot again without waiting for its event. Prints what was found; exit
 * status 0 when that was nothing and the bytes are right, else 1.
 */
#define _GNU_SOURCE
#include "standin_cuda.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define SLOT_NBYTES ((size_t)16 << 10)
#define SLOTS 2 /* a thread */
#define THREADS 2
#define PIECES 64

int cuInit(unsigned flags);
int cuDevicePrimaryCtxRetain(void **context, int device);
int cuDevicePrimaryCtxRelease_v2(int device);
int cuCtxSetCurrent(void *context);
int cuStreamCreate(void **stream, unsigned flags);
int cuStreamDestroy_v2(void *stream);
int cuStreamSynchronize(void *stream);
int cuStreamWaitEvent(void *stream, void *event, unsigned flags);
int cuEventCreate(void **event, unsigned flags);
int cuEventDestroy_v2(void *event);
int cuEventRecord(void *event, void *stream);
int cuEventQuery(void *event);
int cuEventSynchronize(void *event);
int cuMemHostRegister_v2(void *start, size_t nbytes, unsigned flags);
int cuMemHostUnregister(void *start);
int cuMemcpyHtoDAsync_v2(unsigned long long target, const void *source, size_t nbytes, void *stream);
int cuMemsetD8Async(unsigned long long target, unsigned char value, size_t nbytes, void *stream);

static unsigned char *ring, *slab;
static void *context, *stream;
static int hasty;

static void check(int rc, const char *what)
{
    if (rc) {
        printf("%s: %d\n", what, rc);
        exit(1);
    }
}

static void *load(void *argument)
{
    size_t thread = (size_t)(intptr_t)argument;
    void *events[SLOTS];
    size_t turn = 0;

    check(cuCtxSetCurrent(context), "cuCtxSetCurrent");
    for (size_t slot = 0; slot < SLOTS; slot++)
        check(cuEventCreate(&events[slot], 2), "cuEventCreate");
    for (size_t piece = thread; piece < PIECES; piece += THREADS, turn++) {
        size_t slot = turn % SLOTS;
        unsigned char *from = ring + (thread * SLOTS + slot) * SLOT_NBYTES;
        if (turn >= SLOTS && !hasty)
            check(cuEventSynchronize(events[slot]), "cuEventSynchronize");
        memset(from, (int)piece, SLOT_NBYTES);
        check(cuMemcpyHtoDAsync_v2((uintptr_t)slab + piece * SLOT_NBYTES, from, SLOT_NBYTES, stream), "copy");
        check(cuEventRecord(events[slot], stream), "cuEventRecord");
    }
    for (size_t slot = 0; slot < SLOTS; slot++) {
        int rc;
        while ((rc = cuEventQuery(events[slot])) == 600)
            ;
        check(rc, "cuEventQuery");
        check(cuEventDestroy_v2(events[slot]), "cuEventDestroy");
    }
    check(cuCtxSetCurrent(NULL), "cuCtxSetCurrent");
    return NULL;
}

int main(int argc, char **argv)
{
    const size_t ring_nbytes = THREADS * SLOTS * SLOT_NBYTES, slab_nbytes = PIECES * SLOT_NBYTES;
    pthread_t threads[THREADS];
    void *allocated;
    struct wcs_facts facts;
    char text[4096];
    int wrong = 0;

    hasty = argc > 1 && !strcmp(argv[1], "hasty");
    ring = malloc(ring_nbytes);
    slab = malloc(slab_nbytes);
    if (!ring || !slab)
        return 1;
    check(cuInit(0), "cuInit");
    check(cuDevicePrimaryCtxRetain(&context, 0), "retain");
    check(cuCtxSetCurrent(context), "cuCtxSetCurrent");
    check(wcs_adopt(slab, slab_nbytes, 0), "wcs_adopt");
    check(cuMemHostRegister_v2(ring, ring_nbytes, 0), "cuMemHostRegister");
    check(cuStreamCreate(&stream, 1), "cuStreamCreate");

    /* Whoever had the slab before still works on it, on the default stream. */
    check(cuMemsetD8Async((uintptr_t)slab, 0xEE, slab_nbytes, NULL), "cuMemsetD8Async");
    check(cuEventCreate(&allocated, 2), "cuEventCreate");
    check(cuEventRecord(allocated, NULL), "cuEventRecord");
    check(cuStreamWaitEvent(stream, allocated, 0), "cuStreamWaitEvent");

    for (size_t thread = 0; thread < THREADS; thread++)
        check(pthread_create(&threads[thread], NULL, load, (void *)(intptr_t)thread), "pthread_create");
    for (size_t thread = 0; thread < THREADS; thread++)
        pthread_join(threads[thread], NULL);
    check(cuStreamSynchronize(stream), "cuStreamSynchronize");
    for (size_t at = 0; at < slab_nbytes; at++)
        wrong += slab[at] != at / SLOT_NBYTES;

    check(cuEventDestroy_v2(allocated), "cuEventDestroy");
    check(cuStreamDestroy_v2(stream), "cuStreamDestroy");
    check(cuMemHostUnregister(ring), "cuMemHostUnregister");
    check(wcs_forget(slab), "wcs_forget");
    check(cuCtxSetCurrent(NULL), "cuCtxSetCurrent");
    check(cuDevicePrimaryCtxRelease_v2(0), "release");
    free(ring);
    free(slab);

    wcs_facts(&facts);
    wcs_violations(text, sizeof text);
    int leaks = wcs_leaks(text + strlen(text), sizeof text - strlen(text));
    printf("%s%d bytes wrong, %d leaks, %d violations\n", text, wrong, leaks, (int)facts.violations);
    return wrong || leaks || facts.violations;
}
