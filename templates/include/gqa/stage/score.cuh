// Stage 2, score: S = K Q^T for one tile, as logits count it.
//
// Transposed with respect to prefill: tokens take the MMA's M side and the heads of the group its
// N side of 8, so a group of 8 wastes nothing and one of 4 half, where heads on M would waste 8 or
// 12 rows of 16.
#pragma once

#include <gqa/arch/mma.cuh>
#include <gqa/arch/tile.cuh>
#include <gqa/stage/logits.cuh>
#include <gqa/stage/prepare.cuh>
#include <gqa/stage/tile_scheduler.cuh>

namespace gqa {

template <class T>
struct SharedStorage;

// The rows of this block's queries in global memory.
template <class T>
struct QueryRows {
  Params const& p;
  Work<T> const& w;
  typename T::Element const* first;

  CUTE_DEVICE QueryRows(Params const& params, Work<T> const& work)
      : p(params), w(work), first(static_cast<typename T::Element const*>(p.q)) {
    if constexpr (kOneQuery<T>) {
      first += w.batch * p.q_stride.batch + w.head_of(0) * p.q_stride.head;
    }
  }
  CUTE_DEVICE typename T::Element const* operator()(int row, int dim = 0) const {
    if constexpr (kOneQuery<T>) {
      return first + (row * p.q_stride.head + dim);
    } else {
      return first + (w.place_of(row, p.q_stride, p.q_token_stride) + dim);
    }
  }
};

// Prepares the rows of this block, a warp each in turn: `put` is called with the row, the first of
// two dims and these, zeros where there is no row. All threads of the block call; holds a barrier.
template <class T, class Put>
CUTE_DEVICE void prepare_queries(Params const& p, Work<T> const& w, Put&& put) {
  QueryRows<T> const query_row(p, w);
  CUTE_NO_UNROLL
  for (int row = threadIdx.x / kWarpSize; row < T::kBlockH; row += T::kNumWarps) {
    PreparedRow<T> prepared = {};
    if (row < w.num_rows()) prepare_query(p, w, row, query_row(row), prepared);
    prepared.for_each([&](int dim, auto const& pair) { put(row, dim, pair); });
  }
  __syncthreads();
}

template <class T, Math = T::kMath>
struct Scorer;

// Tensor cores.
template <class T>
struct Scorer<T, Math::kTensorOp> : OperandsOf<T>::KeyScale {
  static constexpr int kSteps = ceil_div(T::kHeadDim, 16);
  static constexpr int kHeadTiles = T::kBlockH / 8;
  static constexpr int kTokenTiles = T::kBlockN / 16;
  using Element = typename T::Element;
  using Stored = typename T::Stored;
  using Multiplied = typename T::Multiplied;

  uint32_t query[kSteps][kHeadTiles][2];  // Q^T, the B operand

  // Holds a barrier where queries are prepared.
  template <class Storage>
  CUTE_DEVICE Scorer(Params const& p, Work<T> const& w, Storage& shared) {
    int const lane = threadIdx.x % kWarpSize;
    if constexpr (kPreparesRows<T>) {
      prepare_queries(p, w, [&](int row, int dim, auto const& pair) {
        *reinterpret_cast<uint32_t*>(&shared.prepared_query[row][dim]) =
            reinterpret_cast<uint32_t const&>(pair);
      });
      CUTE_UNROLL
      for (int n = 0; n < kHeadTiles; ++n) {
        load_query(n,
                   &shared.prepared_query[n * 8 + lane / 4][OperandsOf<T>::query_dim(0, lane % 4)]);
      }
    } else if (!kOneQuery<T> && w.num_rows() == 0) {
      clear_query();
    } else {
      QueryRows<T> const query_row(p, w);
      CUTE_UNROLL
      for (int n = 0; n < kHeadTiles; ++n) {
        // Lanes of heads that do not exist compute the last one again; nobody stores it.
        int const last = w.last_row();
        int const head = n * 8 + lane / 4 < last ? n * 8 + lane / 4 : last;
        load_query(n, query_row(head) + OperandsOf<T>::query_dim(0, lane % 4));
      }
    }
  }

  // What has been asked for becomes what the MMA takes: waits, if queries are narrowed.
  CUTE_DEVICE void take_queries() { this->narrow(query); }

  // Position in the tile of a lane's t-th token.
  CUTE_DEVICE static int token(int t) { return t * 8 + int(threadIdx.x) % kWarpSize / 4; }

  CUTE_DEVICE void operator()(Stored const* keys, TileEnd end, Logits<T> const& logit,
                              float (&scores)[T::kLaneHeads][T::kLaneTokens]) const {
    int const lane = threadIdx.x % kWarpSize;
    CUTE_UNROLL
    for (int m = 0; m < kTokenTiles; ++m) {
      // Two independent sums halve the chain of dependent MMAs.
      float sum[2][kHeadTiles][4] = {};
      TileRow<T, typename T::KeyTile> const row(keys, m * 16 + lane % 16, lane / 16);
      OperandsOf<T>::add_keys(row, query, sum);
      CUTE_UNROLL
      for (int n = 0; n < kHeadTiles; ++n) {
        CUTE_UNROLL
        for (int i = 0; i < 4; ++i) {
          int const t = 2 * m + i / 2;
          int const h = 2 * n + i % 2;
          scores[h][t] = logit(this->scaled(sum[0][n][i] + sum[1][n][i], h), h, end.at(token(t)));
        }
      }
    }
  }

  // Scores of the new token's key in shared memory, [head]. It stands in all 16 rows of the MMA.
  CUTE_DEVICE void score_one(Stored const* key, Logits<T> const& logit,
                             float (&scores)[T::kBlockH]) const {
    int const lane = threadIdx.x % kWarpSize;
    float sum[2][kHeadTiles][4] = {};
    CUTE_UNROLL
    for (int step = 0; step < kSteps; ++step) {
      uint32_t part[2];
      OperandsOf<T>::load_step(key, step, part);
      uint32_t const k[4] = {part[0], part[0], part[1], part[1]};
      CUTE_UNROLL
      for (int n = 0; n < kHeadTiles; ++n) mma<Multiplied>(sum[step % 2][n], k, query[step][n]);
    }
    if (lane / 4 != 0) return;
    CUTE_UNROLL
    for (int h = 0; h < T::kLaneHeads; ++h) {
      scores[T::head_of(lane, h)] =
          logit(this->scaled(sum[0][h / 2][h % 2] + sum[1][h / 2][h % 2], h), h, {0, 1, 0});
    }
  }

 private:
  // Eight rows of queries; `row` is this lane's, from its first pair of dims on.
  CUTE_DEVICE void load_query(int n, Element const* row) {
    CUTE_UNROLL
    for (int i = 0; i < kSteps * 2; ++i) {
      bool const padding = OperandsOf<T>::is_padding(i, int(threadIdx.x) % 4);
      auto const* pair = row + OperandsOf<T>::query_dim(i, 0);
      query[i / 2][n][i % 2] = padding ? 0u : *reinterpret_cast<uint32_t const*>(pair);
      if constexpr (OperandsOf<T>::KeyScale::kNarrows) keep_here(query[i / 2][n][i % 2]);
    }
  }
  CUTE_DEVICE void clear_query() {
    CUTE_UNROLL
    for (int i = 0; i < kSteps * 2 * kHeadTiles; ++i) {
      query[i / 2 / kHeadTiles][i / 2 % kHeadTiles][i % 2] = 0u;
    }
  }
};

// CUDA cores: kLanesPerToken lanes share a token, each taking every kLanesPerToken-th chunk of it.
template <class T>
struct Scorer<T, Math::kSimt> : OperandsOf<T>::KeyScale {
  static constexpr int kChunks = T::kHeadDim / kChunk;

  SharedStorage<T>& shared;

  CUTE_DEVICE Scorer(Params const& p, Work<T> const& w, SharedStorage<T>& storage)
      : shared(storage) {
    if constexpr (kPreparesRows<T>) {  // and rounded, as the tensor cores have it
      prepare_queries(p, w, [&](int row, int dim, auto const& pair) {
        shared.query[row][dim] = float(pair[0]);
        shared.query[row][dim + 1] = float(pair[1]);
      });
      return;
    } else {
      QueryRows<T> const query_row(p, w);
      for (int i = threadIdx.x; i < T::kBlockH * T::kHeadDim; i += T::kNumThreads) {
        int const head = i / T::kHeadDim;
        int const dim = i % T::kHeadDim;
        auto const* element = query_row(head, dim);
        shared.query[head][dim] = head < w.num_rows() ? float(*element) : 0.f;
      }
    }
    __syncthreads();
  }

  CUTE_DEVICE void take_queries() const {}

  CUTE_DEVICE static int token(int = 0) { return int(threadIdx.x) % kWarpSize % T::kBlockN; }

  CUTE_DEVICE void operator()(typename T::Stored const* keys, TileEnd end, Logits<T> const& logit,
                              float (&scores)[T::kLaneHeads][T::kLaneTokens]) const {
    int const part = int(threadIdx.x) % kWarpSize / T::kBlockN;
    float sum[T::kBlockH] = {};
    CUTE_UNROLL
    for (int c = 0; c < ceil_div(kChunks, T::kLanesPerToken); ++c) {
      int const chunk = c * T::kLanesPerToken + part;
      if (kChunks % T::kLanesPerToken == 0 || chunk < kChunks) accumulate(keys, chunk, sum);
    }
    CUTE_UNROLL
    for (int h = 0; h < T::kBlockH; ++h) {
      CUTE_UNROLL
      for (int bit = T::kBlockN; bit < kWarpSize; bit *= 2) {
        sum[h] += __shfl_xor_sync(0xffffffffu, sum[h], bit);
      }
      scores[h][0] = logit(this->scaled(sum[h], h), h, end.at(token()));
    }
  }

 private:
  CUTE_DEVICE void accumulate(typename T::Stored const* keys, int chunk,
                              float (&sum)[T::kBlockH]) const {
    typename OperandsOf<T>::template Numbers<kChunk> const k(
        keys + typename T::KeyTile::Layout{}(token(), chunk * kChunk / T::kPacked));
    CUTE_UNROLL
    for (int h = 0; h < T::kBlockH; ++h) {
      auto const* q = reinterpret_cast<float4 const*>(&shared.query[h][chunk * kChunk]);
      CUTE_UNROLL
      for (int i = 0; i < kChunk / 4; ++i) {
        float4 const v = q[i];
        sum[h] = fmaf(k[4 * i], v.x, sum[h]);
        sum[h] = fmaf(k[4 * i + 1], v.y, sum[h]);
        sum[h] = fmaf(k[4 * i + 2], v.z, sum[h]);
        sum[h] = fmaf(k[4 * i + 3], v.w, sum[h]);
      }
    }
  }
};

// Takes tokens out of a tile's scores that are none of the sequence, padding before it.
template <class T>
CUTE_DEVICE void hide_padding(Work<T> const& w, int tile,
                              float (&scores)[T::kLaneHeads][T::kLaneTokens]) {
  if constexpr (!StartOf<T>::none()) {
    int const first = w.padding - tile * T::kBlockN;
    if (first <= 0) return;
    CUTE_UNROLL
    for (int t = 0; t < T::kLaneTokens; ++t) {
      bool const hidden = Scorer<T>::token(t) < first;
      CUTE_UNROLL
      for (int h = 0; h < T::kLaneHeads; ++h) scores[h][t] = hidden ? -kInfinity : scores[h][t];
    }
  }
}

}  // namespace gqa
