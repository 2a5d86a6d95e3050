"""What a paged cache refuses, and what it says then."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from paged_model import DIM, F16, GROUP, HEADS, Told, appending, new_cache, nothing_changed
from torch._subclasses.fake_tensor import FakeTensorMode

from gqa_cutlass import CacheAllocationError, InputError, PagedKVCache
from gqa_cutlass.cache import allocation
from gqa_cutlass.cache.paged import step as step_module

SIZES: dict[str, Any] = dict(
    num_pages=4, page_size=2, num_kv_heads=1, head_dim=64, dtype=F16, device="cpu", num_layers=2
)


@pytest.mark.parametrize(
    ("name", "bad", "allowed"),
    [
        ("num_pages", 0, "an int from 1 to 2147483647"),
        ("num_pages", 2**31, "an int from 1 to 2147483647"),
        ("page_size", 0, "an int from 1 to 1073741824"),
        ("page_size", 2.0, "an int from 1 to 1073741824"),
        ("num_kv_heads", None, "an int from 1 to 2147483647"),
        ("num_layers", 0, "an int from 1 to 2147483647"),
        ("window", 0, "an int from 1 to 1073741824, the tokens that a step may attend to; or None"),
        ("window", True, "an int from 1 to 1073741824"),
        ("window", (4, 0), "an int from 1 to 1073741824"),
        ("head_dim", 65, "multiples of 8 from 32"),
        ("head_dim_v", 24, "multiples of 8 from 32"),
        ("dtype", torch.float32, "torch.float16 or torch.bfloat16"),
        ("device", "meta", "a CUDA device, such as 'cuda:0', or 'cpu'"),
    ],
)
def test_sizes_that_no_decode_step_allows_are_refused(name: str, bad: Any, allowed: str) -> None:
    with pytest.raises(InputError) as raised:
        PagedKVCache(**SIZES | {name: bad})
    message = str(raised.value)
    assert message.startswith(f"PagedKVCache: {name}: got ") and f"allowed: {allowed}" in message
    assert "Nothing was allocated." in message
    if name != "device":
        with pytest.raises(InputError, match=f"PagedKVCache: {name}: got "):
            PagedKVCache.bytes_needed(
                **{k: v for k, v in SIZES.items() if k != "device"} | {name: bad}
            )


def test_a_pool_too_large_says_how_many_pages_would_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    available = 64 * 2**20
    monkeypatch.setattr(allocation, "available_bytes", lambda device, held=True: available)
    with pytest.raises(CacheAllocationError) as raised:
        PagedKVCache(10**6, 16, 2, 64, F16, "cpu", num_layers=2)
    message = str(raised.value)
    needed = PagedKVCache.bytes_needed(10**6, 16, 2, 64, num_layers=2)
    assert f"PagedKVCache: memory: got a cache of {needed} bytes" in message
    assert "[1000000, 16, 2, 64] (num_pages, page_size, num_kv_heads, head_dim)" in message
    assert "in each of 2 layers" in message and f"free on cpu: {available} bytes" in message
    most = int(message.split("num_pages up to ")[1].split()[0])
    assert PagedKVCache(most, 16, 2, 64, F16, "cpu", num_layers=2).num_pages == most
    assert PagedKVCache.bytes_needed(most, 16, 2, 64, num_layers=2) > 0.8 * available
    with pytest.raises(CacheAllocationError):
        PagedKVCache(most * 5 // 4, 16, 2, 64, F16, "cpu", num_layers=2)


ROW = torch.zeros(1, HEADS, DIM, dtype=F16)
TWO = torch.zeros(2, 1, HEADS, DIM, dtype=F16)  # of two layers
FORM = r"torch.float16 \[2, 1, 1, 64\] \(\[num_layers, tokens, num_kv_heads, head_dim\]\) on cpu"


@pytest.mark.parametrize("name", ["k", "v"])
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (None, "got a NoneType; allowed: a torch.Tensor"),
        (ROW, rf"got torch.float16 \[1, 1, 64\] on cpu; allowed: {FORM}"),
        (TWO[:1], rf"got torch.float16 \[1, 1, 1, 64\] on cpu; allowed: {FORM}"),
        (TWO.expand(2, 2, -1, -1), rf"got torch.float16 \[2, 2, 1, 64\] on cpu; allowed: {FORM}"),
        (TWO.float(), r"got torch.float32 \[2, 1, 1, 64\] on cpu"),
        (TWO.to("meta"), r"got torch.float16 \[2, 1, 1, 64\] on meta"),
        (TWO.to_sparse(), "got a torch.sparse_coo tensor; allowed: a dense"),
        (TWO.clone().requires_grad_(), "got a tensor that requires grad"),
    ],
)
def test_tokens_that_do_not_fit_the_pools_are_refused(name: str, bad: Any, message: str) -> None:
    told = Told(new_cache(layers=2))
    sequence = told.allocate(2)
    rows = {"k": TWO, "v": TWO} | {name: bad}
    with nothing_changed(told.cache), pytest.raises(InputError, match=f"{name}: {message}"):
        told.cache.append([sequence], **rows)
    told.check()


def test_tokens_in_the_cache_itself_are_refused() -> None:
    told = Told(new_cache())
    sequence = told.allocate(2)
    with (
        nothing_changed(told.cache),
        pytest.raises(InputError, match="k: got memory of the cache i"),
    ):
        told.cache.append([sequence], told.cache.k[0][3, :1], ROW)
    freed = ROW.clone()
    freed.untyped_storage().resize_(0)
    with (
        nothing_changed(told.cache),
        pytest.raises(InputError, match="v: got a tensor without mem"),
    ):
        told.cache.append([sequence], ROW, freed)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c: c.free(7), "free: sequence: got 7; allowed: what allocate"),
        (lambda c: c.free(1), "free: sequence: got 1, which was freed; allowed"),
        (lambda c: c.free([0, 1]), "free: sequence: got 1, which was freed"),
        (lambda c: c.free([0, 0]), "free: sequences: got 0 more than once"),
        (lambda c: c.free("0"), "free: sequences: got a str"),
        (lambda c: c.free(None), "free: sequences: got a NoneType"),
        (lambda c: c.free(True), "free: sequence: got True"),
        (lambda c: c.fork(1), "fork: sequence: got 1, which was freed"),
        (lambda c: c.fork(0, 6), "fork: tokens: got 6; allowed: an int from 0 to 5"),
        (lambda c: c.fork(0, -1), "fork: tokens: got -1"),
        (lambda c: c.truncate(1, 0), "truncate: sequence: got 1, which was freed"),
        (lambda c: c.truncate(0, 1.0), "truncate: tokens: got 1.0"),
        (lambda c: c.truncate(0, 10**5000), "truncate: tokens: got a int that cannot be shown"),
        (lambda c: c.reorder([0], [1]), "reorder: indices: got 1; allowed: ints from -1 to 0"),
        (lambda c: c.reorder([0], [0, 0]), "reorder: indices: got 2 ints; allowed: 1, one per"),
        (lambda c: c.reorder([0, 1], [0, 0]), "reorder: sequence: got 1, which was freed"),
        (lambda c: c.reorder([0], 0.5), "reorder: indices: got 0.5"),
        (lambda c: c.reserve([0], [1, 2]), "reserve: tokens: got 2 ints; allowed: 1, one per"),
        (lambda c: c.reserve([0], -1), "reserve: tokens: got -1"),
        (lambda c: c.reserve([0], "1"), "reserve: tokens: got '1'"),
        (lambda c: c.reserve([0], 2**30), "got 5 tokens and 1073741824 more; allowed: up to 10737"),
        (lambda c: c.allocate(-1), "allocate: tokens: got -1"),
        (lambda c: c.allocate(2**31), "allocate: sequence: got 0 tokens and 2147483648 more"),
        (lambda c: c.length(9), "length: sequence: got 9"),
        (lambda c: c.pages("x"), "pages: sequence: got 'x'"),
        (lambda c: c.pages_needed([0, 0]), "pages_needed: sequences: got 0 more than once"),
        (lambda c: c.gather(2, 0), "gather: layer: got 2; allowed: an int from 0 to 1"),
        (lambda c: c.gather(0, 1), "gather: sequence: got 1, which was freed"),
        (lambda c: c.table([1]), "table: sequence: got 1, which was freed"),
        (lambda c: c.table([]), "table: sequences: got none; allowed: at least one"),
        (lambda c: c.step([]).__enter__(), "step: sequences: got none; allowed: at least one"),
        (lambda c: c.step([0, 0]).__enter__(), "step: sequences: got 0 more than once"),
        (lambda c: c.step(0).__enter__(), "step: sequences: got a int"),
        (lambda c: c.step([0], None).__enter__(), "step: tokens: got None"),
        (lambda c: c.decode([0], TWO), "decode: num_layers: got 2; allowed: one layer; `with"),
    ],
)
def test_what_is_refused_changes_nothing(
    call: Callable[[PagedKVCache], object], message: str
) -> None:
    told = Told(new_cache(layers=2))
    told.allocate(5)
    told.cache.free(told.cache.allocate())
    with nothing_changed(told.cache), pytest.raises(InputError) as raised:
        call(told.cache)
    text = str(raised.value)
    assert f"PagedKVCache.{message}" in text or message in text
    assert "; allowed: " in text and "Nothing was" in text and len(text) < 300
    told.check()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s, q, k: s.decode(2, q, k, k), "layer: got 2; allowed: an int from 0 to 1"),
        (lambda s, q, k: s.decode(True, q, k, k), "layer: got True"),
        (lambda s, q, k: s.decode(0, q, k, k), "layer: got 0, which has this step's tokens"),
        (
            lambda s, q, k: s.decode(1, q.repeat(2, 1, 1), k, k),
            "q: got 2 rows; allowed: 1, one per",
        ),
        (lambda s, q, k: s.append(0, k, k), "layer: got 0, which has this step's tokens"),
        (
            lambda s, q, k: s.append(1, k, k[:0]),
            "v: got torch.float16 [0, 1, 64] on cpu; allowed: to",
        ),
        (lambda s, q, k: s.gather(1, 7), "sequence: got 7; allowed: those of the step, [0]"),
        (lambda s, q, k: s.gather(2, 0), "layer: got 2"),
    ],
)
def test_what_a_step_refuses_can_be_mended_in_it(
    call: Callable[..., object], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_module, "gqa_decode", appending)
    told = Told(new_cache(layers=2))
    sequence, tokens = told.allocate(5), told.new(1)
    (k, v), (other_k, other_v) = (told.rows(tokens, layer) for layer in told.layers)
    q = k.expand(-1, GROUP, -1)
    with told.cache.step([sequence]) as step:
        step.decode(0, q, k, v)
        with pytest.raises(InputError) as raised:
            call(step, q, k)
        assert f"PagedKVCache.step: {message}" in str(raised.value)
        step.append(1, other_k, other_v)
    told.add([sequence], tokens)
    told.check()


def test_a_step_of_several_tokens_is_not_decoded_with_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_module, "gqa_decode", appending)
    told = Told(new_cache())
    sequences = [told.allocate(2), told.allocate(1)]
    k, v = told.rows(told.new(2), 0)
    message = r"k: got a token of each sequence in a step of \[1, 2\] tokens; allowed: append\(\)"
    with nothing_changed(told.cache), pytest.raises(InputError, match=message):
        with told.cache.step(sequences, [1, 2]) as step:
            step.decode(0, k.expand(-1, GROUP, -1), k, v)


@pytest.mark.parametrize(
    "name", ["cache_batch_idx", "block_table", "slot_mapping", "cache_seqlens", "soft_cap"]
)
def test_options_are_those_of_decode_steps(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_module, "gqa_decode", appending)
    told = Told(new_cache())
    sequence = told.allocate(2)
    given: dict[str, Any] = {name: None}
    with nothing_changed(told.cache), pytest.raises(TypeError, match=f"keyword argument '{name}'"):
        told.cache.decode([sequence], ROW.expand(-1, GROUP, -1), ROW, ROW, **given)


def test_where_tensors_are_not_what_they_seem_nothing_is_done() -> None:
    told = Told(new_cache())
    sequence = told.allocate(2)
    with FakeTensorMode(), pytest.raises(InputError, match="surroundings: got torch.empty making"):
        told.cache.append([sequence], ROW, ROW)
    told.check()
    told.cache.v[0].untyped_storage().resize_(0)
    calls: list[Callable[[], object]] = [
        lambda: told.cache.append([sequence], ROW, ROW),
        lambda: told.cache.step([sequence]).__enter__(),
        lambda: told.cache.gather(0, sequence),
    ]
    for call in calls:
        with pytest.raises(InputError, match="the cache's v: got a tensor without memory"):
            call()
    assert (told.cache.length(sequence), told.cache.free_pages) == (2, 11)


def test_in_inference_mode_and_outside_is_the_same_cache() -> None:
    with torch.inference_mode():
        told = Told(new_cache())
        batch = told.cache.batch(2, 8)
        sequence = told.allocate(2)
        batch.assign([sequence])
    batch.assign([])
    child = told.fork(sequence)
    told.append(child, sequence)
    with torch.inference_mode():
        told.append(sequence, child)
        batch.assign([sequence])
    told.check()
