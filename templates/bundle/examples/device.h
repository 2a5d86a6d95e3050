// Device memory for the examples, through libcuda opened at run time. A program that links the CUDA
// runtime uses cudaMalloc and cudaMemcpy instead.
#ifndef GQA_EXAMPLES_DEVICE_H_
#define GQA_EXAMPLES_DEVICE_H_

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef unsigned long long device_address;

typedef struct device_api {
  int (*init)(unsigned);
  int (*device)(int*, int);
  int (*retain)(void**, int);
  int (*enter)(void*);
  int (*allocate)(device_address*, size_t);
  int (*release)(device_address);
  int (*to_device)(device_address, void const*, size_t);
  int (*to_host)(void*, device_address, size_t);
  int (*zero)(device_address, unsigned char, size_t);
  int (*wait)(void);
} device_api;

static device_api device;

static void device_check(int status, char const* doing) {
  if (status != 0) {
    fprintf(stderr, "%s: CUDA error %d\n", doing, status);
    exit(1);
  }
}

static int device_find(void* library, char const* name, void* function) {
  void* symbol = dlsym(library, name);
  memcpy(function, &symbol, sizeof symbol);
  return symbol != NULL;
}

// Opens the first GPU. Zero where there is none.
static int device_open(void) {
  void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  void* context = NULL;
  int handle = 0;
  return library != NULL && device_find(library, "cuInit", &device.init) &&
         device_find(library, "cuDeviceGet", &device.device) &&
         device_find(library, "cuDevicePrimaryCtxRetain", &device.retain) &&
         device_find(library, "cuCtxSetCurrent", &device.enter) &&
         device_find(library, "cuMemAlloc_v2", &device.allocate) &&
         device_find(library, "cuMemFree_v2", &device.release) &&
         device_find(library, "cuMemcpyHtoD_v2", &device.to_device) &&
         device_find(library, "cuMemcpyDtoH_v2", &device.to_host) &&
         device_find(library, "cuMemsetD8_v2", &device.zero) &&
         device_find(library, "cuCtxSynchronize", &device.wait) && device.init(0) == 0 &&
         device.device(&handle, 0) == 0 && device.retain(&context, handle) == 0 &&
         device.enter(context) == 0;
}

// Memory on the GPU that holds what is given, or zeros.
static void* device_copy(void const* content, size_t bytes) {
  device_address address = 0;
  device_check(device.allocate(&address, bytes > 0 ? bytes : 1), "allocating");
  if (content != NULL) {
    device_check(device.to_device(address, content, bytes), "copying to the GPU");
  } else {
    device_check(device.zero(address, 0, bytes), "zeroing");
  }
  return (void*)(size_t)address;
}

static void device_read(void* to, void const* from, size_t bytes) {
  device_check(device.to_host(to, (device_address)(size_t)from, bytes), "copying from the GPU");
}

static void device_free(void* memory) {
  device_check(device.release((device_address)(size_t)memory), "releasing memory");
}

#endif  // GQA_EXAMPLES_DEVICE_H_
