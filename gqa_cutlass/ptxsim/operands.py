"""Operands of an instruction as slots of the register file, and as values in memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gqa_cutlass.ptxsim.program import Slots, unknown
from gqa_cutlass.ptxsim.syntax import Address, Imm, Instruction, Operand, Reg, Symbol, Vector

if TYPE_CHECKING:
    from gqa_cutlass.ptxsim.machine import Group, Machine

Addresses = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Pointer:
    """An address operand.

    Args:
        slot: Register with the base, or a constant.
        offset: Added to it, in bytes.
        width: Of the base, in bits.
    """

    slot: int
    offset: int
    width: int

    def addresses(self, machine: Machine, group: Group) -> Addresses:
        """The address of every lane of a group."""
        base = machine.value(self.slot, group).astype(np.int64)
        if self.offset:
            base = base + self.offset
            if self.width == 32:
                base &= 0xFFFFFFFF
        return base


def pointer(operand: Operand, slots: Slots, instruction: Instruction) -> Pointer:
    """An address operand, from [register + offset], [variable + offset] or [number]."""
    if not isinstance(operand, Address) or operand.coordinates:
        raise unknown(instruction, f"address {operand}")
    match operand.base:
        case Reg():
            slot = slots.register(operand.base, instruction)
        case Symbol(name=name):
            place = slots.address_of(name)
            if place is None:
                raise unknown(instruction, f"variable {name}")
            slot = slots.constant(place, 64)
        case None:
            return Pointer(slot=slots.constant(operand.offset, 64), offset=0, width=64)
    return Pointer(slot=slot, offset=operand.offset, width=slots.width(slot))


def items(operand: Operand) -> tuple[Operand, ...]:
    """The operands in braces, or the one without them."""
    return operand.items if isinstance(operand, Vector) else (operand,)


def integer(operand: Operand, instruction: Instruction) -> int:
    """The value of an operand that must be a constant."""
    if not isinstance(operand, Imm) or operand.float_bits:
        raise unknown(instruction, f"operand {operand}, where a constant is needed,")
    return operand.value
