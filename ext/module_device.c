/* Binds the driver and its devices. */
#define _GNU_SOURCE
#include "module.h"

#include <errno.h>
#include <stdlib.h>

PyObject *driver_error(PyObject *error, const struct wc_cuda *cuda, int rc)
{
    const char *name = NULL;

    if (!wc_cuda_result(rc))
        return os_error(rc);
    cuda->error_name(wc_cuda_result(rc), &name);
    PyObject *arguments = Py_BuildValue("is", wc_cuda_result(rc), name ? name : "an error of no name");
    if (arguments)
        PyErr_SetObject(error, arguments);
    Py_XDECREF(arguments);
    return NULL;
}

static PyObject *error_type(PyTypeObject *type)
{
    State *state = PyType_GetModuleState(type);
    return state ? Py_NewRef(state->driver_error) : NULL;
}

static PyObject *driver_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"path", NULL};
    const char *path = "libcuda.so.1";
    char reason[512];
    struct wc_cuda cuda;
    int rc;

    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|s:Driver", names, &path))
        return NULL;
    PyObject *error = error_type(type);
    if (!error)
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    rc = wc_cuda_open(&cuda, path, reason, sizeof reason);
    Py_END_ALLOW_THREADS
    if (rc) {
        PyObject *arguments = Py_BuildValue("is", wc_cuda_result(rc), reason);
        if (arguments)
            PyErr_SetObject(error, arguments);
        Py_XDECREF(arguments);
        Py_DECREF(error);
        return NULL;
    }
    Driver *self = PyObject_New(Driver, type);
    if (!self) {
        wc_cuda_close(&cuda);
        Py_DECREF(error);
        return NULL;
    }
    self->cuda = cuda;
    self->error = error;
    return (PyObject *)self;
}

static void driver_dealloc(Driver *self)
{
    PyTypeObject *type = Py_TYPE((PyObject *)self);

    wc_cuda_close(&self->cuda);
    Py_DECREF(self->error);
    PyObject_Free(self);
    Py_DECREF(type);
}

static PyObject *driver_count(Driver *self, PyObject *Py_UNUSED(ignored))
{
    int count;
    int rc = wc_cuda_error(self->cuda.device_count(&count));

    return rc ? driver_error(self->error, &self->cuda, rc) : PyLong_FromLong(count);
}

static PyObject *driver_version(Driver *self, PyObject *Py_UNUSED(ignored))
{
    int version;
    int rc = wc_cuda_error(self->cuda.driver_version(&version));

    return rc ? driver_error(self->error, &self->cuda, rc) : PyLong_FromLong(version);
}

static PyObject *driver_describe(Driver *self, PyObject *args)
{
    int ordinal;
    wc_cu_device device;
    char name[128] = "", bus_id[32] = "";
    size_t nbytes = 0;

    if (!PyArg_ParseTuple(args, "i:describe", &ordinal))
        return NULL;
    int rc = wc_cuda_error(self->cuda.device_get(&device, ordinal));
    if (rc == 0)
        rc = wc_cuda_error(self->cuda.device_name(name, sizeof name, device));
    if (rc == 0)
        rc = wc_cuda_error(self->cuda.device_memory(&nbytes, device));
    if (rc == 0)
        rc = wc_cuda_error(self->cuda.device_bus_id(bus_id, sizeof bus_id, device));
    if (rc)
        return driver_error(self->error, &self->cuda, rc);
    return Py_BuildValue("ssn", name, bus_id, (Py_ssize_t)nbytes);
}

static PyObject *driver_error_name(Driver *self, PyObject *args)
{
    int code;
    const char *name = NULL;

    if (!PyArg_ParseTuple(args, "i:error_name", &code))
        return NULL;
    self->cuda.error_name(code, &name);
    return PyUnicode_FromString(name ? name : "an error of no name");
}

static PyObject *adopt(Driver *self, PyObject *args, bool adopting)
{
    unsigned long long address;
    Py_ssize_t nbytes;
    int ordinal;

    if (!PyArg_ParseTuple(args, "Kni", &address, &nbytes, &ordinal))
        return NULL;
    if (!self->cuda.is_stand_in)
        return PyErr_Format(PyExc_ValueError, "device memory is torch's: this is no stand-in");
    void *start = (void *)(uintptr_t)address;
    int rc = adopting ? self->cuda.adopt(start, (size_t)nbytes, ordinal) : self->cuda.forget(start); /* 0 or -errno */
    if (rc)
        return os_error(rc);
    Py_RETURN_NONE;
}

static PyObject *driver_adopt(Driver *self, PyObject *args)
{
    return adopt(self, args, true);
}

static PyObject *driver_forget(Driver *self, PyObject *args)
{
    return adopt(self, args, false);
}

static PyMethodDef driver_methods[] = {
    {"count", (PyCFunction)driver_count, METH_NOARGS, "count()\n--\n\nReturn how many devices it shows."},
    {"version", (PyCFunction)driver_version, METH_NOARGS,
     "version()\n--\n\nReturn the CUDA version it knows, 1000 * major + 10 * minor."},
    {"describe", (PyCFunction)driver_describe, METH_VARARGS,
     "describe(ordinal, /)\n--\n\nReturn a device's name, PCI bus id and bytes of memory."},
    {"error_name", (PyCFunction)driver_error_name, METH_VARARGS,
     "error_name(code, /)\n--\n\nReturn the driver's name of an error."},
    {"adopt", (PyCFunction)driver_adopt, METH_VARARGS,
     "adopt(address, nbytes, ordinal, /)\n--\n\nLet host memory pose as a device's; for a stand-in alone."},
    {"forget", (PyCFunction)driver_forget, METH_VARARGS,
     "forget(address, nbytes, ordinal, /)\n--\n\nUndo adopt."},
    {0},
};

static PyMemberDef driver_members[] = {
    {"is_stand_in", T_BOOL, offsetof(Driver, cuda.is_stand_in), READONLY, "Whether its devices are host memory."},
    {0},
};

static PyType_Slot driver_slots[] = {
    {Py_tp_doc, "Driver(path='libcuda.so.1')\n--\n\nThe NVIDIA driver, opened at run time."},
    {Py_tp_new, driver_new},
    {Py_tp_dealloc, driver_dealloc},
    {Py_tp_methods, driver_methods},
    {Py_tp_members, driver_members},
    {0},
};

PyType_Spec driver_spec = {
    .name = "weightcache._engine.Driver",
    .basicsize = sizeof(Driver),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = driver_slots,
};

bool is_ours(PyObject *object, PyObject *type, const char *name)
{
    if (PyObject_TypeCheck(object, (PyTypeObject *)type))
        return true;
    PyErr_Format(PyExc_TypeError, "expected a %s", name);
    return false;
}

static PyObject *device_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"driver", "ordinal", "slot_nbytes", "n_slots", "numa_node", NULL};
    PyObject *given;
    int ordinal, numa_node = -1, rc;
    Py_ssize_t slot_nbytes;
    unsigned n_slots;

    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OinI|i:Device", names, &given, &ordinal, &slot_nbytes, &n_slots,
                                     &numa_node))
        return NULL;
    State *state = PyType_GetModuleState(type);
    if (!state)
        return NULL;
    if (!is_ours(given, state->driver_type, "Driver"))
        return NULL;
    if (slot_nbytes < 0)
        return PyErr_Format(PyExc_ValueError, "slot_nbytes must not be negative, got %zd", slot_nbytes);
    Driver *driver = (Driver *)given;
    struct wc_device *device = malloc(sizeof *device);
    if (!device)
        return PyErr_NoMemory();
    Py_BEGIN_ALLOW_THREADS
    rc = wc_device_open(device, &driver->cuda, ordinal, (size_t)slot_nbytes, n_slots, numa_node);
    Py_END_ALLOW_THREADS
    Device *self = rc ? NULL : PyObject_New(Device, type);
    if (!self) {
        if (rc)
            driver_error(driver->error, &driver->cuda, rc);
        else
            wc_device_close(device);
        free(device);
        return NULL;
    }
    self->driver = (Driver *)Py_NewRef(given);
    self->device = device;
    self->n_users = 0;
    return (PyObject *)self;
}

struct wc_device *use(Device *self)
{
    if (!self->device) {
        PyErr_SetString(PyExc_ValueError, "the device is closed");
        return NULL;
    }
    self->n_users++;
    return self->device;
}

static PyObject *device_close(Device *self, PyObject *Py_UNUSED(ignored))
{
    struct wc_device *device = self->device;

    if (self->n_users)
        return PyErr_Format(PyExc_BufferError, "the device is in use");
    self->device = NULL;
    if (device) {
        Py_BEGIN_ALLOW_THREADS
        wc_device_close(device);
        Py_END_ALLOW_THREADS
        free(device);
    }
    Py_RETURN_NONE;
}

static void device_dealloc(Device *self)
{
    PyTypeObject *type = Py_TYPE((PyObject *)self);
    PyObject *closed = device_close(self, NULL);

    Py_XDECREF(closed);
    Py_DECREF(self->driver);
    PyObject_Free(self);
    Py_DECREF(type);
}

static PyObject *device_register(Device *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"address", "nbytes", "frozen", NULL};
    unsigned long long address;
    Py_ssize_t nbytes;
    int frozen = 0, rc;

    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "Kn|p:register", names, &address, &nbytes, &frozen))
        return NULL;
    struct wc_device *device = use(self);
    if (!device)
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    rc = wc_device_register(device, (void *)(uintptr_t)address, (size_t)nbytes, frozen);
    Py_END_ALLOW_THREADS
    self->n_users--;
    if (rc)
        return driver_error(self->driver->error, &self->driver->cuda, rc);
    Py_RETURN_NONE;
}

static PyObject *device_unregister(Device *self, PyObject *args)
{
    unsigned long long address;
    int rc;

    if (!PyArg_ParseTuple(args, "K:unregister", &address))
        return NULL;
    struct wc_device *device = use(self);
    if (!device)
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    rc = wc_device_unregister(device, (void *)(uintptr_t)address);
    Py_END_ALLOW_THREADS
    self->n_users--;
    if (rc)
        return driver_error(self->driver->error, &self->driver->cuda, rc);
    Py_RETURN_NONE;
}

static PyObject *device_ring(Device *self, PyObject *Py_UNUSED(ignored))
{
    static const char *const words[] = {"registered", "allocated", "pageable"};

    if (!self->device)
        return PyErr_Format(PyExc_ValueError, "the device is closed");
    const struct wc_ring *ring = &self->device->ring;
    return Py_BuildValue("sinI", words[ring->locking], wc_cuda_result(ring->refused), (Py_ssize_t)ring->slot_nbytes,
                         ring->n_slots);
}

static PyMethodDef device_methods[] = {
    {"register", (PyCFunction)(void (*)(void))device_register, METH_VARARGS | METH_KEYWORDS,
     "register(address, nbytes, frozen=False)\n--\n\nLet the device read this host memory by itself."},
    {"unregister", (PyCFunction)device_unregister, METH_VARARGS, "unregister(address, /)\n--\n\nUndo register."},
    {"ring", (PyCFunction)device_ring, METH_NOARGS,
     "ring()\n--\n\nReturn how the ring is page-locked, the error that kept it from the best way, bytes a slot, slots."},
    {"close", (PyCFunction)device_close, METH_NOARGS, "close()\n--\n\nFree the ring and what was registered."},
    {0},
};

static PyType_Slot device_slots[] = {
    {Py_tp_doc, "Device(driver, ordinal, slot_nbytes, n_slots, numa_node=-1)\n--\n\n"
                "A device with its copy stream and its ring of page-locked slots."},
    {Py_tp_new, device_new},
    {Py_tp_dealloc, device_dealloc},
    {Py_tp_methods, device_methods},
    {0},
};

PyType_Spec device_spec = {
    .name = "weightcache._engine.Device",
    .basicsize = sizeof(Device),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = device_slots,
};
