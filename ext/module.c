/* weightcache._engine: the module, and its functions that take no object of ours. */
#define _GNU_SOURCE
#include "module.h"

#include <errno.h>
#include <pthread.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "checksum.h"
#include "reader.h"
#include "run.h"
#include "shared.h"

/* Some 7 ms of summing from memory: how long a signal may have to wait. */
#define CHECKSUM_STEP ((Py_ssize_t)64 << 20)

PyObject *os_error(int rc)
{
    errno = -rc;
    return PyErr_SetFromErrno(PyExc_OSError);
}

bool handles_signals(void)
{
    return syscall(SYS_gettid) == getpid();
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

static PyObject *checksum(PyObject *Py_UNUSED(module), PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"", "step", "plain", NULL};
    Py_buffer content;
    Py_ssize_t step = CHECKSUM_STEP;
    int plain = 0;
    PyObject *value = NULL;

    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "y*|$np:checksum", names, &content, &step, &plain))
        return NULL;
    if (step <= 0 || step % (Py_ssize_t)WC_CHECKSUM_BLOCK) {
        PyErr_Format(PyExc_ValueError, "step must be a positive multiple of %zu, got %zd", WC_CHECKSUM_BLOCK, step);
        goto release;
    }
    struct wc_checksum sum;
    if (plain)
        wc_checksum_begin_plain(&sum, (size_t)content.len);
    else
        wc_checksum_begin(&sum, (size_t)content.len);
    const char *next = content.buf;
    Py_ssize_t left = content.len;
    const bool look = handles_signals();
    while (left) {
        Py_BEGIN_ALLOW_THREADS
        do {
            Py_ssize_t nbytes = Py_MIN(step, left);
            wc_checksum_add(&sum, next, (size_t)nbytes);
            next += nbytes;
            left -= nbytes;
        } while (left && !look);
        Py_END_ALLOW_THREADS
        if (PyErr_CheckSignals())
            goto release;
    }
    value = PyLong_FromUnsignedLongLong(wc_checksum_end(&sum));
release:
    PyBuffer_Release(&content);
    return value;
}

static PyMethodDef engine_methods[] = {
    {"pool_limit", pool_limit, METH_VARARGS,
     "pool_limit(nbytes, /)\n--\n\nKeep at most so many bytes of freed memory for reuse."},
    {"pool_nbytes", pool_nbytes, METH_NOARGS,
     "pool_nbytes()\n--\n\nReturn how many bytes of freed memory are kept for reuse."},
    {"checksum", (PyCFunction)(void (*)(void))checksum, METH_VARARGS | METH_KEYWORDS,
     "checksum(content, /, *, step=67108864, plain=False)\n--\n\nReturn XXH3-64 of content."},
    {"run", (PyCFunction)(void (*)(void))run, METH_VARARGS | METH_KEYWORDS,
     "run(ops, spans, names, folder, device, after, threads, cpus, counters, stop, on_done)\n--\n\n"
     "Carry operations out; return the index of the first that failed, or None."},
    {"resident_nbytes", resident_nbytes, METH_VARARGS,
     "resident_nbytes(fd, offset, nbytes, /)\n--\n\nReturn how many of these bytes are in the page cache."},
    {0},
};

static int add_type(PyObject *module, PyType_Spec *spec)
{
    PyObject *type = PyType_FromModuleAndSpec(module, spec, NULL);
    if (!type)
        return -1;
    int rc = PyModule_AddType(module, (PyTypeObject *)type);
    Py_DECREF(type);
    return rc;
}

static int add_constants(PyObject *module)
{
    static const struct {
        const char *name;
        long value;
    } constants[] = {
        {"ALIGNMENT", (long)WC_ALIGNMENT}, {"OP_NBYTES", sizeof(struct wc_op)}, {"SPAN_NBYTES", sizeof(struct wc_span)},
        {"FROM_MEMORY", WC_FROM_MEMORY},   {"TO_DEVICE", WC_TO_DEVICE},         {"CHECK", WC_CHECK},
        {"PADDED", WC_PADDED},             {"POPULATE", WC_POPULATE},           {"PAST_CACHE", WC_PAST_CACHE},
        {"PAGES_SMALL", WC_SHARED_SMALL},  {"PAGES_HUGE", WC_SHARED_HUGE},      {"PAGES_HUGETLB", WC_SHARED_HUGETLB},
        {"DONE", WC_DONE},                 {"N_COUNTERS", WC_N_COUNTERS},       {"MAX_SLOTS", WC_MAX_SLOTS},
    };

    for (size_t i = 0; i < sizeof constants / sizeof *constants; i++)
        if (PyModule_AddIntConstant(module, constants[i].name, constants[i].value))
            return -1;
    return 0;
}

static pthread_once_t forks_seen = PTHREAD_ONCE_INIT;

static void see_forks(void)
{
    pthread_atfork(NULL, NULL, forget_pool);
}

static int engine_exec(PyObject *module)
{
    State *state = PyModule_GetState(module);

    pthread_once(&forks_seen, see_forks);
    state->driver_error = PyErr_NewExceptionWithDoc(
        "weightcache._engine.DriverError", "The driver's error: its code, 0 for none of its own, and its name or a reason.",
        PyExc_RuntimeError, NULL);
    if (!state->driver_error || PyModule_AddObjectRef(module, "DriverError", state->driver_error))
        return -1;
    PyType_Spec *specs[] = {&memory_spec, &shared_spec, &sealed_spec, &driver_spec, &device_spec};
    for (size_t i = 0; i < Py_ARRAY_LENGTH(specs); i++)
        if (add_type(module, specs[i]))
            return -1;
    state->driver_type = PyObject_GetAttrString(module, "Driver");
    state->device_type = PyObject_GetAttrString(module, "Device");
    if (!state->driver_type || !state->device_type)
        return -1;
    return add_constants(module);
}

static int engine_traverse(PyObject *module, visitproc visit, void *arg)
{
    State *state = PyModule_GetState(module);

    if (state) {
        Py_VISIT(state->driver_error);
        Py_VISIT(state->driver_type);
        Py_VISIT(state->device_type);
    }
    return 0;
}

static int engine_clear(PyObject *module)
{
    State *state = PyModule_GetState(module);

    if (state) {
        Py_CLEAR(state->driver_error);
        Py_CLEAR(state->driver_type);
        Py_CLEAR(state->device_type);
    }
    return 0;
}

static PyModuleDef_Slot engine_slots[] = {
    {Py_mod_exec, engine_exec},
    {0},
};

static PyModuleDef engine = {
    PyModuleDef_HEAD_INIT,
    .m_name = "weightcache._engine",
    .m_doc = "Memory for weights, and operations that bring bytes into it and on to a device, with the GIL released.",
    .m_size = sizeof(State),
    .m_methods = engine_methods,
    .m_slots = engine_slots,
    .m_traverse = engine_traverse,
    .m_clear = engine_clear,
};

PyMODINIT_FUNC PyInit__engine(void)
{
    return PyModuleDef_Init(&engine);
}
