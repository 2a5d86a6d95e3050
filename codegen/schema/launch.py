"""What a launch is: its shape, and what the kernel is told of it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Self


class Documented(IntEnum):
    """Numbers that say what they mean, in every language."""

    doc: str

    def __new__(cls, value: int, doc: str) -> Self:
        """A number and what it means."""
        member = int.__new__(cls, value)
        member._value_ = value
        member.doc = doc
        return member


class Pdl(Documented):
    """Programmatic dependent launch: when the next kernel of the stream may start."""

    NONE = 0, "when this one is done"
    END = 1, "when this one's tiles are"
    WHOLE = 2, "as soon as this one may read; until then this one fetches its first tiles to L2"


class NumberType(Documented):
    """What a tensor holds that may be of several types."""

    FLOAT32 = 0, "float"
    FLOAT16 = 1, "cutlass::half_t"
    BFLOAT16 = 2, "cutlass::bfloat16_t"


ENUMS: tuple[type[Documented], ...] = (Pdl, NumberType)


@dataclass(frozen=True, kw_only=True)
class LaunchShape:
    """Grid, block and shared memory of one launch.

    Args:
        grid: Blocks in x (KV heads times head blocks), y (splits) and z (sequences).
        block: Threads per block.
        shared_bytes: Dynamic shared memory per block.
        cluster: Blocks of a cluster, along grid y; divides it.
        pdl: Programmatic dependent launch: the kernel may start while the kernel before it in
            the stream finishes.
    """

    grid: tuple[int, int, int]
    block: int
    shared_bytes: int
    cluster: int = 1
    pdl: bool = False
