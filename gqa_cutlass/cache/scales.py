"""Caches of 8 bits: their scales, and tokens as they store them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gqa_cutlass.cache.allocation import placed
from gqa_cutlass.cache.inputs import plain, refuse_in
from gqa_cutlass.cache.sizes import Sizes, refuse
from gqa_cutlass.call.stored import FP8, FP8_NAMES, SCALE_RULE, SCALES, check_number, is_number
from gqa_cutlass.errors import shown
from gqa_cutlass.tensors import is_tensor, memory_flaw

Scale = float | Tensor | None
# Of a cache's layers: one for all of them, or one for each.
LayerScales = Scale | Sequence[Scale]
_PIECE_BYTES = 2**24  # of tokens in float32, on their way to 8 bits


@dataclass(frozen=True, kw_only=True)
class Scales:
    """What the elements of a layer are multiplied by, None for 1.

    Args:
        k_scale: Of keys: a number, or float32 [] or [num_kv_heads].
        v_scale: Of values, likewise.
    """

    k_scale: Scale = None
    v_scale: Scale = None

    def asked(self, call: str, options: dict[str, Any]) -> dict[str, Any]:
        """The options of a decode call, with the cache's scales.

        Raises:
            InputError: A scale is among the options.
        """
        for name in SCALES:
            own = getattr(self, name)
            if options.get(name) is not None:
                refuse_in(call, name, "an option", f"the cache's own, of its making: {name}=")
            if own is not None:
                options[name] = own
        return options

    def stored(self, cache: Tensor, name: str, tokens: Tensor) -> Tensor:
        """Tokens as a cache has them: the nearest of x / scale, or the last number of its type.

        Args:
            cache: Keys or values.
            name: "k" or "v".
            tokens: [..., tokens, num_kv_heads, head_dim] in 16 bits.

        Returns:
            Of the cache's type; the tokens themselves, where that is theirs.
        """
        if cache.dtype not in FP8:
            return tokens
        scale = getattr(self, f"{name}_scale")
        if is_number(scale):  # by which torch would not divide on CUDA, but multiply by 1 / scale
            scale = torch.full((), scale, dtype=torch.float32, device=tokens.device)
        elif scale is not None and scale.dim():
            scale = scale.unsqueeze(-1)
        most = torch.finfo(cache.dtype).max
        result = tokens.new_empty(tokens.shape, dtype=cache.dtype)
        each = max(1, 4 * tokens.numel() // max(1, tokens.shape[1]))
        pieces = (t.split(max(1, _PIECE_BYTES // each), dim=1) for t in (result, tokens))
        for piece, given in zip(*pieces, strict=True):
            quotient = given.float() if scale is None else given.float() / scale
            piece.copy_(quotient.clamp_(-most, most))
        return result


def raw(cache: Tensor) -> Tensor:
    """What can be moved about: bytes, of elements that torch does not index everywhere."""
    return cache.view(torch.uint8) if cache.dtype in FP8 else cache


def scales_of_layers(
    sizes: Sizes, device: torch.device | int | str, k_scale: LayerScales, v_scale: LayerScales
) -> list[Scales]:
    """The scales of every layer, or one for all.

    Args:
        sizes: Of the caches.
        device: Where they are.
        k_scale: Of keys.
        v_scale: Of values.

    Raises:
        InputError: One is not allowed, or the cache's type has none.
    """
    where = placed(device, sizes.owner)
    keys, values = (
        _of_layers(sizes, where, name, given)
        for name, given in zip(SCALES, (k_scale, v_scale), strict=True)
    )
    count = max(len(keys), len(values))  # not of layers: there may be no memory for so many
    return [
        Scales(k_scale=keys[i % len(keys)], v_scale=values[i % len(values)]) for i in range(count)
    ]


def _of_layers(sizes: Sizes, device: torch.device, name: str, given: LayerScales) -> list[Scale]:
    if isinstance(given, (list, tuple)):
        if len(given) != sizes.num_layers:
            refuse(sizes.owner, name, f"{len(given)} scales", f"one, or {sizes.num_layers}")
        return [_checked(sizes, device, name, each) for each in given]
    return [_checked(sizes, device, name, given)]  # type: ignore[arg-type]


def _checked(sizes: Sizes, device: torch.device, name: str, scale: Scale) -> Scale:
    owner = sizes.owner
    if scale is None:
        return None
    if sizes.dtype not in FP8:
        got = f"{shown(scale) if is_number(scale) else 'a scale'}, with caches of {sizes.dtype}"
        refuse(owner, name, got, f"None, or caches of {FP8_NAMES}")
    if not is_tensor(scale):
        return check_number(name, scale, lambda *why: refuse(owner, *why))
    scale = plain(owner, name, scale)
    heads = sizes.num_kv_heads
    right = scale.dtype == torch.float32 and scale.device == device
    if not right or list(scale.shape) not in ([], [1], [heads]):
        got = f"{scale.dtype} {list(scale.shape)} on {scale.device}"
        allowed = f"{SCALE_RULE}; or torch.float32 [] or [{heads}] (num_kv_heads) on {device}"
        refuse(owner, name, got, allowed)
    if found := memory_flaw(scale):
        refuse(owner, name, *found)
    return scale.detach()
