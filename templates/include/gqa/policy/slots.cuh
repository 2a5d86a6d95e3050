// What a variant chooses: one policy per slot, a struct template over the traits.
//
// A generated file names all of them. Both schedules and the append ask them, and nothing else, for
// what features change; codegen/schema/slots.py lists what each must define.
//
//   Row       which row of the       int row(p, batch): below zero if there is no such row. bool
//             cache holds a          is_own(): whether it is always that of the same number.
//             sequence.
//   Cache     where tokens lie.      bool by_number(): whether a token's number says where. Rows
//                                    keys(p, row), values(p, row): of_tile(pages, tile, first, end)
//                                    makes what finds the Place of a tile's row. Pages, for
//                                    cp.async, and Boxes, for the copy engine, are what a warp
//                                    knows of its tiles: ask(tile) before the length is known,
//                                    open(work, tile), then turn_to(work, tile) before each; Box
//                                    at(tile, part), of kTokens. NewRow: find(p, work, token),
//                                    key and value: where a token goes that is appended, if it
//                                    exists(). lost(): whether there was no such place.
//   Queries   how many tokens of     bool is_one(): whether every sequence has one, the newest.
//             a sequence ask, and    If not: int row_blocks(p), Span queries(p, batch),
//             what each may see.     new_tokens(p, batch), and Sight, made of p and work:
//                                    at(Position, head) is that of the row's own token, which
//                                    sees(Position, head).
//   Norm      what queries and       bool none(). Weights<count>, made of p, whose they are, and
//             keys are divided by.   the first of two dims each: factor(p, sum of squares) of a
//                                    row, and normed(p, float2, factor, i).
//   Rotary    how they turn with     bool none(). If not: first_position(p, batch, length);
//             their position.        fits(p, batch, length, count): whether the tables have so
//                                    many from there on; other(p, dim): with which dims two
//                                    neighbours turn; Angles<count>: turned(p, float2, other,
//                                    dim, i).
//   Start     where a sequence       int padding(p, batch): tokens before it, which are none of it
//             begins.                and are not read. bool none(): whether it is always 0.
//   Mask      what is attended to.   bool sees(Position). int first_token(p, batch, num_tokens):
//                                    none before it is seen or read; below num_tokens, or 0. bool
//                                    from_start(): whether it is always 0, so that first tiles may
//                                    be asked for before the length is known.
//   Logit     what a product counts. float operator()(dot, head, Position), in units of log2. The
//                                    head is counted among those of the lane.
//   Bias      what is added to it.   float operator()(logit, head, Position), likewise. Made once,
//                                    of p and work: it may load what it needs.
//   NewToken  what is appended.      load_key(p, work, token, row), load_value likewise: the rows
//                                    of this block's KV head, before they are quantised.
//   Operands  what is stored, and    Stored: what caches and tiles consist of, kPacked elements in
//             what is multiplied.    16 bits; Multiplied: what the MMA takes. KeyTokenRow,
//                                    ValueTokenRow: of a token that is stored, PreparedTokenRow of
//                                    a key that is prepared; quantise_key, quantise_value: once,
//                                    when all rows are on the way, or both by quantise, with
//                                    NewScales that were asked for before them. KeyScale: what a
//                                    product counts, scaled(), after narrow(), which makes queries
//                                    what the MMA takes, if it kNarrows them, and take_scale();
//                                    scale_values: of an output. query_dim, is_padding, kHalfStep,
//                                    kRowStep: which dims a lane's operands have. add_keys,
//                                    add_values: products of a tile; value_row, value_fragment: an
//                                    operand of 16 dims; load_step: one of a single key. number,
//                                    Numbers: elements on CUDA cores.
//   Output    what else is divided   finish(p, work, head, merged): called once per output, when
//             by.                    everything has been merged.
//   Result    what outputs are       rounded(values): a cutlass array of as many, made of one of
//             stored as.             floats.
#pragma once

#include <gqa/params.cuh>
#include <gqa/traits.cuh>

namespace gqa {

// Where a key lies, counted from its tile's first token, as are the others.
struct Position {
  int token;
  int end;    // of the tokens in the cache's tiles: the new one is no part of them with TMA
  int query;  // the newest token, whose query it is
};

// The coordinates of a box's first token in the tensor map of a cache.
struct Box {
  int token, head, sequence;
};

// A row of K or V, and whether it is to be read.
template <class T>
struct Place {
  typename T::Stored const* row;
  bool exists;
};

// Some tokens of a tensor that holds those of all sequences.
struct Span {
  int first, count;
};

// Whose a row is that is normed and turned.
enum class Side { kQuery, kKey };

template <class T>
struct Work;

template <class T>
using RowOf = typename T::template Row<T>;
template <class T>
using CacheOf = typename T::template Cache<T>;
template <class T>
using QueriesOf = typename T::template Queries<T>;
template <class T>
using NormOf = typename T::template Norm<T>;
template <class T>
using RotaryOf = typename T::template Rotary<T>;
template <class T>
using StartOf = typename T::template Start<T>;
template <class T>
using MaskOf = typename T::template Mask<T>;
template <class T>
using LogitOf = typename T::template Logit<T>;
template <class T>
using BiasOf = typename T::template Bias<T>;
template <class T>
using NewTokenOf = typename T::template NewToken<T>;
template <class T>
using OperandsOf = typename T::template Operands<T>;
template <class T>
using OutputOf = typename T::template Output<T>;
template <class T>
using ResultOf = typename T::template Result<T>;

// Whether queries and new keys enter the product otherwise than they are given.
template <class T>
constexpr bool kPreparesRows = !NormOf<T>::none() || !RotaryOf<T>::none();

// Whether every sequence has one query, that of its newest token.
template <class T>
constexpr bool kOneQuery = QueriesOf<T>::is_one();

// The KV head that this block serves. Blocks that share it have a part each of the group's heads,
// or of heads and tokens.
template <class T>
CUTE_DEVICE int kv_head_of_block(Params const& p) {
  if constexpr (kOneQuery<T>) {
    return blockIdx.x / T::kHeadBlocks;
  } else {
    return blockIdx.x / QueriesOf<T>::row_blocks(p);
  }
}
// Whether every token that a sequence has before the newest is seen.
template <class T>
constexpr bool kSeesFirstToken = MaskOf<T>::from_start() && StartOf<T>::none();

// Whether tiles are known by their numbers, before lengths and the like are.
template <class T>
constexpr bool kKnowsTiles = kSeesFirstToken<T> && RowOf<T>::is_own() && CacheOf<T>::by_number();

// Whether a token may have no place in the cache.
template <class T>
constexpr bool kMayLoseTokens = !CacheOf<T>::by_number();

}  // namespace gqa
