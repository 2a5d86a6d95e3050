"""Parts of attention that ranks hold, made one on all of them: which way they go, and how.

Every rank has a part for every row, a head of a sequence. What goes over the wire is one packed
buffer: outputs in float32, and log-sum-exps behind them. Ranks merge parts in the order of their
numbers, so that whoever merges a row gets the same bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gqa_cutlass.distributed.groups import Ranks
from gqa_cutlass.merge import merge_states

Exchange = Literal["all_gather", "all_to_all", "reduce_scatter"]
EXCHANGES: tuple[Exchange, ...] = ("all_gather", "all_to_all", "reduce_scatter")
# What a rank receives by all_gather, up to which one step is taken to be faster than two of less.
_ONE_STEP_BYTES = 2**20
_ALIGNED = 4  # floats that a merge reads at once; parts begin at multiples


@dataclass(frozen=True, kw_only=True)
class Part:
    """Attention over a rank's tokens, packed for an exchange.

    Args:
        memory: Float32, outputs and then log-sum-exps.
        out: The outputs in it, [tokens, heads, dim], those of one sequence behind another's.
        lse: The log-sum-exps in it, [tokens, heads].
    """

    memory: Tensor
    out: Tensor
    lse: Tensor

    @classmethod
    def empty(cls, shape: tuple[int, ...], device: torch.device) -> Part:
        """Memory for outputs of a shape: [batch, heads, dim], or with tokens behind batch."""
        heads, dim = shape[-2:]
        rows = math.prod(shape[:-1])
        floats = _up(rows * (dim + 1), _ALIGNED)
        memory = torch.empty(floats, dtype=torch.float32, device=device)
        out, lse = memory[: rows * dim], memory[rows * dim : rows * (dim + 1)]
        return cls(memory=memory, out=out.view(-1, heads, dim), lse=lse.view(-1, heads))


def received_bytes(how: Exchange, size: int, rows: int, dim: int, out_bytes: int = 2) -> int:
    """Bytes that a rank receives until it has all rows.

    Args:
        how: The exchange.
        size: Ranks.
        rows: Heads of all sequences.
        dim: head_dim of the output.
        out_bytes: Of an element of the merged output.
    """
    others = size - 1
    if how == "all_gather":
        return others * rows * (dim + 1) * 4
    parts = rows * (dim + 1) * 4 if how == "all_to_all" else rows * dim * 4 + size * rows * 4
    return others * (parts + rows * (dim * out_bytes + 4)) // size


def chosen(size: int, rows: int, dim: int, sharded: bool) -> Exchange:
    """The exchange for a problem where the caller leaves it open.

    One step is taken for little, two of a share each for more. Where every rank is to have its own
    heads only, one step brings it no more than these.
    """
    if sharded or received_bytes("all_gather", size, rows, dim) > _ONE_STEP_BYTES:
        return "all_to_all"
    return "all_gather"


def whole(ranks: Ranks, part: Part, how: Exchange, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Merge parts, and have all rows on all ranks.

    Returns:
        The output and the log-sum-exp, shaped as the part's.
    """
    if how == "all_gather":
        outs, lses = _gathered(ranks, part)
        return merge_states(outs, lses, out_dtype=dtype)
    tokens, heads, dim = part.out.shape
    rows = tokens * heads
    each = _up(-(-rows // ranks.size), _ALIGNED)  # the last ranks may have fewer, or none
    out, lse = _rows_of(part.out.reshape(rows, dim), part.lse.reshape(rows), each * ranks.size)
    merged, sums = _scattered(ranks, out.view(ranks.size, each, dim), lse.view(-1, each), how)
    packed = torch.cat((merged.to(dtype).flatten().view(torch.uint8), sums.view(torch.uint8)))
    everything = packed.new_empty(ranks.size, packed.numel())
    ranks.all_gather(everything.view(-1), packed)
    values = everything[:, : -each * 4].reshape(-1).view(dtype)
    sums = everything[:, -each * 4 :].reshape(-1).view(torch.float32)
    return values.view(-1, dim)[:rows].view_as(part.out), sums[:rows].view_as(part.lse)


def by_heads(ranks: Ranks, part: Part, how: Exchange, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Merge parts, and have the heads of this rank, the rank-th share of them.

    Returns:
        The output and the log-sum-exp, shaped as the part's but for the heads.
    """
    tokens, all_heads, dim = part.out.shape
    size, heads = ranks.size, all_heads // ranks.size
    if how == "all_gather":
        outs, lses = _gathered(ranks, part)
        own = slice(ranks.rank * heads, (ranks.rank + 1) * heads)
        return merge_states(
            outs[:, :, own].contiguous(), lses[:, :, own].contiguous(), out_dtype=dtype
        )
    out = part.out.view(tokens, size, heads, dim).transpose(0, 1).reshape(size, -1, dim)
    lse = part.lse.view(tokens, size, heads).transpose(0, 1).reshape(size, -1)
    merged, sums = _scattered(ranks, out, lse, how)
    return merged.to(dtype).view(tokens, heads, dim), sums.view(tokens, heads)


def _gathered(ranks: Ranks, part: Part) -> tuple[Tensor, Tensor]:
    """The outputs and the log-sum-exps of all ranks, which are in front."""
    everything = part.memory.new_empty(ranks.size, part.memory.numel())
    ranks.all_gather(everything.view(-1), part.memory)
    outs, lses, _ = everything.split(
        (
            part.out.numel(),
            part.lse.numel(),
            len(part.memory) - part.out.numel() - part.lse.numel(),
        ),
        dim=1,
    )
    return outs.view(-1, *part.out.shape), lses.view(-1, *part.lse.shape)


def _up(count: int, step: int) -> int:
    return -(-count // step) * step


def _rows_of(out: Tensor, lse: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Rows, and empty ones behind them, as many as are to be."""
    missing = count - len(out)
    if not missing:
        return out, lse
    padded = torch.nn.functional.pad(out, (0, 0, 0, missing))
    return padded, torch.nn.functional.pad(lse, (0, missing), value=-math.inf)


def _scattered(ranks: Ranks, out: Tensor, lse: Tensor, how: Exchange) -> tuple[Tensor, Tensor]:
    """Merge the rows that are for this rank.

    Args:
        ranks: Which all give their parts.
        out: What this one has for every rank, [ranks, rows, dim].
        lse: As out, [ranks, rows].
        how: One of the exchanges that scatter.

    Returns:
        The output, float32 [rows, dim], and the log-sum-exp, [rows].
    """
    size, rows, dim = out.shape
    if how == "reduce_scatter":
        return _reduced(ranks, out, lse)
    packed = torch.cat((out.view(size, -1), lse), dim=1)
    theirs = torch.empty_like(packed)
    ranks.all_to_all(theirs, packed)
    outs, lses = theirs[:, : rows * dim], theirs[:, rows * dim :]
    merged, sums = merge_states(outs.view(size, 1, rows, dim), lses.view(size, 1, rows))
    return merged.view(rows, dim), sums.view(rows)


def _reduced(ranks: Ranks, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """As `_scattered`: let the backend add outputs that have been scaled to their shares."""
    size, rows, dim = out.shape
    lses = lse.new_empty(size, *lse.shape)
    ranks.all_gather(lses.view(-1), lse.contiguous().view(-1))
    sums = torch.logsumexp(lses, 0)
    empty = lse == -math.inf
    shares = torch.exp(lse - sums).masked_fill(empty, 0)[..., None]
    scaled = (out * shares).masked_fill(empty[..., None], 0)
    own = out.new_empty(rows, dim)
    ranks.reduce_scatter(own.view(-1), scaled.view(-1))
    return own, sums[ranks.rank]
