"""Operands of an instruction as slots of the register file, and as values in memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gqa_cutlass.ptxsim.program import Slots, unknown
from gqa_cutlass.ptxsim.text.syntax import Address, Imm, Instruction, Operand, Reg, Symbol, Vector

if TYPE_CHECKING:
    from gqa_cutlass.ptxsim.group import Group
    from gqa_cutlass.ptxsim.machine import Machine

Addresses = NDArray[np.int64]
_CONSTANTS = 1 << 31
_WIDTHS = (32, 64)  # bits of an address


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
        base = machine.value(self.slot, group).astype(np.int64)  # those from 2^63 are negative
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
    if slots.width(slot) not in _WIDTHS:
        raise unknown(instruction, f"address of {slots.width(slot)} bits")
    return Pointer(slot=slot, offset=operand.offset, width=slots.width(slot))


def items(operand: Operand) -> tuple[Operand, ...]:
    """The operands in braces, or the one without them."""
    return operand.items if isinstance(operand, Vector) else (operand,)


def integer(operand: Operand, instruction: Instruction) -> int:
    """The value of an operand that must be a constant, not negative."""
    if not isinstance(operand, Imm) or operand.float_bits or not 0 <= operand.value < _CONSTANTS:
        raise unknown(instruction, f"operand {operand}, where a constant is needed,")
    return operand.value


def arity(instruction: Instruction, *allowed: int) -> None:
    """Refuse another number of operands.

    Raises:
        PtxError: It is none of those allowed.
    """
    if len(instruction.operands) not in allowed:
        raise unknown(instruction, f"number of operands, {len(instruction.operands)},")
