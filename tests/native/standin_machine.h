/*
 * The machine behind the stand-in's driver calls: memory ranges, streams of queued work, when it runs, and which
 * of it the host knows to have ended. Knows nothing of contexts, handles, events or injected failures.
 *
 * There is one machine. Whoever calls a function here holds its lock, machine_lock() itself excepted; functions
 * said to wait release it meanwhile.
 */
#ifndef STANDIN_MACHINE_H
#define STANDIN_MACHINE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define DEVICES_MAX 16
#define STREAMS_MAX 256 /* slots; the first DEVICES_MAX are the devices' default streams */

enum mode { LATE, EARLY, RANDOM, THREADS };

struct span {
    unsigned char *start;
    size_t nbytes;
};

enum range_kind { REGISTERED = 1, HOST_ALLOCATED = 2, DEVICE_ALLOCATED = 4, ADOPTED = 8 };
#define PINNED (REGISTERED | HOST_ALLOCATED)
#define ON_DEVICE (DEVICE_ALLOCATED | ADOPTED)

struct range {
    enum range_kind kind;
    struct span span;
    int device; /* of device memory */
};

/* For each stream slot the number of the last piece of work that is included. A slot's numbers never restart. */
struct clock {
    uint64_t at[STREAMS_MAX];
};

/* A point in a stream: what has been queued up to there, and everything that is ordered before it. */
struct mark {
    int slot;
    uint64_t number;
    struct clock before; /* includes the point itself */
};

struct machine_numbers {
    uint64_t copies, copied_nbytes, unpinned_copies;
    uint64_t in_flight_nbytes, in_flight_nbytes_peak;
    uint64_t violations;
};

void machine_lock(void);
void machine_unlock(void);
void machine_after_fork_in_child(void);

/* How work runs from now on. False, and nothing changes, while work is queued and the mode would be another. */
bool machine_set(enum mode mode, unsigned delay_us);
void machine_seed(uint64_t seed);
uint64_t machine_random(void);
/* Join the machine's threads and forget all; waits, and nobody else may be in here. */
void machine_reset(void);
/* Join the machine's threads; waits. */
void machine_stop(void);

/* Ranges. Pointers to them hold until the next one is added or removed. `kinds` is a sum of range_kind. */
bool spans_overlap(struct span a, struct span b);
bool span_contains(struct span outer, struct span inner);
struct range *range_overlapping(unsigned kinds, struct span span);
struct range *range_at(unsigned kinds, const void *start);
bool range_add(enum range_kind kind, struct span span, int device); /* false: no memory */
void range_remove(struct range *range);
size_t range_count(unsigned kinds, uint64_t *nbytes);
const struct range *range_next(unsigned kinds, const struct range *after); /* NULL begins, and ends */

/* Streams. A slot is taken again only after all its work has ended and the host knows it. */
int stream_open(int device, bool blocking); /* -1 when all slots are taken */
void stream_close(int slot);

/*
 * Queue a copy from `source` (of the target's length) or, when that is NULL, a fill with `value`. `pinned` says
 * that the host end is page-locked; if it is not, a source on the host is read now, and a target on the host is
 * waited for. Records what the copy does wrong. False: no memory.
 */
bool machine_queue(const char *function, int slot, struct span target, unsigned char *source, unsigned char value,
                   bool to_device, bool pinned);
struct mark machine_mark(int slot); /* all that is queued there now */
void machine_order(int slot, const struct mark *mark); /* what is queued in slot from now on runs after mark */

/* The legacy default stream and its device's blocking streams wait for each other before each piece of work. */
void machine_order_with_default(int slot);

/* Whether everything up to the mark has run. */
bool machine_has_run(const struct mark *mark);
/* Wait until it has, and note that the host knows. */
void machine_synchronise(const struct mark *mark);
/* Note that the host knows that everything before the mark has run. */
void machine_observe(const struct mark *mark);
/* Whether a copy or a fill up to the mark, in its own stream, is in flight. */
bool machine_in_flight(const struct mark *mark);
/* Mode random: run some of one stream. */
void machine_step(void);

/* Record it when a copy of the span is in flight, and let none touch it from now on; waits for one that runs. */
void machine_give_up(const char *function, struct span span);
/* Drop everything queued, for good: a sticky error. Waits for what runs. */
void machine_halt(void);

/* Queued copies and fills that have not run, described one by one. */
void machine_for_pending(void (*describe)(void *argument, const char *line), void *argument);

struct machine_numbers machine_numbers(void);

/* Record a violation; the text is "kind: " and the formatted rest, and gets the calling thread's id. */
void violation(const char *kind, const char *format, ...) __attribute__((format(printf, 2, 3)));
size_t violations_text(char *text, size_t room);

/* Append to text as snprintf would, keeping *length the length of the whole. */
void append(char *text, size_t room, size_t *length, const char *format, ...) __attribute__((format(printf, 4, 5)));
int thread_id(void);

#endif
