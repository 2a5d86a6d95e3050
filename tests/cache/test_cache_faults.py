"""What a call leaves that an error ends in its middle, wherever that is."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import pytest
import torch
from cache_model import (
    DIM,
    F16,
    GROUP,
    HEADS,
    bits,
    filled,
    new_cache,
    on_device,
    queries,
    same,
    token,
    tokens,
)
from modes import Fault, Memory
from torch import Tensor

from gqa_cutlass import (
    CacheAllocationError,
    CacheOverflowError,
    KVCache,
    gqa_decode,
)
from gqa_cutlass.cache import counted, lengths, rows
from gqa_cutlass.cache import kv_cache as cache_module
from gqa_cutlass.cpu import executor as cpu
from gqa_cutlass.errors import DeviceError, KernelFault

BATCH, ROOM, HELD = 3, 12, [5, 2, 7]
PIECE = 2 * BATCH * (HEADS * DIM * 2 + 18)  # two tokens of all sequences, and where they go

Operation = Callable[[KVCache, Tensor, Tensor], object]

OPERATIONS: dict[str, Operation] = {
    "decode": lambda c, k, v: c.decode(v[:, :GROUP, 0], k[:, 0], v[:, 0]),
    "append": lambda c, k, v: c.append(k[:, 0], v[:, 0]),
    "prefill": lambda c, k, v: c.prefill(k, v),
    "prefill, ints": lambda c, k, v: c.prefill(k, v, [1, 0, 3]),
    "prefill, device": lambda c, k, v: c.prefill(k, v, on_device(c, 3, 4, 2)),
    "truncate, int": lambda c, k, v: c.truncate(3),
    "truncate, ints": lambda c, k, v: c.truncate([1, 9, 0]),
    "truncate, device": lambda c, k, v: c.truncate(on_device(c, 9, -1, 6)),
    "reorder, ints": lambda c, k, v: c.reorder([2, 0, -1]),
    "reorder, nothing moved": lambda c, k, v: c.reorder([-1, 1, -1]),
    "reorder, device": lambda c, k, v: c.reorder(on_device(c, 2, 0, 9)),
    "reset": lambda c, k, v: c.reset(),
    "reset, some": lambda c, k, v: c.reset([2, 0]),
    "refresh": lambda c, k, v: c.refresh(),
}
operations = pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)

# Layers, lengths, and whether the host knows them.
SCENES = [(1, [4, 4, 4], True), (1, HELD, True), (1, HELD, False), (2, HELD, True)]
scenes = pytest.mark.parametrize(
    "scene", SCENES, ids=["equal lengths", "lengths", "lengths not known", "not the last layer"]
)


class State:
    """What a cache holds: copies of its tokens."""

    def __init__(self, cache: KVCache) -> None:
        self.lengths: list[int] = cache.seqlens.tolist()
        self.rows = bits(cache.k, cache.v)

    def tokens(self, b: int) -> list[Tensor]:
        return [rows[b, : self.lengths[b]] for rows in self.rows]


class Trial:
    """A cache that holds something, new tokens for it, and an operation.

    Args:
        operation: What to do with it.
        scene: Of `SCENES`.
    """

    def __init__(self, operation: Operation, scene: tuple[int, list[int], bool]) -> None:
        layers, held, known = scene
        torch.manual_seed(0)
        self.caches = KVCache.for_layers(layers, BATCH, ROOM, HEADS, DIM, F16, "cpu")
        self.cache = self.caches[0]
        for cache in self.caches:
            filled(cache, held)
        if not known:
            self.cache.forget()
        new = tokens(self.cache, 3)
        self.call = lambda: operation(self.cache, *new)

    def check_claims(self) -> None:
        """What the host claims to know is so."""
        held = self.cache.seqlens.tolist()
        assert self.cache.lengths in (None, held)
        assert 0 <= min(held) and max(held) <= self.cache.bound <= ROOM

    def check(self, before: State, after: State) -> None:
        """Every sequence is as it was, as it was to become, or empty."""
        self.check_claims()
        now = State(self.cache)
        for b, length in enumerate(now.lengths):
            assert not length or any(
                length == other.lengths[b] and same(now.tokens(b), other.tokens(b))
                for other in (before, after)
            ), f"sequence {b}"


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "_TEMPORARY_BYTES", PIECE)


@pytest.fixture
def quick_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    """A decode step that writes its rows, one after the other, as a kernel does."""

    def decode(
        q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, **options: Any
    ) -> Tensor:
        for b, length in enumerate(options["cache_seqlens"].tolist()):
            k_cache[b, length], v_cache[b, length] = k[b], v[b]
        return torch.zeros_like(q)

    monkeypatch.setattr(cache_module, "gqa_decode", decode)


def outcome(operation: Operation, scene: tuple[int, list[int], bool]) -> tuple[State, State, int]:
    """What the cache holds before and after the operation, and of how many of torch's that is."""
    trial = Trial(operation, scene)
    before = State(trial.cache)
    with Fault(None) as counted:
        trial.call()
    trial.check_claims()
    return before, State(trial.cache), counted.count


@scenes
@operations
def test_a_fault_in_any_operation_of_torch_leaves_whole_sequences(
    operation: Operation,
    scene: tuple[int, list[int], bool],
    small_pieces: None,
    quick_decode: None,
) -> None:
    """Before it is done, and nothing works any more; or when it is done, and the next works."""
    before, after, count = outcome(operation, scene)
    for number in range(count):
        for done in (False, True):
            trial = Trial(operation, scene)
            with pytest.raises(KeyboardInterrupt), Fault(number, done):
                trial.call()
            trial.check(before, after)


@contextmanager
def interrupted(functions: set[str], number: int | None) -> Iterator[list[int]]:
    """Count the places in functions of `lengths` where a signal may come, and let one of them."""
    places = [0]

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        code = frame.f_code
        if code.co_filename != lengths.__file__ or code.co_name not in functions:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            places[0] += 1
            if places[0] - 1 == number:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield places
    finally:
        sys.settrace(before)


@pytest.mark.parametrize("name", ["append", "truncate, int", "reorder, ints", "reset"])
def test_an_interrupt_anywhere_leaves_the_host_with_what_is_so(name: str) -> None:
    """Between any two steps of the interpreter, where the lengths change."""
    functions = {"_change", "_know", "forget"}
    trial = Trial(OPERATIONS[name], SCENES[1])
    with interrupted(functions, None) as places:
        trial.call()
    assert places[0] > 30
    for number in range(places[0]):
        trial = Trial(OPERATIONS[name], SCENES[1])
        with pytest.raises(KeyboardInterrupt), interrupted(functions, number):
            trial.call()
        trial.check_claims()


@operations
def test_no_memory_is_an_error_of_this_package_and_the_call_can_be_made_again(
    operation: Operation, small_pieces: None, quick_decode: None
) -> None:
    before, after, _ = outcome(operation, SCENES[1])
    trial = Trial(operation, SCENES[1])
    with Memory() as counted:
        trial.call()
    for most in range(counted.allocations):
        trial = Trial(operation, SCENES[1])
        expected = r"^KVCache\.\w+: memory: got none .*CUDA out of memory.*; free on cpu: .* bytes"
        with pytest.raises(CacheAllocationError, match=expected) as raised, Memory(most):
            trial.call()
        assert raised.value.__context__ is None  # whose traceback would keep tensors
        assert trial.cache.seqlens.tolist() == before.lengths, "something was moved"
        trial.check(before, before)
        trial.call()
        trial.check(after, after)


def test_other_errors_of_torch_are_not_taken_for_a_lack_of_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    cache = new_cache()
    monkeypatch.setattr(rows, "scatter", fail)
    cache.forget()
    with pytest.raises(RuntimeError, match="^CUDA error: an illegal memory access"):
        cache.append(*token(cache))


def test_a_kernel_that_faults_after_its_writes_can_be_run_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A model's forward pass, repeated from its first layer."""
    caches = KVCache.for_layers(2, BATCH, ROOM, HEADS, DIM, F16, "cpu")
    for cache in caches:
        filled(cache, HELD)
    new = [(queries(cache), *token(cache)) for cache in caches]
    run, launches = cpu.run, [0]

    def faulty(*args: Any, **options: Any) -> None:
        run(*args, **options)
        launches[0] += 1
        if launches[0] == 2:
            raise KernelFault("planted")

    monkeypatch.setattr(cpu, "run", faulty)

    def forward() -> list[Any]:
        return [cache.decode(*given) for cache, given in zip(caches, new, strict=True)]

    with pytest.raises(KernelFault, match="planted"):
        forward()
    assert caches[0].lengths == caches[0].seqlens.tolist() == HELD
    outs = forward()
    assert caches[0].lengths == caches[0].seqlens.tolist() == [n + 1 for n in HELD]
    for cache, (q, k, _), out in zip(caches, new, outs, strict=True):
        assert torch.equal(out, gqa_decode(q, cache.k, cache.v, cache_seqlens=cache.seqlens))
        for b, length in enumerate(HELD):
            assert same(bits(cache.k[b, length]), bits(k[b]))


def test_an_overflow_is_reported_though_asking_the_device_failed_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cache = new_cache(2, 4)
    filled(cache, [4, 1])
    cache.forget()
    cache.append(*token(cache))

    def fail(device: torch.device) -> None:
        raise DeviceError("planted")

    with monkeypatch.context() as patch, pytest.raises(DeviceError):
        patch.setattr(counted, "check_overflow", fail)
        cache.check()
    with pytest.raises(CacheOverflowError, match=r"\[0\] have no room"):
        cache.check()
    cache.check()
