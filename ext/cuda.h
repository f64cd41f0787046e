/*
 * The NVIDIA driver, opened at run time: no toolkit, no header of it, no link against it.
 *
 * Never allocates device memory: that is torch's. Functions return 0, -errno, or a driver's error as
 * wc_cuda_error(result); the table is filled once and then only read, by any number of threads.
 */
#ifndef WEIGHTCACHE_CUDA_H
#define WEIGHTCACHE_CUDA_H

#include <stdbool.h>
#include <stddef.h>

typedef int wc_cu_result;               /* CUresult */
typedef int wc_cu_device;               /* CUdevice */
typedef struct wc_cu_opaque *wc_cu_context; /* CUcontext */
typedef struct wc_cu_opaque *wc_cu_stream;  /* CUstream; NULL is the current context's legacy default stream */
typedef struct wc_cu_opaque *wc_cu_event;   /* CUevent */
typedef unsigned long long wc_cu_pointer;   /* CUdeviceptr */

/* Constants of the driver's API: their values are part of its ABI. */
enum {
    WC_CU_SUCCESS = 0,
    WC_CU_NOT_READY = 600,
    WC_CU_STREAM_NON_BLOCKING = 1,
    WC_CU_EVENT_BLOCKING_SYNC = 1, /* who waits sleeps instead of spinning */
    WC_CU_EVENT_DISABLE_TIMING = 2,
    WC_CU_HOST_PORTABLE = 1,
    WC_CU_CAPTURE_MODE_RELAXED = 2,
};

/* Every symbol used, with the version that newer headers would choose: name in the table, symbol, parameters. */
#define WC_CUDA_SYMBOLS(X) \
    X(init, "cuInit", (unsigned flags)) \
    X(driver_version, "cuDriverGetVersion", (int *version)) \
    X(device_count, "cuDeviceGetCount", (int *count)) \
    X(device_get, "cuDeviceGet", (wc_cu_device *device, int ordinal)) \
    X(device_name, "cuDeviceGetName", (char *name, int room, wc_cu_device device)) \
    X(device_memory, "cuDeviceTotalMem_v2", (size_t *nbytes, wc_cu_device device)) \
    X(device_bus_id, "cuDeviceGetPCIBusId", (char *id, int room, wc_cu_device device)) \
    X(context_retain, "cuDevicePrimaryCtxRetain", (wc_cu_context *context, wc_cu_device device)) \
    X(context_release, "cuDevicePrimaryCtxRelease_v2", (wc_cu_device device)) \
    X(context_set, "cuCtxSetCurrent", (wc_cu_context context)) \
    X(context_get, "cuCtxGetCurrent", (wc_cu_context *context)) \
    X(stream_create, "cuStreamCreate", (wc_cu_stream *stream, unsigned flags)) \
    X(stream_destroy, "cuStreamDestroy_v2", (wc_cu_stream stream)) \
    X(stream_synchronize, "cuStreamSynchronize", (wc_cu_stream stream)) \
    X(stream_wait, "cuStreamWaitEvent", (wc_cu_stream stream, wc_cu_event event, unsigned flags)) \
    X(stream_is_capturing, "cuStreamIsCapturing", (wc_cu_stream stream, int *status)) \
    X(event_create, "cuEventCreate", (wc_cu_event *event, unsigned flags)) \
    X(event_destroy, "cuEventDestroy_v2", (wc_cu_event event)) \
    X(event_record, "cuEventRecord", (wc_cu_event event, wc_cu_stream stream)) \
    X(event_query, "cuEventQuery", (wc_cu_event event)) \
    X(event_synchronize, "cuEventSynchronize", (wc_cu_event event)) \
    X(host_register, "cuMemHostRegister_v2", (void *start, size_t nbytes, unsigned flags)) \
    X(host_unregister, "cuMemHostUnregister", (void *start)) \
    X(host_alloc, "cuMemHostAlloc", (void **start, size_t nbytes, unsigned flags)) \
    X(host_free, "cuMemFreeHost", (void *start)) \
    X(copy, "cuMemcpyHtoDAsync_v2", (wc_cu_pointer to, const void *from, size_t nbytes, wc_cu_stream stream)) \
    X(capture_mode, "cuThreadExchangeStreamCaptureMode", (int *mode)) \
    X(error_name, "cuGetErrorName", (wc_cu_result result, const char **name))

struct wc_cuda {
    void *library;
    bool is_stand_in; /* device memory is host memory that the library was told of: adopt and forget are there */
    int (*adopt)(void *start, size_t nbytes, int device);
    int (*forget)(void *start);
#define X(name, symbol, parameters) wc_cu_result(*name) parameters;
    WC_CUDA_SYMBOLS(X)
#undef X
};

/* Turn a driver's result into this engine's: 0, or a number below every -errno. */
static inline int wc_cuda_error(wc_cu_result result)
{
    return result ? -(1000000 + result) : 0;
}

/* Return the driver's result that wc_cuda_error made, or 0 for any other error. */
static inline wc_cu_result wc_cuda_result(int rc)
{
    return rc <= -1000000 ? -rc - 1000000 : 0;
}

/*
 * Open the driver and initialise it. On failure nothing stays open and `reason` says in words what is missing.
 *
 * -ENOENT: no such library. -ENOSYS: it lacks a symbol. A driver's error: it refuses to start.
 */
int wc_cuda_open(struct wc_cuda *cuda, const char *path, char *reason, size_t room);

/* Close what wc_cuda_open opened; nothing of it may be in use. */
void wc_cuda_close(struct wc_cuda *cuda);

/* A thread's context while it works for us: set by enter, put back as it was by leave, on the same thread. */
struct wc_cuda_entered {
    wc_cu_context before;
    int capture_mode;
};

/*
 * Make `context` current on this thread, and keep its calls from disturbing a graph capture on another.
 * On failure the thread is as it was and leave must not be called.
 */
int wc_cuda_enter(const struct wc_cuda *cuda, wc_cu_context context, struct wc_cuda_entered *entered);
void wc_cuda_leave(const struct wc_cuda *cuda, const struct wc_cuda_entered *entered);

#endif
