"""Which tensors and lengths a plan that exists takes, and which it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from executors import Notes
from helpers import call_tensors
from planning import INPUTS, inputs_of, run
from torch import Tensor

import gqa_cutlass
from gqa_cutlass import gqa_decode
from gqa_cutlass.errors import InputError
from gqa_cutlass.gpu import torch_private


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
