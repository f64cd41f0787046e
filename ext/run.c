#define _GNU_SOURCE
#include "run.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "checksum.h"
#include "copy.h"
#include "memory.h"
#include "reader.h"

#ifndef WC_BUG
#define WC_BUG 0 /* the tests build mutants, each of which one of them must catch: see tests/native/test_mutants.py */
#endif

#define COPIED_BLOCK ((size_t)4 << 20) /* of a copy between places in host memory, before it is looked whether to stop */
#define MOST_HELD 8u /* slots of one thread; more in flight gain nothing on any link */

/* Bytes on their way to the device: the slot they lie in, or whose event stands for them, and their operation. */
struct in_flight {
    struct wc_slot *slot;
    uint32_t op;
    bool is_last; /* with these the operation is done */
};

/* One thread of a run. */
struct worker {
    struct wc_run *run;
    struct wc_reading reading;
    unsigned most_held;
    unsigned first, n_held; /* in flight, oldest first, as a ring */
    bool is_ending;
    struct in_flight held[MOST_HELD];
};

static void count(struct wc_run *run, int which, uint64_t amount)
{
    atomic_fetch_add_explicit(&run->counters[which], amount, memory_order_relaxed);
}

static void mark_done(struct wc_run *run, uint32_t index)
{
    if (run->ops[index].status != WC_WAITING)
        return; /* bytes of it that went before did not arrive */
    run->ops[index].status = WC_DONE;
    count(run, WC_N_DONE, 1);
    pthread_mutex_lock(&run->lock);
    run->done[run->n_done++] = index;
    pthread_cond_signal(&run->moved);
    pthread_mutex_unlock(&run->lock);
}

/* Note an operation's error; the first one stops the rest, and stays the operation's. */
static void mark_failed(struct wc_run *run, uint32_t index, int rc)
{
    int32_t *status = &run->ops[index].status;

    if (*status != WC_WAITING && *status != -ECANCELED)
        return;
    *status = rc;
    if (rc == -ECANCELED)
        return;
    pthread_mutex_lock(&run->lock);
    if (run->first_failed == run->n_ops)
        run->first_failed = index;
    pthread_mutex_unlock(&run->lock);
    atomic_store(&run->ending, 1);
}

static bool is_stopped(const struct wc_run *run)
{
    return atomic_load_explicit(&run->ending, memory_order_relaxed) ||
           (run->stop && atomic_load_explicit(run->stop, memory_order_relaxed));
}

/* -- slots */

/* Wait for the oldest bytes in flight and return their slot. */
static struct wc_slot *settle_oldest(struct worker *worker)
{
    struct in_flight oldest = worker->held[worker->first];

    worker->first = (worker->first + 1) % MOST_HELD;
    worker->n_held--;
    bool skipped = WC_BUG == (worker->is_ending ? 2 : 1);
    int rc = skipped ? 0 : wc_device_wait(worker->run->device, oldest.slot->copied);
    if (rc) { /* nobody knows then whether the slot is still read: wait for all, which a dead device answers at once */
        worker->run->device->cuda->stream_synchronize(worker->run->device->copies);
        mark_failed(worker->run, oldest.op, rc);
    } else if (oldest.is_last) {
        mark_done(worker->run, oldest.op);
    }
    return oldest.slot;
}

static void settle_all(struct worker *worker)
{
    worker->is_ending = true;
    while (worker->n_held)
        wc_ring_give(&worker->run->device->ring, settle_oldest(worker));
}

/* Let go of what is copied already, and of more where another run waits. */
static void settle_ready(struct worker *worker)
{
    struct wc_device *device = worker->run->device;

    while (worker->n_held &&
           (device->cuda->event_query(worker->held[worker->first].slot->copied) != WC_CU_NOT_READY ||
            wc_ring_is_wanted(&device->ring)))
        wc_ring_give(&device->ring, settle_oldest(worker));
}

/* Take a slot: a free one as long as this thread may hold more, else its own oldest once that is copied. NULL when
 * the run is stopped meanwhile. */
static struct wc_slot *take_slot(struct worker *worker)
{
    struct wc_ring *ring = &worker->run->device->ring;

    while (worker->n_held) {
        struct wc_slot *slot = worker->n_held < worker->most_held ? wc_ring_take(ring, false) : NULL;
        if (!slot)
            slot = settle_oldest(worker);
        if (worker->n_held == 0 || !wc_ring_is_wanted(ring))
            return slot;
        wc_ring_give(ring, slot);
        wc_ring_give(ring, settle_oldest(worker));
    }
    struct wc_slot *slot = NULL;
    while (!slot && !is_stopped(worker->run))
        slot = wc_ring_take(ring, true);
    return slot;
}

/* Copy what the spans want of the operation's next bytes, which lie at `from`; keeps the slot or gives it back. */
static int send(struct worker *worker, uint32_t index, uint32_t *span, size_t nbytes, const unsigned char *from,
                struct wc_slot *slot, int counter)
{
    struct wc_run *run = worker->run;
    const struct wc_op *op = &run->ops[index];
    const uint64_t at = op->moved, stop = at + nbytes;
    uint64_t n_sent = 0;
    bool was_tried = false; /* a call that failed may have begun something */
    int rc = 0;

    for (; rc == 0 && *span < op->first_span + op->n_spans; ++*span) {
        const struct wc_span *each = &run->spans[*span];
        uint64_t begin = each->from > at ? each->from : at;
        uint64_t end = each->from + each->nbytes < stop ? each->from + each->nbytes : stop;
        if (begin >= stop)
            break;
        if (begin < end) {
            rc = wc_device_copy(run->device, each->to + (begin - each->from), from + (begin - at), end - begin);
            was_tried = true;
            n_sent += rc ? 0 : end - begin;
        }
        if (each->from + each->nbytes > stop)
            break; /* the rest of it comes with the next bytes */
    }
    if (!was_tried) {
        wc_ring_give(&run->device->ring, slot);
        return rc;
    }
    count(run, counter, n_sent);
    int recorded = wc_device_record(run->device, slot->copied);
    if (recorded) { /* copies may be under way that no event stands for */
        run->device->cuda->stream_synchronize(run->device->copies);
        wc_ring_give(&run->device->ring, slot);
        return rc ? rc : recorded;
    }
    worker->held[(worker->first + worker->n_held++) % MOST_HELD] = (struct in_flight){slot, index, false};
    return rc;
}

/* -- operations */

static int read_file(struct worker *worker, struct wc_file *file, off_t offset, struct wc_target target,
                     struct wc_checksum *sum)
{
    struct wc_reading *reading = &worker->reading;
    uint64_t direct = reading->direct_nbytes, cached = reading->cached_nbytes;

    int rc = wc_file_read(reading, file, offset, target, sum);
    count(worker->run, WC_N_DIRECT, reading->direct_nbytes - direct);
    count(worker->run, WC_N_CACHED, reading->cached_nbytes - cached);
    if (reading->refused_errno)
        atomic_store_explicit(&worker->run->counters[WC_REFUSED], (uint64_t)reading->refused_errno,
                              memory_order_relaxed);
    return rc;
}

static int to_host(struct worker *worker, struct wc_op *op, struct wc_file *file, bool past_cache,
                   struct wc_checksum *sum)
{
    unsigned char *to = (unsigned char *)(uintptr_t)op->target;
    const bool is_fresh = op->flags & WC_POPULATE;

    if (op->nbytes == 0) /* then neither address has to be one */
        return 0;
    if (op->flags & WC_FROM_MEMORY) {
        const unsigned char *from = (const unsigned char *)(uintptr_t)op->offset;
        for (uint64_t at = 0; at < op->nbytes; at += COPIED_BLOCK) {
            size_t nbytes = op->nbytes - at < COPIED_BLOCK ? op->nbytes - at : COPIED_BLOCK;
            int rc = is_stopped(worker->run) ? -ECANCELED : is_fresh ? wc_populate(to + at, nbytes) : 0;
            if (rc)
                return rc;
            memcpy(to + at, from + at, nbytes);
        }
    } else {
        struct wc_target target = {.start = to,
                                   .nbytes = op->nbytes,
                                   .is_padded = op->flags & WC_PADDED,
                                   .is_fresh = is_fresh,
                                   .past_cache = past_cache};
        int rc = read_file(worker, file, (off_t)op->offset, target, sum);
        if (rc)
            return rc;
    }
    op->moved = op->nbytes;
    return 0;
}

/* Bring the next bytes of a file into the slot, its first page at the slot's start; returns how many of the operation. */
static int fill_from_file(struct worker *worker, const struct wc_op *op, struct wc_file *file, bool past_cache,
                          struct wc_checksum *sum, uint64_t at, struct wc_slot *slot, size_t *nbytes)
{
    const size_t skip = (op->offset + at) % WC_ALIGNMENT;
    const size_t room = worker->run->device->ring.slot_nbytes - skip;

    *nbytes = op->nbytes - at < room ? op->nbytes - at : room;
    struct wc_target target = {
        .start = slot->start, .nbytes = skip + *nbytes, .is_padded = true, .past_cache = past_cache};
    return read_file(worker, file, (off_t)(op->offset + at - skip), target, sum);
}

static int to_device(struct worker *worker, uint32_t index, struct wc_file *file, bool past_cache,
                     struct wc_checksum *sum)
{
    struct wc_run *run = worker->run;
    struct wc_op *op = &run->ops[index];
    struct wc_device *device = run->device;
    uint32_t span = op->first_span;
    int rc = 0;

    op->moved = 0;
    while (rc == 0 && op->moved < op->nbytes) {
        if (is_stopped(run))
            return -ECANCELED;
        struct wc_slot *slot = take_slot(worker);
        if (!slot)
            return -ECANCELED;
        const unsigned char *from = slot->start;
        int counter = WC_N_COPIED;
        size_t nbytes = op->nbytes - op->moved;
        if (nbytes > device->ring.slot_nbytes)
            nbytes = device->ring.slot_nbytes;
        if (op->flags & WC_FROM_MEMORY) {
            const unsigned char *source = (const unsigned char *)(uintptr_t)op->offset + op->moved;
            size_t readable = wc_device_registered(device, source, nbytes);
            if (readable) {
                nbytes = readable;
                from = source;
                counter = WC_N_BY_DEVICE;
            } else {
                wc_copy_past_cache(slot->start, source, nbytes);
            }
        } else {
            rc = fill_from_file(worker, op, file, past_cache, sum, op->moved, slot, &nbytes);
            from += (op->offset + op->moved) % WC_ALIGNMENT;
        }
        if (rc) {
            wc_ring_give(&device->ring, slot);
            return rc;
        }
        if (WC_BUG == 3 && counter == WC_N_COPIED)
            from = device->ring.slots[(slot - device->ring.slots + 1) % device->ring.n_slots].start;
        rc = send(worker, index, &span, nbytes, from, slot, counter);
        op->moved += nbytes;
    }
    return rc;
}

/* Carry an operation out once. Sets *right to whether its checksum was as expected. */
static int carry_once(struct worker *worker, uint32_t index, struct wc_file *file, bool past_cache, bool *right)
{
    struct wc_op *op = &worker->run->ops[index];
    struct wc_checksum sum, *checked = op->flags & WC_CHECK ? &sum : NULL;

    if (checked)
        wc_checksum_begin(checked, op->nbytes);
    int rc = op->flags & WC_TO_DEVICE ? to_device(worker, index, file, past_cache, checked)
                                      : to_host(worker, op, file, past_cache, checked);
    *right = rc == 0 && (!checked || wc_checksum_end(checked) == op->checksum || WC_BUG == 7);
    return rc;
}

static int carry(struct worker *worker, uint32_t index)
{
    struct wc_run *run = worker->run;
    struct wc_op *op = &run->ops[index];
    struct wc_file file;
    bool right = false;
    int rc;

    if (op->flags & WC_FROM_MEMORY)
        return carry_once(worker, index, NULL, false, &right);
    rc = op->fd >= 0 ? wc_file_reopen(&file, op->fd) : wc_file_open(&file, run->folder_fd, run->names + op->name);
    if (rc)
        return rc;
    for (bool past_cache = op->flags & WC_PAST_CACHE;; past_cache = true) {
        if (past_cache) /* helps where O_DIRECT is refused */
            posix_fadvise(file.fd, (off_t)op->offset, (off_t)op->nbytes, POSIX_FADV_DONTNEED);
        rc = carry_once(worker, index, &file, past_cache, &right);
        if (rc || right)
            break;
        if (past_cache) {
            rc = -EBADMSG;
            break;
        }
        /* Memory rots too: what the page cache shows may be wrong although the disk is right. */
        op->reread++;
        count(run, WC_N_REREAD, 1);
    }
    wc_file_close(&file);
    if (rc == 0 && op->flags & WC_CHECK)
        count(run, WC_N_CHECKED, op->nbytes);
    return rc;
}

/* Note how an operation ended; one whose bytes are still in flight is done with the last of them. */
static void conclude(struct worker *worker, uint32_t index, int rc)
{
    if (rc) {
        mark_failed(worker->run, index, rc);
        return;
    }
    struct in_flight *newest = &worker->held[(worker->first + worker->n_held + MOST_HELD - 1) % MOST_HELD];
    if (worker->n_held && newest->op == index)
        newest->is_last = true;
    else
        mark_done(worker->run, index);
}

static void *work(void *argument)
{
    struct wc_run *run = argument;
    struct worker worker = {.run = run, .reading = {.stops = {&run->ending, run->stop}}};
    struct wc_cuda_entered entered;
    int rc = 0;

    if (run->device) {
        unsigned share = run->device->ring.n_slots / run->n_threads;
        worker.most_held = share < 1 ? 1 : share < MOST_HELD ? share : MOST_HELD;
        rc = wc_cuda_enter(run->device->cuda, run->device->context, &entered);
    }
    const bool has_entered = run->device && rc == 0;
    while (!is_stopped(run)) {
        size_t index = atomic_fetch_add(&run->next, 1);
        if (index >= run->n_ops)
            break;
        if (rc == 0) {
            conclude(&worker, (uint32_t)index, carry(&worker, (uint32_t)index));
        } else {
            mark_failed(run, (uint32_t)index, rc);
        }
        if (worker.n_held)
            settle_ready(&worker);
    }
    if (has_entered) {
        settle_all(&worker);
        wc_cuda_leave(run->device->cuda, &entered);
    }
    wc_reading_free(&worker.reading);
    pthread_mutex_lock(&run->lock);
    run->n_running--;
    pthread_cond_signal(&run->moved);
    pthread_mutex_unlock(&run->lock);
    return NULL;
}

/* -- the run */

static bool is_sound(const struct wc_run *run, const struct wc_op *op)
{
    const uint32_t known =
        WC_FROM_MEMORY | WC_TO_DEVICE | WC_CHECK | WC_PADDED | WC_POPULATE | WC_PAST_CACHE;
    uint64_t from = 0;

    if (op->flags & ~known || op->nbytes > INT64_MAX || op->offset > INT64_MAX - op->nbytes)
        return false;
    if (op->flags & WC_FROM_MEMORY ? op->flags & WC_CHECK || (op->nbytes && !op->offset)
                                   : op->fd < 0 && (!run->names || op->name >= run->names_nbytes))
        return false;
    if (op->flags & WC_CHECK && op->offset % WC_ALIGNMENT)
        return false;
    if (!(op->flags & WC_TO_DEVICE))
        return op->target || !op->nbytes;
    if (!run->device || op->first_span > run->n_spans || op->n_spans > run->n_spans - op->first_span)
        return false;
    for (uint32_t i = op->first_span; i < op->first_span + op->n_spans; i++) {
        const struct wc_span *each = &run->spans[i];
        if (each->from < from || each->nbytes > op->nbytes || each->from > op->nbytes - each->nbytes || !each->to)
            return false;
        from = each->from + each->nbytes;
    }
    return true;
}

static int start_threads(struct wc_run *run)
{
    sigset_t all, before;
    pthread_attr_t attributes, *chosen = NULL;
    int rc = 0;

    /* Signals are for the threads that know what to do with them; faults are the faulting thread's own. */
    static const int faults[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGSYS};
    sigfillset(&all);
    for (size_t i = 0; i < sizeof faults / sizeof *faults; i++)
        sigdelset(&all, faults[i]);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    pthread_attr_init(&attributes);
    if (run->cpus && pthread_attr_setaffinity_np(&attributes, sizeof *run->cpus, run->cpus) == 0)
        chosen = &attributes;
    pthread_mutex_lock(&run->lock); /* nobody ends before all are counted */
    for (; run->n_started < run->n_threads; run->n_started++) {
        rc = pthread_create(&run->threads[run->n_started], chosen, work, run);
        if (rc && rc != EAGAIN && chosen) { /* none of those is allowed, or it is forbidden to choose: anywhere */
            chosen = NULL;
            rc = pthread_create(&run->threads[run->n_started], chosen, work, run);
        }
        if (rc)
            break;
        pthread_setname_np(run->threads[run->n_started], "weightcache-io");
    }
    run->n_running = run->n_started;
    pthread_mutex_unlock(&run->lock);
    pthread_attr_destroy(&attributes);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return run->n_started ? 0 : -rc; /* fewer than wanted carry the run out too */
}

int wc_run_begin(struct wc_run *run)
{
    pthread_condattr_t monotonic;

    run->first_failed = run->n_ops;
    if (run->names && (run->names_nbytes == 0 || run->names[run->names_nbytes - 1]))
        return -EINVAL;
    for (size_t i = 0; i < run->n_ops; i++) {
        if (!is_sound(run, &run->ops[i])) {
            run->first_failed = i;
            return -EINVAL;
        }
        run->ops[i].status = WC_WAITING;
        run->ops[i].reread = 0;
        run->ops[i].moved = 0;
    }
    if (run->n_threads > run->n_ops)
        run->n_threads = run->n_ops ? (unsigned)run->n_ops : 1;
    int rc = run->device ? wc_device_order_after(run->device, run->after) : 0;
    if (rc)
        return rc;

    run->n_started = 0;
    run->n_done = 0;
    atomic_store(&run->next, 0);
    atomic_store(&run->ending, 0);
    run->threads = malloc(run->n_threads * sizeof *run->threads);
    run->done = malloc((run->n_ops + 1) * sizeof *run->done);
    if (!run->threads || !run->done) {
        rc = -ENOMEM;
        goto fail;
    }
    pthread_mutex_init(&run->lock, NULL);
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(&run->moved, &monotonic);
    pthread_condattr_destroy(&monotonic);
    if (run->device)
        pthread_rwlock_rdlock(&run->device->registered);
    rc = start_threads(run);
    if (rc == 0)
        return 0;
    if (run->device)
        pthread_rwlock_unlock(&run->device->registered);
    pthread_cond_destroy(&run->moved);
    pthread_mutex_destroy(&run->lock);
fail:
    free(run->threads);
    free(run->done);
    run->done = NULL;
    return rc;
}

void wc_run_wait(struct wc_run *run, size_t n_seen, unsigned timeout_ms, size_t *n_done, bool *has_ended)
{
    struct timespec until;

    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_sec += timeout_ms / 1000;
    until.tv_nsec += (long)(timeout_ms % 1000) * 1000000;
    if (until.tv_nsec >= 1000000000) {
        until.tv_sec++;
        until.tv_nsec -= 1000000000;
    }
    pthread_mutex_lock(&run->lock);
    while (run->n_done <= n_seen && run->n_running &&
           pthread_cond_timedwait(&run->moved, &run->lock, &until) == 0)
        ;
    *n_done = run->n_done;
    *has_ended = run->n_running == 0;
    pthread_mutex_unlock(&run->lock);
}

void wc_run_end(struct wc_run *run)
{
    for (unsigned i = 0; i < run->n_started; i++)
        pthread_join(run->threads[i], NULL);
    for (size_t i = 0; i < run->n_ops; i++)
        if (run->ops[i].status == WC_WAITING)
            run->ops[i].status = -ECANCELED;
    if (run->device)
        pthread_rwlock_unlock(&run->device->registered);
    pthread_cond_destroy(&run->moved);
    pthread_mutex_destroy(&run->lock);
    free(run->threads);
    run->threads = NULL;
}
