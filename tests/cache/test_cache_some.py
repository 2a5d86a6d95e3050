"""KVCache.decode for some sequences: `rows`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
from cache_model import DIM, F16, HEADS, filled, new_cache, nothing_written, on_device
from compiling import GROUP
from tensor_kinds import kinds_for
from torch import Tensor

from gqa_cutlass import CacheOverflowError, InputError, KVCache, check_overflow
from gqa_cutlass.cache import some
from gqa_cutlass.errors import CacheAllocationError
from gqa_cutlass.proof.reference import attend

HELD = [3, 0, 7, 12]  # of 12


def step(cache: KVCache, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random q, k and v of so many rows."""
    q = torch.randn(count, 2 * HEADS, DIM).to(cache.k)
    k, v = (torch.randn(count, HEADS, DIM).to(cache.k) for _ in range(2))
    return q, k, v


def expected(cache: KVCache, q: Tensor, rows: list[int], lengths: list[int]) -> Tensor:
    """Attention of some rows over so many of their tokens."""
    found = attend(
        q.cpu(), cache.k.cpu()[rows], cache.v.cpu()[rows], lengths, DIM**-0.5, torch.double
    )
    return found[0].to(q.dtype)


def close(out: Any, right: Tensor) -> bool:
    return torch.allclose(out.cpu().float(), right.float(), atol=2e-3, rtol=2e-3)


@pytest.fixture
def cache(device: str) -> KVCache:
    made = new_cache(4, 12, device)
    filled(made, HELD)
    return made


@pytest.mark.parametrize("on_host", [True, False])
def test_rows_get_a_token_and_the_others_nothing(cache: KVCache, on_host: bool) -> None:
    q, k, v = step(cache, 2)
    rows: Any = [2, 0] if on_host else on_device(cache, 2, 0)
    before = cache.k[[1, 3]].clone()
    out = cache.decode(q, k, v, rows=rows)
    assert cache.lengths == ([4, 0, 8, 12] if on_host else None)
    assert cache.seqlens.tolist() == [4, 0, 8, 12]
    assert torch.equal(cache.k[2, 7], k[0]) and torch.equal(cache.v[0, 3], v[1])
    assert torch.equal(cache.k[[1, 3]], before)
    assert close(out, expected(cache, q, [2, 0], [8, 4]))


def test_rows_may_come_twice_where_nothing_is_appended(cache: KVCache) -> None:
    q, *_ = step(cache, 3)
    with nothing_written(cache):
        out, lse = cache.decode(q, rows=[3, 3, 1], return_lse=True)
    assert close(out, expected(cache, q, [3, 3, 1], [12, 12, 0]))
    assert (lse[2] == -torch.inf).all() and cache.lengths == HELD


def test_a_full_row_is_refused_by_the_host(cache: KVCache) -> None:
    with nothing_written(cache), pytest.raises(CacheOverflowError, match="sequence 3 holds 12"):
        cache.decode(*step(cache, 2), rows=[0, 3])
    cache.decode(*step(cache, 2), rows=[0, 1])  # though another one is full
    assert cache.lengths == [4, 1, 7, 12]


@pytest.mark.parametrize("row", [3, 4, -1, 2**31 - 1])
def test_rows_that_are_full_or_absent_are_found_by_the_device(cache: KVCache, row: int) -> None:
    q, k, v = step(cache, 2)
    out = cache.decode(q, k, v, rows=on_device(cache, row, 1))
    assert cache.seqlens.tolist() == [3, 1, 7, 12]
    assert out[0].isnan().all() and close(out[1:], expected(cache, q[1:], [1], [1]))
    with pytest.raises(CacheOverflowError):
        check_overflow(cache.device)


def test_inactive_rows_stay_so(cache: KVCache) -> None:
    cache.seqlens[2] = -1
    cache.forget()
    out = cache.decode(*step(cache, 2), rows=on_device(cache, 2, 0))
    assert cache.seqlens.tolist() == [4, 0, -1, 12] and (out[0] == 0).all()


def test_layers_move_their_lengths_once(device: str) -> None:
    layers = KVCache.for_layers(2, 4, 12, HEADS, DIM, F16, device)
    for layer in layers:
        filled(layer, HELD)
    for layer in layers:
        layer.decode(*step(layer, 1), rows=[0])
    assert layers[0].lengths == [4, 0, 7, 12]


@pytest.mark.xdist_group(GROUP)
def test_compiled_code_takes_rows_on_the_device() -> None:
    cache = new_cache(4, 12)
    filled(cache, HELD)
    torch._dynamo.reset()
    decode = torch.compile(cache.decode, backend="aot_eager", fullgraph=True)
    q, k, v = step(cache, 2)
    out = decode(q, k, v, rows=on_device(cache, 2, 0))
    assert cache.seqlens.tolist() == [4, 0, 8, 12]
    assert close(out, expected(cache, q, [2, 0], [8, 4]))
    torch._dynamo.reset()


BAD: dict[str, tuple[Callable[[KVCache], Any], str]] = {
    "too few": (lambda cache: [1], "rows: got 1 rows; allowed: 2, one for each row of q"),
    "one twice": (lambda cache: [1, 1], r"rows: got \[1, 1\]; allowed: no row twice, where"),
    "one there is not": (lambda cache: [0, 4], r"rows\[1\]: got 4; allowed: an int from 0 to 3"),
    "one before the first": (lambda cache: [-1, 0], r"rows\[0\]: got -1; allowed"),
    "a number": (lambda cache: 1, "rows: got a int; allowed: a sequence of ints"),
    "a float": (lambda cache: [0, 1.0], r"rows\[1\]: got 1.0; allowed: an int"),
    "int64": (lambda cache: on_device(cache, 0, 1, dtype=torch.int64), "rows: got torch.int64"),
    "too many": (lambda cache: on_device(cache, 0, 1, 2), r"rows: got torch.int32 \[3\]"),
    "elsewhere": (lambda cache: on_device(cache, 0, 1).to("meta"), "rows: got .* on meta"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_rows_are_refused(kind: str) -> None:
    cache = new_cache(4, 12)
    filled(cache, HELD)
    rows, message = BAD[kind]
    with nothing_written(cache), pytest.raises(InputError, match=f"KVCache.decode: {message}"):
        cache.decode(*step(cache, 2), rows=rows(cache))
    assert cache.lengths == HELD


@pytest.mark.xdist_group(GROUP)
@pytest.mark.parametrize("kind", ["one twice", "a float", "int64"])
def test_compiled_code_refuses_bad_rows_as_others_do(kind: str) -> None:
    cache = new_cache(4, 12)
    make, message = BAD[kind]
    rows = make(cache)
    torch._dynamo.reset()
    q, k, v = step(cache, 2)
    with nothing_written(cache), pytest.raises(InputError, match=f"KVCache.decode: {message}"):
        torch.compile(cache.decode, backend="eager")(q, k, v, rows=rows)
    torch._dynamo.reset()


def test_queries_of_every_kind_that_is_no_plain_one_are_refused() -> None:
    cache = new_cache(4, 12)
    q, k, v = step(cache, 2)
    seen: list[str] = []

    def use(tensor: Tensor) -> None:
        with nothing_written(cache), pytest.raises(InputError) as raised:
            cache.decode(tensor, k, v, rows=[0, 1])
        seen.append(str(raised.value))

    kinds = kinds_for(F16, slow=True)
    for kind in kinds.values():
        with suppress(RuntimeError):  # of functions that get no result
            kind(q, use)
    assert len(seen) == len(kinds)


def test_the_index_of_other_calls_is_refused_for_it_would_miss_the_lengths() -> None:
    cache = new_cache(4, 12)
    with (
        nothing_written(cache),
        pytest.raises(InputError, match="cache_batch_idx: .* rows=, which"),
    ):
        cache.decode(*step(cache, 4), cache_batch_idx=on_device(cache, 3, 2, 1, 0))  # type: ignore[call-overload]


def test_a_lack_of_memory_is_told_in_the_name_of_the_call(
    cache: KVCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(some, "gqa_decode", fail)
    with pytest.raises(CacheAllocationError, match=r"^KVCache\.decode: memory: got none"):
        cache.decode(*step(cache, 2), rows=[0, 2])
