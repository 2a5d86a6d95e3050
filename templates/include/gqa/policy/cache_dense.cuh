// Cache: every sequence has rows of its own, one stride apart.
#pragma once

#include <gqa/policy/slots.cuh>

namespace gqa {

template <class T>
struct DenseCache {
  using Element = typename T::Stored;

  CUTE_DEVICE static constexpr bool by_number() { return true; }

  // There are none.
  struct Pages {
    CUTE_DEVICE explicit Pages(Params const&) {}
    CUTE_DEVICE void ask(int) {}
    CUTE_DEVICE void open(Work<T> const&, int) {}
    CUTE_DEVICE void turn_to(Work<T> const&, int) {}
    CUTE_DEVICE static constexpr bool lost() { return false; }
    CUTE_DEVICE void lose() {}
  };

  // The rows of one KV head of one sequence, in K or in V.
  struct Rows {
    Element* first;
    int64_t stride;

    CUTE_DEVICE Rows(Params const& p, void* base, CacheStrides const& strides, int row)
        : first(static_cast<Element*>(base) + row * strides.batch +
                kv_head_of_block<T>(p) * strides.head),
          stride(strides.token) {}

    CUTE_DEVICE Element* operator()(int token) const { return first + token * stride; }

    CUTE_DEVICE auto of_tile(Pages const&, int tile, int first_token, int end) const {
      return [=, rows = *this](int at) {
        int const token = tile * T::kBlockN + at;
        return Place<T>{rows(token), token < end && (kSeesFirstToken<T> || token >= first_token)};
      };
    }
  };

  CUTE_DEVICE static Rows keys(Params const& p, int row) {
    return Rows(p, p.k_cache, p.k_cache_stride, row);
  }
  CUTE_DEVICE static Rows values(Params const& p, int row) {
    return Rows(p, p.v_cache, p.v_cache_stride, row);
  }

  // The row that a token takes which is appended.
  struct NewRow {
    int number;  // of the new tokens

    CUTE_DEVICE void find(Params const&, Work<T> const&, int token) { number = token; }
    CUTE_DEVICE static constexpr bool lost(Params const&) { return false; }
    CUTE_DEVICE static constexpr bool exists(Params const&) { return true; }
    CUTE_DEVICE Element* key(Params const& p, Work<T> const& w) const {
      return of(p.k_cache, p.k_cache_stride, w);
    }
    CUTE_DEVICE Element* value(Params const& p, Work<T> const& w) const {
      return of(p.v_cache, p.v_cache_stride, w);
    }

   private:
    CUTE_DEVICE Element* of(void* base, CacheStrides const& stride, Work<T> const& w) const {
      return static_cast<Element*>(base) + w.cache_row() * stride.batch +
             (w.num_cached + number) * stride.token + w.kv_head * stride.head;
    }
  };

  // The boxes of the tiles that a warp walks, those of sequences in their own rows.
  struct Boxes {
    static constexpr int kTokens = T::kBlockN;

    Params const& params;

    CUTE_DEVICE explicit Boxes(Params const& p) : params(p) {}
    CUTE_DEVICE void ask(int) {}
    CUTE_DEVICE void open(Work<T> const&, int) {}
    CUTE_DEVICE void turn_to(Work<T> const&, int) {}
    CUTE_DEVICE Box at(int tile, int) const {
      return {tile * T::kBlockN, kv_head_of_block<T>(params), int(blockIdx.z)};
    }
    CUTE_DEVICE static constexpr bool lost() { return false; }
    CUTE_DEVICE void lose() {}
  };
};

}  // namespace gqa
