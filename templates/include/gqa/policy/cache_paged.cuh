// Cache: tokens lie in pages of a pool, in any order, and a table says which page comes when (vLLM,
// arXiv:2309.06180). The batch strides of K and V are from page to page.
//
// A warp reads the table ahead of its tiles, so that no tile waits for it but the first. An entry
// is looked at if it is that of a token which is read, or which is appended: what lies behind the
// last page of a sequence may be anything. One that names no page of the pool is lost: zeros stand
// in for its tokens, and the sequence's output is NaN.
#pragma once

#include <gqa/policy/slots.cuh>

namespace gqa {

// The page of a token, in the order of its sequence. page_magic is 2^page_shift / page_size,
// rounded up, and page_shift 31 + ceil(log2(page_size)), which is exact below 2^31: section 4 of
// Granlund and Montgomery, "Division by invariant integers using multiplication" (PLDI 1994).
CUTE_DEVICE int page_of(Params const& p, int token) {
  return int((uint64_t(uint32_t(token)) * p.page_magic) >> p.page_shift);
}

// Where a token lies in its page.
CUTE_DEVICE int place_in_page(Params const& p, int token) {
  return token - page_of(p, token) * p.page_size;
}

CUTE_DEVICE bool is_in_pool(Params const& p, int page) {
  return uint32_t(page) < uint32_t(p.num_pages);
}

// A sequence's row of the table.
CUTE_DEVICE int32_t const* table_row(Params const& p, int row) {
  return p.block_table + row * p.block_table_stride;
}

template <class T>
struct PagedCache {
  using Element = typename T::Stored;

  CUTE_DEVICE static constexpr bool by_number() { return false; }

  // The pages of a tile's rows, for cp.async: each lane has those of its rows, the one of its
  // number and every 32nd behind it.
  class Pages {
   public:
    static constexpr int kRows = ceil_div(T::kBlockN, kWarpSize);  // of a lane
    int page[kRows] = {};                                          // -1: there is nothing to read
    int place[kRows] = {};

    CUTE_DEVICE explicit Pages(Params const& p) : params_(p) {}

    // Asks for what the table says of a first tile, before the length is known.
    CUTE_DEVICE void ask(int tile) {
      if constexpr (kSeesFirstToken<T> && RowOf<T>::is_own()) {
        asked_ = tile;
        row_ = table_row(params_, blockIdx.z);
        look_ahead(tile);
      }
    }

    // Begins with a tile, that which was asked for or another.
    CUTE_DEVICE void open(Work<T> const& w, int tile) {
      if constexpr (kSeesFirstToken<T> && RowOf<T>::is_own()) {
        if (w.batch == int(blockIdx.z) && tile == asked_) return;
      }
      if (tile >= w.num_tiles) return;  // perhaps there is no such row
      row_ = table_row(params_, w.cache_row());
      look_ahead(tile);
    }

    // Finds the pages of a tile, and asks for those of the next.
    CUTE_DEVICE void turn_to(Work<T> const& w, int tile) {
      if (tile >= w.num_tiles) return;
      CUTE_UNROLL
      for (int i = 0; i < kRows; ++i) {
        int const token = token_of(tile, i);
        bool const is_read =
            is_row(i) && token < w.num_cached && (kSeesFirstToken<T> || token >= w.first_token);
        bool const exists = is_in_pool(params_, ahead_[i]);
        lost_ |= is_read && !exists;
        page[i] = is_read && exists ? ahead_[i] : -1;
        place[i] = place_in_page(params_, token);
      }
      look_ahead(tile + w.tile_step());
    }

    // Whether an entry named no page. All lanes take part.
    CUTE_DEVICE bool lost() const { return __any_sync(0xffffffffu, lost_); }
    CUTE_DEVICE void lose() { lost_ = true; }

   private:
    CUTE_DEVICE static int row_of(int i) { return i * kWarpSize + int(threadIdx.x) % kWarpSize; }
    CUTE_DEVICE static int token_of(int tile, int i) { return tile * T::kBlockN + row_of(i); }
    CUTE_DEVICE static bool is_row(int i) {
      return T::kBlockN % kWarpSize == 0 || row_of(i) < T::kBlockN;
    }
    CUTE_DEVICE void look_ahead(int tile) {
      CUTE_UNROLL
      for (int i = 0; i < kRows; ++i) {
        int const token = token_of(tile, i);
        bool const exists = is_row(i) && token < params_.max_seq_len;
        ahead_[i] = exists ? row_[page_of(params_, token)] : -1;
      }
    }

    Params const& params_;
    int32_t const* row_;     // of the table
    int ahead_[kRows] = {};  // entries of the next tile
    int asked_ = 0;
    bool lost_ = false;
  };

  // The rows of one KV head, in K or in V.
  struct Rows {
    Element* first;
    CacheStrides const& stride;

    CUTE_DEVICE Rows(Params const& p, void* base, CacheStrides const& strides, int)
        : first(static_cast<Element*>(base) + kv_head_of_block<T>(p) * strides.head),
          stride(strides) {}

    CUTE_DEVICE Rows& operator=(Rows const&) { return *this; }  // they are all the same

    // All lanes ask for a row at a time: those that have its page tell the others.
    CUTE_DEVICE auto of_tile(Pages const& pages, int, int, int) const {
      uint64_t row[Pages::kRows];     // of this lane
      uint32_t exists[Pages::kRows];  // of all lanes, a bit each
      CUTE_UNROLL
      for (int i = 0; i < Pages::kRows; ++i) {
        bool const known = pages.page[i] >= 0;
        int64_t const at = pages.page[i] * stride.batch + pages.place[i] * stride.token;
        row[i] = reinterpret_cast<uint64_t>(first + (known ? at : 0));
        exists[i] = __ballot_sync(0xffffffffu, known);
      }
      return [=](int at) {
        uint64_t found = __shfl_sync(0xffffffffu, row[0], at % kWarpSize);
        uint32_t known = exists[0];
        CUTE_UNROLL
        for (int i = 1; i < Pages::kRows; ++i) {
          uint64_t const other = __shfl_sync(0xffffffffu, row[i], at % kWarpSize);
          found = at / kWarpSize == i ? other : found;
          known = at / kWarpSize == i ? exists[i] : known;
        }
        return Place<T>{reinterpret_cast<Element const*>(found),
                        (known >> at % kWarpSize & 1) != 0};
      };
    }
  };

  CUTE_DEVICE static Rows keys(Params const& p, int row) {
    return Rows(p, p.k_cache, p.k_cache_stride, row);
  }
  CUTE_DEVICE static Rows values(Params const& p, int row) {
    return Rows(p, p.v_cache, p.v_cache_stride, row);
  }

  // The row that a token takes which is appended: that of its number, or another that the caller
  // says; or none, if the caller says so.
  struct NewRow {
    int page, place;
    bool is_wanted = true;

    CUTE_DEVICE void find(Params const& p, Work<T> const& w, int number) {
      if (p.slot_mapping == nullptr) {
        int const token = w.num_cached + number;
        page = table_row(p, w.cache_row())[page_of(p, token)];
        place = place_in_page(p, token);
      } else {
        int64_t const slot = p.slot_mapping[w.new_token(p, number)];
        is_wanted = slot >= 0;
        bool const fits = is_wanted && slot < int64_t(p.num_pages) * p.page_size;
        page = fits ? int(uint64_t(slot) / uint32_t(p.page_size)) : -1;
        place = int(slot - int64_t(page) * p.page_size);
      }
    }
    CUTE_DEVICE bool lost(Params const& p) const { return is_wanted && !is_in_pool(p, page); }
    CUTE_DEVICE bool exists(Params const& p) const { return is_in_pool(p, page); }
    CUTE_DEVICE Element* key(Params const& p, Work<T> const& w) const {
      return of(p.k_cache, p.k_cache_stride, w);
    }
    CUTE_DEVICE Element* value(Params const& p, Work<T> const& w) const {
      return of(p.v_cache, p.v_cache_stride, w);
    }

   private:
    CUTE_DEVICE Element* of(void* base, CacheStrides const& stride, Work<T> const& w) const {
      return static_cast<Element*>(base) + page * stride.batch + place * stride.token +
             w.kv_head * stride.head;
    }
  };

  // The boxes of the tiles that a warp walks, for the copy engine: whole pages or parts of them.
  // The lanes have the entries of one tile each, or of two, that the warp will come to.
  class Boxes {
   public:
    static constexpr int kTokens = 16;
    static constexpr int kParts = T::kBlockN / kTokens;
    static constexpr int kHeld = kWarpSize / kParts;  // tiles that all lanes hold together

    CUTE_DEVICE explicit Boxes(Params const& p) : params_(p) {}

    // Asks for what the table says of the first tiles, before the length is known.
    CUTE_DEVICE void ask(int tile) {
      if constexpr (kSeesFirstToken<T> && RowOf<T>::is_own()) {
        row_ = table_row(params_, blockIdx.z);
        held_ = entries(tile, params_.num_splits * T::kNumWarps);
      }
    }

    // Begins with a tile. Those that follow it lie closer if the sequence has few.
    CUTE_DEVICE void open(Work<T> const& w, int tile) {
      if (tile >= w.num_tiles) return;  // perhaps there is no such row
      int right = kHeld;
      if constexpr (kSeesFirstToken<T> && RowOf<T>::is_own()) {
        if (w.tile_step() != params_.num_splits * T::kNumWarps) right = 1;
      } else {
        row_ = table_row(params_, w.cache_row());
        held_ = entries(tile, w.tile_step());
      }
      end_ = right;
    }

    // Finds the pages of a tile: the next that the warp comes to.
    CUTE_DEVICE void turn_to(Work<T> const& w, int tile) {
      if (next_ == end_) {
        next_ = 0;
        end_ = kHeld;
        held_ = ahead_;
      }
      CUTE_UNROLL
      for (int part = 0; part < kParts; ++part) {
        int const token = tile * T::kBlockN + part * kTokens;
        bool const is_read =
            token < w.num_cached && (kSeesFirstToken<T> || token + kTokens > w.first_token);
        int const entry = __shfl_sync(0xffffffffu, held_, next_ * kParts + part);
        bool const exists = is_in_pool(params_, entry);
        lost_ |= is_read && !exists;
        page_[part] = is_read && exists ? entry : -1;
      }
      if (next_ == 0) ahead_ = entries(tile + end_ * w.tile_step(), w.tile_step());
      ++next_;
    }

    // A part of that tile: zeros where there is no page.
    CUTE_DEVICE Box at(int tile, int part) const {
      int const token = tile * T::kBlockN + part * kTokens;
      return {place_in_page(params_, token), kv_head_of_block<T>(params_), page_[part]};
    }

    CUTE_DEVICE bool lost() const { return lost_; }
    CUTE_DEVICE void lose() { lost_ = true; }

   private:
    // Those of a tile and of what follows it in steps, one in each lane.
    CUTE_DEVICE int entries(int tile, int step) const {
      int const lane = threadIdx.x % kWarpSize;
      int const token = (tile + lane / kParts * step) * T::kBlockN + lane % kParts * kTokens;
      return token < params_.max_seq_len ? row_[page_of(params_, token)] : -1;
    }

    Params const& params_;
    int32_t const* row_;  // of the table
    int held_ = -1;       // entries of the next tiles
    int ahead_ = -1;      // and of those behind them
    int next_ = 0;        // of the tiles that are held: the first still to come
    int end_ = 0;         // and the one past the last
    int page_[kParts] = {};
    bool lost_ = false;
  };

  // Parts of a tile follow one another where a row is one box, not where a copy brings several.
  static_assert(!T::kTma || Boxes::kParts == 1 ||
                (T::KeyTile::kBoxes == 1 && T::ValueTile::kBoxes == 1));
};

}  // namespace gqa
