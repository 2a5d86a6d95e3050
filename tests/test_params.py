"""The launcher's Params is the kernel's Params, byte for byte."""

from __future__ import annotations

import ctypes
import re

import pytest

from gqa_cutlass.codegen.compile import compile_source
from gqa_cutlass.codegen.render import include_dir
from gqa_cutlass.launcher import Params

STRIDES = dict(Params._fields_)["q_stride"]
FIELDS = [name for name, *_ in Params._fields_]
PROBE = """
#include <cuda/std/cstddef>
#include <gqa/params.cuh>
#define VALUE(name, value) extern "C" __device__ unsigned long long name = value;
"""


@pytest.fixture(scope="module")
def layout() -> dict[str, int]:
    """Sizes and offsets as NVRTC sees them, from the initial values of variables in PTX."""
    lines = ["VALUE(size, sizeof(gqa::Params))", "VALUE(size_strides, sizeof(gqa::Strides))"]
    lines += [f"VALUE(offset_{f}, offsetof(gqa::Params, {f}))" for f in FIELDS]
    lines += [f"VALUE(size_{f}, sizeof(static_cast<gqa::Params*>(nullptr)->{f}))" for f in FIELDS]
    lines += [f"VALUE(strides_{f}, offsetof(gqa::Strides, {f}))" for f, _ in STRIDES._fields_]
    text = compile_source(PROBE + "\n".join(lines), "probe", "compute_80").code.decode()
    found = re.findall(r"\.u64 (\w+)(?: = (\d+))?;", text)
    return {name: int(value or 0) for name, value in found}


def _declared(struct: str) -> list[str]:
    """Names of a struct's fields, in the order in which the header declares them."""
    text = (include_dir() / "gqa" / "params.cuh").read_text()
    body = re.search(rf"struct {struct} {{(.*?)\n}};", text, re.S)
    assert body is not None
    return re.findall(r"^\s*[\w ]+[*\w] (\w+);", body.group(1), re.M)


def test_fields_have_the_same_names_in_the_same_order() -> None:
    assert _declared("Params") == FIELDS
    assert _declared("Strides") == [name for name, *_ in STRIDES._fields_]


def test_structures_have_the_same_size(layout: dict[str, int]) -> None:
    assert ctypes.sizeof(Params) == layout["size"]
    assert ctypes.sizeof(STRIDES) == layout["size_strides"]


@pytest.mark.parametrize("field", FIELDS)
def test_field_has_the_same_place_and_size(field: str, layout: dict[str, int]) -> None:
    mine = getattr(Params, field)
    assert (mine.offset, mine.size) == (layout[f"offset_{field}"], layout[f"size_{field}"])


@pytest.mark.parametrize("field", [name for name, *_ in STRIDES._fields_])
def test_stride_has_the_same_place(field: str, layout: dict[str, int]) -> None:
    assert getattr(STRIDES, field).offset == layout[f"strides_{field}"]
