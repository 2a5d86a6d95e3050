"""The C library decodes several tokens of a sequence like Python."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from c_and_python import TMA_128, WIDE_64, assert_same
from c_build import build, write_dummies
from c_library import fresh_copy
from c_tokens import Call, make_call
from helpers import every

import gqa_cutlass
from gqa_cutlass import CacheOverflowError, gqa_decode, pack_tree_mask
from gqa_cutlass.call.record import LaunchRecord, parse
from gqa_cutlass.codegen import DType, KernelConfig, Math, Schedule, default_config
from gqa_cutlass.codegen.schema.policies import tagged

CAPACITY = 41  # of one tile and a bit
IN_CLUSTERS = TMA_128.block_n * TMA_128.num_warps + 9


def ends(*counts: int) -> torch.Tensor:
    """Where sequences of so many tokens begin, and where the last one ends."""
    return torch.tensor([0, *counts]).cumsum(0).to(torch.int32)


def several(
    *, tma: bool = False, tags: str = "", tokens: int = 3, slot: str = "multi"
) -> KernelConfig:
    """The kernel that dispatch takes for so many tokens, of groups of four heads."""
    return default_config(
        Math.TENSOROP, DType.BF16 if tma else DType.F16, 128 if tma else 64, 4, 8,
        Schedule.TMA if tma else Schedule.MULTISTAGE, tagged(f"{tags}_{slot}"), None, tokens,
    )  # fmt: skip


KERNELS = [
    several(), several(tokens=1), several(tokens=9), several(tags="win"), several(tma=True),
    several(slot="tree"), several(slot="tree", tokens=1), several(tags="paged"), WIDE_64, TMA_128,
]  # fmt: skip


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library of kernels of several tokens, and of one."""
    folder = tmp_path_factory.mktemp("tokens")
    return build(write_dummies(folder, KERNELS, ("sm_90a",)), folder / "libgqa.so")


def sliced() -> Call:
    """Slices of one projection, and an output with gaps."""
    call = make_call(several(), [20, 20], CAPACITY, 3, kv_heads=2)
    fused = torch.cat([call.q, call.k, call.v], 2)
    call.q, call.k, call.v = fused.split([8, 2, 2], 2)
    call.out = torch.full((2, 3, 9, 72), torch.nan, dtype=call.out.dtype)[:, :, :8, :64]
    return call


def drafts(tokens: int) -> Call:
    """A tree in which every draft but the first two has the one before its last as its parent."""
    sees = torch.eye(tokens, dtype=torch.bool)
    for draft in range(2, tokens):
        sees[draft] |= sees[draft - 2]
    mask = pack_tree_mask(sees.expand(2, tokens, tokens))
    return make_call(
        several(slot="tree", tokens=tokens), [20, 20], CAPACITY, tokens, tree_mask=mask
    )


CALLS: dict[str, Callable[[], Call]] = {
    "causal": lambda: make_call(several(), [20, 20], CAPACITY, 3, kv_heads=2),
    "two blocks of rows": lambda: make_call(several(tokens=9), [11], CAPACITY, 9),
    "one that is new": lambda: make_call(several(), [20, 20], CAPACITY, 3, 1),
    "one that asks": lambda: make_call(several(tokens=1), [20, 20], CAPACITY, 1, 3),
    "all see all": lambda: make_call(several(), [20, 20], CAPACITY, 3, causal=False),
    "a window on both sides": lambda: make_call(
        several(tags="win"), [20, 20], CAPACITY, 3, causal=False, window_size=(7, 1)
    ),
    "a window": lambda: make_call(several(tags="win"), [20], CAPACITY, 3, window_size=(7, 0)),
    "slices": sliced,
    "clusters": lambda: make_call(several(tma=True), [IN_CLUSTERS - 4] * 2, IN_CLUSTERS, 3),
    "a tree": lambda: drafts(4),
    "a tree of one": lambda: drafts(1),
    "one token": lambda: make_call(WIDE_64, [20, 20], CAPACITY, 1),
}


@pytest.mark.parametrize("name", every(2, CALLS))
def test_several_tokens_decode_like_python(library: Path, name: str) -> None:
    """With one length for all, and with lengths on the device."""
    call = CALLS[name]()
    for ragged in (False, True):
        expected = call.by_python(ragged=ragged)
        found = call.by_c(fresh_copy(library), ragged=ragged)
        assert_same(found, expected)
        assert not call.out.isnan().any()
        call.restore()


RAGGED: dict[str, Callable[[], Call]] = {
    "of queries": lambda: make_call(
        several(), [20, 7], CAPACITY, 4, 2, cu_seqlens_q=ends(1, 3), max_seqlen_q=3
    ),
    "of new tokens": lambda: make_call(
        several(), [20, 7], CAPACITY, 3, 4, cu_seqlens_k_new=ends(4, 0)
    ),
    "of both": lambda: make_call(
        several(tokens=4), [20, 7], CAPACITY, 4, 4, kv_heads=2, cu_seqlens_q=ends(1, 3),
        cu_seqlens_k_new=ends(1, 3),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RAGGED)
def test_unlike_numbers_of_tokens_decode_like_python(library: Path, name: str) -> None:
    call = RAGGED[name]()
    expected = call.by_python(ragged=True)
    found = call.by_c(fresh_copy(library), ragged=True)
    assert_same(found, expected)
    assert not call.out.isnan().any()


def test_several_tokens_in_pages_decode_like_python(library: Path) -> None:
    """Over the edge of a page, where the table says and into slots; and one that is not there."""
    table = torch.tensor([[4, 1, 0], [2, 3, 5]], dtype=torch.int32)
    call = make_call(several(tags="paged"), [7, 14], 8, 3, block_table=table)
    call.k_cache, call.v_cache = (
        torch.cat([t, t.flip(1), t.flip(3)]) for t in (call.k_cache, call.v_cache)
    )
    call.before = call.k_cache.clone(), call.v_cache.clone()
    slots = torch.tensor([[39, 8, 9], [30, -1, 41]])
    flag = torch.zeros(1, dtype=torch.int32)
    for asked in ({}, {"slot_mapping": slots}):
        call.options |= asked
        expected = call.by_python(ragged=True)
        assert_same(call.by_c(fresh_copy(library), ragged=True, flag=flag), expected)
        assert not call.out.isnan().any() and flag.item() == 0
        call.restore()
    table[1, 1] = 6
    expected = call.by_python(ragged=True)
    assert_same(call.by_c(fresh_copy(library), ragged=True, flag=flag), expected)
    assert call.out[1].isnan().all() and flag.item() == 1 + 1


def test_an_index_that_is_out_of_order_spoils_its_sequence_alone(library: Path) -> None:
    call = RAGGED["of both"]()
    call.options["cu_seqlens_q"][2] = 5  # beyond what there is
    flag = torch.zeros(1, dtype=torch.int32)
    expected = call.by_python(ragged=True)
    found = call.by_c(fresh_copy(library), ragged=True, flag=flag)
    assert_same(replace(found, lse=None), replace(expected, lse=None))
    assert flag.item() == 1 + 1


def test_all_new_tokens_must_fit(library: Path) -> None:
    call, c = CALLS["causal"](), fresh_copy(library)
    for length in (CAPACITY - 2, CAPACITY, 2**31 - 1):
        assert call.decode(c, call.config(cache_len=length)) == "GQA_ERROR_CACHE_OVERFLOW"
        with pytest.raises(CacheOverflowError) as refused:
            gqa_decode(call.q, call.k_cache, call.v_cache, call.k, call.v, cache_seqlens=length)
        assert f"gqa_decode: {c.error}" == str(refused.value)
    assert c.driver.all_calls() == {}
    assert call.decode(c, call.config(cache_len=CAPACITY - 3)) == "GQA_SUCCESS"
    call.seqlens[1] = CAPACITY - 2
    flag = torch.zeros(1, dtype=torch.int32)
    expected = call.by_python(ragged=True)
    assert_same(call.by_c(c, ragged=True, flag=flag), expected)
    assert flag.item() == 1 + 1 and call.out[1].isnan().all() and not call.out[0].isnan().any()


def test_several_tokens_are_logged_as_in_python(library: Path) -> None:
    for name in ("causal", "a window on both sides", "one that asks"):
        call, lines, c = CALLS[name](), list[str](), fresh_copy(library)
        c.log_to(lines)
        assert call.decode(c, call.config()) == "GQA_SUCCESS", c.error
        plan = gqa_cutlass.plan(
            call.q, call.k_cache, call.v_cache, call.k, call.v, cache_seqlens=20, out=call.out,
            softmax_scale=call.scale, return_lse=True, **call.options,
        )  # fmt: skip
        expected, found = parse(f"launch {LaunchRecord.of(plan, 20, 0, 0)}"), parse(lines[0])
        assert found | {"softmax_scale": expected["softmax_scale"]} == expected
        assert list(found) == list(expected)


def test_other_blocks_of_rows_serve_where_the_best_was_not_exported(library: Path) -> None:
    """By the fewest blocks, and then the smallest."""
    call = make_call(several(), [20], CAPACITY, 8)  # 32 rows, of which a block takes 8, 16 or 24
    found = call.by_c(fresh_copy(library), ragged=False)
    assert found.launched.kernel == several().name
    expected = call.by_python(ragged=False)
    assert expected.launched.kernel == several(tokens=8).name
    assert torch.allclose(found.out.float(), expected.out.float(), atol=2e-3)
