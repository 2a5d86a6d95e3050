"""What a call asks for by its options: checked, and as the kernel's argument has it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gqa_cutlass.call.given import PAGES, Given, Layout, Seen, Tokens, fail
from gqa_cutlass.call.layout import NUMBER_TYPES
from gqa_cutlass.call.stored import SCALES, is_number, scale_fields
from gqa_cutlass.call.tokens import SEVERAL, TREE, stride_fields
from gqa_cutlass.call.turning import turning_fields
from gqa_cutlass.codegen.config import KernelConfig
from gqa_cutlass.codegen.schema.policies import CALL, FP8, POLICIES, Policy, special
from gqa_cutlass.codegen.schema.problem import (
    MAX_SCALE,
    MAX_SEQ_LEN,
    MAX_SOFTCAP,
    MAX_SPLITS,
    MAX_TOKENS,
)
from gqa_cutlass.codegen.schema.rounding import reciprocal
from gqa_cutlass.dispatch.choice import Choice
from gqa_cutlass.errors import InputError, shown

NO_WINDOW = -1, -1


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The options of a call that are no tensors, by their defaults; see `options.Options`."""

    softmax_scale: float | None = None
    num_splits: int = 0
    return_lse: bool = False
    ragged: bool = True
    max_seqlen: int | None = None
    batch_invariant: bool = False
    softcap: float = 0  # an int, for torch traces a float as one that may vary
    window_size: tuple[int, int] = NO_WINDOW
    causal: bool = True
    rotary_interleaved: bool = False
    norm_eps: float = 1e-6
    norm_plus_one: bool = False
    max_seqlen_q: int | None = None
    k_scale: float | None = None
    v_scale: float | None = None
    out_dtype: torch.dtype | None = None
    kernel: KernelConfig | Choice | None = None
    dependent: bool = False


# Options that are tensors, in the order of the table: those of features.
TENSORS = tuple(row.name for row in CALL.rows if row.feature)
ALIASES = {"page_table": "block_table"}  # other names that options have elsewhere
_NONES = (None,) * len(TENSORS)
TAKEN: dict[str, set[str]] = {}  # names of options by functions, which `options.listed` notes


def features_of(options: dict[str, Any]) -> tuple[Tensor | None, ...]:
    """Take the tensors of features out of options.

    Returns:
        Them in the order of the table; nothing if there are none.
    """
    numbers = {name: options.pop(name) for name in SCALES if is_number(options.get(name))}
    tensors = tuple(map(options.pop, TENSORS, _NONES))
    options |= numbers
    for tensor in tensors:
        if tensor is not None:
            return tensors
    return ()


def rename(options: dict[str, Any]) -> None:
    """Give options that came by other names those that they have here.

    Raises:
        InputError: One came by both.
    """
    for alias, name in ALIASES.items():
        if alias in options:
            value = options.pop(alias)
            if value is not None and options.get(name) is not None:
                fail(f"{name} and {alias}", "both", "one of them: they are the same")
            if value is not None:
                options[name] = value


def rounded(longest: Any) -> Any:
    """`max_seqlen` as it counts: the next power of two; what is no size stays as it is."""
    return 1 << (longest - 1).bit_length() if type(longest) is int and longest > 0 else longest


def check(call: str, options: Mapping[str, Any], given: Given) -> tuple[Asked, tuple[Policy, ...]]:
    """Check options, whatever the tensors are.

    Args:
        call: The name of the function that was called.
        options: Those that are no tensors.
        given: The tensors, of which it counts whether they are there.

    Returns:
        All that are no tensors; and what the kernel must have in its slots: the features that were
        asked for, by value or by tensor.

    Raises:
        InputError: An option is not allowed.
        TypeError: There is no such option.
    """
    for name in options:
        if name not in TAKEN[call]:
            raise TypeError(f"{call}() got an unexpected keyword argument {name!r}")
    asked = Asked(**options)
    if asked.window_size is not NO_WINDOW:
        asked = replace(
            asked, window_size=check_window(asked.window_size, asked.causal is not False)
        )
    check_options(
        asked.num_splits, asked.softmax_scale, return_lse=asked.return_lse, ragged=asked.ragged,
        batch_invariant=asked.batch_invariant,
        dependent=asked.dependent, causal=asked.causal,
        rotary_interleaved=asked.rotary_interleaved, norm_plus_one=asked.norm_plus_one,
    )  # fmt: skip
    if not _is_number(asked.norm_eps) or not 0 <= asked.norm_eps <= MAX_SCALE:
        fail("norm_eps", shown(asked.norm_eps), f"a number from 0 to {MAX_SCALE:g}")
    if asked.max_seqlen is not None:
        longest = rounded(asked.max_seqlen)
        if type(longest) is not int or longest < 1:
            fail("max_seqlen", shown(longest), "an int, 1 and more, or None")
        asked = replace(asked, max_seqlen=min(longest, MAX_SEQ_LEN))
    most = asked.max_seqlen_q
    if most is not None and (type(most) is not int or not 1 <= most < 2**31):
        fail("max_seqlen_q", shown(most), f"an int, 1 to {MAX_TOKENS}, or None")
    if asked.kernel is not None and not isinstance(asked.kernel, KernelConfig | Choice):
        raise InputError(
            f"plan: kernel: got {shown(asked.kernel)}; allowed: a KernelConfig (another plan's "
            "`dispatch.config`, for instance), a Choice, or None. Nothing was launched."
        )
    if asked.out_dtype is not None and not isinstance(asked.out_dtype, torch.dtype):
        fail("out_dtype", shown(asked.out_dtype), "None, q's dtype, or torch.float32")
    wanted = [row.feature for row, t in zip(CALL.rows, given, strict=False) if t is not None]
    if check_softcap(asked.softcap, 0):
        wanted.append("softcap")
    if asked.window_size[0] >= 0:
        wanted.append("window_size")
    if asked.out_dtype is torch.float32:
        wanted.append("out_dtype")
    if "tree_mask" in wanted:  # which goes with no tokens of its own
        wanted = [feature for feature in wanted if feature != SEVERAL.feature]
    # What caches hold, their type says.
    features = [p for p in POLICIES if p.feature in wanted and p not in FP8]
    return asked, special(tuple(features))


def check_options(num_splits: int = 0, softmax_scale: float | None = None, **flags: bool) -> None:
    """Raise InputError for an option that is not allowed.

    Args:
        num_splits: 0 (choose) to MAX_SPLITS.
        softmax_scale: A number that float32 can hold, or None for head_dim ** -0.5.
        flags: True or False, by name.
    """
    if type(num_splits) is not int or not 0 <= num_splits <= MAX_SPLITS:
        fail("num_splits", shown(num_splits), f"0 (the dispatcher decides) to {MAX_SPLITS}")
    if softmax_scale is not None:
        # Compared before it is converted: an int may be too large for a float.
        if not _is_number(softmax_scale) or not -MAX_SCALE <= softmax_scale <= MAX_SCALE:
            allowed = f"a number from {-MAX_SCALE:g} to {MAX_SCALE:g}, or None for head_dim ** -0.5"
            fail("softmax_scale", shown(softmax_scale), allowed)
    for name, value in flags.items():
        if type(value) is not bool:
            fail(name, shown(value), "True or False")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_softcap(softcap: float, softmax_scale: float) -> float:
    """A bound of the scores.

    Raises:
        InputError: No number, negative, not finite, or too small for the scale.
    """
    if not _is_number(softcap) or not 0 <= softcap <= MAX_SOFTCAP:
        fail("softcap", shown(softcap), f"0 (none), or a number up to {MAX_SOFTCAP:g}")
    cap = float(softcap)
    least = abs(softmax_scale) / MAX_SOFTCAP
    if cap and (cap < least or not cap >= torch.finfo(torch.float32).tiny):
        least = max(least, torch.finfo(torch.float32).tiny)
        fail("softcap", shown(softcap), f"0 (none), or {least:.3g} and more with this scale")
    return cap


def check_window(window_size: object, causal: bool = True) -> tuple[int, int]:
    """A sliding window. Where nothing is seen to the right of a query, that side is -1.

    Raises:
        InputError: Not two ints, or one below -1.
    """
    allowed = "two ints, (left, right), each -1 (no end) or more"
    if not isinstance(window_size, (tuple, list)) or len(window_size) != 2:
        fail("window_size", shown(window_size), allowed)
    left, right = window_size
    if type(left) is not int or type(right) is not int or min(left, right) < -1:
        fail("window_size", shown(window_size), allowed)
    return (left, -1 if causal else right)


def fields_of(
    asked: Asked, layout: Layout, scale: float, policies: tuple[Policy, ...], tokens: Tokens
) -> dict[str, float]:
    """What features put into the kernel's argument, but addresses, by the names of its fields.

    Args:
        asked: The options.
        layout: The tensors.
        scale: Factor on the scores.
        policies: The kernel's.
        tokens: Of the sequences.

    Raises:
        InputError: An option is not allowed with these tensors.
    """
    found = scale_fields(asked, layout)
    if not policies:
        return found
    if cap := check_softcap(asked.softcap, scale):
        found["softcap_in"] = scale / cap
        found["softcap_out"] = cap * math.log2(math.e)
    found["window_left"] = min(asked.window_size[0], MAX_SEQ_LEN)
    if slopes := layout.get("alibi_slopes"):
        found["alibi_batch_stride"] = slopes.shape[-1] if len(slopes.shape) == 2 else 0
    if tokens.several or TREE in layout:
        found |= stride_fields(tokens, layout, layout["q"].shape[-2])
        right = asked.window_size[1]
        found["window_right"] = 0 if asked.causal else MAX_SEQ_LEN if right < 0 else right
    found |= turning_fields(layout, asked)
    found["cache_rows"] = layout.get(PAGES, layout["k_cache"]).shape[0]
    if table := layout.get(PAGES):
        found |= _pages(table, layout["k_cache"])
    for row in CALL.rows:
        if row.type_field and row.name in layout:
            found[row.type_field] = NUMBER_TYPES[layout[row.name].dtype]
    return found


def _pages(table: Seen, pool: Seen) -> dict[str, float]:
    """What the kernel must know of pages; `page_of` in cache_paged.cuh divides by their size."""
    num_pages, page_size = pool.shape[:2]
    magic, shift = reciprocal(page_size)
    return {
        "num_pages": num_pages,
        "block_table_stride": table.strides[0],
        "page_size": page_size,
        "page_magic": magic,
        "page_shift": shift,
    }
