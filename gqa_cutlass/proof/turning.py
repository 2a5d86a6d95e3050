"""The one reference of what is done to queries and new keys first: RMS norm, then rotation."""

from __future__ import annotations

import torch
from torch import Tensor

# Errors of float32 on the way to what is rounded, as a share of a row's largest value.
_ON_THE_WAY = 4e-6


def turned(
    x: Tensor,
    positions: Tensor,
    *,
    weight: Tensor | None = None,
    eps: float = 0.0,
    plus_one: bool = False,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    interleaved: bool = False,
) -> Tensor:
    """Norm heads (RMSNorm, arXiv:1910.07467), and rotate them (RoFormer, arXiv:2104.09864).

    Args:
        x: [tokens, heads, head_dim].
        positions: Of each token, [tokens].
        weight: What normed heads are multiplied by, [head_dim]; None: they are not normed.
        eps: What is added to mean squares.
        plus_one: Whether 1 is added to weights.
        cos: Cosines by position, [positions, rotary_dim / 2]; None: heads are not rotated.
        sin: Sines, likewise.
        interleaved: Whether neighbours are rotated together, or dims that are apart by as many as
            there are angles.

    Returns:
        The same in float64, not rounded.
    """
    made = x.double()
    if weight is not None:
        mean = made.square().mean(-1, keepdim=True)
        made = made / torch.sqrt(mean + eps) * (weight.double() + plus_one)
    if cos is None or sin is None:
        return made
    angles, places = cos.shape[1], positions.long()
    c, s = (table[places].double().unsqueeze(1) for table in (cos, sin))
    dims = torch.arange(2 * angles, device=x.device)
    first, second = dims.view(-1, 2).T if interleaved else dims.view(2, -1)
    rotated = made.clone()
    rotated[..., first] = made[..., first] * c - made[..., second] * s
    rotated[..., second] = made[..., second] * c + made[..., first] * s
    return rotated


def is_rounded_once(found: Tensor, exact: Tensor) -> bool:
    """Whether rows are what `turned` says, rounded: within half a unit in the last place.

    Args:
        found: [..., head_dim], float16 or bfloat16.
        exact: The same in float64.
    """
    unit = torch.finfo(found.dtype)
    spacing = 2.0 ** exact.abs().clamp(min=unit.smallest_normal).log2().floor() * unit.eps
    allowed = spacing / 2 + _ON_THE_WAY * exact.abs().amax(-1, keepdim=True)
    return bool(((found.double() - exact).abs() <= allowed).all())
