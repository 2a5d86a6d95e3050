"""The launcher's Params and TmaParams are the kernel's, byte for byte."""

from __future__ import annotations

import ctypes
import re

import pytest

from gqa_cutlass.codegen.compile import compile_source
from gqa_cutlass.codegen.headers import include_dir
from gqa_cutlass.codegen.schema.merge import Divisor, MergeParams, divisor
from gqa_cutlass.codegen.schema.params import TENSOR_MAP_ALIGN, TENSOR_MAP_BYTES, Params, TmaParams

FIELDS = [name for name, *_ in Params._fields_]
STRIDES = {kind for _, kind, *_ in Params._fields_ if issubclass(kind, ctypes.Structure)}
STRIDE_FIELDS = [
    pytest.param(kind, name, id=f"{kind.__name__}.{name}")
    for kind in sorted(STRIDES, key=lambda kind: kind.__name__)
    for name, *_ in kind._fields_
]
MERGE_STRUCTS: tuple[type[ctypes.Structure], ...] = (MergeParams, Divisor)
TMA_FIELDS = [name for name, *_ in TmaParams._fields_]
PROBE = """
#include <cuda/std/cstddef>
#include <gqa/merge/merge_params.cuh>
#include <gqa/params.cuh>
#define VALUE(name, value) extern "C" __device__ unsigned long long name = value;
"""


@pytest.fixture(scope="module")
def layout() -> dict[str, int]:
    """Sizes and offsets as NVRTC sees them, from the initial values of variables in PTX."""
    lines = ["VALUE(size, sizeof(gqa::Params))"]
    lines += [f"VALUE(size_{s.__name__}, sizeof(gqa::{s.__name__}))" for s in STRIDES]
    lines += [f"VALUE(offset_{f}, offsetof(gqa::Params, {f}))" for f in FIELDS]
    lines += [f"VALUE(size_{f}, sizeof(static_cast<gqa::Params*>(nullptr)->{f}))" for f in FIELDS]
    lines += [
        f"VALUE({s.__name__}_{f}, offsetof(gqa::{s.__name__}, {f}))"
        for s in STRIDES
        for f, _ in s._fields_
    ]
    lines += [
        "VALUE(size_tma, sizeof(gqa::TmaParams))",
        "VALUE(align_map, alignof(gqa::TensorMap))",
    ]
    for s in MERGE_STRUCTS:
        lines += [f"VALUE(size_{s.__name__}, sizeof(gqa::{s.__name__}))"]
        lines += [
            f"VALUE({s.__name__}_{f}, offsetof(gqa::{s.__name__}, {f}))" for f, *_ in s._fields_
        ]
    lines += [f"VALUE(tma_{f}, offsetof(gqa::TmaParams, {f}))" for f in TMA_FIELDS]
    text = compile_source(PROBE + "\n".join(lines), "probe", "compute_80").code.decode()
    found = re.findall(r"\.u64 (\w+)(?: = (\d+))?;", text)
    return {name: int(value or 0) for name, value in found}


def _declared(struct: str, header: str = "params.cuh") -> list[str]:
    """Names of a struct's fields, in the order in which the header declares them."""
    text = include_dir().joinpath("gqa", *header.split("/")).read_text()
    body = re.search(rf"struct {struct} {{(.*?)\n}};", text, re.S)
    assert body is not None
    return re.findall(r"^\s*[\w ]+[*\w] (\w+)(?:\[\d+\])?;", body.group(1), re.M)


def test_fields_have_the_same_names_in_the_same_order() -> None:
    assert _declared("Params") == FIELDS
    for strides in STRIDES:
        assert _declared(strides.__name__) == [name for name, *_ in strides._fields_]
    assert _declared("TmaParams") == TMA_FIELDS


def test_structures_have_the_same_size(layout: dict[str, int]) -> None:
    assert ctypes.sizeof(Params) == layout["size"]
    assert all(ctypes.sizeof(s) == layout[f"size_{s.__name__}"] for s in STRIDES)
    assert ctypes.sizeof(TmaParams) == layout["size_tma"]


@pytest.mark.parametrize("field", FIELDS)
def test_field_has_the_same_place_and_size(field: str, layout: dict[str, int]) -> None:
    mine = getattr(Params, field)
    assert (mine.offset, mine.size) == (layout[f"offset_{field}"], layout[f"size_{field}"])


@pytest.mark.parametrize(("strides", "field"), STRIDE_FIELDS)
def test_stride_has_the_same_place(
    strides: type[ctypes.Structure], field: str, layout: dict[str, int]
) -> None:
    assert getattr(strides, field).offset == layout[f"{strides.__name__}_{field}"]


@pytest.mark.parametrize("field", TMA_FIELDS)
def test_tensor_map_has_the_same_place(field: str, layout: dict[str, int]) -> None:
    assert getattr(TmaParams, field).offset == layout[f"tma_{field}"]


def test_tensor_maps_are_as_large_and_aligned_as_the_drivers(layout: dict[str, int]) -> None:
    assert {field: getattr(TmaParams, field).size for field in ("keys", "values")} == {
        "keys": TENSOR_MAP_BYTES,
        "values": TENSOR_MAP_BYTES,
    }
    assert layout["align_map"] == TENSOR_MAP_ALIGN
    assert all(layout[f"tma_{field}"] % TENSOR_MAP_ALIGN == 0 for field in ("keys", "values"))


@pytest.mark.parametrize("struct", MERGE_STRUCTS)
def test_what_merges_are_told_has_the_same_places(
    struct: type[ctypes.Structure], layout: dict[str, int]
) -> None:
    fields = [name for name, *_ in struct._fields_]
    assert _declared(struct.__name__, "merge/merge_params.cuh") == fields
    assert ctypes.sizeof(struct) == layout[f"size_{struct.__name__}"]
    for name in fields:
        assert getattr(struct, name).offset == layout[f"{struct.__name__}_{name}"]


@pytest.mark.parametrize("number", [1, 2, 3, 7, 10, 641, 65535, 2**30 + 1, 2**31 - 1, 2**31])
def test_divisors_divide(number: int) -> None:
    by, most = divisor(number), 2**31 - 1
    assert by.multiplier == -(-(1 << by.shift) // number) < 2**32
    whole = most // number * number
    for dividend in {0, 1, number - 1, min(number, most), max(whole - 1, 0), whole, most}:
        assert dividend * by.multiplier >> by.shift == dividend // number
