#include "gqa_driver.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>

static gqa_driver driver;
static char problem[256];
static pthread_once_t opened = PTHREAD_ONCE_INIT;

// One function. A pointer to an object is no pointer to a function in ISO C, so it is copied.
static int find(void* library, char const* name, void* function) {
  void* symbol = dlsym(library, name);
  if (symbol == NULL) {
    snprintf(problem, sizeof problem,
             "libcuda.so.1 has no %s; needed: a driver for CUDA 12 or newer", name);
    return 0;
  }
  memcpy(function, &symbol, sizeof symbol);
  return 1;
}

static void open_driver(void) {
  void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (library == NULL) {
    char const* reason = dlerror();
    snprintf(problem, sizeof problem, "%s", reason == NULL ? "libcuda.so.1" : reason);
    return;
  }
  int const complete = find(library, "cuInit", &driver.init) &&
                       find(library, "cuCtxGetCurrent", &driver.context) &&
                       find(library, "cuCtxSetCurrent", &driver.set_context) &&
                       find(library, "cuCtxGetDevice", &driver.current_device) &&
                       find(library, "cuDeviceGet", &driver.device) &&
                       find(library, "cuDevicePrimaryCtxRetain", &driver.primary_context) &&
                       find(library, "cuDeviceGetAttribute", &driver.attribute) &&
                       find(library, "cuLibraryLoadData", &driver.load) &&
                       find(library, "cuLibraryUnload", &driver.unload) &&
                       find(library, "cuLibraryGetKernel", &driver.kernel) &&
                       find(library, "cuKernelSetAttribute", &driver.set_attribute) &&
                       find(library, "cuKernelGetFunction", &driver.function) &&
                       find(library, "cuLaunchKernelEx", &driver.launch) &&
                       find(library, "cuTensorMapEncodeTiled", &driver.encode) &&
                       find(library, "cuThreadExchangeStreamCaptureMode", &driver.capture_mode) &&
                       find(library, "cuGetErrorName", &driver.error_name) &&
                       find(library, "cuGetErrorString", &driver.error_text);
  if (!complete) return;
  gqa_cu_result const status = driver.init(0);
  if (status != kCuSuccess) {
    char const* name = NULL;
    driver.error_name(status, &name);
    snprintf(problem, sizeof problem, "cuInit: %s", name == NULL ? "unknown error" : name);
  }
}

gqa_driver const* gqa_open_driver(char const** reason) {
  pthread_once(&opened, open_driver);
  *reason = problem;
  return problem[0] == '\0' ? &driver : NULL;
}
