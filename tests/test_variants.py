"""The shipped grid, and picking kernels from it."""

from __future__ import annotations

from collections import Counter
from itertools import product

import pytest

from gqa_cutlass.codegen import (
    ARCHES,
    DType,
    KernelConfig,
    Math,
    Schedule,
    default_config,
    select,
    shipped,
)
from gqa_cutlass.errors import ConfigError

HEAD_DIMS = (64, 80, 96, 112, 128, 192, 256)


def _has(math: Math, dtype: DType, head_dim: int, group_size: int, vec_width: int) -> bool:
    return default_config(math, dtype, head_dim, group_size, vec_width) in shipped()


@pytest.mark.parametrize(("head_dim", "dtype"), list(product(HEAD_DIMS, DType)))
def test_every_shipped_head_dim_has_both_types_and_all_widths(head_dim: int, dtype: DType) -> None:
    widths = {c.vec_width for c in shipped() if (c.head_dim, c.dtype) == (head_dim, dtype)}
    assert widths >= {8, 4, 2}


@pytest.mark.parametrize("math", Math)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_tensor_and_cuda_cores_serve_every_shipped_head_dim(math: Math, head_dim: int) -> None:
    assert {c.dtype for c in shipped() if (c.math, c.head_dim) == (math, head_dim)} == set(DType)


@pytest.mark.parametrize(
    ("head_dim", "group_size"),
    [(64, 7), (128, 7), (128, 8), (96, 1), (128, 4), (256, 2), (128, 32)],
    ids=["qwen2.5-0.5b", "qwen2.5-7b", "qwen3-30b-a3b", "phi-3-mini", "llama-3-8b", "gemma-2-9b",
         "32-on-one-head"],
)  # fmt: skip
def test_real_models_run_shipped_kernels(head_dim: int, group_size: int) -> None:
    assert _has(Math.TENSOROP, DType.F16, head_dim, group_size, 8)
    assert _has(Math.TENSOROP, DType.BF16, head_dim, group_size, 8)


def test_shipped_names_are_unique() -> None:
    counts = Counter(config.name for config in shipped())
    assert len(counts) > 100
    assert set(counts.values()) == {1}


def test_shipped_kernels_are_what_dispatch_asks_for() -> None:
    for c in shipped():
        asked = default_config(c.math, c.dtype, c.head_dim, c.group_size, c.vec_width, c.schedule)
        assert asked == c


def test_every_aligned_tensorop_kernel_has_a_counterpart_with_tensor_copies() -> None:
    def problems(schedule: Schedule) -> set[tuple[DType, int, int]]:
        return {
            (c.dtype, c.head_dim, c.group_size)
            for c in shipped()
            if (c.math, c.vec_width, c.schedule) == (Math.TENSOROP, 8, schedule)
        }

    assert problems(Schedule.TMA) == problems(Schedule.MULTISTAGE)


def test_with_one_stage_two_blocks_of_tensor_copies_share_a_multiprocessor() -> None:
    hopper = ARCHES["sm_90a"]
    small = [c for c in shipped() if c.tma and c.head_dim <= 128 and c.block_h == 8]
    assert {c.min_blocks for c in small} == {2}
    assert {c.blocks_per_sm(hopper) for c in small} == {1}


@pytest.mark.parametrize("filters", [None, ""])
def test_no_filter_selects_everything_in_order(filters: str | None) -> None:
    assert select(filters) == list(shipped())


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ("simt", lambda c: c.math is Math.SIMT),
        ("_bf16", lambda c: c.dtype is DType.BF16),
        ("tensorop*d128*align4", lambda c: (c.math, c.head_dim, c.vec_width)
         == (Math.TENSOROP, 128, 4)),
        ("simt*d64, simt*d80", lambda c: c.math is Math.SIMT and c.head_dim in (64, 80)),
        ("_d64_,_d64_g", lambda c: c.head_dim == 64),
        ("*_d256_*", lambda c: c.head_dim == 256),
        ("simt,", lambda c: c.math is Math.SIMT),
    ],
)  # fmt: skip
def test_filters_are_comma_separated_lists_of_ordered_substrings(
    filters: str, expected: object
) -> None:
    assert select(filters) == [c for c in shipped() if expected(c)]  # type: ignore[operator]


def test_substrings_must_occur_in_order() -> None:
    assert select("d128*align4")
    with pytest.raises(ConfigError):
        select("align4*d128")


def test_full_name_selects_one_kernel() -> None:
    config = shipped()[-1]
    assert select(config.name) == [config]


def test_full_name_selects_a_kernel_that_is_not_shipped() -> None:
    config = default_config(Math.TENSOROP, DType.F16, 72, 3, 8)
    assert config not in shipped()
    assert select(config.name) == [config]
    assert select(f"{shipped()[0].name}, {config.name}") == [shipped()[0], config]


def test_filter_that_matches_nothing_says_so() -> None:
    with pytest.raises(ConfigError, match=r"--kernels: got 'fp8'.* none of \d+ kernels.*list"):
        select("fp8")


def test_filter_applies_to_what_it_is_given() -> None:
    pool = [
        KernelConfig.from_name(shipped()[0].name),
        default_config(Math.SIMT, DType.F16, 40, 3, 1),
    ]
    assert select("d40", pool) == [pool[1]]
