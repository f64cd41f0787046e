/* What the files of the binding share. Only they know Python: kernels take pointers and sizes. */
#ifndef WEIGHTCACHE_MODULE_H
#define WEIGHTCACHE_MODULE_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <structmember.h>

#include <stdbool.h>

#include "cuda.h"
#include "stream.h"

typedef struct {
    PyObject *driver_error;
    PyObject *driver_type, *device_type;
} State;

typedef struct {
    PyObject_HEAD
    struct wc_cuda cuda;
    PyObject *error;
} Driver;

typedef struct {
    PyObject_HEAD
    Driver *driver;
    struct wc_device *device; /* NULL when closed */
    unsigned n_users;         /* runs and calls under way; under the GIL */
} Device;

/* Raise OSError for -errno. Returns NULL. */
PyObject *os_error(int rc);

/* Raise DriverError for a driver's error, else OSError. Returns NULL. */
PyObject *driver_error(PyObject *error, const struct wc_cuda *cuda, int rc);

/*
 * Whether to look at signals between steps. Python runs handlers in the main thread alone; any other would
 * only wait for the GIL: 2.3 instead of 5.4 GB/s, from page cache beside a thread that computes in Python.
 */
bool handles_signals(void);

/* Whether an object is of this type of ours, whatever it says of itself. Raises TypeError where it is not. */
bool is_ours(PyObject *object, PyObject *type, const char *name);

/* Count one more user of a device, and return it; NULL with ValueError where it is closed. */
struct wc_device *use(Device *self);

/* module_memory.c */
extern PyType_Spec memory_spec, shared_spec, sealed_spec;
PyObject *pool_limit(PyObject *module, PyObject *args);
PyObject *pool_nbytes(PyObject *module, PyObject *ignored);
void forget_pool(void);

/* module_device.c */
extern PyType_Spec driver_spec, device_spec;

/* module_run.c */
PyObject *run(PyObject *module, PyObject *args, PyObject *kwargs);

#endif
