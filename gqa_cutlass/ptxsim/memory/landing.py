"""Writes into shared memory that complete on an mbarrier, whatever starts them.

The bytes are there at once, but under way until the mbarrier's phase completes; then they are
known to who waits for the phase, not to who started them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gqa_cutlass.ptxsim.memory.access import note_global
from gqa_cutlass.ptxsim.memory.spaces import SHARED_WINDOW, WINDOW_BYTES, AccessError
from gqa_cutlass.ptxsim.operands import Pointer
from gqa_cutlass.ptxsim.order.clocks import Vector
from gqa_cutlass.ptxsim.order.mbarrier import Ints, Key

if TYPE_CHECKING:
    from gqa_cutlass.ptxsim.group import Group
    from gqa_cutlass.ptxsim.machine import Machine

COMPLETES = "mbarrier::complete_tx::bytes"
BARRIER_BYTES = 8
_COPY = 16  # times what an access takes


def keys(machine: Machine, group: Group, place: Pointer, space: str = "cluster") -> list[Key]:
    """Block and address of every lane's pointer into shared memory.

    Args:
        machine: Whose.
        group: The lanes.
        place: The operand.
        space: "shared": of the block; "cluster": of a block of the cluster; "generic".
    """
    addresses = place.addresses(machine, group)
    machine.progress.one_by_one(_COPY * len(group))
    window = addresses & -WINDOW_BYTES
    outside = window != SHARED_WINDOW
    if space != "generic":
        outside &= window != 0
    if outside.any():
        i = int(outside.argmax())
        raise machine.fault("address outside shared memory", int(group.lanes[i]), int(addresses[i]))
    where = "cluster" if space == "generic" else space
    try:
        blocks, local = machine.shared_places(group.lanes, addresses & WINDOW_BYTES - 1, where)
    except AccessError as error:
        raise machine.memory_fault(error, group.lanes, "shared") from None
    return list(zip(blocks.tolist(), local.tolist(), strict=True))


def read_global(
    machine: Machine, lane: int, where: Ints, size: int, *, overread: bool = False
) -> NDArray[np.uint8]:
    """What a copy of one lane reads in global memory: `size` bytes at every address, [n, size].

    Args:
        machine: Whose.
        lane: Who reads.
        where: [n].
        size: 1, 2, 4, 8 or 16.
        overread: Whether rows may be read that the launch writes, as tensor copies do.
    """
    lanes = np.full(len(where), lane)
    width = 8 * min(size, 8)
    try:
        data = machine.context.memory.load(where, width, 8 * size // width)
    except AccessError as error:
        raise machine.memory_fault(error, lanes, "global") from None
    note_global(machine, lanes, where, size, write=False, strong=False, overread=overread)
    return np.ascontiguousarray(data).view(np.uint8).reshape(len(where), size)


def check_global(machine: Machine, lane: int, where: Ints, size: int) -> None:
    """Refuse to prefetch what one lane may not read: `size` bytes at every address, [n].

    Nothing is read, so nothing can race.
    """
    try:
        machine.context.memory.check_read(where, size)
    except AccessError as error:
        raise machine.memory_fault(error, np.full(len(where), lane), "global") from None


def land(
    machine: Machine,
    lanes: Ints,
    block: int,
    addresses: Ints,
    data: NDArray[Any],
    barrier: Key,
    source: Vector | None = None,
) -> None:
    """Put data into shared memory, under way until the mbarrier's phase completes.

    Args:
        machine: Whose shared memory.
        lanes: [n], who wrote each unit.
        block: Where the data goes.
        addresses: [n], where in the block.
        data: [n] or [n, count].
        barrier: The mbarrier, of the same block.
        source: What publishes that the lanes have read the source.
    """
    unit = data[0].nbytes
    machine.progress.changes += 1
    if barrier[0] != block:
        raise machine.fault(
            "the mbarrier lies in another block than the data that completes on it",
            int(lanes[0]),
            barrier[1],
        )
    machine.mbarriers.known(barrier, lanes[:1], touched=False)
    try:
        at = machine.shared.index(np.full(len(addresses), block), addresses, unit)
    except AccessError as error:
        raise machine.memory_fault(error, lanes, "shared") from None
    machine.mbarriers.begin_copy(barrier, lanes, at, addresses, unit, source)
    machine.shared.store(at, data)
    machine.mbarriers.landed(barrier, int(lanes[0]), len(addresses) * unit)


def aligned(machine: Machine, lane: int, key: Key, size: int, what: str) -> None:
    """Refuse an address that is not a multiple of `size` bytes."""
    if key[1] % size:
        raise machine.fault(f"{what} not at a multiple of {size} bytes", lane, key[1])
