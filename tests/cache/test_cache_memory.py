"""How much memory a cache takes, and what is said where there is too little."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cache_model import (
    DIM,
    F16,
    bits,
    filled,
    nothing_written,
    on_device,
    same,
)
from modes import Memory
from torch import Tensor

from gqa_cutlass import (
    CacheAllocationError,
    KVCache,
)
from gqa_cutlass.cache import allocation, rows
from gqa_cutlass.errors import GqaError


def test_a_cache_too_large_for_the_cpu_says_what_would_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    available = 64 * 2**20
    monkeypatch.setattr(allocation, "available_bytes", lambda device, held=True: available)
    with pytest.raises(CacheAllocationError) as raised:
        KVCache.for_layers(2, 3, 2**30, 2, 64, F16, "cpu")
    message = str(raised.value)
    needed = KVCache.bytes_needed(3, 2**30, 2, 64, num_layers=2)
    assert f"{needed} bytes (3072.00 GiB)" in message and "in each of 2 layers" in message
    assert "[3, 1073741824, 2, 64] (batch_size, max_seq_len, num_kv_heads, head_dim)" in message
    assert f"free on cpu: {available} bytes" in message and "Nothing was allocated." in message
    longest = int(message.split("max_seq_len up to ")[1].split()[0])
    assert KVCache.for_layers(2, 3, longest, 2, 64, F16, "cpu")[0].max_seq_len == longest
    assert KVCache.bytes_needed(3, longest, 2, 64, num_layers=2) > 0.8 * available
    with pytest.raises(CacheAllocationError):
        KVCache.for_layers(2, 3, longest * 5 // 4, 2, 64, F16, "cpu")


def test_where_not_even_one_token_fits_none_is_promised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocation, "available_bytes", lambda device, held=True: 1000)
    with pytest.raises(CacheAllocationError, match="no max_seq_len fits"):
        KVCache(4, 1, 1, 64, F16, "cpu")


def test_a_really_too_large_cache_is_an_error_of_memory_and_of_this_package() -> None:
    for kind in (CacheAllocationError, MemoryError, GqaError):
        with pytest.raises(kind, match="max_seq_len up to [1-9][0-9]* fits"):
            KVCache(64, 2**30, 1, 64, F16, "cpu")


def test_a_refusal_of_the_allocator_is_the_same_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where what seemed to be free was not: torch's own allocator refuses 8 TiB."""
    monkeypatch.setattr(allocation, "available_bytes", lambda device, held=True: 2**60 * held)
    with pytest.raises(CacheAllocationError, match="no max_seq_len fits") as raised:
        KVCache(64, 2**30, 1, 64, F16, "cpu")
    assert raised.value.__context__ is None  # whose traceback would keep tensors
    monkeypatch.setattr(allocation, "available_bytes", lambda device, held=True: 2**60)
    with pytest.raises(CacheAllocationError, match=f"max_seq_len up to {2**30 - 1} fits"):
        KVCache(64, 2**30, 1, 64, F16, "cpu")  # and what was refused is not promised


def test_available_memory_is_read_where_linux_says_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "meminfo"
    monkeypatch.setattr(allocation, "_MEMINFO", path)
    cpu = torch.device("cpu")
    assert allocation.available_bytes(cpu) > 2**20  # without the file
    path.write_text("MemFree: 1 kB\nMemAvailable:   2048 kB\n")
    assert allocation.available_bytes(cpu) == 2**21


Operation = Callable[[KVCache, Tensor, Tensor], object]

OPERATIONS: dict[str, Operation] = {
    "append": lambda c, k, v: c.append(k[:, 0], v[:, 0]),
    "prefill": lambda c, k, v: c.prefill(k, v),
    "prefill, ints": lambda c, k, v: c.prefill(k, v, [9, 0, 4]),
    "prefill, device": lambda c, k, v: c.prefill(k, v, on_device(c, 4, 9, 10)),
    "reorder": lambda c, k, v: c.reorder([1, 2, 0]),
    "reorder, fewer": lambda c, k, v: c.reorder([0, 0, -1]),
    "reorder, device": lambda c, k, v: c.reorder(on_device(c, 2, 2, 1)),
}


@pytest.mark.parametrize("limit", [1, 500, 2000, 5000], ids="at most {} bytes".format)
@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_temporaries_take_little_memory_at_a_time(
    operation: Operation, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most so much, or one head of one token of all sequences; and all in one go is the same."""
    at_once, cache = (KVCache(3, 24, 3, DIM, F16, "cpu") for _ in range(2))
    k, v = (torch.randn(3, 9, 3, DIM).to(F16) for _ in "kv")
    for each in (at_once, cache):
        each.prefill(k, v, [5, 9, 7])
        for rows_of in (each.k, each.v):
            rows_of.copy_(torch.arange(rows_of.numel()).view_as(rows_of) % 2001)
    operation(at_once, k, v)
    monkeypatch.setattr(rows, "_TEMPORARY_BYTES", limit)
    with Memory() as memory:
        operation(cache, k, v)
    per_sequence, least = 300, 3 * (DIM * 2 + 18)
    assert 0 < memory.peak <= max(limit, least) + per_sequence
    assert cache.lengths == at_once.lengths and torch.equal(cache.seqlens, at_once.seqlens)
    assert same(bits(cache.k, cache.v), bits(at_once.k, at_once.v))


@pytest.mark.parametrize("batch", [1, 3, 255, 65535])
@pytest.mark.parametrize("heads", [1, 8, 129])
@pytest.mark.parametrize("dim", [32, 256])
def test_temporaries_of_any_cache_take_64_mib(batch: int, heads: int, dim: int) -> None:
    cache = torch.empty(batch, 2**30, heads, dim, dtype=F16, device="meta")
    buffer = rows.buffer(cache, batch, 2**30)
    tokens = buffer.shape[0] * buffer.shape[1]
    assert 2**25 < buffer.nbytes + tokens * 18 <= 2**26


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["all", "ints", "device"])
def test_a_long_prompt_takes_64_mib_meanwhile(form: str) -> None:
    cache = KVCache(4, 40_000, 8, 128, F16, "cuda")
    cache.prefill(*(torch.ones(4, 3, 8, 128, dtype=F16, device="cuda"),) * 2, [1, 2, 3, 0])
    k, v = (torch.randn(4, 32_000, 8, 128, dtype=F16, device="cuda") for _ in "kv")  # 250 MiB
    counts = [32_000, 1, 20_000, 31_999]
    given: Any = {"all": None, "ints": counts, "device": on_device(cache, *counts)}[form]
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    cache.prefill(k, v, given)
    assert torch.cuda.max_memory_allocated() - before <= 2**26 + 2**21
    assert torch.cuda.memory_allocated() == before
    counts = [32_000] * 4 if form == "all" else counts
    assert cache.refresh() == [
        held + count for held, count in zip([1, 2, 3, 0], counts, strict=True)
    ]
    for rows_of, new in ((cache.k, k), (cache.v, v)):
        for b, (held, count) in enumerate(zip([1, 2, 3, 0], counts, strict=True)):
            assert torch.equal(rows_of[b, held : held + count], new[b, :count])


@pytest.mark.gpu
def test_a_prompt_without_memory_for_its_temporaries_writes_nothing() -> None:
    cache = KVCache(4, 40_000, 8, 128, F16, "cuda")
    filled(cache, [1, 2, 3, 0])
    k, v = (torch.randn(4, 32_000, 8, 128, dtype=F16, device="cuda") for _ in "kv")
    device = torch.cuda.current_device()
    _, total = torch.cuda.mem_get_info()
    with nothing_written(cache):
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_reserved() / total, device)
        try:
            with pytest.raises(CacheAllocationError, match="prefill: memory"):
                cache.prefill(k, v)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, device)
    cache.prefill(k, v)
    assert cache.seqlens.tolist() == [32_001, 32_002, 32_003, 32_000]


@pytest.mark.gpu
def test_a_cache_too_large_for_the_gpu_says_what_fits() -> None:
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    with pytest.raises(CacheAllocationError, match="free on cuda:") as raised:
        KVCache.for_layers(2, 8, 2**30, 8, 128, torch.bfloat16, "cuda")
    assert torch.cuda.memory_allocated() == before
    longest = int(str(raised.value).split("max_seq_len up to ")[1].split()[0])
    assert KVCache.bytes_needed(8, longest, 8, 128, num_layers=2) > 0.9 * (
        allocation.available_bytes(torch.device("cuda", torch.cuda.current_device()))
    )
    caches = KVCache.for_layers(2, 8, longest, 8, 128, torch.bfloat16, "cuda")
    assert torch.cuda.memory_allocated() > before
    caches.clear()
    assert torch.cuda.memory_allocated() == before
    torch.cuda.empty_cache()


@pytest.mark.gpu
def test_a_refusal_of_the_gpus_allocator_is_the_same_error(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = allocation.available_bytes
    monkeypatch.setattr(
        allocation, "available_bytes", lambda device, held=True: 2**60 if held else honest(device)
    )
    before = torch.cuda.memory_allocated()
    torch.cuda.empty_cache()
    _, total = torch.cuda.mem_get_info()
    room = total * 3 // 2 // KVCache.bytes_needed(8, 1, 8, 128, num_layers=4)  # some layers fit
    with pytest.raises(CacheAllocationError, match="free on cuda:") as raised:
        KVCache.for_layers(4, 8, room, 8, 128, F16, "cuda")
    assert torch.cuda.memory_allocated() == before
    longest = int(str(raised.value).split("max_seq_len up to ")[1].split()[0])
    available = honest(torch.device("cuda", torch.cuda.current_device()))
    assert KVCache.bytes_needed(8, longest, 8, 128, num_layers=4) > 0.9 * available
    KVCache.for_layers(4, 8, longest, 8, 128, F16, "cuda")
    torch.cuda.empty_cache()
