// Queries: several tokens per sequence, which are drafts: a mask says which of them each sees, its
// ancestors in a tree for instance, and all that comes before the drafts is seen by all.
#pragma once

#include <gqa/policy/queries_several.cuh>
#include <gqa/policy/slots.cuh>

namespace gqa {

template <class T>
struct TreeOfQueries : SeveralQueries<T> {
  CUTE_DEVICE static constexpr bool is_one() { return false; }

  struct Sight : SeveralQueries<T>::Sight {
    uint32_t const* bits[T::kLaneHeads];  // of each row of the lane
    int count;

    CUTE_DEVICE Sight(Params const& p, Work<T> const& w)
        : SeveralQueries<T>::Sight(p, w), count(w.queries.count) {
      int const words = ceil_div(count, 32);
      CUTE_UNROLL
      for (int h = 0; h < T::kLaneHeads; ++h) {
        int const token =
            count - 1 - max(this->behind[h], 0);  // that of rows that do not exist, too
        bits[h] = p.tree_mask + (int64_t(w.batch) * count + token) * words;
      }
    }
    // The newest token is the last draft.
    CUTE_DEVICE bool sees(Position at, int head) const {
      int const draft = at.token - (at.query + this->behind[head]) + count - 1;
      if (draft < 0 || at.token >= at.end) return true;
      return (bits[head][draft / 32] >> draft % 32 & 1) != 0;
    }
  };
};

}  // namespace gqa
