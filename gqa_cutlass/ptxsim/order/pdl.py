"""Programmatic dependent launch: griddepcontrol (PTX ISA 9.7.13.13).

A kernel may start before the one before it in the stream is done. Here that one always is, so what
would go wrong must be told from the order of the instructions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gqa_cutlass.ptxsim.operands import arity
from gqa_cutlass.ptxsim.program import Action, Slots, unknown
from gqa_cutlass.ptxsim.text.syntax import Instruction

if TYPE_CHECKING:
    from gqa_cutlass.ptxsim.group import Group
    from gqa_cutlass.ptxsim.machine import Machine

WAIT = ("griddepcontrol", "wait")


class Predecessor:
    """The kernel before this one, and which lanes of one machine have not waited for it.

    Args:
        machine: Whose lanes.
        awaited: Whether the program waits at all; if not, it starts when that kernel is done.
    """

    def __init__(self, machine: Machine, awaited: bool) -> None:
        self._machine = machine
        self._early: NDArray[np.bool_] | None = machine.live.copy() if awaited else None

    def wait(self, group: Group) -> None:
        """Lanes have waited."""
        if self._early is not None:
            self._early &= ~group.mask
            if not (self._early & self._machine.live).any():
                self._early = None

    def check(self, lanes: NDArray[np.int64], addresses: NDArray[np.int64], write: bool) -> None:
        """Refuse accesses to global memory by lanes that have not waited.

        Raises:
            KernelFault: There is one.
        """
        if self._early is None:
            return
        early = self._early[lanes]
        if early.any():
            position = int(early.argmax())
            address = int(addresses[position])
            raise self._machine.fault(
                f"global memory is {'written' if write else 'read'} before griddepcontrol.wait: "
                "the kernel before this one may not be done; "
                f"{self._machine.context.memory.locate(address)}",
                int(lanes[position]),
                address,
            )


def build_griddepcontrol(instruction: Instruction, slots: Slots) -> Action:
    """`griddepcontrol`: `wait`, and `launch_dependents`, which nobody here sees."""
    arity(instruction, 0)
    if instruction.opcode == WAIT:
        return Action(step=lambda machine, group: machine.predecessor.wait(group))
    if instruction.opcode != ("griddepcontrol", "launch_dependents"):
        raise unknown(instruction)
    return Action(step=lambda machine, group: None)
