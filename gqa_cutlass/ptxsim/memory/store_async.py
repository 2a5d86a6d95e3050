"""st.async: stores into a block's shared memory that complete on an mbarrier (PTX ISA 9.7.9.12)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from gqa_cutlass.ptxsim.memory.access import resize
from gqa_cutlass.ptxsim.memory.landing import BARRIER_BYTES, COMPLETES, aligned, keys, land
from gqa_cutlass.ptxsim.operands import arity, items, pointer
from gqa_cutlass.ptxsim.order.mbarrier import Key
from gqa_cutlass.ptxsim.program import UNSIGNED, Action, Slots, unknown
from gqa_cutlass.ptxsim.text.syntax import Instruction

if TYPE_CHECKING:
    from gqa_cutlass.ptxsim.group import Group
    from gqa_cutlass.ptxsim.machine import Machine

_TYPES = {f"{kind}{bits}": bits for kind in "busf" for bits in (32, 64)}
_WIDEST = 128  # bits


def build_st_async(instruction: Instruction, slots: Slots) -> Action:
    """`st.async`, to shared memory."""
    words = [word for word in instruction.opcode[2:] if word != "weak"]
    space = "cluster" if words[0] == "shared::cluster" else "generic"
    completes, *vector, kind = words[space == "cluster" :]
    count = {(): 1, ("v2",): 2, ("v4",): 4}[tuple(vector)]
    width = _TYPES[kind]
    if completes != COMPLETES or count * width > _WIDEST:
        raise unknown(instruction)
    arity(instruction, 3)
    target = pointer(instruction.operands[0], slots, instruction)
    barrier = pointer(instruction.operands[2], slots, instruction)
    sources = [
        slots.source(s, width, instruction, wider=True) for s in items(instruction.operands[1])
    ]
    if len(sources) != count:
        raise unknown(instruction, f"{len(sources)} sources")

    def step(machine: Machine, group: Group) -> None:
        goals = keys(machine, group, target, space)
        values = [resize(machine.value(s, group), UNSIGNED[width], False) for s in sources]
        data = np.stack(values, axis=1) if count > 1 else values[0]
        together: dict[tuple[int, Key], list[int]] = {}
        for i, bar in enumerate(keys(machine, group, barrier, space)):
            aligned(machine, int(group.lanes[i]), bar, BARRIER_BYTES, "mbarrier")
            together.setdefault((goals[i][0], bar), []).append(i)
        for (block, bar), rows in together.items():
            addresses = np.array([goals[i][1] for i in rows])
            land(machine, group.lanes[rows], block, addresses, data[rows], bar)

    return Action(step=step, shared_width=count * width // 8)
