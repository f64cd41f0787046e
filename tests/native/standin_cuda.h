/*
 * A stand-in for libcuda.so.1: the driver calls that weightcache makes, on host memory, as adversarial as the
 * real driver may ever be. It never needs a GPU, and never forgives what the real one might let pass.
 *
 * This header declares what a test sees beside the driver's own symbols: settings, findings, numbers. All of it
 * may be called from any thread, wcs_reset() alone only while no other thread is inside the library. Functions
 * return 0 or -errno unless said otherwise.
 *
 * Text comes out as by snprintf: at most `room` bytes of it, the terminating zero included, are written, and the
 * length of the whole text is returned. `text` may be NULL when `room` is 0.
 */
#ifndef STANDIN_CUDA_H
#define STANDIN_CUDA_H

#include <stddef.h>
#include <stdint.h>

/*
 * Change the settings named in `text`, "key=value,key=value"; the others keep their values. -EINVAL, and no
 * change at all, for a key or a value that is not one of these; -EBUSY for another mode while work is queued.
 * The environment variable WEIGHTCACHE_STANDIN, the same text, is read at first use; what it says wrongly aborts.
 *
 *   mode=late           queued work runs only when a synchronisation demands it (the default)
 *   mode=early          work runs as it is queued
 *   mode=random         each call first runs some of one stream's queue
 *   mode=threads        a thread a device runs the queues, after up to delay_us (100) microseconds an operation
 *   seed=7              of everything random (1)
 *   devices=2           how many there are (1, at most 16); with 0 cuInit answers 100
 *   memory=80000000000  bytes of each device, which cuMemAlloc shares out (80 GB)
 *   register_cap=...    bytes that can be registered at once; beyond, cuMemHostRegister answers 2 (no cap)
 *   not_ready=3         cuEventQuery answers 600 so often after each record, whatever has run. Without it, mode
 *                       late answers 600 zero to three times before the query makes the work run
 *   capturing=1         the default streams are being captured into a graph (0)
 *   fail=name:nth:code  the nth call of that function from now on, 1-based, does nothing and returns code; may be
 *                       given several times; fail=none takes back those that were not made yet
 *   sticky=1            the first such failure kills the device: queued work is dropped, every later call but
 *                       cuGetError* returns the code. What destroys, frees, unregisters or releases still counts
 *                       as done, so that wcs_leaks() names what nobody tried to give back
 *   exit=report         print findings, leaks and numbers to stderr when the process ends
 */
int wcs_configure(const char *text);

/* Forget everything, queued work included, and go back to the settings of the environment. Handles, registrations
 * and memory from before are gone; every thread is without a current context. */
void wcs_reset(void);

/*
 * Let host memory pose as memory of a device, as cuMemAlloc's does. What overlaps an adopted range of the same
 * device extends it; what overlaps another device's takes it over. The memory stays the caller's. What lies within
 * an allocation of that device is its memory already.
 * -EINVAL for a device there is not, for no bytes, or where it overlaps other memory that this library allocated.
 */
int wcs_adopt(void *start, size_t nbytes, int device);

/* Take back the adopted range that starts here; -ENOENT when none does. */
int wcs_forget(void *start);

/*
 * What was done wrong so far, a line each, oldest first (the first 10,000; all are counted). A line is
 * "kind: function: what, where, how large (thread id)". The kinds:
 *
 *   source-changed            bytes of a queued copy's source are not at execution what they were when queued
 *   outside-device-memory     a copy or fill whose device end is not within one range of the current device
 *   overlapping-copies        it overlaps work in flight on another stream that no event and no wait orders before it
 *   straddles-registrations   a copy whose host end is partly registered, or crosses from one registration to another
 *   range-in-flight           memory unregistered, freed or forgotten with a copy of it in flight
 *   unmapped-in-flight        memory unmapped with a copy of it in flight
 *   destroyed-in-flight       a stream or an event destroyed, or a last context released, with a copy in flight on it
 *   never-recorded            a stream told to wait for an event that was never recorded
 *   overlapping-registration  registered already, wholly or partly (the call returns 712)
 *   no-context                a call that needs a current context, without one (the call returns 201)
 *   wrong-context             a stream or an event of another device than the current one (the call returns 400)
 *   dead-handle               a stream, event or context that was destroyed or never was (400; a context: 201)
 *   after-fork                a call in a child forked since cuInit (the call returns 3)
 *
 * Work is in flight from its call until the host has learnt that it ended: by synchronising with its stream, or
 * with an event recorded after it there or on a stream that waited for such an event. That it happened to have
 * run does not count, so most kinds are found in every mode. source-changed needs work that runs late.
 *
 * Stricter than the driver: it lets an event or a stream be destroyed with work in flight, lets streams of other
 * devices be waited for, and may not ask for a context everywhere. Laxer: every registration counts for all devices.
 */
size_t wcs_violations(char *text, size_t room);

/* The last 100,000 calls, a line each, oldest first: number, thread, function, arguments, result. Arguments are
 * named: stream, event, to, from, nbytes, value. */
size_t wcs_log(char *text, size_t room);

/* What is alive now, a line each: contexts, streams, events, registrations, host and device allocations, and
 * queued work that has not run. Adopted memory is none of it. Returns how many lines there are. */
int wcs_leaks(char *text, size_t room);

struct wcs_facts {
    uint64_t contexts; /* retained, and how often */
    uint64_t streams;  /* without the default ones */
    uint64_t events;
    uint64_t registrations;
    uint64_t host_allocations;
    uint64_t device_allocations;
    uint64_t registered_nbytes; /* by cuMemHostRegister */
    uint64_t registered_nbytes_peak;
    uint64_t copies; /* that ran, in either direction, and their bytes */
    uint64_t copied_nbytes;
    uint64_t unpinned_copies;  /* queued with a host end that is neither registered nor of cuMemHostAlloc */
    uint64_t in_flight_nbytes; /* of copies queued, not yet run */
    uint64_t in_flight_nbytes_peak;
    uint64_t calls;    /* of driver functions */
    uint64_t failures; /* of those that were asked for, made */
    uint64_t violations;
};

void wcs_facts(struct wcs_facts *facts);

#endif
