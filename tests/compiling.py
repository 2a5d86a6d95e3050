"""What tests of torch.compile share: steps on the CPU, and how often something was compiled."""

from __future__ import annotations

import torch
from helpers import call_tensors
from torch import Tensor

GROUP = "dynamo"  # tests of one process: loading torch's compiler takes seconds
ROOM = 16


def random_step(seed: int = 0, **sizes: object) -> dict[str, Tensor]:
    """A step's tensors without `out`, filled at random."""
    generator = torch.Generator().manual_seed(seed)
    tensors = call_tensors(**({"max_seq_len": ROOM} | sizes))
    del tensors["out"]
    for tensor in tensors.values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return tensors


def copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same, with memory of its own and the same strides."""
    return {
        name: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device).copy_(t)
        for name, t in tensors.items()
    }


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether tensors are equal to the bit."""
    return all(torch.equal(a[name], b[name]) for name in a)
