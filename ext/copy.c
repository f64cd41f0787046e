#include "copy.h"

#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>

__attribute__((target("avx2"))) static size_t copy_avx2(unsigned char *to, const unsigned char *from, size_t nbytes)
{
    const size_t whole = nbytes & ~(size_t)127;

    for (size_t at = 0; at < whole; at += 128) {
        __m256i a = _mm256_loadu_si256((const __m256i *)(from + at));
        __m256i b = _mm256_loadu_si256((const __m256i *)(from + at + 32));
        __m256i c = _mm256_loadu_si256((const __m256i *)(from + at + 64));
        __m256i d = _mm256_loadu_si256((const __m256i *)(from + at + 96));
        _mm256_stream_si256((__m256i *)(to + at), a);
        _mm256_stream_si256((__m256i *)(to + at + 32), b);
        _mm256_stream_si256((__m256i *)(to + at + 64), c);
        _mm256_stream_si256((__m256i *)(to + at + 96), d);
    }
    _mm_sfence();
    return whole;
}
#endif

void wc_copy_past_cache(void *to, const void *from, size_t nbytes)
{
    size_t done = 0;

#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx2"))
        done = copy_avx2(to, from, nbytes);
#endif
    memcpy((unsigned char *)to + done, (const unsigned char *)from + done, nbytes - done);
}
