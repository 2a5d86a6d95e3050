"""KVCache.decode with a rotary embedding: tokens that the tables have no position for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cache_model import DIM, filled, new_cache, nothing_written, on_device, queries, tokens
from compiling import GROUP

from gqa_cutlass import CacheOverflowError, KVCache

POSITIONS = 6  # the cache has room for 12


def options(cache: KVCache, *starts: int) -> dict[str, Any]:
    turns = torch.rand(2, POSITIONS, DIM // 2, device=cache.device)
    given = {"rotary_cos": turns[0], "rotary_sin": turns[1]}
    return given | ({"rotary_seqlens": on_device(cache, *starts)} if starts else {})


def test_what_is_known_to_have_no_position_is_refused(device: str) -> None:
    cache = new_cache(device=device)
    filled(cache, [3, 0, 4])
    q, (k, v), turned = queries(cache, 3), tokens(cache, 3), options(cache)
    match = "KVCache.decode: rotary_cos: got 6 positions, where a sequence holds 4 tokens and 3"
    with nothing_written(cache), pytest.raises(CacheOverflowError, match=match):
        cache.decode(q, k, v, **turned)
    with nothing_written(cache), pytest.raises(CacheOverflowError, match=match):
        cache.decode(q[:2], k[:2], v[:2], rows=[0, 2], **turned)
    cache.decode(q[:2], k[:2], v[:2], rows=[0, 1], **turned)
    assert cache.lengths == cache.seqlens.tolist() == [6, 3, 4]


@pytest.mark.parametrize("some", [False, True])
@pytest.mark.parametrize("starts", [(), (0, 4, 3)])
def test_the_device_finds_what_the_host_does_not_know(
    some: bool, starts: tuple[int, ...], device: str
) -> None:
    """Lengths, or positions that are not those of the lengths: nothing is appended there."""
    cache = new_cache(device=device)
    filled(cache, [3, 0, 4])
    if not starts:
        cache.forget()
    before, (k, v) = cache.k.clone(), tokens(cache, 3)
    rows = {"rows": on_device(cache, 0, 1, 2)} if some else {}
    out = cache.decode(queries(cache, 3), k, v, **rows, **options(cache, *starts))
    found = 2 if not starts else 1
    with pytest.raises(CacheOverflowError, match=rf"cache_seqlens\[{found}\]"):
        cache.check()
    held = [6, 3, 4] if not starts else [6, 0, 7]
    assert cache.seqlens.tolist() == held and cache.lengths is None
    assert [bool(row.isnan().all()) for row in out] == [b == found for b in range(3)]
    assert torch.equal(cache.k[found].view(torch.int16), before[found].view(torch.int16))


@pytest.mark.xdist_group(GROUP)
def test_compiled_code_counts_only_what_has_a_position() -> None:
    cache = new_cache()
    filled(cache, [3, 0, 4])
    torch._dynamo.reset()
    decode = torch.compile(cache.decode, backend="aot_eager", fullgraph=True)
    decode(queries(cache, 3), *tokens(cache, 3), **options(cache))
    assert cache.seqlens.tolist() == [6, 3, 4]
    with pytest.raises(CacheOverflowError):
        cache.check()
    torch._dynamo.reset()
