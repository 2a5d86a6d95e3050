"""What a call on a paged cache leaves that an error ends in its middle, wherever that is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from modes import Fault, Memory
from paged_model import GROUP, Told, appending, new_cache

from gqa_cutlass import CacheAllocationError, InputError
from gqa_cutlass.cache.paged import step as step_module


class Trial(Told):
    """Sequences that share a page which tokens fill in part, and a batch of others."""

    def __init__(self) -> None:
        super().__init__(new_cache(24, 4, layers=2))
        self.parent = self.allocate(6)
        self.child, self.other = self.fork(self.parent), self.allocate(3)
        self.batch = self.cache.batch(2, 16)
        self.batched = [self.allocate(5)]
        self.batch.assign(self.batched, 2)
        self.tokens = self.new(2)
        self.k, self.v = self.all_rows(self.tokens)
        self.q = self.k.expand(-1, -1, GROUP, -1).contiguous()
        self.before = {s: list(tokens) for s, tokens in self.held.items()}

    @property
    def pair(self) -> list[int]:
        return [self.parent, self.other]

    def step(self) -> None:
        with self.cache.step(self.pair) as step:
            for layer in self.layers:
                step.decode(layer, self.q[layer], self.k[layer], self.v[layer])
        self.add(self.pair, self.tokens)

    def append(self) -> None:
        self.cache.append(self.pair, self.k, self.v)
        self.add(self.pair, self.tokens)

    def prefill(self) -> None:
        self.cache.prefill(self.child, self.k, self.v)
        self.held[self.child] += self.tokens

    def reserve(self) -> None:
        self.cache.reserve(self.pair, 9)

    def look(self) -> None:
        self.cache.gather(1, self.parent), self.cache.table(self.pair)

    def assign(self) -> None:
        self.batch.assign([self.child, *self.batched], 5)

    def reserve_for_the_batch(self) -> None:
        self.batch.reserve(7)

    def step_of_the_batch(self) -> None:
        with self.batch.step() as step:
            for layer in self.layers:
                step.decode(layer, self.q[layer], self.k[layer], self.v[layer])
        self.add(self.batched, self.tokens[:1])

    def check_after(self, operation: Callable[[Trial], None]) -> None:
        """Every sequence is as it was; and all works, the operation that failed included."""
        assert {s: self.cache.length(s) for s in self.before} == {
            s: len(tokens) for s, tokens in self.before.items()
        }
        self.held = {s: list(tokens) for s, tokens in self.before.items()}
        self.check()
        try:
            self.batch.check()
        except InputError:  # the device is ahead, and so there is no step
            with pytest.raises(InputError, match="an error left in the middle of a step"):
                self.batch.run(lambda: None)
        self.batch.assign(self.batched, 1)
        operation(self)
        self.check(), self.batch.check()
        self.append()
        self.check()
        self.batch.assign([])
        self.cache.free(self.cache.sequences)
        assert self.cache.free_pages == self.cache.num_pages


OPERATIONS = [
    Trial.step, Trial.append, Trial.prefill, Trial.reserve, Trial.look, Trial.assign,
    Trial.reserve_for_the_batch, Trial.step_of_the_batch,
]  # fmt: skip
operations = pytest.mark.parametrize("operation", OPERATIONS, ids=lambda op: op.__name__)


@pytest.fixture(autouse=True)
def instant_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_module, "gqa_decode", appending)


@operations
def test_without_memory_nothing_is_taken(operation: Callable[[Trial], None]) -> None:
    trial = Trial()
    with Memory() as memory:
        operation(trial)
    assert memory.allocations > 0
    for most in range(memory.allocations):
        trial = Trial()
        message = "Paged.*: memory: got none for what the call needs"
        with Memory(most), pytest.raises(CacheAllocationError, match=message) as raised:
            operation(trial)
        assert raised.value.__context__ is None  # whose traceback would keep tensors
        trial.check_after(operation)


@pytest.mark.parametrize("done", [False, True], ids=["before", "behind"])
@operations
def test_an_interrupt_leaves_whole_sequences(
    operation: Callable[[Trial], None], done: bool
) -> None:
    trial = Trial()
    with Fault(None) as fault:
        operation(trial)
    assert fault.count > 0
    for number in range(fault.count):
        trial = Trial()
        with Fault(number, done), pytest.raises(KeyboardInterrupt):
            operation(trial)
        trial.check_after(operation)
