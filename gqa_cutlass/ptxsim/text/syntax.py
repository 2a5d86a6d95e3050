"""What PTX text says: operands, instructions, variables and kernels (PTX ISA 4)."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Reg:
    """A register, or a special register such as %tid.x."""

    name: str


@dataclass(frozen=True)
class Imm:
    """An immediate operand: an integer, or the bits of a float of `bits` bits."""

    value: int
    float_bits: int = 0


@dataclass(frozen=True)
class Symbol:
    """A variable, parameter or label."""

    name: str


@dataclass(frozen=True)
class Address:
    """A memory operand: [base + offset]. No base: an absolute address.

    Coordinates follow in that of a tensor copy: [base + offset, {x, y}].
    """

    base: Reg | Symbol | None
    offset: int
    coordinates: tuple[Operand, ...] = ()


@dataclass(frozen=True)
class Vector:
    """Operands in braces."""

    items: tuple[Operand, ...]


@dataclass(frozen=True)
class Pair:
    """Two destinations, `p|q`."""

    first: Operand
    second: Operand


@dataclass(frozen=True)
class Not:
    """A negated predicate operand."""

    reg: Reg


Operand = Reg | Imm | Symbol | Address | Vector | Pair | Not


@dataclass(frozen=True, kw_only=True)
class Instruction:
    """One instruction.

    Args:
        opcode: The mnemonic, split at its dots.
        operands: In PTX's order, destinations first.
        guard: Predicate under which it executes, if any.
        negated: Whether the guard is negated.
        line: Line of the PTX text.
        source: Where it comes from, "file:line" and where that was inlined, or "" without line
            information.
    """

    opcode: tuple[str, ...]
    operands: tuple[Operand, ...]
    guard: Reg | None
    negated: bool
    line: int
    source: str = ""

    @property
    def name(self) -> str:
        """The mnemonic as written."""
        return ".".join(self.opcode)

    @property
    def where(self) -> str:
        """The source line if there is one, and the line of the PTX text."""
        return f"{self.source} (PTX line {self.line})" if self.source else f"PTX line {self.line}"


@dataclass(frozen=True, kw_only=True)
class Variable:
    """A variable in memory.

    Args:
        space: "shared", "local", "global", "const" or "param".
        align: In bytes.
        size: In bytes; 0 for an array whose size the launch decides.
        initial: First bytes, for global and const.
    """

    space: str
    align: int
    size: int
    initial: bytes = b""


@dataclass(kw_only=True)
class Kernel:
    """One entry of a module.

    Args:
        name: Its symbol.
        registers: Width in bits of every register.
        variables: Its parameters, shared and local variables, and the module's variables.
        instructions: In order.
        labels: Label to the index of the instruction behind it.
        directives: Such as {"reqntid": (128, 1, 1)}.
    """

    name: str
    registers: dict[str, int] = field(default_factory=dict)
    variables: dict[str, Variable] = field(default_factory=dict)
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    directives: dict[str, tuple[int, ...]] = field(default_factory=dict)
