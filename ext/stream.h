/*
 * One device of the driver as the engine uses it: the primary context that torch uses too, one copy stream, and a
 * ring of page-locked slots that bytes pass through on their way to it; and which host memory it can read by
 * itself. Never allocates device memory and never changes the context of a thread that did not enter.
 *
 * Sizes are bytes. Functions return 0, -errno or a driver's error (cuda.h).
 */
#ifndef WEIGHTCACHE_STREAM_H
#define WEIGHTCACHE_STREAM_H

#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "cuda.h"
#include "memory.h"

#define WC_MAX_SLOTS 64u
#define WC_MAX_REGISTRATIONS 1024u

/* One place of the ring. Whoever took it owns it until it is given back; its event says when its copies are done. */
struct wc_slot {
    unsigned char *start; /* a multiple of 4096 */
    wc_cu_event copied;
};

enum wc_locking {
    WC_LOCKED_REGISTERED, /* our memory, registered */
    WC_LOCKED_ALLOCATED,  /* the driver's own, because ours could not be registered */
    WC_PAGEABLE,          /* neither was to be had: copies are right, and slower */
};

struct wc_ring {
    struct wc_memory memory; /* start is NULL where the driver allocated */
    unsigned char *start;
    size_t slot_nbytes;
    unsigned n_slots;
    enum wc_locking locking;
    int refused;          /* the error for which the first way was not taken, 0 where it was */
    pthread_mutex_t lock; /* of what follows */
    pthread_cond_t freed;
    unsigned n_free, n_waiting;
    struct wc_slot *free[WC_MAX_SLOTS];
    struct wc_slot slots[WC_MAX_SLOTS];
};

/* Host memory that the device reads by itself. */
struct wc_registration {
    const unsigned char *start;
    size_t nbytes;
};

struct wc_device {
    const struct wc_cuda *cuda;
    wc_cu_device handle;
    wc_cu_context context;
    wc_cu_stream copies;
    wc_cu_event before; /* recorded on torch's stream, waited for by ours; guarded by order */
    pthread_mutex_t order;
    pid_t owner; /* the driver does not survive a fork */
    struct wc_ring ring;
    pthread_rwlock_t registered; /* of what follows: read by runs as long as they last, written by register */
    size_t n_registrations;
    struct wc_registration registrations[WC_MAX_REGISTRATIONS];
};

/*
 * Open a device and make its ring of n_slots (1 to WC_MAX_SLOTS) slots of slot_nbytes (a multiple of 4096) each.
 * `cuda` must outlive it. Nothing is left behind on failure.
 */
int wc_device_open(struct wc_device *device, const struct wc_cuda *cuda, int ordinal, size_t slot_nbytes,
                   unsigned n_slots, int numa_node);

/* Wait for the device, free the ring, unregister everything. Nothing of it may be in use; in a forked child it does
 * nothing. */
void wc_device_close(struct wc_device *device);

/* -ECHILD in a process that was forked from the one that opened the device, else 0. */
int wc_device_check(const struct wc_device *device);

/*
 * Let every copy enqueued from now on wait for what `stream` holds now, such as the last use of memory that its
 * allocator has just handed out again. Any thread. -EBUSY: the stream is being captured into a graph.
 */
int wc_device_order_after(struct wc_device *device, wc_cu_stream stream);

/*
 * Register [start, start + nbytes) for the device to read by itself, or undo what was registered at start.
 * Waits until no run uses the device. -EEXIST: it overlaps what is registered. -ENOENT: nothing is registered
 * there. -ENOSPC: too many registrations. is_frozen: whole pages that are mapped to be read only, of memory that
 * could be written; they stay so.
 */
int wc_device_register(struct wc_device *device, void *start, size_t nbytes, bool is_frozen);
int wc_device_unregister(struct wc_device *device, void *start);

/* How many bytes from `start` on, at most nbytes, lie in one registration; 0 if the first does not. During a run. */
size_t wc_device_registered(const struct wc_device *device, const unsigned char *start, size_t nbytes);

#define WC_RING_PATIENCE_MS 50 /* so that who waits can look whether they still should */

/* Take a free slot, or return NULL where there is none: at once, or if `wait`, after WC_RING_PATIENCE_MS. */
struct wc_slot *wc_ring_take(struct wc_ring *ring, bool wait);

/* Give a slot back; its copies are done. */
void wc_ring_give(struct wc_ring *ring, struct wc_slot *slot);

/* Whether somebody waits for a slot now. */
bool wc_ring_is_wanted(struct wc_ring *ring);

/*
 * Enqueue a copy from a slot or from registered memory, and note in `copied` that everything up to here is to be
 * waited for. On a thread that entered the context.
 */
int wc_device_copy(struct wc_device *device, wc_cu_pointer to, const void *from, size_t nbytes);
int wc_device_record(struct wc_device *device, wc_cu_event copied);
int wc_device_wait(struct wc_device *device, wc_cu_event copied);

#endif
