"""Caches whose elements are of 8 bits, and the scales by which they count."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeGuard

import torch

from gqa_cutlass.call.given import Layout, Seen, fail, shape_text
from gqa_cutlass.codegen.schema.policies import (
    E4M3,
    E4M3_OF_TOKENS,
    E5M2,
    E5M2_OF_TOKENS,
    Policy,
)
from gqa_cutlass.codegen.schema.problem import MAX_CACHE_SCALE, MIN_CACHE_SCALE, Problem
from gqa_cutlass.codegen.schema.storage import ELEMENT_BYTES
from gqa_cutlass.errors import shown

if TYPE_CHECKING:
    from gqa_cutlass.call.asked import Asked

FP8 = {torch.float8_e4m3fn: E4M3, torch.float8_e5m2: E5M2}
_OF_TOKENS = {E4M3: E4M3_OF_TOKENS, E5M2: E5M2_OF_TOKENS}
FP8_NAMES = " or ".join(map(str, FP8))
_VIEW = "; view bytes that are such numbers: .view(torch.float8_e4m3fn)"  # as engines keep pools
SCALES = ("k_scale", "v_scale")
_MAX_STRIDE = 2**31 - 1
SMALLEST_WIDTH = 2  # elements of 16 bits that tensor cores' loads want
SCALE_RULE = f"a number from {MIN_CACHE_SCALE:g} to {MAX_CACHE_SCALE:g}"


def is_number(value: object) -> TypeGuard[float]:
    """Whether a scale is one for all, known to the host."""
    return type(value) in (int, float)


def check_number(
    name: str, value: object, refuse: Callable[[str, str, str], object] = fail
) -> float:
    """A scale that the host knows.

    Args:
        name: Its name.
        value: It.
        refuse: Raises: what it is, what was given, what is allowed.

    Raises:
        InputError: No number, or zero, negative, not finite, too small or too large.
    """
    if not is_number(value) or not MIN_CACHE_SCALE <= value <= MAX_CACHE_SCALE:
        refuse(name, shown(value), f"{SCALE_RULE}, or a float32 tensor")
    return float(value)  # type: ignore[arg-type]


def stored_policy(layout: Layout) -> tuple[Policy, ...]:
    """What the kernel must have for what the caches hold.

    Raises:
        InputError: The caches' types are not allowed together, or with that of q; or scales are
            given for caches that have none.
    """
    q, keys, values = layout["q"].dtype, layout["k_cache"].dtype, layout["v_cache"].dtype
    for name, dtype in (("k_cache", keys), ("v_cache", values)):
        if dtype != q and dtype not in FP8:
            view = _VIEW if dtype in (torch.uint8, torch.int8) else ""
            fail(name, str(dtype), f"q's dtype, {q}, or {FP8_NAMES}{view}")
    if keys != values:
        fail("v_cache", str(values), f"k_cache's dtype, {keys}")
    policy = FP8.get(keys)
    if policy is not None:
        return (_OF_TOKENS[policy] if _have_tokens(layout) else policy,)
    for name in SCALES:
        if name in layout:
            _fail_unscaled(name, "a tensor", keys)
    return ()


def of_tokens(shape: Sequence[int]) -> bool:
    """Whether scales of this shape are one for every token, which appends write."""
    return len(shape) == 3


def _have_tokens(layout: Layout) -> bool:
    """Whether scales are of tokens.

    Raises:
        InputError: Only one of the two is.
    """
    given = [name for name in SCALES if name in layout and of_tokens(layout[name].shape)]
    if len(given) == 1:
        other = next(name for name in SCALES if name not in given)
        fail(other, "none of tokens", f"as {given[0]}: both have a scale for every token, or none")
    return len(given) > 0


def check_of_tokens(problem: Problem) -> None:
    """Raise InputError where scales of tokens go with what no kernel has beside them."""
    if {*_OF_TOKENS.values()} & {*problem.policies} and problem.vec_width < SMALLEST_WIDTH:
        fail(
            "k_scale",
            "scales of tokens with narrow rows",
            "rows of q, k, v and caches at multiples of 4 bytes, as contiguous ones are; or pass "
            "scales of KV heads, or of sequences and heads",
        )


def _fail_unscaled(name: str, got: str, dtype: torch.dtype) -> None:
    fail(name, f"{got}, with caches of {dtype}", f"None, or caches of {FP8_NAMES}")


def scale_fields(asked: Asked, layout: Layout) -> dict[str, float]:
    """What the kernel must know of scales, but addresses; without any they are 1.

    Raises:
        InputError: A number is not allowed, or given for caches that have no scales.
    """
    dtype = layout["k_cache"].dtype
    found: dict[str, float] = {}
    for name in SCALES:
        number = getattr(asked, name)
        if number is not None:
            check_number(name, number)
            if dtype not in FP8:
                _fail_unscaled(name, shown(number), dtype)
        if dtype in FP8:
            found[name] = 1.0 if number is None else float(number)
        if (tensor := layout.get(name)) and of_tokens(tensor.shape):
            found[f"{name}_batch"] = tensor.strides[0] if tensor.shape[0] > 1 else 0
        elif tensor:
            found[f"{name}_batch"], found[f"{name}_head"] = _steps(tensor)
    return found


def _steps(scales: Seen) -> tuple[int, int]:
    """From one sequence's scale to the next, and from one KV head's."""
    steps = [
        stride if size > 1 else 0 for size, stride in zip(scales.shape, scales.strides, strict=True)
    ]
    batch, head = (0, 0, *steps)[-2:]
    return batch, head


def check_scale_shape(name: str, t: Seen, sizes: list[int], cache: list[int]) -> None:
    """Raise InputError unless a tensor has a scale for all, for every KV head, of each sequence, or
    of each token.

    Args:
        name: Its name.
        t: It.
        sizes: [batch, num_kv_heads].
        cache: [rows, max_seq_len, num_kv_heads], or of pages.
    """
    shape = list(t.shape)
    if of_tokens(shape):
        return _check_of_tokens(name, t, cache)
    if shape not in ([], [1], sizes[1:], sizes):
        allowed = f"[], {sizes[1:]} (of KV heads) or {sizes} (of sequences and KV heads)"
        fail(name, shape_text(shape), allowed)
    if any(
        size > 1 and stride > _MAX_STRIDE for size, stride in zip(shape, t.strides, strict=True)
    ):
        fail(name, f"strides {list(t.strides)}", f"strides up to {_MAX_STRIDE}")


def _check_of_tokens(name: str, t: Seen, cache: list[int]) -> None:
    if list(t.shape) != cache:
        fail(name, shape_text(list(t.shape)), f"{cache}, those of the cache without head_dim")
    _, room, heads = cache
    row, *inner = t.strides
    right = [n == 1 or s == e for n, s, e in zip((room, heads), inner, (heads, 1), strict=True)]
    if not all(right) or (cache[0] > 1 and not room * heads <= row <= _MAX_STRIDE):
        allowed = f"[{room * heads} or more, {heads}, 1]; allocate it so, for it is written to"
        fail(name, f"strides {list(t.strides)}", allowed)


def check_pairs(name: str, t: Seen) -> None:
    """Raise InputError unless rows of a cache begin with a whole pair of elements of 8 bits."""
    steps = [s for n, s in zip(t.shape[:-1], t.strides[:-1], strict=True) if n > 1]
    if t.itemsize < ELEMENT_BYTES and (t.address % ELEMENT_BYTES or any(s % 2 for s in steps)):
        fail(
            name,
            f"strides {list(t.strides)} at address {t.address:#x}",
            f"rows at multiples of {ELEMENT_BYTES} bytes: even strides of {t.dtype}",
        )


def in_pairs(t: Seen) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """A cache as kernels see it, in elements of 16 bits: shape, strides, bytes of an element."""
    packed = ELEMENT_BYTES // t.itemsize
    shape = *t.shape[:-1], t.shape[-1] // packed
    return shape, tuple([stride // packed for stride in t.strides[:-1]] + [1]), ELEMENT_BYTES
