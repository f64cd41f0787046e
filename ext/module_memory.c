/* Binds memory: private and kept for reuse, or shared with other processes. */
#define _GNU_SOURCE
#include "module.h"

#include <errno.h>

#include "memory.h"
#include "pool.h"
#include "shared.h"

/* Some 10 ms of populating: how long a signal, and mmap(2) in other threads, may have to wait. */
#define POPULATE_STEP ((Py_ssize_t)64 << 20)

typedef struct {
    PyObject_HEAD
    struct wc_memory memory;
} Memory;

/* Where the mappings of dead Memory objects go; one a process. */
static struct wc_pool pool = WC_POOL_EMPTY;

void forget_pool(void)
{
    wc_pool_forget(&pool);
}

static PyObject *memory_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"nbytes", "numa_node", "fresh", NULL};
    Py_ssize_t nbytes;
    int numa_node = -1, fresh = 0, rc = 0;
    struct wc_memory memory;

    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "n|i$p:Memory", names, &nbytes, &numa_node, &fresh))
        return NULL;
    if (nbytes < 0)
        return PyErr_Format(PyExc_ValueError, "nbytes must not be negative, got %zd", nbytes);
    if (numa_node < -1)
        return PyErr_Format(PyExc_ValueError, "numa_node must not be less than -1, got %d", numa_node);
    Py_BEGIN_ALLOW_THREADS
    if (fresh || !wc_pool_take(&pool, &memory, (size_t)nbytes, numa_node)) {
        rc = wc_memory_map(&memory, (size_t)nbytes);
        if (rc == 0)
            wc_memory_prefer(&memory, numa_node);
    }
    Py_END_ALLOW_THREADS
    if (rc)
        return os_error(rc);
    Memory *self = PyObject_New(Memory, type);
    if (self)
        self->memory = memory;
    else
        wc_memory_unmap(&memory);
    return (PyObject *)self;
}

static void memory_dealloc(Memory *self)
{
    PyTypeObject *type = Py_TYPE((PyObject *)self);

    Py_BEGIN_ALLOW_THREADS
    wc_pool_give(&pool, &self->memory);
    Py_END_ALLOW_THREADS
    PyObject_Free(self);
    Py_DECREF(type);
}

static int memory_getbuffer(Memory *self, Py_buffer *view, int flags)
{
    const struct wc_memory *memory = &self->memory;

    return PyBuffer_FillInfo(view, (PyObject *)self, memory->start, (Py_ssize_t)memory->nbytes, 0, flags);
}

/* Back [start, stop) of args by the kernel's steps; memory is what back takes, nbytes its size. */
static PyObject *populate(PyObject *args, int (*back)(const void *, size_t, size_t), const void *memory,
                          size_t size)
{
    Py_ssize_t start, stop, nbytes = (Py_ssize_t)size;

    if (!PyArg_ParseTuple(args, "nn:populate", &start, &stop))
        return NULL;
    if (start < 0 || start > stop || stop > nbytes)
        return PyErr_Format(PyExc_ValueError, "[%zd, %zd) does not lie within [0, %zd)", start, stop, nbytes);
    const bool look = handles_signals();
    while (start < stop) {
        int rc;
        Py_BEGIN_ALLOW_THREADS
        do {
            Py_ssize_t next = Py_MIN(stop, (start / POPULATE_STEP + 1) * POPULATE_STEP);
            rc = back(memory, (size_t)start, (size_t)next);
            start = next;
        } while (rc == 0 && start < stop && !look);
        Py_END_ALLOW_THREADS
        if (rc)
            return os_error(rc);
        if (PyErr_CheckSignals())
            return NULL;
    }
    Py_RETURN_NONE;
}

static int back_memory(const void *memory, size_t start, size_t stop)
{
    return wc_memory_populate(memory, start, stop);
}

static PyObject *memory_populate(Memory *self, PyObject *args)
{
    return populate(args, back_memory, &self->memory, self->memory.nbytes);
}

static PyObject *memory_huge_nbytes(Memory *self, PyObject *Py_UNUSED(ignored))
{
    size_t huge;
    int rc;

    Py_BEGIN_ALLOW_THREADS
    rc = wc_memory_huge_nbytes(&self->memory, &huge);
    Py_END_ALLOW_THREADS
    return PyLong_FromSize_t(rc ? 0 : huge);
}

static PyMethodDef memory_methods[] = {
    {"populate", (PyCFunction)memory_populate, METH_VARARGS,
     "populate(start, stop, /)\n--\n\nBack each page of [start, stop) with real memory; content stays."},
    {"huge_nbytes", (PyCFunction)memory_huge_nbytes, METH_NOARGS,
     "huge_nbytes()\n--\n\nReturn how many bytes lie in transparent huge pages now."},
    {0},
};

static PyMemberDef memory_members[] = {
    {"nbytes", T_PYSSIZET, offsetof(Memory, memory.nbytes), READONLY, "Size as asked for."},
    {"address", T_ULONG, offsetof(Memory, memory.start), READONLY, "Of the first byte."},
    {"huge_refused_errno", T_INT, offsetof(Memory, memory.huge_refused_errno), READONLY,
     "Why MADV_HUGEPAGE was refused, 0 where it was granted."},
    {"numa_refused_errno", T_INT, offsetof(Memory, memory.numa_refused_errno), READONLY,
     "Why the node was refused, 0 where it was granted or none was asked for."},
    {0},
};

static PyType_Slot memory_slots[] = {
    {Py_tp_doc, "Memory(nbytes, numa_node=-1, *, fresh=False)\n--\n\n"
                "Private anonymous memory in huge pages where granted, zero-filled unless reused."},
    {Py_tp_new, memory_new},
    {Py_tp_dealloc, memory_dealloc},
    {Py_bf_getbuffer, memory_getbuffer},
    {Py_tp_methods, memory_methods},
    {Py_tp_members, memory_members},
    {0},
};

PyType_Spec memory_spec = {
    .name = "weightcache._engine.Memory",
    .basicsize = sizeof(Memory),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = memory_slots,
};

typedef struct {
    PyObject_HEAD
    struct wc_shared shared;
} Shared;

static PyObject *shared_made(PyTypeObject *type, struct wc_shared *shared)
{
    Shared *self = PyObject_New(Shared, type);
    if (self) {
        self->shared = *shared;
    } else {
        wc_shared_close(shared);
    }
    return (PyObject *)self;
}

static PyObject *shared_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"nbytes", "name", "numa_node", NULL};
    Py_ssize_t nbytes;
    const char *name = "weightcache";
    int numa_node = -1, rc;
    struct wc_shared shared;

    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "n|si:SharedMemory", names, &nbytes, &name, &numa_node))
        return NULL;
    if (nbytes < 0)
        return PyErr_Format(PyExc_ValueError, "nbytes must not be negative, got %zd", nbytes);
    if (numa_node < -1)
        return PyErr_Format(PyExc_ValueError, "numa_node must not be less than -1, got %d", numa_node);
    Py_BEGIN_ALLOW_THREADS
    rc = wc_shared_create(&shared, (size_t)nbytes, name, numa_node);
    Py_END_ALLOW_THREADS
    return rc ? os_error(rc) : shared_made(type, &shared);
}

static PyObject *sealed_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"fd", "nbytes", "partial", NULL};
    Py_ssize_t nbytes = -1;
    int fd, partial = 0, rc;
    struct wc_shared shared;

    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "i|n$p:SealedMemory", names, &fd, &nbytes, &partial))
        return NULL;
    if (nbytes < -1)
        return PyErr_Format(PyExc_ValueError, "nbytes must not be less than -1, got %zd", nbytes);
    Py_BEGIN_ALLOW_THREADS
    rc = wc_shared_attach(&shared, fd, nbytes < 0 ? SIZE_MAX : (size_t)nbytes, partial);
    Py_END_ALLOW_THREADS
    switch (rc) {
    case 0:
        return shared_made(type, &shared);
    case -EINVAL:
        return PyErr_Format(PyExc_ValueError, "descriptor %d is no memfd, or one with holes", fd);
    case -EPERM:
        return PyErr_Format(PyExc_ValueError, "descriptor %d is not sealed against writing and resizing", fd);
    case -EFBIG:
        return PyErr_Format(PyExc_ValueError, "descriptor %d holds less than %zd bytes", fd, nbytes);
    default:
        return os_error(rc);
    }
}

static void shared_dealloc(Shared *self)
{
    PyTypeObject *type = Py_TYPE((PyObject *)self);

    Py_BEGIN_ALLOW_THREADS
    wc_shared_close(&self->shared);
    Py_END_ALLOW_THREADS
    PyObject_Free(self);
    Py_DECREF(type);
}

static int shared_getbuffer(Shared *self, Py_buffer *view, int flags)
{
    const struct wc_shared *shared = &self->shared;

    return PyBuffer_FillInfo(view, (PyObject *)self, shared->memory.start, (Py_ssize_t)shared->memory.nbytes,
                             !shared->writable, flags);
}

static int back_shared(const void *shared, size_t start, size_t stop)
{
    return wc_shared_populate(shared, start, stop);
}

static PyObject *shared_populate(Shared *self, PyObject *args)
{
    return populate(args, back_shared, &self->shared, self->shared.memory.nbytes);
}

static PyObject *shared_freeze(Shared *self, PyObject *Py_UNUSED(ignored))
{
    int rc;

    Py_BEGIN_ALLOW_THREADS
    rc = wc_shared_freeze(&self->shared);
    Py_END_ALLOW_THREADS
    if (rc)
        return os_error(rc);
    Py_RETURN_NONE;
}

static PyObject *shared_huge_nbytes(Shared *self, PyObject *Py_UNUSED(ignored))
{
    size_t huge;
    int rc;

    Py_BEGIN_ALLOW_THREADS
    rc = wc_shared_huge_nbytes(&self->shared, &huge);
    Py_END_ALLOW_THREADS
    return PyLong_FromSize_t(rc ? 0 : huge);
}

#define HUGE_NBYTES                                                                                             \
    {                                                                                                           \
        "huge_nbytes", (PyCFunction)shared_huge_nbytes, METH_NOARGS,                                            \
            "huge_nbytes()\n--\n\nReturn how many bytes this process has mapped in huge pages now."             \
    }

static PyMethodDef shared_methods[] = {
    {"populate", (PyCFunction)shared_populate, METH_VARARGS,
     "populate(start, stop, /)\n--\n\nBack each page of [start, stop) with real memory; content stays."},
    {"freeze", (PyCFunction)shared_freeze, METH_NOARGS,
     "freeze()\n--\n\nBack all of it, and let this process read it only. Nobody else could ever write."},
    HUGE_NBYTES,
    {0},
};

static PyMethodDef sealed_methods[] = {
    HUGE_NBYTES,
    {0},
};

#define MEMFD_MEMBERS                                                                                           \
    {"nbytes", T_PYSSIZET, offsetof(Shared, shared.memory.nbytes), READONLY, "Size of the buffer."},            \
        {"address", T_ULONG, offsetof(Shared, shared.memory.start), READONLY, "Of the first byte."},            \
        {"fd", T_INT, offsetof(Shared, shared.fd), READONLY, "The memfd; it is closed with this object."}

static PyMemberDef shared_members[] = {
    MEMFD_MEMBERS,
    {"pages", T_INT, offsetof(Shared, shared.pages), READONLY, "PAGES_SMALL, PAGES_HUGE or PAGES_HUGETLB."},
    {"hugetlb_refused_errno", T_INT, offsetof(Shared, shared.hugetlb_refused_errno), READONLY,
     "Why no reserved huge pages were had, 0 where they were."},
    {"huge_refused_errno", T_INT, offsetof(Shared, shared.memory.huge_refused_errno), READONLY,
     "Why MADV_HUGEPAGE was refused, 0 where it was granted or not asked for."},
    {"numa_refused_errno", T_INT, offsetof(Shared, shared.memory.numa_refused_errno), READONLY,
     "Why the node was refused, 0 where it was granted or none was asked for."},
    {0},
};

static PyMemberDef sealed_members[] = {
    MEMFD_MEMBERS,
    {"is_private", T_BOOL, offsetof(Shared, shared.writable), READONLY,
     "Whether the buffer is writable, a page being copied when it is written."},
    {0},
};

static PyType_Slot shared_slots[] = {
    {Py_tp_doc, "SharedMemory(nbytes, name='weightcache', numa_node=-1)\n--\n\n"
                "Zeroed memory that other processes can map to be read."},
    {Py_tp_new, shared_new},
    {Py_tp_dealloc, shared_dealloc},
    {Py_bf_getbuffer, shared_getbuffer},
    {Py_tp_methods, shared_methods},
    {Py_tp_members, shared_members},
    {0},
};

static PyType_Slot sealed_slots[] = {
    {Py_tp_doc, "SealedMemory(fd, nbytes=-1, *, partial=False)\n--\n\nMemory that another process fills, or has filled."},
    {Py_tp_new, sealed_new},
    {Py_tp_dealloc, shared_dealloc},
    {Py_bf_getbuffer, shared_getbuffer},
    {Py_tp_methods, sealed_methods},
    {Py_tp_members, sealed_members},
    {0},
};

PyType_Spec shared_spec = {
    .name = "weightcache._engine.SharedMemory",
    .basicsize = sizeof(Shared),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = shared_slots,
};

PyType_Spec sealed_spec = {
    .name = "weightcache._engine.SealedMemory",
    .basicsize = sizeof(Shared),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = sealed_slots,
};

PyObject *pool_limit(PyObject *Py_UNUSED(module), PyObject *args)
{
    Py_ssize_t nbytes;

    if (!PyArg_ParseTuple(args, "n:pool_limit", &nbytes))
        return NULL;
    if (nbytes < 0)
        return PyErr_Format(PyExc_ValueError, "nbytes must not be negative, got %zd", nbytes);
    Py_BEGIN_ALLOW_THREADS
    wc_pool_set_limit(&pool, (size_t)nbytes);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

PyObject *pool_nbytes(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(ignored))
{
    return PyLong_FromSize_t(wc_pool_nbytes(&pool));
}
