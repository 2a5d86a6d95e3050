// GQA decode attention: one decode step of a transformer in one kernel launch. Appends the new
// token's K and V to the cache, attends over everything cached, writes the output.
//
// Needs an NVIDIA GPU and its driver at run time only: libcuda is opened on the first call, and the
// kernels are part of the library. All functions may be called from several threads at a time.
#ifndef GQA_ATTENTION_DECODE_H_
#define GQA_ATTENTION_DECODE_H_

#include <stddef.h>
#include <stdint.h>

#ifndef GQA_API
#define GQA_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

// The same type as cudaStream_t and CUstream.
struct CUstream_st;
typedef struct CUstream_st* gqa_stream_t;

typedef enum gqa_status {
  GQA_SUCCESS = 0,
  GQA_ERROR_NULL_POINTER = 1,    // a pointer that must not be null is
  GQA_ERROR_INVALID_VALUE = 2,   // a size, an address or the scale is not allowed
  GQA_ERROR_CACHE_OVERFLOW = 3,  // the new token does not fit into the cache
  GQA_ERROR_UNSUPPORTED = 4,     // this library was exported without a kernel for the configuration
  GQA_ERROR_WORKSPACE = 5,       // the workspace is missing, too small or misaligned
  GQA_ERROR_NO_DRIVER = 6,       // no libcuda, too old a one, or no GPU
  GQA_ERROR_DEVICE = 7,          // the GPU is too old, or none of those exported for
  GQA_ERROR_LAUNCH = 8           // the driver refused to load or to launch a kernel
} gqa_status;

typedef enum gqa_dtype { GQA_FLOAT16 = 0, GQA_BFLOAT16 = 1 } gqa_dtype;

typedef struct GQADecodeConfig {
  int32_t batch_size;     // sequences, 1 to 65535
  int32_t cache_len;      // tokens in every sequence's cache before the step, 0 to max_seq_len - 1
  int32_t num_q_heads;    // a multiple of num_kv_heads
  int32_t num_kv_heads;   //
  int32_t head_dim;       // a multiple of 8 from 32 to 256
  float scale;            // factor on the scores, usually 1 / sqrt(head_dim)
  int32_t max_seq_len;    // tokens that the cache can hold per sequence
  int32_t dtype;          // gqa_dtype of every tensor
  void* workspace;        // device memory of this size; may be null where gqa_workspace_size is 0
  size_t workspace_size;  // bytes
} GQADecodeConfig;

// One decode step. Tensors are contiguous, in device memory, and do not share memory.
//
//   output      [batch_size, 1, num_q_heads * head_dim], written
//   q           [batch_size, 1, num_q_heads, head_dim]
//   k, v        [batch_size, 1, num_kv_heads, head_dim], the new token
//   kv_cache_k  [batch_size, max_seq_len, num_kv_heads, head_dim], written at position cache_len
//   kv_cache_v  likewise
//   stream      where to launch; null: the default stream. Its context must be current (or none at
//               all: then the primary context of device 0 becomes current, as in the CUDA runtime)
//
// Launches one kernel and returns without waiting for it. Allocates nothing. Can be captured into a
// CUDA graph; call gqa_prepare before, which loads the kernel. Unless it returns GQA_SUCCESS,
// nothing was launched and nothing written. Launches that may run at the same time need workspaces
// of their own.
GQA_API gqa_status gqa_attention_decode(void* output, void const* q, void const* k, void const* v,
                                        void* kv_cache_k, void* kv_cache_v,
                                        GQADecodeConfig const* config, gqa_stream_t stream);

// The same for sequences of different lengths, which stay on the device: config->cache_len is
// ignored.
//
//   cache_seqlens  int32 [batch_size] in device memory, tokens in each cache before the step
//   overflow       int32 [1] that the device can write (mapped host memory will do): receives
//                  1 + the index of a sequence that the new token does not fit into, or whose
//                  length is negative, and is left alone when there is none. That sequence's output
//                  is NaN and its cache is untouched; the others are right.
GQA_API gqa_status gqa_attention_decode_ragged(void* output, void const* q, void const* k,
                                               void const* v, void* kv_cache_k, void* kv_cache_v,
                                               int32_t const* cache_seqlens, int32_t* overflow,
                                               GQADecodeConfig const* config, gqa_stream_t stream);

// Bytes of workspace for either function with such a configuration, whatever cache_len is, on the
// current device; may be 0. The memory must be zero before its first use, aligned to 16 bytes, and
// can then serve any configuration that it is large enough for, without being zeroed again.
GQA_API gqa_status gqa_workspace_size(GQADecodeConfig const* config, size_t* bytes);

// Loads the kernels that either function would launch for tensors aligned to 16 bytes, on the
// current device.
GQA_API gqa_status gqa_prepare(GQADecodeConfig const* config);

// What would be launched.
typedef struct gqa_launch {
  char const* kernel;  // its name
  uint32_t grid[3];
  uint32_t cluster;  // blocks of a cluster, along y
  uint32_t block;    // threads
  uint32_t shared_bytes;
  int32_t num_splits;
  int32_t num_stages;
  size_t workspace_size;  // bytes that this launch uses
} gqa_launch;

// Says what would be launched for 16-byte aligned tensors, on a GPU that need not be there.
//
//   arch     a target that was exported, "sm_90a" for instance
//   num_sms  the GPU's multiprocessors
//   ragged   not zero: by gqa_attention_decode_ragged
GQA_API gqa_status gqa_explain(GQADecodeConfig const* config, char const* arch, int32_t num_sms,
                               int32_t ragged, gqa_launch* launch);

// What went wrong in this thread's last call that did not return GQA_SUCCESS: what it was, what was
// given, what is allowed, what to do. Valid until the thread's next such call.
GQA_API const char* gqa_last_error(void);

// A status' name.
GQA_API const char* gqa_status_name(gqa_status status);

// Receives one line per launch, "launch key=value key=value ..."; null (the default): none. Called
// from the launching thread, which must not launch from within it. A launch that is under way on
// another thread may still call what has just been replaced.
typedef void (*gqa_log_callback)(char const* line, void* user);
GQA_API void gqa_set_log_callback(gqa_log_callback callback, void* user);

// The kernels in this library, 0 to gqa_kernel_count() - 1.
GQA_API int32_t gqa_kernel_count(void);
GQA_API const char* gqa_kernel_name(int32_t index);  // null beyond the last

// The targets that they were compiled for, "sm_90a" for instance, from 0 on; null beyond the last.
GQA_API const char* gqa_arch_name(int32_t index);

#ifdef __cplusplus
}  // extern "C"

// With a reference and a default stream.
inline gqa_status gqa_attention_decode(void* output, void const* q, void const* k, void const* v,
                                       void* kv_cache_k, void* kv_cache_v,
                                       GQADecodeConfig const& config,
                                       gqa_stream_t stream = nullptr) {
  return gqa_attention_decode(output, q, k, v, kv_cache_k, kv_cache_v, &config, stream);
}
#endif

#endif  // GQA_ATTENTION_DECODE_H_
