#define _GNU_SOURCE
#include "standin_machine.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define POISON 0xDB
#define VIOLATIONS_KEPT 10000

enum op_kind { COPY, FILL, WAIT };
enum op_state { PENDING, RUNNING, RAN, DROPPED };

struct op {
    struct op *next; /* in its stream */
    enum op_kind kind;
    enum op_state state;
    int slot;
    uint64_t number; /* in its slot */
    uint64_t serial; /* in the machine */
    const char *function;
    int thread;
    struct span target;
    struct span source;      /* empty for a fill, and for a copy that has its snapshot */
    unsigned char *snapshot; /* of a pageable source */
    bool hashed;
    uint64_t hash; /* of the source when it was queued */
    unsigned char value;
    int wait_slot;
    uint64_t wait_number;
};

struct stream {
    bool open, blocking;
    int device;
    uint64_t queued, ran;    /* the last numbers given and run */
    struct clock before;     /* what is ordered before the next work */
    struct op *first, *last; /* in flight, as far as the host knows */
    struct op *next;         /* the first that has not run */
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER; /* work was queued or has run, or a thread shall stop */

static struct {
    enum mode mode;
    unsigned delay_us;
    uint64_t random;
    uint64_t serial;
    struct stream streams[STREAMS_MAX];
    struct clock known; /* what the host knows to have run */
    int running;        /* operations that a worker is in the middle of */
    bool halting;       /* nothing more begins, what runs ends */
    bool halted;
    struct range *ranges;
    size_t n_ranges, ranges_room;
    struct machine_numbers numbers;
    char **violations;
    size_t n_violations;
    pthread_t workers[DEVICES_MAX];
    bool working[DEVICES_MAX];
    bool stopping;
} machine = {.random = 1};

void machine_lock(void)
{
    pthread_mutex_lock(&lock);
}

void machine_unlock(void)
{
    pthread_mutex_unlock(&lock);
}

void machine_after_fork_in_child(void)
{
    memset(machine.working, 0, sizeof machine.working);
    machine.running = 0;
    changed = (pthread_cond_t)PTHREAD_COND_INITIALIZER; /* nobody waits in here, whatever the copy says */
}

int thread_id(void)
{
    return (int)syscall(SYS_gettid);
}

void machine_seed(uint64_t seed)
{
    machine.random = seed * 0x9E3779B97F4A7C15u | 1;
}

uint64_t machine_random(void)
{
    /* xorshift64*; the high half is the good one. */
    machine.random ^= machine.random >> 12;
    machine.random ^= machine.random << 25;
    machine.random ^= machine.random >> 27;
    return machine.random * 0x2545F4914F6CDD1Du >> 32;
}

static void append_arguments(char *text, size_t room, size_t *length, const char *format, va_list arguments)
{
    size_t at = *length < room ? *length : room;
    int more = vsnprintf(room ? text + at : NULL, room - at, format, arguments);

    if (more > 0)
        *length += (size_t)more;
}

void append(char *text, size_t room, size_t *length, const char *format, ...)
{
    va_list arguments;

    va_start(arguments, format);
    append_arguments(text, room, length, format, arguments);
    va_end(arguments);
}

void violation(const char *kind, const char *format, ...)
{
    char line[1024];
    size_t length = 0;
    va_list arguments;

    append(line, sizeof line, &length, "%s: ", kind);
    va_start(arguments, format);
    append_arguments(line, sizeof line, &length, format, arguments);
    va_end(arguments);
    append(line, sizeof line, &length, " (thread %d)", thread_id());

    machine.numbers.violations++;
    if (machine.n_violations == VIOLATIONS_KEPT)
        return;
    if (!machine.violations)
        machine.violations = calloc(VIOLATIONS_KEPT, sizeof *machine.violations);
    char *kept = strdup(line);
    if (machine.violations && kept)
        machine.violations[machine.n_violations++] = kept;
    else
        free(kept);
}

size_t violations_text(char *text, size_t room)
{
    size_t length = 0;

    if (room)
        *text = 0;
    for (size_t i = 0; i < machine.n_violations; i++)
        append(text, room, &length, "%s\n", machine.violations[i]);
    return length;
}

/* Ranges */

bool spans_overlap(struct span a, struct span b)
{
    return a.nbytes && b.nbytes && a.start < b.start + b.nbytes && b.start < a.start + a.nbytes;
}

bool span_contains(struct span outer, struct span inner)
{
    return outer.start <= inner.start && inner.start + inner.nbytes <= outer.start + outer.nbytes;
}

struct range *range_overlapping(unsigned kinds, struct span span)
{
    for (size_t i = 0; i < machine.n_ranges; i++)
        if (machine.ranges[i].kind & kinds && spans_overlap(machine.ranges[i].span, span))
            return &machine.ranges[i];
    return NULL;
}

struct range *range_at(unsigned kinds, const void *start)
{
    for (size_t i = 0; i < machine.n_ranges; i++)
        if (machine.ranges[i].kind & kinds && machine.ranges[i].span.start == start)
            return &machine.ranges[i];
    return NULL;
}

const struct range *range_next(unsigned kinds, const struct range *after)
{
    for (size_t i = after ? (size_t)(after - machine.ranges) + 1 : 0; i < machine.n_ranges; i++)
        if (machine.ranges[i].kind & kinds)
            return &machine.ranges[i];
    return NULL;
}

bool range_add(enum range_kind kind, struct span span, int device)
{
    if (machine.n_ranges == machine.ranges_room) {
        size_t room = machine.ranges_room ? 2 * machine.ranges_room : 64;
        struct range *ranges = realloc(machine.ranges, room * sizeof *ranges);
        if (!ranges)
            return false;
        machine.ranges = ranges;
        machine.ranges_room = room;
    }
    machine.ranges[machine.n_ranges++] = (struct range){.kind = kind, .span = span, .device = device};
    return true;
}

void range_remove(struct range *range)
{
    machine.n_ranges--;
    memmove(range, range + 1, (size_t)(machine.ranges + machine.n_ranges - range) * sizeof *range);
}

size_t range_count(unsigned kinds, uint64_t *nbytes)
{
    size_t count = 0;

    if (nbytes)
        *nbytes = 0;
    for (const struct range *range = NULL; (range = range_next(kinds, range)); count++)
        if (nbytes)
            *nbytes += range->span.nbytes;
    return count;
}

/* Operations */

static bool moves(const struct op *op)
{
    return op->kind != WAIT;
}

static bool waits_to_run(const struct op *op)
{
    return op->state == PENDING || op->state == RUNNING;
}

/* As far as the host knows; that it happened to have run is not knowing. */
static bool in_flight(const struct op *op)
{
    return moves(op) && op->state != DROPPED && op->number > machine.known.at[op->slot] && !machine.halted;
}

static bool touches(const struct op *op, struct span span)
{
    return spans_overlap(op->target, span) || spans_overlap(op->source, span);
}

/* Walk all operations that are in flight as far as the host knows; NULL begins, and ends. */
static struct op *op_after(const struct op *op)
{
    if (op && op->next)
        return op->next;
    for (int slot = op ? op->slot + 1 : 0; slot < STREAMS_MAX; slot++)
        if (machine.streams[slot].first)
            return machine.streams[slot].first;
    return NULL;
}

static uint64_t hash_bytes(const unsigned char *bytes, size_t nbytes)
{
    uint64_t lanes[4] = {1, 2, 3, 4}, words[4];
    size_t at = 0;

    /* Multiplying by an odd number loses nothing, so one changed byte always shows. */
    for (; at + sizeof words <= nbytes; at += sizeof words) {
        memcpy(words, bytes + at, sizeof words);
        for (int i = 0; i < 4; i++)
            lanes[i] = (lanes[i] ^ words[i]) * 0x9E3779B97F4A7C15u;
    }
    for (; at < nbytes; at++)
        lanes[0] = (lanes[0] ^ bytes[at]) * 0x9E3779B97F4A7C15u;
    return lanes[0] ^ (lanes[1] << 13 | lanes[1] >> 51) ^ (lanes[2] << 29 | lanes[2] >> 35) ^
           (lanes[3] << 43 | lanes[3] >> 21);
}

static bool is_mapped(struct span span)
{
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
    uintptr_t start = (uintptr_t)span.start & ~(page - 1);

    /* With MS_ASYNC Linux looks at the mappings and does nothing else. */
    return !msync((void *)start, (uintptr_t)span.start + span.nbytes - start, MS_ASYNC) || errno != ENOMEM;
}

/*
 * Poison what of [start, end) no work queued before op has still to read or write: such work is ordered before
 * op, or it is a violation on record. The rest is poisoned as that work ends.
 */
static void poison(const struct op *op, unsigned char *start, unsigned char *end)
{
    for (struct op *older = NULL; start < end && (older = op_after(older));) {
        if (!waits_to_run(older) || older->serial >= op->serial)
            continue;
        const struct span spans[] = {older->target, older->source};
        for (int i = 0; i < 2; i++) {
            if (!spans_overlap(spans[i], (struct span){start, (size_t)(end - start)}))
                continue;
            poison(op, start, spans[i].start); /* nothing, unless start lies before it */
            poison(op, spans[i].start + spans[i].nbytes, end);
            return;
        }
    }
    if (start < end)
        memset(start, POISON, (size_t)(end - start));
}

static void poison_where(const struct op *op, struct span span)
{
    if (!spans_overlap(op->target, span))
        return;
    unsigned char *start = op->target.start > span.start ? op->target.start : span.start;
    unsigned char *op_end = op->target.start + op->target.nbytes, *end = span.start + span.nbytes;
    poison(op, start, end < op_end ? end : op_end);
}

static void drop(struct op *op)
{
    op->state = DROPPED;
    if (op->kind == COPY)
        machine.numbers.in_flight_nbytes -= op->target.nbytes;
    free(op->snapshot);
    op->snapshot = NULL;
}

enum outcome { FINE, SOURCE_CHANGED, UNMAPPED };

/* Do what op says; needs no lock. */
static enum outcome perform(const struct op *op)
{
    if (op->kind == WAIT)
        return FINE;
    if (!is_mapped(op->target) || (op->source.nbytes && !is_mapped(op->source)))
        return UNMAPPED;
    if (op->kind == FILL) {
        memset(op->target.start, op->value, op->target.nbytes);
        return FINE;
    }
    bool same = !op->hashed || hash_bytes(op->source.start, op->source.nbytes) == op->hash;
    memcpy(op->target.start, op->snapshot ? op->snapshot : op->source.start, op->target.nbytes);
    return same ? FINE : SOURCE_CHANGED;
}

static void sleep_us(unsigned us)
{
    struct timespec left = {.tv_sec = us / 1000000, .tv_nsec = (long)(us % 1000000) * 1000};

    while (us && nanosleep(&left, &left) && errno == EINTR)
        ;
}

/* Run the next operation of a stream, whose waits are over. Releases the lock meanwhile in mode threads. */
static void run_next(struct stream *stream)
{
    struct op *op = stream->next;
    bool dropped = op->state == DROPPED;
    enum outcome outcome = FINE;

    if (!dropped && machine.mode == THREADS && moves(op)) {
        unsigned delay_us = (unsigned)(machine_random() % (machine.delay_us + 1ull));
        op->state = RUNNING;
        machine.running++;
        machine_unlock();
        sleep_us(delay_us);
        outcome = perform(op);
        machine_lock();
        machine.running--;
    } else if (!dropped) {
        outcome = perform(op);
    }

    stream->next = op->next;
    stream->ran = op->number;
    pthread_cond_broadcast(&changed);
    if (dropped || !moves(op))
        return;
    if (outcome != FINE)
        violation(outcome == UNMAPPED ? "unmapped-in-flight" : "source-changed",
                  "%s: %p + %zu to %p, queued by thread %d", op->function, (void *)op->source.start,
                  op->target.nbytes, (void *)op->target.start, op->thread);
    if (op->kind == COPY && outcome != UNMAPPED) {
        machine.numbers.copies++;
        machine.numbers.copied_nbytes += op->target.nbytes;
    }
    drop(op);
    op->state = RAN;
    for (struct op *later = NULL; (later = op_after(later));)
        if (later->state == PENDING && later->serial > op->serial) {
            poison_where(later, op->target);
            poison_where(later, op->source);
        }
}

static bool is_runnable(const struct stream *stream)
{
    const struct op *op = stream->next;

    return op && op->state != RUNNING &&
           (op->kind != WAIT || op->state == DROPPED || machine.streams[op->wait_slot].ran >= op->wait_number);
}

static void run_until(int slot, uint64_t number)
{
    struct stream *stream = &machine.streams[slot];

    while (stream->ran < number) {
        if (stream->next->kind == WAIT && stream->next->state != DROPPED)
            run_until(stream->next->wait_slot, stream->next->wait_number);
        run_next(stream);
    }
}

static struct stream *random_runnable(int device)
{
    struct stream *chosen = NULL;
    uint64_t count = 0;

    for (int slot = 0; slot < STREAMS_MAX; slot++) {
        struct stream *stream = &machine.streams[slot];
        if ((device < 0 || stream->device == device) && is_runnable(stream) && machine_random() % ++count == 0)
            chosen = stream;
    }
    return chosen;
}

void machine_step(void)
{
    struct stream *stream = machine.mode == RANDOM ? random_runnable(-1) : NULL;

    if (!stream)
        return;
    for (uint64_t left = machine_random() % (stream->queued - stream->ran + 1); left && is_runnable(stream); left--)
        run_next(stream);
}

static void *work(void *device)
{
    machine_lock();
    while (!machine.stopping) {
        struct stream *stream = machine.halting ? NULL : random_runnable((int)(intptr_t)device);
        if (stream)
            run_next(stream);
        else
            pthread_cond_wait(&changed, &lock);
    }
    machine_unlock();
    return NULL;
}

static void start_worker(int device)
{
    sigset_t all, before;

    if (machine.working[device])
        return;
    sigfillset(&all); /* signals are for the program's own threads */
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int rc = pthread_create(&machine.workers[device], NULL, work, (void *)(intptr_t)device);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (rc) {
        fprintf(stderr, "standin: pthread_create: %s\n", strerror(rc));
        abort();
    }
    machine.working[device] = true;
}

void machine_stop(void)
{
    machine.stopping = true;
    pthread_cond_broadcast(&changed);
    for (int device = 0; device < DEVICES_MAX; device++) {
        if (!machine.working[device])
            continue;
        machine_unlock();
        pthread_join(machine.workers[device], NULL);
        machine_lock();
        machine.working[device] = false;
    }
    machine.stopping = false;
}

bool machine_set(enum mode mode, unsigned delay_us)
{
    if (mode != machine.mode) {
        for (int slot = 0; slot < STREAMS_MAX; slot++)
            if (machine.streams[slot].next)
                return false;
        machine_stop();
    }
    machine.mode = mode;
    machine.delay_us = delay_us;
    return true;
}

/* Free the operations that the host knows to have ended. */
static void forget_known(void)
{
    for (int slot = 0; slot < STREAMS_MAX; slot++) {
        struct stream *stream = &machine.streams[slot];
        while (stream->first && stream->first != stream->next &&
               stream->first->number <= machine.known.at[slot]) {
            struct op *op = stream->first;
            stream->first = op->next;
            free(op);
        }
        if (!stream->first)
            stream->last = NULL;
    }
}

void machine_reset(void)
{
    machine_stop();
    for (int slot = 0; slot < STREAMS_MAX; slot++) {
        struct stream *stream = &machine.streams[slot];
        for (struct op *op = stream->first; op;) {
            struct op *next = op->next;
            free(op->snapshot);
            free(op);
            op = next;
        }
        *stream = (struct stream){0};
    }
    for (size_t i = 0; i < machine.n_ranges; i++)
        if (machine.ranges[i].kind & (HOST_ALLOCATED | DEVICE_ALLOCATED))
            free(machine.ranges[i].span.start);
    free(machine.ranges);
    for (size_t i = 0; i < machine.n_violations; i++)
        free(machine.violations[i]);
    free(machine.violations);
    memset(&machine, 0, sizeof machine);
    machine_seed(1);
    for (int device = 0; device < DEVICES_MAX; device++)
        machine.streams[device] = (struct stream){.open = true, .device = device};
}

/* Streams */

int stream_open(int device, bool blocking)
{
    for (int slot = DEVICES_MAX; slot < STREAMS_MAX; slot++) {
        struct stream *stream = &machine.streams[slot];
        if (stream->open || stream->first)
            continue;
        uint64_t number = stream->queued;
        *stream = (struct stream){
            .open = true, .blocking = blocking, .device = device, .queued = number, .ran = number};
        return slot;
    }
    return -1;
}

void stream_close(int slot)
{
    machine.streams[slot].open = false; /* what is queued stays, and runs when something demands it */
    forget_known();
}

static void clock_merge(struct clock *clock, const struct clock *other)
{
    for (int slot = 0; slot < STREAMS_MAX; slot++)
        if (clock->at[slot] < other->at[slot])
            clock->at[slot] = other->at[slot];
}

static void push(int slot, struct op *op)
{
    struct stream *stream = &machine.streams[slot];

    op->slot = slot;
    op->number = ++stream->queued;
    op->serial = ++machine.serial;
    op->thread = thread_id();
    if (stream->last)
        stream->last->next = op;
    else
        stream->first = op;
    stream->last = op;
    if (!stream->next)
        stream->next = op;
}

struct mark machine_mark(int slot)
{
    struct mark mark = {
        .slot = slot, .number = machine.streams[slot].queued, .before = machine.streams[slot].before};
    mark.before.at[slot] = mark.number;
    return mark;
}

void machine_order_with_default(int slot)
{
    const struct stream *stream = &machine.streams[slot];

    for (int other = 0; other < STREAMS_MAX; other++) {
        const struct stream *candidate = &machine.streams[other];
        bool pair = slot < DEVICES_MAX ? candidate->blocking : stream->blocking && other < DEVICES_MAX;
        if (pair && candidate->open && candidate->device == stream->device) {
            struct mark mark = machine_mark(other);
            machine_order(slot, &mark);
        }
    }
}

void machine_order(int slot, const struct mark *mark)
{
    clock_merge(&machine.streams[slot].before, &mark->before);
    if (machine_has_run(mark) || mark->slot == slot)
        return;
    struct op *op = calloc(1, sizeof *op);
    if (!op) {
        fputs("standin: out of memory\n", stderr);
        abort();
    }
    op->kind = WAIT;
    op->wait_slot = mark->slot;
    op->wait_number = mark->number;
    push(slot, op);
    if (machine.mode == THREADS)
        start_worker(machine.streams[slot].device);
    pthread_cond_broadcast(&changed);
}

static void find_conflicts(const struct op *op, int slot)
{
    const struct clock *before = &machine.streams[slot].before;

    for (struct op *other = NULL; (other = op_after(other));) {
        if (other->slot == slot || !in_flight(other) || other->number <= before->at[other->slot])
            continue;
        if (touches(other, op->target) || spans_overlap(other->target, op->source))
            violation("overlapping-copies",
                      "%s: to %p from %p + %zu, while in flight: %s to %p from %p + %zu by thread %d",
                      op->function, (void *)op->target.start, (void *)op->source.start, op->target.nbytes,
                      other->function, (void *)other->target.start, (void *)other->source.start,
                      other->target.nbytes, other->thread);
    }
}

/* Whether work that is still to run will change the source: then its bytes of now say nothing. */
static bool source_is_awaited(struct span source)
{
    for (struct op *op = NULL; (op = op_after(op));)
        if (waits_to_run(op) && spans_overlap(op->target, source))
            return true;
    return false;
}

bool machine_queue(const char *function, int slot, struct span target, unsigned char *source, unsigned char value,
                   bool to_device, bool pinned)
{
    struct op *op = calloc(1, sizeof *op);
    bool staged = source && to_device && !pinned;

    if (!op || (staged && !(op->snapshot = malloc(target.nbytes)))) {
        free(op);
        return false;
    }
    op->kind = source ? COPY : FILL;
    op->function = function;
    op->target = target;
    op->source = (struct span){source, source ? target.nbytes : 0};
    op->value = value;

    machine_order_with_default(slot);
    find_conflicts(op, slot);
    if (staged) {
        memcpy(op->snapshot, source, target.nbytes);
        op->source.nbytes = 0;
    } else if (source && to_device && machine.mode != EARLY && !source_is_awaited(op->source)) {
        op->hashed = true;
        op->hash = hash_bytes(source, target.nbytes);
    }
    push(slot, op);
    if (machine.mode != EARLY)
        poison_where(op, target);
    if (source) {
        machine.numbers.unpinned_copies += !pinned;
        machine.numbers.in_flight_nbytes += target.nbytes;
        if (machine.numbers.in_flight_nbytes_peak < machine.numbers.in_flight_nbytes)
            machine.numbers.in_flight_nbytes_peak = machine.numbers.in_flight_nbytes;
    }

    if (machine.mode == EARLY)
        run_until(slot, op->number);
    if (machine.mode == THREADS)
        start_worker(machine.streams[slot].device);
    pthread_cond_broadcast(&changed);
    if (source && !to_device && !pinned) {
        struct mark mark = machine_mark(slot);
        machine_synchronise(&mark);
    }
    return true;
}

bool machine_has_run(const struct mark *mark)
{
    return machine.streams[mark->slot].ran >= mark->number;
}

void machine_observe(const struct mark *mark)
{
    clock_merge(&machine.known, &mark->before);
    forget_known();
}

void machine_synchronise(const struct mark *mark)
{
    if (machine.mode == THREADS)
        while (!machine_has_run(mark))
            pthread_cond_wait(&changed, &lock);
    else
        run_until(mark->slot, mark->number);
    machine_observe(mark);
}

bool machine_in_flight(const struct mark *mark)
{
    for (struct op *op = machine.streams[mark->slot].first; op && op->number <= mark->number; op = op->next)
        if (in_flight(op))
            return true;
    return false;
}

void machine_give_up(const char *function, struct span span)
{
    for (struct op *op = NULL; (op = op_after(op));)
        if (in_flight(op) && touches(op, span))
            violation("range-in-flight", "%s: %p + %zu, of which in flight: %s to %p from %p + %zu by thread %d",
                      function, (void *)span.start, span.nbytes, op->function, (void *)op->target.start,
                      (void *)op->source.start, op->target.nbytes, op->thread);
    for (struct op *op = NULL; (op = op_after(op));) {
        if (!touches(op, span))
            continue;
        if (op->state == PENDING)
            drop(op);
        if (op->state == RUNNING) {
            pthread_cond_wait(&changed, &lock);
            op = NULL; /* the queues have changed: look again from the start */
        }
    }
}

void machine_halt(void)
{
    /* What runs ends first, while nobody knows yet: who is told that the device is dead may use its memory again. */
    machine.halting = true;
    while (machine.running)
        pthread_cond_wait(&changed, &lock);
    machine.halting = false;
    for (struct op *op = NULL; (op = op_after(op));)
        if (op->state == PENDING)
            drop(op);
    machine.halted = true;
    pthread_cond_broadcast(&changed);
}

void machine_for_pending(void (*describe)(void *argument, const char *line), void *argument)
{
    char line[256];

    for (struct op *op = NULL; (op = op_after(op));) {
        if (!moves(op) || !waits_to_run(op))
            continue;
        snprintf(line, sizeof line, "queued work: %s to %p from %p + %zu by thread %d", op->function,
                 (void *)op->target.start, (void *)op->source.start, op->target.nbytes, op->thread);
        describe(argument, line);
    }
}

struct machine_numbers machine_numbers(void)
{
    return machine.numbers;
}
