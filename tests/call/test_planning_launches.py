"""How launches are planned: splits, clusters, tensor maps, workspace and counters."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from executors import MERGE_COUNTERS, STREAM, Notes
from planning import TMA, inputs_of, maps_of, params_of, run
from torch import Tensor

import gqa_cutlass
from gqa_cutlass import gqa_decode
from gqa_cutlass.call import addresses as addresses_module
from gqa_cutlass.codegen.schema.launch import Pdl
from gqa_cutlass.codegen.schema.params import TmaParams
from gqa_cutlass.dispatch import H200
from gqa_cutlass.gpu import workspace


@pytest.mark.parametrize("dependent", [False, True])
def test_a_dependent_launch_is_asked_for(notes: Notes, dependent: bool) -> None:
    tensors = inputs_of()
    plan = gqa_cutlass.plan(**tensors, cache_seqlens=3, dependent=dependent)
    plan(**tensors, cache_seqlens=3)
    (shape,), (argument,) = notes.shapes, notes.launches
    assert shape.pdl == plan.dispatch.shape.pdl == dependent
    assert notes.loaded[0].pdl == dependent
    next_starts = Pdl.WHOLE if dependent else Pdl.NONE
    assert params_of(argument).pdl == plan.dispatch.pdl == next_starts


@pytest.mark.parametrize("call", [gqa_decode, gqa_cutlass.plan], ids=["gqa_decode", "plan"])
@pytest.mark.parametrize("ragged", [False, True])
def test_splits_are_dealt_out_by_length_where_lengths_may_differ(
    notes: Notes, call: Callable[..., object], ragged: bool
) -> None:
    tensors = inputs_of(max_seq_len=H200.balanced_tokens, batch=33)
    call(**tensors, cache_seqlens=torch.full((33,), 3, dtype=torch.int32), ragged=ragged)
    call(**tensors, cache_seqlens=3, ragged=ragged)  # the host knows that all are equal
    on_device, on_host = (shape.grid[1] for shape in notes.shapes)
    assert (on_device > on_host) == ragged


def test_tensor_maps_describe_the_caches(notes: Notes) -> None:
    tensors = inputs_of(max_seq_len=TMA)
    tensors["k_cache"] = torch.ones(2, 2, TMA, 64, dtype=torch.float16).transpose(1, 2)  # HND
    gqa_decode(**tensors, cache_seqlens=3)
    (argument,) = notes.launches
    assert isinstance(argument, TmaParams) and argument.decode.q == tensors["q"].data_ptr()
    keys, values = maps_of(argument)
    assert keys.address == tensors["k_cache"].data_ptr()
    assert values.address == tensors["v_cache"].data_ptr()
    assert keys.sizes == values.sizes == (64, TMA, 1, 2, 2)
    head, sequence = 128 * TMA, 2 * 128 * TMA
    assert keys.strides == (128, 128, head, sequence)
    assert values.strides == (256, 128, 128, sequence)
    assert keys.box == (64, notes.loaded[0].block_n, 1, 1, 1) and keys.swizzle == 128


def test_head_dims_of_whole_boxes_are_two_dimensions_of_a_map(notes: Notes) -> None:
    gqa_decode(**inputs_of(max_seq_len=TMA, head_dim=128), cache_seqlens=3)
    keys, _ = maps_of(notes.launches[0])
    assert keys.sizes == (64, TMA, 2, 2, 2)  # 64 dims, tokens, boxes, heads, sequences
    assert keys.strides == (512, 128, 256, 512 * TMA)
    assert keys.box == (64, notes.loaded[0].block_n, 2, 1, 1)


def test_other_head_dims_end_within_a_box(notes: Notes) -> None:
    gqa_decode(**inputs_of(max_seq_len=TMA, head_dim=80), cache_seqlens=3)
    keys, _ = maps_of(notes.launches[0])
    assert keys.sizes == (80, TMA, 2, 2)
    assert keys.strides == (320, 160, 320 * TMA)
    assert keys.box == (64, notes.loaded[0].block_n, 1, 1)


def test_blocks_of_a_cluster_need_no_workspace(notes: Notes) -> None:
    gqa_decode(**inputs_of(max_seq_len=4096), cache_seqlens=3, num_splits=8)
    params = params_of(*notes.launches)
    (shape,) = notes.shapes
    assert (shape.cluster, params.num_splits) == (8, 8)
    assert params.split_workspace is None and params.merge_counters is None


def test_clusters_that_share_a_sequence_borrow_workspace(notes: Notes) -> None:
    gqa_decode(**inputs_of(max_seq_len=4096), cache_seqlens=3, num_splits=16)
    params = params_of(*notes.launches)
    (shape,) = notes.shapes
    assert (shape.cluster, params.num_splits) == (8, 16)
    assert (params.split_workspace, params.merge_counters) == (
        notes.partials.data_ptr(),
        MERGE_COUNTERS,
    )


def test_strides_that_lead_nowhere_need_not_be_aligned(notes: Notes) -> None:
    tensors = inputs_of(batch=1, q_heads=4, kv_heads=1, max_seq_len=TMA)
    cache = torch.ones(1, TMA, 1, 64, dtype=torch.float16)
    tensors["k_cache"] = cache.as_strided(cache.shape, (64 * TMA + 1, 64, 3, 1))
    gqa_decode(**tensors, cache_seqlens=3)
    keys, _ = maps_of(notes.launches[0])
    assert keys.strides == (128, 128, 128, 128)


def test_an_expanded_batch_is_described_as_one(notes: Notes) -> None:
    tensors = inputs_of(max_seq_len=TMA) | {"k": None, "v": None}
    tensors["k_cache"] = tensors["k_cache"][:1].expand(2, -1, -1, -1)
    gqa_decode(**tensors, cache_seqlens=3)
    keys, _ = maps_of(notes.launches[0])
    assert keys.sizes == (64, TMA, 1, 2, 2) and keys.strides == (256, 128, 128, 0)


def test_tensor_maps_are_encoded_once_per_pair_of_caches(
    notes: Notes, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = [inputs_of(max_seq_len=TMA) for _ in range(3)]
    plan = gqa_cutlass.plan(**layers[0], cache_seqlens=3)
    for _ in range(2):
        for layer in layers:
            run(plan, layer | {"q": layer["q"].clone()}, 3)
    assert len(notes.encoded) == 2 * len(layers)
    addresses = [[m.address for m in maps_of(argument)] for argument in notes.launches]
    assert addresses == 2 * [[t["k_cache"].data_ptr(), t["v_cache"].data_ptr()] for t in layers]
    monkeypatch.setattr(addresses_module, "MAX_KNOWN", len(layers))
    run(plan, inputs_of(max_seq_len=TMA), 3)  # in place of the oldest
    maps = plan._addresses.maps
    assert maps is not None and len(maps.known) == len(layers)
    assert (layers[0]["k_cache"].data_ptr(), layers[0]["v_cache"].data_ptr()) not in maps.known


def test_one_line_is_logged_per_launch(notes: Notes, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="gqa_cutlass"):
        gqa_decode(**inputs_of(), cache_seqlens=3)
    (line,) = [record.getMessage() for record in caplog.records]
    assert f"kernel={notes.loaded[0].name} " in line and "stream=0x7" in line


def test_a_stream_keeps_its_workspace_until_more_is_needed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[Tensor] = []
    threads: list[int] = []

    def empty(count: int, *, dtype: torch.dtype, device: object) -> Tensor:
        made.append(torch.zeros(count, dtype=dtype))
        threads.append(threading.get_ident())
        return made[-1]

    monkeypatch.setattr(workspace, "_held", {})
    monkeypatch.setattr(workspace, "_counters_for", lambda key, count: 4096 * (key[1] + 1) + count)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(device=device))
    for context in ("device", "stream"):
        monkeypatch.setattr(torch.cuda, context, nullcontext)
    monkeypatch.setattr(torch, "empty", empty)
    asked = [(100, 10), (60, 5), (60, 20), (200, 5), (100, 20)]
    borrowed = [workspace.borrow(0, STREAM, *sizes) for sizes in asked]
    assert [memory is made[0] for memory, *_ in borrowed] == [True, True, True, False, False]
    assert all(address == memory.data_ptr() for memory, address, _ in borrowed)
    assert [made.numel() for made in made] == [100, 200]
    other, *_ = workspace.borrow(0, STREAM + 1, 10, 10)
    assert other is made[-1] and len(made) == 3
    # A pool that this thread allocates from, as before torch.compile captures, does not get them.
    assert threading.get_ident() not in threads


def test_merge_counters_are_cut_from_arenas_and_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    arenas: list[int] = []

    def allocate(device: int, num_bytes: int) -> int:
        arenas.append(num_bytes)
        return len(arenas) << 32

    monkeypatch.setattr(workspace, "allocate_zeroed", allocate)
    monkeypatch.setattr(workspace, "_counters", {})
    monkeypatch.setattr(workspace, "_arenas", {})
    first = workspace._counters_for((0, STREAM, 0), 100)
    assert workspace._counters_for((0, STREAM, 0), 60) == first  # enough of them are at hand
    second = workspace._counters_for((0, STREAM, 1), 10)
    assert second == first + 400 and len(arenas) == 1
    larger = workspace._counters_for((0, STREAM, 0), 101)
    assert larger == second + 40
    huge = workspace._counters_for((0, STREAM, 2), 10**6)
    assert arenas[1] >= 4 * 10**6 and huge == 2 << 32
