#include <pthread.h>
#include <string.h>

#include "gqa_internal.h"
#include "gqa_kernels.h"

enum { kMaxDevices = 64 };

typedef struct loaded_kernel {
  gqa_cu_library library;
  gqa_cu_kernel kernel;
  uint64_t devices;  // one bit for each that it is ready on
} loaded_kernel;

typedef struct known_device {
  int32_t known;
  gqa_target target;
} known_device;

static loaded_kernel loaded[kGqaMaxKernels];
static known_device known_devices[kMaxDevices];
static pthread_mutex_t loading = PTHREAD_MUTEX_INITIALIZER;

static gqa_status find_driver(gqa_driver const** driver) {
  char const* reason;
  *driver = gqa_open_driver(&reason);
  if (*driver == NULL) {
    return gqa_fail(GQA_ERROR_NO_DRIVER,
                    "no usable GPU: %s; needed: an NVIDIA GPU and its driver. "
                    "Nothing was launched.",
                    reason);
  }
  return GQA_SUCCESS;
}

// The current device; where no context is current, device 0 and its primary context.
static gqa_status find_device(gqa_driver const* driver, gqa_cu_device* device) {
  gqa_cu_context context = NULL;
  gqa_cu_result error = driver->context(&context);
  if (error == kCuSuccess && context == NULL) {
    error = driver->device(device, 0);
    if (error == kCuSuccess) error = driver->primary_context(&context, *device);
    if (error == kCuSuccess) error = driver->set_context(context);
  }
  if (error == kCuSuccess) error = driver->current_device(device);
  if (error != kCuSuccess) {
    return gqa_fail_in_driver(driver, error, GQA_ERROR_NO_DRIVER, "entering", "the GPU");
  }
  return GQA_SUCCESS;
}

static gqa_status look_up(gqa_driver const* driver, gqa_cu_device device, gqa_target* target) {
  int major = 0, minor = 0, num_sms = 0;
  gqa_cu_result error = driver->attribute(&major, kCuComputeCapabilityMajor, device);
  if (error == kCuSuccess) error = driver->attribute(&minor, kCuComputeCapabilityMinor, device);
  if (error == kCuSuccess) error = driver->attribute(&num_sms, kCuMultiprocessors, device);
  if (error != kCuSuccess) {
    return gqa_fail_in_driver(driver, error, GQA_ERROR_NO_DRIVER, "asking for", "the GPU's kind");
  }
  int32_t const capability = 10 * major + minor;
  int32_t const least = gqa_config_limits.min_capability;
  target->arch = gqa_find_arch(capability);
  target->num_sms = num_sms;
  if (capability < least) {
    return gqa_fail(GQA_ERROR_DEVICE,
                    "GPU of compute capability %d.%d: too old; allowed: %d.%d and "
                    "newer. Nothing was launched.",
                    major, minor, least / 10, least % 10);
  }
  if (target->arch < 0) {
    return gqa_fail(
        GQA_ERROR_DEVICE,
        "GPU of compute capability %d.%d: this library was exported "
        "without kernels for it. Nothing was launched. Export for it: gqa-cutlass export "
        "--arch ...",
        major, minor);
  }
  return GQA_SUCCESS;
}

static gqa_status find_target(gqa_driver const* driver, gqa_cu_device device, gqa_target* target) {
  known_device* slot = device < kMaxDevices ? &known_devices[device] : NULL;
  if (slot != NULL && __atomic_load_n(&slot->known, __ATOMIC_ACQUIRE)) {
    *target = slot->target;
    return GQA_SUCCESS;
  }
  memset(target, 0, sizeof *target);
  gqa_status const status = look_up(driver, device, target);
  if (status != GQA_SUCCESS || slot == NULL) return status;
  pthread_mutex_lock(&loading);
  if (!slot->known) {  // or other threads may be reading it
    slot->target = *target;
    __atomic_store_n(&slot->known, 1, __ATOMIC_RELEASE);
  }
  pthread_mutex_unlock(&loading);
  return GQA_SUCCESS;
}

gqa_status gqa_find_current(gqa_driver const** driver, gqa_cu_device* device, gqa_target* target) {
  gqa_status status = find_driver(driver);
  if (status == GQA_SUCCESS) status = find_device(*driver, device);
  if (status == GQA_SUCCESS) status = find_target(*driver, *device, target);
  return status;
}

// Dynamic shared memory that launches may ask for: dependent ones ask for more than the kernel
// needs.
static int32_t most_shared_bytes(gqa_kernel const* kernel, int32_t arch) {
  if (kernel->pdl) return gqa_archs[arch].shared_per_block;
  return kernel->shared_bytes[kernel->num_stages - 1];
}

// Loads a kernel, if need be, and has it ready on a device. Under the lock.
static gqa_cu_result load(gqa_driver const* driver, gqa_kernel const* kernel, loaded_kernel* slot,
                          gqa_cu_device device, int32_t arch) {
  void* function;
  gqa_cu_result error = kCuSuccess;
  if (slot->library == NULL) {
    gqa_cu_library library = NULL;
    error = driver->load(&library, kernel->image, NULL, NULL, 0, NULL, NULL, 0);
    if (error != kCuSuccess) return error;
    error = driver->kernel(&slot->kernel, library, kernel->name);
    if (error != kCuSuccess) {
      driver->unload(library);
      return error;
    }
    slot->library = library;
  }
  error = driver->set_attribute(kCuMaxDynamicSharedBytes, most_shared_bytes(kernel, arch),
                                slot->kernel, device);
  if (error != kCuSuccess) return error;
  return driver->function(&function, slot->kernel);  // loads it into the context
}

// Other threads' captures must not keep it from loading, nor its loading break them.
static gqa_cu_result load_relaxed(gqa_driver const* driver, gqa_kernel const* kernel,
                                  loaded_kernel* slot, gqa_cu_device device, int32_t arch) {
  int mode = kCuCaptureRelaxed;
  gqa_cu_result error = driver->capture_mode(&mode);
  if (error != kCuSuccess) return error;
  error = load(driver, kernel, slot, device, arch);
  driver->capture_mode(&mode);
  return error;
}

gqa_status gqa_find_function(gqa_driver const* driver, gqa_kernel const* kernel,
                             gqa_cu_device device, int32_t arch, gqa_cu_kernel* function) {
  loaded_kernel* slot = &loaded[kernel - gqa_kernels];
  uint64_t const bit = device < kMaxDevices ? (uint64_t)1 << device : 0;
  gqa_cu_result error = kCuSuccess;
  if ((__atomic_load_n(&slot->devices, __ATOMIC_ACQUIRE) & bit) == 0) {
    pthread_mutex_lock(&loading);
    if ((slot->devices & bit) == 0) error = load_relaxed(driver, kernel, slot, device, arch);
    if (error == kCuSuccess) __atomic_fetch_or(&slot->devices, bit, __ATOMIC_RELEASE);
    pthread_mutex_unlock(&loading);
  }
  if (error != kCuSuccess) {
    return gqa_fail_in_driver(driver, error, GQA_ERROR_LAUNCH, "loading", kernel->name);
  }
  *function = slot->kernel;
  return GQA_SUCCESS;
}
