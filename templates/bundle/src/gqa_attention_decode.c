#include "gqa_attention_decode.h"

#include <math.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "gqa_dispatch.h"
#include "gqa_driver.h"
#include "gqa_kernels.h"
#include "gqa_params.h"

enum { kMaxDevices = 64, kElementBytes = 2, kAlignment = 16 };

// Counters come first in the workspace and have room of a fixed size, so that one configuration's
// partial outputs never lie where another's counters are, which must stay zero.
enum { kTicketBytes = 65536 };

static double const kLog2E = 1.4426950408889634;
static double const kMaxCacheBytes = 140737488355328.0;  // 2^47: sums of sizes stay in 64 bits

typedef struct loaded_kernel {
  gqa_cu_library library;
  gqa_cu_kernel kernel;
  uint64_t devices;  // one bit for each that it is ready on
} loaded_kernel;

typedef struct known_device {
  int32_t known;
  gqa_target target;
} known_device;

// A call's tensors.
typedef struct tensors {
  void* out;
  void const* q;
  void const* k;
  void const* v;
  void* k_cache;
  void* v_cache;
  int32_t const* seqlens;
  int32_t* overflow;
} tensors;

// What was chosen last on this thread, and for what: choosing again takes microseconds.
typedef struct choice {
  gqa_problem problem;
  gqa_target target;
  gqa_dispatch chosen;
} choice;

static loaded_kernel loaded[kGqaMaxKernels];
static known_device known_devices[kMaxDevices];
static pthread_mutex_t loading = PTHREAD_MUTEX_INITIALIZER;
static pthread_mutex_t logging = PTHREAD_MUTEX_INITIALIZER;
static gqa_log_callback log_callback;
static void* log_user;
static __thread char last_error[768];
static __thread choice last_choice;

#if defined(__GNUC__)
__attribute__((format(printf, 2, 3)))
#endif
static gqa_status fail(gqa_status status, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(last_error, sizeof last_error, format, arguments);
  va_end(arguments);
  return status;
}

static gqa_status fail_in_driver(gqa_driver const* driver, gqa_cu_result error, gqa_status status,
                                 char const* doing, char const* what) {
  char const* name = NULL;
  char const* text = NULL;
  driver->error_name(error, &name);
  driver->error_text(error, &text);
  return fail(status, "%s %s: %s (%s). Nothing was launched.", doing, what,
              name == NULL ? "unknown error" : name, text == NULL ? "no description" : text);
}

static gqa_status fail_range(char const* what, long long got, long long from, long long to) {
  return fail(GQA_ERROR_INVALID_VALUE,
              "config: %s: got %lld; allowed: %lld to %lld. Nothing was launched.", what, got, from,
              to);
}

// The sizes and the scale.
static gqa_status check_config(GQADecodeConfig const* config) {
  gqa_limits const* limits = &gqa_config_limits;
  if (config == NULL) {
    return fail(GQA_ERROR_NULL_POINTER,
                "config: got null; needed: a GQADecodeConfig. Nothing was launched.");
  }
  if (config->batch_size < 1 || config->batch_size > limits->max_batch) {
    return fail_range("batch_size", config->batch_size, 1, limits->max_batch);
  }
  if (config->max_seq_len < 1 || config->max_seq_len > limits->max_seq_len) {
    return fail_range("max_seq_len", config->max_seq_len, 1, limits->max_seq_len);
  }
  if (config->head_dim < limits->min_head_dim || config->head_dim > limits->max_head_dim ||
      config->head_dim % limits->head_dim_step != 0) {
    return fail(GQA_ERROR_INVALID_VALUE,
                "config: head_dim: got %d; allowed: multiples of %d from %d to %d. Nothing was "
                "launched. Pad q, k, v and the cache with zeros.",
                config->head_dim, limits->head_dim_step, limits->min_head_dim,
                limits->max_head_dim);
  }
  if (config->num_kv_heads < 1 || config->num_q_heads < 1 ||
      config->num_q_heads % config->num_kv_heads != 0) {
    return fail(GQA_ERROR_INVALID_VALUE,
                "config: heads: got %d query heads and %d KV heads; allowed: a number of query "
                "heads that is a multiple of the number of KV heads. Nothing was launched.",
                config->num_q_heads, config->num_kv_heads);
  }
  if (config->num_q_heads / config->num_kv_heads > limits->max_group_size) {
    return fail_range("query heads per KV head", config->num_q_heads / config->num_kv_heads, 1,
                      limits->max_group_size);
  }
  if (!(fabs((double)config->scale) <= (double)limits->max_scale)) {
    return fail(GQA_ERROR_INVALID_VALUE,
                "config: scale: got %g; allowed: a number from %g to %g, usually 1 / "
                "sqrt(head_dim). Nothing was launched.",
                (double)config->scale, -(double)limits->max_scale, (double)limits->max_scale);
  }
  if (config->dtype != GQA_FLOAT16 && config->dtype != GQA_BFLOAT16) {
    return fail(GQA_ERROR_INVALID_VALUE,
                "config: dtype: got %d; allowed: GQA_FLOAT16 (0), GQA_BFLOAT16 (1). Nothing was "
                "launched.",
                config->dtype);
  }
  double const rows = (double)config->batch_size * config->max_seq_len * config->num_kv_heads;
  if (rows * config->head_dim * kElementBytes > kMaxCacheBytes) {
    return fail(
        GQA_ERROR_INVALID_VALUE,
        "config: sizes: got caches of %.4g bytes; allowed: up to %.4g. Nothing was launched.",
        rows * config->head_dim * kElementBytes, kMaxCacheBytes);
  }
  return GQA_SUCCESS;
}

static gqa_status check_length(GQADecodeConfig const* config) {
  if (config->cache_len < 0) {
    return fail_range("cache_len", config->cache_len, 0, config->max_seq_len - 1);
  }
  if (config->cache_len >= config->max_seq_len) {
    return fail(GQA_ERROR_CACHE_OVERFLOW,
                "cache overflow: the cache holds %d tokens and one is to be appended; max_seq_len "
                "is %d. Nothing was written. Evict tokens, or allocate a larger cache.",
                config->cache_len, config->max_seq_len);
  }
  return GQA_SUCCESS;
}

static int overlap(void const* a, int64_t a_bytes, void const* b, int64_t b_bytes) {
  uintptr_t const first = (uintptr_t)a, second = (uintptr_t)b;
  return first < second + (uintptr_t)b_bytes && second < first + (uintptr_t)a_bytes;
}

static gqa_status fail_in_cache(char const* name, char const* cache) {
  return fail(
      GQA_ERROR_INVALID_VALUE,
      "%s: got memory of %s, to which the new token is written; allowed: memory of its own. "
      "Nothing was launched.",
      name, cache);
}

static int64_t query_bytes(GQADecodeConfig const* config) {
  return (int64_t)config->batch_size * config->num_q_heads * config->head_dim * kElementBytes;
}

static gqa_status check_tensors(GQADecodeConfig const* config, tensors const* t) {
  int64_t const rows = (int64_t)config->batch_size * config->num_kv_heads;
  int64_t const token = rows * config->head_dim * kElementBytes;
  int64_t const query = query_bytes(config);
  int64_t const cache = token * config->max_seq_len;
  char const* names[] = {"output", "q", "k", "v", "kv_cache_k", "kv_cache_v"};
  void const* addresses[] = {t->out, t->q, t->k, t->v, t->k_cache, t->v_cache};
  int64_t const bytes[] = {query, query, token, token, cache, cache};
  for (int i = 0; i < 6; ++i) {
    if (addresses[i] == NULL) {
      return fail(GQA_ERROR_NULL_POINTER,
                  "%s: got null; needed: device memory of %lld bytes. "
                  "Nothing was launched.",
                  names[i], (long long)bytes[i]);
    }
    if ((uintptr_t)addresses[i] % kElementBytes != 0) {
      return fail(GQA_ERROR_INVALID_VALUE,
                  "%s: got address %p; allowed: multiples of %d. Nothing "
                  "was launched.",
                  names[i], addresses[i], kElementBytes);
    }
    if (i > 0 && overlap(t->out, query, addresses[i], bytes[i])) {
      return fail(GQA_ERROR_INVALID_VALUE,
                  "output: got memory that %s also uses; allowed: memory "
                  "of its own. Nothing was launched.",
                  names[i]);
    }
  }
  if (overlap(t->k_cache, cache, t->v_cache, cache)) {
    return fail(GQA_ERROR_INVALID_VALUE,
                "kv_cache_v: got memory that kv_cache_k also uses; "
                "allowed: two caches that do not share memory. Nothing was launched.");
  }
  for (int i = 1; i < 4; ++i) {  // q, k and v are read while the new token is written
    for (int j = 4; j < 6; ++j) {
      if (overlap(addresses[i], bytes[i], addresses[j], bytes[j])) {
        return fail_in_cache(names[i], names[j]);
      }
    }
  }
  return GQA_SUCCESS;
}

static gqa_status check_lengths(GQADecodeConfig const* config, tensors const* t) {
  int64_t const query = query_bytes(config);
  if (t->seqlens == NULL || t->overflow == NULL) {
    return fail(GQA_ERROR_NULL_POINTER,
                "%s: got null; needed: device memory of %lld bytes. Nothing "
                "was launched.",
                t->seqlens == NULL ? "cache_seqlens" : "overflow",
                t->seqlens == NULL ? 4LL * config->batch_size : 4LL);
  }
  if ((uintptr_t)t->seqlens % 4 != 0 || (uintptr_t)t->overflow % 4 != 0) {
    return fail(GQA_ERROR_INVALID_VALUE,
                "cache_seqlens and overflow: got addresses %p and %p; "
                "allowed: multiples of 4. Nothing was launched.",
                (void const*)t->seqlens, (void const*)t->overflow);
  }
  if (overlap(t->out, query, t->seqlens, 4 * (int64_t)config->batch_size)) {
    return fail(GQA_ERROR_INVALID_VALUE,
                "output: got memory that cache_seqlens also uses; allowed: "
                "memory of its own. Nothing was launched.");
  }
  int64_t const rows = (int64_t)config->batch_size * config->max_seq_len * config->num_kv_heads;
  int64_t const cache = rows * config->head_dim * kElementBytes;
  void const* caches[] = {t->k_cache, t->v_cache};
  for (int i = 0; i < 2; ++i) {
    if (overlap(t->seqlens, 4 * (int64_t)config->batch_size, caches[i], cache)) {
      return fail_in_cache("cache_seqlens", i == 0 ? "kv_cache_k" : "kv_cache_v");
    }
  }
  return GQA_SUCCESS;
}

// Widest access, in elements, that every address allows; rows are contiguous and multiples of 8.
static int32_t vector_width(tensors const* t) {
  uintptr_t const bits = (uintptr_t)t->out | (uintptr_t)t->q | (uintptr_t)t->k | (uintptr_t)t->v |
                         (uintptr_t)t->k_cache | (uintptr_t)t->v_cache;
  int32_t width = 8;
  while (width > 1 && bits % ((uintptr_t)width * kElementBytes) != 0) width /= 2;
  return width;
}

static gqa_problem describe(GQADecodeConfig const* config, int32_t vec_width, int ragged) {
  gqa_problem problem;
  memset(&problem, 0, sizeof problem);  // padding too: problems are compared as bytes
  problem.batch_size = config->batch_size;
  problem.num_q_heads = config->num_q_heads;
  problem.num_kv_heads = config->num_kv_heads;
  problem.head_dim = config->head_dim;
  problem.max_seq_len = config->max_seq_len;
  problem.dtype = config->dtype;
  problem.vec_width = vec_width;
  problem.ragged = ragged;
  return problem;
}

static gqa_status choose(gqa_problem const* problem, gqa_target const* target,
                         gqa_dispatch* chosen) {
  choice* last = &last_choice;
  if (last->chosen.kernel != NULL && memcmp(&last->problem, problem, sizeof *problem) == 0 &&
      memcmp(&last->target, target, sizeof *target) == 0) {
    *chosen = last->chosen;
    return GQA_SUCCESS;
  }
  if (!gqa_choose(problem, target, chosen)) {
    return fail(
        GQA_ERROR_UNSUPPORTED,
        "no kernel for %s, head_dim %d, %d query heads per KV head, rows aligned to %d "
        "bytes, on %s; this library was exported with %d kernels (gqa_kernel_name). Nothing "
        "was launched. Export one that has it: gqa-cutlass export --kernels ...",
        problem->dtype == GQA_FLOAT16 ? "float16" : "bfloat16", (int)problem->head_dim,
        (int)(problem->num_q_heads / problem->num_kv_heads), problem->vec_width * kElementBytes,
        gqa_archs[target->arch].name, gqa_num_kernels);
  }
  if (chosen->num_tickets * 4 > kTicketBytes) {
    return fail(GQA_ERROR_UNSUPPORTED,
                "%lld merges in one launch; allowed: %d. Nothing was "
                "launched. Use fewer sequences at a time.",
                (long long)chosen->num_tickets, kTicketBytes / 4);
  }
  last->problem = *problem;
  last->target = *target;
  last->chosen = *chosen;
  return GQA_SUCCESS;
}

static size_t workspace_of(gqa_dispatch const* chosen) {
  if (chosen->num_tickets == 0) return 0;
  return kTicketBytes + sizeof(float) * (size_t)chosen->partial_floats;
}

static gqa_status check_workspace(GQADecodeConfig const* config, gqa_dispatch const* chosen) {
  size_t const needed = workspace_of(chosen);
  if (needed == 0) return GQA_SUCCESS;
  if (config->workspace == NULL || config->workspace_size < needed) {
    return fail(
        GQA_ERROR_WORKSPACE,
        "workspace: got %zu bytes at %p; needed: %zu bytes of zeroed device memory. Nothing "
        "was launched. Ask gqa_workspace_size.",
        config->workspace_size, config->workspace, needed);
  }
  if ((uintptr_t)config->workspace % kAlignment != 0) {
    return fail(GQA_ERROR_WORKSPACE,
                "workspace: got address %p; allowed: multiples of %d. Nothing "
                "was launched.",
                config->workspace, kAlignment);
  }
  return GQA_SUCCESS;
}

static gqa_status find_driver(gqa_driver const** driver) {
  char const* reason;
  *driver = gqa_open_driver(&reason);
  if (*driver == NULL) {
    return fail(GQA_ERROR_NO_DRIVER,
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
    return fail_in_driver(driver, error, GQA_ERROR_NO_DRIVER, "entering", "the GPU");
  }
  return GQA_SUCCESS;
}

static gqa_status look_up(gqa_driver const* driver, gqa_cu_device device, gqa_target* target) {
  int major = 0, minor = 0, num_sms = 0;
  gqa_cu_result error = driver->attribute(&major, kCuComputeCapabilityMajor, device);
  if (error == kCuSuccess) error = driver->attribute(&minor, kCuComputeCapabilityMinor, device);
  if (error == kCuSuccess) error = driver->attribute(&num_sms, kCuMultiprocessors, device);
  if (error != kCuSuccess) {
    return fail_in_driver(driver, error, GQA_ERROR_NO_DRIVER, "asking for", "the GPU's kind");
  }
  int32_t const capability = 10 * major + minor;
  int32_t const least = gqa_config_limits.min_capability;
  target->arch = gqa_find_arch(capability);
  target->num_sms = num_sms;
  if (capability < least) {
    return fail(GQA_ERROR_DEVICE,
                "GPU of compute capability %d.%d: too old; allowed: %d.%d and "
                "newer. Nothing was launched.",
                major, minor, least / 10, least % 10);
  }
  if (target->arch < 0) {
    return fail(GQA_ERROR_DEVICE,
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

// What the current device is.
static gqa_status find_current(gqa_driver const** driver, gqa_cu_device* device,
                               gqa_target* target) {
  gqa_status status = find_driver(driver);
  if (status == GQA_SUCCESS) status = find_device(*driver, device);
  if (status == GQA_SUCCESS) status = find_target(*driver, *device, target);
  return status;
}

// Loads a kernel, if need be, and has it ready on a device. Under the lock.
static gqa_cu_result load(gqa_driver const* driver, gqa_kernel const* kernel, loaded_kernel* slot,
                          gqa_cu_device device) {
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
  error = driver->set_attribute(kCuMaxDynamicSharedBytes,
                                kernel->shared_bytes[kernel->num_stages - 1], slot->kernel, device);
  if (error != kCuSuccess) return error;
  return driver->function(&function, slot->kernel);  // loads it into the context
}

// Other threads' captures must not keep it from loading, nor its loading break them.
static gqa_cu_result load_relaxed(gqa_driver const* driver, gqa_kernel const* kernel,
                                  loaded_kernel* slot, gqa_cu_device device) {
  int mode = kCuCaptureRelaxed;
  gqa_cu_result error = driver->capture_mode(&mode);
  if (error != kCuSuccess) return error;
  error = load(driver, kernel, slot, device);
  driver->capture_mode(&mode);
  return error;
}

static gqa_status find_function(gqa_driver const* driver, gqa_kernel const* kernel,
                                gqa_cu_device device, gqa_cu_kernel* function) {
  loaded_kernel* slot = &loaded[kernel - gqa_kernels];
  uint64_t const bit = device < kMaxDevices ? (uint64_t)1 << device : 0;
  gqa_cu_result error = kCuSuccess;
  if ((__atomic_load_n(&slot->devices, __ATOMIC_ACQUIRE) & bit) == 0) {
    pthread_mutex_lock(&loading);
    if ((slot->devices & bit) == 0) error = load_relaxed(driver, kernel, slot, device);
    if (error == kCuSuccess) __atomic_fetch_or(&slot->devices, bit, __ATOMIC_RELEASE);
    pthread_mutex_unlock(&loading);
  }
  if (error != kCuSuccess) {
    return fail_in_driver(driver, error, GQA_ERROR_LAUNCH, "loading", kernel->name);
  }
  *function = slot->kernel;
  return GQA_SUCCESS;
}

static gqa_params bind(GQADecodeConfig const* config, tensors const* t,
                       gqa_dispatch const* chosen) {
  int64_t const dim = config->head_dim;
  int64_t const token = config->num_kv_heads * dim;
  gqa_row_strides const query = {config->num_q_heads * dim, dim};
  gqa_row_strides const row = {token, dim};
  gqa_cache_strides const cache = {config->max_seq_len * token, token, dim};
  gqa_params params;
  memset(&params, 0, sizeof params);
  params.seqlens = t->seqlens;
  params.seqlen = t->seqlens == NULL ? config->cache_len : 0;
  params.prefetch_limit = t->seqlens == NULL ? config->cache_len
                          : chosen->early    ? config->max_seq_len
                                             : 0;
  params.max_seq_len = config->max_seq_len;
  params.num_splits = chosen->num_splits;
  params.num_stages = chosen->num_stages;
  params.q = t->q;
  params.q_stride = query;
  params.k_new = t->k;
  params.v_new = t->v;
  params.k_new_stride = row;
  params.v_new_stride = row;
  params.num_kv_heads = config->num_kv_heads;
  params.scale_log2 = (float)((double)config->scale * kLog2E);
  params.k_cache = t->k_cache;
  params.v_cache = t->v_cache;
  params.out = t->out;
  params.k_cache_stride = cache;
  params.v_cache_stride = cache;
  params.out_stride = query;
  params.status = t->overflow;
  if (chosen->num_tickets > 0) {
    params.tickets = (uint32_t*)config->workspace;
    params.partials = (float*)((char*)config->workspace + kTicketBytes);
  }
  return params;
}

// The tensor map of a cache: boxes of 64 dims; where head_dim is a multiple of that, it is two
// dimensions of the map, so that one copy brings whole rows.
static gqa_cu_result encode(gqa_driver const* driver, GQADecodeConfig const* config, void* cache,
                            int32_t block_n, gqa_tensor_map* map) {
  uint32_t const columns = (uint32_t)gqa_dispatch_model.box_dims;
  uint64_t const dim = (uint64_t)config->head_dim;
  uint64_t const heads = (uint64_t)config->num_kv_heads;
  uint64_t const tokens = (uint64_t)config->max_seq_len;
  uint64_t const batch = (uint64_t)config->batch_size;
  uint64_t const row = dim * kElementBytes, token = heads * row, sequence = tokens * token;
  uint32_t const ones[5] = {1, 1, 1, 1, 1};
  if (dim % columns == 0) {
    uint32_t const boxes = (uint32_t)(dim / columns);
    uint64_t const sizes[5] = {columns, tokens, boxes, heads, batch};
    uint64_t const strides[4] = {token, (uint64_t)columns * kElementBytes, row, sequence};
    uint32_t const box[5] = {columns, (uint32_t)block_n, boxes, 1, 1};
    return driver->encode(map, kCuTensorMapUint16, 5, cache, sizes, strides, box, ones, 0,
                          kCuTensorMapSwizzle128, 0, 0);
  }
  uint64_t const sizes[4] = {dim, tokens, heads, batch};
  uint64_t const strides[3] = {token, row, sequence};
  uint32_t const box[4] = {columns, (uint32_t)block_n, 1, 1};
  return driver->encode(map, kCuTensorMapUint16, 4, cache, sizes, strides, box, ones, 0,
                        kCuTensorMapSwizzle128, 0, 0);
}

static gqa_status launch(gqa_driver const* driver, GQADecodeConfig const* config, tensors const* t,
                         gqa_dispatch const* chosen, gqa_cu_kernel function, gqa_stream_t stream) {
  gqa_tma_params argument;
  void* pointers[1] = {&argument};
  gqa_cu_attribute cluster;
  gqa_cu_launch launched;
  gqa_cu_result error = kCuSuccess;
  argument.decode = bind(config, t, chosen);
  if (chosen->kernel->tma) {
    error = encode(driver, config, t->k_cache, chosen->kernel->block_n, &argument.keys);
    if (error == kCuSuccess) {
      error = encode(driver, config, t->v_cache, chosen->kernel->block_n, &argument.values);
    }
    if (error != kCuSuccess) {
      return fail_in_driver(driver, error, GQA_ERROR_LAUNCH, "describing", "the caches");
    }
  }
  memset(&cluster, 0, sizeof cluster);
  cluster.id = kCuClusterDimension;
  cluster.value[0] = 1;
  cluster.value[1] = chosen->cluster;
  cluster.value[2] = 1;
  memset(&launched, 0, sizeof launched);
  memcpy(launched.grid, chosen->grid, sizeof launched.grid);
  launched.block[0] = chosen->block;
  launched.block[1] = launched.block[2] = 1;
  launched.shared_bytes = chosen->shared_bytes;
  launched.stream = stream;
  launched.attributes = &cluster;
  launched.num_attributes = chosen->cluster > 1 ? 1 : 0;
  error = driver->launch(&launched, (void*)function, pointers, NULL);
  if (error != kCuSuccess) {
    return fail_in_driver(driver, error, GQA_ERROR_LAUNCH, "launching", chosen->kernel->name);
  }
  return GQA_SUCCESS;
}

static void log_launch(GQADecodeConfig const* config, tensors const* t, gqa_dispatch const* chosen,
                       gqa_cu_device device, gqa_stream_t stream) {
  char line[1024];
  char length[16] = "device";
  if (__atomic_load_n(&log_callback, __ATOMIC_ACQUIRE) == NULL) return;
  pthread_mutex_lock(&logging);
  gqa_log_callback const callback = log_callback;
  void* user = log_user;
  pthread_mutex_unlock(&logging);
  if (callback == NULL) return;
  if (t->seqlens == NULL) snprintf(length, sizeof length, "%d", config->cache_len);
  snprintf(line, sizeof line,
           "launch kernel=%s grid=%u,%u,%u cluster=1,%u,1 block=%u shared_bytes=%u num_splits=%d "
           "num_stages=%d dependent=False batch_size=%d num_q_heads=%d num_kv_heads=%d "
           "group_size=%d head_dim=%d max_seq_len=%d dtype=%s append=True cache_seqlens=%s "
           "softmax_scale=%.9g return_lse=False workspace_bytes=%zu device=%d stream=0x%llx",
           chosen->kernel->name, chosen->grid[0], chosen->grid[1], chosen->grid[2], chosen->cluster,
           chosen->block, chosen->shared_bytes, chosen->num_splits, chosen->num_stages,
           config->batch_size, config->num_q_heads, config->num_kv_heads,
           config->num_q_heads / config->num_kv_heads, config->head_dim, config->max_seq_len,
           config->dtype == GQA_FLOAT16 ? "f16" : "bf16", length, (double)config->scale,
           workspace_of(chosen), device, (unsigned long long)(uintptr_t)stream);
  callback(line, user);
}

// Everything behind the checks of what is passed.
static gqa_status decode(GQADecodeConfig const* config, tensors const* t, gqa_stream_t stream) {
  gqa_driver const* driver;
  gqa_cu_device device;
  gqa_target target;
  gqa_dispatch chosen;
  gqa_cu_kernel function;
  gqa_problem const problem = describe(config, vector_width(t), t->seqlens != NULL);
  gqa_status status = find_current(&driver, &device, &target);
  if (status == GQA_SUCCESS) status = choose(&problem, &target, &chosen);
  if (status == GQA_SUCCESS) status = check_workspace(config, &chosen);
  if (status == GQA_SUCCESS) status = find_function(driver, chosen.kernel, device, &function);
  if (status == GQA_SUCCESS) status = launch(driver, config, t, &chosen, function, stream);
  if (status == GQA_SUCCESS) log_launch(config, t, &chosen, device, stream);
  return status;
}

gqa_status gqa_attention_decode(void* output, void const* q, void const* k, void const* v,
                                void* kv_cache_k, void* kv_cache_v, GQADecodeConfig const* config,
                                gqa_stream_t stream) {
  tensors const t = {output, q, k, v, kv_cache_k, kv_cache_v, NULL, NULL};
  gqa_status status = check_config(config);
  if (status == GQA_SUCCESS) status = check_length(config);
  if (status == GQA_SUCCESS) status = check_tensors(config, &t);
  return status == GQA_SUCCESS ? decode(config, &t, stream) : status;
}

gqa_status gqa_attention_decode_ragged(void* output, void const* q, void const* k, void const* v,
                                       void* kv_cache_k, void* kv_cache_v,
                                       int32_t const* cache_seqlens, int32_t* overflow,
                                       GQADecodeConfig const* config, gqa_stream_t stream) {
  tensors const t = {output, q, k, v, kv_cache_k, kv_cache_v, cache_seqlens, overflow};
  gqa_status status = check_config(config);
  if (status == GQA_SUCCESS) status = check_tensors(config, &t);
  if (status == GQA_SUCCESS) status = check_lengths(config, &t);
  return status == GQA_SUCCESS ? decode(config, &t, stream) : status;
}

gqa_status gqa_workspace_size(GQADecodeConfig const* config, size_t* bytes) {
  gqa_driver const* driver;
  gqa_cu_device device;
  gqa_target target;
  gqa_dispatch chosen;
  size_t largest = 0;
  gqa_status status = check_config(config);
  if (status != GQA_SUCCESS) return status;
  if (bytes == NULL) {
    return fail(GQA_ERROR_NULL_POINTER, "bytes: got null; needed: where to write the size.");
  }
  status = find_current(&driver, &device, &target);
  for (int32_t width = 8; status == GQA_SUCCESS && width >= 1; width /= 2) {
    for (int ragged = 0; status == GQA_SUCCESS && ragged < 2; ++ragged) {
      gqa_problem const problem = describe(config, width, ragged);
      if (width < 8 && !gqa_choose(&problem, &target, &chosen)) continue;  // no narrower kernels
      status = choose(&problem, &target, &chosen);
      if (status == GQA_SUCCESS && workspace_of(&chosen) > largest) largest = workspace_of(&chosen);
    }
  }
  if (status == GQA_SUCCESS) *bytes = largest;
  return status;
}

gqa_status gqa_prepare(GQADecodeConfig const* config) {
  gqa_driver const* driver;
  gqa_cu_device device;
  gqa_target target;
  gqa_dispatch chosen;
  gqa_cu_kernel function;
  gqa_status status = check_config(config);
  if (status == GQA_SUCCESS) status = find_current(&driver, &device, &target);
  for (int ragged = 0; status == GQA_SUCCESS && ragged < 2; ++ragged) {
    gqa_problem const problem = describe(config, 8, ragged);
    status = choose(&problem, &target, &chosen);
    if (status == GQA_SUCCESS) status = find_function(driver, chosen.kernel, device, &function);
  }
  return status;
}

static int32_t find_arch(char const* name) {
  for (int32_t i = 0; i < gqa_num_archs; ++i) {
    if (strcmp(gqa_archs[i].name, name) == 0) return i;
  }
  return -1;
}

gqa_status gqa_explain(GQADecodeConfig const* config, char const* arch, int32_t num_sms,
                       int32_t ragged, gqa_launch* launched) {
  gqa_dispatch chosen;
  gqa_target target;
  gqa_problem problem;
  gqa_status status = check_config(config);
  if (status != GQA_SUCCESS) return status;
  if (arch == NULL || launched == NULL) {
    return fail(GQA_ERROR_NULL_POINTER, "arch and launch: got null; needed: both.");
  }
  memset(&target, 0, sizeof target);
  target.arch = find_arch(arch);
  target.num_sms = num_sms;
  if (target.arch < 0) {
    return fail(GQA_ERROR_INVALID_VALUE,
                "arch: got %.32s; allowed: what was exported, %s for "
                "instance.",
                arch, gqa_archs[0].name);
  }
  if (num_sms < 1) return fail_range("num_sms", num_sms, 1, INT32_MAX);
  problem = describe(config, 8, ragged != 0);
  status = choose(&problem, &target, &chosen);
  if (status != GQA_SUCCESS) return status;
  launched->kernel = chosen.kernel->name;
  memcpy(launched->grid, chosen.grid, sizeof launched->grid);
  launched->cluster = chosen.cluster;
  launched->block = chosen.block;
  launched->shared_bytes = chosen.shared_bytes;
  launched->num_splits = chosen.num_splits;
  launched->num_stages = chosen.num_stages;
  launched->workspace_size = workspace_of(&chosen);
  return GQA_SUCCESS;
}

char const* gqa_last_error(void) { return last_error; }

char const* gqa_status_name(gqa_status status) {
  static char const* const names[] = {"GQA_SUCCESS",
                                      "GQA_ERROR_NULL_POINTER",
                                      "GQA_ERROR_INVALID_VALUE",
                                      "GQA_ERROR_CACHE_OVERFLOW",
                                      "GQA_ERROR_UNSUPPORTED",
                                      "GQA_ERROR_WORKSPACE",
                                      "GQA_ERROR_NO_DRIVER",
                                      "GQA_ERROR_DEVICE",
                                      "GQA_ERROR_LAUNCH"};
  int const index = (int)status;
  return index >= 0 && index <= (int)GQA_ERROR_LAUNCH ? names[index] : "unknown status";
}

void gqa_set_log_callback(gqa_log_callback callback, void* user) {
  pthread_mutex_lock(&logging);
  log_user = user;
  __atomic_store_n(&log_callback, callback, __ATOMIC_RELEASE);
  pthread_mutex_unlock(&logging);
}

int32_t gqa_kernel_count(void) { return gqa_num_kernels; }

char const* gqa_kernel_name(int32_t index) {
  return index >= 0 && index < gqa_num_kernels ? gqa_kernels[index].name : NULL;
}

char const* gqa_arch_name(int32_t index) {
  return index >= 0 && index < gqa_num_archs ? gqa_archs[index].name : NULL;
}
