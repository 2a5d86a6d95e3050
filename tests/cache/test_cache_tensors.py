"""Tensors that a cache refuses: of other kinds, without memory, in the cache itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from cache_model import DIM, F16, HEADS, bits, filled, new_cache, nothing_written, same
from tensor_kinds import Kind, kinds_for
from torch import Tensor
from torch._subclasses import FakeTensorMode

from gqa_cutlass import InputError, KVCache

I32, I64 = torch.int32, torch.int64
TOKEN, PROMPT, PER_SEQUENCE = (3, HEADS, DIM), (3, 2, HEADS, DIM), (3,)


@dataclass(frozen=True, kw_only=True)
class Use:
    """A tensor that a method of a cache of 3 sequences takes.

    Args:
        shape: Its shape.
        dtype: Its type.
        call: Calls the method with it.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    call: Callable[[KVCache, Any], object]

    def tensor(self, cache: KVCache) -> Tensor:
        """One that is right."""
        return torch.ones(self.shape, dtype=self.dtype, device=cache.device)


def use(shape: tuple[int, ...], dtype: torch.dtype, call: Callable[[KVCache, Any], object]) -> Use:
    return Use(shape=shape, dtype=dtype, call=call)


ONE, TWO = torch.ones(TOKEN, dtype=F16), torch.ones(PROMPT, dtype=F16)
USES = {
    "append: k": use(TOKEN, F16, lambda c, t: c.append(t, ONE)),
    "append: v": use(TOKEN, F16, lambda c, t: c.append(ONE, t)),
    "prefill: k": use(PROMPT, F16, lambda c, t: c.prefill(t, TWO)),
    "prefill: v": use(PROMPT, F16, lambda c, t: c.prefill(TWO, t)),
    "prefill: lengths": use(PER_SEQUENCE, I32, lambda c, t: c.prefill(TWO, TWO, t)),
    "truncate: lengths": use(PER_SEQUENCE, I32, lambda c, t: c.truncate(t)),
    "reorder: indices": use(PER_SEQUENCE, I32, lambda c, t: c.reorder(t)),
    "reorder: indices, int64": use(PER_SEQUENCE, I64, lambda c, t: c.reorder(t)),
}
uses = pytest.mark.parametrize("name", USES)


def some_cache() -> KVCache:
    cache = new_cache()
    filled(cache, [5, 2, 7])
    return cache


def refused(name: str, cache: KVCache, given: Any) -> str:
    """What is said of a tensor, or of where it comes from."""
    method, what = name.partition(",")[0].split(": ")
    with pytest.raises(InputError, match=r"Nothing was written\.$") as raised:
        USES[name].call(cache, given)
    message = str(raised.value)
    named = f"KVCache.{method}: {what}: got ", f"KVCache.{method}: surroundings: got "
    assert message.startswith(named)
    return message


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        pytest.param(name, kind, id=f"{name}: {kind_name}")
        for name, used in USES.items()
        for kind_name, kind in kinds_for(used.dtype, slow=True).items()
    ],
)
def test_tensors_that_are_not_what_their_memory_holds_are_refused(name: str, kind: Kind) -> None:
    cache = some_cache()
    messages: list[str] = []
    with nothing_written(cache):
        kind(USES[name].tensor(cache), lambda t: messages.append(refused(name, cache, t)))
    assert len(messages) == 1


class Meddling(Tensor):
    """A name of its own for plain memory, that answers everything else wrongly."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise ArithmeticError(f"asked for {func}")


@uses
def test_subclasses_that_hold_plain_memory_are_taken_for_it(name: str) -> None:
    one, other = some_cache(), some_cache()
    plain = USES[name].tensor(one)
    other.k.copy_(one.k), other.v.copy_(one.v)
    USES[name].call(one, plain)
    USES[name].call(other, plain.as_subclass(Meddling))
    assert one.lengths == other.lengths and one.seqlens.tolist() == other.seqlens.tolist()
    assert same(bits(one.k, one.v), bits(other.k, other.v))


@uses
@pytest.mark.parametrize("held", [0, 1, 4, -1])
def test_tensors_whose_storage_ends_before_they_do_are_refused(name: str, held: int) -> None:
    """Whole ones, and views with an offset."""
    cache = some_cache()
    whole = USES[name].tensor(cache)
    offset = torch.cat([whole, whole])[len(whole) :]
    for tensor in (whole, offset):
        size = tensor.untyped_storage().nbytes()
        tensor.untyped_storage().resize_(held % size)
        with nothing_written(cache):
            said = refused(name, cache, tensor)
        assert ("storage was freed" if held == 0 else "which was shrunk") in said


@pytest.mark.parametrize("own", ["k", "v"])
@pytest.mark.parametrize("name", ["append: k", "append: v", "prefill: k", "prefill: v"])
def test_tokens_that_lie_in_the_cache_are_refused(name: str, own: str) -> None:
    cache = some_cache()
    rows = getattr(cache, own)
    count = USES[name].shape[1] if name.startswith("prefill") else 1
    for first in (0, 6, cache.max_seq_len - count):
        part = rows[:, first : first + count]
        with nothing_written(cache):
            said = refused(name, cache, part)
        assert "memory of the cache itself" in said and ".clone()" in said
    USES[name].call(cache, part.clone())


def test_numbers_of_tokens_that_lie_in_the_cache_are_refused() -> None:
    cache = some_cache()
    for rows in (cache.k, cache.v):
        with nothing_written(cache):
            assert "of the cache itself" in refused("prefill: lengths", cache, in_row(rows))


def in_row(rows: Tensor) -> Tensor:
    return rows.view(I32).flatten()[:3]


def test_tokens_of_another_layer_and_lengths_that_are_the_caches_own_are_allowed() -> None:
    first, last = KVCache.for_layers(2, 3, 12, HEADS, DIM, F16, "cpu")
    filled(last, [2, 0, 1])
    last.prefill(first.k[:, :2], first.v[:, :2], last.seqlens)
    assert last.seqlens.tolist() == [4, 0, 2]
    last.truncate(last.seqlens)
    assert last.seqlens.tolist() == [4, 0, 2]
    last.reorder(last.seqlens)  # there is no row 4
    assert last.seqlens.tolist() == [0, 4, 2]


METHODS: dict[str, Callable[[KVCache], object]] = {
    "append": lambda c: c.append(ONE, ONE),
    "prefill": lambda c: c.prefill(TWO, TWO),
    "prefill, ints": lambda c: c.prefill(TWO, TWO, [1, 2, 0]),
    "truncate": lambda c: c.truncate(3),
    "truncate, ints": lambda c: c.truncate([1, 2, 3]),
    "reorder": lambda c: c.reorder([1, 0, -1]),
    "reset": lambda c: c.reset(),
    "reset, some": lambda c: c.reset([1]),
    "refresh": lambda c: c.refresh(),
    "check": lambda c: c.check(),
}
methods = pytest.mark.parametrize("method", METHODS)


def fake(call: Callable[[], object]) -> None:
    with FakeTensorMode():
        call()


def functional(call: Callable[[], object]) -> None:
    torch.func.functionalize(lambda x: (call(), x)[1])(torch.ones(2))


def differentiated(call: Callable[[], object]) -> None:
    torch.func.grad(lambda x: (call(), x.sum())[1])(torch.ones(2))


@pytest.mark.parametrize("surroundings", [fake, functional, differentiated])
@methods
def test_surroundings_that_replace_tensors_are_refused(
    method: str, surroundings: Callable[[Callable[[], object]], None]
) -> None:
    cache = some_cache()
    called = method.partition(",")[0]

    def call() -> None:
        with pytest.raises(InputError, match=rf"^KVCache.{called}: surroundings: got torch.empty"):
            METHODS[method](cache)

    with nothing_written(cache):
        surroundings(call)


def test_a_cache_is_not_made_of_what_is_no_memory() -> None:
    with FakeTensorMode(), pytest.raises(InputError, match="^KVCache: surroundings: got .*Fake"):
        new_cache()


@pytest.mark.parametrize("own", ["k", "v", "seqlens"])
@methods
def test_a_cache_whose_memory_somebody_freed_is_refused(method: str, own: str) -> None:
    cache = some_cache()
    getattr(cache, own).untyped_storage().resize_(0)
    with pytest.raises(InputError, match=f"the cache's {own}: got a tensor without memory"):
        METHODS[method](cache)
