"""Features of a call, one row each, and steps that ask for them."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import combinations
from typing import Any

import pytest
import torch
from cases import Step, make_step, snapshot
from edges import Edge
from helpers import THOROUGH
from tokens import see_tree, take_tokens

from gqa_cutlass.codegen import DType, KernelConfig, Math, Schedule, default_config
from gqa_cutlass.codegen.schema.policies import E4M3, E5M2, Policy, named, special

CAP, SINK, WINDOW = named("SoftCapped"), named("SinkInSum"), named("SlidingWindow")
TOKENS = {"tokens": named("SeveralQueries"), "tree": named("TreeOfQueries")}
POLICIES = {
    **TOKENS,
    "softcap": CAP, "sinks": SINK, "window": WINDOW, "alibi": named("Alibi"),
    "leftpad": named("LeftPadded"), "index": named("IndexedRow"), "float32": named("InFloat32"),
    "paged": named("PagedCache"), "norm": named("RmsNormed"), "rotary": named("RotatedByTables"),
    "e4m3": E4M3, "e5m2": E5M2,
}  # fmt: skip
PAIRS = [
    f"{a} and {b}" for a, b in combinations(POLICIES, 2) if POLICIES[a].slot != POLICIES[b].slot
]
_ALONE = {*TOKENS, "e4m3", "e5m2"}
ALL = " and ".join(name for name in POLICIES if name not in _ALONE)
ALL_OF_TOKENS = [f"{name} and {ALL}" for name in TOKENS]
ALL_IN_8_BITS = f"tokens and {ALL} and e4m3"
KINDS = {
    "tensorop": (Math.TENSOROP, DType.F16, 8, Schedule.MULTISTAGE),
    "simt": (Math.SIMT, DType.F16, 1, Schedule.MULTISTAGE),
    "tma": (Math.TENSOROP, DType.BF16, 8, Schedule.TMA),
}
FEW = {
    "splits": Edge(lengths=(300, 37, 0), capacity=512, splits=2),
    "attend only": Edge(lengths=(37, 0), capacity=64, append=False),
}
# What CI has of every kind of kernels: each feature has tests of its own; a GPU has all on all.
OWN = {
    "tma": ("e4m3", ALL_IN_8_BITS, ALL_OF_TOKENS[0]), "simt": ("window",),
    "tensorop": ("paged", ALL_OF_TOKENS[1]),
}  # fmt: skip
# Multistage is the same for CUDA cores but for its arithmetic, so that CI leaves those out.
every_schedule = pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=THOROUGH if k == "simt" else ()) for k in KINDS]
)


def policies_of(feature: str) -> tuple[Policy, ...]:
    return special(tuple(POLICIES[name] for name in feature.split(" and ")))


def kernel_of(kind: str, feature: str) -> KernelConfig:
    math_, dtype, width, schedule = KINDS[kind]
    return default_config(math_, dtype, 64, 4, width, schedule, policies_of(feature))


def with_feature(step: Step, feature: str) -> Step:
    """The step, asking for a feature."""
    for name in feature.split(" and "):
        FEATURES[name](step)
    snapshot(step)
    return step


def add_cap(step: Step) -> None:
    """So low that it bends most scores."""
    step.softcap = 1.5


def add_sinks(step: Step) -> None:
    """As heavy as all keys together, or as none of them; of another type in every size."""
    heads = step.q.shape[-2]
    sinks = torch.linspace(-2, 7, heads, dtype=torch.float32, device=step.q.device)
    step.sinks = sinks.to((torch.float32, torch.bfloat16)[step.q.shape[0] % 2])


def add_window(step: Step, window: int = 19) -> None:
    """That begins and ends within tiles; what it hides is not to be used, nor its NaN."""
    step.window_size = (window - 1, 0)
    for b, length in enumerate(step.lengths):
        oldest = length + step.count(b) - step.queries(b)
        step.hide(b, min(oldest + 1 - window, length))


def add_slopes(step: Step) -> None:
    """From heads that see all to heads that see few; of each sequence its own, or for all."""
    batch, heads = len(step.lengths), step.q.shape[-2]
    slopes = torch.linspace(-0.01, 0.7, batch * heads, device=step.q.device).view(batch, heads)
    step.alibi_slopes = slopes if batch % 2 else slopes[0].contiguous()


def add_padding(step: Step, *rows: int) -> None:
    """Within a tile, none, and all that there is; what it holds is not to be used, nor its NaN."""
    numbers = rows or [(21, 0, 3, 40)[b % 4] for b in range(len(step.lengths))]
    step.cache_leftpad = torch.tensor(numbers, dtype=torch.int32, device=step.q.device)
    for b, length in enumerate(step.lengths):
        step.hide(b, min(numbers[b], length))


def add_index(step: Step, spare: int = 2) -> None:
    """Backwards, into caches or a table of more rows, which hold nothing there."""
    batch = len(step.lengths)
    for name in ("k_cache", "v_cache") if step.block_table is None else ("block_table",):
        rows = getattr(step, name)
        none = torch.full_like(rows[:1], math.nan if rows.is_floating_point() else -1)
        setattr(step, name, torch.cat([*[none] * spare, rows.flip(0)]))
    order = range(spare + batch - 1, spare - 1, -1)
    step.cache_batch_idx = torch.tensor(list(order), dtype=torch.int32, device=step.q.device)


def add_pages(step: Step) -> None:
    """So small that tiles have several."""
    step.into_pages(3)


def add_tree(step: Step) -> None:
    """Of drafts that see some of the others."""
    take_tokens(step)
    see_tree(step)


def add_norm(step: Step) -> None:
    """Of queries and keys."""
    step.turning = step.turning.normed(step.q)


def add_rotary(step: Step) -> None:
    """Of all dims, or most."""
    step.turning = step.turning.rotated(step.q, step.positions())


FEATURES: dict[str, Callable[[Step], None]] = {
    "tokens": take_tokens,
    "tree": add_tree,
    "softcap": add_cap, "sinks": add_sinks, "window": add_window,
    "alibi": add_slopes,
    "leftpad": add_padding,
    "index": add_index,
    "float32": Step.in_float32,
    "paged": add_pages,
    "e4m3": lambda step: step.into_fp8(torch.float8_e4m3fn),
    "e5m2": lambda step: step.into_fp8(torch.float8_e5m2),
    "norm": add_norm,
    "rotary": add_rotary,
}  # fmt: skip


def step_of(feature: str, **problem: Any) -> Step:
    return with_feature(make_step(**problem), feature)
