/*
 * XXH3-64 of bytes (seed 0, default secret), whole or in steps: finds damage, not malice.
 *
 * Sizes are bytes. Nothing fails, allocates or keeps state outside struct wc_checksum. Bytes are the caller's,
 * at any alignment, read during the call and never kept. Different sums may be used by different threads at
 * once, one sum by one thread at a time. On x86-64 with AVX2 an AVX2 way runs, with the same result.
 */
#ifndef WEIGHTCACHE_CHECKSUM_H
#define WEIGHTCACHE_CHECKSUM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* What XXH3 takes between two scrambles with the default secret; every step but the last is whole blocks. */
#define WC_CHECKSUM_BLOCK ((size_t)1024)
#define WC_CHECKSUM_STRIPE ((size_t)64)

/* One sum in progress, owned by the caller; nothing to free. Fields are for checksum.c alone. */
struct wc_checksum {
    uint64_t lanes[8];
    unsigned char last[WC_CHECKSUM_STRIPE]; /* of what was added; set once a block was */
    size_t nbytes;                          /* of all of it */
    size_t added;
    uint64_t value; /* of no bytes, until all were added */
    bool plain;     /* whether to leave AVX2 alone */
};

/* Begin the sum of nbytes, which may be 0. */
void wc_checksum_begin(struct wc_checksum *sum, size_t nbytes);

/* The same without AVX2: what the fast way is compared with. */
void wc_checksum_begin_plain(struct wc_checksum *sum, size_t nbytes);

/*
 * Add the next nbytes: a multiple of WC_CHECKSUM_BLOCK unless they are the last. 0 does nothing.
 *
 * Never more in all than was begun with.
 */
void wc_checksum_add(struct wc_checksum *sum, const void *bytes, size_t nbytes);

/* Return the sum, after exactly the bytes it was begun for were added. May be called again. */
uint64_t wc_checksum_end(const struct wc_checksum *sum);

/* Return the sum of nbytes that lie in one piece; bytes may be NULL for none. */
uint64_t wc_checksum_of(const void *bytes, size_t nbytes);

#endif
