// One decode step on made-up data, checked against attention in double precision on the CPU.
//
//   decode BATCH Q_HEADS KV_HEADS HEAD_DIM CACHE_LEN MAX_SEQ_LEN f16|bf16
//
// Prints the kernel, hashes of the output and of the caches, and the error. Exits with 0 when all
// is right, 1 when not, 2 for bad arguments, 77 where there is no usable GPU.
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "device.h"
#include "gqa_attention_decode.h"

enum { kQ = 1, kK = 2, kV = 3, kCacheK = 4, kCacheV = 5, kNoGpu = 77 };

// Element `index` of the tensor `seed`, in [-1, 1): a multiple of 1/128, exact in both types.
static double element(uint64_t seed, uint64_t index) {
  uint64_t z = ((seed << 40) + index + 1) * 0x9E3779B97F4A7C15u;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  z ^= z >> 31;
  return ((double)(z >> 56) - 128.0) / 128.0;
}

static uint16_t to_bf16(double value) {
  float const single = (float)value;
  uint32_t bits;
  memcpy(&bits, &single, sizeof bits);
  return (uint16_t)(bits >> 16);
}

// Of a number that float16 holds exactly.
static uint16_t to_f16(double value) {
  int exponent;
  double const fraction = frexp(fabs(value), &exponent);  // in [0.5, 1)
  uint16_t const sign = value < 0 ? 0x8000 : 0;
  if (value == 0) return sign;
  return (uint16_t)(sign | ((exponent + 14) << 10) | ((int)(fraction * 2048.0) & 1023));
}

static double from_bits(uint16_t bits, int dtype) {
  if (dtype == GQA_BFLOAT16) {
    uint32_t const wide = (uint32_t)bits << 16;
    float single;
    memcpy(&single, &wide, sizeof single);
    return single;
  }
  int const exponent = bits >> 10 & 31;
  double const fraction = bits & 1023;
  double magnitude = ldexp(fraction + 1024.0, exponent - 25);
  if (exponent == 0) magnitude = ldexp(fraction, -24);
  if (exponent == 31) magnitude = fraction == 0 ? (double)INFINITY : (double)NAN;
  return bits & 0x8000 ? -magnitude : magnitude;
}

static uint16_t* make(uint64_t seed, size_t count, int dtype) {
  uint16_t* made = (uint16_t*)malloc(count * sizeof *made);
  for (size_t i = 0; made != NULL && i < count; ++i) {
    double const value = element(seed, i);
    made[i] = dtype == GQA_BFLOAT16 ? to_bf16(value) : to_f16(value);
  }
  if (made == NULL) exit(1);
  return made;
}

// FNV-1a
static uint64_t hash(uint64_t state, void const* data, size_t bytes) {
  unsigned char const* byte = (unsigned char const*)data;
  for (size_t i = 0; i < bytes; ++i) state = (state ^ byte[i]) * 0x100000001B3u;
  return state;
}

static uint64_t const kHashStart = 0xCBF29CE484222325u;

// Row of the cache, or the new token's, that sequence `b` has at a position.
static double row_element(GQADecodeConfig const* c, uint64_t cache, uint64_t token, int b,
                          int position, int head, int dim) {
  uint64_t const row = (uint64_t)head * c->head_dim + dim;
  uint64_t const width = (uint64_t)c->num_kv_heads * c->head_dim;
  if (position == c->cache_len) return element(token, (uint64_t)b * width + row);
  return element(cache, ((uint64_t)b * c->max_seq_len + position) * width + row);
}

// Attention of one query head, and the largest difference of the output from it.
static double check_head(GQADecodeConfig const* c, uint16_t const* output, int b, int q_head,
                         double* weights) {
  int const head = q_head / (c->num_q_heads / c->num_kv_heads);
  uint64_t const q = ((uint64_t)b * c->num_q_heads + q_head) * c->head_dim;
  double largest = -INFINITY, sum = 0, worst = 0;
  for (int t = 0; t <= c->cache_len; ++t) {
    weights[t] = 0;
    for (int d = 0; d < c->head_dim; ++d) {
      weights[t] += element(kQ, q + d) * row_element(c, kCacheK, kK, b, t, head, d);
    }
    weights[t] *= c->scale;
    largest = weights[t] > largest ? weights[t] : largest;
  }
  for (int t = 0; t <= c->cache_len; ++t) sum += weights[t] = exp(weights[t] - largest);
  for (int d = 0; d < c->head_dim; ++d) {
    double expected = 0;
    for (int t = 0; t <= c->cache_len; ++t) {
      expected += weights[t] / sum * row_element(c, kCacheV, kV, b, t, head, d);
    }
    double const error = fabs(from_bits(output[q + d], c->dtype) - expected);
    if (!(error <= worst)) worst = error;  // a NaN counts
  }
  return worst;
}

static double check(GQADecodeConfig const* c, uint16_t const* output) {
  double* weights = (double*)malloc(sizeof *weights * ((size_t)c->cache_len + 1));
  double worst = 0;
  if (weights == NULL) exit(1);
  for (int b = 0; b < c->batch_size; ++b) {
    for (int head = 0; head < c->num_q_heads; ++head) {
      double const error = check_head(c, output, b, head, weights);
      if (!(error <= worst)) worst = error;
    }
  }
  free(weights);
  return worst;
}

// Whether a cache holds what it held before, and the new token at its position.
static int check_cache(GQADecodeConfig const* c, uint16_t const* after, uint64_t cache,
                       uint64_t token) {
  size_t const width = (size_t)c->num_kv_heads * c->head_dim;
  size_t const rows = (size_t)c->batch_size * c->max_seq_len;
  for (size_t i = 0; i < rows * width; ++i) {
    size_t const row = i / width, b = row / c->max_seq_len;
    int const appended = row % c->max_seq_len == (size_t)c->cache_len;
    double const expected = appended ? element(token, b * width + i % width) : element(cache, i);
    if (from_bits(after[i], c->dtype) != expected) return 0;
  }
  return 1;
}

static void print_kernel(char const* line, void* user) {
  char const* name = strstr(line, "kernel=");
  (void)user;
  if (name != NULL) printf("kernel %.*s\n", (int)strcspn(name + 7, " "), name + 7);
}

static int fail(gqa_status status) {
  fprintf(stderr, "%s: %s\n", gqa_status_name(status), gqa_last_error());
  return status == GQA_ERROR_NO_DRIVER || status == GQA_ERROR_DEVICE ? kNoGpu : 1;
}

static int run(GQADecodeConfig* c) {
  size_t const query = (size_t)c->batch_size * c->num_q_heads * c->head_dim;
  size_t const token = (size_t)c->batch_size * c->num_kv_heads * c->head_dim;
  size_t const cache = token * c->max_seq_len, size = sizeof(uint16_t);
  gqa_status status = gqa_workspace_size(c, &c->workspace_size);
  if (status != GQA_SUCCESS) return fail(status);
  uint16_t* host[] = {make(kQ, query, c->dtype),      make(kK, token, c->dtype),
                      make(kV, token, c->dtype),      make(kCacheK, cache, c->dtype),
                      make(kCacheV, cache, c->dtype), (uint16_t*)calloc(query, size)};
  size_t const counts[] = {query, token, token, cache, cache, query};
  void* gpu[6];
  for (int i = 0; i < 6; ++i) gpu[i] = device_copy(host[i], counts[i] * size);
  c->workspace = device_copy(NULL, c->workspace_size);
  gqa_set_log_callback(print_kernel, NULL);
  status = gqa_attention_decode(gpu[5], gpu[0], gpu[1], gpu[2], gpu[3], gpu[4], c, NULL);
  if (status != GQA_SUCCESS) return fail(status);
  device_check(device.wait(), "waiting for the kernel");
  for (int i = 3; i < 6; ++i) device_read(host[i], gpu[i], counts[i] * size);
  double const error = check(c, host[5]), allowed = c->dtype == GQA_BFLOAT16 ? 1.6e-2 : 2e-3;
  int const appended = check_cache(c, host[3], kCacheK, kK) && check_cache(c, host[4], kCacheV, kV);
  uint64_t const caches = hash(hash(kHashStart, host[3], cache * size), host[4], cache * size);
  printf("output %016llx\n", (unsigned long long)hash(kHashStart, host[5], query * size));
  printf("cache %016llx\n", (unsigned long long)caches);
  printf("error %.3e allowed %.3e\n", error, allowed);
  if (!appended) fprintf(stderr, "the caches do not hold what they should\n");
  for (int i = 0; i < 6; ++i) device_free(gpu[i]), free(host[i]);
  device_free(c->workspace);
  return error <= allowed && appended ? 0 : 1;
}

int main(int argc, char** argv) {
  GQADecodeConfig config = GQA_DECODE_CONFIG_INIT;
  int32_t* const sizes[] = {&config.batch_size, &config.num_q_heads, &config.num_kv_heads,
                            &config.head_dim,   &config.cache_len,   &config.max_seq_len};
  if (argc != 8 || (strcmp(argv[7], "f16") != 0 && strcmp(argv[7], "bf16") != 0)) {
    fprintf(stderr, "usage: %s BATCH Q_HEADS KV_HEADS HEAD_DIM CACHE_LEN MAX_SEQ_LEN f16|bf16\n",
            argv[0]);
    return 2;
  }
  for (int i = 0; i < 6; ++i) {
    char* end;
    long const number = strtol(argv[i + 1], &end, 10);
    if (end == argv[i + 1] || *end != '\0' || number < INT32_MIN || number > INT32_MAX) {
      fprintf(stderr, "%s: got %s; allowed: whole numbers\n", argv[0], argv[i + 1]);
      return 2;
    }
    *sizes[i] = (int32_t)number;
  }
  config.dtype = strcmp(argv[7], "bf16") == 0 ? GQA_BFLOAT16 : GQA_FLOAT16;
  config.scale = (float)(1.0 / sqrt((double)config.head_dim));
  if (!device_open()) {
    fprintf(stderr, "no usable GPU: libcuda.so.1 or a device is missing\n");
    return kNoGpu;
  }
  return run(&config);
}
