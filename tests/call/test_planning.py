"""What a call hands to the driver, seen with a driver that only takes notes."""

from __future__ import annotations

import dataclasses
import logging
import math
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from executors import MERGE_COUNTERS, STREAM, Notes, running_on
from helpers import call_tensors
from torch import Tensor

import gqa_cutlass
from gqa_cutlass import gqa_decode
from gqa_cutlass.call import addresses as addresses_module
from gqa_cutlass.call import plans
from gqa_cutlass.codegen.schema.launch import Pdl
from gqa_cutlass.codegen.schema.params import Params, TmaParams
from gqa_cutlass.dispatch import H200, dispatch
from gqa_cutlass.errors import CacheOverflowError, InputError
from gqa_cutlass.gpu import torch_private, workspace
from gqa_cutlass.tensormap import TensorMap

# Capacities of caches that the schedules serve.
MULTISTAGE, TMA = 128, 300
INPUTS = ("q", "k_cache", "v_cache", "k", "v")


def params_of(argument: Params | TmaParams) -> Params:
    """What a kernel of either schedule is told."""
    return argument.decode if isinstance(argument, TmaParams) else argument


@pytest.fixture
def notes() -> Iterator[Notes]:
    """What would be launched."""
    executor = Notes()
    with running_on(executor):
        yield executor


def maps_of(argument: TmaParams) -> list[TensorMap]:
    return [TensorMap.from_bytes(bytes(field)) for field in (argument.keys, argument.values)]


def inputs_of(**sizes: Any) -> dict[str, Any]:
    """Tensors of a call without `out`."""
    tensors = call_tensors(**sizes)
    return {name: tensors[name] for name in INPUTS}


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
        plans,
        "dispatch",
        lambda *given: dataclasses.replace(dispatch(*given), prefetch_first_tile=early),
    )
    tensors = inputs_of()
    seqlens = torch.full((len(tensors["q"]),), 9, dtype=torch.int32)
    gqa_decode(**tensors, cache_seqlens=seqlens)
    (params,) = notes.launches
    assert params.seqlens == seqlens.data_ptr() and params.seqlen == 0
    assert params.prefetch_limit == (tensors["k_cache"].shape[1] if early else 0)


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


@pytest.fixture(params=["in C++", "in Python"])
def comparison(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """How layouts are compared: by torch's guards, and where they are not to be had."""
    if request.param == "in Python":
        monkeypatch.setattr(torch_private, "_guards_work", lambda: False)


def _shifted(tensor: Tensor) -> Tensor:
    """A copy at an address that is only a multiple of 2."""
    memory = torch.ones(tensor.numel() + 8, dtype=tensor.dtype)
    return memory[1 : 1 + tensor.numel()].view(tensor.shape)


def _padded(tensor: Tensor) -> Tensor:
    """A copy with a gap behind every row."""
    return torch.cat([tensor, tensor], dim=-1)[..., : tensor.shape[-1]]


OTHER_LAYOUTS: dict[str, Callable[[Tensor], Any]] = {
    "absent": lambda t: None,
    "no tensor": lambda t: 3,
    "shape": lambda t: torch.cat([t, t]),
    "rank": lambda t: t[None],
    "strides": _padded,
    "dtype": lambda t: t.bfloat16(),
    "device": lambda t: t.to("meta"),
    "alignment": _shifted,
    "grad": lambda t: t.clone().requires_grad_(),
    "sparse": lambda t: t.to_sparse(),
}


@pytest.mark.parametrize("other", OTHER_LAYOUTS.values(), ids=OTHER_LAYOUTS)
@pytest.mark.parametrize("name", [*INPUTS, "out"])
def test_a_plan_takes_its_layout_and_no_other(
    notes: Notes, comparison: None, name: str, other: Callable[[Tensor], Any]
) -> None:
    tensors: dict[str, Any] = call_tensors()
    plan = gqa_cutlass.plan(**tensors, cache_seqlens=3)
    for _ in range(2):
        run(plan, tensors, 4)
        with pytest.raises(InputError, match="differs from what the plan"):
            run(plan, tensors | {name: other(tensors[name])}, 4)
    assert [p.seqlen for p in notes.launches] == [4, 4]


def run(plan: gqa_cutlass.Plan, tensors: dict[str, Any], lengths: Any) -> Any:
    """Call a plan with tensors by name."""
    return plan(*(tensors[name] for name in INPUTS), lengths, tensors.get("out"))


@pytest.mark.parametrize("name", ["k", "v", "out"])
def test_a_plan_made_without_a_tensor_takes_none(notes: Notes, comparison: None, name: str) -> None:
    tensors: dict[str, Any] = call_tensors()
    absent = {"out": None} if name == "out" else {"k": None, "v": None}
    plan = gqa_cutlass.plan(**tensors | absent, cache_seqlens=3)
    for _ in range(2):
        run(plan, tensors | absent, 3)
        for given in (tensors[name], torch.empty(0)):
            with pytest.raises(InputError, match="differs from what the plan"):
                run(plan, tensors | absent | {name: given}, 3)
    assert len(notes.launches) == 2


def test_tokens_in_each_others_places_are_refused(notes: Notes, comparison: None) -> None:
    """With as many heads everywhere, q, k, v and out have one layout."""
    tensors: dict[str, Any] = call_tensors(q_heads=2)
    plan = gqa_cutlass.plan(**tensors | {"out": None}, cache_seqlens=3)
    run(plan, tensors | {"out": None}, 3)
    for absent in ("k", "v"):
        with pytest.raises(InputError, match="differs from what the plan"):
            run(plan, tensors | {absent: None}, 3)
    assert len(notes.launches) == 1


BAD_LENGTHS: dict[str, Any] = {
    "too long": 16, "negative": -1, "bool": True, "float": 3.0, "None": None,
}  # fmt: skip


@pytest.mark.parametrize("lengths", BAD_LENGTHS.values(), ids=BAD_LENGTHS)
def test_bad_length_is_refused_by_a_plan_that_exists(
    notes: Notes, comparison: None, lengths: Any
) -> None:
    tensors = inputs_of()
    plan = gqa_cutlass.plan(**tensors, cache_seqlens=3)
    for call in (lambda n: run(plan, tensors, n), lambda n: gqa_decode(**tensors, cache_seqlens=n)):
        call(15)
        with pytest.raises(InputError, match=r"cache overflow|cache_seqlens: got"):
            call(lengths)
    assert len(notes.launches) == 2


BAD_DEVICE_LENGTHS: dict[str, Callable[[Tensor], Tensor]] = {
    "dtype": lambda t: t.long(),
    "shape": lambda t: torch.cat([t, t]),
    "strides": lambda t: t[:1].expand(2),
    "device": lambda t: t.to("meta"),
    "alignment": lambda t: torch.frombuffer(bytearray(10), dtype=torch.int32, count=2, offset=2),
}


@pytest.mark.parametrize("other", BAD_DEVICE_LENGTHS.values(), ids=BAD_DEVICE_LENGTHS)
def test_bad_lengths_on_the_device_are_refused_by_a_plan_that_exists(
    notes: Notes, comparison: None, other: Callable[[Tensor], Tensor]
) -> None:
    tensors, lengths = inputs_of(), torch.zeros(2, dtype=torch.int32)
    plan = gqa_cutlass.plan(**tensors, cache_seqlens=lengths)
    for call in (lambda n: run(plan, tensors, n), lambda n: gqa_decode(**tensors, cache_seqlens=n)):
        call(lengths)
        with pytest.raises(InputError, match="cache_seqlens: got"):
            call(other(lengths))
    assert len(notes.launches) == 2


def test_the_kind_of_the_lengths_is_the_plans(notes: Notes, comparison: None) -> None:
    tensors, lengths = inputs_of(), torch.zeros(2, dtype=torch.int32)
    for given, other, kind in ((3, lengths, "an int"), (lengths, 3, "an int32 tensor")):
        plan = gqa_cutlass.plan(**tensors, cache_seqlens=given)
        run(plan, tensors, given)
        with pytest.raises(InputError, match=f"made for {kind}"):
            run(plan, tensors, other)
        gqa_decode(**tensors, cache_seqlens=other)  # which makes a plan of its own
    assert len(notes.launches) == 4


def test_what_a_call_decides_follows_its_own_layout(notes: Notes, comparison: None) -> None:
    """Calls that alternate between layouts use the plan of each."""
    calls = [call_tensors(), call_tensors() | {"out": None}, inputs_of(q_heads=4)]
    calls += [inputs_of() | {"q": _shifted(calls[0]["q"])}]
    for _ in range(3):
        for tensors in calls:
            gqa_decode(**tensors, cache_seqlens=3)
    assert len(notes.loaded) == len(calls)
    assert [p.q for p in notes.launches] == 3 * [tensors["q"].data_ptr() for tensors in calls]


def test_tensors_of_features_are_bound_as_all_others_are(notes: Notes, comparison: None) -> None:
    """Layers with sinks of their own share a plan; one that `plan` made keeps what it was given."""
    tensors, sinks = inputs_of(), [torch.zeros(8) for _ in range(3)]
    for layer in (*sinks, *sinks):
        gqa_decode(**tensors, cache_seqlens=3, sinks=layer)
    assert [p.sinks for p in notes.launches] == 2 * [layer.data_ptr() for layer in sinks]
    assert len(notes.loaded) == 1
    for without in ({}, {"sinks": None}):
        gqa_decode(**tensors, cache_seqlens=3, **without)
    assert len(notes.loaded) == 2 and notes.launches[-1].sinks is None
    plan = gqa_cutlass.plan(**tensors, cache_seqlens=3, sinks=sinks[1])
    run(plan, tensors, 3)
    assert notes.launches[-1].sinks == sinks[1].data_ptr()
    sinks[1].untyped_storage().resize_(0)
    with pytest.raises(InputError, match="sinks: got a tensor without memory"):
        run(plan, tensors, 3)
    with pytest.raises(InputError, match=r"sinks: got strides \[2\]"):
        gqa_decode(**tensors, cache_seqlens=3, sinks=torch.zeros(16)[::2])


def test_tensors_of_inference_mode_are_recognised(notes: Notes) -> None:
    tensors = call_tensors()
    plan = gqa_cutlass.plan(**tensors, cache_seqlens=3)
    arguments: Any = *(tensors[name] for name in INPUTS), tensors["out"], 3
    run(plan, tensors, 3)
    assert plan.bind_quickly(arguments) is not None
    with torch.inference_mode():
        run(plan, tensors, 3)  # takes a closer look
        assert plan.bind_quickly(arguments) is not None
    run(plan, tensors, 3)
    assert len(notes.launches) == 3


def test_a_tensor_may_come_twice_where_nothing_is_written(notes: Notes, comparison: None) -> None:
    tensors = inputs_of()
    tensors["v"] = tensors["k"]
    for _ in range(2):
        gqa_decode(**tensors, cache_seqlens=3)
    assert len(notes.loaded) == 1 and len(notes.launches) == 2


class Subclass(Tensor):
    """A name of its own for plain memory."""


ALSO_PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "parameter": lambda t: torch.nn.Parameter(t, requires_grad=False),
    "subclass": lambda t: t.as_subclass(Subclass),
    "conjugate of a real tensor": Tensor.conj,
}


@pytest.mark.parametrize("other", ALSO_PLAIN.values(), ids=ALSO_PLAIN)
@pytest.mark.parametrize("name", [*INPUTS, "out"])
def test_plain_tensors_may_go_by_other_names(
    notes: Notes, comparison: None, name: str, other: Callable[[Tensor], Tensor]
) -> None:
    tensors: dict[str, Any] = call_tensors()
    plan = gqa_cutlass.plan(**tensors, cache_seqlens=3)
    for given in (tensors, tensors | {name: other(tensors[name])}) * 2:
        gqa_decode(**given, cache_seqlens=3)
        run(plan, given, 3)
    assert len(notes.launches) == 8 and len({p.q for p in notes.launches}) == 1


@pytest.mark.parametrize("offset", [0, 64])
@pytest.mark.parametrize("held", [0, 4], ids=["freed", "shrunk"])
@pytest.mark.parametrize("name", [*INPUTS, "out", "cache_seqlens"])
def test_tensors_whose_memory_is_missing_are_refused(
    notes: Notes, comparison: None, name: str, held: int, offset: int
) -> None:
    """By calls that come first, and by a plan that has seen the tensors whole."""
    call: dict[str, Any] = call_tensors() | {"cache_seqlens": torch.zeros(2, dtype=torch.int32)}
    whole = call[name]
    memory = torch.zeros(offset + max(whole.numel(), 64), dtype=whole.dtype)
    call[name] = memory[offset : offset + whole.numel()].view(whole.shape)
    plan = gqa_cutlass.plan(**call)
    plan(**call)
    memory.untyped_storage().resize_(held)
    launches = len(notes.launches)
    for again in (plan, gqa_decode, gqa_cutlass.plan, plan):
        with pytest.raises(InputError, match=f"{name}: got a tensor (without memory|that ends)"):
            again(**call)
    assert len(notes.launches) == launches


# Views of a cache's memory with the shape of what is read, and the first and last row they touch.
READ: dict[str, Callable[[Tensor], Tensor]] = {
    "q": lambda cache: cache[:, 4:8].view(2, 8, 64),
    "k": lambda cache: cache[:, 4],
    "v": lambda cache: cache[:, 4],
}
ROWS = {"q": range(4, 8), "k": range(4, 5), "v": range(4, 5)}


@pytest.mark.parametrize("cache", ["k_cache", "v_cache"])
@pytest.mark.parametrize("name", READ)
def test_what_is_read_may_not_be_the_row_that_is_written(
    notes: Notes, comparison: None, name: str, cache: str
) -> None:
    """Other rows may be read, as long as they are others: a length later, they may not be."""
    tensors = inputs_of()
    tensors[name] = READ[name](tensors[cache])
    plan = gqa_cutlass.plan(**tensors, cache_seqlens=0)
    refused = []
    for length in range(16):
        for call in (plan, gqa_decode):
            try:
                call(**tensors, cache_seqlens=length)
            except InputError as error:
                assert f"{name}: got memory of {cache}, to which this call writes" in str(error)
                assert f"pass {name}.clone()" in str(error)
                refused.append(length)
    assert refused == [row for row in ROWS[name] for _ in range(2)]
    assert len(notes.launches) == 2 * (16 - len(ROWS[name]))


@pytest.mark.parametrize("cache", ["k_cache", "v_cache"])
@pytest.mark.parametrize("name", [*READ, "cache_seqlens"])
def test_where_only_the_device_knows_the_row_no_row_may_be_read(
    notes: Notes, comparison: None, name: str, cache: str
) -> None:
    call = inputs_of() | {"cache_seqlens": torch.zeros(2, dtype=torch.int32)}
    if name == "cache_seqlens":
        call[name] = call[cache].view(torch.int32).flatten()[:2].fill_(0)
    else:
        call[name] = READ[name](call[cache])
    plan = gqa_cutlass.plan(**call | {cache: call[cache].clone()})
    for again in (gqa_cutlass.plan, gqa_decode, plan):
        with pytest.raises(InputError, match=f"{name}: got memory of {cache}, to which"):
            again(**call)
    assert notes.launches == []
    gqa_decode(**call | {"k": None, "v": None})  # which writes to no row
    assert len(notes.launches) == 1


@pytest.mark.parametrize("on_device", [False, True])
def test_new_tokens_may_lie_between_the_rows_of_a_cache(notes: Notes, on_device: bool) -> None:
    """Beside every sequence of one buffer, or behind every row."""
    lengths: Any = torch.zeros(2, dtype=torch.int32) if on_device else 3
    sequences = torch.ones(2, 17, 2, 64, dtype=torch.float16)
    rows = torch.ones(2, 16, 2, 128, dtype=torch.float16)
    for k_cache, k in (
        (sequences[:, :16], sequences[:, 16]),
        (rows[..., :64], rows[:, 5, :, 64:]),
    ):
        tensors = inputs_of() | {"k_cache": k_cache, "k": k}
        plan = gqa_cutlass.plan(**tensors, cache_seqlens=lengths)
        for _ in range(2):
            plan(**tensors, cache_seqlens=lengths)
        assert len(plan._known) == 1
    assert len(notes.launches) == 4


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
