// A CUDA driver without a GPU, for tests of the exported C library: every function that the library
// looks up, with state that tests set and read through the functions named fake_*. It refuses what
// a driver refuses, and counts what it is asked.
//
// Built as libcuda.so.1; or into the library under test, with calls of dlopen and dlsym wrapped by
// the linker, so that each copy of that library opens a driver of its own and a real one stays out
// of it.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum {  // CUresult
  kSuccess = 0,
  kInvalidValue = 1,
  kOutOfMemory = 2,
  kNotInitialized = 3,
  kInvalidDevice = 101,
  kInvalidContext = 201,
  kInvalidHandle = 400,
  kNotFound = 500,
  kCaptureUnsupported = 900
};

enum { kMaxDevices = 80, kMaxKernels = 64, kNameBytes = 160 };
enum { kArgumentBytes = ARGUMENT_BYTES, kTmaArgumentBytes = TMA_ARGUMENT_BYTES };
enum { kSharedBytesWithoutAsking = 48 * 1024 };
enum { kCaptureRelaxed = 2 };
enum { kMajor = 75, kMinor = 76, kMultiprocessors = 16, kMaxDynamicSharedBytes = 8 };
enum { kClusterDimension = 4, kProgrammaticStreamSerialization = 6 };
enum { kAllocationAlign = 256 };

#define FUNCTIONS(X)                   \
  X(cuInit)                            \
  X(cuCtxGetCurrent)                   \
  X(cuCtxSetCurrent)                   \
  X(cuCtxGetDevice)                    \
  X(cuDeviceGet)                       \
  X(cuDevicePrimaryCtxRetain)          \
  X(cuDeviceGetAttribute)              \
  X(cuLibraryLoadData)                 \
  X(cuLibraryUnload)                   \
  X(cuLibraryGetKernel)                \
  X(cuKernelSetAttribute)              \
  X(cuKernelGetFunction)               \
  X(cuLaunchKernelEx)                  \
  X(cuTensorMapEncodeTiled)            \
  X(cuThreadExchangeStreamCaptureMode) \
  X(cuGetErrorName)                    \
  X(cuGetErrorString)

#define ENUMERATE(name) k_##name,
enum { FUNCTIONS(ENUMERATE) kNumFunctions };

#define NAME(name) #name,
static char const* const function_names[] = {FUNCTIONS(NAME)};

typedef struct launch_attribute {
  int32_t id;
  int32_t padding;
  uint32_t value[16];
} launch_attribute;

typedef struct launch_config {
  uint32_t grid[3];
  uint32_t block[3];
  uint32_t shared_bytes;
  void* stream;
  launch_attribute const* attributes;
  uint32_t num_attributes;
} launch_config;

// What was launched, with a copy of the kernel's argument.
typedef struct fake_launch {
  uint32_t grid[3];
  uint32_t block[3];
  uint32_t cluster[3];  // zeros: not asked for
  uint32_t shared_bytes;
  int32_t device;
  uint32_t num_attributes;
  uint32_t dependent;  // whether it may start before the kernel before it is done
  uint64_t stream;
  char kernel[kNameBytes];
  _Alignas(64) unsigned char argument[kTmaArgumentBytes];
} fake_launch;

// What was to be encoded.
typedef struct fake_tensor {
  uint64_t address;
  uint64_t sizes[5];
  uint64_t strides[4];
  uint32_t box[5];
  uint32_t steps[5];
  int32_t type;
  uint32_t rank;
  int32_t interleave;
  int32_t swizzle;
  int32_t promotion;
  int32_t fill;
} fake_tensor;

typedef int (*launch_callback)(fake_launch const* launch);
typedef int (*encode_callback)(fake_tensor const* tensor, void* map);

typedef struct failure {
  int error;
  int skip;   // calls that succeed before
  int times;  // calls that fail then; negative: all
} failure;

typedef struct device_state {
  int capability;
  int num_sms;
  int retained;
} device_state;

typedef struct kernel_state {
  char name[kNameBytes];
  int loads;                      // of its image
  int shared_bytes[kMaxDevices];  // allowed to its launches; 0: not set
  int functions[kMaxDevices];     // times it was brought into a device's context
} kernel_state;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static atomic_int calls[kNumFunctions];
static atomic_int initialized;
static atomic_int capturing;
static atomic_int load_microseconds;
static failure failures[kNumFunctions];
static device_state devices[kMaxDevices] = {{90, 132, 0}};
static int num_devices = 1;
static kernel_state kernels[kMaxKernels];
static fake_launch last_launch;
static launch_callback on_launch;
static encode_callback on_encode;
static char const* hidden = "";
static int is_absent;
static _Thread_local int current = -1;
static _Thread_local int capture_mode;

static int find_function(char const* name) {
  for (int i = 0; i < kNumFunctions; ++i) {
    if (strcmp(function_names[i], name) == 0) return i;
  }
  fprintf(stderr, "fake_cuda: no function %s\n", name);
  abort();
}

// Counts a call, and says how it fails.
static int enter(int function) {
  int error = kSuccess;
  ++calls[function];
  pthread_mutex_lock(&lock);
  failure* planned = &failures[function];
  if (planned->error != kSuccess && planned->skip > 0) {
    --planned->skip;
  } else if (planned->error != kSuccess && planned->times != 0) {
    --planned->times;
    error = planned->error;
  }
  pthread_mutex_unlock(&lock);
  if (error == kSuccess && function != k_cuInit && !initialized) error = kNotInitialized;
  return error;
}

#define ENTER(name)                        \
  do {                                     \
    const int error_ = enter(k_##name);    \
    if (error_ != kSuccess) return error_; \
  } while (0)

// What a capture on another thread makes fail, unless this thread has relaxed its mode.
static int breaks_capture(void) { return capturing && capture_mode != kCaptureRelaxed; }

// -- The driver

int cuInit(unsigned flags) {
  ENTER(cuInit);
  if (flags != 0) return kInvalidValue;
  initialized = 1;
  return kSuccess;
}

int cuCtxGetCurrent(void** context) {
  ENTER(cuCtxGetCurrent);
  *context = current < 0 ? NULL : &devices[current];
  return kSuccess;
}

int cuCtxSetCurrent(void* context) {
  ENTER(cuCtxSetCurrent);
  device_state const* device = (device_state const*)context;
  pthread_mutex_lock(&lock);
  int const is_open = device != NULL && device->retained > 0;
  pthread_mutex_unlock(&lock);
  if (!is_open) return kInvalidContext;
  current = (int)(device - devices);
  return kSuccess;
}

int cuCtxGetDevice(int* device) {
  ENTER(cuCtxGetDevice);
  if (current < 0) return kInvalidContext;
  *device = current;
  return kSuccess;
}

int cuDeviceGet(int* device, int ordinal) {
  ENTER(cuDeviceGet);
  if (ordinal < 0 || ordinal >= num_devices) return kInvalidDevice;
  *device = ordinal;
  return kSuccess;
}

int cuDevicePrimaryCtxRetain(void** context, int device) {
  ENTER(cuDevicePrimaryCtxRetain);
  if (device < 0 || device >= num_devices) return kInvalidDevice;
  pthread_mutex_lock(&lock);
  ++devices[device].retained;
  pthread_mutex_unlock(&lock);
  *context = &devices[device];
  return kSuccess;
}

int cuDeviceGetAttribute(int* value, int attribute, int device) {
  ENTER(cuDeviceGetAttribute);
  if (device < 0 || device >= num_devices) return kInvalidDevice;
  if (attribute == kMajor) {
    *value = devices[device].capability / 10;
  } else if (attribute == kMinor) {
    *value = devices[device].capability % 10;
  } else if (attribute == kMultiprocessors) {
    *value = devices[device].num_sms;
  } else {
    return kInvalidValue;
  }
  return kSuccess;
}

static kernel_state* kernel_of(char const* name, int make) {
  for (int i = 0; i < kMaxKernels; ++i) {
    if (kernels[i].name[0] == '\0' && make) snprintf(kernels[i].name, kNameBytes, "%s", name);
    if (strcmp(kernels[i].name, name) == 0) return &kernels[i];
  }
  return NULL;
}

// In tests an image is its kernel's name; a fat binary says nothing about its content here.
int cuLibraryLoadData(void** library, void const* image, void* jit_options, void** jit_values,
                      unsigned num_jit, void* options, void** values, unsigned num_options) {
  ENTER(cuLibraryLoadData);
  if (jit_options || jit_values || num_jit || options || values || num_options)
    return kInvalidValue;
  if (breaks_capture()) return kCaptureUnsupported;
  if (load_microseconds > 0) usleep((useconds_t)load_microseconds);
  pthread_mutex_lock(&lock);
  kernel_state* kernel = kernel_of((char const*)image, 1);
  if (kernel != NULL) ++kernel->loads;
  pthread_mutex_unlock(&lock);
  *library = kernel;
  return kernel == NULL ? kInvalidValue : kSuccess;
}

int cuLibraryUnload(void* library) {
  ENTER(cuLibraryUnload);
  pthread_mutex_lock(&lock);
  --((kernel_state*)library)->loads;
  pthread_mutex_unlock(&lock);
  return kSuccess;
}

int cuLibraryGetKernel(void** kernel, void* library, char const* name) {
  ENTER(cuLibraryGetKernel);
  if (strcmp(((kernel_state*)library)->name, name) != 0) return kNotFound;
  *kernel = library;
  return kSuccess;
}

int cuKernelSetAttribute(int attribute, int value, void* kernel, int device) {
  ENTER(cuKernelSetAttribute);
  if (attribute != kMaxDynamicSharedBytes || value < 0) return kInvalidValue;
  if (device < 0 || device >= num_devices) return kInvalidDevice;
  pthread_mutex_lock(&lock);
  ((kernel_state*)kernel)->shared_bytes[device] = value;
  pthread_mutex_unlock(&lock);
  return kSuccess;
}

int cuKernelGetFunction(void** function, void* kernel) {
  ENTER(cuKernelGetFunction);
  if (current < 0) return kInvalidContext;
  if (breaks_capture()) return kCaptureUnsupported;
  pthread_mutex_lock(&lock);
  ++((kernel_state*)kernel)->functions[current];
  pthread_mutex_unlock(&lock);
  *function = kernel;
  return kSuccess;
}

static int check_launch(launch_config const* config, kernel_state const* kernel) {
  uint32_t const *grid = config->grid, *block = config->block;
  uint32_t const allowed = (uint32_t)kernel->shared_bytes[current];
  if (grid[0] < 1 || grid[0] > INT32_MAX) return kInvalidValue;
  if (grid[1] < 1 || grid[1] > 65535 || grid[2] < 1 || grid[2] > 65535) return kInvalidValue;
  if (block[0] < 1 || block[0] > 1024 || block[1] != 1 || block[2] != 1) return kInvalidValue;
  if (config->shared_bytes > kSharedBytesWithoutAsking && config->shared_bytes > allowed) {
    return kInvalidValue;
  }
  for (uint32_t i = 0; i < config->num_attributes; ++i) {
    launch_attribute const* attribute = &config->attributes[i];
    if (attribute->id == kProgrammaticStreamSerialization) {
      if (attribute->value[0] != 1) return kInvalidValue;
      continue;
    }
    if (attribute->id != kClusterDimension) return kInvalidValue;
    for (int k = 0; k < 3; ++k) {
      if (attribute->value[k] < 1 || grid[k] % attribute->value[k] != 0) return kInvalidValue;
    }
  }
  // Another device's context has the kernel once it is asked for there; a stricter rule than
  // CUDA's.
  return kernel->functions[current] > 0 ? kSuccess : kInvalidHandle;
}

int cuLaunchKernelEx(launch_config const* config, void* function, void** params, void** extra) {
  ENTER(cuLaunchKernelEx);
  kernel_state const* kernel = (kernel_state const*)function;
  if (current < 0) return kInvalidContext;
  if (kernel == NULL) return kInvalidHandle;
  if (params == NULL || params[0] == NULL || extra != NULL) return kInvalidValue;
  pthread_mutex_lock(&lock);
  int const error = check_launch(config, kernel);
  fake_launch launched;
  memset(&launched, 0, sizeof launched);
  memcpy(launched.grid, config->grid, sizeof launched.grid);
  memcpy(launched.block, config->block, sizeof launched.block);
  for (uint32_t i = 0; i < config->num_attributes; ++i) {
    launch_attribute const* attribute = &config->attributes[i];
    if (attribute->id == kClusterDimension) {
      memcpy(launched.cluster, attribute->value, sizeof launched.cluster);
    } else {
      launched.dependent = attribute->value[0];
    }
  }
  launched.shared_bytes = config->shared_bytes;
  launched.device = current;
  launched.num_attributes = config->num_attributes;
  launched.stream = (uint64_t)(uintptr_t)config->stream;
  memcpy(launched.kernel, kernel->name, kNameBytes);
  memcpy(launched.argument, params[0],
         strstr(kernel->name, "_tma_") ? kTmaArgumentBytes : kArgumentBytes);
  if (error == kSuccess) last_launch = launched;
  pthread_mutex_unlock(&lock);
  return error == kSuccess && on_launch != NULL ? on_launch(&launched) : error;
}

static int check_tensor(fake_tensor const* tensor) {
  if (tensor->rank < 3 || tensor->rank > 5 || tensor->address % 16 != 0) return kInvalidValue;
  for (uint32_t i = 0; i < tensor->rank; ++i) {
    if (tensor->sizes[i] < 1 || tensor->box[i] < 1 || tensor->box[i] > 256) return kInvalidValue;
    if (i > 0 && tensor->strides[i - 1] % 16 != 0) return kInvalidValue;
  }
  return kSuccess;
}

int cuTensorMapEncodeTiled(void* map, int type, uint32_t rank, void* address, uint64_t const* sizes,
                           uint64_t const* strides, uint32_t const* box, uint32_t const* steps,
                           int interleave, int swizzle, int promotion, int fill) {
  ENTER(cuTensorMapEncodeTiled);
  fake_tensor tensor;
  if ((uintptr_t)map % 64 != 0 || rank < 1 || rank > 5) return kInvalidValue;
  memset(&tensor, 0, sizeof tensor);
  tensor.address = (uint64_t)(uintptr_t)address;
  memcpy(tensor.sizes, sizes, rank * sizeof *sizes);
  memcpy(tensor.strides, strides, (rank - 1) * sizeof *strides);
  memcpy(tensor.box, box, rank * sizeof *box);
  memcpy(tensor.steps, steps, rank * sizeof *steps);
  tensor.type = type;
  tensor.rank = rank;
  tensor.interleave = interleave;
  tensor.swizzle = swizzle;
  tensor.promotion = promotion;
  tensor.fill = fill;
  int const error = check_tensor(&tensor);
  if (error != kSuccess) return error;
  memset(map, 0, 128);
  return on_encode == NULL ? kSuccess : on_encode(&tensor, map);
}

int cuThreadExchangeStreamCaptureMode(int* mode) {
  ENTER(cuThreadExchangeStreamCaptureMode);
  int const previous = capture_mode;
  if (*mode < 0 || *mode > kCaptureRelaxed) return kInvalidValue;
  capture_mode = *mode;
  *mode = previous;
  return kSuccess;
}

// What examples/device.h uses beyond it: memory of the host.

int cuMemAlloc_v2(unsigned long long* address, size_t bytes) {
  void* const memory =
      aligned_alloc(kAllocationAlign, (bytes / kAllocationAlign + 1) * kAllocationAlign);
  *address = (unsigned long long)(uintptr_t)memory;
  return memory == NULL ? kOutOfMemory : kSuccess;
}

int cuMemFree_v2(unsigned long long address) {
  free((void*)(uintptr_t)address);
  return kSuccess;
}

int cuMemcpyHtoD_v2(unsigned long long to, void const* from, size_t bytes) {
  memcpy((void*)(uintptr_t)to, from, bytes);
  return kSuccess;
}

int cuMemcpyDtoH_v2(void* to, unsigned long long from, size_t bytes) {
  memcpy(to, (void const*)(uintptr_t)from, bytes);
  return kSuccess;
}

int cuMemsetD8_v2(unsigned long long address, unsigned char value, size_t bytes) {
  memset((void*)(uintptr_t)address, value, bytes);
  return kSuccess;
}

int cuCtxSynchronize(void) { return kSuccess; }

typedef struct error_text {
  int error;
  char const* name;
  char const* text;
} error_text;

static error_text const error_texts[] = {
    {kInvalidValue, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {kOutOfMemory, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {kNotInitialized, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
    {100, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"},
    {kInvalidDevice, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {kInvalidContext, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {209, "CUDA_ERROR_NO_BINARY_FOR_GPU", "no kernel image is available for execution"},
    {kInvalidHandle, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
    {kNotFound, "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
    {719, "CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"},
    {kCaptureUnsupported, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED", "not permitted when capturing"},
};

// Null for an error that is not in the table, as the driver does for one that it does not know.
static error_text const* describe(int error) {
  for (size_t i = 0; i < sizeof error_texts / sizeof *error_texts; ++i) {
    if (error_texts[i].error == error) return &error_texts[i];
  }
  return NULL;
}

int cuGetErrorName(int error, char const** name) {
  ++calls[k_cuGetErrorName];
  *name = describe(error) ? describe(error)->name : NULL;
  return *name ? kSuccess : kInvalidValue;
}

int cuGetErrorString(int error, char const** text) {
  ++calls[k_cuGetErrorString];
  *text = describe(error) ? describe(error)->text : NULL;
  return *text ? kSuccess : kInvalidValue;
}

// -- What tests set and read

void fake_set_device(int ordinal, int capability, int num_sms) {
  devices[ordinal].capability = capability;
  devices[ordinal].num_sms = num_sms;
  if (ordinal >= num_devices) num_devices = ordinal + 1;
}

// Makes a device's context current on this thread; negative: none.
void fake_enter(int ordinal) {
  pthread_mutex_lock(&lock);
  if (ordinal >= 0) ++devices[ordinal].retained;
  pthread_mutex_unlock(&lock);
  current = ordinal;
}

int fake_current(void) { return current; }

// Has a function fail, after some calls that do not; as often as said, or for good.
void fake_fail(char const* function, int error, int skip, int times) {
  pthread_mutex_lock(&lock);
  failures[find_function(function)] = (failure){error, skip, times};
  pthread_mutex_unlock(&lock);
}

int fake_calls(char const* function) { return calls[find_function(function)]; }

char const* fake_function(int index) {
  return index < kNumFunctions ? function_names[index] : NULL;
}

void fake_set_load_microseconds(int time) { load_microseconds = time; }

void fake_set_capturing(int active) { capturing = active; }

int fake_capture_mode(void) { return capture_mode; }

void fake_set_capture_mode(int mode) { capture_mode = mode; }

int fake_loads(char const* name) {
  kernel_state const* kernel = kernel_of(name, 0);
  return kernel == NULL ? 0 : kernel->loads;
}

int fake_shared_bytes(char const* name, int device) {
  kernel_state const* kernel = kernel_of(name, 0);
  return kernel == NULL ? 0 : kernel->shared_bytes[device];
}

void fake_on_launch(launch_callback callback) { on_launch = callback; }

void fake_on_encode(encode_callback callback) { on_encode = callback; }

void fake_last_launch(fake_launch* launch) {
  pthread_mutex_lock(&lock);
  *launch = last_launch;
  pthread_mutex_unlock(&lock);
}

// From now on there is no libcuda, or it lacks a function. Before the library's first call.
void fake_remove(void) { is_absent = 1; }

void fake_hide(char const* function) { hidden = function_names[find_function(function)]; }

// -- Linked into the library under test

#ifdef FAKE_CUDA_INSIDE
void* __real_dlopen(char const* name, int mode);
void* __real_dlsym(void* library, char const* name);

void* __wrap_dlopen(char const* name, int mode) {
  Dl_info self;
  if (strcmp(name, "libcuda.so.1") != 0 || is_absent || !dladdr(&lock, &self)) {
    return __real_dlopen("/nowhere/libcuda.so.1", mode);
  }
  return __real_dlopen(self.dli_fname, mode);
}

void* __wrap_dlsym(void* library, char const* name) {
  return strcmp(name, hidden) == 0 ? NULL : __real_dlsym(library, name);
}
#endif
