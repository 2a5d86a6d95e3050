// Stage 6, merge, in a cluster: the blocks of a cluster exchange partial outputs through each
// other's shared memory.
//
// Each block owns some dims of the output. It receives (O, m, l) for these dims from every block,
// its own included, by asynchronous stores that complete on its barrier, and sums them in the order
// of the blocks. No block waits for another to read.
#pragma once

#include <gqa/arch/ptx_sm90.cuh>
#include <gqa/schedule/tma/storage_tma.cuh>
#include <gqa/schedule/tma/tile_scales.cuh>
#include <gqa/stage/combine.cuh>
#include <gqa/stage/output.cuh>
#include <gqa/stage/score.cuh>

namespace gqa {

// Who takes part in a sequence's attention: num_clusters clusters, num_ranks blocks in each, which
// is a power of two.
template <class T>
struct ClusterWork : Work<T> {
  int log_cluster_size, cluster, rank;
  int num_clusters, log_num_ranks;

  CUTE_DEVICE ClusterWork(Params const& p, int length) : Work<T>(p, length) {
    log_cluster_size = log2_ceil(cute::cluster_shape().y);
    cluster = this->split >> log_cluster_size;
    rank = cute::block_rank_in_cluster();
    int const wanted = log2_ceil(this->num_splits);  // no more than leave every warp a tile
    log_num_ranks = wanted < log_cluster_size ? wanted : log_cluster_size;
    num_clusters = this->num_splits >> log_cluster_size;
    if (num_clusters < 1) num_clusters = 1;
    this->num_splits = num_clusters << log_num_ranks;
  }

  CUTE_DEVICE int num_ranks() const { return 1 << log_num_ranks; }
  // The first cluster brings in the new token: all its blocks, each for the dims that it owns.
  CUTE_DEVICE bool brings_new_token() const {
    bool const is_token = StartOf<T>::none() || this->padding <= this->num_cached;
    return kOneQuery<T> && this->appends && cluster == 0 && is_token;
  }

 private:
  CUTE_DEVICE static int log2_ceil(int n) { return 32 - __clz(n - 1); }
};

template <class T>
class ClusterCombine {
 public:
  CUTE_DEVICE ClusterCombine(ClusterStorage<T>& shared, ClusterWork<T> const& w)
      : shared_(shared), work_(w), num_pairs_(ceil_div(w.num_rows(), 2)) {
    // By selection instead of division: there are only four cases.
    num_dims_ = own_dims(0);
    for_shared([&](auto log) {
      if (w.log_num_ranks == log) num_dims_ = own_dims(log);
    });
  }

  // Tells this block's barrier how much will come. Called by one thread.
  CUTE_DEVICE void expect() const {
    if (alone() || num_own_dims() == 0) return;
    int const items = num_own_dims() * num_pairs_ + work_.num_rows();
    barrier_arrive_expect(shared_.combine_barrier, items * int(sizeof(float2))
                                                       << work_.log_num_ranks);
  }

  // Where a pair of heads' O for one dim goes: into the block that owns the dim.
  struct Target {
    uint32_t out, barrier;
    bool exists;

    CUTE_DEVICE void send(float2 value, bool alone) const {
      if (!exists) return;
      if (alone) {
        *static_cast<float2*>(__cvta_shared_to_generic(out)) = value;
      } else {
        store_async(out, value, barrier);
      }
    }
  };
  CUTE_DEVICE Target target(int dim, int pair) const {
    bool const exists = pair < num_pairs_ && dim < T::kHeadDimV;
    int owner = 0;
    for_shared([&](auto log) {
      if (work_.log_num_ranks == log && dim < T::kHeadDimV) owner = dim / own_dims(log);
    });
    return {in_block(out(work_.rank, dim - owner * num_dims_, pair), owner),
            in_block(shared_.combine_barrier, owner), exists};
  }

  // Sends the block's maximum and sum of every head to the blocks that own dims. Called by one
  // warp: eight lanes hold the same heads, each sends to one block.
  CUTE_DEVICE void send_max_sum(float const (&max)[T::kLaneHeads],
                                float const (&sum)[T::kLaneHeads]) const {
    int const lane = threadIdx.x % kWarpSize;
    int const owner = lane / 4;
    if (owner >= work_.num_ranks() || owner * num_dims_ >= T::kHeadDimV) return;
    CUTE_UNROLL
    for (int h = 0; h < T::kLaneHeads; ++h) {
      int const head = T::head_of(lane, h);
      Target const target = {in_block(shared_.max_sum[work_.rank][head], owner),
                             in_block(shared_.combine_barrier, owner), head < work_.num_rows()};
      target.send(make_float2(max[h], sum[h]), alone());
    }
  }

  // A block that shares its work with no other one keeps what it sends.
  CUTE_DEVICE bool alone() const { return work_.log_num_ranks == 0; }

  // Merges what has come, and the new token, into the output; by way of global memory when there
  // are several clusters.
  CUTE_DEVICE void receive(Params const& p, Scorer<T> const& score) const {
    if (alone()) __syncthreads();
    int const warp = threadIdx.x / kWarpSize;
    if (warp * kWarpSize < num_slices() && work_.brings_new_token()) {
      TileScales<T>::of_new_key(score, shared_)
          .score_one(shared_.new_key, Logits<T>(p, work_), shared_.new_score[warp]);
      __syncwarp();
    }
    if (work_.num_clusters > 1) return receive_by_way_of_global(p);
    for_own_slices([&](Slice s) { write_output(p, work_, s, merge(s)); });
  }

 private:
  // The address of something of this block's in the shared memory of another one.
  template <class Object>
  CUTE_DEVICE uint32_t in_block(Object& object, int block) const {
    uint32_t const address = cute::cast_smem_ptr_to_uint(&object);
    return alone() ? address : cute::set_block_rank(address, block);
  }

  CUTE_DEVICE void receive_by_way_of_global(Params const& p) const {
    int64_t const index = (work_.head_index() << work_.log_cluster_size) + work_.rank;
    int64_t const count = work_.num_heads_of_launch() << work_.log_cluster_size;
    int const parts = p.num_splits >> work_.log_cluster_size;
    PartialStore<T, kWidth> const store(p.split_workspace, index * parts, count * parts,
                                        first_own_dim());
    for_own_slices([&](Slice s) { store.write(work_.cluster, s, merge(s)); });
    if (!arrives_last(p.merge_counters + index, work_.num_clusters, shared_.is_last)) return;
    for_own_slices([&](Slice s) { write_output(p, work_, s, store.merge(work_.num_clusters, s)); });
  }

  static constexpr int kWidth = 2;  // of the slices of the output

  // Dims that a block owns; the last ones may own fewer, or none.
  static constexpr int own_dims(int log_num_ranks) {
    return round_up(ceil_div(T::kHeadDimV, 1 << log_num_ranks), kWidth);
  }

  // Calls `visit` with how many blocks may share the work, more than one, as log2. The compiler
  // makes constants of them; in large kernels, as those of several queries, it would rather divide
  // by what they come to in a launch, unless they are constants from the start.
  template <class Visit>
  CUTE_DEVICE static void for_shared(Visit&& visit) {
    if constexpr (kOneQuery<T>) {
      CUTE_UNROLL
      for (int log = 1; (1 << log) <= kMaxCluster; ++log) visit(log);
    } else {
      visit(cute::Int<1>());
      visit(cute::Int<2>());
      visit(cute::Int<3>());
      static_assert(1 << 3 == kMaxCluster);
    }
  }

  // Calls `visit` for this thread's part of the dims that the block owns. Slices of all heads of
  // the block come before those of the next dims: the order in which they lie in `out`.
  template <class Visit>
  CUTE_DEVICE void for_own_slices(Visit&& visit) const {
    CUTE_NO_UNROLL
    for (int i = threadIdx.x; i < num_slices(); i += T::kNumThreads) {
      Slice const s = {i % T::kBlockH, first_own_dim() + i / T::kBlockH * kWidth};
      if (s.head < work_.num_rows()) visit(s);
    }
  }

  CUTE_DEVICE int first_own_dim() const { return work_.rank * num_dims_; }
  CUTE_DEVICE int num_own_dims() const {
    int const left = T::kHeadDimV - first_own_dim();
    return left < 0 ? 0 : left < num_dims_ ? left : num_dims_;
  }

  CUTE_DEVICE int num_slices() const { return num_own_dims() / kWidth * T::kBlockH; }

  CUTE_DEVICE float2& out(int rank, int dim, int pair) const {
    return shared_.out[(rank * num_dims_ + dim) * (T::kBlockH / 2) + pair];
  }

  // Waits for the cluster's partials and merges them, in the order of the blocks.
  CUTE_DEVICE Merged<kWidth> merge(Slice s) const {
    Merged<kWidth> r;
    if (work_.brings_new_token()) {
      r.max = shared_.new_score[threadIdx.x / kWarpSize][s.head];
      r.sum = 1.f;
      CUTE_UNROLL
      for (int i = 0; i < kWidth; ++i)
        r.out[i] = OperandsOf<T>::number(shared_.new_value, s.dim + i);
    }
    auto const* part = reinterpret_cast<float const*>(&out(0, s.dim - first_own_dim(), 0)) + s.head;
    if (!alone()) barrier_wait(shared_.combine_barrier, 0);
    float2 max_sum[kMaxCluster];
    float o[kMaxCluster][kWidth];
    CUTE_UNROLL
    for (int i = 0; i < kMaxCluster; ++i) {
      bool const exists = i < work_.num_ranks();
      max_sum[i] = exists ? shared_.max_sum[i][s.head] : make_float2(kNoMax, 0.f);
      CUTE_UNROLL
      for (int k = 0; k < kWidth; ++k) o[i][k] = exists ? part[k * T::kBlockH] : 0.f;
      part += num_dims_ * T::kBlockH;
    }
    r.add_all(max_sum, o);
    return r;
  }

  ClusterStorage<T>& shared_;
  ClusterWork<T> const& work_;
  int num_pairs_;  // of heads
  int num_dims_;   // own_dims(log_num_ranks)
};

}  // namespace gqa
