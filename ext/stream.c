#define _GNU_SOURCE
#include "stream.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#ifndef WC_BUG
#define WC_BUG 0 /* the tests build mutants, each of which one of them must catch: see tests/native/test_mutants.py */
#endif

/* -- the ring */

static void free_memory(struct wc_ring *ring)
{
    if (ring->memory.start)
        wc_memory_unmap(&ring->memory);
    ring->memory.start = NULL;
}

/* Page-lock the ring: our own huge-page memory, registered; else the driver's; else none, which is slower and right. */
static int lock_memory(struct wc_device *device, int numa_node)
{
    const struct wc_cuda *cuda = device->cuda;
    struct wc_ring *ring = &device->ring;
    const size_t nbytes = ring->slot_nbytes * ring->n_slots;

    int rc = wc_memory_map(&ring->memory, nbytes);
    if (rc)
        return rc;
    wc_memory_prefer(&ring->memory, numa_node);
    /* A fork would copy what is locked, or, before Linux 5.9, move it away from under the device. */
    if (madvise(ring->memory.start, ring->memory.mapped, MADV_DONTFORK))
        return -errno;
    rc = wc_memory_populate(&ring->memory, 0, nbytes);
    if (rc)
        return rc;
    ring->start = ring->memory.start;
    ring->locking = WC_LOCKED_REGISTERED;
    ring->refused = wc_cuda_error(cuda->host_register(ring->start, nbytes, WC_CU_HOST_PORTABLE));
    if (ring->refused == 0)
        return 0;

    void *allocated;
    if (cuda->host_alloc(&allocated, nbytes, WC_CU_HOST_PORTABLE) == WC_CU_SUCCESS) {
        free_memory(&device->ring);
        ring->start = allocated;
        ring->locking = WC_LOCKED_ALLOCATED;
        return 0;
    }
    ring->locking = WC_PAGEABLE;
    return 0;
}

static void unlock_memory(struct wc_device *device)
{
    const struct wc_cuda *cuda = device->cuda;

    if (device->ring.start && device->ring.locking == WC_LOCKED_REGISTERED)
        cuda->host_unregister(device->ring.start);
    if (device->ring.start && device->ring.locking == WC_LOCKED_ALLOCATED)
        cuda->host_free(device->ring.start);
    device->ring.start = NULL;
    free_memory(&device->ring);
}

static int make_slots(struct wc_device *device)
{
    struct wc_ring *ring = &device->ring;

    for (unsigned i = 0; i < ring->n_slots; i++) {
        struct wc_slot *slot = &ring->slots[i];
        int rc = wc_cuda_error(device->cuda->event_create(&slot->copied, WC_CU_EVENT_DISABLE_TIMING | WC_CU_EVENT_BLOCKING_SYNC));
        if (rc)
            return rc;
        slot->start = ring->start + i * ring->slot_nbytes;
        ring->free[ring->n_free++] = slot;
    }
    return 0;
}

struct wc_slot *wc_ring_take(struct wc_ring *ring, bool wait)
{
    struct wc_slot *slot = NULL;

    pthread_mutex_lock(&ring->lock);
    ring->n_waiting++;
    if (wait && ring->n_free == 0) {
        struct timespec until;
        clock_gettime(CLOCK_REALTIME, &until); /* what the condition's clock is unless told otherwise */
        until.tv_nsec += WC_RING_PATIENCE_MS * 1000000;
        until.tv_sec += until.tv_nsec / 1000000000;
        until.tv_nsec %= 1000000000;
        while (ring->n_free == 0 && pthread_cond_timedwait(&ring->freed, &ring->lock, &until) == 0)
            ;
    }
    ring->n_waiting--;
    if (ring->n_free)
        slot = ring->free[--ring->n_free];
    pthread_mutex_unlock(&ring->lock);
    return slot;
}

void wc_ring_give(struct wc_ring *ring, struct wc_slot *slot)
{
    pthread_mutex_lock(&ring->lock);
    ring->free[ring->n_free++] = slot;
    pthread_cond_signal(&ring->freed);
    pthread_mutex_unlock(&ring->lock);
}

bool wc_ring_is_wanted(struct wc_ring *ring)
{
    pthread_mutex_lock(&ring->lock);
    bool wanted = ring->n_waiting > 0;
    pthread_mutex_unlock(&ring->lock);
    return wanted;
}

/* -- the device */

/* Undo what the driver was asked for, in a thread that entered; what was never made is NULL. */
static void release_objects(struct wc_device *device)
{
    const struct wc_cuda *cuda = device->cuda;

    for (unsigned i = 0; i < device->ring.n_slots; i++)
        if (device->ring.slots[i].copied)
            cuda->event_destroy(device->ring.slots[i].copied);
    if (device->before)
        cuda->event_destroy(device->before);
    if (device->copies)
        cuda->stream_destroy(device->copies);
    unlock_memory(device);
}

int wc_device_open(struct wc_device *device, const struct wc_cuda *cuda, int ordinal, size_t slot_nbytes,
                   unsigned n_slots, int numa_node)
{
    struct wc_cuda_entered entered;

    if (n_slots < 1 || n_slots > WC_MAX_SLOTS || slot_nbytes == 0 || slot_nbytes % 4096 ||
        slot_nbytes > SIZE_MAX / 2 / n_slots)
        return -EINVAL;
    memset(device, 0, sizeof *device);
    device->cuda = cuda;
    device->owner = getpid();
    device->ring.slot_nbytes = slot_nbytes;
    device->ring.n_slots = n_slots;
    int rc = wc_cuda_error(cuda->device_get(&device->handle, ordinal));
    if (rc == 0)
        rc = wc_cuda_error(cuda->context_retain(&device->context, device->handle));
    if (rc)
        return rc;
    rc = wc_cuda_enter(cuda, device->context, &entered);
    if (rc)
        goto release;
    rc = wc_cuda_error(cuda->stream_create(&device->copies, WC_CU_STREAM_NON_BLOCKING));
    if (rc == 0)
        rc = wc_cuda_error(cuda->event_create(&device->before, WC_CU_EVENT_DISABLE_TIMING));
    if (rc == 0)
        rc = lock_memory(device, numa_node);
    if (rc == 0)
        rc = make_slots(device);
    if (rc)
        release_objects(device);
    wc_cuda_leave(cuda, &entered);
    if (rc)
        goto release;
    pthread_mutex_init(&device->order, NULL);
    pthread_mutex_init(&device->ring.lock, NULL);
    pthread_cond_init(&device->ring.freed, NULL);
    pthread_rwlock_init(&device->registered, NULL);
    return 0;

release:
    cuda->context_release(device->handle);
    return rc;
}

void wc_device_close(struct wc_device *device)
{
    const struct wc_cuda *cuda = device->cuda;
    struct wc_cuda_entered entered;

    if (device->owner != getpid())
        return; /* nothing of it came along */
    /* Where that fails, after an error for good or as the process ends, all is given back as far as it goes. */
    int rc = wc_cuda_enter(cuda, device->context, &entered);
    cuda->stream_synchronize(device->copies);
    for (size_t i = 0; i < device->n_registrations; i++)
        cuda->host_unregister((void *)device->registrations[i].start);
    release_objects(device);
    if (rc == 0)
        wc_cuda_leave(cuda, &entered);
    cuda->context_release(device->handle);
    pthread_mutex_destroy(&device->order);
    pthread_mutex_destroy(&device->ring.lock);
    pthread_cond_destroy(&device->ring.freed);
    pthread_rwlock_destroy(&device->registered);
}

int wc_device_check(const struct wc_device *device)
{
    return device->owner == getpid() ? 0 : -ECHILD;
}

int wc_device_order_after(struct wc_device *device, wc_cu_stream stream)
{
    const struct wc_cuda *cuda = device->cuda;
    struct wc_cuda_entered entered;

    int rc = wc_device_check(device);
    if (rc == 0)
        rc = wc_cuda_enter(cuda, device->context, &entered);
    if (rc)
        return rc;
    pthread_mutex_lock(&device->order);
    int capturing = 0;
    rc = wc_cuda_error(cuda->stream_is_capturing(stream, &capturing));
    if (rc == 0 && capturing) /* waiting for it would make our stream part of the graph */
        rc = -EBUSY;
    if (rc == 0)
        rc = wc_cuda_error(cuda->event_record(device->before, stream));
    if (rc == 0 && WC_BUG != 5)
        rc = wc_cuda_error(cuda->stream_wait(device->copies, device->before, 0));
    pthread_mutex_unlock(&device->order);
    wc_cuda_leave(cuda, &entered);
    return rc;
}

/* -- host memory that the device reads by itself */

static struct wc_registration *find(struct wc_device *device, const void *start)
{
    for (size_t i = 0; i < device->n_registrations; i++)
        if (device->registrations[i].start == start)
            return &device->registrations[i];
    return NULL;
}

static int add_registration(struct wc_device *device, void *start, size_t nbytes, bool is_frozen)
{
    const unsigned char *first = start;

    if (device->n_registrations == WC_MAX_REGISTRATIONS)
        return -ENOSPC;
    for (size_t i = 0; i < device->n_registrations; i++) {
        const struct wc_registration *other = &device->registrations[i];
        if (first < other->start + other->nbytes && other->start < first + nbytes)
            return -EEXIST;
    }
    /* The kernel locks pages only through a mapping that could be written; the lock stays when it no longer can. */
    if (is_frozen && mprotect(start, nbytes, PROT_READ | PROT_WRITE))
        return -errno;
    int rc = wc_cuda_error(device->cuda->host_register(start, nbytes, WC_CU_HOST_PORTABLE));
    if (is_frozen)
        (void)mprotect(start, nbytes, PROT_READ); /* a guard against mistakes, no more */
    if (rc == 0)
        device->registrations[device->n_registrations++] = (struct wc_registration){first, nbytes};
    return rc;
}

static int remove_registration(struct wc_device *device, void *start)
{
    struct wc_registration *found = find(device, start);

    if (!found)
        return -ENOENT;
    int rc = wc_cuda_error(device->cuda->host_unregister(start));
    if (rc == 0)
        *found = device->registrations[--device->n_registrations];
    return rc;
}

/* Enter, and wait until no run uses the device. */
static int begin_registering(struct wc_device *device, struct wc_cuda_entered *entered)
{
    int rc = wc_device_check(device);
    if (rc == 0)
        rc = wc_cuda_enter(device->cuda, device->context, entered);
    if (rc == 0 && WC_BUG != 4)
        pthread_rwlock_wrlock(&device->registered);
    return rc;
}

static void end_registering(struct wc_device *device, const struct wc_cuda_entered *entered)
{
    if (WC_BUG != 4)
        pthread_rwlock_unlock(&device->registered);
    wc_cuda_leave(device->cuda, entered);
}

int wc_device_register(struct wc_device *device, void *start, size_t nbytes, bool is_frozen)
{
    struct wc_cuda_entered entered;

    int rc = begin_registering(device, &entered);
    if (rc)
        return rc;
    rc = add_registration(device, start, nbytes, is_frozen);
    end_registering(device, &entered);
    return rc;
}

int wc_device_unregister(struct wc_device *device, void *start)
{
    struct wc_cuda_entered entered;

    int rc = begin_registering(device, &entered);
    if (rc)
        return rc;
    rc = remove_registration(device, start);
    end_registering(device, &entered);
    return rc;
}

size_t wc_device_registered(const struct wc_device *device, const unsigned char *start, size_t nbytes)
{
    for (size_t i = 0; i < device->n_registrations; i++) {
        const struct wc_registration *each = &device->registrations[i];
        if (start >= each->start && start < each->start + each->nbytes) {
            size_t within = (size_t)(each->start + each->nbytes - start);
            return within < nbytes && WC_BUG != 6 ? within : nbytes;
        }
    }
    return 0;
}

/* -- copies */

int wc_device_copy(struct wc_device *device, wc_cu_pointer to, const void *from, size_t nbytes)
{
    wc_cu_result result = device->cuda->copy(to, from, nbytes, device->copies);

    return WC_BUG == 8 ? 0 : wc_cuda_error(result);
}

int wc_device_record(struct wc_device *device, wc_cu_event copied)
{
    return wc_cuda_error(device->cuda->event_record(copied, device->copies));
}

int wc_device_wait(struct wc_device *device, wc_cu_event copied)
{
    return wc_cuda_error(device->cuda->event_synchronize(copied));
}
