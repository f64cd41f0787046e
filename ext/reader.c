#define _GNU_SOURCE
#include "reader.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#define DIRECT_BLOCK ((size_t)4 << 20) /* with two threads or more, larger ones gain nothing */
#define CACHED_BLOCK ((size_t)1 << 20) /* fresh memory is still in a cache when it is read into */
#define HASHED_BLOCK ((size_t)256 << 10) /* what stays in a core's cache between the read and its checksum */
#define WINDOW ((size_t)64 << 20)        /* which way is taken is decided for as much at a time */
#define DIRECT_FROM ((size_t)1 << 20)    /* below it, asking and going past the cache costs more than it saves */
#define RESIDENT_SHARE 0.8 /* of a window: below it direct reads are faster, at a tenth of the processor time */

#ifndef SYS_cachestat
#define SYS_cachestat 451 /* Linux 6.5 */
#endif

static size_t min_size(size_t a, size_t b)
{
    return a < b ? a : b;
}

static int check_regular(int fd)
{
    struct stat stat;

    if (fstat(fd, &stat))
        return -errno;
    return S_ISREG(stat.st_mode) ? 0 : -EINVAL;
}

int wc_file_open(struct wc_file *file, int folder_fd, const char *name)
{
    int fd = openat(folder_fd, name, O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
    if (fd < 0)
        return -errno;
    int rc = check_regular(fd);
    if (rc) {
        close(fd);
        return rc;
    }
    *file = (struct wc_file){.fd = fd};
    return 0;
}

int wc_file_reopen(struct wc_file *file, int fd)
{
    char path[32];
    int rc = check_regular(fd);

    if (rc)
        return rc;
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    int again = open(path, O_RDONLY | O_CLOEXEC);
    if (again < 0) {
        *file = (struct wc_file){.fd = fd, .borrowed = true, .refused_errno = errno};
        return 0;
    }
    *file = (struct wc_file){.fd = again};
    return 0;
}

void wc_file_close(struct wc_file *file)
{
    if (!file->borrowed)
        close(file->fd);
}

void wc_reading_free(struct wc_reading *reading)
{
    if (reading->bounce.start)
        wc_memory_unmap(&reading->bounce);
    reading->bounce.start = NULL;
}

/* Set or clear O_DIRECT; a refusal to set it is remembered and no failure. */
static int make_direct(struct wc_file *file, bool direct)
{
    if (direct == file->is_direct || (direct && file->refused_errno))
        return 0;
    int flags = fcntl(file->fd, F_GETFL);
    if (flags < 0 || fcntl(file->fd, F_SETFL, direct ? flags | O_DIRECT : flags & ~O_DIRECT)) {
        if (!direct)
            return -errno;
        file->refused_errno = errno;
        return 0;
    }
    file->is_direct = direct;
    return 0;
}

/* Read one block to `to`, in place or through the bounce buffer. Sets *got to the fresh bytes, 0 at the file's end. */
static int read_block(struct wc_reading *reading, struct wc_file *file, off_t at, unsigned char *to, size_t left,
                      bool is_padded, size_t block, size_t *got)
{
    const size_t alignment = file->is_direct ? WC_ALIGNMENT : 1;
    size_t skip = (size_t)at % alignment;
    bool in_place = skip == 0 && (uintptr_t)to % alignment == 0 && (left >= alignment || is_padded);
    unsigned char *into = to;
    size_t want = min_size(left, block);

    if (!in_place) {
        if (!reading->bounce.start) {
            int rc = wc_memory_map(&reading->bounce, DIRECT_BLOCK);
            if (rc)
                return rc;
        }
        into = reading->bounce.start;
        /* A block that could land in place further on is left for then. */
        bool later = (uintptr_t)to % alignment == skip && skip + left >= alignment;
        want = later ? alignment : min_size(block, wc_round_up(skip + left, alignment));
    } else if (want == left && is_padded) {
        want = wc_round_up(want, alignment);
    } else {
        want &= ~(alignment - 1);
    }
    ssize_t n_read = pread(file->fd, into, want, at - (off_t)skip);
    if (n_read < 0)
        return -errno;
    *got = (size_t)n_read > skip ? min_size((size_t)n_read - skip, left) : 0;
    if (!in_place)
        memcpy(to, into + skip, *got);
    return 0;
}

/* Tell whether the next `nbytes` are better read past the page cache. */
static bool is_better_direct(const struct wc_file *file, off_t at, size_t nbytes)
{
    size_t resident;

    return nbytes >= DIRECT_FROM && wc_resident_nbytes(file->fd, at, nbytes, &resident) == 0 &&
           (double)resident < RESIDENT_SHARE * (double)nbytes;
}

int wc_file_read(struct wc_reading *reading, struct wc_file *file, off_t offset, struct wc_target target,
                 struct wc_checksum *sum)
{
    const bool is_padded = target.is_padded && (uintptr_t)target.start % WC_ALIGNMENT == 0;
    size_t done = 0, summed = 0, decided = 0;
    bool direct = false;

    while (done < target.nbytes) {
        for (int i = 0; i < 2; i++)
            if (reading->stops[i] && atomic_load_explicit(reading->stops[i], memory_order_relaxed))
                return -ECANCELED;
        if (done >= decided) {
            size_t window = min_size(target.nbytes - done, WINDOW);
            decided = done + window;
            direct = target.past_cache || is_better_direct(file, offset + (off_t)done, window);
        }
        int rc = make_direct(file, direct);
        if (rc)
            return rc;
        if (direct && file->refused_errno)
            reading->refused_errno = file->refused_errno;

        size_t block = file->is_direct ? DIRECT_BLOCK : sum ? HASHED_BLOCK : CACHED_BLOCK, got = 0;
        /* Just before, so that the zeroes that the kernel puts there are still in a cache when they are overwritten. */
        rc = target.is_fresh ? wc_populate(target.start + done, min_size(block, target.nbytes - done)) : 0;
        if (rc)
            return rc;
        rc = read_block(reading, file, offset + (off_t)done, target.start + done, target.nbytes - done,
                        is_padded, block, &got);
        if (rc == -EINTR)
            continue;
        if (rc == -EINVAL && file->is_direct) { /* some file systems only say so here */
            file->refused_errno = EINVAL;
            rc = make_direct(file, false);
            if (rc)
                return rc;
            continue;
        }
        if (rc)
            return rc;
        if (got == 0)
            return -ENODATA;
        *(file->is_direct ? &reading->direct_nbytes : &reading->cached_nbytes) += got;
        done += got;
        if (sum) {
            /* Whole blocks of the checksum; a read that fell short leaves some for the next. */
            size_t ready = done == target.nbytes ? done : done & ~(size_t)(WC_CHECKSUM_BLOCK - 1);
            wc_checksum_add(sum, target.start + summed, ready - summed);
            summed = ready;
        }
    }
    return 0;
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
