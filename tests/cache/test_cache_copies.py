"""Copies of caches: `copy.deepcopy`, `pickle` and `torch.save`."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import diagonal
from torch import Tensor

from gqa_cutlass import KVCache, PagedKVCache

BATCH, ROOM, HEADS, GROUP, DIM = 2, 64, 2, 2, 64
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
BY_TOKEN = {"k_scale": "token", "v_scale": "token"}
WINDOWS = {"window": [8, None], "tokens_per_call": 1}  # the first layer keeps 32 of 64 tokens
KINDS: dict[str, dict[str, Any]] = {
    "f16": {},
    "e4m3, numbers": {"dtype": E4M3, "k_scale": [0.5, 2.0]},
    "e5m2, scales of heads": {"dtype": E5M2, "v_scale": torch.tensor([0.5, 3.0])},
    "e4m3, scales of tokens": {"dtype": E4M3, **BY_TOKEN},
    "f16, windows": WINDOWS,
    "e5m2, windows, scales of tokens": {"dtype": E5M2, **WINDOWS, **BY_TOKEN},
}


def saved(caches: list[KVCache]) -> list[KVCache]:
    """By way of a file of torch's."""
    file = io.BytesIO()
    torch.save(caches, file)
    file.seek(0)
    return torch.load(file, weights_only=False)  # type: ignore[no-any-return]


WAYS: dict[str, Callable[[list[KVCache]], list[KVCache]]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda caches: pickle.loads(pickle.dumps(caches)),
    "torch.save": saved,
}


def new_caches(device: str, options: dict[str, Any]) -> list[KVCache]:
    """Two layers that share their lengths."""
    given = {n: v.to(device) if isinstance(v, Tensor) else v for n, v in options.items()}
    return KVCache.for_layers(2, BATCH, ROOM, HEADS, DIM, device=device, **given)


def prefill(caches: list[KVCache], count: int) -> None:
    for i, cache in enumerate(caches):
        generator = torch.Generator().manual_seed(i)
        shape = 2, BATCH, count, HEADS, DIM
        cache.prefill(*torch.randn(shape, generator=generator).half().to(cache.device))


def decode(caches: list[KVCache]) -> list[Tensor]:
    """One token, in every layer."""
    found = []
    for i, cache in enumerate(caches):
        generator = torch.Generator().manual_seed(9 + i)
        sizes = [HEADS * GROUP, HEADS, HEADS]
        rows = torch.randn(BATCH, sum(sizes), DIM, generator=generator).half().to(cache.device)
        found.append(cache.decode(*rows.split(sizes, dim=1)))
    return found


def held(caches: list[KVCache]) -> list[Tensor]:
    """What there is of tokens, and their number: bytes, for rows without a token may be NaN."""
    parts = [part for c in caches for part in (c.seqlens, c.k, c.v, c.k_scale, c.v_scale)]
    return [part.view(torch.uint8) for part in parts if isinstance(part, Tensor)]


@pytest.mark.parametrize(("kind", "way"), diagonal(KINDS, WAYS))
def test_a_copy_has_the_sequences_and_goes_on_alone(kind: str, way: str, device: str) -> None:
    """Also where windows see the memory as pages, over the edge of their ring."""
    caches = new_caches(device, KINDS[kind])
    prefill(caches, 30)
    before = [t.clone() for t in held(caches)]
    copied = WAYS[way](caches)
    assert [(c.k.dtype, c.lengths, str(c)) for c in copied] == [
        (c.k.dtype, c.lengths, str(c)) for c in caches
    ]
    assert not {t.data_ptr() for t in held(copied)} & {t.data_ptr() for t in held(caches)}
    assert all(map(torch.equal, held(copied), before))
    prefill(copied, 5)
    out = decode(copied)
    assert all(map(torch.equal, held(caches), before)) and caches[0].lengths == [30, 30]
    prefill(caches, 5)
    assert all(map(torch.equal, decode(caches), out))
    assert all(map(torch.equal, held(caches), held(copied)))
    assert caches[0].lengths == copied[0].lengths == [36, 36]


def test_what_graphs_write_to_stays_where_it_is_in_a_copy_too() -> None:
    """As torch's compiler must be told."""
    for way in WAYS.values():
        caches = way(new_caches("cpu", KINDS["e5m2, windows, scales of tokens"]))
        told = [t for c in caches for t in (c.k, c.v, c.k_scale, c.v_scale, c.seqlens)]
        told += [t for c in caches for t in c._asked.of_tokens]  # as kernels see those of a ring
        assert {getattr(t, "_dynamo_static_input_type", None) for t in told} == {"unguarded"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_is_loaded_where_torch_is_told_to(kind: str) -> None:
    """Of a cache of a GPU, on another one or none; what asks for the place finds the new one."""
    file = io.BytesIO()
    torch.save(new_caches("cpu", KINDS[kind]), file)
    file.seek(0)
    caches = torch.load(file, map_location="meta", weights_only=False)
    for cache in caches:
        places = cache.device, cache.seqlens.device, cache._lengths.device
        assert {place.type for place in places} == {"meta"}
        assert cache._lengths.upload("append", [1, 2], torch.int32).device.type == "meta"


def test_pages_are_loaded_where_torch_is_told_to() -> None:
    file = io.BytesIO()
    torch.save(PagedKVCache(4, 16, HEADS, DIM, device="cpu", dtype=E4M3), file)
    file.seek(0)
    cache = torch.load(file, map_location="meta", weights_only=False)
    assert cache.device.type == cache.k[0].device.type == "meta"
