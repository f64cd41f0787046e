/*
 * Carries out randomised plans of the engine on the stand-in driver and compares what came of each with a model of
 * it: every byte, status and counter, the ring, and what the stand-in found. No Python, and no waiting for time.
 *
 * Arguments: the stand-in's path, a folder for files, the stand-in's mode, a seed, how many plans, and perhaps the
 * number of the first. A plan depends on seed and number alone; how threads take turns in it does not.
 * Prints one line of facts and exits with 0, or what went wrong, with seed and plan, and exits with 1.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "checksum.h"
#include "run.h"
#include "standin_cuda.h"
#include "stream.h"

#ifndef WC_BUG
#define WC_BUG 0 /* the mutants are in ext/; 99 is here */
#endif

#define PAGE ((size_t)4096)
#define FILE_NBYTES (((size_t)5 << 19) + 1234)
#define SOURCE_NBYTES ((size_t)1 << 20)
#define AREA_NBYTES ((size_t)6 << 20) /* for the targets of one run, of each kind */
#define GUARD ((size_t)4096)          /* bytes after the last target that are looked at too */
#define USUAL_NBYTES ((size_t)256 << 10) /* of all operations of one run */
#define MAX_DEVICES 3
#define MAX_RUNS 3
#define MAX_OPS 24
#define MAX_PIECES 4 /* spans of one operation */
#define MAX_REGIONS 6
#define MAX_TURNS 50 /* registrations beside the runs of one round */
#define MAX_ALIKE 2 /* problems told one after the other; the rest of their kind tells no more */
#define PATIENCE_S 60 /* for one plan: beyond, something waits for ever */
#define FILL 0xEE
#define POISON 0xDB /* the stand-in's */
#define FAILED_FILL 0 /* for what a failed operation left */

/* -- what a plan is made of */

enum fault { SOUND, MISSING, SHORT, WRONG_SUM, FOLDER, LINK, N_FAULTS };

static const int FAULT_STATUS[N_FAULTS] = {0, -ENOENT, -ENODATA, -EBADMSG, -EINVAL, -ELOOP};

/* Names of files in the folder, as wc_run wants them. */
static const char NAMES[] = "content\0missing\0folder\0link";
enum { NAME_CONTENT = 0, NAME_MISSING = 8, NAME_FOLDER = 16, NAME_LINK = 23 };

/* Memory that targets are laid out in, one after the other with gaps. */
struct area {
    unsigned char *start;
    size_t used;
};

/* One run of a round. */
struct part {
    struct wc_run run;
    int device; /* or -1 */
    struct wc_op ops[MAX_OPS];
    enum fault faults[MAX_OPS];
    struct wc_span spans[MAX_OPS * MAX_PIECES];
    struct area slab, host; /* on the device, and on the host */
    _Atomic uint64_t counters[WC_N_COUNTERS];
    atomic_int stop;
    size_t stop_after; /* so many operations done; SIZE_MAX for never */
    cpu_set_t cpus;
    int begun; /* what wc_run_begin returned */
};

struct region {
    unsigned char *start;
    size_t nbytes;
    struct wc_device *device;
};

struct plan {
    uint64_t number, random;
    int n_devices, n_regions, n_rounds;
    bool is_big, churns, is_sticky;
    int locking[MAX_DEVICES];
    struct region regions[MAX_REGIONS]; /* of source memory; each is one device's, as the driver wants it */
    struct wc_cuda *cuda;
    wc_cu_context contexts[MAX_DEVICES]; /* torch's hold on them */
    wc_cu_stream streams[MAX_DEVICES];   /* torch's */
    char failing[48];                    /* the driver's function that fails in this round, or "" */
    int code;                            /* with this */
    bool has_failed;                     /* it did so */
    bool is_dead;                        /* and for good */
    _Atomic enum { EARLY, DURING, OVER } stage; /* for the thread that churns */
    uint64_t n_violations; /* told already */
    int n_problems, n_alike;
    const char *last_format;
};

static struct {
    uint64_t ops, failed, stopped, injected, dead, churned;
    uint64_t copied, by_device, direct;
} totals;

static const char *mode = "no mode";
static uint64_t seed;
static char *folder;
static unsigned char *content, *sources, *areas;
static int content_fd, folder_fd;
static struct wc_device devices[MAX_DEVICES];
static struct part parts[MAX_RUNS];
static volatile uint64_t plan_number; /* for who rings when it lasts too long */

static int (*standin_configure)(const char *);
static void (*standin_reset)(void);
static int (*standin_adopt)(void *, size_t, int);
static size_t (*standin_violations)(char *, size_t);
static int (*standin_leaks)(char *, size_t);
static void (*standin_facts)(struct wcs_facts *);
static wc_cu_result (*fill_async)(wc_cu_pointer, unsigned char, size_t, wc_cu_stream);

__attribute__((format(printf, 2, 3))) static void problem(struct plan *plan, const char *format, ...)
{
    va_list arguments;

    plan->n_problems++;
    plan->n_alike = format == plan->last_format ? plan->n_alike + 1 : 1;
    plan->last_format = format;
    if (plan->n_alike > MAX_ALIKE)
        return;
    printf("%s seed %llu plan %llu: ", mode, (unsigned long long)seed, (unsigned long long)plan->number);
    va_start(arguments, format);
    vprintf(format, arguments);
    va_end(arguments);
    putchar('\n');
}

/* What cannot go wrong in a plan went wrong in this program. */
static void must(bool holds, const char *what)
{
    if (!holds) {
        printf("%s seed %llu plan %llu: cannot go on: %s (%s)\n", mode, (unsigned long long)seed,
               (unsigned long long)plan_number, what, strerror(errno));
        exit(1);
    }
}

static void lasts_too_long(int number)
{
    char text[128];
    int length = snprintf(text, sizeof text, "%s seed %llu plan %llu: does not end\n", mode, (unsigned long long)seed,
                          (unsigned long long)plan_number);

    (void)number;
    if (write(1, text, (size_t)length) != length)
        _exit(2);
    _exit(1);
}

/* -- chance */

static uint64_t next(struct plan *plan)
{
    uint64_t z = plan->random += 0x9E3779B97F4A7C15u; /* splitmix64 */

    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return z ^ z >> 31;
}

/* Below limit, which is not 0. */
static size_t below(struct plan *plan, size_t limit)
{
    return next(plan) % limit;
}

static size_t between(struct plan *plan, size_t least, size_t most)
{
    return least + below(plan, most - least + 1);
}

static bool percent(struct plan *plan, unsigned share)
{
    return below(plan, 100) < share;
}

/* -- making a round */

/* Lay out room for a target; what lies between it and the one before is a gap that nobody may write. */
static unsigned char *lay_out(struct plan *plan, struct area *area, size_t nbytes, size_t alignment)
{
    area->used = wc_round_up(area->used + (percent(plan, 50) ? 0 : below(plan, 100)), alignment);
    unsigned char *start = area->start + area->used;
    area->used += nbytes;
    must(area->used + GUARD <= AREA_NBYTES, "an area is full");
    return start;
}

static size_t some_nbytes(struct plan *plan, size_t left)
{
    static const size_t most[] = {1, 16, 1000, 5000, 9000, 20000, 50000, 100000};
    size_t limit = most[below(plan, sizeof most / sizeof *most)];
    size_t nbytes = percent(plan, 4) ? 0 : percent(plan, 20) ? wc_round_up(below(plan, limit) + 1, PAGE)
                                                            : below(plan, limit) + 1;
    return nbytes < left ? nbytes : left;
}

static int by_value(const void *a, const void *b)
{
    const uint64_t *first = a, *second = b;
    return (*first > *second) - (*first < *second);
}

/* Cut an operation into up to MAX_PIECES spans, whose places are chosen later. */
static void cut(struct plan *plan, struct part *part, struct wc_op *op)
{
    uint64_t cuts[2 * MAX_PIECES];
    const size_t n_cuts = 2 * below(plan, MAX_PIECES + 1);

    op->first_span = (uint32_t)part->run.n_spans;
    if (percent(plan, 40)) {
        part->spans[part->run.n_spans++] = (struct wc_span){.nbytes = op->nbytes};
        op->n_spans = 1;
        return;
    }
    const bool touching = percent(plan, 50); /* no holes: each piece begins where the one before ends */
    for (size_t i = 0; i < n_cuts; i++)
        cuts[i] = below(plan, op->nbytes + 1);
    qsort(cuts, n_cuts, sizeof *cuts, by_value);
    for (size_t i = 1; touching && i + 1 < n_cuts; i += 2)
        cuts[i] = cuts[i + 1];
    for (size_t i = 0; i < n_cuts; i += 2)
        part->spans[part->run.n_spans++] = (struct wc_span){.from = cuts[i], .nbytes = cuts[i + 1] - cuts[i]};
    op->n_spans = (uint32_t)(n_cuts / 2);
}

static void choose_source(struct plan *plan, struct part *part, size_t index)
{
    struct wc_op *op = &part->ops[index];

    if (op->nbytes <= SOURCE_NBYTES && percent(plan, plan->churns ? 85 : 45)) {
        op->flags |= WC_FROM_MEMORY;
        op->fd = -1;
        op->offset = (uintptr_t)sources + below(plan, SOURCE_NBYTES - op->nbytes + 1);
        if (op->nbytes == 0 && percent(plan, 50))
            op->offset = 0;
        return;
    }
    enum fault fault = percent(plan, 97) ? SOUND : between(plan, 1, N_FAULTS - 1);
    if (fault == SHORT && op->nbytes == 0)
        fault = SOUND;
    if (fault == WRONG_SUM || percent(plan, 40))
        op->flags |= WC_CHECK;
    if (percent(plan, 12))
        op->flags |= WC_PAST_CACHE;
    op->offset = below(plan, FILE_NBYTES - op->nbytes + 1);
    if (fault == SHORT)
        op->offset = FILE_NBYTES - below(plan, op->nbytes);
    if (op->flags & WC_CHECK || percent(plan, 30)) /* down, or up where the file is to be too short */
        op->offset = fault == SHORT ? wc_round_up(op->offset, PAGE) : op->offset / PAGE * PAGE;
    if (op->flags & WC_CHECK && fault != SHORT)
        op->checksum = wc_checksum_of(content + op->offset, op->nbytes) ^ (fault == WRONG_SUM ? 1u << below(plan, 32) : 0);
    op->fd = fault == SOUND && percent(plan, 40) ? content_fd : -1;
    op->name = fault == MISSING ? NAME_MISSING : fault == FOLDER ? NAME_FOLDER : fault == LINK ? NAME_LINK : NAME_CONTENT;
    part->faults[index] = fault;
}

static void choose_target(struct plan *plan, struct part *part, struct wc_op *op)
{
    if (part->device >= 0 && percent(plan, 80)) {
        op->flags |= WC_TO_DEVICE;
        cut(plan, part, op);
        return;
    }
    if (percent(plan, 40))
        op->flags |= WC_PADDED;
    if (percent(plan, 20))
        op->flags |= WC_POPULATE;
    size_t room = op->flags & WC_PADDED ? wc_round_up(op->nbytes, PAGE) : op->nbytes;
    op->target = (uintptr_t)lay_out(plan, &part->host, room, percent(plan, 50) ? PAGE : 1);
    if (op->nbytes == 0 && percent(plan, 50))
        op->target = 0; /* nowhere */
}

/* Give each span its place, in an order that has nothing to do with the operations'. */
static void place_spans(struct plan *plan, struct part *part)
{
    size_t order[MAX_OPS * MAX_PIECES];
    const size_t n = part->run.n_spans;

    for (size_t i = 0; i < n; i++) {
        size_t j = below(plan, i + 1);
        order[i] = order[j];
        order[j] = i;
    }
    for (size_t i = 0; i < n; i++) {
        struct wc_span *span = &part->spans[order[i]];
        span->to = (uintptr_t)lay_out(plan, &part->slab, span->nbytes, 1);
    }
}

static void make_part(struct plan *plan, struct part *part, size_t index)
{
    size_t left = USUAL_NBYTES;
    unsigned char *area = areas + 2 * index * AREA_NBYTES;

    *part = (struct part){.device = percent(plan, plan->churns ? 0 : 12) ? -1 : (int)below(plan, (size_t)plan->n_devices),
                          .slab.start = area,
                          .host.start = area + AREA_NBYTES,
                          .stop_after = SIZE_MAX};
    part->run = (struct wc_run){
        .ops = part->ops,
        .n_ops = percent(plan, 3) ? 0 : between(plan, 1, MAX_OPS),
        .spans = part->spans,
        .names = NAMES,
        .names_nbytes = sizeof NAMES,
        .folder_fd = folder_fd,
        .device = part->device < 0 ? NULL : &devices[part->device],
        .n_threads = (unsigned)between(plan, 1, percent(plan, 20) ? 8 : 3),
        .counters = part->counters,
        .stop = percent(plan, 50) ? &part->stop : NULL,
    };
    for (size_t i = 0; i < part->run.n_ops; i++) {
        struct wc_op *op = &part->ops[i];
        op->nbytes = plan->is_big && i == 0 ? between(plan, FILE_NBYTES / 2, FILE_NBYTES) : some_nbytes(plan, left);
        left -= op->nbytes < left ? op->nbytes : left;
        choose_source(plan, part, i);
        choose_target(plan, part, op);
    }
    place_spans(plan, part);
    if (part->run.stop && percent(plan, 20))
        part->stop_after = below(plan, part->run.n_ops + 1);
    if (percent(plan, 10)) {
        CPU_ZERO(&part->cpus);
        CPU_SET(sched_getcpu(), &part->cpus);
        part->run.cpus = &part->cpus;
    }
}

/* -- the model */

static const unsigned char *source_of(const struct wc_op *op)
{
    return op->flags & WC_FROM_MEMORY ? (const unsigned char *)(uintptr_t)op->offset : content + op->offset;
}

/* How many of an operation's bytes [from, to) its spans want. */
static uint64_t wanted(const struct part *part, const struct wc_op *op, uint64_t from, uint64_t to)
{
    uint64_t sum = 0;

    for (uint32_t i = op->first_span; i < op->first_span + op->n_spans; i++) {
        const struct wc_span *span = &part->spans[i];
        uint64_t first = span->from > from ? span->from : from;
        uint64_t end = span->from + span->nbytes < to ? span->from + span->nbytes : to;
        sum += first < end ? end - first : 0;
    }
    return sum;
}

/* How many the device reads by itself: it does as long as they lie in one registration, a slot's size at a time. */
static uint64_t wanted_by_device(const struct part *part, const struct wc_op *op)
{
    const struct wc_device *device = part->run.device;
    uint64_t sum = 0, at = 0;

    if (!(op->flags & WC_FROM_MEMORY))
        return 0;
    while (at < op->nbytes) {
        const unsigned char *from = source_of(op) + at;
        uint64_t stop = op->nbytes - at < device->ring.slot_nbytes ? op->nbytes : at + device->ring.slot_nbytes;
        bool registered = false;
        for (size_t i = 0; i < device->n_registrations && !registered; i++) {
            const struct wc_registration *each = &device->registrations[i];
            uint64_t end = (uint64_t)(each->start + each->nbytes - from) + at;
            registered = from >= each->start && from < each->start + each->nbytes;
            if (registered && end < stop)
                stop = end;
        }
        sum += registered ? wanted(part, op, at, stop) : 0;
        at = stop;
    }
    return sum;
}

/* -- looking at what came of it */

static void check_status(struct plan *plan, const struct part *part, size_t index)
{
    const struct wc_op *op = &part->ops[index];
    const int expected = FAULT_STATUS[part->faults[index]];

    if (op->status == WC_DONE && expected)
        problem(plan, "operation %zu is done, but had to fail with %d", index, expected);
    else if (op->status == WC_DONE && op->moved != op->nbytes)
        problem(plan, "operation %zu is done with %llu of %llu bytes moved", index, (unsigned long long)op->moved,
                (unsigned long long)op->nbytes);
    else if (op->status == WC_DONE || op->status == -ECANCELED || (expected && op->status == expected))
        ;
    else if (!plan->has_failed || op->status != wc_cuda_error(plan->code))
        problem(plan, "operation %zu has status %d instead of %d", index, op->status, expected ? expected : WC_DONE);
    if (op->reread > 1 || (op->reread && (!(op->flags & WC_CHECK) || op->flags & WC_PAST_CACHE)) ||
        (op->status == -EBADMSG && op->reread == 0 && !(op->flags & WC_PAST_CACHE)) ||
        (op->status == WC_DONE && op->reread))
        problem(plan, "operation %zu was read again %u times", index, op->reread);
}

static void check_order(struct plan *plan, const struct part *part, size_t n_done)
{
    bool seen[MAX_OPS] = {0};

    for (size_t i = 0; i < part->run.n_done; i++) {
        size_t index = part->run.done[i];
        if (index >= part->run.n_ops || seen[index] || part->ops[index].status != WC_DONE)
            problem(plan, "operation %zu was told as done, with status %d", index,
                    index < part->run.n_ops ? part->ops[index].status : 0);
        else
            seen[index] = true;
    }
    if (n_done != part->run.n_done)
        problem(plan, "%zu operations are done and %zu told so", n_done, part->run.n_done);
}

static void check_statuses(struct plan *plan, const struct part *part)
{
    const struct wc_run *run = &part->run;
    const bool was_stopped = run->stop && atomic_load(run->stop);
    bool must_fail = false, failed = run->first_failed < run->n_ops;
    size_t n_done = 0, n_errors = 0;

    for (size_t i = 0; i < run->n_ops; i++) {
        check_status(plan, part, i);
        must_fail |= part->faults[i] != SOUND;
        n_done += part->ops[i].status == WC_DONE;
        n_errors += part->ops[i].status < 0 && part->ops[i].status != -ECANCELED;
    }
    check_order(plan, part, n_done);
    if (failed != (n_errors > 0))
        problem(plan, "the run %s, with %zu errors of operations", failed ? "failed" : "did not fail", n_errors);
    if (failed && (part->ops[run->first_failed].status >= 0 || part->ops[run->first_failed].status == -ECANCELED))
        problem(plan, "operation %zu failed first, with status %d", run->first_failed,
                part->ops[run->first_failed].status);
    if (!failed && !was_stopped && (must_fail || n_done != run->n_ops))
        problem(plan, "%zu of %zu operations are done, none failed%s", n_done, run->n_ops,
                must_fail ? ", and one had to" : "");
}

static uint64_t counter(const struct part *part, int which)
{
    return atomic_load(&part->counters[which]);
}

static void check_counters(struct plan *plan, const struct part *part)
{
    static const char *const names[WC_N_COUNTERS] = {"direct", "cached", "checked", "copied",
                                                     "by device", "done", "reread", "refused"};
    uint64_t least[WC_N_COUNTERS] = {0}, read = 0;
    size_t n_rereads = 0;

    for (size_t i = 0; i < part->run.n_ops; i++) {
        const struct wc_op *op = &part->ops[i];
        n_rereads += op->reread;
        if (op->status != WC_DONE)
            continue;
        least[WC_N_DONE]++;
        least[WC_N_CHECKED] += op->flags & WC_CHECK ? op->nbytes : 0;
        if (!(op->flags & WC_FROM_MEMORY)) /* on the way to a device, whole pages from the first on */
            read += op->nbytes + (op->flags & WC_TO_DEVICE && op->nbytes ? op->offset % PAGE : 0);
        if (op->flags & WC_TO_DEVICE) {
            uint64_t by_device = plan->churns ? 0 : wanted_by_device(part, op);
            least[WC_N_BY_DEVICE] += by_device;
            least[WC_N_COPIED] += plan->churns ? 0 : wanted(part, op, 0, op->nbytes) - by_device;
        }
    }
    const bool all_done = least[WC_N_DONE] == part->run.n_ops;
    for (int i = 0; i < WC_N_COUNTERS; i++) {
        uint64_t counted = counter(part, i);
        bool exact = all_done && !(plan->churns && (i == WC_N_COPIED || i == WC_N_BY_DEVICE));
        if (i == WC_N_DIRECT || i == WC_N_CACHED || i == WC_N_REREAD || i == WC_REFUSED)
            continue;
        if (counted < least[i] || (exact && counted > least[i]) || (i == WC_N_DONE && counted != least[i]))
            problem(plan, "counter '%s' is %llu instead of %s%llu", names[i], (unsigned long long)counted,
                    exact ? "" : "at least ", (unsigned long long)least[i]);
    }
    uint64_t counted = counter(part, WC_N_DIRECT) + counter(part, WC_N_CACHED);
    if (counted < read || (all_done && counted > read))
        problem(plan, "%llu bytes of files were counted instead of %llu", (unsigned long long)counted,
                (unsigned long long)read);
    if (counter(part, WC_N_REREAD) != n_rereads)
        problem(plan, "%llu operations were counted as read again instead of %zu",
                (unsigned long long)counter(part, WC_N_REREAD), n_rereads);
}

/* Call with each place of an operation's bytes: where they are, where they came from, how many. */
static void for_places(const struct part *part, const struct wc_op *op,
                       void (*use)(void *, unsigned char *, const unsigned char *, size_t), void *argument)
{
    if (!(op->flags & WC_TO_DEVICE)) {
        use(argument, (unsigned char *)(uintptr_t)op->target, source_of(op), op->nbytes);
        return;
    }
    for (uint32_t i = op->first_span; i < op->first_span + op->n_spans; i++) {
        const struct wc_span *span = &part->spans[i];
        use(argument, (unsigned char *)(uintptr_t)span->to, source_of(op) + span->from, span->nbytes);
    }
}

static void count_wrong(void *argument, unsigned char *at, const unsigned char *from, size_t nbytes)
{
    size_t *n_wrong = argument;

    if (nbytes && memcmp(at, from, nbytes))
        for (size_t i = 0; i < nbytes; i++)
            *n_wrong += at[i] != from[i];
}

/* What is done is there, before anything but the run itself has waited for the device. */
static void check_done(struct plan *plan, const struct part *part, const char *when)
{
    for (size_t i = 0; i < part->run.n_ops; i++) {
        const struct wc_op *op = &part->ops[i];
        size_t n_wrong = 0;
        if (op->status != WC_DONE || part->faults[i] != SOUND)
            continue;
        for_places(part, op, count_wrong, &n_wrong);
        if (n_wrong)
            problem(plan, "%zu of %llu bytes of operation %zu are wrong %s", n_wrong, (unsigned long long)op->nbytes, i,
                    when);
    }
}

static void blank(void *argument, unsigned char *at, const unsigned char *from, size_t nbytes)
{
    (void)argument;
    (void)from;
    if (nbytes)
        memset(at, FAILED_FILL, nbytes);
}

/* Blank out where anything may have been written; then nothing but the fill may be left. */
static void check_guards(struct plan *plan, const struct area *area, const char *name)
{
    size_t n_wrong = 0, first = 0;

    for (size_t i = 0; i < area->used + GUARD; i++) {
        unsigned char byte = area->start[i];
        if (byte != FILL && byte != FAILED_FILL && !(plan->is_dead && byte == POISON) && n_wrong++ == 0)
            first = i;
    }
    if (n_wrong)
        problem(plan, "%zu bytes outside the targets on the %s were written, the first at %zu of %zu", n_wrong, name,
                first, area->used);
}

static void check_areas(struct plan *plan, const struct part *part)
{
    for (size_t i = 0; i < part->run.n_ops; i++) {
        const struct wc_op *op = &part->ops[i];
        for_places(part, op, blank, NULL);
        if (!(op->flags & WC_TO_DEVICE) && op->flags & WC_PADDED)
            blank(NULL, (unsigned char *)(uintptr_t)op->target, NULL, wc_round_up(op->nbytes, PAGE));
    }
    check_guards(plan, &part->slab, "device");
    check_guards(plan, &part->host, "host");
}

static void check_ring(struct plan *plan, int index)
{
    const struct wc_ring *ring = &devices[index].ring;
    bool seen[WC_MAX_SLOTS] = {0};

    if (ring->n_free != ring->n_slots || ring->n_waiting)
        problem(plan, "%u of %u slots of device %d are free, %u threads wait", ring->n_free, ring->n_slots, index,
                ring->n_waiting);
    for (unsigned i = 0; i < ring->n_free; i++) {
        size_t slot = (size_t)(ring->free[i] - ring->slots);
        if (slot >= ring->n_slots || seen[slot])
            problem(plan, "slot %zu of device %d is free twice", slot, index);
        else
            seen[slot] = true;
    }
}

static void check_violations(struct plan *plan)
{
    static char text[1 << 16];
    char *left = text, *line;

    standin_violations(text, sizeof text);
    for (uint64_t i = 0; (line = strsep(&left, "\n")) && *line; i++)
        if (i >= plan->n_violations) {
            plan->n_violations = i + 1;
            problem(plan, "the driver was used wrongly: %s", line);
        }
}

/* A call's failure that somebody has to answer for is some operation's. */
static void check_failure(struct plan *plan, int n_parts)
{
    static const char *const answered[] = {"cuMemcpyHtoDAsync_v2", "cuEventRecord", "cuEventSynchronize"};
    bool is_answered = false, found = false;

    for (size_t i = 0; i < sizeof answered / sizeof *answered; i++)
        is_answered |= !strcmp(plan->failing, answered[i]);
    if (!plan->has_failed || !is_answered)
        return;
    for (int i = 0; i < n_parts; i++) {
        found |= parts[i].begun == wc_cuda_error(plan->code);
        for (size_t j = 0; j < parts[i].run.n_ops; j++) {
            int status = parts[i].ops[j].status;
            found |= status == wc_cuda_error(plan->code);
            if (!strcmp(plan->failing, "cuEventSynchronize")) /* it may have had its error already */
                found |= status < 0 && status == FAULT_STATUS[parts[i].faults[j]];
        }
    }
    if (!found)
        problem(plan, "%s failed with %d and no operation did", plan->failing, plan->code);
}

/* -- the driver, as torch holds it beside the engine */

static void use_context(const struct plan *plan, int device)
{
    must(plan->is_dead || plan->cuda->context_set(plan->contexts[device]) == 0, "cuCtxSetCurrent");
}

static void check_context(struct plan *plan, const char *after)
{
    wc_cu_context now = NULL;

    if (plan->is_dead || *plan->failing)
        return;
    must(plan->cuda->context_get(&now) == 0, "cuCtxGetCurrent");
    if (now != plan->contexts[0])
        problem(plan, "%s changed the caller's context", after);
}

/* Work of torch's on what it hands out to us: it comes before anything of ours. */
static void fill_areas(struct plan *plan, struct part *part)
{
    memset(part->host.start, FILL, part->host.used + GUARD);
    if (part->device < 0 || percent(plan, 30)) {
        memset(part->slab.start, FILL, part->slab.used + GUARD);
        return;
    }
    part->run.after = percent(plan, 50) ? plan->streams[part->device] : NULL;
    use_context(plan, part->device);
    must(fill_async((uintptr_t)part->slab.start, FILL, part->slab.used + GUARD, part->run.after) == 0, "cuMemsetD8Async");
    use_context(plan, 0);
}

static void wait_for_torch(struct plan *plan)
{
    for (int i = 0; i < plan->n_devices && !plan->is_dead; i++) {
        use_context(plan, i);
        must(plan->cuda->stream_synchronize(NULL) == 0, "cuStreamSynchronize");
        must(plan->cuda->stream_synchronize(plan->streams[i]) == 0, "cuStreamSynchronize");
    }
    use_context(plan, 0);
}

static void configure(const char *format, ...)
{
    char text[256];
    va_list arguments;

    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    must(standin_configure(text) == 0, text);
}

/* -- devices */

static void check_refused_open(struct plan *plan, int index, size_t slot_nbytes, unsigned n_slots)
{
    static const char *const functions[] = {
        "cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuCtxGetCurrent", "cuCtxSetCurrent",
        "cuThreadExchangeStreamCaptureMode", "cuStreamCreate", "cuEventCreate",
    };
    const size_t which = below(plan, sizeof functions / sizeof *functions);
    const size_t nth = which == 6 ? between(plan, 1, n_slots + 1) : 1;
    const int code = percent(plan, 50) ? 2 : 999;
    struct wcs_facts before, after;

    standin_facts(&before);
    configure("fail=%s:%zu:%d", functions[which], nth, code);
    int rc = wc_device_open(&devices[index], plan->cuda, index, slot_nbytes, n_slots, -1);
    configure("fail=none");
    standin_facts(&after);
    if (rc != wc_cuda_error(code))
        problem(plan, "opening a device with %s failing with %d returned %d", functions[which], code, rc);
    if (before.contexts != after.contexts || before.streams != after.streams || before.events != after.events ||
        before.registrations != after.registrations || before.host_allocations != after.host_allocations)
        problem(plan, "opening a device failed in %s and left something behind", functions[which]);
    check_context(plan, "a refused wc_device_open");
}

static void open_device(struct plan *plan, int index)
{
    static const size_t sizes[] = {1, 1, 2, 3, 4, 16};
    const size_t slot_nbytes = PAGE * (plan->is_big ? 32 : sizes[below(plan, sizeof sizes / sizeof *sizes)]);
    const unsigned n_slots = percent(plan, 2) ? WC_MAX_SLOTS : (unsigned)between(plan, 1, 6);
    const int chosen = percent(plan, 85) ? WC_LOCKED_REGISTERED : percent(plan, 50) ? WC_LOCKED_ALLOCATED : WC_PAGEABLE;

    must(plan->cuda->context_retain(&plan->contexts[index], index) == 0, "cuDevicePrimaryCtxRetain");
    use_context(plan, index);
    must(plan->cuda->stream_create(&plan->streams[index], percent(plan, 50) ? WC_CU_STREAM_NON_BLOCKING : 0) == 0,
         "cuStreamCreate");
    use_context(plan, 0);
    if (percent(plan, 5))
        check_refused_open(plan, index, slot_nbytes, n_slots);
    if (chosen != WC_LOCKED_REGISTERED)
        configure("fail=cuMemHostRegister_v2:1:801");
    if (chosen == WC_PAGEABLE)
        configure("fail=cuMemHostAlloc:1:2");
    must(wc_device_open(&devices[index], plan->cuda, index, slot_nbytes, n_slots, -1) == 0, "wc_device_open");
    configure("fail=none");
    if (devices[index].ring.locking != (enum wc_locking)chosen ||
        devices[index].ring.refused != (chosen == WC_LOCKED_REGISTERED ? 0 : wc_cuda_error(801)))
        problem(plan, "the ring is locked in way %d instead of %d, for %d", devices[index].ring.locking, chosen,
                devices[index].ring.refused);
    plan->locking[index] = chosen;
    check_context(plan, "wc_device_open");
}

static void close_devices(struct plan *plan)
{
    char text[4096];

    for (int i = 0; i < plan->n_devices; i++) {
        wc_device_close(&devices[i]);
        check_context(plan, "wc_device_close");
        if (!plan->is_dead)
            use_context(plan, i);
        plan->cuda->stream_destroy(plan->streams[i]);
        if (!plan->is_dead)
            use_context(plan, 0);
    }
    if (!plan->is_dead)
        plan->cuda->context_set(NULL);
    for (int i = 0; i < plan->n_devices; i++)
        plan->cuda->context_release(i);
    check_violations(plan);
    if (standin_leaks(text, sizeof text))
        problem(plan, "left behind: %.*s", (int)strcspn(text, "\n"), text);
}

/* -- registrations */

static void choose_regions(struct plan *plan)
{
    size_t at = below(plan, PAGE);

    plan->n_regions = percent(plan, 40) ? 0 : (int)between(plan, 1, MAX_REGIONS);
    for (int i = 0; i < plan->n_regions; i++) {
        size_t room = SOURCE_NBYTES / MAX_REGIONS - PAGE;
        size_t nbytes = percent(plan, 30) ? room : between(plan, 1, room);
        plan->regions[i] = (struct region){sources + at, nbytes, &devices[below(plan, (size_t)plan->n_devices)]};
        at += nbytes + (percent(plan, 50) ? 0 : below(plan, 200)); /* often end to end */
    }
}

static bool tolerates(const struct plan *plan, int rc)
{
    return rc == 0 || (*plan->failing && rc == wc_cuda_error(plan->code));
}

static void register_regions(struct plan *plan)
{
    for (int i = 0; i < plan->n_regions; i++) {
        const struct region *region = &plan->regions[i];
        if (percent(plan, 70))
            must(wc_device_register(region->device, region->start, region->nbytes, false) == 0, "wc_device_register");
    }
    check_context(plan, "wc_device_register");
    if (plan->n_regions && devices[0].n_registrations) {
        const struct wc_registration *first = &devices[0].registrations[0];
        int rc = wc_device_register(&devices[0], (void *)(first->start + first->nbytes - 1), 2, false);
        if (rc != -EEXIST)
            problem(plan, "registering twice returned %d", rc);
    }
    int rc = wc_device_unregister(&devices[0], sources + SOURCE_NBYTES);
    if (rc != -ENOENT)
        problem(plan, "unregistering what is not registered returned %d", rc);
}

/* A thread that takes registrations away and brings them back while runs read from the memory. */
static void *churn(void *argument)
{
    struct plan *plan = argument;
    bool is_registered[MAX_REGIONS] = {false};
    struct plan chance = {.random = plan->number};
    int n_turns = 0;

    for (int i = 0; i < plan->n_regions; i++)
        for (size_t j = 0; j < plan->regions[i].device->n_registrations; j++)
            is_registered[i] |= plan->regions[i].device->registrations[j].start == plan->regions[i].start;
    while (atomic_load(&plan->stage) == EARLY)
        sched_yield();
    do {
        size_t i = below(&chance, (size_t)plan->n_regions);
        const struct region *region = &plan->regions[i];
        bool *registered = &is_registered[i];
        int rc = *registered ? wc_device_unregister(region->device, region->start)
                             : wc_device_register(region->device, region->start, region->nbytes, false);
        if (!tolerates(plan, rc))
            problem(plan, "%s while runs last returned %d", *registered ? "unregistering" : "registering", rc);
        else if (rc == 0)
            *registered = !*registered;
        totals.churned++;
    } while (atomic_load(&plan->stage) != OVER && ++n_turns < MAX_TURNS);
    return NULL;
}

static void unregister_some(struct plan *plan)
{
    for (int device = 0; device < plan->n_devices; device++)
        for (size_t i = devices[device].n_registrations; i-- > 0;)
            if (percent(plan, 50))
                must(wc_device_unregister(&devices[device], (void *)devices[device].registrations[i].start) == 0,
                     "wc_device_unregister");
}

/* -- carrying out */

static void arm(struct plan *plan)
{
    static const char *const functions[] = {
        "cuMemcpyHtoDAsync_v2", "cuMemcpyHtoDAsync_v2", "cuMemcpyHtoDAsync_v2", "cuEventRecord",
        "cuEventSynchronize", "cuEventSynchronize", "cuEventQuery", "cuStreamWaitEvent",
        "cuStreamSynchronize", "cuCtxGetCurrent", "cuCtxSetCurrent", "cuThreadExchangeStreamCaptureMode",
    };
    static const int codes[] = {2, 700, 719, 999};

    plan->has_failed = false;
    *plan->failing = 0;
    if (!percent(plan, 25))
        return;
    snprintf(plan->failing, sizeof plan->failing, "%s", functions[below(plan, sizeof functions / sizeof *functions)]);
    plan->code = codes[below(plan, sizeof codes / sizeof *codes)];
    plan->is_sticky = percent(plan, 30);
    configure("fail=%s:%zu:%d,sticky=%d", plan->failing, between(plan, 1, percent(plan, 50) ? 4 : 30), plan->code,
              plan->is_sticky);
}

static void disarm(struct plan *plan, const struct wcs_facts *before)
{
    struct wcs_facts after;

    standin_facts(&after);
    plan->has_failed = after.failures > before->failures;
    plan->is_dead = plan->has_failed && plan->is_sticky;
    configure("fail=none");
    totals.injected += plan->has_failed;
    totals.dead += plan->is_dead;
}

/* Wait as on_done's caller does, and stop the run when its time has come. */
static void attend(struct plan *plan, struct part *part)
{
    size_t n_done = 0, before = 0;
    bool has_ended = false;

    while (!has_ended) {
        bool stops = n_done >= part->stop_after;
        if (stops)
            atomic_store(&part->stop, 1);
        wc_run_wait(&part->run, stops ? part->run.n_ops : n_done, 1 + (unsigned)below(plan, 100), &n_done, &has_ended);
        if (n_done < before || n_done > part->run.n_ops)
            problem(plan, "%zu operations done after %zu", n_done, before);
        before = n_done;
    }
}

static void carry_out(struct plan *plan, int n_parts)
{
    if (percent(plan, 30))
        atomic_store(&plan->stage, DURING);
    for (int device = -1; device < plan->n_devices; device++) /* in one order: each holds a lock of its device's */
        for (int i = 0; i < n_parts; i++) {
            if (parts[i].device != device)
                continue;
            parts[i].begun = wc_run_begin(&parts[i].run);
            if (!tolerates(plan, parts[i].begun))
                problem(plan, "wc_run_begin returned %d", parts[i].begun);
            check_context(plan, "wc_run_begin");
        }
    atomic_store(&plan->stage, DURING);
    for (int i = 0; i < n_parts; i++)
        if (parts[i].begun == 0)
            attend(plan, &parts[i]);
    for (int i = 0; i < n_parts; i++)
        if (parts[i].begun == 0)
            wc_run_end(&parts[i].run);
    check_context(plan, "wc_run_end");
}

static uint64_t ring_nbytes(const struct plan *plan)
{
    uint64_t sum = 0;

    for (int i = 0; i < plan->n_devices; i++)
        sum += devices[i].ring.slot_nbytes * devices[i].ring.n_slots;
    return sum;
}

static void check_facts(struct plan *plan, int n_parts, const struct wcs_facts *before)
{
    struct wcs_facts after;
    uint64_t counted = 0, pageable = 0;

    standin_facts(&after);
    for (int i = 0; i < n_parts; i++) {
        counted += counter(&parts[i], WC_N_COPIED) + counter(&parts[i], WC_N_BY_DEVICE);
        if (parts[i].device >= 0 && plan->locking[parts[i].device] == WC_PAGEABLE)
            pageable += counter(&parts[i], WC_N_COPIED);
    }
    if (!plan->is_dead && after.copied_nbytes - before->copied_nbytes != counted)
        problem(plan, "the device copied %llu bytes, counted were %llu",
                (unsigned long long)(after.copied_nbytes - before->copied_nbytes), (unsigned long long)counted);
    if (!plan->has_failed && (after.unpinned_copies > before->unpinned_copies) != (pageable > 0))
        problem(plan, "%llu copies were of pageable memory, and %llu bytes",
                (unsigned long long)(after.unpinned_copies - before->unpinned_copies), (unsigned long long)pageable);
    if (after.in_flight_nbytes_peak > ring_nbytes(plan))
        problem(plan, "%llu bytes were in flight, the rings have %llu", (unsigned long long)after.in_flight_nbytes_peak,
                (unsigned long long)ring_nbytes(plan));
    if (!plan->is_dead && after.in_flight_nbytes)
        problem(plan, "%llu bytes are in flight after the last run", (unsigned long long)after.in_flight_nbytes);
}

static void add_totals(const struct part *part)
{
    totals.ops += part->run.n_ops;
    totals.failed += part->run.first_failed < part->run.n_ops;
    totals.stopped += part->run.stop && atomic_load(part->run.stop);
    totals.copied += counter(part, WC_N_COPIED);
    totals.by_device += counter(part, WC_N_BY_DEVICE);
    totals.direct += counter(part, WC_N_DIRECT);
}

/* Runs side by side, from nothing to everything looked at. */
static void carry_out_round(struct plan *plan)
{
    const int n_parts = (int)between(plan, 1, percent(plan, 50) ? 1 : MAX_RUNS);
    struct wcs_facts before;

    if (plan->is_big)
        must(posix_fadvise(content_fd, 0, 0, POSIX_FADV_DONTNEED) == 0, "posix_fadvise");
    for (int i = 0; i < n_parts; i++) {
        make_part(plan, &parts[i], (size_t)i);
        if (parts[i].device >= 0)
            must(standin_adopt(parts[i].slab.start, AREA_NBYTES, parts[i].device) == 0, "wcs_adopt");
        fill_areas(plan, &parts[i]);
    }
    standin_facts(&before);
    arm(plan);
    pthread_t thread;
    atomic_store(&plan->stage, EARLY);
    if (plan->churns)
        must(pthread_create(&thread, NULL, churn, plan) == 0, "pthread_create");
    carry_out(plan, n_parts);
    atomic_store(&plan->stage, OVER);
    if (plan->churns)
        pthread_join(thread, NULL);
    disarm(plan, &before);

    check_failure(plan, n_parts);
    for (int i = 0; i < n_parts; i++) {
        if (parts[i].begun)
            continue;
        check_statuses(plan, &parts[i]);
        check_counters(plan, &parts[i]);
        check_done(plan, &parts[i], "when the run has ended");
        add_totals(&parts[i]);
        free(parts[i].run.done);
    }
    for (int i = 0; i < plan->n_devices; i++)
        check_ring(plan, i);
    check_facts(plan, n_parts, &before);
    check_violations(plan);
    *plan->failing = 0;
    wait_for_torch(plan);
    for (int i = 0; i < n_parts; i++) {
        if (parts[i].begun == 0)
            check_done(plan, &parts[i], "after torch's own work");
        check_areas(plan, &parts[i]);
    }
}

static void carry_out_plan(struct plan *plan)
{
    standin_reset();
    configure("mode=%s,seed=%llu,devices=%d,delay_us=%zu", mode, (unsigned long long)next(plan) >> 1, MAX_DEVICES,
              percent(plan, 90) ? 0 : below(plan, 30));
    must(plan->cuda->init(0) == 0, "cuInit");
    plan->n_devices = percent(plan, 60) ? 1 : (int)between(plan, 1, MAX_DEVICES);
    plan->is_big = percent(plan, 2);
    for (int i = 0; i < plan->n_devices; i++)
        open_device(plan, i);
    choose_regions(plan);
    plan->churns = plan->n_regions && percent(plan, 30);
    register_regions(plan);
    plan->n_rounds = (int)between(plan, 1, 3);
    for (int i = 0; i < plan->n_rounds && !plan->is_dead && !plan->n_problems; i++)
        carry_out_round(plan);
    if (!plan->is_dead && !plan->n_problems)
        unregister_some(plan);
    close_devices(plan);
}

/* -- what the sanitizers are there to find, to show that they do: see test_sanitizers.py */

#if WC_BUG == 99
static int shared;

static void *raise_shared(void *argument)
{
    for (int i = 0; i < 1000; i++)
        shared++;
    return argument;
}

static int be_broken(const char *way)
{
    volatile size_t n = strlen(way);
    volatile char *bytes = malloc(n);
    pthread_t thread;

    must(bytes, "malloc");
    if (!strcmp(way, "heap")) {
        bytes[n] = 1;
    } else if (!strcmp(way, "undefined")) {
        shared = INT_MAX - (int)n;
        shared += 2 * (int)n;
    } else if (!strcmp(way, "race")) {
        must(pthread_create(&thread, NULL, raise_shared, NULL) == 0, "pthread_create");
        raise_shared(NULL);
        pthread_join(thread, NULL);
    }
    printf("broken in way %s, %d\n", way, shared);
    free((void *)bytes);
    return 0;
}
#endif

/* -- the program */

static void *symbol(void *library, const char *name)
{
    void *found = dlsym(library, name);

    must(found, name);
    return found;
}

static void find_symbols(void *library)
{
#define FIND(place, name)                      \
    do {                                       \
        void *found = symbol(library, name);   \
        memcpy(&place, &found, sizeof found);  \
    } while (0)
    FIND(standin_configure, "wcs_configure");
    FIND(standin_reset, "wcs_reset");
    FIND(standin_adopt, "wcs_adopt");
    FIND(standin_violations, "wcs_violations");
    FIND(standin_leaks, "wcs_leaks");
    FIND(standin_facts, "wcs_facts");
    FIND(fill_async, "cuMemsetD8Async");
#undef FIND
}

static unsigned char *map(size_t nbytes)
{
    void *start = mmap(NULL, nbytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    must(start != MAP_FAILED, "mmap");
    return start;
}

static void make_files(void)
{
    struct plan chance = {.random = 1};

    content = map(FILE_NBYTES);
    sources = map(SOURCE_NBYTES);
    areas = map(2 * MAX_RUNS * AREA_NBYTES);
    for (size_t i = 0; i < FILE_NBYTES; i++)
        content[i] = (unsigned char)next(&chance);
    for (size_t i = 0; i < SOURCE_NBYTES; i++)
        sources[i] = (unsigned char)next(&chance);
    must((folder_fd = open(folder, O_RDONLY | O_DIRECTORY | O_CLOEXEC)) >= 0, folder);
    int fd = openat(folder_fd, "content", O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    must(fd >= 0 && write(fd, content, FILE_NBYTES) == (ssize_t)FILE_NBYTES && fsync(fd) == 0 && close(fd) == 0,
         "the file cannot be written");
    must((content_fd = openat(folder_fd, "content", O_RDONLY | O_CLOEXEC)) >= 0, "the file cannot be opened");
    must(mkdirat(folder_fd, "folder", 0700) == 0 || errno == EEXIST, "mkdirat");
    must(symlinkat("content", folder_fd, "link") == 0 || errno == EEXIST, "symlinkat");
}

int main(int argc, char **argv)
{
    static struct wc_cuda cuda;
    char reason[512];

    setvbuf(stdout, NULL, _IOLBF, 0);
    if (argc < 6) {
        fprintf(stderr, "usage: %s STANDIN FOLDER MODE SEED PLANS [FIRST]\n", argv[0]);
        return 2;
    }
#if WC_BUG == 99
    return be_broken(argv[3]);
#endif
    folder = argv[2];
    mode = argv[3];
    seed = strtoull(argv[4], NULL, 10);
    const uint64_t first = argc > 6 ? strtoull(argv[6], NULL, 10) : 0, n_plans = strtoull(argv[5], NULL, 10);
    must(signal(SIGALRM, lasts_too_long) != SIG_ERR, "signal");
    make_files();
    if (wc_cuda_open(&cuda, argv[1], reason, sizeof reason)) {
        printf("%s\n", reason);
        return 1;
    }
    find_symbols(cuda.library);
    for (plan_number = first; plan_number < first + n_plans; plan_number++) {
        struct plan plan = {.number = plan_number, .random = seed << 32 ^ plan_number * 0xD1342543DE82EF95u, .cuda = &cuda};
        alarm(PATIENCE_S);
        carry_out_plan(&plan);
        if (plan.n_problems)
            return 1;
    }
    printf("%s seed %llu: %llu plans, %llu operations, %llu bytes copied and %llu by the device itself, %llu read past "
           "the cache; %llu runs failed, %llu stopped, %llu driver errors, %llu for good; %llu registrations beside runs; "
           "0 problems\n",
           mode, (unsigned long long)seed, (unsigned long long)n_plans, (unsigned long long)totals.ops,
           (unsigned long long)totals.copied, (unsigned long long)totals.by_device, (unsigned long long)totals.direct,
           (unsigned long long)totals.failed, (unsigned long long)totals.stopped, (unsigned long long)totals.injected,
           (unsigned long long)totals.dead, (unsigned long long)totals.churned);
    return 0;
}
