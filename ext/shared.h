/*
 * Memory that several processes map: a memfd, filled by one, then sealed, so that none can change what others see.
 *
 * Sizes and offsets are bytes. Functions return 0 or -errno and keep no state of their own. One thread at a time
 * creates, seals, attaches and closes; any number may populate at once.
 */
#ifndef WEIGHTCACHE_SHARED_H
#define WEIGHTCACHE_SHARED_H

#include <stdbool.h>
#include <stddef.h>

#include "memory.h"

/* What the pages of a memfd are, the best last. */
enum wc_shared_pages {
    WC_SHARED_SMALL,   /* of this kernel's size */
    WC_SHARED_HUGE,    /* huge where the kernel has them (shmem) */
    WC_SHARED_HUGETLB, /* huge, from those that the operator reserved, all of them set aside for this memfd */
};

/*
 * One memfd and its mapping, owned by the caller from wc_shared_create or wc_shared_attach to wc_shared_close.
 * The mapping needs the descriptor no more; it stays when other processes that hold the memfd are gone.
 */
struct wc_shared {
    struct wc_memory memory; /* hugetlb has no guard */
    int fd;                  /* close-on-exec */
    enum wc_shared_pages pages;
    int hugetlb_refused_errno; /* 0 for WC_SHARED_HUGETLB; EFBIG: they are larger than what was asked for */
    bool writable;             /* the mapping */
};

/*
 * Create a memfd of nbytes zeroes, rounded up as struct wc_memory says, and map it to be written. name shows in
 * /proc. On failure nothing stays. It is sealed: it can neither shrink nor grow, and nobody can write into it but
 * through this mapping, which a forked child has, too.
 *
 * Nothing is backed yet but a first huge page, which tells whether there are any. Reserved pages that were set
 * aside are there when they are wanted, unless a hugetlb cgroup or a cpuset has less: populate before writing.
 */
int wc_shared_create(struct wc_shared *shared, size_t nbytes, const char *name, int numa_node);

/*
 * Back each page that overlaps [start, stop) with real memory; content stays. start < stop <= nbytes.
 *
 * -ENOMEM or -ENOSPC where there is none, never a signal. A memory cgroup kills before it refuses: ask it first.
 */
int wc_shared_populate(const struct wc_shared *shared, size_t start, size_t stop);

/* Back what is not backed, and let this mapping be read only. Its pages can still be locked (wc_device_register). */
int wc_shared_freeze(struct wc_shared *shared);

/*
 * Map nbytes of a memfd that somebody sealed as wc_shared_create does. The descriptor is duplicated.
 *
 * What is written goes to a private copy of its page. Where the kernel would have to set pages aside for that and
 * has none (hugetlb), it is mapped to be read only, as writable says. nbytes of SIZE_MAX: all of it.
 *
 * is_partial: it is being filled, and may have holes; a page is not to be touched before it is there.
 *
 * -EINVAL: no memfd, or not all of it is backed; -EPERM: not sealed so; -EFBIG: it is smaller than nbytes.
 */
int wc_shared_attach(struct wc_shared *shared, int fd, size_t nbytes, bool is_partial);

/* Set *huge to the bytes of this mapping that lie in huge pages now. */
int wc_shared_huge_nbytes(const struct wc_shared *shared, size_t *huge);

/* Unmap and close. Nobody may use the memory any more; call it once. */
void wc_shared_close(struct wc_shared *shared);

#endif
