"""Picking kernels by their names."""

from __future__ import annotations

import pytest

from gqa_cutlass.codegen import DType, KernelConfig, Math, carried, default_config, select, shipped
from gqa_cutlass.codegen.selection import kernel_named, select_any
from gqa_cutlass.errors import ConfigError


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
        ("simt*d64, tensorop*d80", lambda c: (c.math, c.head_dim)
         in ((Math.SIMT, 64), (Math.TENSOROP, 80))),
        ("_d64_,_d64_g", lambda c: c.head_dim == c.value_dim == 64),
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


def test_parts_that_one_kernel_alone_has_name_it() -> None:
    config = next(c for c in shipped() if c.head_dim_v is not None)
    parts = config.name.removeprefix("gqa_decode_").rpartition("_")[0]
    assert kernel_named(parts) == config
    assert kernel_named(parts.replace("_", "*")) == config


def test_parts_that_several_kernels_have_name_some_of_them() -> None:
    with pytest.raises(
        ConfigError, match=r"got 'd128_g4', which \d+ kernels have in theirs"
    ) as told:
        kernel_named("d128_g4")
    near = str(told.value).partition("; near: ")[2].split(", ")
    assert len(near) == 3 and all("_d128_g4_" in kernel_named(name).name for name in near)


@pytest.mark.parametrize("name", ["", "*", "_", "(", "x" * 10**6])
def test_odd_names_of_a_kernel_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"^kernel name: got '.*; allowed: "):
        kernel_named(name)


def test_filter_that_matches_nothing_says_so() -> None:
    with pytest.raises(ConfigError, match=r"--kernels: got 'fp8'.* none of \d+ kernels.*list"):
        select("fp8")


def test_filter_applies_to_what_it_is_given() -> None:
    pool = [
        KernelConfig.from_name(shipped()[0].name),
        default_config(Math.SIMT, DType.F16, 40, 3, 1),
    ]
    assert select("d40", pool) == [pool[1]]


def test_parts_of_names_are_whole() -> None:
    """Where a substring would find 16 heads per KV head, or the other type, too."""
    assert {c.group_size for c in select("d128_g1")} == {1}
    assert {c.dtype for c in select("f16*d128")} == {DType.F16}
    assert {c.head_dim_v for c in select("d64")} == {None}
    assert {c.num_warps for c in select("w8")} == {8}
    with pytest.raises(ConfigError, match="near: tensorop"):
        select("tensor")


def test_a_whole_name_is_that_kernel_alone() -> None:
    plain = default_config(Math.TENSOROP, DType.F16, 128, 4, 8)
    assert any(c.name.startswith(f"{plain.name}_") for c in shipped())
    assert select(plain.name) == [plain]


def test_what_is_excluded_is_left_out() -> None:
    assert {c.schedule.value for c in select("d128", exclude="multistage")} == {"tma"}
    assert len(select_any(None, "simt, merge")) < len(carried())
    with pytest.raises(ConfigError, match=r"--exclude-kernels: got 'd128', which leaves none"):
        select("d128_g4", exclude="d128")
    with pytest.raises(ConfigError, match=r"got 'multistag', .*near: multistage"):
        select("d128", exclude="multistag")


@pytest.mark.parametrize(("given", "near"), [("d129", "d128"), ("d128_g37", "d128_g3")])
def test_near_names_are_suggested(given: str, near: str) -> None:
    with pytest.raises(ConfigError) as raised:
        select(given)
    assert near in str(raised.value).split("near: ")[1]


def test_a_kernel_is_found_by_its_name() -> None:
    config = default_config(Math.TENSOROP, DType.BF16, 72, 3, 8)
    assert kernel_named(config.name) == config
    with pytest.raises(ConfigError, match=f"near: .*{shipped()[0].name}"):
        kernel_named(f"{shipped()[0].name}x")
