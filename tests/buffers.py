"""Memory with guards around it, for tensors that kernels may write to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

GUARD = 64  # elements on either side of a tensor
CANARY = 0x7FA5  # a NaN in float16 and in bfloat16: it shows when it is read


@dataclass
class Buffer:
    """Memory with guards at both ends, and the tensor in its middle."""

    memory: Tensor
    tensor: Tensor

    def guards_intact(self) -> bool:
        raw = self.memory.view(torch.int16)
        inside = torch.zeros_like(raw, dtype=torch.bool)
        start = self.tensor.storage_offset()
        inside.as_strided(self.tensor.shape, self.tensor.stride(), start).fill_(True)
        return bool(((raw == CANARY) | inside).all())


def guarded(
    shape: tuple[int, ...], dtype: torch.dtype, device: str, offset: int = 0, pad: int = 0
) -> Buffer:
    """A tensor whose rows start `offset` elements past a 16-byte boundary, `pad` elements apart."""
    pitch = shape[-1] + pad
    numel = pitch
    for size in shape[:-1]:
        numel *= size
    memory = torch.full((numel + 2 * GUARD + offset,), CANARY, dtype=torch.int16, device=device)
    strides = [1]
    step = pitch
    for size in reversed(shape[:-1]):
        strides.append(step)
        step *= size
    view = memory.view(dtype).as_strided(shape, strides[::-1], GUARD + offset)
    return Buffer(memory, view)
