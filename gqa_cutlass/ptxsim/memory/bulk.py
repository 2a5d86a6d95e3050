"""cp.async.bulk, not its tensor forms (PTX ISA 9.7.9.25.4).

Copies into shared memory complete on an mbarrier; copies out of it are done when they are issued.
Prefetches to L2 copy nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gqa_cutlass.ptxsim.memory.access import note_global
from gqa_cutlass.ptxsim.memory.landing import (
    BARRIER_BYTES,
    COMPLETES,
    aligned,
    check_global,
    keys,
    land,
    read_global,
)
from gqa_cutlass.ptxsim.memory.spaces import AccessError
from gqa_cutlass.ptxsim.operands import arity, pointer
from gqa_cutlass.ptxsim.order.mbarrier import Ints, Key
from gqa_cutlass.ptxsim.program import Action, Slots, unknown
from gqa_cutlass.ptxsim.text.syntax import Instruction

if TYPE_CHECKING:
    from gqa_cutlass.ptxsim.group import Group
    from gqa_cutlass.ptxsim.machine import Machine

_UNIT = 16  # bytes
_PIECE = 1 << 20  # of a prefetch, looked at together


def build_bulk(instruction: Instruction, slots: Slots) -> Action:
    """`cp.async.bulk`, not its tensor forms."""
    words = list(instruction.opcode[3:])
    if words in (["commit_group"], ["wait_group"], ["wait_group", "read"]):
        arity(instruction, 0 if words == ["commit_group"] else 1)
        return Action(step=lambda machine, group: None)
    hint = "L2::cache_hint" in words
    words = [w for w in words if w != "L2::cache_hint"]
    if words == ["global", "shared::cta", "bulk_group"]:
        return _build_copy_out(instruction, slots)
    to, source, *rest = words
    inward = source == "global" and to in ("shared::cluster", "shared::cta")
    across = source == "shared::cta" and to == "shared::cluster"
    if not (inward or across) or rest != [COMPLETES]:
        raise unknown(instruction)
    arity(instruction, 4 + hint)
    target, origin, barrier = (
        pointer(instruction.operands[i], slots, instruction) for i in (0, 1, 3)
    )
    size = slots.source(instruction.operands[2], 32, instruction)

    def step(machine: Machine, group: Group) -> None:
        sizes = machine.value(size, group).tolist()
        origins = origin.addresses(machine, group).tolist()
        own = keys(machine, group, origin, "shared") if across else []
        for i, (goal, key) in enumerate(
            zip(keys(machine, group, target), keys(machine, group, barrier), strict=True)
        ):
            lane = int(group.lanes[i])
            aligned(machine, lane, key, BARRIER_BYTES, "mbarrier")
            units = _units(machine, lane, sizes[i])
            if across:
                data = _read_shared(machine, lane, own[i], units)
            else:
                data = read_global(machine, lane, origins[i] + units, _UNIT).view(np.uint64)
            where = goal[1] + units
            source = machine.clocks.release_own(lane)
            land(machine, np.full(len(where), lane), goal[0], where, data, key, source)

    return Action(step=step, shared_width=_UNIT)


def build_bulk_prefetch(instruction: Instruction, slots: Slots) -> Action:
    """`cp.async.bulk.prefetch`: no effect, but what it asks for must be there."""
    words = list(instruction.opcode[4:])
    hint = words[-1] == "L2::cache_hint"
    if words[: len(words) - hint] != ["L2", "global"]:
        raise unknown(instruction)
    arity(instruction, 2 + hint)
    origin = pointer(instruction.operands[0], slots, instruction)
    size = slots.source(instruction.operands[1], 32, instruction)

    def step(machine: Machine, group: Group) -> None:
        sizes = machine.value(size, group).tolist()
        origins = origin.addresses(machine, group).tolist()
        for i, lane in enumerate(group.lanes.tolist()):
            _check_size(machine, lane, sizes[i])
            for start in range(0, sizes[i], _PIECE):
                units = np.arange(start, min(start + _PIECE, sizes[i]), _UNIT)
                check_global(machine, lane, origins[i] + units, _UNIT)

    return Action(step=step)


def _build_copy_out(instruction: Instruction, slots: Slots) -> Action:
    arity(instruction, 3 + ("L2::cache_hint" in instruction.opcode))
    target, origin = (pointer(o, slots, instruction) for o in instruction.operands[:2])
    size = slots.source(instruction.operands[2], 32, instruction)

    def step(machine: Machine, group: Group) -> None:
        sizes = machine.value(size, group).tolist()
        goals = target.addresses(machine, group).tolist()
        for i, own in enumerate(keys(machine, group, origin, "shared")):
            _copy_out(machine, int(group.lanes[i]), own, goals[i], sizes[i])

    return Action(step=step, shared_width=_UNIT)


def _copy_out(machine: Machine, lane: int, source: Key, target: int, size: int) -> None:
    """Copy from shared to global memory."""
    units = _units(machine, lane, size)
    data = _read_shared(machine, lane, source, units)
    where = target + units
    lanes = np.full(len(where), lane)
    machine.progress.changes += 1
    note_global(machine, lanes, where, _UNIT, write=True, strong=False)
    try:
        machine.context.memory.store(where, data)
    except AccessError as error:
        raise machine.memory_fault(error, lanes, "global") from None


def _read_shared(machine: Machine, lane: int, source: Key, units: Ints) -> NDArray[Any]:
    addresses = source[1] + units
    lanes = np.full(len(addresses), lane)
    try:
        at = machine.shared.index(np.full(len(addresses), source[0]), addresses, _UNIT)
    except AccessError as error:
        raise machine.memory_fault(error, lanes, "shared") from None
    machine.shadowed(machine.shadow.read, lanes, at, addresses, _UNIT)
    return machine.shared.load(at, 64, 2)


def _units(machine: Machine, lane: int, size: int) -> Ints:
    """Where the units of a copy from or to shared memory start, from its first byte."""
    _check_size(machine, lane, size)
    if size > machine.shared.size:
        raise machine.fault(
            f"cp.async.bulk: {size} bytes; allowed: up to the {machine.shared.size} bytes of a "
            "block's shared memory",
            lane,
        )
    return np.arange(0, size, _UNIT)


def _check_size(machine: Machine, lane: int, size: int) -> None:
    if size == 0 or size % _UNIT:
        raise machine.fault(
            f"cp.async.bulk: {size} bytes; allowed: positive multiples of {_UNIT}", lane
        )
