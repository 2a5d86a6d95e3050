"""The choices that tell families of kernels apart."""

from __future__ import annotations

from enum import StrEnum


class Math(StrEnum):
    """What multiplies: tensor cores (mma.sync) or CUDA cores."""

    TENSOROP = "tensorop"
    SIMT = "simt"


class DType(StrEnum):
    """Element type of q, k, v, the cache and the output."""

    F16 = "f16"
    BF16 = "bf16"


class Schedule(StrEnum):
    """How a kernel loads, and how the blocks that share a sequence merge."""

    MULTISTAGE = "multistage"  # cp.async; by way of global memory
    TMA = "tma"  # tensor copies; through the shared memory of a cluster
