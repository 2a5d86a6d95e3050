"""What is done to queries and new keys before they are multiplied: norm, then rotation."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from gqa_cutlass.call.given import Layout, Tokens, fail, shape_text
from gqa_cutlass.errors import shown

if TYPE_CHECKING:
    from gqa_cutlass.call.asked import Asked

COS, SIN, STARTS = "rotary_cos", "rotary_sin", "rotary_seqlens"
WEIGHTS = "q_norm_weight", "k_norm_weight"
_STEP = 16  # rotary dims come in so many


def check_turning(layout: Layout, tokens: Tokens) -> None:
    """Check tables of angles and weights, but for what the table of arguments says of them.

    Args:
        layout: The tensors.
        tokens: How many tokens there are.

    Raises:
        InputError: A rule is broken; the message says which, what was given and what to do.
    """
    for name in WEIGHTS:
        if name in layout and len(layout[name].shape) != 1:
            fail(name, shape_text(layout[name].shape), "[head_dim]")
    if COS not in layout or SIN not in layout:
        for name in (COS, SIN, STARTS):
            if name in layout:
                other = SIN if name == COS else COS
                fail(name, f"one without {other}", f"{COS} and {SIN}, both or neither")
        return
    cos, sin, q = layout[COS], layout[SIN], layout["q"]
    for name, t in ((COS, cos), (SIN, sin)):
        if len(t.shape) != 2 or not 1 <= t.shape[0] < 2**31:
            fail(name, shape_text(t.shape), "[positions, rotary_dim / 2]")
        if t.dtype not in (q.dtype, torch.float32):
            fail(name, str(t.dtype), f"q's dtype, {q.dtype}, or torch.float32")
    if cos.shape != sin.shape or cos.dtype != sin.dtype:
        allowed = f"as {COS}: {cos.dtype} {shape_text(cos.shape)}"
        fail(SIN, f"{sin.dtype} {shape_text(sin.shape)}", allowed)
    rotary_dim, head_dim = 2 * cos.shape[1], q.shape[-1]
    if rotary_dim % _STEP or not _STEP <= rotary_dim <= head_dim:
        fail(
            "rotary_dim (twice the columns of rotary_cos)",
            shown(rotary_dim),
            f"multiples of {_STEP} up to head_dim, {head_dim}",
        )
    for name, t in ((COS, cos), (SIN, sin)):  # that last dims are contiguous is looked at later
        if t.strides[1] == 1 and (t.strides[0] % 2 or t.address % (2 * t.itemsize)):
            got = "rows that are not aligned to two elements"
            fail(name, got, "rows that are; pass a .clone(memory_format=torch.contiguous_format)")
    if cos.shape[0] < _least(tokens):
        got, allowed = f"{cos.shape[0]} positions", f"{_least(tokens)} and more, one for each token"
        fail(COS, got, allowed)


def turning_fields(layout: Layout, asked: Asked) -> dict[str, float]:
    """What kernels must know of norms and rotations, by fields of `Params`; addresses apart."""
    found: dict[str, float] = {}
    if any(name in layout for name in WEIGHTS):
        found |= {"norm_eps": float(asked.norm_eps), "norm_offset": float(asked.norm_plus_one)}
    if COS in layout:
        cos, sin = layout[COS], layout[SIN]
        moves = asked.causal or asked.window_size != (-1, -1)
        found |= {
            "rotary_cos_stride": cos.strides[0],
            "rotary_sin_stride": sin.strides[0],
            "rotary_positions": cos.shape[0],
            "rotary_dim": 2 * cos.shape[1],
            "rotary_interleaved": int(asked.rotary_interleaved),
            "rotary_step": int(moves),
        }
    return found


def longest_to_turn(layout: Layout, tokens: Tokens) -> int | None:
    """The longest length, known to the host, that the tables have positions for; None: any."""
    if COS not in layout or STARTS in layout:
        return None
    return layout[COS].shape[0] - _least(tokens)


def _least(tokens: Tokens) -> int:
    """The tokens that every sequence has; where these differ, only the device knows how many."""
    return max(0 if tokens.ragged_q else tokens.queries, tokens.new, 1)
