// The tile scheduler: which part of the problem a block computes.
//
// blockIdx -> sequence, heads, range of tiles. blockIdx.x counts the KV heads (and, for groups
// larger than a block holds, head blocks; rows of several tokens likewise), y the splits of the
// sequence, z the sequences. Tiles are dealt to splits and warps in turn, so all blocks walk the
// cache from its start at once and neighbouring blocks read neighbouring heads of the same tokens:
// DRAM pages are opened once.
//
// Where lengths may be ragged, the launch has more rows of blocks than splits, and y and z only
// number the blocks: sequences get as many splits as their lengths ask for.
#pragma once

#include <gqa/params.cuh>
#include <gqa/policy/slots.cuh>
#include <gqa/traits.cuh>

namespace gqa {

// Up to how many blocks parts of a sequence run side by side: it was faster with 512 of them, and
// slower with 1024.
constexpr int kManyBlocks = 768;

template <class T>
struct Work {
  int batch, kv_head, head_block, split;
  int num_cached;   // tokens in the cache before the call
  int num_tokens;   // tokens attended: cached ones and the new ones
  int num_tiles;    // the new token is in the last one; see tokens_in_tiles
  int indexed_row;  // row of the cache, if it is not that of the sequence's number
  int padding;      // tokens before the sequence, if it may have any
  int first_token;  // of those that may be seen: none before it is read
  int start_tile;   // its tile
  int num_splits;   // splits that have tiles; the others have nothing to do
  int first_part;   // number of the sequence's first split among those of the batch
  bool valid;    // the cache can hold the length; if not, or if there is no such row, it counts as
                 // zero. Below zero, too: then the row is inactive
  bool appends;  // there is a new token, and room for it
  Span queries, new_tokens;  // of the sequence, if they may be several

  // threadIdx.y is zero, but the compiler does not know: it would move a value that is the same in
  // all threads to a uniform register as soon as it is loaded, and wait for it there.
  CUTE_DEVICE static int read_length(Params const& p) {
    return p.seqlens != nullptr ? p.seqlens[blockIdx.z + threadIdx.y] : p.seqlen;
  }

  CUTE_DEVICE Work(Params const& p, int length)
      : batch(blockIdx.z),
        kv_head(kv_head_of_block<T>(p)),
        head_block(blockIdx.x % T::kHeadBlocks),
        split(blockIdx.y),
        first_part(blockIdx.z * gridDim.y) {
    if constexpr (!kOneQuery<T>) head_block = blockIdx.x % QueriesOf<T>::row_blocks(p);
    set_length(p, batch, length);
    num_splits = useful_splits(p.num_splits);
    if (!T::kTma && int(gridDim.y) > p.num_splits) balance_varlen(p);
  }

  // The row of the cache that holds the sequence.
  CUTE_DEVICE int cache_row() const { return RowOf<T>::is_own() ? batch : indexed_row; }

  // First tile of this warp, and the distance to its next.
  CUTE_DEVICE int first_tile(int warp) const { return start_tile + split * T::kNumWarps + warp; }
  CUTE_DEVICE int num_walked_tiles() const { return num_tiles - start_tile; }
  CUTE_DEVICE int tile_step() const { return num_splits * T::kNumWarps; }

  // Tokens that are in tiles. A single new one is not with TMA, which reads the cache alone.
  CUTE_DEVICE int tokens_in_tiles() const {
    return T::kTma && kOneQuery<T> ? num_cached : num_tokens;
  }

  CUTE_DEVICE int behind_tiles() const { return T::kTma && kOneQuery<T> ? int(appends) : 0; }

  // Rows of this block: the group's heads, of one token behind those of another.
  CUTE_DEVICE int num_rows() const {
    int const all = kOneQuery<T> ? T::kGroupSize : T::kGroupSize * queries.count;
    int const left = all - head_block * T::kBlockH;
    if (!kOneQuery<T> && left < 0) return 0;
    return left < T::kBlockH ? left : T::kBlockH;
  }
  CUTE_DEVICE int last_row() const {
    return kOneQuery<T> ? num_rows() - 1 : max(num_rows() - 1, 0);
  }
  // Whether this block has nothing to do: there are fewer splits, or the sequence has fewer tokens
  // than others. The first block of rows has, for it is the one that appends.
  CUTE_DEVICE bool is_idle() const {
    if constexpr (kOneQuery<T>) {
      return split >= num_splits;
    } else {
      return split >= num_splits || (head_block > 0 && num_rows() == 0);
    }
  }

  // The query head of a row, and the token, counted from the sequence's first query.
  CUTE_DEVICE int head_of(int row) const {
    if constexpr (kOneQuery<T>) {
      return kv_head * T::kGroupSize + head_block * T::kBlockH + row;
    } else {
      return kv_head * T::kGroupSize + (head_block * T::kBlockH + row) % T::kGroupSize;
    }
  }
  CUTE_DEVICE int token_of(int row) const {
    return kOneQuery<T> ? 0 : (head_block * T::kBlockH + row) / T::kGroupSize;
  }

  // Where a row lies in a tensor of queries or outputs.
  CUTE_DEVICE int64_t place_of(int row, RowStrides const& stride, int64_t token_stride) const {
    int64_t const place = batch * stride.batch + head_of(row) * stride.head;
    if constexpr (kOneQuery<T>) {
      return place;
    } else {
      return place + (queries.first + token_of(row)) * token_stride;
    }
  }

  // The row of this block's KV head in a tensor of new tokens.
  template <class Element>
  CUTE_DEVICE Element const* row(void const* base, RowStrides const& stride, int64_t token_stride,
                                 int token) const {
    auto const* first =
        static_cast<Element const*>(base) + batch * stride.batch + kv_head * stride.head;
    return kOneQuery<T> ? first : first + (new_tokens.first + token) * token_stride;
  }
  // The number of a new token among those of all sequences.
  CUTE_DEVICE int64_t new_token(Params const& p, int token) const {
    if constexpr (kOneQuery<T>) {
      return batch;
    } else {
      return int64_t(batch) * p.new_token_step + new_tokens.first + token;
    }
  }

  // Number of this block's heads and sequence among those of the launch: its merge's number.
  CUTE_DEVICE int64_t head_index() const { return int64_t(batch) * gridDim.x + blockIdx.x; }
  CUTE_DEVICE static int64_t num_heads_of_launch() { return int64_t(gridDim.x) * gridDim.z; }

  // The same for partial outputs: of this block's merge the first, and all of the launch.
  CUTE_DEVICE int64_t first_partial() const {
    return int64_t(blockIdx.x) * gridDim.y * gridDim.z + first_part;
  }
  CUTE_DEVICE static int64_t num_partials() { return int64_t(gridDim.x) * gridDim.y * gridDim.z; }

 private:
  // The sequence's tokens that ask, and that are new. Returns how many are to be appended.
  CUTE_DEVICE auto find_tokens(Params const& p, int sequence) {
    if constexpr (kOneQuery<T>) {
      return p.k_new != nullptr;
    } else {
      queries = QueriesOf<T>::queries(p, sequence);
      new_tokens = QueriesOf<T>::new_tokens(p, sequence);
      return max(new_tokens.count, 0);
    }
  }

  CUTE_DEVICE void set_length(Params const& p, int sequence, int length) {
    auto const appended = find_tokens(p, sequence);  // a flag, if it can be but one
    valid = length <= p.max_seq_len - appended;
    if constexpr (!kOneQuery<T>) valid = valid && queries.count >= 0 && new_tokens.count >= 0;
    if constexpr (!RowOf<T>::is_own()) {
      indexed_row = RowOf<T>::row(p, sequence);
      valid = valid && (indexed_row >= 0 || length < 0);
    }
    if constexpr (!RotaryOf<T>::none()) {
      int const turned = kOneQuery<T> ? 1 : max(queries.count, new_tokens.count);
      valid = valid && (length < 0 || RotaryOf<T>::fits(p, sequence, length, turned));
    }
    bool const active = valid && length >= 0;
    appends = active && appended > 0;
    num_cached = active ? length : 0;
    num_tokens = num_cached + (kOneQuery<T> ? appends : appends ? appended : 0);
    num_tiles = ceil_div(tokens_in_tiles(), T::kBlockN);
    int const older = kOneQuery<T> ? 0 : queries.count - 1;  // queries than the newest
    first_token = MaskOf<T>::first_token(p, sequence, num_tokens - older);
    start_tile = first_token / T::kBlockN;
    if constexpr (!StartOf<T>::none()) {  // the last tile is walked even if nothing in it is seen
      padding = StartOf<T>::padding(p, sequence);
      first_token = max(first_token, padding);
      start_tile = min(first_token, num_tokens > 0 ? num_tokens - 1 : 0) / T::kBlockN;
    }
    if constexpr (!kOneQuery<T>) {  // new tokens are appended from tiles, whether they are seen
      if (appends) start_tile = min(start_tile, num_cached / T::kBlockN);
    }
  }

  // No more splits than leave every warp a tile.
  CUTE_DEVICE int useful_splits(int most) const {
    int const wanted = ceil_div(num_walked_tiles(), T::kNumWarps);
    return wanted < 1 ? 1 : wanted < most ? wanted : most;
  }

  // Finds this block's sequence and split where lengths may be ragged. All warps compute it.
  CUTE_DEVICE void balance_varlen(Params const& p) {
    int const lane = threadIdx.x % kWarpSize;
    int const num_sequences = gridDim.z;
    int total = 0;
    int longest = 0;
    for (int b = lane; b < num_sequences; b += kWarpSize) {
      set_length(p, b, p.seqlens[b]);
      total += num_walked_tiles();
      longest = num_walked_tiles() > longest ? num_walked_tiles() : longest;
    }
    total = __reduce_add_sync(0xffffffffu, total);
    longest = __reduce_max_sync(0xffffffffu, longest);
    int const part = blockIdx.z * gridDim.y + blockIdx.y;
    if (int64_t(longest) * num_sequences <= int64_t(total) + total / 8) {
      take_equal_part(p, part);
    } else {
      int const average = ceil_div(total, (int(gridDim.y) - 1) * num_sequences);
      // One block merges a sequence's parts: not many more than the square root of its tiles pay.
      int const least = longest < 1 ? 1 : 1 << (31 - __clz(longest)) / 2;
      int const share = round_up(average > least ? average : least, T::kNumWarps);
      // Blocks that run side by side are better not parts of the same sequences, which begin and
      // end together: where there are many of them, and long ones.
      bool const apart =
          int64_t(gridDim.x) * gridDim.y * num_sequences > kManyBlocks && share > 2 * T::kNumWarps;
      take_balanced_part(p, apart ? blockIdx.y * num_sequences + blockIdx.z : part, share);
    }
  }

  // All sequences are about as long: num_splits of each. The blocks left over come last.
  CUTE_DEVICE void take_equal_part(Params const& p, int part) {
    batch = part / p.num_splits;
    split = part % p.num_splits;
    first_part = part - split;
    num_splits = 0;
    if (batch >= int(gridDim.z)) return;
    set_length(p, batch, p.seqlens[batch]);
    num_splits = useful_splits(p.num_splits);
  }

  // Splits of at most `share` tiles, a multiple of the warps: such that all of them, one more per
  // sequence for rounding, are no more than there are blocks. Looks at 32 sequences at a time.
  CUTE_DEVICE void take_balanced_part(Params const& p, int part, int share) {
    int const lane = threadIdx.x % kWarpSize;
    num_splits = 0;  // unless there is a split for this block
    split = 0;
    first_part = 0;
    for (int first = 0; first < int(gridDim.z); first += kWarpSize) {
      bool const exists = first + lane < int(gridDim.z);
      int const length = exists ? p.seqlens[first + lane] : 0;
      set_length(p, exists ? first + lane : 0, length);
      int const splits = !exists                   ? 0
                         : num_walked_tiles() == 0 ? 1
                                                   : ceil_div(num_walked_tiles(), share);
      int end = splits;  // of this sequence's splits, counted from those of sequence `first`
      CUTE_UNROLL
      for (int distance = 1; distance < kWarpSize; distance *= 2) {
        int const other = __shfl_up_sync(0xffffffffu, end, distance);
        if (lane >= distance) end += other;
      }
      uint32_t const ends_later = __ballot_sync(0xffffffffu, part < first_part + end);
      if (ends_later != 0) {
        int const owner = __ffs(ends_later) - 1;
        batch = first + owner;
        num_splits = __shfl_sync(0xffffffffu, splits, owner);
        first_part += __shfl_sync(0xffffffffu, end, owner) - num_splits;
        split = part - first_part;
        set_length(p, batch, __shfl_sync(0xffffffffu, length, owner));
        return;
      }
      first_part += __shfl_sync(0xffffffffu, end, kWarpSize - 1);
    }
  }
};

}  // namespace gqa
