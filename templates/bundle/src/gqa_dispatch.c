#include "gqa_dispatch.h"

#include <stdio.h>
#include <string.h>

#include "gqa_internal.h"
#include "gqa_kernels.h"

// How the blocks of a launch share a sequence.
typedef struct gqa_splits {
  int64_t splits;
  int64_t cluster;
  int32_t num_stages;
} gqa_splits;

// What was chosen last on this thread, and for what: choosing again takes microseconds.
typedef struct choice {
  gqa_problem problem;
  gqa_target target;
  gqa_dispatch chosen;
} choice;

static __thread choice last_choice;

static int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

static int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

static int64_t power_of_two(int64_t n) {
  int64_t power = 1;
  while (power < n) power *= 2;
  return power;
}

// Share of the workers' time used when equal pieces of work are dealt out in rounds.
static double share_used(int64_t work, int64_t workers) {
  return (double)work / (double)(ceil_div(work, workers) * workers);
}

int64_t gqa_row_blocks(gqa_kernel const* kernel, int64_t num_tokens) {
  return ceil_div(kernel->group_size * num_tokens, kernel->block_h);
}

// Blocks that share a split.
static int64_t columns_of(gqa_problem const* problem, gqa_kernel const* kernel) {
  return problem->num_kv_heads * gqa_row_blocks(kernel, problem->num_tokens);
}

// Whether a kernel has a wider access than another one, or else fewer blocks for all rows, or else
// smaller ones.
static int is_better(gqa_kernel const* kernel, gqa_kernel const* than, int64_t num_tokens) {
  if (than == NULL) return 1;
  if (kernel->vec_width != than->vec_width) return kernel->vec_width > than->vec_width;
  int64_t const blocks = gqa_row_blocks(kernel, num_tokens);
  int64_t const others = gqa_row_blocks(than, num_tokens);
  return blocks != others ? blocks < others : kernel->block_h < than->block_h;
}

// The kernel of a schedule with the widest access that the addresses allow; for a dependent launch,
// or for others.
static gqa_kernel const* find_kernel(gqa_problem const* problem, int32_t arch, int32_t tma,
                                     int32_t pdl) {
  gqa_kernel const* found = NULL;
  for (int32_t i = 0; i < gqa_num_kernels; ++i) {
    gqa_kernel const* kernel = &gqa_kernels[i];
    if (kernel->dtype == problem->dtype && kernel->head_dim == problem->head_dim &&
        kernel->head_dim_v == problem->head_dim_v &&
        kernel->group_size == problem->num_q_heads / problem->num_kv_heads && kernel->tma == tma &&
        kernel->pdl == pdl && kernel->features == problem->features &&
        problem->vec_width % kernel->vec_width == 0 && kernel->blocks_per_sm[arch] > 0 &&
        is_better(kernel, found, problem->num_tokens)) {
      found = kernel;
    }
  }
  return found;
}

// Tokens that are attended to in a full cache.
static int64_t reach(gqa_problem const* problem) {
  if (problem->window == 0) return problem->max_seq_len;
  return least(problem->window + problem->num_tokens - 1, problem->max_seq_len);
}

// Tiles that hold them: a window may begin and end within one.
static int64_t tiles_of(gqa_problem const* problem, gqa_kernel const* kernel) {
  int64_t const held = ceil_div(problem->max_seq_len, kernel->block_n);
  if (problem->window == 0) return held;
  return least(held, ceil_div(reach(problem) - 1, kernel->block_n) + 1);
}

static double cache_mib(gqa_problem const* problem) {
  int64_t const tokens = problem->batch_size * reach(problem);
  int64_t const dims = problem->head_dim + problem->head_dim_v;
  int64_t const pairs = tokens * problem->num_kv_heads * dims / gqa_packed(problem->features);
  return (double)(kElementBytes * pairs) / 1048576.0;
}

// Tensor copies for few heads; if caches are large, only of sequences that are as long.
static int prefers_tma(gqa_problem const* problem, gqa_kernel const* tma) {
  gqa_model const* model = &gqa_dispatch_model;
  int64_t const box = model->box_dims * gqa_packed(problem->features);
  int const whole_boxes = problem->head_dim % box == 0 && problem->head_dim_v % box == 0;
  double const limit = whole_boxes ? model->tma_mib : model->tma_mib_partial_boxes;
  double const mib = cache_mib(problem);
  if (problem->num_tokens > 1 && gqa_row_blocks(tma, problem->num_tokens) > 1) return 0;
  int64_t const heads = problem->num_kv_heads * problem->batch_size;
  int const alone = tiles_of(problem, tma) <= tma->num_warps;
  int const equal = problem->batch_size == 1 || !problem->ragged;
  int const pairs = equal && ceil_div(model->tma_blocks, heads) == 2 && mib > model->tma_pairs_mib;
  if (mib <= limit) return heads <= model->tma_heads && !alone && !pairs;
  return whole_boxes && heads <= model->tma_large_heads && equal;
}

static gqa_kernel const* choose_kernel(gqa_problem const* problem, int32_t arch, int32_t pdl) {
  gqa_kernel const* tma = find_kernel(problem, arch, 1, pdl);
  int const whole_pages = problem->page_size % gqa_dispatch_model.page_tokens == 0;
  if (tma != NULL && whole_pages && prefers_tma(problem, tma)) return tma;
  return find_kernel(problem, arch, 0, pdl);
}

// When the launch after this one may start, where it has been measured to pay.
static int32_t choose_pdl(gqa_problem const* problem, int32_t arch) {
  gqa_model const* model = &gqa_dispatch_model;
  double const mib = cache_mib(problem);
  if (!problem->dependent || !gqa_archs[arch].dependents || mib > model->pdl_end_mib) {
    return kGqaPdlNone;
  }
  return mib <= model->pdl_whole_mib ? kGqaPdlWhole : kGqaPdlEnd;
}

// Shared memory with which no more blocks fit on a multiprocessor than a launch has for each.
// Otherwise the next launch's blocks crowd where this one's ended first, and take longer. Where
// both launches find room side by side, nothing is asked for.
static uint32_t shared_bytes_alone(int64_t blocks, gqa_target const* target) {
  if (2 * blocks <= target->num_sms) return 0;
  int64_t const shares = ceil_div(blocks, target->num_sms) + 1;
  return (uint32_t)(gqa_archs[target->arch].shared_per_sm / shares);
}

// For large caches of many heads, or very few: a block for every multiprocessor.
static gqa_splits fill_with_clusters(int64_t heads, int64_t tiles, gqa_kernel const* kernel,
                                     gqa_target const* target) {
  gqa_model const* model = &gqa_dispatch_model;
  int const few = heads <= model->tma_few_heads;
  int64_t const cluster = few ? model->max_cluster : model->tma_large_cluster;
  int64_t const limit = tiles / (kernel->num_warps * cluster);
  int64_t const clusters = most(1, least(target->num_sms / (heads * cluster), limit));
  gqa_splits chosen;
  chosen.splits = clusters * cluster;
  chosen.cluster = cluster;
  chosen.num_stages = few ? 1 : kernel->num_stages;
  return chosen;
}

// As many blocks as keep memory busy and no more, in clusters; a second stage where warps walk
// several tiles.
static gqa_splits choose_clusters(gqa_problem const* problem, gqa_kernel const* kernel,
                                  gqa_target const* target) {
  gqa_model const* model = &gqa_dispatch_model;
  int64_t const heads = columns_of(problem, kernel) * problem->batch_size;
  int64_t const tiles = tiles_of(problem, kernel);
  int64_t const wanted = most(2, ceil_div(model->tma_blocks, heads));
  if (cache_mib(problem) > model->tma_mib && (wanted < 4 || heads <= model->tma_few_heads)) {
    return fill_with_clusters(heads, tiles, kernel, target);
  }
  int64_t const splits = power_of_two(least(wanted, ceil_div(tiles, kernel->num_warps)));
  int64_t const per_warp = ceil_div(tiles, splits * kernel->num_warps);
  int const deep = per_warp > 2 && heads * splits < 2 * model->tma_blocks;
  gqa_splits chosen;
  chosen.splits = splits;
  chosen.cluster = least(model->max_cluster, splits);
  chosen.num_stages = deep ? kernel->num_stages : 1;
  return chosen;
}

// Modelled microseconds to read the cache and merge the splits. Build with -ffp-contract=off: it
// rounds every product, as Python does.
static double read_cost(int64_t blocks, int64_t tiles, int64_t splits, gqa_kernel const* kernel,
                        gqa_target const* target) {
  gqa_model const* model = &gqa_dispatch_model;
  int64_t const bytes = blocks * tiles * kernel->tile_bytes;
  double const ideal =
      (double)bytes / ((double)target->num_sms * model->bytes_per_sm_and_microsecond);
  double const busy_warps = share_used(tiles, kernel->num_warps * splits);
  double const busy_sms = share_used(blocks * splits, target->num_sms);
  int64_t const resident =
      least(ceil_div(blocks * splits, target->num_sms), kernel->blocks_per_sm[target->arch]);
  double const in_flight = (double)(resident * kernel->bytes_in_flight) / model->bytes_in_flight;
  double const fed = in_flight < 1.0 ? in_flight : 1.0;
  double const busy = busy_warps * busy_sms * fed;
  double const reading = ideal / busy;
  double const merging = model->microseconds_per_split * (double)(splits - 1);
  return reading + merging;
}

// The cheapest number of splits for full caches: all blocks resident at once, a tile per warp.
static gqa_splits choose_splits(gqa_problem const* problem, gqa_kernel const* kernel,
                                gqa_target const* target) {
  int64_t const blocks = columns_of(problem, kernel) * problem->batch_size;
  int64_t const tiles = tiles_of(problem, kernel);
  int64_t const slots = (int64_t)target->num_sms * kernel->blocks_per_sm[target->arch];
  int64_t const limit = most(1, least(ceil_div(tiles, kernel->num_warps), slots / blocks));
  gqa_splits chosen = {1, 1, kernel->num_stages};
  double lowest = read_cost(blocks, tiles, 1, kernel, target);
  for (int64_t splits = 2; splits <= limit; ++splits) {
    double const cost = read_cost(blocks, tiles, splits, kernel, target);
    if (cost < lowest) {
      lowest = cost;
      chosen.splits = splits;
    }
  }
  return chosen;
}

// A row of blocks beyond the splits, so that ragged sequences can be cut by their lengths; or none.
static int64_t spare_splits(gqa_problem const* problem, gqa_kernel const* kernel,
                            gqa_target const* target) {
  gqa_model const* model = &gqa_dispatch_model;
  int64_t const blocks = columns_of(problem, kernel) * problem->batch_size;
  int64_t const slots = (int64_t)target->num_sms * kernel->blocks_per_sm[target->arch];
  int64_t const rounds = ceil_div(blocks, slots);
  return problem->ragged && !kernel->tma && problem->batch_size >= 2 &&
         problem->batch_size <= model->balanced_batch && reach(problem) >= model->balanced_tokens &&
         reach(problem) <= model->most_tiles / problem->batch_size &&
         rounds <= model->balanced_rounds;
}

// Whether warps should ask for their first tile before they know the length. It may reach into the
// row that another block appends meanwhile: asynchronous copies of it are of no consequence, but
// the loads by which single elements come (cp.async moves no less than four bytes) would race.
// Wide rows gain nothing where a warp has one tile.
static int may_prefetch_first_tile(gqa_problem const* problem, gqa_kernel const* kernel,
                                   int64_t splits) {
  gqa_model const* model = &gqa_dispatch_model;
  int const wide = kernel->tma && problem->head_dim_v > model->tma_early_dims;
  if (wide && tiles_of(problem, kernel) <= splits * kernel->num_warps) return 0;
  return kernel->vec_width > 1 && (kernel->features & kGqaNoPrefetch) == 0 &&
         cache_mib(problem) <= (kernel->tma ? model->tma_mib : model->prefetch_mib);
}

int gqa_choose(gqa_problem const* problem, gqa_target const* target, gqa_dispatch* chosen) {
  int32_t const pdl = choose_pdl(problem, target->arch);
  gqa_kernel const* kernel = choose_kernel(problem, target->arch, pdl != kGqaPdlNone);
  if (kernel == NULL) return 0;
  gqa_splits const splits = kernel->tma ? choose_clusters(problem, kernel, target)
                                        : choose_splits(problem, kernel, target);
  int64_t const spare = spare_splits(problem, kernel, target);
  int64_t const rows = splits.splits + spare;
  int64_t const num_partials = rows / splits.cluster;
  int64_t const columns = columns_of(problem, kernel);
  memset(chosen, 0, sizeof *chosen);
  chosen->kernel = kernel;
  chosen->grid[0] = (uint32_t)columns;
  chosen->grid[1] = (uint32_t)rows;
  chosen->grid[2] = (uint32_t)problem->batch_size;
  chosen->cluster = (uint32_t)splits.cluster;
  chosen->block = (uint32_t)kernel->num_warps * 32;
  chosen->shared_bytes = (uint32_t)kernel->shared_bytes[splits.num_stages - 1];
  if (pdl != kGqaPdlNone) {
    uint32_t const alone = shared_bytes_alone(columns * rows * problem->batch_size, target);
    if (alone > chosen->shared_bytes) chosen->shared_bytes = alone;
  }
  chosen->pdl = pdl;
  chosen->num_splits = (int32_t)splits.splits;
  chosen->num_stages = splits.num_stages;
  chosen->prefetch_first_tile =
      spare == 0 && may_prefetch_first_tile(problem, kernel, splits.splits);
  chosen->num_merge_counters =
      num_partials > 1 ? columns * problem->batch_size * splits.cluster : 0;
  chosen->partial_floats = chosen->num_merge_counters * num_partials * kernel->partial_floats;
  return 1;
}

int32_t gqa_find_arch(int32_t capability) {
  int32_t found = -1;
  for (int32_t i = 0; i < gqa_num_archs; ++i) {
    gqa_arch const* arch = &gqa_archs[i];
    int32_t const next_major = (arch->capability / 10 + 1) * 10;
    int const runs = arch->exact ? capability == arch->capability
                                 : arch->capability <= capability && capability < next_major;
    if (runs && (found < 0 || arch->capability > gqa_archs[found].capability)) found = i;
  }
  return found;
}

gqa_problem gqa_describe(GQADecodeConfig const* config, int32_t vec_width, int ragged) {
  gqa_problem problem;
  memset(&problem, 0, sizeof problem);  // padding too: problems are compared as bytes
  problem.batch_size = config->batch_size;
  problem.num_q_heads = config->num_q_heads;
  problem.num_kv_heads = config->num_kv_heads;
  problem.head_dim = config->head_dim;
  problem.head_dim_v = gqa_value_dim(config);
  problem.max_seq_len = config->max_seq_len;
  problem.dtype = config->dtype;
  problem.vec_width = vec_width;
  problem.ragged = ragged && !config->equal_lengths;
  problem.features = gqa_features_of(config);
  problem.dependent = config->dependent;
  problem.page_size = config->page_size;
  problem.num_tokens = gqa_query_tokens(config);
  if (config->window < config->max_seq_len) {
    problem.window = config->window;
  } else {
    problem.features &= ~kGqaSlidingWindow;  // a window that hides no token is none
  }
  return problem;
}

gqa_status gqa_find_kernel(gqa_problem const* problem, gqa_target const* target,
                           gqa_dispatch* chosen) {
  choice* last = &last_choice;
  if (last->chosen.kernel != NULL && memcmp(&last->problem, problem, sizeof *problem) == 0 &&
      memcmp(&last->target, target, sizeof *target) == 0) {
    *chosen = last->chosen;
    return GQA_SUCCESS;
  }
  gqa_status const status = gqa_check_aligned(problem);
  if (status != GQA_SUCCESS) return status;
  if (!gqa_choose(problem, target, chosen)) {
    char features[256], values[40] = "";
    int const dependent = choose_pdl(problem, target->arch) != kGqaPdlNone;
    gqa_name_features(problem->features & ~kGqaStored, features, sizeof features);
    if (problem->head_dim_v != problem->head_dim) {
      snprintf(values, sizeof values, " and of values %d", (int)problem->head_dim_v);
    }
    return gqa_fail(
        GQA_ERROR_UNSUPPORTED,
        "no kernel%s%s%s for %s%s, head_dim %d%s, %d query heads per KV head, rows aligned to %d "
        "bytes, on %s; this library was exported with %d kernels (gqa_kernel_name). Nothing "
        "was launched. Export one that has it: gqa-cutlass export %s--kernels ...",
        features[0] == '\0' ? "" : " with ", features, dependent ? " of dependent launches" : "",
        problem->dtype == GQA_FLOAT16 ? "float16" : "bfloat16", gqa_name_stored(problem->features),
        (int)problem->head_dim, values, (int)(problem->num_q_heads / problem->num_kv_heads),
        problem->vec_width * kElementBytes, gqa_archs[target->arch].name, gqa_num_kernels,
        dependent ? "--dependent " : "");
  }
  if (chosen->num_merge_counters * 4 > kMergeCounterBytes) {
    return gqa_fail(GQA_ERROR_UNSUPPORTED,
                    "%lld merges in one launch; allowed: %d. Nothing was "
                    "launched. Use fewer sequences at a time.",
                    (long long)chosen->num_merge_counters, kMergeCounterBytes / 4);
  }
  last->problem = *problem;
  last->target = *target;
  last->chosen = *chosen;
  return GQA_SUCCESS;
}

size_t gqa_workspace_of(gqa_dispatch const* chosen) {
  if (chosen->num_merge_counters == 0) return 0;
  return kMergeCounterBytes + sizeof(float) * (size_t)chosen->partial_floats;
}
