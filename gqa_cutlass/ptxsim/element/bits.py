"""What an element-wise instruction is: its operands as raw bits, its opcode, its types."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import DTypeLike, NDArray

# One element per thread, or one that all threads share: bool_ for predicates, uint8, uint16,
# uint32 or uint64 for every other operand, floating-point ones included.
Bits: TypeAlias = NDArray[Any]
# The same memory seen as integers or floating-point numbers.
Numbers: TypeAlias = NDArray[Any]
Run: TypeAlias = Callable[..., Any]


@dataclass(frozen=True, kw_only=True)
class Arithmetic:
    """An element-wise instruction, ready to run.

    Args:
        results: Width in bits of each destination; 1 is a predicate.
        sources: Width in bits of each source, in the order of PTX's operands.
        signed: Whether a result narrower than its register is sign-extended.
        run: Takes the sources as arrays of raw bits of shape (n,) or (1,) and returns the result,
            or a tuple of them exactly when there are several. It never modifies a source.
    """

    results: tuple[int, ...]
    sources: tuple[int, ...]
    signed: bool
    run: Callable[..., Bits | tuple[Bits, ...]]


class Sort(Enum):
    """How the bits of an operand are read."""

    PREDICATE = "pred"
    UNTYPED = "b"
    UNSIGNED = "u"
    SIGNED = "s"
    FLOAT = "f"


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A type of PTX.

    Args:
        name: As PTX spells it, without the dot.
        sort: How the bits are read.
        width: Bits of the whole operand.
        lanes: Values in one operand, for example 2 for f16x2.
    """

    name: str
    sort: Sort
    width: int
    lanes: int = 1

    @property
    def signed(self) -> bool:
        """Whether it is a signed integer."""
        return self.sort is Sort.SIGNED

    @property
    def floating(self) -> bool:
        """Whether it is a floating-point type."""
        return self.sort is Sort.FLOAT

    @property
    def integer(self) -> bool:
        """Whether it is a signed or unsigned integer."""
        return self.sort in (Sort.SIGNED, Sort.UNSIGNED)

    @property
    def lane(self) -> Kind:
        """The type of one value: f16 for f16x2, itself for a scalar."""
        return KINDS[self.name.removesuffix("x2")]

    @property
    def bits(self) -> np.dtype[Any]:
        """The dtype of the raw bits."""
        return raw(self.width)

    @property
    def numbers(self) -> np.dtype[Any]:
        """The dtype that reads the raw bits as integers of the right signedness."""
        return np.dtype(f"i{self.width // 8}") if self.signed else self.bits


def raw(width: int) -> np.dtype[Any]:
    """Return the dtype that holds the raw bits of an operand of that width."""
    return np.dtype(np.bool_) if width == 1 else np.dtype(f"u{width // 8}")


KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind(name="pred", sort=Sort.PREDICATE, width=1),
        *(
            Kind(name=f"{sort.value}{width}", sort=sort, width=width)
            for sort in (Sort.UNTYPED, Sort.UNSIGNED, Sort.SIGNED)
            for width in (8, 16, 32, 64)
        ),
        Kind(name="u16x2", sort=Sort.UNSIGNED, width=32, lanes=2),
        Kind(name="s16x2", sort=Sort.SIGNED, width=32, lanes=2),
        Kind(name="f16", sort=Sort.FLOAT, width=16),
        Kind(name="bf16", sort=Sort.FLOAT, width=16),
        Kind(name="f16x2", sort=Sort.FLOAT, width=32, lanes=2),
        Kind(name="bf16x2", sort=Sort.FLOAT, width=32, lanes=2),
        Kind(name="e4m3x2", sort=Sort.FLOAT, width=16, lanes=2),
        Kind(name="e5m2x2", sort=Sort.FLOAT, width=16, lanes=2),
        Kind(name="tf32", sort=Sort.FLOAT, width=32),
        Kind(name="f32", sort=Sort.FLOAT, width=32),
        Kind(name="f64", sort=Sort.FLOAT, width=64),
    )
}
_ROUNDINGS = ("rn", "rz", "rm", "rp", "rna", "rni", "rzi", "rmi", "rpi")


@dataclass(frozen=True, kw_only=True)
class Opcode:
    """A mnemonic taken apart.

    Args:
        name: Its first part, for example "cvt".
        modifiers: The parts that are no types, in order.
        kinds: The types, in order.
    """

    name: str
    modifiers: tuple[str, ...]
    kinds: tuple[Kind, ...]

    @classmethod
    def parse(cls, parts: tuple[str, ...]) -> Opcode:
        """Take apart a mnemonic that was split at its dots."""
        return cls(
            name=parts[0],
            modifiers=tuple(part for part in parts[1:] if part not in KINDS),
            kinds=tuple(KINDS[part] for part in parts[1:] if part in KINDS),
        )

    def __contains__(self, modifier: str) -> bool:
        return modifier in self.modifiers

    @property
    def kind(self) -> Kind:
        """The last type: that of the sources where there are two."""
        return self.kinds[-1]

    @property
    def rounding(self) -> str:
        """The rounding modifier; "rn" where there is none."""
        return next((part for part in self.modifiers if part in _ROUNDINGS), "rn")


Builder: TypeAlias = Callable[[Opcode], Arithmetic]


def uniform(op: Opcode, arity: int, run: Run) -> Arithmetic:
    """Describe an instruction whose result and sources all have the type of the opcode.

    Args:
        op: The opcode; a packed type makes `run` work on its lanes.
        arity: Number of sources.
        run: Takes and returns bits of one lane.
    """
    kind = op.kind
    return Arithmetic(
        results=(kind.width,),
        sources=(kind.width,) * arity,
        signed=kind.signed,
        run=per_lane(run) if kind.lanes == 2 else run,
    )


def per_lane(run: Run) -> Run:
    """Lift a function of 16-bit values to pairs of them held in 32 bits."""

    def lifted(*pairs: Bits) -> Bits:
        return join_lanes(run(*(split_lanes(pair) for pair in pairs)))

    return lifted


def split_lanes(pairs: Bits) -> Bits:
    """View (n,) words of 32 bits as (n, 2) halves, the low half first."""
    return pairs[:, np.newaxis].view(np.uint16)


def join_lanes(halves: Bits) -> Bits:
    """View (n, 2) halves as (n,) words of 32 bits."""
    words: Bits = np.ascontiguousarray(halves).view(np.uint32)[:, 0]
    return words


def typed(function: Callable[..., Numbers], dtype: DTypeLike) -> Run:
    """Make a function of integers or numbers one of raw bits of the same width."""

    def run(*sources: Bits) -> Bits:
        result = function(*(source.view(dtype) for source in sources))
        return result.view(sources[0].dtype)

    return run
