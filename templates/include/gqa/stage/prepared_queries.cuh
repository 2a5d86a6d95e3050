// The queries of a block in shared memory, where they are prepared: once, by a warp each.
#pragma once

#include <gqa/policy/slots.cuh>

namespace gqa {

template <class T, bool prepares = kPreparesRows<T>>
struct PreparedQueries {};

template <class T>
struct PreparedQueries<T, true> {
  // Rows an odd number of 16-byte chunks apart, so that those of a fragment are in other banks.
  static constexpr int kPitch = (round_up(T::kHeadDim, 16) / kChunk | 1) * kChunk;

  alignas(16) typename T::Element prepared_query[T::kBlockH][kPitch];
};

}  // namespace gqa
