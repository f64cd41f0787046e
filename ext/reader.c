#define _GNU_SOURCE
#include "reader.h"

#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#define BLOCK ((size_t)4 << 20) /* one pread: with two threads or more, larger ones gain nothing */
#define BLOCKS_A_CALL 4

#ifndef SYS_cachestat
#define SYS_cachestat 451 /* Linux 6.5 */
#endif

static size_t min_size(size_t a, size_t b)
{
    return a < b ? a : b;
}

int wc_read_begin(struct wc_read *read, int fd, off_t offset, void *target, size_t nbytes)
{
    int flags = fcntl(fd, F_GETFL);
    size_t skip = (size_t)offset % WC_ALIGNMENT;
    size_t span = wc_round_up(skip + nbytes, WC_ALIGNMENT);
    bool body_in_place = (uintptr_t)target % WC_ALIGNMENT == skip;

    *read = (struct wc_read){
        .fd = fd,
        .alignment = flags & O_DIRECT ? WC_ALIGNMENT : 1,
        .offset = offset,
        .target = target,
        .nbytes = nbytes,
        .ended = nbytes == 0,
        .bounce_nbytes = body_in_place ? WC_ALIGNMENT : min_size(BLOCK, span),
    };
    return flags < 0 ? -errno : 0;
}

static int read_block(struct wc_read *read)
{
    unsigned char *to = read->target + read->done;
    off_t at = read->offset + (off_t)read->done;
    size_t left = read->nbytes - read->done;
    size_t skip = (size_t)at % read->alignment;
    bool in_place = skip == 0 && (uintptr_t)to % read->alignment == 0 && left >= read->alignment;

    unsigned char *into = to;
    size_t want = min_size(left, BLOCK) & ~(read->alignment - 1);
    if (!in_place) {
        if (!read->bounce.start) {
            int rc = wc_memory_map(&read->bounce, read->bounce_nbytes);
            if (rc)
                return rc;
        }
        into = read->bounce.start;
        want = min_size(read->bounce_nbytes, wc_round_up(skip + left, read->alignment));
    }

    ssize_t got = pread(read->fd, into, want, at - (off_t)skip);
    if (got < 0)
        return errno == EINTR ? 0 : -errno;
    size_t fresh = (size_t)got > skip ? min_size((size_t)got - skip, left) : 0;
    if (!in_place)
        memcpy(to, into + skip, fresh);
    read->done += fresh;
    read->ended = fresh == 0 || read->done == read->nbytes;
    return 0;
}

int wc_read_some(struct wc_read *read)
{
    int rc = 0;

    for (int blocks = 0; rc == 0 && !read->ended && blocks < BLOCKS_A_CALL; blocks++)
        rc = read_block(read);
    return rc;
}

void wc_read_end(struct wc_read *read)
{
    if (read->bounce.start)
        wc_memory_unmap(&read->bounce);
}

/* As in linux/mman.h, which older systems lack. */
struct cachestat_range {
    uint64_t off, len;
};
struct cachestat {
    uint64_t nr_cache, nr_dirty, nr_writeback, nr_evicted, nr_recently_evicted;
};

/* Count the resident pages of a mapping that nobody touches, 64 MiB of 4 KiB pages at a time. */
static int count_by_mincore(int fd, off_t offset, size_t nbytes, uint64_t *pages)
{
    const size_t page = wc_page_nbytes();
    size_t skip = (size_t)offset % page, mapped = wc_round_up(skip + nbytes, page);
    unsigned char states[16384];
    int rc = 0;

    unsigned char *map = mmap(NULL, mapped, PROT_READ, MAP_SHARED, fd, offset - (off_t)skip);
    if (map == MAP_FAILED)
        return -errno;
    *pages = 0;
    for (size_t at = 0; at < mapped; at += sizeof states * page) {
        size_t count = min_size(sizeof states, (mapped - at) / page);
        if (mincore(map + at, count * page, states)) {
            rc = -errno;
            break;
        }
        for (size_t i = 0; i < count; i++)
            *pages += states[i] & 1;
    }
    munmap(map, mapped);
    return rc;
}

int wc_resident_nbytes(int fd, off_t offset, size_t nbytes, size_t *resident)
{
    struct cachestat_range range = {.off = (uint64_t)offset, .len = nbytes};
    struct cachestat stat = {0};

    *resident = 0;
    if (nbytes == 0) /* which cachestat takes for "to the end" and mmap for an error */
        return 0;
    if (syscall(SYS_cachestat, fd, &range, &stat, 0)) {
        if (errno != ENOSYS && errno != EPERM && errno != EOPNOTSUPP)
            return -errno;
        int rc = count_by_mincore(fd, offset, nbytes, &stat.nr_cache);
        if (rc)
            return rc;
    }
    *resident = min_size(stat.nr_cache * wc_page_nbytes(), nbytes);
    return 0;
}
