"""How much memory a cache takes, and what is said where there is too little."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cache_model import (
    DIM,
    F16,
    HEADS,
    Told,
    bits,
    new_cache,
    same,
)
from torch import Tensor

from gqa_cutlass import (
    CacheAllocationError,
    KVCache,
    allocation,
    rows,
)
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


@pytest.mark.parametrize("form", ["ints", "device"])
def test_reorder_takes_little_memory_at_a_time(
    form: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = 2 * 3 * HEADS * DIM * 2  # two tokens of all sequences
    monkeypatch.setattr(rows, "_TEMPORARY_BYTES", limit)
    taken: list[int] = []
    select = Tensor.index_select

    def noted(tensor: Tensor, dim: int, index: Tensor) -> Tensor:
        taken.append((result := select(tensor, dim, index)).nbytes)
        return result

    monkeypatch.setattr(Tensor, "index_select", noted)
    told = Told([new_cache(device=device)])
    told.prefill([5, 9, 7])
    behind = bits(told.first.k[:, 9:], told.first.v[:, 9:])
    reorder = {"ints": told.reorder, "device": told.reorder_on_device}[form]
    reorder([1, 2, 0])
    reorder([2, 2, 1])
    assert max(taken) == limit
    assert same(behind, bits(told.first.k[:, 9:], told.first.v[:, 9:])), (
        "more was moved than is held"
    )


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
