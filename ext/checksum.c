/*
 * XXH3-64 after its specification, doc/xxhash_spec.md in github.com/Cyan4973/xxHash, whose constants these are.
 *
 * Only whole blocks have a second, faster way: everything else is at most 1 KiB for each sum.
 */
#include "checksum.h"

#include <string.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__ || !defined(__SIZEOF_INT128__)
#error "written for 64-bit little-endian machines"
#endif

#define PRIME32_1 0x9E3779B1U
#define PRIME32_2 0x85EBCA77U
#define PRIME32_3 0xC2B2AE3DU
#define PRIME64_1 0x9E3779B185EBCA87U
#define PRIME64_2 0xC2B2AE3D27D4EB4FU
#define PRIME64_3 0x165667B19E3779F9U
#define PRIME64_4 0x85EBCA77C2B2AE63U
#define PRIME64_5 0x27D4EB2F165667C5U
#define PRIME_MX1 0x165667919E3779F9U
#define PRIME_MX2 0x9FB21C651E98DF25U

#define STRIPE WC_CHECKSUM_STRIPE
#define BLOCK WC_CHECKSUM_BLOCK
#define SHORT_LIMIT 240 /* up to here the specification has formulas without lanes */

/* Where in the secret the specification starts to read; each further stripe of a block starts 8 bytes on. */
#define SECRET_STRIDE 8
#define SECRET_MERGE 11
#define SECRET_LAST 121
#define SECRET_SCRAMBLE 128

static const unsigned char secret[192] = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c,
    0xde, 0xd4, 0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f,
    0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21,
    0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c,
    0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3,
    0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8,
    0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d,
    0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64,
    0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb,
    0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e,
    0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce,
    0x45, 0xcb, 0x3a, 0x8f, 0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e,
};

static uint32_t word32(const unsigned char *bytes)
{
    uint32_t word;
    memcpy(&word, bytes, sizeof word);
    return word;
}

static inline uint64_t word(const unsigned char *bytes)
{
    uint64_t word;
    memcpy(&word, bytes, sizeof word);
    return word;
}

/* Both halves of the product, xor-ed. */
static uint64_t fold(uint64_t left, uint64_t right)
{
    unsigned __int128 product = (unsigned __int128)left * right;
    return (uint64_t)product ^ (uint64_t)(product >> 64);
}

static uint64_t rotate(uint64_t value, int bits)
{
    return value << bits | value >> (64 - bits);
}

static uint64_t avalanche(uint64_t value)
{
    value = (value ^ value >> 37) * PRIME_MX1;
    return value ^ value >> 32;
}

/* The one of XXH64, for the shortest contents. */
static uint64_t avalanche_64(uint64_t value)
{
    value = (value ^ value >> 33) * PRIME64_2;
    value = (value ^ value >> 29) * PRIME64_3;
    return value ^ value >> 32;
}

/* 16 bytes of content with 16 of the secret. */
static uint64_t mixed(const unsigned char *bytes, const unsigned char *key)
{
    return fold(word(bytes) ^ word(key), word(bytes + 8) ^ word(key + 8));
}

static uint64_t of_0_to_16(const unsigned char *bytes, size_t nbytes)
{
    if (nbytes > 8) {
        uint64_t low = word(secret + 24) ^ word(secret + 32) ^ word(bytes);
        uint64_t high = word(secret + 40) ^ word(secret + 48) ^ word(bytes + nbytes - 8);
        return avalanche(nbytes + __builtin_bswap64(low) + high + fold(low, high));
    }
    if (nbytes > 3) {
        uint64_t both = (uint64_t)word32(bytes) << 32 | word32(bytes + nbytes - 4);
        uint64_t value = word(secret + 8) ^ word(secret + 16) ^ both;
        value = (value ^ rotate(value, 49) ^ rotate(value, 24)) * PRIME_MX2;
        value = (value ^ ((value >> 35) + nbytes)) * PRIME_MX2;
        return value ^ value >> 28;
    }
    if (nbytes > 0) {
        uint32_t first = bytes[0], middle = bytes[nbytes / 2], last = bytes[nbytes - 1];
        uint32_t all = middle << 24 | first << 16 | (uint32_t)nbytes << 8 | last;
        return avalanche_64(word32(secret) ^ word32(secret + 4) ^ all);
    }
    return avalanche_64(word(secret + 56) ^ word(secret + 64));
}

static uint64_t of_17_to_128(const unsigned char *bytes, size_t nbytes)
{
    const unsigned char *end = bytes + nbytes;
    uint64_t value = nbytes * PRIME64_1;

    for (size_t pair = 0; pair <= (nbytes - 1) / 32; pair++) {
        value += mixed(bytes + 16 * pair, secret + 32 * pair);
        value += mixed(end - 16 * (pair + 1), secret + 32 * pair + 16);
    }
    return avalanche(value);
}

static uint64_t of_129_to_240(const unsigned char *bytes, size_t nbytes)
{
    uint64_t value = nbytes * PRIME64_1;

    for (size_t at = 0; at < 128; at += 16)
        value += mixed(bytes + at, secret + at);
    value = avalanche(value);
    for (size_t at = 128; at + 16 <= nbytes; at += 16)
        value += mixed(bytes + at, secret + at - 128 + 3);
    return avalanche(value + mixed(bytes + nbytes - 16, secret + 119));
}

static uint64_t of_short(const unsigned char *bytes, size_t nbytes)
{
    if (nbytes > 128)
        return of_129_to_240(bytes, nbytes);
    if (nbytes > 16)
        return of_17_to_128(bytes, nbytes);
    return of_0_to_16(bytes, nbytes);
}

/* 16 bytes of a stripe into their two lanes. */
static inline void add_pair(uint64_t lanes[2], const unsigned char *bytes, const unsigned char *key)
{
    uint64_t left = word(bytes), right = word(bytes + 8);
    uint64_t keyed_left = left ^ word(key), keyed_right = right ^ word(key + 8);

    lanes[0] += right + (keyed_left & UINT32_MAX) * (keyed_left >> 32);
    lanes[1] += left + (keyed_right & UINT32_MAX) * (keyed_right >> 32);
}

static void add_stripe(uint64_t lanes[8], const unsigned char *bytes, const unsigned char *key)
{
    for (int i = 0; i < 8; i += 2)
        add_pair(lanes + i, bytes + 8 * i, key + 8 * i);
}

/* Two lanes at a time, which stay in registers: 13 instead of 12 GB/s for all eight at once. */
static void add_blocks_plain(uint64_t lanes[8], const unsigned char *bytes, size_t blocks)
{
    for (; blocks; blocks--, bytes += BLOCK)
        for (int i = 0; i < 8; i += 2) {
            const unsigned char *key = secret + 8 * i;
            uint64_t pair[2] = {lanes[i], lanes[i + 1]};
#pragma GCC unroll 4
            for (size_t n = 0; n < BLOCK / STRIPE; n++)
                add_pair(pair, bytes + 8 * i + STRIPE * n, key + SECRET_STRIDE * n);
            lanes[i] = (pair[0] ^ pair[0] >> 47 ^ word(key + SECRET_SCRAMBLE)) * PRIME32_1;
            lanes[i + 1] = (pair[1] ^ pair[1] >> 47 ^ word(key + SECRET_SCRAMBLE + 8)) * PRIME32_1;
        }
}

#ifdef __x86_64__
#include <immintrin.h>

#define AVX2 __attribute__((target("avx2")))

AVX2 static inline __m256i load(const unsigned char *bytes)
{
    return _mm256_loadu_si256((const __m256i *)bytes);
}

/* Half a stripe into four lanes. */
AVX2 static inline __m256i added(__m256i lanes, const unsigned char *bytes, const unsigned char *key)
{
    __m256i content = load(bytes), keyed = _mm256_xor_si256(content, load(key));
    __m256i product = _mm256_mul_epu32(keyed, _mm256_srli_epi64(keyed, 32));
    __m256i swapped = _mm256_shuffle_epi32(content, _MM_SHUFFLE(1, 0, 3, 2));

    return _mm256_add_epi64(lanes, _mm256_add_epi64(product, swapped));
}

/* The product of 64 and 32 bits, put together from two of 32 and 32. */
AVX2 static inline __m256i scrambled(__m256i lanes, const unsigned char *key)
{
    __m256i prime = _mm256_set1_epi64x(PRIME32_1);
    __m256i keyed = _mm256_xor_si256(_mm256_xor_si256(lanes, _mm256_srli_epi64(lanes, 47)), load(key));
    __m256i low = _mm256_mul_epu32(keyed, prime);
    __m256i high = _mm256_mul_epu32(_mm256_srli_epi64(keyed, 32), prime);

    return _mm256_add_epi64(low, _mm256_slli_epi64(high, 32));
}

/*
 * Unrolled by 4: 16 make gcc spill the secret, 31 instead of 38 GB/s. AVX-512 gave 54 from cache, but 2 % where
 * it counts, right after pread(2) from page cache (178 instead of 181 CPU ms for each GB).
 */
AVX2 static void add_blocks_avx2(uint64_t lanes[8], const unsigned char *bytes, size_t blocks)
{
    __m256i left = load((const unsigned char *)lanes), right = load((const unsigned char *)(lanes + 4));

    for (; blocks; blocks--, bytes += BLOCK) {
#pragma GCC unroll 4
        for (size_t i = 0; i < BLOCK / STRIPE; i++) {
            left = added(left, bytes + STRIPE * i, secret + SECRET_STRIDE * i);
            right = added(right, bytes + STRIPE * i + 32, secret + SECRET_STRIDE * i + 32);
        }
        left = scrambled(left, secret + SECRET_SCRAMBLE);
        right = scrambled(right, secret + SECRET_SCRAMBLE + 32);
    }
    _mm256_storeu_si256((__m256i *)lanes, left);
    _mm256_storeu_si256((__m256i *)(lanes + 4), right);
}
#endif

static void add_blocks(struct wc_checksum *sum, const unsigned char *bytes, size_t blocks)
{
#ifdef __x86_64__
    if (!sum->plain && __builtin_cpu_supports("avx2")) {
        add_blocks_avx2(sum->lanes, bytes, blocks);
        return;
    }
#endif
    add_blocks_plain(sum->lanes, bytes, blocks);
}

/* The last block, 1 to BLOCK bytes: its stripes but the last, then the last 64 bytes of everything. */
static void add_last_block(uint64_t lanes[8], const unsigned char *bytes, size_t nbytes, const unsigned char *last)
{
    for (size_t i = 0; i < (nbytes - 1) / STRIPE; i++)
        add_stripe(lanes, bytes + STRIPE * i, secret + SECRET_STRIDE * i);
    add_stripe(lanes, last, secret + SECRET_LAST);
}

static uint64_t merged(const uint64_t lanes[8], size_t nbytes)
{
    uint64_t value = nbytes * PRIME64_1;

    for (int i = 0; i < 8; i += 2) {
        const unsigned char *key = secret + SECRET_MERGE + 8 * i;
        value += fold(lanes[i] ^ word(key), lanes[i + 1] ^ word(key + 8));
    }
    return avalanche(value);
}

void wc_checksum_begin(struct wc_checksum *sum, size_t nbytes)
{
    *sum = (struct wc_checksum){
        .lanes = {PRIME32_3, PRIME64_1, PRIME64_2, PRIME64_3, PRIME64_4, PRIME32_2, PRIME64_5, PRIME32_1},
        .nbytes = nbytes,
        .value = of_short(NULL, 0),
    };
}

void wc_checksum_begin_plain(struct wc_checksum *sum, size_t nbytes)
{
    wc_checksum_begin(sum, nbytes);
    sum->plain = true;
}

void wc_checksum_add(struct wc_checksum *sum, const void *bytes, size_t nbytes)
{
    const unsigned char *start = bytes;

    if (nbytes == 0)
        return;
    sum->added += nbytes;
    if (sum->nbytes <= SHORT_LIMIT) {
        sum->value = of_short(start, nbytes);
        return;
    }
    /* A whole block that is the very last counts as the last one, and is not scrambled. */
    const bool ends = sum->added == sum->nbytes;
    const size_t blocks = (nbytes - ends) / BLOCK;
    add_blocks(sum, start, blocks);

    const size_t kept = nbytes < STRIPE ? STRIPE - nbytes : 0;
    memmove(sum->last, sum->last + STRIPE - kept, kept);
    memcpy(sum->last + kept, start + nbytes - (STRIPE - kept), STRIPE - kept);
    if (ends) {
        add_last_block(sum->lanes, start + BLOCK * blocks, nbytes - BLOCK * blocks, sum->last);
        sum->value = merged(sum->lanes, sum->nbytes);
    }
}

uint64_t wc_checksum_end(const struct wc_checksum *sum)
{
    return sum->value;
}

uint64_t wc_checksum_of(const void *bytes, size_t nbytes)
{
    struct wc_checksum sum;

    wc_checksum_begin(&sum, nbytes);
    wc_checksum_add(&sum, bytes, nbytes);
    return wc_checksum_end(&sum);
}
