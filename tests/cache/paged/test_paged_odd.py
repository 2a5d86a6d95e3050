"""What no paged cache can use, of every kind and size: refused in our words, before anything."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
from compiling import GROUP
from paged_model import DIM, F16, HEADS, Told, appending, new_cache, nothing_changed
from tensor_kinds import kinds_for
from torch import Tensor
from torch._dynamo.exc import Unsupported
from torch._subclasses.fake_tensor import FakeTensorMode

from gqa_cutlass import CacheAllocationError, GqaError, InputError
from gqa_cutlass.cache.paged import paged_kv_cache
from gqa_cutlass.cache.paged import step as step_module

pytestmark = pytest.mark.xdist_group(GROUP)
ROW = torch.zeros(2, HEADS, DIM, dtype=F16)
ENDLESS = 10**5000  # Python does not print it


@pytest.fixture(autouse=True)
def instant_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_module, "gqa_decode", appending)


@pytest.fixture
def told() -> Told:
    told = Told(new_cache())
    told.allocate(5), told.allocate(3)
    return told


def in_a_step(told: Told, use: Callable[[Any], object]) -> None:
    with told.cache.step([*told.held]) as step:
        use(step)


CALLS: dict[str, Callable[[Told, Tensor], object]] = {
    "prefill k": lambda told, t: told.cache.prefill(0, t, ROW),
    "prefill v": lambda told, t: told.cache.prefill(0, ROW, t),
    "append k": lambda told, t: told.cache.append([0, 1], t, ROW),
    "append v": lambda told, t: told.cache.append([0, 1], ROW, t),
    "step.append k": lambda told, t: in_a_step(told, lambda step: step.append(0, t, ROW)),
    "step.append v": lambda told, t: in_a_step(told, lambda step: step.append(0, ROW, t)),
}


@pytest.mark.parametrize("name", CALLS)
def test_every_kind_of_tensor_that_is_no_plain_one_is_refused(name: str, told: Told) -> None:
    wrong: dict[str, str] = {}
    for kind_name, kind in kinds_for(F16, slow=True).items():

        def use(tensor: Tensor, kind_name: str = kind_name) -> None:
            wrong[kind_name] = "accepted"
            try:
                CALLS[name](told, tensor)
            except InputError:
                del wrong[kind_name]
            except Exception as error:
                wrong[kind_name] = repr(error)

        with nothing_changed(told.cache), suppress(RuntimeError):  # of functions without a result
            kind(ROW, use)
    assert not wrong
    told.check()


@pytest.mark.parametrize("name", CALLS)
def test_no_memory_of_the_cache_is_written_to_it(name: str, told: Told) -> None:
    """Neither that of the other pool, which the call writes too, perhaps before it is read."""
    for pool in (*told.cache.k, *told.cache.v):
        with nothing_changed(told.cache), pytest.raises(InputError, match="memory of the cache"):
            CALLS[name](told, pool[0, :2])


def test_numbers_that_cannot_be_printed_are_refused(told: Told) -> None:
    batch = told.cache.batch(2, 16)
    calls: list[Callable[[], object]] = [
        lambda: told.cache.allocate(ENDLESS), lambda: told.cache.fork(0, ENDLESS),
        lambda: told.cache.truncate(0, ENDLESS), lambda: told.cache.reserve([0], ENDLESS),
        lambda: told.cache.reserve([0], [ENDLESS]), lambda: told.cache.pages_needed([0], ENDLESS),
        lambda: told.cache.step([0], ENDLESS).__enter__(), lambda: told.cache.free(ENDLESS),
        lambda: told.cache.reorder([0], [ENDLESS]), lambda: told.cache.batch(ENDLESS, 1),
        lambda: batch.assign([0], ENDLESS),
        lambda: (batch.assign([0]), batch.run(lambda: None, ENDLESS)),
    ]  # fmt: skip
    for call in calls:
        with nothing_changed(told.cache), pytest.raises(GqaError, match="got|asked for"):
            call()


def test_a_table_that_does_not_fit_is_not_begun(told: Told, monkeypatch: Any) -> None:
    monkeypatch.setattr(paged_kv_cache, "available_bytes", lambda device: 100)
    assert told.cache.batch(2, 16).max_seq_len == 16  # 48 bytes, twice
    with pytest.raises(CacheAllocationError, match=r"batch: memory: got none .*112 bytes, for a t"):
        told.cache.batch(2, 20)


def test_nothing_changes_a_batch_from_within_its_run(told: Told) -> None:
    """The steps that `run` counts would be those of others."""
    batch = told.cache.batch(2, 16)
    batch.assign([0, 1], 3)
    calls: list[Callable[[], object]] = [
        lambda: batch.assign([0]), lambda: batch.reserve(4), lambda: batch.run(lambda: None),
    ]  # fmt: skip
    for call in calls:
        with nothing_changed(told.cache), pytest.raises(InputError, match="PagedBatch"):
            batch.run(call)
        batch.assign([0, 1], 3)
    with pytest.raises(InputError, match="replay: got None; allowed: graph.replay, or another"):
        batch.run(None)  # type: ignore[arg-type, misc]
    batch.run(lambda: batch._advance())
    batch.check()
    assert [told.cache.length(s) for s in (0, 1)] == [6, 4]


def test_steps_know_where_tensors_are_not_what_they_seem(told: Told) -> None:
    batch = told.cache.batch(2, 16)
    batch.assign([0])

    def made_up(call: Callable[[], object]) -> None:
        with FakeTensorMode(), pytest.raises(InputError, match="surroundings: got torch.empty"):
            call()

    made_up(lambda: batch.step().__enter__())
    row = ROW[:1]
    with told.cache.step([1]) as step:
        made_up(lambda: step.append(0, row, row))
        made_up(lambda: step.gather(0, 1))
        step.append(0, *told.rows(told.new(1), 0))
    assert (told.cache.length(0), told.cache.length(1)) == (5, 4)


def test_compiled_code_leaves_counting_to_the_host(told: Told) -> None:
    k, v = told.all_rows(told.new(2))

    def forward(k: Tensor, v: Tensor) -> tuple[int, Tensor]:
        told.cache.append([0, 1], k * 1, v)
        with told.cache.step([1]) as step:
            step.append(0, k[0, :1], v[0, :1])
        return told.cache.fork(1), told.cache.gather(0, 1)[0] * 1

    torch._dynamo.reset()
    found = [torch.compile(forward, backend="eager")(k, v) for _ in range(3)]
    assert [child for child, _ in found] == [2, 3, 4]
    assert [len(keys) for _, keys in found] == [5, 7, 9] and told.cache.length(0) == 8
    torch._dynamo.reset()
    with nothing_changed(told.cache), pytest.raises(Unsupported, match="PagedKVCache counts on th"):
        torch.compile(forward, backend="eager", fullgraph=True)(k, v)
    torch._dynamo.reset()


def test_a_sequence_of_another_cache_is_refused(told: Told) -> None:
    """The numbers of caches differ, however many sequences each has."""
    other = new_cache()
    mine, theirs = told.allocate(3), other.allocate(3)
    assert mine != theirs
    with pytest.raises(InputError, match=f"free: sequence: got {theirs}; allowed: .* this cache"):
        told.cache.free([mine, theirs])
    told.check()
