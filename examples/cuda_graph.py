"""A decode step of several layers, captured once and replayed from the first token to the last.

Lengths grow on the device, so that one graph serves all of them; a sequence that is full is found
there as well. Where there is no GPU, the step is called instead of replayed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gqa_cutlass import CacheOverflowError, KVCache

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
LAYERS, BATCH, Q_HEADS, KV_HEADS, HEAD_DIM = (4, 8, 32, 8, 128) if GPU else (2, 2, 4, 1, 64)
ROOM = 1024 if GPU else 5
KIND = {"dtype": torch.float16, "device": DEVICE}


def main() -> list[int]:
    """Decode until the caches are full; returns the lengths at the end."""
    torch.manual_seed(0)
    caches = KVCache.for_layers(LAYERS, BATCH, ROOM, KV_HEADS, HEAD_DIM, **KIND)
    # A graph reads and writes the same memory at every replay: inputs are copied into these.
    q = torch.zeros(BATCH, Q_HEADS, HEAD_DIM, **KIND)
    k, v = torch.zeros(2, BATCH, KV_HEADS, HEAD_DIM, **KIND)

    def step() -> Tensor:
        out = q
        for cache in caches:
            out = cache.decode(out, k, v)
        return out

    replay, out = captured(step, caches[0])
    for token in range(ROOM):
        for tensor in (q, k, v):
            tensor.normal_()
        out = replay()
        if token % (ROOM // 4) == 0:
            print(f"token {token}: {caches[0].refresh()}, out up to {out.abs().max().item():.2f}")
    caches[0].check()  # all of them fitted

    try:
        replay()  # this one does not fit
        caches[0].check()
    except CacheOverflowError as error:
        print("one more:", error)
    return caches[0].refresh()


def captured(step: Callable[[], Tensor], cache: KVCache) -> tuple[Callable[[], Tensor], Tensor]:
    """What runs the step once more, and the tensor that it leaves its result in."""
    if not GPU:
        return step, torch.empty(0)
    step()  # compiles and loads the kernels, which no capture may do
    cache.reset()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay, out


if __name__ == "__main__":
    main()
