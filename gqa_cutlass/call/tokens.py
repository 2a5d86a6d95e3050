"""Several tokens of a sequence: what kernels must know of them, and masks of drafts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gqa_cutlass.call.given import NEW_ENDS, Q_ENDS, Layout, Tokens, fail, shape_text
from gqa_cutlass.codegen.schema.policies import Policy, named, special
from gqa_cutlass.codegen.schema.slots import QUERIES
from gqa_cutlass.errors import shown

TREE = "tree_mask"
SEVERAL = named("SeveralQueries")
WORD_BITS = 32


def with_tokens(policies: tuple[Policy, ...]) -> tuple[Policy, ...]:
    """The same policies, and what several tokens ask for."""
    has = any(policy.slot is QUERIES for policy in policies)
    return policies if has else special((*policies, SEVERAL))


def check_tree(tokens: Tokens, layout: Layout) -> None:
    """Raise InputError for a mask of drafts that is not of a call's tokens."""
    if TREE not in layout:
        return
    mask, appends = layout[TREE], "k" in layout
    count = tokens.queries
    if tokens.ragged_q or tokens.ragged_new:
        fail(TREE, f"one with {Q_ENDS} or {NEW_ENDS}", "as many drafts in every sequence")
    if appends and tokens.new != count:
        fail(TREE, f"one with {count} queries and {tokens.new} new tokens", "as many of both")
    words = -(-count // WORD_BITS)
    if mask.shape != (tokens.batch, count, words):
        fail(
            TREE,
            f"{mask.dtype} {shape_text(mask.shape)}",
            f"bool [{tokens.batch}, {count}, {count}], or that packed by pack_tree_mask, "
            f"torch.uint32 [{tokens.batch}, {count}, {words}]",
        )


def stride_fields(tokens: Tokens, layout: Layout, num_q_heads: int) -> dict[str, float]:
    """What kernels of several tokens must know of where they lie, by fields of `Params`.

    Args:
        tokens: How many there are.
        layout: The tensors.
        num_q_heads: Query heads.
    """
    found: dict[str, float] = {
        "num_query_tokens": tokens.queries,
        "all_query_tokens": tokens.all_queries,
        "num_new_tokens": tokens.new,
        "all_new_tokens": tokens.all_new,
        "new_token_step": tokens.new,
        "lse_batch_stride": 0 if tokens.ragged_q else num_q_heads * tokens.queries,
        "lse_head_stride": tokens.all_queries if tokens.ragged_q else tokens.queries,
    }
    for name, field in _TOKEN_STRIDES.items():
        if name in layout:
            t = layout[name]
            step = t.strides[1] if len(t.shape) == 4 else 0
            found[field] = t.strides[0] if name in tokens.flat else step
    return found


_TOKEN_STRIDES = {
    "q": "q_token_stride",
    "out": "out_token_stride",
    "k": "k_new_token_stride",
    "v": "v_new_token_stride",
}


def is_tree(mask: object) -> bool:
    """Whether a mask of drafts is one that is to be packed."""
    return isinstance(mask, Tensor) and mask.dtype == torch.bool


def packed_tree(mask: Any) -> Any:
    """The same mask, packed if it was not."""
    return pack_tree_mask(mask) if is_tree(mask) else mask


def pack_tree_mask(tree_mask: Tensor) -> Tensor:
    """Pack the mask of a tree of draft tokens, a bit each, as kernels read it.

    Args:
        tree_mask: bool [batch, tokens, tokens]: whether a row's draft sees that of the column. One
            that is to see itself says so.

    Returns:
        uint32 [batch, tokens, ceil(tokens / 32)] on the same device; bit i of word w of a row is
        column 32 w + i.

    Raises:
        InputError: It is no such tensor.
    """
    is_mask = isinstance(tree_mask, Tensor) and tree_mask.dtype == torch.bool
    if not is_mask or tree_mask.dim() != 3 or tree_mask.shape[1] != tree_mask.shape[2]:
        got = (
            f"{tree_mask.dtype} {shape_text(tree_mask.shape)}"
            if isinstance(tree_mask, Tensor)
            else shown(tree_mask)
        )
        fail(TREE, got, "torch.bool [batch, tokens, tokens]")
    batch, count, _ = tree_mask.shape
    words = -(-count // WORD_BITS)
    padded = torch.nn.functional.pad(tree_mask, (0, words * WORD_BITS - count))
    bits = padded.view(batch, count, words, WORD_BITS).to(torch.int64)
    weights = 1 << torch.arange(WORD_BITS, device=tree_mask.device)
    packed = (bits * weights).sum(-1)
    signed = torch.where(packed >= 1 << 31, packed - (1 << 32), packed)
    return signed.to(torch.int32).view(torch.uint32)
