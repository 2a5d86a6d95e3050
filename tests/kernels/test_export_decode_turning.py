"""The C library decodes with norms and rotations like Python."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from c_and_python import TMA_128, WIDE_64, assert_same
from c_build import build, write_dummies
from c_library import fresh_copy
from c_tokens import Call, make_call
from helpers import every
from torch import Tensor

from gqa_cutlass import InputError, gqa_decode
from gqa_cutlass.codegen import Math, Schedule, default_config
from gqa_cutlass.codegen.schema.policies import tagged

CAPACITY = 41  # of one tile and a bit
IN_CLUSTERS = TMA_128.block_n * TMA_128.num_warps + 9
ROPE = replace(WIDE_64, policies=tagged("rope"))
NORM = replace(WIDE_64, policies=tagged("norm"))
BOTH = default_config(
    Math.TENSOROP, TMA_128.dtype, 128, 4, 8, Schedule.TMA, tagged("multi_norm_rope"), None, 2
)
SEVERAL = replace(WIDE_64, policies=tagged("multi_rope"))


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library of kernels that norm and rotate."""
    folder = tmp_path_factory.mktemp("turning")
    return build(
        write_dummies(folder, (ROPE, NORM, BOTH, SEVERAL), ("sm_90a",)), folder / "libgqa.so"
    )


def tables(positions: int, dim: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Cosines and sines by position."""
    angles = torch.outer(torch.arange(positions), 100.0 ** -(torch.arange(dim // 2) / dim))
    return {"rotary_cos": angles.cos().to(dtype), "rotary_sin": angles.sin().to(dtype)}


def weights(dim: int, *sides: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Weights of norms."""
    return {f"{side}_norm_weight": torch.linspace(0.5, 2, dim).to(dtype) for side in sides}


def apart(given: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same with a gap behind each row."""
    return {name: torch.cat([t, t], 1)[:, : t.shape[1]] for name, t in given.items()}


def rotated(**options: Any) -> Call:
    return make_call(ROPE, [20, 20], CAPACITY, 1, kv_heads=2, **options)


CALLS: dict[str, Callable[[], Call]] = {
    "halves": lambda: rotated(**tables(CAPACITY, 64)),
    "neighbours of a part": lambda: rotated(
        **tables(21, 32, torch.float16), rotary_interleaved=True
    ),
    "rows apart": lambda: rotated(**apart(tables(CAPACITY, 64, torch.float16))),
    "several tokens": lambda: make_call(
        SEVERAL, [20], CAPACITY, 2, causal=False, **tables(CAPACITY, 64)
    ),
    "norm of both": lambda: make_call(
        NORM, [20, 20], CAPACITY, 1, **weights(64, "q", "k"), norm_eps=2**-10
    ),
    "norm of k": lambda: make_call(
        NORM, [20], CAPACITY, 1, **weights(64, "k", dtype=torch.bfloat16), norm_plus_one=True,
        norm_eps=0.0,
    ),
    "all in clusters": lambda: make_call(
        BOTH, [IN_CLUSTERS - 3], IN_CLUSTERS, 2, **tables(IN_CLUSTERS, 128),
        **weights(128, "q", "k"), norm_eps=2**-10,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", every(2, CALLS))
def test_rows_are_turned_like_in_python(library: Path, name: str) -> None:
    """With one length for all, and with lengths on the device."""
    call = CALLS[name]()
    for ragged in (False, True):
        expected = call.by_python(ragged=ragged)
        assert_same(call.by_c(fresh_copy(library), ragged=ragged), expected)
        assert not call.out.isnan().any()
        call.restore()


def test_positions_of_their_own_are_like_in_python(library: Path) -> None:
    """And those that tables do not have spoil their sequence alone."""
    call, flag = rotated(**tables(CAPACITY, 64)), torch.zeros(1, dtype=torch.int32)
    starts = torch.tensor([3, CAPACITY - 1], dtype=torch.int32)
    call.options["rotary_seqlens"] = starts
    for last in (CAPACITY - 1, CAPACITY):
        starts[1] = last
        expected = call.by_python(ragged=True)
        assert_same(call.by_c(fresh_copy(library), ragged=True, flag=flag), expected)
        assert call.out[1].isnan().all() == (flag.item() == 1 + 1) == (last == CAPACITY)
        assert not call.out[0].isnan().any()
        call.restore()


def test_a_length_that_tables_do_not_have_is_refused(library: Path) -> None:
    call, c = CALLS["several tokens"](), fresh_copy(library)
    call.options |= tables(30, 64)
    assert call.decode(c, call.config(cache_len=28)) == "GQA_SUCCESS"
    launches = c.driver.launches
    assert call.decode(c, call.config(cache_len=29)) == "GQA_ERROR_INVALID_VALUE"
    assert c.driver.launches == launches
    says = "got 29; allowed: at most 28, for which rotary_cos and rotary_sin have the positions of "
    assert f"config: cache_len: {says}" in c.error
    with pytest.raises(InputError) as refused:
        gqa_decode(
            call.q, call.k_cache, call.v_cache, call.k, call.v, cache_seqlens=29, **call.options
        )
    assert says in str(refused.value)
