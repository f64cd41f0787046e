/*
 * Bytes of files: read into the caller's memory, or counted in the page cache. Never opens, closes or seeks.
 *
 * Sizes and offsets are bytes. Functions return 0 or -errno and keep no state of their own.
 */
#ifndef WEIGHTCACHE_READER_H
#define WEIGHTCACHE_READER_H

#include <stdbool.h>
#include <stddef.h>
#include <sys/types.h>

#include "memory.h"

/* What O_DIRECT asks of offset, address and length: 4096 suits every disk, 512 only some. */
#define WC_ALIGNMENT ((size_t)4096)

/*
 * One read in progress, used by one thread at a time. The descriptor and the target stay the caller's and
 * must outlive it.
 *
 * With O_DIRECT any offset, target and nbytes will do: whole blocks for which both offset and address are
 * aligned land in place, everything else goes through the bounce buffer.
 */
struct wc_read {
    int fd;
    size_t alignment; /* WC_ALIGNMENT for O_DIRECT, else 1 */
    off_t offset;     /* in the file, >= 0, of target[0] */
    unsigned char *target;
    size_t nbytes;
    size_t done;             /* bytes of target that hold the file's */
    bool ended;              /* done is nbytes, or the file ended */
    size_t bounce_nbytes;    /* how large the bounce buffer will be if it is needed */
    struct wc_memory bounce; /* start is NULL until it is needed */
};

/* Prepare to read [offset, offset + nbytes) of the file into target. */
int wc_read_begin(struct wc_read *read, int fd, off_t offset, void *target, size_t nbytes);

/*
 * Read about 16 MiB more; call it until it fails or read->ended.
 *
 * Returns early, with 0, when a signal interrupted it. Writes nothing outside target; bytes from done on are
 * undefined. -EINVAL for O_DIRECT means that this file wants to be read without.
 */
int wc_read_some(struct wc_read *read);

/* Free the bounce buffer; call it once, after wc_read_begin, whatever that returned. */
void wc_read_end(struct wc_read *read);

/*
 * Set *resident to how many bytes of [offset, offset + nbytes) are in the page cache: whole pages, at most
 * nbytes. Reads nothing in. Without cachestat(2) (Linux 6.5) it needs a mappable, readable file, and counts a
 * file that this user could not write as resident throughout.
 */
int wc_resident_nbytes(int fd, off_t offset, size_t nbytes, size_t *resident);

#endif
