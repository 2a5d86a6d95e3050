"""A rank with a GPU of its own, and NCCL: captured steps over shards, against whole caches.

As a program: the rank, how many there are, and a folder to meet in. Where there is no GPU, steps
are not captured, and gloo takes NCCL's place: to try the program out.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gqa_cutlass import KVCache, PagedKVCache
from gqa_cutlass.cache.scales import raw
from gqa_cutlass.distributed import ShardedKVCache, ShardedPagedKVCache

GPU = torch.cuda.is_available()
BATCH, HEADS, KV_HEADS, DIM = (4, 32, 8, 128) if GPU else (2, 4, 1, 64)
PROMPT = 1000 if GPU else 9
STEPS = 4
GRAPHS: list[torch.cuda.CUDAGraph] = []
E4M3 = {"dtype": torch.float8_e4m3fn, "k_scale": 0.25, "v_scale": 0.5}


def captured(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The same step as a CUDA graph, which was made once before."""
    if not GPU:
        return step
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    GRAPHS.append(graph)
    # Meanwhile NCCL's watchdog asks for events, in a thread of its own.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        out = step()

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay


class Random:
    """The same numbers on all ranks, in tensors that stay where they are."""

    def __init__(self, device: str, tokens: int = 1) -> None:
        self.device, self.generator = device, torch.Generator().manual_seed(3)
        several = (tokens,) * (tokens > 1)
        self.given = [
            self.make(BATCH, *several, heads, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)
        ]

    def make(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).half().to(self.device)

    def renew(self) -> None:
        for tensor in self.given:
            tensor.copy_(self.make(*tensor.shape))


def compare(out: Tensor, expected: Tensor) -> None:
    """With what one GPU gives, and to the bit with what all other ranks do."""
    assert torch.allclose(out, expected, atol=2e-3, rtol=2e-3), (out - expected).abs().max()
    outs = [torch.empty_like(out) for _ in range(dist.get_world_size())]
    dist.all_gather(outs, out.contiguous())
    assert all(torch.equal(other, out) for other in outs)


def check_cache(device: str, tokens: int, **kind: Any) -> None:
    """Steps of one token, or of drafts of which two stay."""
    random = Random(device, tokens)
    room = PROMPT + STEPS * tokens + 8
    sizes = BATCH, room, KV_HEADS, DIM
    shard, whole = (make(*sizes, device=device, **kind) for make in (ShardedKVCache, KVCache))
    prompt = [random.make(BATCH, PROMPT, KV_HEADS, DIM) for _ in range(2)]
    lengths = [PROMPT - 3 * b for b in range(BATCH)]

    def step(cache: KVCache) -> Tensor:
        out = cache.decode(*random.given)
        if tokens > 1:
            cache.accept(2)
        return out

    for cache in (shard, whole):
        cache.prefill(*prompt, lengths=lengths)
    compare(step(shard), step(whole))
    replay = captured(lambda: step(shard))
    for _ in range(STEPS - 1):
        random.renew()
        compare(replay(), step(whole))
    assert torch.equal(shard.seqlens, whole.seqlens)
    size, rank = dist.get_world_size(), dist.get_rank()
    for b, length in enumerate(whole.seqlens.tolist()):
        own = raw(whole.k)[b, rank:length:size]
        assert torch.equal(raw(shard.k)[b, : len(own)], own)


def check_pages(device: str) -> None:
    """Steps of a batch of sequences in pages."""
    random = Random(device)
    size = 16 * dist.get_world_size()
    pages = BATCH * (PROMPT // size + 2)
    prompt = [random.make(PROMPT, KV_HEADS, DIM) for _ in range(2)]
    batches, steps = [], []
    for make in (ShardedPagedKVCache, PagedKVCache):
        cache = make(pages, size, KV_HEADS, DIM, device=device)
        sequences = [cache.allocate() for _ in range(BATCH - 1)]  # and an inactive row
        for b, sequence in enumerate(sequences):
            cache.prefill(sequence, *(t[b:] for t in prompt))
        batch = cache.batch(BATCH, PROMPT + STEPS)
        batch.assign(sequences, STEPS)
        batches.append(batch)

        def step(batch: Any = batch) -> Tensor:
            with batch.step() as step:
                out: Tensor = step.decode(0, *random.given)
            return out

        steps.append(step)
    compare(steps[0](), steps[1]())
    if GPU:
        replay = captured(steps[0])
        steps[0] = lambda: batches[0].run(replay)
    for _ in range(STEPS - 1):
        random.renew()
        compare(steps[0](), steps[1]())
    for batch in batches:
        batch.check()


def main() -> None:
    rank, size, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    device = "cpu"
    if GPU:
        torch.cuda.set_device(rank)
        device = f"cuda:{rank}"
    dist.init_process_group(
        "nccl" if GPU else "gloo", init_method=f"file://{folder}/meeting", rank=rank,
        world_size=size, timeout=timedelta(seconds=120),
    )  # fmt: skip
    check_cache(device, 1)
    check_cache(device, 3)
    check_cache(device, 1, **E4M3)
    check_pages(device)
    dist.barrier()
    for graph in GRAPHS:  # NCCL waits until graphs with its operations are gone
        graph.reset()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
