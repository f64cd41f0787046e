/*
 * Bytes of files: read into the caller's memory, past the page cache or through it, and checked while they are
 * hot; or counted in the page cache. Never seeks, and never writes outside the target.
 *
 * Sizes and offsets are bytes. Functions return 0 or -errno and keep no state of their own.
 */
#ifndef WEIGHTCACHE_READER_H
#define WEIGHTCACHE_READER_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "checksum.h"
#include "memory.h"

/* What O_DIRECT asks of offset, address and length: 4096 suits every disk, 512 only some. */
#define WC_ALIGNMENT ((size_t)4096)

/* An open file description that one thread reads through, past the page cache or through it. */
struct wc_file {
    int fd;
    bool borrowed;     /* fd is somebody else's, who may share it: it is not made direct, and not closed here */
    bool is_direct;    /* whether O_DIRECT is set on fd now */
    int refused_errno; /* why O_DIRECT cannot be had, 0 as long as it can */
};

/* Open a regular file by its name below a folder. A link as the last part of the name is refused (-ELOOP). */
int wc_file_open(struct wc_file *file, int folder_fd, const char *name);

/*
 * Open again what `fd` has open, so that both can be used without disturbing each other. Where /proc does not
 * allow that, fd itself is borrowed: it must stay open, and is only read through the page cache.
 */
int wc_file_reopen(struct wc_file *file, int fd);

/* Close it; call it once, after an open that succeeded. */
void wc_file_close(struct wc_file *file);

/* One thread's means of reading and what it did with them. Made with zeroes, freed by wc_reading_free. */
struct wc_reading {
    const atomic_int *stops[2]; /* when one is not 0, a read ends soon with -ECANCELED; may be NULL */
    struct wc_memory bounce; /* where blocks go whose place O_DIRECT cannot reach; start is NULL until needed */
    uint64_t direct_nbytes;  /* read past the page cache */
    uint64_t cached_nbytes;  /* read through it */
    int refused_errno;       /* why O_DIRECT could not be had where it was wanted, 0 where it could */
};

void wc_reading_free(struct wc_reading *reading);

/* Where bytes of a file go. */
struct wc_target {
    unsigned char *start;
    size_t nbytes;
    bool is_padded;  /* memory goes on to the next multiple of WC_ALIGNMENT and may be written, if start is one too */
    bool is_fresh;   /* it was perhaps never touched: each block is populated before it is read */
    bool past_cache; /* what the page cache holds is not to be believed: read past it if at all possible */
};

/*
 * Fill target with the file's bytes from offset on.
 *
 * Per 64 MiB: where the page cache holds four fifths of them they are read through it, else past it; small
 * reads always through it. Whole blocks for which offset and address are aligned land in place; what cannot
 * goes through the bounce buffer. Each step of some 256 KiB (through the cache) or 4 MiB (past it) is added
 * to `sum`, if there is one, while it is hot; then offset must be a multiple of WC_ALIGNMENT.
 *
 * -ENODATA: the file ends before. -ECANCELED: it was stopped. On any error the content of target is undefined.
 */
int wc_file_read(struct wc_reading *reading, struct wc_file *file, off_t offset, struct wc_target target,
                 struct wc_checksum *sum);

/*
 * Set *resident to how many bytes of [offset, offset + nbytes) are in the page cache: whole pages, at most
 * nbytes. Reads nothing in. Without cachestat(2) (Linux 6.5) it needs a mappable, readable file, and counts a
 * file that this user could not write as resident throughout.
 */
int wc_resident_nbytes(int fd, off_t offset, size_t nbytes, size_t *resident);

#endif
