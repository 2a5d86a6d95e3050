"""A kernel prepared for execution: registers as slots, blocks, and what is known before it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from gqa_cutlass.errors import PtxError
from gqa_cutlass.ptxsim.bits import Bits
from gqa_cutlass.ptxsim.syntax import (
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
    from gqa_cutlass.ptxsim.machine import Group, Machine

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
        """Slot of a register operand."""
        if not isinstance(operand, Reg) or operand.name not in self._index:
            raise unknown(instruction, f"operand {operand}")
        return self._index[operand.name]

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

    def source(self, operand: Operand, width: int, instruction: Instruction) -> int:
        """Slot of a source operand of `width` bits; wider registers are narrowed later."""
        match operand:
            case Reg():
                return self.register(operand, instruction)
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
            return Predicate(self.register(operand.reg, instruction), negated=True)
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


class Flow:
    """Control flow, liveness and definite assignment of a kernel; registers as bits of integers."""

    def __init__(self, kernel: Kernel) -> None:
        self._code = kernel.instructions
        self._labels = kernel.labels
        self._bit = {name: 1 << i for i, name in enumerate(kernel.registers)}
        self._names = list(kernel.registers)
        targets = set(kernel.labels.values()) | {0}
        after = {i + 1 for i, ins in enumerate(self._code) if self._ends_block(ins)}
        self.leaders = sorted(i for i in targets | after if i < len(self._code))
        self._blocks = list(zip(self.leaders, [*self.leaders[1:], len(self._code)], strict=True))
        self._next = {start: self._successors(end) for start, end in self._blocks}
        self._reads = [self._bits(read(ins)) for ins in self._code]
        self._writes = [self._bits(written(ins)) for ins in self._code]

    @staticmethod
    def _ends_block(instruction: Instruction) -> bool:
        return instruction.opcode[0] in ("bra", "ret", "exit", "trap")

    def _successors(self, end: int) -> list[int]:
        last = self._code[end - 1]
        follows = [end] if end < len(self._code) else []
        if last.opcode[0] == "bra":
            return [branch_target(last, self._labels), *(follows if last.guard else [])]
        if last.opcode[0] in ("ret", "exit", "trap") and last.guard is None:
            return []
        return follows

    def _bits(self, names: Iterable[str]) -> int:
        bits = 0
        for name in names:
            bits |= self._bit.get(name, 0)
        return bits

    def dead_after(self) -> list[list[str]]:
        """For every instruction the registers that are read, or could have been, for the last time.

        Backward liveness over the blocks, then within each.
        """
        live_in = dict.fromkeys(self.leaders, 0)
        changed = True
        while changed:
            changed = False
            for start, end in reversed(self._blocks):
                live = self._live_out(start, live_in)
                for i in range(end - 1, start - 1, -1):
                    live = self._before(i, live)
                if live != live_in[start]:
                    live_in[start], changed = live, True
        dead: list[list[str]] = [[] for _ in self._code]
        for start, end in self._blocks:
            live = self._live_out(start, live_in)
            for i in range(end - 1, start - 1, -1):
                touched = self._reads[i] | self._writes[i]
                dead[i] = self._named(touched & ~live)
                live = self._before(i, live)
        return dead

    def _live_out(self, start: int, live_in: dict[int, int]) -> int:
        live = 0
        for follower in self._next[start]:
            live |= live_in[follower]
        return live

    def _before(self, i: int, live: int) -> int:
        """Registers live before an instruction, given those live after it."""
        if self._code[i].guard is None:
            live &= ~self._writes[i]
        return live | self._reads[i]

    def maybe_unassigned(self) -> set[str]:
        """Registers that some path reads without having written them.

        Forward definite assignment; a guarded write does not count.
        """
        everything = (1 << len(self._names)) - 1
        assigned = dict.fromkeys(self.leaders, everything)
        assigned[0] = 0
        changed = True
        while changed:
            changed = False
            for start, end in self._blocks:
                have = assigned[start]
                for i in range(start, end):
                    if self._code[i].guard is None:
                        have |= self._writes[i]
                for follower in self._next[start]:
                    narrowed = assigned[follower] & have
                    if narrowed != assigned[follower]:
                        assigned[follower], changed = narrowed, True
        missing = 0
        for start, end in self._blocks:
            have = assigned[start]
            for i in range(start, end):
                missing |= self._reads[i] & ~have
                if self._code[i].guard is None:
                    have |= self._writes[i]
        return set(self._named(missing))

    def _named(self, bits: int) -> list[str]:
        names = []
        while bits:
            low = bits & -bits
            names.append(self._names[low.bit_length() - 1])
            bits ^= low
        return names
