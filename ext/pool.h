/*
 * Memory that is no longer used, kept mapped to be used again: filling pages that are there costs half of what it
 * costs to have them made. Never holds more than its limit, and never memory that anybody may still touch.
 *
 * Sizes are bytes. Every function may run in several threads at once. Nothing here waits but for a list of
 * WC_POOL_SLOTS entries to be walked.
 */
#ifndef WEIGHTCACHE_POOL_H
#define WEIGHTCACHE_POOL_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>

#include "memory.h"

#define WC_POOL_SLOTS 64

/* Owned by the caller, who starts it as WC_POOL_EMPTY; it owns the mappings in it. */
struct wc_pool {
    atomic_flag busy; /* held while the rest is looked at, never while memory is mapped or unmapped */
    size_t limit;     /* most bytes to keep */
    size_t nbytes;    /* of the mappings kept */
    size_t count;
    struct wc_memory kept[WC_POOL_SLOTS]; /* the oldest first */
};

#define WC_POOL_EMPTY {.busy = ATOMIC_FLAG_INIT}

/*
 * Take over memory that nobody uses any more: keep it if it may be kept, the oldest leaving for it, else unmap it.
 *
 * What is kept holds its huge pages, but the kernel may take them back when it runs short, and a fork does not
 * see it. Never waits: where another thread is at the pool, the memory is unmapped.
 */
void wc_pool_give(struct wc_pool *pool, struct wc_memory *memory);

/*
 * Set *memory to a kept mapping of the node that holds nbytes and is at most a quarter larger than one made for
 * them; tell whether there was one. Its content is undefined. Never waits, as wc_pool_give.
 */
bool wc_pool_take(struct wc_pool *pool, struct wc_memory *memory, size_t nbytes, int numa_node);

/* Keep at most so many bytes from now on; what is too much is unmapped before this returns. */
void wc_pool_set_limit(struct wc_pool *pool, size_t limit);

/* Return the bytes of the mappings kept. */
size_t wc_pool_nbytes(struct wc_pool *pool);

/* Empty the pool of a child after a fork, which did not get the memory; whoever was at the pool is not there. */
void wc_pool_forget(struct wc_pool *pool);

#endif
