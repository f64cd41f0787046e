#define _GNU_SOURCE
#include "shared.h"

#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#ifndef MFD_NOEXEC_SEAL
#define MFD_NOEXEC_SEAL 8U /* Linux 6.3 */
#endif
#ifndef MFD_HUGE_2MB
#define MFD_HUGE_2MB (21U << 26)
#endif
#define HUGETLBFS 0x958458f6 /* its magic number; linux/magic.h */

#ifndef F_SEAL_FUTURE_WRITE
#define F_SEAL_FUTURE_WRITE 0x0010 /* Linux 5.1 */
#endif

#define SEALS (F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_FUTURE_WRITE | F_SEAL_SEAL)

/* Open a memfd of nbytes; return its descriptor, or -errno. */
static int open_memfd(const char *name, unsigned int flags, size_t nbytes)
{
    flags |= MFD_CLOEXEC | MFD_ALLOW_SEALING;
    int fd = memfd_create(name, flags | MFD_NOEXEC_SEAL);
    if (fd < 0 && errno == EINVAL)
        fd = memfd_create(name, flags);
    if (fd < 0)
        return -errno;
    if (ftruncate(fd, (off_t)nbytes)) {
        int rc = -errno;
        close(fd);
        return rc;
    }
    return fd;
}

/* Lay the memfd over what is mapped there. */
static int map_over(const struct wc_shared *shared, int protection, int flags)
{
    const struct wc_memory *memory = &shared->memory;
    void *at = mmap(memory->start, memory->mapped, protection, flags | MAP_FIXED, shared->fd, 0);

    return at == MAP_FAILED ? -errno : 0;
}

/* Map hugetlb where the kernel likes: laid over a mapping, a refusal could leave a hole that others fall into. */
static int map_hugetlb(struct wc_shared *shared, size_t nbytes, int protection, int flags)
{
    size_t mapped = wc_memory_mapped(nbytes);
    void *at = mmap(NULL, mapped, protection, flags, shared->fd, 0);

    if (at == MAP_FAILED)
        return -errno;
    shared->memory = (struct wc_memory){.start = at, .nbytes = nbytes, .mapped = mapped, .numa_node = -1};
    return 0;
}

static bool is_backed(const struct wc_shared *shared, size_t nbytes)
{
    struct stat stat;

    return fstat(shared->fd, &stat) == 0 && (size_t)stat.st_blocks * 512 >= nbytes;
}

/* Have pages made for a part of the file. */
static int back(const struct wc_shared *shared, size_t start, size_t nbytes)
{
    while (fallocate(shared->fd, 0, (off_t)start, (off_t)nbytes))
        if (errno != EINTR)
            return -errno;
    return 0;
}

static int create_hugetlb(struct wc_shared *shared, size_t nbytes, const char *name)
{
    if (nbytes < WC_HUGE_PAGE)
        return -EFBIG;
    shared->fd = open_memfd(name, MFD_HUGETLB | MFD_HUGE_2MB, wc_memory_mapped(nbytes));
    if (shared->fd < 0)
        return shared->fd;
    /* This sets all its pages aside, or fails. */
    int rc = map_hugetlb(shared, nbytes, PROT_READ | PROT_WRITE, MAP_SHARED);
    if (rc)
        close(shared->fd);
    return rc;
}

static int create_shmem(struct wc_shared *shared, size_t nbytes, const char *name)
{
    int rc = wc_memory_reserve(&shared->memory, nbytes);
    if (rc)
        return rc;
    rc = shared->fd = open_memfd(name, 0, shared->memory.mapped);
    if (rc < 0)
        goto unmap;
    rc = map_over(shared, PROT_READ | PROT_WRITE, MAP_SHARED);
    if (rc == 0)
        return 0;
    close(shared->fd);
unmap:
    wc_memory_unmap(&shared->memory);
    return rc;
}

/* madvise agrees even where shmem_enabled says never: one page made tells more than all settings. */
static int try_huge(struct wc_shared *shared)
{
    struct wc_memory *memory = &shared->memory;

    if (memory->nbytes < WC_HUGE_PAGE)
        return 0;
    if (madvise(memory->start, memory->mapped, MADV_HUGEPAGE)) {
        memory->huge_refused_errno = errno;
        return 0;
    }
    int rc = wc_memory_populate(memory, 0, 1);
    if (rc == 0 && is_backed(shared, WC_HUGE_PAGE))
        shared->pages = WC_SHARED_HUGE;
    return rc;
}

/* From now on nobody can write but through this mapping. */
static int seal(const struct wc_shared *shared)
{
    return fcntl(shared->fd, F_ADD_SEALS, SEALS) ? -errno : 0;
}

int wc_shared_create(struct wc_shared *shared, size_t nbytes, const char *name, int numa_node)
{
    if (nbytes > SIZE_MAX / 2)
        return -ENOMEM;
    *shared = (struct wc_shared){.pages = WC_SHARED_HUGETLB, .writable = true};
    int rc = create_hugetlb(shared, nbytes, name);
    if (rc == 0) {
        wc_memory_prefer(&shared->memory, numa_node);
        rc = back(shared, 0, 1); /* a hugetlb cgroup or a cpuset may have less than was set aside */
        if (rc == 0)
            rc = seal(shared);
        if (rc == 0)
            return 0;
        wc_shared_close(shared);
        *shared = (struct wc_shared){.writable = true};
    }
    shared->hugetlb_refused_errno = -rc;
    shared->pages = WC_SHARED_SMALL;
    rc = create_shmem(shared, nbytes, name);
    if (rc)
        return rc;
    wc_memory_prefer(&shared->memory, numa_node);
    rc = try_huge(shared);
    if (rc == 0)
        rc = seal(shared);
    if (rc)
        wc_shared_close(shared);
    return rc;
}

int wc_shared_populate(const struct wc_shared *shared, size_t start, size_t stop)
{
    const size_t page = wc_page_nbytes();

    if (!shared->writable)
        return 0; /* all of it is there */
    if (shared->pages == WC_SHARED_SMALL) {
        /* Refuses by an errno, also where the kernel cannot populate and pages are touched. */
        size_t first = start & ~(page - 1);
        int rc = back(shared, first, wc_round_up(stop, page) - first);
        if (rc)
            return rc;
    }
    return wc_memory_populate(&shared->memory, start, stop);
}

int wc_shared_freeze(struct wc_shared *shared)
{
    int rc = is_backed(shared, shared->memory.mapped) ? 0 : back(shared, 0, shared->memory.mapped);
    if (rc)
        return rc;
    if (mprotect(shared->memory.start, shared->memory.mapped, PROT_READ))
        return -errno;
    shared->writable = false;
    return 0;
}

int wc_shared_attach(struct wc_shared *shared, int fd, size_t nbytes, bool is_partial)
{
    const int private = MAP_PRIVATE | MAP_NORESERVE;
    struct stat stat;
    struct statfs system;

    *shared = (struct wc_shared){.fd = fd, .writable = true};
    int seals = fcntl(fd, F_GET_SEALS);
    if (seals < 0 || fstat(fd, &stat) || fstatfs(fd, &system))
        return -errno;
    if ((seals & SEALS) != SEALS)
        return -EPERM;
    const size_t whole = (size_t)stat.st_size;
    if (!is_partial && !is_backed(shared, whole))
        return -EINVAL;
    if (nbytes == SIZE_MAX)
        nbytes = whole;
    else if (nbytes > whole)
        return -EFBIG;
    shared->fd = fcntl(fd, F_DUPFD_CLOEXEC, 0);
    if (shared->fd < 0)
        return -errno;

    int rc;
    if ((unsigned long)system.f_type == HUGETLBFS) {
        shared->pages = WC_SHARED_HUGETLB;
        rc = map_hugetlb(shared, whole, PROT_READ | PROT_WRITE, MAP_PRIVATE);
        if (rc) {
            shared->writable = false;
            rc = map_hugetlb(shared, whole, PROT_READ, private);
        }
    } else {
        rc = wc_memory_reserve(&shared->memory, whole);
        if (rc == 0) {
            rc = map_over(shared, PROT_READ | PROT_WRITE, private);
            if (rc)
                wc_memory_unmap(&shared->memory);
        }
    }
    if (rc)
        close(shared->fd);
    else
        shared->memory.nbytes = nbytes;
    return rc;
}

int wc_shared_huge_nbytes(const struct wc_shared *shared, size_t *huge)
{
    if (shared->pages != WC_SHARED_HUGETLB)
        return wc_memory_huge_nbytes(&shared->memory, huge);
    *huge = shared->memory.mapped;
    return 0;
}

void wc_shared_close(struct wc_shared *shared)
{
    wc_memory_unmap(&shared->memory);
    close(shared->fd);
}
