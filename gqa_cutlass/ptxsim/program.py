"""A kernel prepared for execution: registers as slots, blocks, and what is known before it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from gqa_cutlass.errors import PtxError
from gqa_cutlass.ptxsim.element.bits import Bits
from gqa_cutlass.ptxsim.text.syntax import (
    Address,
    Imm,
    Instruction,
    Kernel,
    Not,
    Operand,
    Pair,
    Reg,
    Symbol,
    Vector,
)

if TYPE_CHECKING:
    from gqa_cutlass.ptxsim.group import Group
    from gqa_cutlass.ptxsim.machine import Machine

UNSIGNED: dict[int, type[np.generic]] = {
    1: np.bool_, 8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64,
}  # fmt: skip
Step = Callable[["Machine", "Group"], "Group | None"]


@dataclass(frozen=True)
class Members:
    """Lanes of a warp that must execute an instruction together.

    Args:
        mask: Slot of the membermask, or None: all lanes that have not exited.
        strict: All 32 lanes, exited or not.
    """

    mask: int | None = None
    strict: bool = False


@dataclass(frozen=True, kw_only=True)
class Action:
    """What an instruction does.

    Args:
        step: Executes it for a group of lanes. Returns, if `ends`, the lanes among them that go on
            with the next instruction.
        ends: Whether lanes may leave: branches, exits and waits.
        members: Who must execute it together.
        shared_width: Bytes of its access to shared memory, 0 if it has none.
    """

    step: Step
    ends: bool = False
    members: Members | None = None
    shared_width: int = 0


@dataclass(frozen=True, kw_only=True)
class Code:
    """One instruction, ready to run.

    Args:
        instruction: As parsed.
        action: What it does.
        guard: Slot of the guard predicate, or None.
        dead: Slots whose value nobody reads any more once this has run.
        reads: Slots that it reads.
        writes: Slots that it writes.
    """

    instruction: Instruction
    action: Action
    guard: int | None
    dead: tuple[int, ...]
    reads: tuple[int, ...]
    writes: tuple[int, ...]


@dataclass(frozen=True)
class Predicate:
    """A predicate operand: its slot, and whether it is negated."""

    slot: int
    negated: bool


class Slots:
    """Names and constants to positions in the register file."""

    def __init__(self, kernel: Kernel, addresses: dict[str, int], specials: dict[str, Bits]):
        self.kernel = kernel
        self.widths: list[int] = []
        self.values: list[Bits | None] = []
        self._index: dict[object, int] = {}
        self._addresses = addresses
        for name, width in kernel.registers.items():
            self._add(name, width, None)
        for name, value in specials.items():
            self._add(name, 1 if value.dtype == np.bool_ else value.dtype.itemsize * 8, value)

    def _add(self, key: object, width: int, value: Bits | None) -> int:
        self._index[key] = len(self.widths)
        self.widths.append(width)
        self.values.append(value)
        return self._index[key]

    def register(self, operand: Operand, instruction: Instruction) -> int:
        """Slot of a register operand, special ones included."""
        if not isinstance(operand, Reg) or operand.name not in self._index:
            raise unknown(instruction, f"operand {operand}")
        return self._index[operand.name]

    def destination(
        self, operand: Operand, width: int, instruction: Instruction, *, wider: bool = False
    ) -> int:
        """Slot of a register of `width` bits that may be written; if `wider`, or of more."""
        if not isinstance(operand, Reg) or operand.name not in self.kernel.registers:
            raise unknown(instruction, f"operand {operand}, which is written,")
        return self._checked(self._index[operand.name], width, wider, operand, instruction)

    def sink(
        self, operand: Operand, width: int, instruction: Instruction, *, wider: bool = False
    ) -> int | None:
        """As `destination`, and None for `_`."""
        if operand == Reg("_"):
            return None
        return self.destination(operand, width, instruction, wider=wider)

    def _checked(
        self, slot: int, width: int, wider: bool, operand: Operand, instruction: Instruction
    ) -> int:
        has = self.widths[slot]
        if has != width and not (wider and has > width > 1):  # nothing is wider than a predicate
            raise unknown(instruction, f"operand {operand}, of {has} bits,")
        return slot

    def is_predicate(self, operand: Operand) -> bool:
        """Whether an operand is a register of one bit."""
        return isinstance(operand, Reg) and self.kernel.registers.get(operand.name) == 1

    def named(self, name: str) -> int:
        """Slot of a register by its name."""
        return self._index[name]

    def width(self, slot: int) -> int:
        """Width in bits of a slot."""
        return self.widths[slot]

    def constant(self, value: int, width: int) -> int:
        """Slot of an integer constant."""
        value %= 1 << width
        found = self._index.get((value, width))
        if found is None:
            array = np.array([value], dtype=UNSIGNED[width])
            found = self._add((value, width), width, array)
        return found

    def source(
        self, operand: Operand, width: int, instruction: Instruction, *, wider: bool = False
    ) -> int:
        """Slot of a source operand of `width` bits; if `wider`, a register may have more."""
        match operand:
            case Reg():
                slot = self.register(operand, instruction)
                return self._checked(slot, width, wider, operand, instruction)
            case Imm(value=value, float_bits=0):
                return self.constant(value, width)
            case Imm(value=value, float_bits=bits) if bits == width:
                return self.constant(value, width)
            case Symbol(name=name) if name in self._addresses:
                return self.constant(self._addresses[name], width)
        raise unknown(instruction, f"operand {operand}")

    def predicate(self, operand: Operand, instruction: Instruction) -> Predicate:
        """A predicate operand, possibly negated."""
        if isinstance(operand, Not):
            return Predicate(self.source(operand.reg, 1, instruction), negated=True)
        return Predicate(self.source(operand, 1, instruction), negated=False)

    def target(self, instruction: Instruction) -> int:
        """Position of the instruction that a branch goes to."""
        return branch_target(instruction, self.kernel.labels)

    def address_of(self, name: str) -> int | None:
        """Address of a variable."""
        return self._addresses.get(name)


def branch_target(instruction: Instruction, labels: dict[str, int]) -> int:
    """Position of the instruction that a branch goes to."""
    operand = instruction.operands[0] if instruction.operands else None
    if not isinstance(operand, Symbol) or operand.name not in labels:
        raise unknown(instruction, f"label {operand}")
    return labels[operand.name]


def unknown(instruction: Instruction, what: str = "instruction") -> PtxError:
    """The error for something that this simulator does not know."""
    return PtxError(
        f"ptxsim: unknown {what} in `{instruction.name}` at {instruction.where}; allowed: what "
        "docs/ptxsim.md lists. Nothing was run."
    )


def registers_of(operands: Iterable[Operand]) -> list[str]:
    """Names of all registers in operands."""
    names: list[str] = []
    for operand in operands:
        match operand:
            case Reg(name=name):
                names.append(name)
            case Not(reg=reg):
                names.append(reg.name)
            case Address(base=base, coordinates=coordinates):
                names += [base.name] if isinstance(base, Reg) else []
                names += registers_of(coordinates)
            case Vector(items=items):
                names += registers_of(items)
            case Pair(first=first, second=second):
                names += registers_of((first, second))
    return [name for name in names if name != "_"]


_NO_RESULT = {
    "st", "red", "bar", "barrier", "fence", "membar", "bra", "ret", "exit", "cp", "griddepcontrol",
    "prefetch", "prefetchu", "nanosleep", "setmaxnreg", "trap", "stmatrix", "discard",
    "applypriority",
}  # fmt: skip


def written(instruction: Instruction) -> list[str]:
    """Registers that an instruction writes."""
    head = instruction.opcode[0]
    no_result = head in _NO_RESULT
    if head == "mbarrier":
        no_result = not {"init", "inval", "expect_tx", "complete_tx"}.isdisjoint(instruction.opcode)
    if no_result or not instruction.operands:
        return []
    return registers_of(instruction.operands[:1])


def read(instruction: Instruction) -> list[str]:
    """Registers that an instruction reads."""
    skip = 1 if written(instruction) else 0
    names = registers_of(instruction.operands[skip:])
    return names if instruction.guard is None else [*names, instruction.guard.name]
