#define _GNU_SOURCE
#include "pool.h"

#include <sched.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>

static bool try_enter(struct wc_pool *pool)
{
    return !atomic_flag_test_and_set_explicit(&pool->busy, memory_order_acquire);
}

static void enter(struct wc_pool *pool)
{
    while (!try_enter(pool))
        sched_yield();
}

static void leave(struct wc_pool *pool)
{
    atomic_flag_clear_explicit(&pool->busy, memory_order_release);
}

static struct wc_memory pull_out(struct wc_pool *pool, size_t index)
{
    struct wc_memory memory = pool->kept[index];

    pool->nbytes -= memory.mapped;
    pool->count--;
    memmove(pool->kept + index, pool->kept + index + 1, (pool->count - index) * sizeof memory);
    return memory;
}

/* Pull the oldest out until room bytes and one slot more would fit, or nothing is left; return how many. */
static size_t make_room(struct wc_pool *pool, size_t room, struct wc_memory gone[static WC_POOL_SLOTS])
{
    size_t n = 0;

    while (pool->count && (pool->nbytes + room > pool->limit || (room && pool->count == WC_POOL_SLOTS)))
        gone[n++] = pull_out(pool, 0);
    return n;
}

static bool may_keep(struct wc_pool *pool, size_t mapped)
{
    if (mapped < WC_HUGE_PAGE || !try_enter(pool))
        return false;
    bool may = mapped <= pool->limit;
    leave(pool);
    return may;
}

void wc_pool_give(struct wc_pool *pool, struct wc_memory *memory)
{
    struct wc_memory gone[WC_POOL_SLOTS];
    size_t n = 0;

    /* Locked memory cannot be given back to the kernel, so MADV_FREE refuses it. */
    if (!may_keep(pool, memory->mapped) || madvise(memory->start, memory->mapped, MADV_FREE) ||
        madvise(memory->start, memory->mapped + memory->guard, MADV_DONTFORK) || !try_enter(pool)) {
        wc_memory_unmap(memory);
        return;
    }
    if (memory->mapped <= pool->limit) {
        n = make_room(pool, memory->mapped, gone);
        pool->kept[pool->count++] = *memory;
        pool->nbytes += memory->mapped;
    } else {
        gone[n++] = *memory;
    }
    leave(pool);
    while (n)
        wc_memory_unmap(&gone[--n]);
}

bool wc_pool_take(struct wc_pool *pool, struct wc_memory *memory, size_t nbytes, int numa_node)
{
    if (nbytes < WC_HUGE_PAGE || nbytes > SIZE_MAX / 2 || !try_enter(pool))
        return false;
    const size_t least = wc_memory_mapped(nbytes);
    size_t best = pool->count;
    for (size_t i = 0; i < pool->count; i++) {
        const struct wc_memory *each = &pool->kept[i];
        if (each->numa_node == numa_node && each->mapped >= least && each->mapped - least <= least / 4 &&
            (best == pool->count || each->mapped <= pool->kept[best].mapped))
            best = i; /* of equals the newest: the kernel is the least likely to have taken its pages */
    }
    bool found = best < pool->count;
    if (found)
        *memory = pull_out(pool, best);
    leave(pool);
    if (!found)
        return false;
    if (madvise(memory->start, memory->mapped + memory->guard, MADV_DOFORK)) {
        wc_memory_unmap(memory);
        return false;
    }
    memory->nbytes = nbytes;
    return true;
}

void wc_pool_set_limit(struct wc_pool *pool, size_t limit)
{
    struct wc_memory gone[WC_POOL_SLOTS];

    enter(pool);
    pool->limit = limit;
    size_t n = make_room(pool, 0, gone);
    leave(pool);
    while (n)
        wc_memory_unmap(&gone[--n]);
}

size_t wc_pool_nbytes(struct wc_pool *pool)
{
    enter(pool);
    size_t nbytes = pool->nbytes;
    leave(pool);
    return nbytes;
}

void wc_pool_forget(struct wc_pool *pool)
{
    pool->nbytes = pool->count = 0;
    leave(pool);
}
