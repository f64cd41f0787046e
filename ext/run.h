/*
 * An array of operations carried out on threads of its own: bytes of files or of memory, checked on the way, into
 * host memory or through the ring to a device. Never opens a device and never keeps a thread when it has ended.
 *
 * Sizes and offsets are bytes. Functions return 0 or -errno.
 */
#ifndef WEIGHTCACHE_RUN_H
#define WEIGHTCACHE_RUN_H

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "stream.h"

enum {
    WC_FROM_MEMORY = 1, /* the source is host memory at `offset`, else a file */
    WC_TO_DEVICE = 2,   /* the target is the operation's spans, else host memory at `target` */
    WC_CHECK = 4,       /* the file's bytes have this checksum, and offset is a multiple of 4096 */
    WC_PADDED = 8,      /* host memory behind the target, up to a multiple of 4096 bytes, may be written */
    WC_POPULATE = 16,   /* host memory at the target was never touched */
    WC_PAST_CACHE = 32, /* the page cache is not to be believed */
};

enum { WC_WAITING = 0, WC_DONE = 1 }; /* an operation's status; anything else is an error */

/* Bytes [from, from + nbytes) of an operation go to the device's memory at `to`. */
struct wc_span {
    uint64_t from, to, nbytes;
};

/* One operation, 72 bytes without padding: numpy's structured type in Python, filled there, status read there. */
struct wc_op {
    int32_t fd;         /* the file, open for reading; or -1: the one called `name` below the run's folder */
    uint32_t flags;
    uint64_t name;      /* offset of its NUL-terminated name in the run's names */
    uint64_t offset;    /* of the first byte in the file, or its address in memory */
    uint64_t nbytes;
    uint64_t target;    /* address of host memory */
    uint32_t first_span, n_spans; /* in the run's spans, ascending by `from`, not overlapping */
    uint64_t checksum;  /* XXH3-64 of all of it */
    int32_t status;     /* WC_WAITING, WC_DONE, -errno or a driver's error; -ECANCELED after another's error */
    uint32_t reread;    /* how often a wrong checksum was read again, past the page cache */
    uint64_t moved;     /* bytes that were read or copied: how far it came */
};

/* What a run has done so far: counters that other threads may read while it lasts. */
enum {
    WC_N_DIRECT,   /* bytes read past the page cache */
    WC_N_CACHED,   /* bytes read through it */
    WC_N_CHECKED,  /* bytes whose checksum was right */
    WC_N_COPIED,   /* bytes copied to the device through the ring */
    WC_N_BY_DEVICE, /* bytes that the device read from registered memory by itself */
    WC_N_DONE,     /* operations */
    WC_N_REREAD,   /* operations read again because of a wrong checksum */
    WC_REFUSED,    /* errno of O_DIRECT where it was wanted and could not be had, else 0 */
    WC_N_COUNTERS
};

struct wc_run {
    /* Given; read-only but for the operations' last three fields. All memory stays the caller's. */
    struct wc_op *ops;
    size_t n_ops;
    const struct wc_span *spans;
    size_t n_spans;
    const char *names; /* NUL-terminated, one after the other; NULL where every operation has its fd */
    size_t names_nbytes;
    int folder_fd;
    struct wc_device *device; /* NULL where no operation goes to one */
    wc_cu_stream after;       /* what it holds now comes before the first copy */
    unsigned n_threads;       /* at least 1; no more than there are operations are started */
    const cpu_set_t *cpus;    /* where they run, or NULL */
    _Atomic uint64_t *counters; /* WC_N_COUNTERS of them */
    const atomic_int *stop;   /* when it is not 0 the run ends soon, which is no error; may be NULL */

    /* The run's own. */
    atomic_int ending; /* set by the first error, and by whoever gives the run up */
    atomic_size_t next;
    pthread_t *threads;
    unsigned n_started;
    pthread_mutex_t lock; /* of what follows */
    pthread_cond_t moved;
    unsigned n_running;
    uint32_t *done; /* operations in the order in which they were done */
    size_t n_done;
    size_t first_failed; /* the operation whose error came first; n_ops if none did */
};

/*
 * Check the array and start the threads. On failure nothing runs and wc_run_end must not be called.
 *
 * -EINVAL: an operation that makes no sense; first_failed names it. -ECHILD: the device was opened before a fork.
 */
int wc_run_begin(struct wc_run *run);

/* Wait until more than n_seen operations are done, all threads have ended, or timeout_ms is over. */
void wc_run_wait(struct wc_run *run, size_t n_seen, unsigned timeout_ms, size_t *n_done, bool *has_ended);

/*
 * Wait for the threads and free what the run owns but `done`, which is the caller's to free(). Every operation has
 * a status, and what is done is done: on the device too, for whoever uses it from now on, on any stream.
 */
void wc_run_end(struct wc_run *run);

#endif
