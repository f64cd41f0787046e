/* weightcache._engine: the one binding. Turns Python arguments into the kernels' and -errno into OSError. */
#define _GNU_SOURCE
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <structmember.h>

#include <errno.h>
#include <stdbool.h>
#include <unistd.h>

#include "memory.h"
#include "reader.h"

/* Some 10 ms of populating: how long a signal, and mmap(2) in other threads, may have to wait. */
#define POPULATE_STEP ((Py_ssize_t)64 << 20)

static PyObject *os_error(int rc)
{
    errno = -rc;
    return PyErr_SetFromErrno(PyExc_OSError);
}

/*
 * Whether to look at signals between steps. Python runs handlers in the main thread alone; any other would
 * only wait for the GIL: 2.3 instead of 5.4 GB/s, from page cache beside a thread that computes in Python.
 */
static bool handles_signals(void)
{
    return gettid() == getpid();
}

typedef struct {
    PyObject_HEAD
    struct wc_memory memory;
} Memory;

static PyObject *memory_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"nbytes", NULL};
    Py_ssize_t nbytes;
    struct wc_memory memory;

    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "n:Memory", names, &nbytes))
        return NULL;
    if (nbytes < 0)
        return PyErr_Format(PyExc_ValueError, "nbytes must not be negative, got %zd", nbytes);
    int rc = wc_memory_map(&memory, (size_t)nbytes);
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
    wc_memory_unmap(&self->memory);
    Py_END_ALLOW_THREADS
    PyObject_Free(self);
    Py_DECREF(type);
}

static int memory_getbuffer(Memory *self, Py_buffer *view, int flags)
{
    const struct wc_memory *memory = &self->memory;

    return PyBuffer_FillInfo(view, (PyObject *)self, memory->start, (Py_ssize_t)memory->nbytes, 0, flags);
}

static PyObject *memory_populate(Memory *self, PyObject *args)
{
    Py_ssize_t start, stop, nbytes = (Py_ssize_t)self->memory.nbytes;

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
            rc = wc_memory_populate(&self->memory, (size_t)start, (size_t)next);
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
    {0},
};

static PyType_Slot memory_slots[] = {
    {Py_tp_doc, "Memory(nbytes)\n--\n\nZeroed, private, anonymous memory in huge pages where granted."},
    {Py_tp_new, memory_new},
    {Py_tp_dealloc, memory_dealloc},
    {Py_bf_getbuffer, memory_getbuffer},
    {Py_tp_methods, memory_methods},
    {Py_tp_members, memory_members},
    {0},
};

static PyType_Spec memory_spec = {
    .name = "weightcache._engine.Memory",
    .basicsize = sizeof(Memory),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = memory_slots,
};

static PyObject *read_into(PyObject *Py_UNUSED(module), PyObject *args)
{
    int fd;
    long long offset;
    Py_buffer target;
    PyObject *done = NULL;

    if (!PyArg_ParseTuple(args, "iLw*:read_into", &fd, &offset, &target))
        return NULL;
    if (offset < 0) {
        PyErr_Format(PyExc_ValueError, "offset must not be negative, got %lld", offset);
        goto release;
    }
    struct wc_read read;
    int rc = wc_read_begin(&read, fd, offset, target.buf, (size_t)target.len);
    const bool look = handles_signals();
    while (rc == 0 && !read.ended) {
        Py_BEGIN_ALLOW_THREADS
        do
            rc = wc_read_some(&read);
        while (rc == 0 && !read.ended && !look);
        Py_END_ALLOW_THREADS
        if (rc == 0 && PyErr_CheckSignals())
            goto end;
    }
    done = rc ? os_error(rc) : PyLong_FromSize_t(read.done);
end:
    wc_read_end(&read);
release:
    PyBuffer_Release(&target);
    return done;
}

static PyObject *resident_nbytes(PyObject *Py_UNUSED(module), PyObject *args)
{
    int fd, rc;
    long long offset;
    Py_ssize_t nbytes;
    size_t resident;

    if (!PyArg_ParseTuple(args, "iLn:resident_nbytes", &fd, &offset, &nbytes))
        return NULL;
    if (offset < 0 || nbytes < 0)
        return PyErr_Format(PyExc_ValueError, "neither offset nor nbytes may be negative, got %lld and %zd",
                            offset, nbytes);
    Py_BEGIN_ALLOW_THREADS
    rc = wc_resident_nbytes(fd, offset, (size_t)nbytes, &resident);
    Py_END_ALLOW_THREADS
    return rc ? os_error(rc) : PyLong_FromSize_t(resident);
}

static PyMethodDef engine_methods[] = {
    {"read_into", read_into, METH_VARARGS,
     "read_into(fd, offset, target, /)\n--\n\nFill target from the file's offset; return the bytes read."},
    {"resident_nbytes", resident_nbytes, METH_VARARGS,
     "resident_nbytes(fd, offset, nbytes, /)\n--\n\nReturn how many of these bytes are in the page cache."},
    {0},
};

static int engine_exec(PyObject *module)
{
    PyObject *type = PyType_FromModuleAndSpec(module, &memory_spec, NULL);
    if (!type)
        return -1;
    int rc = PyModule_AddType(module, (PyTypeObject *)type);
    Py_DECREF(type);
    return rc ? rc : PyModule_AddIntConstant(module, "ALIGNMENT", (long)WC_ALIGNMENT);
}

static PyModuleDef_Slot engine_slots[] = {
    {Py_mod_exec, engine_exec},
    {0},
};

static PyModuleDef engine = {
    PyModuleDef_HEAD_INIT,
    .m_name = "weightcache._engine",
    .m_doc = "Memory for weights and reads into it, with the GIL released.",
    .m_methods = engine_methods,
    .m_slots = engine_slots,
};

PyMODINIT_FUNC PyInit__engine(void)
{
    return PyModuleDef_Init(&engine);
}
