"""cp.async.bulk, not its tensor forms (PTX ISA 9.7.9.25.4).

Copies into shared memory complete on an mbarrier; copies out of it are done when they are issued.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gqa_cutlass.ptxsim.access import note_global
from gqa_cutlass.ptxsim.mbarrier import Ints, Key
from gqa_cutlass.ptxsim.memory import WINDOW_BYTES, AccessError
from gqa_cutlass.ptxsim.operands import Pointer, pointer
from gqa_cutlass.ptxsim.program import Action, Slots, unknown
from gqa_cutlass.ptxsim.syntax import Instruction

if TYPE_CHECKING:
    from gqa_cutlass.ptxsim.machine import Group, Machine

_UNIT = 16  # bytes


def build_bulk(instruction: Instruction, slots: Slots) -> Action:
    """`cp.async.bulk`, not its tensor forms."""
    words = list(instruction.opcode[3:])
    if words in (["commit_group"], ["wait_group"], ["wait_group", "read"]):
        return Action(step=lambda machine, group: None)
    hint = "L2::cache_hint" in words
    words = [w for w in words if w != "L2::cache_hint"]
    if words == ["global", "shared::cta", "bulk_group"]:
        return _build_copy_out(instruction, slots)
    to, source, *rest = words
    inward = source == "global" and to in ("shared::cluster", "shared::cta")
    across = source == "shared::cta" and to == "shared::cluster"
    if not (inward or across) or rest != ["mbarrier::complete_tx::bytes"]:
        raise unknown(instruction)
    if len(instruction.operands) != 4 + hint:
        raise unknown(instruction, "number of operands")
    target, origin, barrier = (
        pointer(instruction.operands[i], slots, instruction) for i in (0, 1, 3)
    )
    size = slots.source(instruction.operands[2], 32, instruction)

    def step(machine: Machine, group: Group) -> None:
        sizes = machine.value(size, group).tolist()
        origins = origin.addresses(machine, group).tolist()
        for i, (goal, key) in enumerate(
            zip(_keys(machine, group, target), _keys(machine, group, barrier), strict=True)
        ):
            lane = int(group.lanes[i])
            if inward:
                _copy_in(machine, lane, goal, origins[i], sizes[i], key)
            else:
                own = machine.block_of[lane].item(), origins[i] & WINDOW_BYTES - 1
                _copy_across(machine, lane, goal, own, sizes[i], key)

    return Action(step=step, shared_width=_UNIT)


def _build_copy_out(instruction: Instruction, slots: Slots) -> Action:
    target, origin = (pointer(o, slots, instruction) for o in instruction.operands[:2])
    size = slots.source(instruction.operands[2], 32, instruction)

    def step(machine: Machine, group: Group) -> None:
        sizes = machine.value(size, group).tolist()
        goals = target.addresses(machine, group).tolist()
        for i, own in enumerate(_keys(machine, group, origin)):
            _copy_out(machine, int(group.lanes[i]), own, goals[i], sizes[i])

    return Action(step=step, shared_width=_UNIT)


def _keys(machine: Machine, group: Group, place: Pointer) -> Iterator[Key]:
    """Block and address of every lane's pointer into the cluster's shared memory."""
    addresses = place.addresses(machine, group) & WINDOW_BYTES - 1
    try:
        blocks, local = machine.shared_places(group.lanes, addresses, "cluster")
    except AccessError as error:
        raise machine.memory_fault(error, group.lanes, "shared") from None
    yield from zip(blocks.tolist(), local.tolist(), strict=True)


def _copy_in(machine: Machine, lane: int, target: Key, source: int, size: int, key: Key) -> None:
    """Copy `size` bytes of global memory, to complete on an mbarrier."""
    machine.mbarriers.known(key, np.array([lane]))
    _land(machine, lane, target, _read_global(machine, lane, source, size), size, key)


def _copy_across(
    machine: Machine, lane: int, target: Key, source: Key, size: int, key: Key
) -> None:
    """Copy from the block's shared memory to that of a block of its cluster."""
    machine.mbarriers.known(key, np.array([lane]))
    _land(machine, lane, target, _read_shared(machine, lane, source, size), size, key)


def _copy_out(machine: Machine, lane: int, source: Key, target: int, size: int) -> None:
    """Copy from shared to global memory."""
    data = _read_shared(machine, lane, source, size)
    where = target + np.arange(0, size, _UNIT)
    lanes = np.full(len(where), lane)
    note_global(machine, lanes, where, _UNIT, write=True, strong=False)
    try:
        machine.context.memory.store(where, data)
    except AccessError as error:
        raise machine.memory_fault(error, lanes, "global") from None


def _land(
    machine: Machine, lane: int, target: Key, data: NDArray[Any], size: int, key: Key
) -> None:
    """Put data into shared memory, under way until the mbarrier's phase completes."""
    at, addresses = _units(machine, lane, target, size)
    machine.mbarriers.begin_copy(key, lane, at, addresses, _UNIT)
    machine.shared.store(at, data)
    machine.mbarriers.landed(key, size)


def _read_global(machine: Machine, lane: int, source: int, size: int) -> NDArray[Any]:
    where = source + np.arange(0, size, _UNIT)
    lanes = np.full(len(where), lane)
    try:
        data = machine.context.memory.load(where, 64, 2)
    except AccessError as error:
        raise machine.memory_fault(error, lanes, "global") from None
    note_global(machine, lanes, where, _UNIT, write=False, strong=False)
    return data


def _read_shared(machine: Machine, lane: int, source: Key, size: int) -> NDArray[Any]:
    at, addresses = _units(machine, lane, source, size)
    machine.shadowed(machine.shadow.read, np.full(len(at), lane), at, addresses, _UNIT)
    return machine.shared.load(at, 64, 2)


def _units(machine: Machine, lane: int, target: Key, size: int) -> tuple[Ints, Ints]:
    """Where the units of a copy lie: positions in shared memory, and addresses in the block."""
    if size <= 0 or size % _UNIT:
        raise machine.fault(
            f"cp.async.bulk: {size} bytes; allowed: positive multiples of {_UNIT}", lane
        )
    addresses = target[1] + np.arange(0, size, _UNIT)
    try:
        blocks = np.full(len(addresses), target[0])
        return machine.shared.index(blocks, addresses, _UNIT), addresses
    except AccessError as error:
        raise machine.memory_fault(error, np.full(len(addresses), lane), "shared") from None
