#define _GNU_SOURCE
#include "standin_cuda.h"
#include "standin_machine.h"

#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))

typedef int CUresult;
typedef int CUdevice;
typedef unsigned long long CUdeviceptr;
typedef struct CUctx_st *CUcontext;
typedef struct CUstream_st *CUstream;
typedef struct CUevent_st *CUevent;

enum {
    CUDA_SUCCESS = 0,
    CUDA_ERROR_INVALID_VALUE = 1,
    CUDA_ERROR_OUT_OF_MEMORY = 2,
    CUDA_ERROR_NOT_INITIALIZED = 3,
    CUDA_ERROR_NO_DEVICE = 100,
    CUDA_ERROR_INVALID_DEVICE = 101,
    CUDA_ERROR_INVALID_CONTEXT = 201,
    CUDA_ERROR_INVALID_HANDLE = 400,
    CUDA_ERROR_NOT_FOUND = 500,
    CUDA_ERROR_NOT_READY = 600,
    CUDA_ERROR_ILLEGAL_ADDRESS = 700,
    CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED = 712,
    CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED = 713,
    CUDA_ERROR_LAUNCH_FAILED = 719,
    CUDA_ERROR_NOT_SUPPORTED = 801,
    CUDA_ERROR_UNKNOWN = 999,
};

static const struct {
    CUresult code;
    const char *name, *meaning;
} ERRORS[] = {
    {CUDA_SUCCESS, "CUDA_SUCCESS", "no error"},
    {CUDA_ERROR_INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {CUDA_ERROR_OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {CUDA_ERROR_NOT_INITIALIZED, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
    {CUDA_ERROR_NO_DEVICE, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"},
    {CUDA_ERROR_INVALID_DEVICE, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {CUDA_ERROR_INVALID_CONTEXT, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {CUDA_ERROR_INVALID_HANDLE, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
    {CUDA_ERROR_NOT_FOUND, "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
    {CUDA_ERROR_NOT_READY, "CUDA_ERROR_NOT_READY", "device not ready"},
    {CUDA_ERROR_ILLEGAL_ADDRESS, "CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"},
    {CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED, "CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED",
     "part or all of the requested memory range is already mapped"},
    {CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED, "CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED",
     "pointer does not correspond to a registered memory region"},
    {CUDA_ERROR_LAUNCH_FAILED, "CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"},
    {CUDA_ERROR_NOT_SUPPORTED, "CUDA_ERROR_NOT_SUPPORTED", "operation not supported"},
    {CUDA_ERROR_UNKNOWN, "CUDA_ERROR_UNKNOWN", "unknown error"},
};

static const char *const FUNCTIONS[] = {
    "cuInit", "cuDriverGetVersion", "cuDeviceGetCount", "cuDeviceGet", "cuDeviceGetName", "cuDeviceTotalMem_v2",
    "cuDeviceGetPCIBusId", "cuDeviceGetAttribute", "cuDevicePrimaryCtxRetain", "cuDevicePrimaryCtxRelease_v2",
    "cuCtxSetCurrent", "cuCtxGetCurrent", "cuStreamCreate", "cuStreamDestroy_v2", "cuStreamSynchronize",
    "cuStreamWaitEvent", "cuEventCreate", "cuEventDestroy_v2", "cuEventRecord", "cuEventQuery",
    "cuEventSynchronize", "cuMemHostRegister_v2", "cuMemHostUnregister", "cuMemHostAlloc", "cuMemFreeHost",
    "cuMemAlloc_v2", "cuMemFree_v2", "cuMemcpyHtoDAsync_v2", "cuMemcpyDtoHAsync_v2", "cuMemcpyDtoH_v2",
    "cuMemsetD8Async", "cuThreadExchangeStreamCaptureMode", "cuStreamIsCapturing",
};

#define VERSION 12040
#define REGISTER_LIMIT ((size_t)512 << 30) /* the driver's own allocation for one call fails from here on */
#define REGISTER_READ_ONLY 0x8u
#define FAILURES_MAX 32
#define LOG_MAX 100000
#define COUNT(array) (sizeof(array) / sizeof *(array))

struct failure {
    const char *function;
    uint64_t nth, seen;
    CUresult code;
};

struct settings {
    enum mode mode;
    uint64_t seed;
    int devices;
    uint64_t memory, register_cap;
    uint64_t delay_us;
    int64_t not_ready; /* -1: not said */
    bool sticky, report, capturing;
    struct failure failures[FAILURES_MAX];
    size_t n_failures;
};

static const struct settings DEFAULTS = {
    .seed = 1,
    .devices = 1,
    .memory = 80000000000,
    .register_cap = UINT64_MAX,
    .delay_us = 100,
    .not_ready = -1,
};

/* What an argument is called in the log. */
struct arguments {
    const void *stream, *event, *to, *from;
    uint64_t nbytes;
    int64_t value;
};

struct entry {
    uint64_t number;
    const char *function;
    int thread;
    struct arguments arguments;
    CUresult result;
    bool returned;
};

struct event {
    struct event *next;
    uint64_t handle;
    int device;
    bool recorded;
    struct mark mark;
    int64_t refusals; /* that cuEventQuery still answers for this record */
};

/* All of it under the machine's lock. */
static struct {
    struct settings settings;
    pid_t initialised_in; /* 0: not yet */
    uint64_t epoch;       /* counts resets: handles and current contexts of others are void */
    uint64_t handles;
    uint64_t retained[DEVICES_MAX];
    uint64_t stream_handles[STREAMS_MAX]; /* 0: not open */
    int stream_devices[STREAMS_MAX];
    struct event *events;
    CUresult sticky;
    uint64_t registered_peak, calls, failures;
    struct entry *log; /* a ring of LOG_MAX */
} driver;

static _Thread_local uint64_t current_context;
static pthread_once_t once = PTHREAD_ONCE_INIT;

/* Settings */

static bool parse_number(const char *text, uint64_t max, uint64_t *number)
{
    char *end;

    errno = 0;
    *number = strtoull(text, &end, 10);
    return *text >= '0' && *text <= '9' && !*end && !errno && *number <= max;
}

static bool parse_mode(const char *text, enum mode *mode)
{
    static const char *const names[] = {[LATE] = "late", [EARLY] = "early", [RANDOM] = "random", [THREADS] = "threads"};

    for (size_t i = 0; i < COUNT(names); i++)
        if (!strcmp(text, names[i])) {
            *mode = (enum mode)i;
            return true;
        }
    return false;
}

/* name:nth:code, or none */
static bool parse_failure(char *text, struct settings *settings)
{
    if (!strcmp(text, "none")) {
        settings->n_failures = 0;
        return true;
    }
    char *nth = strchr(text, ':'), *code = nth ? strchr(nth + 1, ':') : NULL;
    struct failure failure = {0};
    uint64_t number;

    if (!code || settings->n_failures == FAILURES_MAX)
        return false;
    *nth++ = *code++ = 0;
    for (size_t i = 0; i < COUNT(FUNCTIONS); i++)
        if (!strcmp(text, FUNCTIONS[i]))
            failure.function = FUNCTIONS[i];
    if (!failure.function || !parse_number(nth, UINT64_MAX, &failure.nth) || !failure.nth)
        return false;
    if (!parse_number(code, 9999, &number) || !number)
        return false;
    failure.code = (CUresult)number;
    settings->failures[settings->n_failures++] = failure;
    return true;
}

static bool parse_setting(const char *key, char *value, struct settings *settings)
{
    uint64_t number;

    if (!strcmp(key, "mode"))
        return parse_mode(value, &settings->mode);
    if (!strcmp(key, "fail"))
        return parse_failure(value, settings);
    if (!strcmp(key, "exit"))
        return settings->report = !strcmp(value, "report");
    if (!parse_number(value, INT64_MAX, &number))
        return false;
    if (!strcmp(key, "seed"))
        settings->seed = number;
    else if (!strcmp(key, "devices") && number <= DEVICES_MAX)
        settings->devices = (int)number;
    else if (!strcmp(key, "memory"))
        settings->memory = number;
    else if (!strcmp(key, "register_cap"))
        settings->register_cap = number;
    else if (!strcmp(key, "delay_us") && number <= 1000000)
        settings->delay_us = number;
    else if (!strcmp(key, "not_ready"))
        settings->not_ready = (int64_t)number;
    else if (!strcmp(key, "sticky") && number <= 1)
        settings->sticky = number;
    else if (!strcmp(key, "capturing") && number <= 1)
        settings->capturing = number;
    else
        return false;
    return true;
}

static int configure(const char *text)
{
    struct settings settings = driver.settings;
    char *copy = strdup(text), *left = copy, *item;
    int rc = copy ? 0 : -ENOMEM;

    while (!rc && (item = strsep(&left, ",")) != NULL) {
        char *value = strchr(item, '=');
        if (!*item)
            continue;
        if (value)
            *value++ = 0;
        if (!value || !parse_setting(item, value, &settings))
            rc = -EINVAL;
    }
    if (!rc && !machine_set(settings.mode, (unsigned)settings.delay_us))
        rc = -EBUSY;
    if (!rc) {
        if (settings.seed != driver.settings.seed)
            machine_seed(settings.seed);
        driver.settings = settings;
    }
    free(copy);
    return rc;
}

/* The lock is held, or nobody else is here yet. */
static void reset(void)
{
    static char *environment; /* as it was at first use */
    static bool read;

    machine_reset();
    for (struct event *event = driver.events; event;) {
        struct event *next = event->next;
        free(event);
        event = next;
    }
    free(driver.log);
    uint64_t epoch = driver.epoch + 1, handles = driver.handles;
    memset(&driver, 0, sizeof driver);
    driver.epoch = epoch;
    driver.handles = handles;
    driver.settings = DEFAULTS;

    if (!read) {
        const char *now = getenv("WEIGHTCACHE_STANDIN");
        environment = now ? strdup(now) : NULL;
        read = true;
    }
    if (environment && configure(environment)) {
        fprintf(stderr, "standin: WEIGHTCACHE_STANDIN=%s: not settings of tests/native/standin_cuda.h\n", environment);
        abort();
    }
}

static void after_fork_in_child(void)
{
    machine_after_fork_in_child();
    machine_unlock();
}

static void begin(void)
{
    machine_lock();
    reset();
    machine_unlock();
    pthread_atfork(machine_lock, machine_unlock, after_fork_in_child);
}

static void lock_driver(void)
{
    pthread_once(&once, begin);
    machine_lock();
}

/* A call: what every driver function begins and ends with */

enum need { NOTHING, INITIALISED, CONTEXT };

struct call {
    const char *function;
    uint64_t number;
    int device;  /* the current context's, or -1 */
    bool halted; /* a sticky error came before, or with it: nothing is queued any more */
};

static uint64_t context_handle(int device)
{
    return 0xC000000000u | driver.epoch << 8 | (unsigned)device;
}

static int context_device(uint64_t handle)
{
    int device = (int)(handle & 0xff);

    if (device >= driver.settings.devices || handle != context_handle(device) || !driver.retained[device])
        return -1;
    return device;
}

static CUresult injected(const char *function)
{
    CUresult code = CUDA_SUCCESS;

    for (size_t i = 0; i < driver.settings.n_failures; i++) {
        struct failure *failure = &driver.settings.failures[i];
        if (!strcmp(failure->function, function) && ++failure->seen == failure->nth)
            code = failure->code;
    }
    driver.failures += code != CUDA_SUCCESS;
    return code;
}

/* Take the lock, note the call, and say whether it may go on. */
static CUresult enter(struct call *call, const char *function, enum need need, struct arguments arguments)
{
    lock_driver();
    *call = (struct call){.function = function, .number = driver.calls++, .device = context_device(current_context)};
    if (!driver.log)
        driver.log = calloc(LOG_MAX, sizeof *driver.log);
    if (driver.log)
        driver.log[call->number % LOG_MAX] = (struct entry){
            .number = call->number, .function = function, .thread = thread_id(), .arguments = arguments};

    if (driver.initialised_in && driver.initialised_in != getpid()) {
        violation("after-fork", "%s: in process %d, cuInit was in %d", function, (int)getpid(),
                  (int)driver.initialised_in);
        return CUDA_ERROR_NOT_INITIALIZED;
    }
    CUresult rc = injected(function);
    if (!driver.sticky && rc && driver.settings.sticky) {
        machine_halt();
        driver.sticky = rc;
    }
    call->halted = driver.sticky;
    if (driver.sticky || rc)
        return driver.sticky ? driver.sticky : rc;
    if (need != NOTHING && !driver.initialised_in)
        return CUDA_ERROR_NOT_INITIALIZED;
    if (need == CONTEXT && call->device < 0) {
        violation("no-context", "%s: no context is current", function);
        return CUDA_ERROR_INVALID_CONTEXT;
    }
    machine_step();
    return CUDA_SUCCESS;
}

static CUresult leave(const struct call *call, CUresult rc)
{
    struct entry *entry = driver.log ? &driver.log[call->number % LOG_MAX] : NULL;

    if (driver.sticky && !rc)
        rc = driver.sticky; /* another thread's, while this call waited */
    if (entry && entry->number == call->number) {
        entry->result = rc;
        entry->returned = true;
    }
    machine_unlock();
    return rc;
}

/* Whether a call that gives something back does so: also on a dead device, though it will answer the error. */
static bool gives_back(const struct call *call, CUresult rc)
{
    return !rc || call->halted;
}

static CUresult find_stream(const struct call *call, CUstream stream, int *slot)
{
    uint64_t handle = (uintptr_t)stream;

    if (handle <= 1) { /* NULL, CU_STREAM_LEGACY */
        *slot = call->device;
        return *slot < 0 ? CUDA_ERROR_INVALID_HANDLE : CUDA_SUCCESS;
    }
    for (int i = 0; i < STREAMS_MAX; i++) {
        if (driver.stream_handles[i] != handle)
            continue;
        *slot = i;
        if (call->halted || driver.stream_devices[i] == call->device)
            return CUDA_SUCCESS;
        violation("wrong-context", "%s: stream %p of device %d, current is %d", call->function, (void *)stream,
                  driver.stream_devices[i], call->device);
        return CUDA_ERROR_INVALID_HANDLE;
    }
    violation("dead-handle", "%s: stream %p", call->function, (void *)stream);
    return CUDA_ERROR_INVALID_HANDLE;
}

static CUresult find_event(const struct call *call, CUevent handle, struct event **event)
{
    for (*event = driver.events; *event; *event = (*event)->next) {
        if ((*event)->handle != (uintptr_t)handle)
            continue;
        if (call->halted || (*event)->device == call->device)
            return CUDA_SUCCESS;
        violation("wrong-context", "%s: event %p of device %d, current is %d", call->function, (void *)handle,
                  (*event)->device, call->device);
        return CUDA_ERROR_INVALID_HANDLE;
    }
    violation("dead-handle", "%s: event %p", call->function, (void *)handle);
    return CUDA_ERROR_INVALID_HANDLE;
}

/* Errors, the library, devices */

static CUresult describe_error(CUresult error, const char **text, bool name)
{
    if (!text)
        return CUDA_ERROR_INVALID_VALUE;
    *text = NULL;
    for (size_t i = 0; i < COUNT(ERRORS); i++)
        if (ERRORS[i].code == error)
            *text = name ? ERRORS[i].name : ERRORS[i].meaning;
    return *text ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

EXPORT CUresult cuGetErrorName(CUresult error, const char **text)
{
    return describe_error(error, text, true);
}

EXPORT CUresult cuGetErrorString(CUresult error, const char **text)
{
    return describe_error(error, text, false);
}

EXPORT CUresult cuInit(unsigned flags)
{
    struct call call;
    CUresult rc = enter(&call, __func__, NOTHING, (struct arguments){.value = flags});

    if (!rc && flags)
        rc = CUDA_ERROR_INVALID_VALUE;
    if (!rc && !driver.settings.devices)
        rc = CUDA_ERROR_NO_DEVICE;
    if (!rc)
        driver.initialised_in = getpid();
    return leave(&call, rc);
}

EXPORT CUresult cuDriverGetVersion(int *version)
{
    struct call call;
    CUresult rc = enter(&call, __func__, NOTHING, (struct arguments){0});

    if (!rc && !version)
        rc = CUDA_ERROR_INVALID_VALUE;
    if (!rc)
        *version = VERSION;
    return leave(&call, rc);
}

EXPORT CUresult cuDeviceGetCount(int *count)
{
    struct call call;
    CUresult rc = enter(&call, __func__, INITIALISED, (struct arguments){0});

    if (!rc && !count)
        rc = CUDA_ERROR_INVALID_VALUE;
    if (!rc)
        *count = driver.settings.devices;
    return leave(&call, rc);
}

static CUresult check_device(CUdevice device)
{
    return device >= 0 && device < driver.settings.devices ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}

EXPORT CUresult cuDeviceGet(CUdevice *device, int ordinal)
{
    struct call call;
    CUresult rc = enter(&call, __func__, INITIALISED, (struct arguments){.value = ordinal});

    if (!rc)
        rc = device ? check_device(ordinal) : CUDA_ERROR_INVALID_VALUE;
    if (!rc)
        *device = ordinal;
    return leave(&call, rc);
}

EXPORT CUresult cuDeviceGetName(char *name, int room, CUdevice device)
{
    struct call call;
    CUresult rc = enter(&call, __func__, INITIALISED, (struct arguments){.value = device});

    if (!rc)
        rc = name && room > 0 ? check_device(device) : CUDA_ERROR_INVALID_VALUE;
    if (!rc)
        snprintf(name, (size_t)room, "Stand-in %d", device);
    return leave(&call, rc);
}

EXPORT CUresult cuDeviceTotalMem_v2(size_t *nbytes, CUdevice device)
{
    struct call call;
    CUresult rc = enter(&call, __func__, INITIALISED, (struct arguments){.value = device});

    if (!rc)
        rc = nbytes ? check_device(device) : CUDA_ERROR_INVALID_VALUE;
    if (!rc)
        *nbytes = driver.settings.memory;
    return leave(&call, rc);
}

/* An address that no machine's sysfs has: domain ffff. */
EXPORT CUresult cuDeviceGetPCIBusId(char *text, int room, CUdevice device)
{
    struct call call;
    CUresult rc = enter(&call, __func__, INITIALISED, (struct arguments){.value = device});

    if (!rc)
        rc = text && room >= 13 ? check_device(device) : CUDA_ERROR_INVALID_VALUE;
    if (!rc)
        snprintf(text, (size_t)room, "FFFF:%02X:00.0", (unsigned)device & 0xff);
    return leave(&call, rc);
}

EXPORT CUresult cuDeviceGetAttribute(int *value, int attribute, CUdevice device)
{
    struct call call;
    CUresult rc = enter(&call, __func__, INITIALISED, (struct arguments){.value = attribute});

    if (!rc)
        rc = value && attribute > 0 && attribute < 256 ? check_device(device) : CUDA_ERROR_INVALID_VALUE;
    if (!rc) {
        switch (attribute) {
        case 16: /* MULTIPROCESSOR_COUNT */
            *value = 132;
            break;
        case 33: /* PCI_BUS_ID */
            *value = device;
            break;
        case 40: /* ASYNC_ENGINE_COUNT */
            *value = 3;
            break;
        case 50: /* PCI_DOMAIN_ID */
            *value = 0xffff;
            break;
        case 75: /* COMPUTE_CAPABILITY_MAJOR */
            *value = 9;
            break;
        case 19: /* CAN_MAP_HOST_MEMORY */
        case 41: /* UNIFIED_ADDRESSING */
        case 91: /* CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM */
        case 99: /* HOST_REGISTER_SUPPORTED */
            *value = 1;
            break;
        default: /* 113, READ_ONLY_HOST_REGISTER_SUPPORTED, among them */
            *value = 0;
        }
    }
    return leave(&call, rc);
}

/* Contexts */

EXPORT CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device)
{
    struct call call;
    CUresult rc = enter(&call, __func__, INITIALISED, (struct arguments){.value = device});

    if (!rc)
        rc = context ? check_device(device) : CUDA_ERROR_INVALID_VALUE;
    if (!rc) {
        driver.retained[device]++;
        *context = (CUcontext)(uintptr_t)context_handle(device);
    }
    return leave(&call, rc);
}

EXPORT CUresult cuDevicePrimaryCtxRelease_v2(CUdevice device)
{
    struct call call;
    CUresult rc = enter(&call, __func__, INITIALISED, (struct arguments){.value = device});

    if (gives_back(&call, rc)) {
        CUresult given = check_device(device);
        if (!given && !driver.retained[device])
            given = CUDA_ERROR_INVALID_CONTEXT;
        if (!given && !--driver.retained[device]) {
            for (int slot = 0; slot < STREAMS_MAX; slot++) {
                if (slot != device && !(driver.stream_handles[slot] && driver.stream_devices[slot] == device))
                    continue;
                struct mark mark = machine_mark(slot);
                if (machine_in_flight(&mark))
                    violation("destroyed-in-flight", "%s: the context of device %d, with work of stream %#llx",
                              __func__, device, (unsigned long long)driver.stream_handles[slot]);
            }
        }
        rc = rc ? rc : given;
    }
    return leave(&call, rc);
}

EXPORT CUresult cuCtxSetCurrent(CUcontext context)
{
    struct call call;
    CUresult rc = enter(&call, __func__, INITIALISED, (struct arguments){.from = context});

    if (!rc && context && context_device((uintptr_t)context) < 0) {
        violation("dead-handle", "%s: context %p", __func__, (void *)context);
        rc = CUDA_ERROR_INVALID_CONTEXT;
    }
    if (!rc)
        current_context = (uintptr_t)context;
    return leave(&call, rc);
}

EXPORT CUresult cuCtxGetCurrent(CUcontext *context)
{
    struct call call;
    CUresult rc = enter(&call, __func__, INITIALISED, (struct arguments){0});

    if (!rc && !context)
        rc = CUDA_ERROR_INVALID_VALUE;
    if (!rc)
        *context = call.device < 0 ? NULL : (CUcontext)(uintptr_t)current_context;
    return leave(&call, rc);
}

#ifndef WCS_WITHOUT_cuThreadExchangeStreamCaptureMode
EXPORT CUresult cuThreadExchangeStreamCaptureMode(int *mode)
{
    struct call call;
    CUresult rc = enter(&call, __func__, CONTEXT, (struct arguments){.value = mode ? *mode : -1});

    if (!rc && (!mode || *mode < 0 || *mode > 2))
        rc = CUDA_ERROR_INVALID_VALUE;
    if (!rc) {
        static _Thread_local int current;
        int before = current;
        current = *mode;
        *mode = before;
    }
    return leave(&call, rc);
}
#endif

/* Streams and events */

EXPORT CUresult cuStreamCreate(CUstream *stream, unsigned flags)
{
    struct call call;
    CUresult rc = enter(&call, __func__, CONTEXT, (struct arguments){.value = flags});

    if (!rc && (!stream || flags > 1))
        rc = CUDA_ERROR_INVALID_VALUE;
    if (!rc) {
        int slot = stream_open(call.device, !flags);
        if (slot < 0) {
            rc = CUDA_ERROR_OUT_OF_MEMORY;
        } else {
            driver.stream_handles[slot] = 0x5100000000u + ++driver.handles;
            driver.stream_devices[slot] = call.device;
            *stream = (CUstream)(uintptr_t)driver.stream_handles[slot];
        }
    }
    return leave(&call, rc);
}

EXPORT CUresult cuStreamDestroy_v2(CUstream stream)
{
    struct call call;
    CUresult rc = enter(&call, __func__, CONTEXT, (struct arguments){.stream = stream});

    if (gives_back(&call, rc)) {
        int slot;
        CUresult given = (uintptr_t)stream <= 1 ? CUDA_ERROR_INVALID_HANDLE : find_stream(&call, stream, &slot);
        if (!given) {
            struct mark mark = machine_mark(slot);
            if (machine_in_flight(&mark))
                violation("destroyed-in-flight", "%s: stream %p", __func__, (void *)stream);
            driver.stream_handles[slot] = 0;
            stream_close(slot);
        }
        rc = rc ? rc : given;
    }
    return leave(&call, rc);
}

EXPORT CUresult cuStreamSynchronize(CUstream stream)
{
    struct call call;
    CUresult rc = enter(&call, __func__, CONTEXT, (struct arguments){.stream = stream});
    int slot;

    if (!rc)
        rc = find_stream(&call, stream, &slot);
    if (!rc) {
        struct mark mark = machine_mark(slot);
        machine_synchronise(&mark);
    }
    return leave(&call, rc);
}

EXPORT CUresult cuStreamWaitEvent(CUstream stream, CUevent handle, unsigned flags)
{
    struct call call;
    CUresult rc =
        enter(&call, __func__, CONTEXT, (struct arguments){.stream = stream, .event = handle, .value = flags});
    struct event *event;
    int slot;

    if (!rc)
        rc = flags > 1 ? CUDA_ERROR_INVALID_VALUE : find_stream(&call, stream, &slot);
    if (!rc)
        rc = find_event(&call, handle, &event);
    if (!rc && !event->recorded)
        violation("never-recorded", "%s: stream %p waits for event %p", __func__, (void *)stream, (void *)handle);
    if (!rc && event->recorded)
        machine_order(slot, &event->mark);
    return leave(&call, rc);
}

EXPORT CUresult cuStreamIsCapturing(CUstream stream, int *status)
{
    struct call call;
    CUresult rc = enter(&call, __func__, CONTEXT, (struct arguments){.stream = stream});
    int slot;

    if (!rc)
        rc = status ? find_stream(&call, stream, &slot) : CUDA_ERROR_INVALID_VALUE;
    if (!rc)
        *status = driver.settings.capturing && !stream;
    return leave(&call, rc);
}

EXPORT CUresult cuEventCreate(CUevent *handle, unsigned flags)
{
    struct call call;
    CUresult rc = enter(&call, __func__, CONTEXT, (struct arguments){.value = flags});

    /* Blocking sync, no timing, interprocess; the last asks for no timing too. */
    if (!rc && (!handle || flags > 7 || (flags & 6) == 4))
        rc = CUDA_ERROR_INVALID_VALUE;
    if (!rc) {
        struct event *event = calloc(1, sizeof *event);
        if (!event) {
            rc = CUDA_ERROR_OUT_OF_MEMORY;
        } else {
            event->handle = 0xE700000000u + ++driver.handles;
            event->device = call.device;
            event->next = driver.events;
            driver.events = event;
            *handle = (CUevent)(uintptr_t)event->handle;
        }
    }
    return leave(&call, rc);
}

EXPORT CUresult cuEventDestroy_v2(CUevent handle)
{
    struct call call;
    CUresult rc = enter(&call, __func__, CONTEXT, (struct arguments){.event = handle});

    if (gives_back(&call, rc)) {
        struct event *event;
        CUresult given = find_event(&call, handle, &event);
        if (!given) {
            if (event->recorded && machine_in_flight(&event->mark))
                violation("destroyed-in-flight", "%s: event %p", __func__, (void *)handle);
            struct event **link = &driver.events;
            while (*link != event)
                link = &(*link)->next;
            *link = event->next;
            free(event);
        }
        rc = rc ? rc : given;
    }
    return leave(&call, rc);
}

EXPORT CUresult cuEventRecord(CUevent handle, CUstream stream)
{
    struct call call;
    CUresult rc = enter(&call, __func__, CONTEXT, (struct arguments){.stream = stream, .event = handle});
    struct event *event;
    int slot;

    if (!rc)
        rc = find_event(&call, handle, &event);
    if (!rc)
        rc = find_stream(&call, stream, &slot);
    if (!rc) {
        machine_order_with_default(slot);
        event->recorded = true;
        event->mark = machine_mark(slot);
        event->refusals = driver.settings.not_ready;
        if (event->refusals < 0)
            event->refusals =
                driver.settings.mode == LATE && !machine_has_run(&event->mark) ? (int64_t)(machine_random() % 4) : 0;
    }
    return leave(&call, rc);
}

EXPORT CUresult cuEventQuery(CUevent handle)
{
    struct call call;
    CUresult rc = enter(&call, __func__, CONTEXT, (struct arguments){.event = handle});
    struct event *event;

    if (!rc)
        rc = find_event(&call, handle, &event);
    if (!rc && event->recorded) {
        bool refused = event->refusals && (driver.settings.not_ready > 0 || !machine_has_run(&event->mark));
        if (refused) {
            event->refusals--;
            rc = CUDA_ERROR_NOT_READY;
        } else if (driver.settings.mode == LATE) {
            machine_synchronise(&event->mark);
        } else if (machine_has_run(&event->mark)) {
            machine_observe(&event->mark);
        } else {
            rc = CUDA_ERROR_NOT_READY;
        }
    }
    return leave(&call, rc);
}

EXPORT CUresult cuEventSynchronize(CUevent handle)
{
    struct call call;
    CUresult rc = enter(&call, __func__, CONTEXT, (struct arguments){.event = handle});
    struct event *event;

    if (!rc)
        rc = find_event(&call, handle, &event);
    if (!rc && event->recorded) {
        struct mark mark = event->mark; /* a record while this call waits does not prolong it */
        event->refusals = 0;
        machine_synchronise(&mark);
    }
    return leave(&call, rc);
}

/* Host memory */

#ifndef WCS_WITHOUT_cuMemHostRegister_v2
static bool is_mapped_read_write(struct span span)
{
    FILE *maps = fopen("/proc/self/maps", "re");
    const unsigned char *at = span.start, *end = span.start + span.nbytes;
    char line[4352], mode[5];
    unsigned long start, stop;

    if (!maps)
        return false;
    while (at < end && fgets(line, sizeof line, maps)) {
        if (sscanf(line, "%lx-%lx %4s", &start, &stop, mode) != 3 || (uintptr_t)at >= stop)
            continue;
        if ((uintptr_t)at < start || mode[0] != 'r' || mode[1] != 'w')
            break;
        at = (const unsigned char *)stop;
    }
    fclose(maps);
    return at >= end;
}

EXPORT CUresult cuMemHostRegister_v2(void *start, size_t nbytes, unsigned flags)
{
    struct call call;
    struct span span = {start, nbytes};
    CUresult rc =
        enter(&call, __func__, CONTEXT, (struct arguments){.from = start, .nbytes = nbytes, .value = flags});
    uint64_t registered;

    if (rc)
        return leave(&call, rc);
    range_count(REGISTERED, &registered);
    if (!start || !nbytes || (uintptr_t)start + nbytes < nbytes || flags > 0xf) {
        rc = CUDA_ERROR_INVALID_VALUE;
    } else if (flags & REGISTER_READ_ONLY) {
        rc = CUDA_ERROR_NOT_SUPPORTED;
    } else if (nbytes >= REGISTER_LIMIT) {
        rc = CUDA_ERROR_OUT_OF_MEMORY;
    } else if (range_overlapping(PINNED, span)) {
        violation("overlapping-registration", "%s: %p + %zu", __func__, start, nbytes);
        rc = CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED;
    } else if (!is_mapped_read_write(span)) {
        rc = CUDA_ERROR_INVALID_VALUE;
    } else if (nbytes > driver.settings.register_cap || registered > driver.settings.register_cap - nbytes ||
               !range_add(REGISTERED, span, -1)) {
        rc = CUDA_ERROR_OUT_OF_MEMORY;
    } else if (driver.registered_peak < registered + nbytes) {
        driver.registered_peak = registered + nbytes;
    }
    return leave(&call, rc);
}
#endif

EXPORT CUresult cuMemHostUnregister(void *start)
{
    struct call call;
    CUresult rc = enter(&call, __func__, CONTEXT, (struct arguments){.from = start});

    if (gives_back(&call, rc)) {
        struct range *range = range_at(REGISTERED, start);
        if (range) {
            struct span span = range->span;
            range_remove(range);
            machine_give_up(__func__, span);
        }
        rc = rc ? rc : range ? CUDA_SUCCESS : CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED;
    }
    return leave(&call, rc);
}

/* Allocate for cuMemHostAlloc and cuMemAlloc. */
static CUresult allocate(enum range_kind kind, size_t nbytes, int device, void **start)
{
    const size_t alignment = 4096;

    if (!nbytes)
        return CUDA_ERROR_INVALID_VALUE;
    if (nbytes > SIZE_MAX - alignment)
        return CUDA_ERROR_OUT_OF_MEMORY;
    *start = aligned_alloc(alignment, (nbytes + alignment - 1) & ~(alignment - 1));
    if (!*start)
        return CUDA_ERROR_OUT_OF_MEMORY;
    if (!range_add(kind, (struct span){*start, nbytes}, device)) {
        free(*start);
        return CUDA_ERROR_OUT_OF_MEMORY;
    }
    return CUDA_SUCCESS;
}

static CUresult give_back(const struct call *call, enum range_kind kind, void *start, CUresult rc)
{
    if (!gives_back(call, rc))
        return rc;
    struct range *range = range_at(kind, start);
    if (range) {
        struct span span = range->span;
        range_remove(range);
        machine_give_up(call->function, span);
        free(span.start);
    }
    return rc ? rc : range ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

EXPORT CUresult cuMemHostAlloc(void **start, size_t nbytes, unsigned flags)
{
    struct call call;
    CUresult rc = enter(&call, __func__, CONTEXT, (struct arguments){.nbytes = nbytes, .value = flags});

    if (!rc)
        rc = start && flags <= 7 ? allocate(HOST_ALLOCATED, nbytes, -1, start) : CUDA_ERROR_INVALID_VALUE;
    return leave(&call, rc);
}

EXPORT CUresult cuMemFreeHost(void *start)
{
    struct call call;
    CUresult rc = enter(&call, __func__, CONTEXT, (struct arguments){.from = start});

    return leave(&call, give_back(&call, HOST_ALLOCATED, start, rc));
}

/* Device memory, copies and fills */

EXPORT CUresult cuMemAlloc_v2(CUdeviceptr *start, size_t nbytes)
{
    struct call call;
    CUresult rc = enter(&call, __func__, CONTEXT, (struct arguments){.nbytes = nbytes});
    uint64_t taken = 0;
    void *memory = NULL;

    for (const struct range *range = NULL; (range = range_next(DEVICE_ALLOCATED, range));)
        taken += range->device == call.device ? range->span.nbytes : 0;
    if (!rc && !start)
        rc = CUDA_ERROR_INVALID_VALUE;
    if (!rc && (nbytes > driver.settings.memory || taken > driver.settings.memory - nbytes))
        rc = CUDA_ERROR_OUT_OF_MEMORY;
    if (!rc)
        rc = allocate(DEVICE_ALLOCATED, nbytes, call.device, &memory);
    if (!rc)
        *start = (uintptr_t)memory;
    return leave(&call, rc);
}

EXPORT CUresult cuMemFree_v2(CUdeviceptr start)
{
    struct call call;
    CUresult rc = enter(&call, __func__, CONTEXT, (struct arguments){.to = (void *)(uintptr_t)start});

    return leave(&call, give_back(&call, DEVICE_ALLOCATED, (void *)(uintptr_t)start, rc));
}

static CUresult check_device_end(const struct call *call, struct span span)
{
    const struct range *range = NULL;

    while ((range = range_next(ON_DEVICE, range)))
        if (range->device == call->device && span_contains(range->span, span))
            return CUDA_SUCCESS;
    violation("outside-device-memory", "%s: %p + %zu is not within one range of device %d", call->function,
              (void *)span.start, span.nbytes, call->device);
    return CUDA_ERROR_INVALID_VALUE;
}

static CUresult check_host_end(const struct call *call, struct span span, bool *pinned)
{
    const struct range *range = range_overlapping(PINNED, span);

    *pinned = range;
    if (!range || span_contains(range->span, span))
        return CUDA_SUCCESS;
    violation("straddles-registrations", "%s: %p + %zu is not within one registration", call->function,
              (void *)span.start, span.nbytes);
    return CUDA_ERROR_INVALID_VALUE;
}

/* Copy, or fill when source is NULL; the whole of a call whose pointers are not NULL. */
static CUresult move(const struct call *call, CUstream stream, unsigned char *target, unsigned char *source,
                     unsigned char value, size_t nbytes, bool to_device)
{
    struct span host = {to_device ? source : target, nbytes}, device = {to_device ? target : source, nbytes};
    bool pinned = true;
    int slot;
    CUresult rc = find_stream(call, stream, &slot);

    if (rc || !nbytes)
        return rc;
    if (!target || (uintptr_t)target + nbytes < nbytes || (uintptr_t)source + nbytes < nbytes)
        return CUDA_ERROR_INVALID_VALUE;
    if (!rc)
        rc = check_device_end(call, device);
    if (!rc && source)
        rc = check_host_end(call, host, &pinned);
    if (!rc && !machine_queue(call->function, slot, (struct span){target, nbytes}, source, value, to_device, pinned))
        rc = CUDA_ERROR_OUT_OF_MEMORY;
    return rc;
}

EXPORT CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr target, const void *source, size_t nbytes, CUstream stream)
{
    struct call call;
    void *to = (void *)(uintptr_t)target;
    CUresult rc = enter(&call, __func__, CONTEXT,
                        (struct arguments){.stream = stream, .to = to, .from = source, .nbytes = nbytes});

    if (!rc)
        rc = source || !nbytes ? move(&call, stream, to, (void *)source, 0, nbytes, true)
                               : CUDA_ERROR_INVALID_VALUE;
    return leave(&call, rc);
}

EXPORT CUresult cuMemcpyDtoHAsync_v2(void *target, CUdeviceptr source, size_t nbytes, CUstream stream)
{
    struct call call;
    void *from = (void *)(uintptr_t)source;
    CUresult rc = enter(&call, __func__, CONTEXT,
                        (struct arguments){.stream = stream, .to = target, .from = from, .nbytes = nbytes});

    if (!rc)
        rc = source || !nbytes ? move(&call, stream, target, from, 0, nbytes, false) : CUDA_ERROR_INVALID_VALUE;
    return leave(&call, rc);
}

EXPORT CUresult cuMemcpyDtoH_v2(void *target, CUdeviceptr source, size_t nbytes)
{
    struct call call;
    void *from = (void *)(uintptr_t)source;
    CUresult rc =
        enter(&call, __func__, CONTEXT, (struct arguments){.to = target, .from = from, .nbytes = nbytes});

    if (!rc)
        rc = source || !nbytes ? move(&call, NULL, target, from, 0, nbytes, false) : CUDA_ERROR_INVALID_VALUE;
    if (!rc) {
        struct mark mark = machine_mark(call.device);
        machine_synchronise(&mark);
    }
    return leave(&call, rc);
}

EXPORT CUresult cuMemsetD8Async(CUdeviceptr target, unsigned char value, size_t nbytes, CUstream stream)
{
    struct call call;
    void *to = (void *)(uintptr_t)target;
    CUresult rc = enter(&call, __func__, CONTEXT,
                        (struct arguments){.stream = stream, .to = to, .nbytes = nbytes, .value = value});

    if (!rc)
        rc = move(&call, stream, to, NULL, value, nbytes, true);
    return leave(&call, rc);
}

/* What a test sees */

EXPORT int wcs_configure(const char *text)
{
    lock_driver();
    int rc = configure(text);
    machine_unlock();
    return rc;
}

EXPORT void wcs_reset(void)
{
    lock_driver();
    reset();
    machine_unlock();
}

/* Cut `span` out of another device's adopted range. */
static bool take_over(struct range *range, struct span span)
{
    struct span whole = range->span;
    unsigned char *end = span.start + span.nbytes, *whole_end = whole.start + whole.nbytes;
    int device = range->device;

    range_remove(range);
    machine_give_up("wcs_adopt", span);
    return (whole.start >= span.start ||
            range_add(ADOPTED, (struct span){whole.start, (size_t)(span.start - whole.start)}, device)) &&
           (end >= whole_end || range_add(ADOPTED, (struct span){end, (size_t)(whole_end - end)}, device));
}

EXPORT int wcs_adopt(void *start, size_t nbytes, int device)
{
    struct span span = {start, nbytes};
    struct range *range;
    int rc = -EINVAL;

    lock_driver();
    if (!nbytes || device < 0 || device >= driver.settings.devices)
        goto out;
    range = range_overlapping(DEVICE_ALLOCATED | HOST_ALLOCATED, span);
    if (range) {
        if (range->kind == DEVICE_ALLOCATED && range->device == device && span_contains(range->span, span))
            rc = 0;
        goto out;
    }
    rc = -ENOMEM;
    while ((range = range_overlapping(ADOPTED, span))) {
        if (range->device != device) {
            if (!take_over(range, span))
                goto out;
            continue;
        }
        unsigned char *end = span.start + span.nbytes, *other_end = range->span.start + range->span.nbytes;
        span.start = span.start < range->span.start ? span.start : range->span.start;
        span.nbytes = (size_t)((end > other_end ? end : other_end) - span.start);
        range_remove(range);
    }
    if (range_add(ADOPTED, span, device))
        rc = 0;
out:
    machine_unlock();
    return rc;
}

EXPORT int wcs_forget(void *start)
{
    lock_driver();
    struct range *range = range_at(ADOPTED, start);
    int rc = range ? 0 : -ENOENT;
    if (range) {
        struct span span = range->span;
        range_remove(range);
        machine_give_up(__func__, span);
    }
    machine_unlock();
    return rc;
}

EXPORT size_t wcs_violations(char *text, size_t room)
{
    lock_driver();
    size_t length = violations_text(text, room);
    machine_unlock();
    return length;
}

EXPORT size_t wcs_log(char *text, size_t room)
{
    size_t length = 0;

    if (room)
        *text = 0;
    lock_driver();
    uint64_t first = driver.calls > LOG_MAX ? driver.calls - LOG_MAX : 0;
    for (uint64_t number = first; driver.log && number < driver.calls; number++) {
        const struct entry *entry = &driver.log[number % LOG_MAX];
        const struct arguments *arguments = &entry->arguments;
        append(text, room, &length, "%llu thread %d %s stream=%p event=%p to=%p from=%p nbytes=%llu value=%lld",
               (unsigned long long)number, entry->thread, entry->function, arguments->stream, arguments->event,
               arguments->to, arguments->from, (unsigned long long)arguments->nbytes, (long long)arguments->value);
        if (entry->returned)
            append(text, room, &length, " -> %d\n", entry->result);
        else
            append(text, room, &length, "\n");
    }
    machine_unlock();
    return length;
}

struct text {
    char *start;
    size_t room, length;
    int lines;
};

static void add_line(void *argument, const char *line)
{
    struct text *text = argument;

    append(text->start, text->room, &text->length, "%s\n", line);
    text->lines++;
}

static void describe_leaks(void (*describe)(void *argument, const char *line), void *argument)
{
    static const char *const kinds[] = {
        [REGISTERED] = "registration", [HOST_ALLOCATED] = "host allocation", [DEVICE_ALLOCATED] = "device allocation"};
    char line[128];

    for (int device = 0; device < DEVICES_MAX; device++) {
        if (!driver.retained[device])
            continue;
        snprintf(line, sizeof line, "context: of device %d, retained %llu times", device,
                 (unsigned long long)driver.retained[device]);
        describe(argument, line);
    }
    for (int slot = 0; slot < STREAMS_MAX; slot++) {
        if (!driver.stream_handles[slot])
            continue;
        snprintf(line, sizeof line, "stream: %#llx of device %d", (unsigned long long)driver.stream_handles[slot],
                 driver.stream_devices[slot]);
        describe(argument, line);
    }
    for (const struct event *event = driver.events; event; event = event->next) {
        snprintf(line, sizeof line, "event: %#llx of device %d", (unsigned long long)event->handle, event->device);
        describe(argument, line);
    }
    for (const struct range *range = NULL; (range = range_next(PINNED | DEVICE_ALLOCATED, range));) {
        snprintf(line, sizeof line, "%s: %p + %zu", kinds[range->kind], (void *)range->span.start, range->span.nbytes);
        describe(argument, line);
    }
    machine_for_pending(describe, argument);
}

EXPORT int wcs_leaks(char *text, size_t room)
{
    struct text lines = {.start = text, .room = room};

    if (room)
        *text = 0;
    lock_driver();
    describe_leaks(add_line, &lines);
    machine_unlock();
    return lines.lines;
}

static void count_facts(struct wcs_facts *facts)
{
    struct machine_numbers numbers = machine_numbers();

    *facts = (struct wcs_facts){
        .host_allocations = range_count(HOST_ALLOCATED, NULL),
        .device_allocations = range_count(DEVICE_ALLOCATED, NULL),
        .registered_nbytes_peak = driver.registered_peak,
        .copies = numbers.copies,
        .copied_nbytes = numbers.copied_nbytes,
        .unpinned_copies = numbers.unpinned_copies,
        .in_flight_nbytes = numbers.in_flight_nbytes,
        .in_flight_nbytes_peak = numbers.in_flight_nbytes_peak,
        .calls = driver.calls,
        .failures = driver.failures,
        .violations = numbers.violations,
    };
    facts->registrations = range_count(REGISTERED, &facts->registered_nbytes);
    for (int device = 0; device < DEVICES_MAX; device++)
        facts->contexts += driver.retained[device];
    for (int slot = 0; slot < STREAMS_MAX; slot++)
        facts->streams += driver.stream_handles[slot] != 0;
    for (const struct event *event = driver.events; event; event = event->next)
        facts->events++;
}

EXPORT void wcs_facts(struct wcs_facts *facts)
{
    lock_driver();
    count_facts(facts);
    machine_unlock();
}

static void print_leak(void *count, const char *line)
{
    fprintf(stderr, "standin: leak: %s\n", line);
    ++*(int *)count;
}

__attribute__((destructor)) static void end(void)
{
    machine_lock();
    machine_stop();
    if (driver.settings.report) {
        size_t room = violations_text(NULL, 0) + 1;
        char *text = malloc(room), *left = text, *line;
        int leaks = 0;
        struct wcs_facts facts;

        count_facts(&facts);
        if (text)
            violations_text(text, room);
        while (left && (line = strsep(&left, "\n")))
            if (*line)
                fprintf(stderr, "standin: %s\n", line);
        free(text);
        describe_leaks(print_leak, &leaks);
        fprintf(stderr, "standin: %llu violations, %d leaks, %llu calls, %llu copies of %llu bytes, %llu unpinned\n",
                (unsigned long long)facts.violations, leaks, (unsigned long long)facts.calls,
                (unsigned long long)facts.copies, (unsigned long long)facts.copied_nbytes,
                (unsigned long long)facts.unpinned_copies);
    }
    machine_unlock();
}
