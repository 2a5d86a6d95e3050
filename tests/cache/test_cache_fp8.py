"""Caches of 8 bits: what they make of tokens, decode from and move about."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from gqa_cutlass import KVCache, PagedKVCache
from gqa_cutlass.cache.scales import _pieces, raw
from gqa_cutlass.distributed import ShardedKVCache, ShardedPagedKVCache
from gqa_cutlass.errors import InputError
from gqa_cutlass.proof.reference import attend, errors, scaled, scales_of, stored

BATCH, ROOM, HEADS, DIM = 2, 24, 2, 64
TYPES = torch.float8_e4m3fn, torch.float8_e5m2
E4M3, E5M2 = TYPES


def random(*shape: int, device: str, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * 3).half().to(device)


def scales(dtype: torch.dtype, device: str) -> dict[str, Any]:
    """One that saturates a few numbers, and one for each head."""
    return {
        "k_scale": 9 / torch.finfo(dtype).max,
        "v_scale": torch.tensor([0.5, 1.25], device=device),
    }


def same(held: Tensor, token: Tensor, scale: float | Tensor | None) -> bool:
    return torch.equal(raw(held), raw(stored(token, scales_of(scale, 0), held.dtype)))


def check_output(out: Tensor, q: Tensor, k: Tensor, v: Tensor, asked: dict[str, Any]) -> None:
    """The output of sequences that hold these tokens, as they are stored: [batch, tokens, ...]."""
    k, v = (scaled(t, scales_of(asked[f"{name}_scale"], 0)) for name, t in (("k", k), ("v", v)))
    step = q, k, v, [k.shape[1]] * len(q), DIM**-0.5
    exact, typed = (attend(*step, dtype)[0] for dtype in (torch.float64, q.dtype))
    assert errors(out, exact, typed).share <= 1


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_prompts_tokens_and_steps_are_stored_alike(dtype: torch.dtype, device: str) -> None:
    asked = scales(dtype, device)
    cache = KVCache(BATCH, ROOM, HEADS, DIM, dtype, device, **asked)
    k, v = (random(BATCH, 9, HEADS, DIM, device=device, seed=i) for i in range(2))
    q = random(BATCH, 4, DIM, device=device, seed=2)
    cache.prefill(k[:, :7], v[:, :7])
    cache.append(k[:, 7], v[:, 7])
    out = cache.decode(q, k[:, 8], v[:, 8])
    assert cache.lengths == [9, 9]
    held = [c[:, :9] for c in (cache.k, cache.v)]
    for tokens, new, name in zip(held, (k, v), asked, strict=True):
        assert same(tokens, new, asked[name])
    check_output(out, q, *held, asked)


def test_rows_of_8_bits_are_moved_as_they_are(device: str) -> None:
    cache = KVCache(3, ROOM, HEADS, DIM, E4M3, device)
    k, v = (random(3, 5, HEADS, DIM, device=device, seed=i) for i in range(2))
    cache.prefill(k, v, [5, 2, 4])
    cache.reorder([2, 0, 0])
    assert cache.lengths == [4, 5, 5]
    assert same(cache.k[0, :4], k[2, :4], None) and same(cache.v[2, :5], v[0], None)
    cache.prefill(k[:, :2], v[:, :2], torch.tensor([2, 1, 0], dtype=torch.int32, device=device))
    assert same(cache.k[1, 5:6], k[1, :1], None) and same(cache.v[0, 4:6], v[0, :2], None)


def test_some_rows_decode_with_the_caches_scales(device: str) -> None:
    asked = scales(E4M3, device)
    cache = KVCache(3, ROOM, HEADS, DIM, E4M3, device, **asked)
    k, v = (random(3, 6, HEADS, DIM, device=device, seed=i) for i in range(2))
    cache.prefill(k, v)
    q, new = (random(1, heads, DIM, device=device, seed=3) for heads in (4, HEADS))
    out = cache.decode(q, new, -new, rows=[1])
    assert same(cache.k[1, 6], new[0], asked["k_scale"])
    check_output(out, q, cache.k[1:2, :7], cache.v[1:2, :7], asked)


def test_layers_have_scales_of_their_own(device: str) -> None:
    caches = KVCache.for_layers(
        2, BATCH, ROOM, HEADS, DIM, E4M3, device, k_scale=[0.5, None], v_scale=2.0
    )
    k = random(BATCH, 3, HEADS, DIM, device=device)
    for cache, k_scale in zip(caches, (0.5, None), strict=True):
        cache.prefill(k, k)
        assert same(cache.k[:, :3], k, k_scale) and same(cache.v[:, :3], k, 2.0)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_pages_of_8_bits(dtype: torch.dtype, device: str) -> None:
    """Prompts, forks that copy a page, and steps."""
    asked = scales(dtype, device)
    cache = PagedKVCache(6, 4, HEADS, DIM, dtype, device, **asked)
    k, v = (random(7, HEADS, DIM, device=device, seed=i) for i in range(2))
    first = cache.allocate()
    cache.prefill(first, k[:6], v[:6])
    second = cache.fork(first)
    cache.append([first], k[6:], v[6:])
    q, new = (random(1, heads, DIM, device=device, seed=3) for heads in (4, HEADS))
    out = cache.decode([second], q, new, -new)
    for sequence, ends in ((first, (k[6:], v[6:])), (second, (new, -new))):
        held = cache.gather(0, sequence)
        for tokens, begin, end, name in zip(held, (k, v), ends, asked, strict=True):
            assert tokens.dtype == dtype and same(tokens, torch.cat([begin[:6], end]), asked[name])
    check_output(out, q, *[t[None] for t in cache.gather(0, second)], asked)


def test_layers_of_pages_have_scales_of_their_own(device: str) -> None:
    cache = PagedKVCache(4, 4, HEADS, DIM, E4M3, device, num_layers=2, k_scale=[0.5, 2.0])
    k = random(2, 3, HEADS, DIM, device=device)
    sequence = cache.allocate()
    cache.prefill(sequence, k, k)
    for layer, scale in enumerate((0.5, 2.0)):
        keys, values = cache.gather(layer, sequence)
        assert same(keys, k[layer], scale) and same(values, k[layer], None)


@pytest.mark.parametrize("rows", [BATCH * 3, BATCH, 1])
def test_large_prompts_are_rounded_piece_by_piece(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a few tokens of all sequences, or a token of a few."""
    monkeypatch.setattr("gqa_cutlass.cache.scales._PIECE_BYTES", 4 * HEADS * DIM * rows)
    sizes = [
        (min(BATCH, each.stop) - each.start) * (min(10, part.stop) - part.start)
        for each, part in _pieces((BATCH, 10, HEADS, DIM))
    ]
    assert max(sizes) <= rows and sum(sizes) == BATCH * 10
    cache = KVCache(BATCH, ROOM, HEADS, DIM, E4M3, "cpu")
    k = random(BATCH, 10, HEADS, DIM, device="cpu")
    cache.prefill(k, -k)
    assert same(cache.k[:, :10], k, None) and same(cache.v[:, :10], -k, None)


def test_bytes_are_half_as_many() -> None:
    sizes = BATCH, ROOM, HEADS, DIM
    state = 3 * BATCH * 4
    both = [KVCache.bytes_needed(*sizes, dtype) - state for dtype in (torch.float16, E5M2)]
    assert both[0] == 2 * both[1]
    assert "dtype=torch.float8_e5m2" in repr(KVCache(*sizes, E5M2, "cpu"))


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "16 bits": ({"dtype": torch.float16, "k_scale": 0.5}, "k_scale: got 0.5, with caches of torch"),
    "zero": ({"k_scale": 0.0}, "k_scale: got 0.0; allowed: a number from 1e-30 to 1e"),
    "no number": ({"v_scale": math.nan}, "v_scale: got nan; allowed: a number"),
    "text": ({"v_scale": "1"}, "v_scale: got '1'; allowed: a number"),
    "half": ({"k_scale": torch.ones(2).half()}, r"k_scale: got torch.float16 \[2\] on cpu; all"),
    "more heads": ({"k_scale": torch.ones(3)}, r"k_scale: got torch.float32 \[3\] on cpu"),
    "of sequences": ({"v_scale": torch.ones(2, 2)}, r"v_scale: got torch.float32 \[2, 2\] on cpu"),
    "elsewhere": ({"v_scale": torch.ones(2, device="meta")}, r"v_scale: got .* on meta; allowed"),
    "more layers": ({"k_scale": [1.0, 2.0]}, "k_scale: got 2 scales; allowed: one, or 1"),
    "another type": ({"dtype": torch.int8}, "dtype: got torch.int8; allowed: .* torch.float8_e5"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("make", [KVCache, PagedKVCache], ids=["KVCache", "PagedKVCache"])
def test_bad_scales_allocate_nothing(make: Callable[..., Any], name: str) -> None:
    options, message = BAD[name]
    with pytest.raises(InputError, match=f"{make.__name__}: {message}"):
        make(2, 8, HEADS, DIM, **{"dtype": E4M3, "device": "cpu"} | options)


@pytest.mark.parametrize("name", sorted(BAD.keys() - {"elsewhere"}))
@pytest.mark.parametrize("kind", [KVCache, PagedKVCache, ShardedKVCache, ShardedPagedKVCache])
def test_bytes_of_bad_scales_are_not_told(kind: Any, name: str) -> None:
    options, message = BAD[name]
    with pytest.raises(InputError, match=f"^{kind.__name__}: {message}"):
        kind.bytes_needed(2, 8, HEADS, DIM, **{"dtype": E4M3} | options)


def test_tokens_and_options_that_a_cache_of_8_bits_does_not_take() -> None:
    cache = KVCache(BATCH, ROOM, HEADS, DIM, E4M3, "cpu", k_scale=0.5)
    pages = PagedKVCache(4, 4, HEADS, DIM, E4M3, "cpu", k_scale=0.5)
    token = random(BATCH, HEADS, DIM, device="cpu")
    q = random(BATCH, 4, DIM, device="cpu")
    for wrong in (token.float(), stored(token, None, E4M3)):
        with pytest.raises(InputError, match=r"append: k: got .*; torch.float16 or torch.bfloat16"):
            cache.append(wrong, token)
        with pytest.raises(InputError, match=r"append: k: got .*torch.float16 or torch.bfloat"):
            pages.append([pages.allocate()], wrong[:1], token[:1])
    with pytest.raises(
        InputError, match=r"KVCache.decode: k_scale: got an option; allowed: the ca"
    ):
        cache.decode(q, token, token, k_scale=0.5)
    with pytest.raises(InputError, match=r"decode: v_scale: got an option; allowed: the cache's"):
        pages.decode([pages.allocate()], q[:1], token[:1], token[:1], v_scale=0.5)
    with pytest.raises(InputError, match=r"KVCache.decode: k_scale: got an option"):
        KVCache(BATCH, ROOM, HEADS, DIM, device="cpu").decode(q, token, token, k_scale=0.5)
    assert cache.lengths == [0, 0]
