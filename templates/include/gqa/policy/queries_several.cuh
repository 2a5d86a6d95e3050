// Queries: several tokens per sequence, the last of it, each of which sees what comes before it, or
// all (speculative decoding, chunks of prompts). Tensors of tokens hold as many for each sequence,
// or those of one sequence behind those of another, where an index says where each begins.
#pragma once

#include <gqa/policy/slots.cuh>
#include <gqa/stage/tile_scheduler.cuh>

namespace gqa {

template <class T>
struct SeveralQueries {
  CUTE_DEVICE static constexpr bool is_one() { return false; }

  CUTE_DEVICE static int row_blocks(Params const& p) { return p.row_blocks; }

  CUTE_DEVICE static Span queries(Params const& p, int batch) {
    Span const found = tokens(p.cu_seqlens_q, p.num_query_tokens, p.all_query_tokens, batch);
    return {found.first, found.count <= p.num_query_tokens ? found.count : -1};
  }
  CUTE_DEVICE static Span new_tokens(Params const& p, int batch) {
    return tokens(p.cu_seqlens_k_new, p.num_new_tokens, p.all_new_tokens, batch);
  }

  struct Sight {
    int behind[T::kLaneHeads];  // the newest token, of each row of the lane
    int right;

    CUTE_DEVICE Sight(Params const& p, Work<T> const& w) : right(p.window_right) {
      CUTE_UNROLL
      for (int h = 0; h < T::kLaneHeads; ++h) {
        int const row = T::head_of(int(threadIdx.x) % kWarpSize, h);
        behind[h] = w.queries.count - 1 - w.token_of(row);
      }
    }
    CUTE_DEVICE Position at(Position newest, int head) const {
      return {newest.token, newest.end, newest.query - behind[head]};
    }
    CUTE_DEVICE bool sees(Position at, int) const { return at.token - at.query <= right; }
  };

 private:
  // Those of a sequence. None if the index is out of order or points outside.
  CUTE_DEVICE static Span tokens(int32_t const* index, int each, int all, int batch) {
    if (index == nullptr) return {0, each};
    int const first = index[batch];
    int const end = index[batch + 1];
    bool const is_right = first >= 0 && end >= first && end <= all;
    return {is_right ? first : 0, is_right ? end - first : -1};
  }
};

}  // namespace gqa
