/* Binds the run: operations carried out, while signals are looked at and what is done is told. */
#define _GNU_SOURCE
#include "module.h"

#include <errno.h>
#include <stdlib.h>

#include "run.h"

#define TICK_MS 50u /* how long a signal may have to wait */

/* Tell a callback which operations were done since it was last told. Returns false when it raised. */
static bool tell(PyObject *on_done, const struct wc_run *run, size_t from, size_t to)
{
    PyObject *indexes = PyList_New((Py_ssize_t)(to - from));

    if (!indexes)
        return false;
    for (size_t i = from; i < to; i++) {
        PyObject *index = PyLong_FromUnsignedLong(run->done[i]);
        if (!index || PyList_SetItem(indexes, (Py_ssize_t)(i - from), index)) {
            Py_DECREF(indexes);
            return false;
        }
    }
    PyObject *result = PyObject_CallFunctionObjArgs(on_done, indexes, NULL);
    Py_DECREF(indexes);
    Py_XDECREF(result);
    return result != NULL;
}

/* Attend to a run until it has ended: look at signals, tell of what is done. Returns false when something raised. */
static bool attend(struct wc_run *run, PyObject *on_done)
{
    const bool look = handles_signals();
    bool has_ended = false, sound = true;
    size_t n_seen = 0, n_done = 0;

    while (!has_ended) {
        Py_BEGIN_ALLOW_THREADS
        do
            wc_run_wait(run, on_done && sound ? n_seen : run->n_ops, TICK_MS, &n_done, &has_ended);
        while (!has_ended && !(look && sound) && !(on_done && sound && n_done > n_seen));
        Py_END_ALLOW_THREADS
        if (sound && look && PyErr_CheckSignals())
            sound = false;
        if (sound && on_done && n_done > n_seen)
            sound = tell(on_done, run, n_seen, n_done);
        n_seen = n_done;
        if (!sound)
            atomic_store(&run->ending, 1);
    }
    return sound;
}

static bool is_sized(const Py_buffer *buffer, size_t nbytes, const char *name)
{
    if (buffer->buf && ((size_t)buffer->len != nbytes || (uintptr_t)buffer->buf % 8)) {
        PyErr_Format(PyExc_ValueError, "%s: expected %zu bytes, aligned to 8, got %zd", name, nbytes, buffer->len);
        return false;
    }
    return true;
}

PyObject *run(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *keys[] = {"ops",  "spans", "names",    "folder", "device",  "after",
                           "threads", "cpus",  "counters", "stop",   "on_done", NULL};
    Py_buffer ops = {0}, spans = {0}, names = {0}, cpus = {0}, counters = {0}, stop = {0};
    PyObject *device = Py_None, *on_done = Py_None, *result = NULL;
    int folder = -1, threads = 4;
    unsigned long long after = 0;
    _Atomic uint64_t own_counters[WC_N_COUNTERS] = {0};
    cpu_set_t set;

    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "w*|y*y*iOKiy*w*w*O:run", keys, &ops, &spans, &names, &folder,
                                     &device, &after, &threads, &cpus, &counters, &stop, &on_done))
        return NULL;
    if (ops.len % sizeof(struct wc_op) || spans.len % sizeof(struct wc_span)) {
        PyErr_Format(PyExc_ValueError, "expected operations of %zu bytes and spans of %zu", sizeof(struct wc_op),
                     sizeof(struct wc_span));
        goto release;
    }
    if (!is_sized(&ops, (size_t)ops.len, "ops") || !is_sized(&spans, (size_t)spans.len, "spans") ||
        !is_sized(&counters, sizeof own_counters, "counters") || !is_sized(&stop, 8, "stop"))
        goto release;
    if (names.len && ((const char *)names.buf)[names.len - 1]) {
        PyErr_SetString(PyExc_ValueError, "names: expected the last to end in NUL too");
        goto release;
    }
    if (threads < 1 || ops.len / (Py_ssize_t)sizeof(struct wc_op) > UINT32_MAX) {
        PyErr_SetString(PyExc_ValueError, "expected at least one thread and fewer than 2**32 operations");
        goto release;
    }
    CPU_ZERO(&set);
    for (Py_ssize_t i = 0; i < cpus.len && i < CPU_SETSIZE; i++)
        if (((const char *)cpus.buf)[i])
            CPU_SET((int)i, &set);

    struct wc_run run = {
        .ops = ops.buf,
        .n_ops = (size_t)ops.len / sizeof(struct wc_op),
        .spans = spans.buf,
        .n_spans = (size_t)spans.len / sizeof(struct wc_span),
        .names = names.len ? names.buf : NULL,
        .names_nbytes = (size_t)names.len,
        .folder_fd = folder,
        .after = (wc_cu_stream)(uintptr_t)after,
        .n_threads = (unsigned)threads,
        .cpus = CPU_COUNT(&set) ? &set : NULL,
        .counters = counters.buf ? counters.buf : own_counters,
        .stop = stop.buf,
    };
    State *state = PyModule_GetState(module);
    if (device != Py_None && !is_ours(device, state->device_type, "Device"))
        goto release;
    Device *owner = device == Py_None ? NULL : (Device *)device;
    if (owner && !(run.device = use(owner)))
        goto release;
    int rc;
    Py_BEGIN_ALLOW_THREADS
    rc = wc_run_begin(&run);
    Py_END_ALLOW_THREADS
    bool sound = rc == 0 && attend(&run, on_done == Py_None ? NULL : on_done);
    if (rc == 0) {
        Py_BEGIN_ALLOW_THREADS
        wc_run_end(&run);
        free(run.done);
        Py_END_ALLOW_THREADS
    } else if (rc == -EINVAL && run.first_failed < run.n_ops) {
        PyErr_Format(PyExc_ValueError, "operation %zu makes no sense", run.first_failed);
    } else if (owner) {
        driver_error(owner->driver->error, &owner->driver->cuda, rc);
    } else {
        os_error(rc);
    }
    if (owner)
        owner->n_users--;
    if (sound)
        result = run.first_failed == run.n_ops ? Py_NewRef(Py_None) : PyLong_FromSize_t(run.first_failed);
release:
    for (Py_buffer *each[] = {&ops, &spans, &names, &cpus, &counters, &stop, NULL}, **at = each; *at; at++)
        if ((*at)->obj)
            PyBuffer_Release(*at);
    return result;
}
