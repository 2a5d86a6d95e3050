// Decode steps on addresses that nobody reads, with the driver of fake_cuda.c.
//
//   c_steps count     prints how often calls in steady state allocate memory
//   c_steps threads   many threads' first calls at once, for the thread sanitizer
#define _GNU_SOURCE  // barriers, in C11
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "gqa_attention_decode.h"

enum { kThreads = 8, kCalls = 1000 };

void fake_set_load_microseconds(int time);
void fake_set_device(int ordinal, int capability, int num_sms);
void fake_enter(int ordinal);

static long volatile allocations;

#ifdef COUNT_ALLOCATIONS
void* __libc_malloc(size_t bytes);
void* __libc_calloc(size_t count, size_t bytes);
void* __libc_realloc(void* memory, size_t bytes);
void* __libc_memalign(size_t alignment, size_t bytes);

void* malloc(size_t bytes) {
  ++allocations;
  return __libc_malloc(bytes);
}

void* calloc(size_t count, size_t bytes) {
  ++allocations;
  return __libc_calloc(count, bytes);
}

void* realloc(void* memory, size_t bytes) {
  ++allocations;
  return __libc_realloc(memory, bytes);
}

void* aligned_alloc(size_t alignment, size_t bytes) {
  ++allocations;
  return __libc_memalign(alignment, bytes);
}
#endif

// Somewhere of its own for every tensor; `shift` bytes off a multiple of 16.
static void* address(int tensor, int shift) {
  return (void*)(((uintptr_t)(tensor + 1) << 40) + (uintptr_t)shift);
}

#define SIZES(bytes, batch, q_heads, kv_heads, dim, tokens, type) \
  {.struct_size = bytes,                                          \
   .batch_size = batch,                                           \
   .cache_len = 3,                                                \
   .num_q_heads = q_heads,                                        \
   .num_kv_heads = kv_heads,                                      \
   .head_dim = dim,                                               \
   .scale = 0.1f,                                                 \
   .max_seq_len = tokens,                                         \
   .dtype = type}

static GQADecodeConfig const clusters = SIZES(sizeof clusters, 1, 4, 1, 128, 4096, GQA_FLOAT16);
static GQADecodeConfig const plain = SIZES(sizeof plain, 2, 8, 2, 64, 30, GQA_BFLOAT16);

// What callers with other headers have, in memory of just that size.
typedef struct older_config {
  size_t struct_size;
  int32_t sizes[5];
  float scale;
  int32_t max_seq_len, dtype;
} older_config;

typedef struct newer_config {
  GQADecodeConfig known;
  int64_t unknown;
} newer_config;

typedef struct older_launch {
  size_t struct_size;
  char const* kernel;
} older_launch;

static older_config const older = {sizeof older, {2, 3, 8, 2, 64}, 0.1f, 30, GQA_BFLOAT16};
static newer_config const newer = {SIZES(sizeof newer, 2, 8, 2, 64, 30, GQA_BFLOAT16), 0};

static gqa_status step(GQADecodeConfig const* config, int shift, int ragged) {
  GQADecodeConfig given = *config;
  given.workspace = address(8, 0);
  given.workspace_size = (size_t)1 << 30;
  if (!ragged) {
    return gqa_attention_decode(address(0, shift), address(1, shift), address(2, shift),
                                address(3, shift), address(4, shift), address(5, shift), &given,
                                NULL);
  }
  return gqa_attention_decode_ragged(
      address(0, shift), address(1, shift), address(2, shift), address(3, shift), address(4, shift),
      address(5, shift), (int32_t const*)address(6, 0), (int32_t*)address(7, 0), &given, NULL);
}

static void check(gqa_status status) {
  if (status == GQA_SUCCESS) return;
  fprintf(stderr, "%s: %s\n", gqa_status_name(status), gqa_last_error());
  exit(1);
}

static void steps(void) {
  size_t bytes;
  older_launch told = {sizeof told, NULL};
  GQADecodeConfig strided = plain;
  strided.q_head_stride = 72;
  strided.q_batch_stride = 72 * 8;
  strided.kv_cache_k_token_stride = strided.kv_cache_v_token_stride = 64;
  strided.kv_cache_k_head_stride = strided.kv_cache_v_head_stride = 64 * 30;
  strided.lse = address(9, 0);
  strided.equal_lengths = strided.dependent = 1;
  check(step(&strided, 0, 0));
  check(step(&strided, 0, 1));
  check(step(&clusters, 0, 0));
  check(step(&clusters, 8, 0));
  check(step(&clusters, 0, 1));
  check(step(&plain, 0, 0));
  check(step(&plain, 0, 1));
  check(gqa_workspace_size(&clusters, &bytes));
  check(gqa_prepare(&plain));
  check(gqa_prepare((GQADecodeConfig const*)&older));
  check(gqa_prepare(&newer.known));
  check(gqa_explain(&newer.known, "sm_90a", 132, 0, (gqa_launch*)&told));
}

static void ignore(char const* line, void* user) { *(long*)user += line[0] == 'l'; }

static int count(void) {
  long lines = 0, before;
  gqa_set_log_callback(ignore, &lines);
  steps();
  before = allocations;
  for (int i = 0; i < kCalls; ++i) steps();
  printf("%d rounds, %ld lines, %ld allocations, %ld before\n", kCalls, lines, allocations - before,
         before);
  return 0;
}

static pthread_barrier_t ready;

static void ignore_line(char const* line, void* user) {
  (void)line;
  (void)user;
}

static void* run(void* argument) {
  int const index = (int)(intptr_t)argument;
  fake_enter(index % 2);
  pthread_barrier_wait(&ready);
  for (int i = 0; i < 20; ++i) {
    steps();
    if (index == 0) gqa_set_log_callback(i % 2 ? ignore_line : NULL, NULL);
    if (step(&plain, 1, 0) == GQA_SUCCESS) exit(1);
    if (strstr(gqa_last_error(), "multiples of 2") == NULL) exit(1);
  }
  return NULL;
}

static int threads(void) {
  pthread_t made[kThreads];
  fake_set_device(0, 90, 132);
  fake_set_device(1, 80, 108);
  fake_set_load_microseconds(500);
  pthread_barrier_init(&ready, NULL, kThreads);
  for (int i = 0; i < kThreads; ++i) pthread_create(&made[i], NULL, run, (void*)(intptr_t)i);
  for (int i = 0; i < kThreads; ++i) pthread_join(made[i], NULL);
  printf("%d threads\n", kThreads);
  return 0;
}

int main(int argc, char** argv) {
  if (argc == 2 && strcmp(argv[1], "count") == 0) return count();
  if (argc == 2 && strcmp(argv[1], "threads") == 0) return threads();
  return 2;
}
