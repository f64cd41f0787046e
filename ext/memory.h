/*
 * Private anonymous memory that weights are read into: mapped, placed, populated, measured; never read or copied.
 *
 * Sizes and offsets are bytes. Functions return 0 or -errno and keep no state of their own.
 */
#ifndef WEIGHTCACHE_MEMORY_H
#define WEIGHTCACHE_MEMORY_H

#include <stddef.h>

#define WC_HUGE_PAGE ((size_t)2 << 20)

/*
 * One mapping, owned by the caller from wc_memory_map to wc_memory_unmap.
 *
 * A page that nobody may touch follows it: an overrun faults, and two neighbours never become one mapping in
 * /proc/self/smaps.
 */
struct wc_memory {
    unsigned char *start;   /* a multiple of WC_HUGE_PAGE */
    size_t nbytes;          /* as asked for; may be 0 */
    size_t mapped;          /* nbytes rounded up: to WC_HUGE_PAGE from there on, to a page below; more from a pool */
    size_t guard;           /* bytes after mapped that nobody may touch; 0 where there are none */
    int huge_refused_errno; /* 0 where MADV_HUGEPAGE was granted; a refusal is no failure */
    int numa_node;          /* the node that the kernel was asked to prefer; -1 for none */
    int numa_refused_errno; /* 0 where it agreed, or was not asked; a refusal is no failure */
};

/* Bytes in one page of this kernel. */
size_t wc_page_nbytes(void);

/* Return nbytes rounded up to a multiple, which is a power of two. */
static inline size_t wc_round_up(size_t nbytes, size_t multiple)
{
    return (nbytes + multiple - 1) & ~(multiple - 1);
}

/* Return how much is mapped for nbytes, as struct wc_memory says; nbytes <= SIZE_MAX / 2. */
size_t wc_memory_mapped(size_t nbytes);

/* Take addresses that nobody may touch yet, for a mapping to be laid over them. On failure nothing stays mapped. */
int wc_memory_reserve(struct wc_memory *memory, size_t nbytes);

/* Map nbytes of zeroes, none populated. On failure nothing stays mapped, and start is NULL or as it was. */
int wc_memory_map(struct wc_memory *memory, size_t nbytes);

/*
 * Ask for pages yet to be populated to lie on a node, and where they find room if that is full; -1 asks nothing.
 * *memory remembers the node and the refusal.
 */
void wc_memory_prefer(struct wc_memory *memory, int numa_node);

/* Unmap. Nobody may use the memory any more; call it once. */
void wc_memory_unmap(struct wc_memory *memory);

/*
 * Back each page that overlaps [start, start + nbytes) with real memory; content stays. Any mapped, writable memory.
 *
 * Any number of threads may populate and write the same bytes at once. -ENOMEM where no page is to be had. Before
 * Linux 5.14 the pages are touched one by one, and running out of memory then kills the process instead.
 */
int wc_populate(unsigned char *start, size_t nbytes);

/* The same for [start, stop) of a mapping, start < stop <= nbytes. */
int wc_memory_populate(const struct wc_memory *memory, size_t start, size_t stop);

/* Set *huge to the bytes that lie in transparent huge pages now, be they private or shared. */
int wc_memory_huge_nbytes(const struct wc_memory *memory, size_t *huge);

#endif
