"""What a call hands to the driver, seen with a driver that only takes notes."""

from __future__ import annotations

import dataclasses
import math
import threading
from collections import Counter
from typing import Any

import pytest
import torch
from executors import MERGE_COUNTERS, Notes
from helpers import call_tensors
from planning import INPUTS, MULTISTAGE, TMA, inputs_of, params_of, run

import gqa_cutlass
from gqa_cutlass import gqa_decode
from gqa_cutlass.call import addresses as addresses_module
from gqa_cutlass.call import layout
from gqa_cutlass.dispatch import dispatch
from gqa_cutlass.errors import CacheOverflowError, InputError


@pytest.mark.parametrize("tokens", [MULTISTAGE, TMA], ids=["multistage", "tma"])
def test_every_address_stride_and_size_is_bound(notes: Notes, tokens: int) -> None:
    tensors = call_tensors(max_seq_len=tokens)
    tensors["k_cache"] = torch.ones(2, 2, tokens, 64, dtype=torch.float16).transpose(1, 2)  # HND
    seqlens = torch.tensor([3, 5], dtype=torch.int32)
    out = gqa_decode(**tensors, cache_seqlens=seqlens, softmax_scale=0.5, num_splits=3)
    params = params_of(*notes.launches)
    assert notes.loaded[0].tma == (tokens == TMA)
    assert out is tensors["out"]
    for field, name in (("k_new", "k"), ("v_new", "v"), *((n, n) for n in INPUTS[:3] + ("out",))):
        assert getattr(params, field) == tensors[name].data_ptr(), field
        stride = getattr(params, f"{field}_stride")
        assert stride.batch == tensors[name].stride(0) and stride.head == tensors[name].stride(-2)
    assert params.k_cache_stride.token == 64 and params.v_cache_stride.token == 128
    assert params.seqlens == seqlens.data_ptr() and params.lse is None
    assert (params.max_seq_len, params.num_kv_heads, params.num_splits) == (tokens, 2, 3)
    assert params.num_stages == notes.loaded[0].num_stages
    assert params.scale_log2 == pytest.approx(0.5 * math.log2(math.e))
    assert (params.split_workspace, params.merge_counters) == (
        notes.partials.data_ptr(),
        MERGE_COUNTERS,
    )
    assert params.overflow_flag == notes.flag.address


def test_an_int_length_is_passed_by_value(notes: Notes) -> None:
    gqa_decode(**inputs_of(), cache_seqlens=9)
    (params,) = notes.launches
    assert params.seqlens is None and params.seqlen == 9
    assert params.prefetch_limit == 9  # what is known may be read


@pytest.mark.parametrize("early", [True, False])
def test_lengths_on_the_device_say_nothing_of_what_may_be_read_before(
    notes: Notes, early: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        layout,
        "dispatch",
        lambda *given: dataclasses.replace(dispatch(*given), prefetch_first_tile=early),
    )
    tensors = inputs_of()
    seqlens = torch.full((len(tensors["q"]),), 9, dtype=torch.int32)
    gqa_decode(**tensors, cache_seqlens=seqlens)
    (params,) = notes.launches
    assert params.seqlens == seqlens.data_ptr() and params.seqlen == 0
    assert params.prefetch_limit == (tensors["k_cache"].shape[1] if early else 0)


@pytest.mark.parametrize(("bound", "limit"), [(1, 32), (32, 32), (33, 64), (100, 64)])
def test_no_more_is_read_early_than_sequences_are_said_to_have(
    notes: Notes, bound: int, limit: int
) -> None:
    """In whole tiles: what lies behind may be of a sequence after all."""
    tensors = inputs_of(max_seq_len=64)
    seqlens = torch.full((len(tensors["q"]),), 9, dtype=torch.int32)
    gqa_decode(**tensors, cache_seqlens=seqlens, max_seqlen=bound)
    (params,) = notes.launches
    assert notes.loaded[0].block_n == 32 and tensors["k_cache"].shape[1] == 64
    assert params.prefetch_limit == limit


def test_attend_only_passes_no_token(notes: Notes) -> None:
    gqa_decode(**inputs_of() | {"k": None, "v": None}, cache_seqlens=16)
    (params,) = notes.launches
    assert params.k_new is None and params.v_new is None


def test_an_unsplit_launch_borrows_no_workspace(notes: Notes) -> None:
    gqa_decode(**inputs_of(), cache_seqlens=9, num_splits=1)
    (params,) = notes.launches
    assert params.split_workspace is None and params.merge_counters is None


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
        dict(ragged=False),
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


def test_scale_is_the_usual_one_unless_given(notes: Notes) -> None:
    tensors = inputs_of()
    assert gqa_cutlass.plan(**tensors, cache_seqlens=3).softmax_scale == 64**-0.5
    assert gqa_cutlass.plan(**tensors, cache_seqlens=3, softmax_scale=2).softmax_scale == 2.0


def test_a_plan_remembers_a_bounded_number_of_addresses(
    notes: Notes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(addresses_module, "MAX_KNOWN", 3)
    calls = [inputs_of() for _ in range(5)]
    plan = gqa_cutlass.plan(**calls[0], cache_seqlens=3)
    for tensors in calls * 2:
        run(plan, tensors, 3)
    assert [p.q for p in notes.launches] == 2 * [tensors["q"].data_ptr() for tensors in calls]
    assert len(plan._known) <= 3


def test_nothing_stays_from_call_to_call(notes: Notes) -> None:
    """Lengths, lse and output are those of the call, whatever the argument's memory held."""
    tensors = inputs_of()
    plan = gqa_cutlass.plan(**tensors, cache_seqlens=3, return_lse=True)
    results = [run(plan, tensors, length) for length in (3, 5)]
    for length, (out, lse), params in zip((3, 5), results, notes.launches, strict=True):
        assert (params.seqlen, params.out, params.lse) == (length, out.data_ptr(), lse.data_ptr())


def test_threads_do_not_mix_their_arguments(notes: Notes) -> None:
    notes.pause = 1e-5  # others run meanwhile, as they do during the driver's call
    calls = [call_tensors() for _ in range(4)]
    plan = gqa_cutlass.plan(**calls[0], cache_seqlens=3)

    def work(i: int) -> None:
        for _ in range(100):
            run(plan, calls[i], i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Counter(params.seqlen for params in notes.launches) == dict.fromkeys(range(4), 100)
    for params in notes.launches:
        mine = calls[params.seqlen]
        assert params.q == mine["q"].data_ptr() and params.out == mine["out"].data_ptr()


def test_scale_of_another_type_finds_no_plan(notes: Notes) -> None:
    tensors = inputs_of()
    gqa_decode(**tensors, cache_seqlens=3, softmax_scale=1.0)
    with pytest.raises(InputError, match="softmax_scale: got True"):
        gqa_decode(**tensors, cache_seqlens=3, softmax_scale=True)
