#define _GNU_SOURCE
#include "memory.h"

#include <errno.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23 /* Linux 5.14; glibc before 2.35 lacks the name */
#endif

size_t wc_page_nbytes(void)
{
    return (size_t)sysconf(_SC_PAGESIZE);
}

size_t wc_memory_mapped(size_t nbytes)
{
    return wc_round_up(nbytes ? nbytes : 1, nbytes >= WC_HUGE_PAGE ? WC_HUGE_PAGE : wc_page_nbytes());
}

int wc_memory_reserve(struct wc_memory *memory, size_t nbytes)
{
    const size_t page = wc_page_nbytes();

    if (nbytes > SIZE_MAX / 2)
        return -ENOMEM;
    size_t mapped = wc_memory_mapped(nbytes);
    size_t kept = mapped + page;
    size_t whole = kept + WC_HUGE_PAGE;
    unsigned char *raw = mmap(NULL, whole, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (raw == MAP_FAILED)
        return -errno;

    /* Trim to the aligned part; raw and whole are always what is still mapped. */
    size_t head = -(uintptr_t)raw % WC_HUGE_PAGE;
    if (head && munmap(raw, head))
        goto fail;
    raw += head;
    whole -= head;
    if (munmap(raw + kept, whole - kept))
        goto fail;

    *memory = (struct wc_memory){
        .start = raw, .nbytes = nbytes, .mapped = mapped, .guard = page, .numa_node = -1};
    return 0;

fail:;
    int rc = -errno;
    munmap(raw, whole);
    return rc;
}

int wc_memory_map(struct wc_memory *memory, size_t nbytes)
{
    int rc = wc_memory_reserve(memory, nbytes);
    if (rc)
        return rc;
    if (mprotect(memory->start, memory->mapped, PROT_READ | PROT_WRITE)) {
        rc = -errno;
        wc_memory_unmap(memory);
        memory->start = NULL;
        return rc;
    }
    memory->huge_refused_errno = madvise(memory->start, memory->mapped, MADV_HUGEPAGE) ? errno : 0;
    return 0;
}

void wc_memory_prefer(struct wc_memory *memory, int numa_node)
{
    enum { PREFERRED = 1, NODES = 1024, BITS = 8 * sizeof(unsigned long) };
    unsigned long nodes[NODES / BITS] = {0};

    memory->numa_node = numa_node;
    memory->numa_refused_errno = 0;
    if (numa_node < 0)
        return;
    if (numa_node >= NODES) {
        memory->numa_refused_errno = EINVAL;
        return;
    }
    nodes[numa_node / BITS] = 1UL << numa_node % BITS;
    /* The kernel looks at one bit less than it is told of. */
    if (syscall(SYS_mbind, memory->start, memory->mapped, PREFERRED, nodes, (unsigned long)NODES + 1, 0))
        memory->numa_refused_errno = errno;
}

void wc_memory_unmap(struct wc_memory *memory)
{
    munmap(memory->start, memory->mapped + memory->guard);
}

/* Write-fault each page without changing it: an atomic OR of nothing cannot undo another thread's write. */
static void touch(unsigned char *start, size_t nbytes)
{
    const size_t page = wc_page_nbytes();

    for (size_t at = 0; at < nbytes; at += page)
        __atomic_fetch_or((volatile unsigned char *)start + at, 0, __ATOMIC_RELAXED);
}

int wc_populate(unsigned char *start, size_t nbytes)
{
    const uintptr_t page = wc_page_nbytes();
    unsigned char *first = (unsigned char *)((uintptr_t)start & ~(page - 1));
    size_t whole = wc_round_up((size_t)(start + nbytes - first), page);

    if (madvise(first, whole, MADV_POPULATE_WRITE) == 0)
        return 0;
    int rc = errno == EFAULT ? -ENOMEM : -errno; /* "would be SIGBUS": there is no page to be had */
    if (rc != -EINVAL || madvise(first, 0, MADV_POPULATE_WRITE) == 0)
        return rc; /* the advice is known, and refused: such as for memory that cannot be written */
    touch(first, whole);
    return 0;
}

int wc_memory_populate(const struct wc_memory *memory, size_t start, size_t stop)
{
    return wc_populate(memory->start + start, stop - start);
}

int wc_memory_huge_nbytes(const struct wc_memory *memory, size_t *huge)
{
    const uintptr_t start = (uintptr_t)memory->start, end = start + memory->mapped;
    bool ours = false;
    char *line = NULL;
    size_t room = 0;
    FILE *smaps = fopen("/proc/self/smaps", "re");

    if (!smaps)
        return -errno;
    *huge = 0;
    while (getline(&line, &room, smaps) > 0) {
        unsigned long from, to, kib;
        if (sscanf(line, "%lx-%lx ", &from, &to) == 2) {
            if (from >= end)
                break;
            ours = from >= start && to <= end;
        } else if (ours && (sscanf(line, "AnonHugePages: %lu", &kib) == 1 ||
                            sscanf(line, "ShmemPmdMapped: %lu", &kib) == 1)) {
            *huge += kib << 10;
        }
    }
    free(line);
    fclose(smaps);
    return 0;
}
