"""Features beside the plain kernel: what each costs, and what a window saves.

Protocol: as for the grid. The step with a feature takes turns with the plain one: over the same
tokens, or, where a window hides the rest of a large cache, over a cache of the window alone. Every
output is checked against float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.data import Data, check
from bench.pages import PagedData, check_paged
from bench.points import GRID, Point
from bench.record import Featured
from bench.timing import interleaved
from bench.unusual import SCALE, Fp8Data, TokensData, check_unusual, tables
from gqa_cutlass.tuning.timing import Graph

Options = dict[str, Any]


@dataclass(frozen=True)
class Windowed(Point):
    """A problem of which a window of tokens is attended.

    Args:
        window: Tokens, the new one included.
    """

    window: int

    @property
    def read_bytes(self) -> int:
        """Bytes of K and V within the windows, read once."""
        return self.batch * self.window * self.row_bytes


@dataclass(frozen=True, kw_only=True)
class Case:
    """A feature at a point.

    Args:
        feature: Label.
        point: What is attended.
        options: The call's, by the point's data.
        plain: What the step without the feature attends; None: the same.
        most: Target: what the feature may cost, as a multiple of the plain step.
        more: Target: microseconds that it may cost besides.
        page_size: Tokens of a page, where the caches of the step with the feature are in pages.
        tokens: Query tokens and new ones of a sequence in the step with the feature.
        is_fp8: Whether its caches are of 8 bits.
    """

    feature: str
    point: Point
    options: Callable[[Data], Options]
    plain: Point | None = None
    most: float = 1.0
    more: float = 0.0
    page_size: int | None = None
    tokens: int = 1
    is_fp8: bool = False

    @property
    def points(self) -> tuple[Point, Point]:
        """What the step with the feature attends, and the plain one."""
        return self.point, self.plain or self.point


def _heads(data: Data) -> Tensor:
    """A number per query head."""
    return torch.linspace(0.01, 0.5, data.point.num_q_heads, device=data.q.device)


_SHAPES = (
    Point("llama3-8b", 32, 8, 128, 1, 16384),
    Point("llama3-8b", 32, 8, 128, 8, 8192),
    Point("gemma2-9b", 16, 8, 256, 16, 4096),
    Point("gpt-oss", 64, 8, 64, 64, 2048),
)
_PAGED = (
    Point("llama3-8b", 32, 8, 128, 1, 1024),
    Point("llama3-8b", 32, 8, 128, 1, 16384),
    Point("llama3-8b", 32, 8, 128, 8, 8192),
    Point("llama3-8b", 32, 8, 128, 64, 1024),
    Point("gemma2-9b", 16, 8, 256, 16, 4096),
    Point("gpt-oss", 64, 8, 64, 64, 2048),
)
_UNUSUAL = _PAGED[:4]
_SCORES: tuple[tuple[str, Callable[[Data], Options]], ...] = (
    ("softcap", lambda data: {"softcap": 30.0}),
    ("sinks", lambda data: {"sinks": _heads(data)}),
    ("ALiBi", lambda data: {"alibi_slopes": _heads(data)}),
)
CASES = (
    *(
        Case(feature=feature, point=point, options=options, most=1.03)
        for point in _SHAPES
        for feature, options in _SCORES
    ),
    *(
        Case(
            feature=f"window of {window}",
            point=Windowed("llama3-8b", 32, 8, 128, batch, room, window),
            options=lambda data, window=window: {"window_size": (window - 1, 0)},  # type: ignore[misc]
            plain=Point("llama3-8b", 32, 8, 128, batch, window),
            more=0.4,
        )
        for batch, room, window in ((1, 131072, 1024), (8, 32768, 1024), (1, 131072, 4096))
    ),
    *(
        Case(
            feature=f"pages of {page_size}",
            point=point,
            options=lambda data: {},
            page_size=page_size,
            most=1.1 if page_size == 1 else 1.02,
            more=0.2 if page_size > 1 and point.read_bytes < 32 << 20 else 0.0,
        )
        for point in _PAGED
        for page_size in (1, 16, 64, 256)
    ),
    *(
        Case(
            feature=f"{tokens} tokens",
            point=point,
            options=lambda data: {},
            tokens=tokens,
            most=1.1 if tokens == 4 else 1.25,
        )
        for point in _UNUSUAL
        for tokens in (2, 4, 8)
    ),
    *(
        Case(feature="norm and rotation", point=point, options=tables, more=0.4)
        for point in _UNUSUAL
    ),
    *(
        Case(
            feature="float8_e4m3fn",
            point=point,
            is_fp8=True,
            options=lambda data: {"k_scale": SCALE, "v_scale": SCALE},
            most=1 / 1.8 if point.read_bytes >= 512 << 20 else 1.0,
        )
        for point in GRID
    ),
    Case(
        feature="window of 128, sinks (gpt-oss)",
        point=Windowed("gpt-oss", 64, 8, 64, 16, 16384, 128),
        options=lambda data: {"window_size": (127, 0), "sinks": _heads(data)},
        plain=Point("gpt-oss", 64, 8, 64, 16, 128),
        more=0.4,
    ),
    Case(
        feature="window of 4096, softcap (Gemma 2)",
        point=Windowed("gemma2-9b", 16, 8, 256, 4, 8192, 4096),
        options=lambda data: {"window_size": (4095, 0), "softcap": 50.0},
        plain=Point("gemma2-9b", 16, 8, 256, 4, 4096),
        most=1.03,
        more=0.4,
    ),
)


def measure_feature(case: Case, pool: Tensor) -> Featured:
    """Check and time one feature beside the plain step."""
    data: Data
    if case.tokens > 1 or case.is_fp8 or case.options is tables:
        if case.is_fp8:
            data = Fp8Data(case.point, pool)
        elif case.tokens > 1:
            data = TokensData(case.point, pool, case.tokens)
        else:
            data = Data(case.point, pool)
        options = case.options(data)
        plan = data.plan(**options)
        error = check_unusual(plan, data, **options)
    elif case.page_size is None:
        data = Data(case.point, pool)
        options = case.options(data)
        plan = data.plan(**options)  # which keeps the tensors among them
        _, error = check(plan, data, **options)
    else:
        data = paged = PagedData(case.point, pool, case.page_size)
        plan = paged.plan(block_table=paged.table, **case.options(data))
        _, error = check_paged(plan, paged)
    plain_data = Data(case.points[1], pool)
    plain_plan = plain_data.plan()
    check(plain_plan, plain_data)
    graphs = {
        "with": Graph(lambda i: data.step(plan, i), data.num_sets),
        "plain": Graph(lambda i: plain_data.step(plain_plan, i), plain_data.num_sets),
    }
    times = interleaved(graphs)
    return Featured(
        point=str(case.point), feature=case.feature, kernel=plan.dispatch.config.name,
        mib=case.point.read_bytes / 2**20, relative_error=error, ours=times["with"],
        plain=times["plain"], limit=case.most * times["plain"] + case.more,
    )  # fmt: skip
