"""What a call hands to the driver, seen with a driver that only takes notes."""

from __future__ import annotations

import dataclasses
import logging
import math
from typing import Any

import pytest
import torch
from helpers import call_tensors

import gqa_cutlass
from gqa_cutlass import api, gqa_decode, workspace
from gqa_cutlass.codegen import ARCHES, KernelConfig
from gqa_cutlass.dispatch import model_device
from gqa_cutlass.errors import CacheOverflowError, InputError
from gqa_cutlass.launcher import Device, Params
from gqa_cutlass.workspace import OverflowFlag

STREAM, TICKETS = 7, 4096
GPU = dataclasses.replace(model_device(ARCHES["sm_90a"]), index=0)
INPUTS = ("q", "k_cache", "v_cache", "k", "v")


class Notes:
    """Stands in for the GPU: every launch's arguments, and the overflow flag."""

    def __init__(self) -> None:
        self.launches: list[Params] = []
        self.loaded: list[KernelConfig] = []
        self.partials = torch.empty(1 << 20)
        self.flag = OverflowFlag(torch.zeros(1, dtype=torch.int32))

    def load(self, config: KernelConfig, device: Device, **_: object) -> NotedKernel:
        self.loaded.append(config)
        return NotedKernel(self, config, device)

    def borrow(self, device: int, stream: int, floats: int, tickets: int) -> tuple[Any, int]:
        assert (device, stream) == (0, STREAM) and floats <= self.partials.numel() and tickets
        return self.partials, TICKETS


class NotedKernel:
    def __init__(self, notes: Notes, config: KernelConfig, device: Device) -> None:
        self.notes, self.config, self.device = notes, config, device

    def prepare(self, shape: object) -> object:
        return shape

    def launch(self, prepared: object, stream: int, params: Params) -> None:
        assert stream == STREAM
        self.notes.launches.append(Params.from_buffer_copy(params))


@pytest.fixture
def notes(monkeypatch: pytest.MonkeyPatch) -> Notes:
    notes = Notes()
    monkeypatch.setattr(api, "_plans", {})
    monkeypatch.setattr(api, "_device_of", lambda tensor: GPU)
    monkeypatch.setattr(api, "load", notes.load)
    monkeypatch.setattr(workspace, "borrow", notes.borrow)
    monkeypatch.setattr(workspace, "overflow_flag", lambda device: notes.flag)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda i: STREAM, raising=False)
    return notes


def inputs_of(**sizes: Any) -> dict[str, Any]:
    """Tensors of a call without `out`."""
    tensors = call_tensors(**sizes)
    return {name: tensors[name] for name in INPUTS}


def test_every_address_stride_and_size_is_bound(notes: Notes) -> None:
    tensors = call_tensors(max_seq_len=4096)
    tensors["k_cache"] = torch.ones(2, 2, 4096, 64, dtype=torch.float16).transpose(1, 2)  # HND
    seqlens = torch.tensor([3, 5], dtype=torch.int32)
    out = gqa_decode(**tensors, cache_seqlens=seqlens, softmax_scale=0.5, num_splits=3)
    (params,) = notes.launches
    assert out is tensors["out"]
    for field, name in (("k_new", "k"), ("v_new", "v"), *((n, n) for n in INPUTS[:3] + ("out",))):
        assert getattr(params, field) == tensors[name].data_ptr(), field
        stride = getattr(params, f"{field}_stride")
        assert stride.batch == tensors[name].stride(0) and stride.head == tensors[name].stride(-2)
    assert params.k_cache_stride.token == 64 and params.v_cache_stride.token == 128
    assert params.seqlens == seqlens.data_ptr() and params.lse is None
    assert (params.max_seq_len, params.num_kv_heads, params.num_splits) == (4096, 2, 3)
    assert params.scale_log2 == pytest.approx(0.5 * math.log2(math.e))
    assert (params.partials, params.tickets) == (notes.partials.data_ptr(), TICKETS)
    assert params.status == notes.flag.address


def test_an_int_length_is_passed_by_value(notes: Notes) -> None:
    gqa_decode(**inputs_of(), cache_seqlens=9)
    (params,) = notes.launches
    assert params.seqlens is None and params.seqlen == 9


def test_attend_only_passes_no_token(notes: Notes) -> None:
    gqa_decode(**inputs_of() | {"k": None, "v": None}, cache_seqlens=16)
    (params,) = notes.launches
    assert params.k_new is None and params.v_new is None


def test_an_unsplit_launch_borrows_no_workspace(notes: Notes) -> None:
    gqa_decode(**inputs_of(), cache_seqlens=9, num_splits=1)
    (params,) = notes.launches
    assert params.partials is None and params.tickets is None


@pytest.mark.parametrize("single_token_dim", [False, True])
def test_results_have_the_queries_shape_and_fp32_lse(notes: Notes, single_token_dim: bool) -> None:
    tensors = inputs_of()
    if single_token_dim:
        tensors |= {name: tensors[name].unsqueeze(1) for name in ("q", "k", "v")}
    out, lse = gqa_decode(**tensors, cache_seqlens=9, return_lse=True)
    (params,) = notes.launches
    assert out.shape == tensors["q"].shape and out.dtype == torch.float16
    assert lse.shape == (2, 8) and lse.dtype == torch.float32 and params.lse == lse.data_ptr()
    assert (params.out_stride.batch, params.out_stride.head) == (512, 64)


def test_the_same_layout_is_planned_once_and_bound_anew(notes: Notes) -> None:
    calls = [inputs_of() for _ in range(3)]
    for length, tensors in enumerate(calls):
        gqa_decode(**tensors, cache_seqlens=length)
    assert len(notes.loaded) == 1
    assert [p.q for p in notes.launches] == [tensors["q"].data_ptr() for tensors in calls]
    assert [p.seqlen for p in notes.launches] == [0, 1, 2]


@pytest.mark.parametrize(
    "change",
    [
        dict(softmax_scale=1.0),
        dict(num_splits=1),
        dict(return_lse=True),
        dict(cache_seqlens=torch.zeros(2, dtype=torch.int32)),
        dict(q=torch.ones(2, 16, 64, dtype=torch.float16)),
        dict(k_cache=torch.ones(2, 16, 2, 72, dtype=torch.float16)[..., :64]),
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_changes_the_plan_makes_a_new_one(notes: Notes, change: dict[str, Any]) -> None:
    call = inputs_of() | {"cache_seqlens": 3}
    gqa_decode(**call)
    gqa_decode(**call | change)
    assert len(notes.loaded) == 2


def test_overflow_found_by_a_kernel_stops_the_next_call_once(notes: Notes) -> None:
    call = inputs_of() | {"cache_seqlens": torch.zeros(2, dtype=torch.int32)}
    with torch.inference_mode():
        notes.flag.memory.fill_(2)
    with pytest.raises(CacheOverflowError, match=r"cache_seqlens\[1\].*not launched"):
        gqa_decode(**call)
    assert notes.launches == []
    gqa_decode(**call)
    assert len(notes.launches) == 1


@pytest.mark.parametrize(
    "change",
    [dict(cache_seqlens=16), dict(cache_seqlens=-1), dict(num_splits=True)],
    ids=["overflow", "negative", "splits"],
)
def test_bad_values_are_refused_by_a_plan_that_exists(notes: Notes, change: dict[str, Any]) -> None:
    call = inputs_of() | {"cache_seqlens": 3, "num_splits": 1}
    gqa_decode(**call)
    with pytest.raises(InputError):
        gqa_decode(**call | change)
    assert len(notes.launches) == 1


def test_aliases_are_refused_by_a_plan_that_exists(notes: Notes) -> None:
    tensors = call_tensors()
    gqa_decode(**tensors, cache_seqlens=3)
    for alias in ({"v_cache": tensors["k_cache"]}, {"out": tensors["q"]}):
        with pytest.raises(InputError, match="memory that"):
            gqa_decode(**tensors | alias, cache_seqlens=3)
    assert len(notes.launches) == 1


def test_output_over_the_lengths_is_refused_by_a_plan_that_exists(notes: Notes) -> None:
    tensors = call_tensors()
    gqa_decode(**tensors, cache_seqlens=torch.zeros(2, dtype=torch.int32))
    lengths = tensors["out"].view(torch.int32).flatten()[:2]
    with pytest.raises(InputError, match="out: got memory that cache_seqlens also uses"):
        gqa_decode(**tensors, cache_seqlens=lengths)
    assert len(notes.launches) == 1


def test_a_plan_takes_its_layout_and_no_other(notes: Notes) -> None:
    tensors = inputs_of()
    plan = gqa_cutlass.plan(**tensors, cache_seqlens=3)
    plan(*tensors.values(), 4)
    assert [p.seqlen for p in notes.launches] == [4]
    with pytest.raises(InputError, match="differs from what the plan"):
        plan(*inputs_of(max_seq_len=32).values(), 4)
    with pytest.raises(InputError, match="differs from what the plan"):
        plan(None, *list(tensors.values())[1:], 4)
    with pytest.raises(InputError, match="made for an int"):
        plan(*tensors.values(), torch.zeros(2, dtype=torch.int32))
    assert len(notes.launches) == 1


def test_one_line_is_logged_per_launch(notes: Notes, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="gqa_cutlass"):
        gqa_decode(**inputs_of(), cache_seqlens=3)
    (line,) = [record.getMessage() for record in caplog.records]
    assert f"kernel={notes.loaded[0].name} " in line and "stream=0x7" in line


def test_tickets_are_cut_from_arenas_and_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    arenas: list[int] = []

    def allocate(device: int, num_bytes: int) -> int:
        arenas.append(num_bytes)
        return len(arenas) << 32

    monkeypatch.setattr(workspace, "allocate_zeroed", allocate)
    monkeypatch.setattr(workspace, "_tickets", {})
    monkeypatch.setattr(workspace, "_arenas", {})
    first = workspace._tickets_for((0, STREAM, 0), 100)
    assert workspace._tickets_for((0, STREAM, 0), 60) == first  # enough of them are at hand
    second = workspace._tickets_for((0, STREAM, 1), 10)
    assert second == first + 400 and len(arenas) == 1
    larger = workspace._tickets_for((0, STREAM, 0), 101)
    assert larger == second + 40
    huge = workspace._tickets_for((0, STREAM, 2), 10**6)
    assert arenas[1] >= 4 * 10**6 and huge == 2 << 32
