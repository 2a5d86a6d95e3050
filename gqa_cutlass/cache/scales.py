"""Caches of 8 bits: their scales, and tokens as they store them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

import torch
from torch import Tensor

from gqa_cutlass.cache.allocation import Memory, allocate, placed
from gqa_cutlass.cache.inputs import plain, refuse_in
from gqa_cutlass.cache.sizes import Sizes, refuse
from gqa_cutlass.call.stored import (
    FP8,
    FP8_NAMES,
    SCALE_RULE,
    SCALES,
    check_number,
    is_number,
    of_tokens,
)
from gqa_cutlass.errors import shown
from gqa_cutlass.tensors import is_tensor, memory_flaw

TOKEN = "token"  # in place of a scale: one for every token and KV head, which the cache computes
Scale = float | Tensor | None
GivenScale = Scale | Literal["token"]
# Of a cache's layers: one for all of them, or one for each.
LayerScales = GivenScale | Sequence[Scale]
_PIECE_BYTES = 2**24  # of tokens in float32, on their way to 8 bits


@dataclass(frozen=True, kw_only=True)
class Scales:
    """What the elements of a layer are multiplied by, None for 1.

    Args:
        k_scale: Of keys: a number, or float32 [] or [num_kv_heads]; or of tokens, as keys are
            without head_dim, and so are those of values then.
        v_scale: Of values, likewise.
    """

    k_scale: Scale = None
    v_scale: Scale = None

    @property
    def of_tokens(self) -> tuple[Tensor, ...]:
        """Those of tokens, of keys and of values, if they are; they go where their tokens go."""
        given = self.k_scale, self.v_scale
        return tuple(s for s in given if isinstance(s, Tensor) and of_tokens(s.shape))

    def in_pages(self, page_size: int) -> Scales:
        """As kernels see them that see caches as pages of so many tokens."""
        if not self.of_tokens:
            return self
        k, v = (t.view(-1, page_size, t.shape[-1]) for t in self.of_tokens)
        return Scales(k_scale=k, v_scale=v)

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

    def stored(self, cache: Tensor, name: str, tokens: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Tokens as a cache has them: the nearest of x / scale, or the last number of its type.

        Args:
            cache: Keys or values, [rows, tokens, num_kv_heads, head_dim].
            name: "k" or "v".
            tokens: [batch, tokens, num_kv_heads, head_dim] in 16 bits.

        Returns:
            What is to be written, beside where: `raw` of the cache and of the tokens, and, if
            scales are of tokens, of those and of the new tokens'.
        """
        if cache.dtype not in FP8:
            return [(cache, tokens)]
        scale = getattr(self, f"{name}_scale")
        if is_number(scale):  # by which torch would not divide on CUDA, but multiply by 1 / scale
            scale = torch.full((), scale, dtype=torch.float32, device=tokens.device)
        most = torch.finfo(cache.dtype).max
        result = tokens.new_empty(tokens.shape, dtype=cache.dtype)
        pairs, new = [(cache, result)], None
        if self.of_tokens:
            new = tokens.new_empty(tokens.shape[:-1], dtype=torch.float32)
            pairs.append((scale, new))
        for piece in _pieces(tokens.shape):
            quotient = tokens[piece].float()
            if new is not None:
                scale = new[piece].copy_(_scales_of(quotient, most))
            if scale is not None:
                quotient /= scale.unsqueeze(-1) if scale.dim() else scale
            result[piece].copy_(quotient.clamp_(-most, most))
        return [(raw(held), raw(given)) for held, given in pairs]


def _pieces(shape: Sequence[int]) -> Iterator[tuple[slice, slice]]:
    """Sequences and tokens that are turned into 8 bits at a time."""
    batch, tokens, heads, dims = shape
    fitting = max(1, _PIECE_BYTES // (4 * heads * dims))
    rows = max(1, min(batch, fitting))
    step = fitting // rows
    for first, start in product(range(0, batch, rows), range(0, tokens, step)):
        yield slice(first, first + rows), slice(start, start + step)


def raw(held: Tensor) -> Tensor:
    """What can be moved about: bytes, of elements that torch does not index everywhere.

    Args:
        held: A cache, or scales of tokens, which become one of 4 bytes a head.
    """
    if held.dtype == torch.float32:
        return held.unsqueeze(-1).view(torch.uint8)
    return held.view(torch.uint8) if held.dtype in FP8 else held


def picked(held: Tensor, dim: int, index: Tensor) -> Tensor:
    """Copies of what there is at some indices, int64, of a dimension but the last."""
    return held.view(torch.uint8).index_select(dim, index).view(held.dtype)


def by_token(owner: str, k_scale: LayerScales, v_scale: LayerScales) -> bool:
    """Whether scales are to be of tokens.

    Raises:
        InputError: Only one of the two is; or there is something that is no scale anywhere.
    """
    given = {"k_scale": k_scale, "v_scale": v_scale}
    for name, scale in given.items():
        for each in scale if isinstance(scale, (list, tuple)) else [scale]:
            if each is not None and not is_tensor(each) and not (each is scale and _is_token(each)):
                _number(owner, name, each)
    found = [name for name, scale in given.items() if _is_token(scale)]
    if len(found) == 1:
        (other,) = given.keys() - found
        allowed = f"{TOKEN!r}, as {found[0]}: both have a scale for every token, or none"
        refuse(owner, other, shown(given[other]), allowed)
    return len(found) > 0


def _is_token(scale: object) -> bool:
    return isinstance(scale, str) and scale == TOKEN


def allocate_scaled(
    sizes: Sizes, device: torch.device | int | str, k_scale: LayerScales, v_scale: LayerScales
) -> tuple[Memory, list[Scales]]:
    """Memory for caches, and the scales of every layer, or one for all.

    Args:
        sizes: Of the caches; they say whether scales are `by_token`.
        device: Where to allocate.
        k_scale: Of keys.
        v_scale: Of values.

    Raises:
        GqaError: As for `allocate` and `scales_of_layers`. Nothing stays allocated.
    """
    if not sizes.by_token:
        scales = scales_of_layers(sizes, device, k_scale, v_scale)
        return allocate(sizes, device), scales
    memory = allocate(sizes, device)
    return memory, [Scales(k_scale=k, v_scale=v) for k, v in memory.scales]


def bytes_with(sizes: Sizes, k_scale: LayerScales, v_scale: LayerScales) -> int:
    """Bytes of caches with such scales, wherever these are.

    Raises:
        InputError: As for `scales_of_layers`.
    """
    if not sizes.by_token:
        scales_of_layers(sizes, None, k_scale, v_scale)
    return sizes.total_bytes


def scales_of_layers(
    sizes: Sizes, device: torch.device | int | str | None, k_scale: LayerScales,
    v_scale: LayerScales,
) -> list[Scales]:  # fmt: skip
    """The scales of every layer, or one for all.

    Args:
        sizes: Of the caches.
        device: Where they are; None: anywhere.
        k_scale: Of keys.
        v_scale: Of values.

    Raises:
        InputError: One is not allowed, or the cache's type has none.
    """
    where = None if device is None else placed(device, sizes.owner)
    keys, values = (
        _of_layers(sizes, where, name, given)
        for name, given in zip(SCALES, (k_scale, v_scale), strict=True)
    )
    count = max(len(keys), len(values))  # not of layers: there may be no memory for so many
    return [
        Scales(k_scale=keys[i % len(keys)], v_scale=values[i % len(values)]) for i in range(count)
    ]


def _of_layers(
    sizes: Sizes, device: torch.device | None, name: str, given: LayerScales
) -> list[Scale]:
    if isinstance(given, (list, tuple)):
        if len(given) != sizes.num_layers:
            refuse(sizes.owner, name, f"{len(given)} scales", f"one, or {sizes.num_layers}")
        return [_checked(sizes, device, name, each) for each in given]
    return [_checked(sizes, device, name, given)]  # type: ignore[arg-type]


def _checked(sizes: Sizes, device: torch.device | None, name: str, scale: Scale) -> Scale:
    owner = sizes.owner
    if scale is None:
        return None
    if sizes.dtype not in FP8:
        got = f"{shown(scale) if is_number(scale) else 'a scale'}, with caches of {sizes.dtype}"
        refuse(owner, name, got, f"None, or caches of {FP8_NAMES}")
    if not is_tensor(scale):
        return _number(owner, name, scale)
    scale = plain(owner, name, scale)
    heads, device = sizes.num_kv_heads, device or scale.device
    right = scale.dtype == torch.float32 and scale.device == device
    if not right or list(scale.shape) not in ([], [1], [heads]):
        got = f"{scale.dtype} {list(scale.shape)} on {scale.device}"
        allowed = f"{SCALE_RULE}; or torch.float32 [] or [{heads}] (num_kv_heads) on {device}"
        refuse(owner, name, got, allowed)
    if found := memory_flaw(scale):
        refuse(owner, name, *found)
    return scale.detach()


def _number(owner: str, name: str, scale: object) -> float:
    """A scale that is no tensor."""
    remedy = f"; or {TOKEN!r} of both, for all layers"
    return check_number(
        name, scale, lambda what, got, allowed: refuse(owner, what, got, allowed + remedy)
    )


def _scales_of(rows: Tensor, most: float) -> Tensor:
    """What an append computes of rows, float32 [..., head_dim]: largest over largest."""
    largest = rows.abs().nan_to_num_(nan=0.0, posinf=torch.inf).amax(-1)
    # By a tensor, for by a number torch would not divide on CUDA, but multiply by 1 / number.
    scale = largest / torch.full((), most, dtype=torch.float32, device=rows.device)
    return scale.masked_fill_(largest == 0, 1.0)
