// The CUDA driver, opened at run time: what is used of it, declared as in cuda.h, which building
// this library does not need.
#ifndef GQA_DRIVER_H_
#define GQA_DRIVER_H_

#include <stddef.h>
#include <stdint.h>

#include "gqa_attention_decode.h"
#include "gqa_visibility.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef int gqa_cu_result;  // CUresult
typedef int gqa_cu_device;
typedef struct gqa_cu_context_st* gqa_cu_context;
typedef struct gqa_cu_library_st* gqa_cu_library;
typedef struct gqa_cu_kernel_st* gqa_cu_kernel;

enum {
  kCuSuccess = 0,
  kCuCaptureRelaxed = 2,
  kCuComputeCapabilityMajor = 75,
  kCuComputeCapabilityMinor = 76,
  kCuMultiprocessors = 16,
  kCuMaxDynamicSharedBytes = 8,
  kCuClusterDimension = 4,
  kCuProgrammaticStreamSerialization = 6,
  kCuTensorMapUint16 = 1,
  kCuTensorMapSwizzle128 = 3
};

// CUlaunchAttribute, whose value is a union of 64 bytes.
typedef struct gqa_cu_attribute {
  int32_t id;
  int32_t padding;
  uint32_t value[16];
} gqa_cu_attribute;

// CUlaunchConfig
typedef struct gqa_cu_launch {
  uint32_t grid[3];
  uint32_t block[3];
  uint32_t shared_bytes;
  gqa_stream_t stream;
  gqa_cu_attribute* attributes;
  uint32_t num_attributes;
} gqa_cu_launch;

// CUtensorMap
typedef struct __attribute__((aligned(128))) gqa_tensor_map {
  uint64_t opaque[16];
} gqa_tensor_map;

typedef struct gqa_driver {
  gqa_cu_result (*init)(unsigned flags);
  gqa_cu_result (*context)(gqa_cu_context* context);
  gqa_cu_result (*set_context)(gqa_cu_context context);
  gqa_cu_result (*current_device)(gqa_cu_device* device);
  gqa_cu_result (*device)(gqa_cu_device* device, int ordinal);
  gqa_cu_result (*primary_context)(gqa_cu_context* context, gqa_cu_device device);
  gqa_cu_result (*attribute)(int* value, int attribute, gqa_cu_device device);
  gqa_cu_result (*load)(gqa_cu_library* library, void const* image, void* jit_options,
                        void** jit_values, unsigned num_jit, void* options, void** values,
                        unsigned num_options);
  gqa_cu_result (*unload)(gqa_cu_library library);
  gqa_cu_result (*kernel)(gqa_cu_kernel* kernel, gqa_cu_library library, char const* name);
  gqa_cu_result (*set_attribute)(int attribute, int value, gqa_cu_kernel kernel,
                                 gqa_cu_device device);
  gqa_cu_result (*function)(void** function, gqa_cu_kernel kernel);
  gqa_cu_result (*launch)(gqa_cu_launch const* config, void* function, void** params, void** extra);
  gqa_cu_result (*encode)(gqa_tensor_map* map, int type, uint32_t rank, void* address,
                          uint64_t const* sizes, uint64_t const* strides, uint32_t const* box,
                          uint32_t const* steps, int interleave, int swizzle, int promotion,
                          int fill);
  gqa_cu_result (*capture_mode)(int* mode);
  gqa_cu_result (*error_name)(gqa_cu_result error, char const** name);
  gqa_cu_result (*error_text)(gqa_cu_result error, char const** text);
} gqa_driver;

// The driver, opened by the first call. Null where there is none that serves: `*reason` says why.
GQA_INTERNAL gqa_driver const* gqa_open_driver(char const** reason);

#ifdef __cplusplus
}
#endif

#endif  // GQA_DRIVER_H_
