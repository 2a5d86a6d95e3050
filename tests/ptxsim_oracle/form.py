"""What an instruction asks for: types, modifiers, rounding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ptxsim_oracle.number import PACKED, ROUNDINGS, WIDTH


def signed(bits: int, width: int) -> int:
    return bits - (1 << width) if bits >> width - 1 else bits


@dataclass(frozen=True)
class Form:
    """An opcode, taken apart independently of the code under test."""

    name: str
    words: tuple[str, ...]
    types: tuple[str, ...]

    @classmethod
    def of(cls, opcode: tuple[str, ...]) -> Form:
        types = tuple(part for part in opcode[1:] if part in WIDTH or part in PACKED)
        words = tuple(part for part in opcode[1:] if part not in types)
        return cls(opcode[0], words, types)

    def has(self, word: str) -> bool:
        return word in self.words

    @property
    def type(self) -> str:
        return self.types[-1].removesuffix("x2")

    @property
    def width(self) -> int:
        return WIDTH[self.type]

    @property
    def lanes(self) -> int:
        """Return what repeats a value of the type in every lane, as a factor."""
        return 0x10001 if self.types[-1] in PACKED else 1

    @property
    def mode(self) -> str:
        return next((word for word in self.words if word in ROUNDINGS), "rn")

    def integer(self, bits: int) -> int:
        return signed(bits, self.width) if self.type[0] == "s" else bits

    def wrap(self, value: int, width: int | None = None) -> int:
        return value & (1 << (width or self.width)) - 1


Oracle = Callable[..., int | tuple[int, int]]
