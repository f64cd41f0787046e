#define _GNU_SOURCE
#include "cuda.h"

#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>

/* Fill one place of the table. ISO C has no cast from an object's to a function's pointer, so its bytes are copied. */
static bool resolve(void *library, const char *symbol, void *place)
{
    void *found = dlsym(library, symbol);

    memcpy(place, &found, sizeof found);
    return found != NULL;
}

int wc_cuda_open(struct wc_cuda *cuda, const char *path, char *reason, size_t room)
{
    int rc = -ENOENT;

    memset(cuda, 0, sizeof *cuda);
    cuda->library = dlopen(path, RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE); /* it may have left threads and handlers behind */
    if (!cuda->library) {
        snprintf(reason, room, "no driver: %s", dlerror());
        return rc;
    }
    rc = -ENOSYS;
#define X(name, symbol, parameters) \
    if (!resolve(cuda->library, symbol, &cuda->name)) { \
        snprintf(reason, room, "the driver %s lacks %s: a newer one has it", path, symbol); \
        goto fail; \
    }
    WC_CUDA_SYMBOLS(X)
#undef X
    cuda->is_stand_in = resolve(cuda->library, "wcs_adopt", &cuda->adopt) &&
                        resolve(cuda->library, "wcs_forget", &cuda->forget);

    wc_cu_result result = cuda->init(0);
    if (result) {
        const char *name = NULL;
        cuda->error_name(result, &name);
        snprintf(reason, room, "the driver %s does not start: %s (%d)", path, name ? name : "unknown", result);
        rc = wc_cuda_error(result);
        goto fail;
    }
    return 0;

fail:
    wc_cuda_close(cuda);
    return rc;
}

void wc_cuda_close(struct wc_cuda *cuda)
{
    if (cuda->library)
        dlclose(cuda->library);
    cuda->library = NULL;
}

int wc_cuda_enter(const struct wc_cuda *cuda, wc_cu_context context, struct wc_cuda_entered *entered)
{
    wc_cu_result result = cuda->context_get(&entered->before);
    if (result)
        return wc_cuda_error(result);
    result = cuda->context_set(context);
    if (result)
        return wc_cuda_error(result);
    entered->capture_mode = WC_CU_CAPTURE_MODE_RELAXED;
    result = cuda->capture_mode(&entered->capture_mode); /* now it holds the mode before */
    if (result)
        cuda->context_set(entered->before);
    return wc_cuda_error(result);
}

void wc_cuda_leave(const struct wc_cuda *cuda, const struct wc_cuda_entered *entered)
{
    int mode = entered->capture_mode;

    cuda->capture_mode(&mode);
    cuda->context_set(entered->before);
}
