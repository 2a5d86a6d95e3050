// Which part of the problem a block computes: blockIdx -> sequence, heads, range of tiles.
//
// blockIdx.x counts the KV heads (and, for groups larger than a block holds, head blocks), y the
// splits of the sequence, z the sequences. Tiles are dealt to splits and warps in turn, so all
// blocks walk the cache from its start at once and neighbouring blocks read neighbouring heads of
// the same tokens: DRAM pages are opened once.
#pragma once

#include "params.cuh"
#include "traits.cuh"

namespace gqa {

template <class T>
struct Work {
  int batch, kv_head, head_block, split;
  int num_cached;  // tokens in the cache before the call
  int num_tokens;  // tokens attended: cached ones and the new one
  int num_tiles;
  int num_splits;  // splits that have tiles; the others have nothing to do
  bool valid;      // the length is one that the cache can hold

  CUTE_DEVICE explicit Work(Params const& p)
      : batch(blockIdx.z),
        kv_head(blockIdx.x / T::kHeadBlocks),
        head_block(blockIdx.x % T::kHeadBlocks),
        split(blockIdx.y) {
    int const appended = p.k_new != nullptr;
    int const length = p.seqlens != nullptr ? p.seqlens[batch] : p.seqlen;
    valid = length >= 0 && length <= p.max_seq_len - appended;
    num_cached = valid ? length : 0;
    num_tokens = num_cached + appended;
    num_tiles = ceil_div(num_tokens, T::kBlockN);
    int const wanted = ceil_div(num_tiles, T::kNumWarps);
    num_splits = wanted < 1 ? 1 : wanted < p.num_splits ? wanted : p.num_splits;
  }

  // First tile of this warp, and the distance to its next.
  CUTE_DEVICE int first_tile(int warp) const { return split * T::kNumWarps + warp; }
  CUTE_DEVICE int tile_step() const { return num_splits * T::kNumWarps; }

  // Heads of this block: the group's heads first_head() .. first_head() + num_heads() - 1.
  CUTE_DEVICE int num_heads() const {
    int const left = T::kGroupSize - head_block * T::kBlockH;
    return left < T::kBlockH ? left : T::kBlockH;
  }
  CUTE_DEVICE int first_head() const { return kv_head * T::kGroupSize + head_block * T::kBlockH; }

  // This block's partial output among all partial outputs of the launch.
  CUTE_DEVICE int64_t partial_index(Params const& p, int of_split) const {
    return (int64_t(batch) * gridDim.x + blockIdx.x) * p.num_splits + of_split;
  }
};

}  // namespace gqa
