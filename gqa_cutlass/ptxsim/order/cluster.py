"""Blocks of a cluster: addresses in one another's shared memory, and their common barrier."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gqa_cutlass.ptxsim.memory.spaces import CLUSTER_SHIFT, SHARED_WINDOW, WINDOW_BYTES
from gqa_cutlass.ptxsim.operands import arity
from gqa_cutlass.ptxsim.order.clocks import WARP, Vector, by_warp
from gqa_cutlass.ptxsim.order.shadow import ShadowError
from gqa_cutlass.ptxsim.program import Action, Members, Slots, unknown
from gqa_cutlass.ptxsim.text.syntax import Instruction

if TYPE_CHECKING:
    from gqa_cutlass.ptxsim.group import Group
    from gqa_cutlass.ptxsim.machine import Machine

Mask = NDArray[np.bool_]


class ClusterBarriers:
    """`barrier.cluster` of every cluster of one machine."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._lanes = machine.threads * machine.context.launch.cluster_size
        clusters = machine.num_lanes // self._lanes
        self._phase = np.zeros(clusters, dtype=np.int64)
        self._arrivals = np.zeros(machine.num_lanes, dtype=np.int64)  # of every lane so far
        self._waits = np.zeros(machine.num_lanes, dtype=np.int64)
        self._vectors: list[list[Vector]] = [[] for _ in range(clusters)]
        self._passed: list[Vector | None] = [None] * clusters
        self._waiting: list[tuple[int, NDArray[np.int64]]] = []  # pc and lanes

    def arrive(self, group: Group, release: bool) -> None:
        """Lanes arrive and go on."""
        machine = self._machine
        machine.progress.changes += 1
        clusters = group.lanes // self._lanes
        again = self._arrivals[group.lanes] > self._waits[group.lanes]
        if again.any():
            raise machine.fault(
                "barrier.cluster: a thread arrives twice without having waited",
                int(group.lanes[again.argmax()]),
            )
        self._arrivals[group.lanes] += 1
        for lanes in by_warp(group.lanes):
            vectors = self._vectors[int(lanes[0]) // self._lanes]
            if release:
                vectors.append(machine.clocks.release(lanes))
            else:
                found = (machine.atomics.fenced(lane, "cluster") for lane in lanes.tolist())
                vectors.extend(vector for vector in found if vector is not None)
        for cluster in np.unique(clusters):
            self._complete(int(cluster))

    def _complete(self, cluster: int) -> None:
        machine = self._machine
        lanes = slice(cluster * self._lanes, (cluster + 1) * self._lanes)
        missing = machine.live[lanes] & (self._arrivals[lanes] <= self._phase[cluster])
        if missing.any():
            return
        self._phase[cluster] += 1
        vectors = self._vectors[cluster]
        self._passed[cluster] = np.maximum.reduce(vectors) if vectors else None
        self._vectors[cluster] = []
        waiting, self._waiting = self._waiting, []
        for pc, held in waiting:
            mine = held // self._lanes == cluster
            if mine.any():
                machine.resume(machine.mask_of(held[mine]), pc)
            if not mine.all():
                self._waiting.append((pc, held[~mine]))

    def wait(self, group: Group, acquire: bool) -> Mask:
        """Which lanes of a group need not wait; the others are held at this instruction."""
        machine = self._machine
        clusters = group.lanes // self._lanes
        never = self._arrivals[group.lanes] == self._waits[group.lanes]
        if never.any():
            raise machine.fault(
                "barrier.cluster.wait without an arrival", int(group.lanes[never.argmax()])
            )
        done = self._arrivals[group.lanes] == self._phase[clusters]
        if not done.all():
            self._waiting.append((machine.pc, group.lanes[~done]))
        going = machine.mask_of(group.lanes[done])
        self._waits[group.lanes[done]] += 1
        for lanes in by_warp(group.lanes[done]):
            passed = self._passed[int(lanes[0]) // self._lanes]
            if passed is not None and acquire:
                machine.clocks.acquire(lanes, passed)
            elif passed is not None:
                machine.atomics.observe(lanes, passed, "cluster")
        return going

    def leave(self, group: Group) -> None:
        """Lanes have exited, and with them perhaps the last ones of a block."""
        machine = self._machine
        if machine.context.launch.cluster_size == 1 and not machine.mbarriers.had_copies:
            return
        for block in np.unique(machine.block_of[group.lanes]).tolist():
            first = block * machine.threads
            if not machine.live[first : first + machine.threads].any():
                self._leave(block, first)

    def _leave(self, block: int, first: int) -> None:
        """A block has exited: others, and copies, must be done with its shared memory."""
        machine, shared, granule = self._machine, self._machine.shared, self._machine.shadow.granule
        start = block * shared.pitch
        granules = (start + shared.base) // granule + np.arange(shared.size // granule)
        if machine.context.launch.cluster_size == 1:  # then its own threads are done, and know it
            granules = machine.mbarriers.filled(granules)
        if not len(granules):
            return
        warps = np.arange(first, first + machine.threads, WARP) // WARP
        machine.clocks.barrier(warps[None, :])
        try:
            machine.shadow.leave(first, granules)
        except ShadowError as error:
            addresses = granules * granule - start
            raise machine.shadow_fault(error, np.full_like(granules, first), addresses) from None

    def recheck(self) -> None:
        """Lanes have exited: an arrival of theirs is no longer needed."""
        for cluster in range(len(self._phase)):
            lanes = slice(cluster * self._lanes, (cluster + 1) * self._lanes)
            if (self._arrivals[lanes] > self._phase[cluster]).any():
                self._complete(cluster)

    def waiting(self) -> list[tuple[int, NDArray[np.int64], str]]:
        """Who waits where, for reports."""
        return [(pc, lanes, "the barrier of the cluster") for pc, lanes in self._waiting]


def build_cluster_barrier(instruction: Instruction, slots: Slots) -> Action:
    """`barrier.cluster.arrive` and `.wait`."""
    arity(instruction, 0)
    verb, *rest = (w for w in instruction.opcode[2:] if w != "aligned")
    members = Members() if "aligned" in instruction.opcode else None
    if verb == "arrive" and rest in ([], ["release"], ["relaxed"]):
        release = rest != ["relaxed"]
        return Action(
            step=lambda machine, group: machine.cluster_barriers.arrive(group, release),
            members=members,
        )
    if verb == "wait" and rest in ([], ["acquire"], ["relaxed"]):
        return Action(step=_wait(rest != ["relaxed"]), ends=True, members=members)
    raise unknown(instruction)


def _wait(acquire: bool) -> Callable[[Machine, Group], Group]:
    def step(machine: Machine, group: Group) -> Group:
        return machine.group(machine.cluster_barriers.wait(group, acquire))

    return step


def _where(instruction: Instruction) -> tuple[str, str]:
    """Space and type of `mapa` and `getctarank`."""
    *space, kind = instruction.opcode[1:]
    return ".".join(space) or "generic", kind


def build_mapa(instruction: Instruction, slots: Slots) -> Action:
    """`mapa`: the address of a variable in the shared memory of a block of the cluster."""
    space, kind = _where(instruction)
    if space not in ("generic", "shared::cluster") or kind not in ("u32", "u64"):
        raise unknown(instruction)
    arity(instruction, 3)
    width = int(kind[1:])
    if space == "generic" and width == 32:
        raise unknown(instruction, "address of 32 bits")
    target = slots.destination(instruction.operands[0], width, instruction)
    where = slots.source(instruction.operands[1], width, instruction)
    rank = slots.source(instruction.operands[2], 32, instruction)
    window = SHARED_WINDOW if space == "generic" else 0

    def step(machine: Machine, group: Group) -> None:
        ranks = machine.value(rank, group).astype(np.int64)
        size = machine.context.launch.cluster_size
        if (ranks >= size).any():
            raise machine.fault(
                f"mapa: block {int(ranks.max())} of a cluster of {size}",
                int(group.lanes[(ranks >= size).argmax()]),
            )
        given = machine.value(where, group).astype(np.int64)
        outside = given & -WINDOW_BYTES != window
        if outside.any():
            i = int(outside.argmax())
            raise machine.fault(
                "mapa: address outside shared memory", int(group.lanes[i]), int(given[i])
            )
        local = given & (1 << CLUSTER_SHIFT) - 1
        mapped = window + ((ranks + 1) << CLUSTER_SHIFT) + local
        dtype = np.uint32 if width == 32 else np.uint64
        machine.assign_lanes(target, mapped.astype(dtype), group)

    return Action(step=step)


def build_getctarank(instruction: Instruction, slots: Slots) -> Action:
    """`getctarank`: the block whose shared memory an address lies in."""
    space, kind = _where(instruction)
    if space not in ("generic", "shared::cluster") or kind not in ("u32", "u64"):
        raise unknown(instruction)
    arity(instruction, 2)
    width = int(kind[1:])
    target = slots.destination(instruction.operands[0], 32, instruction)
    where = slots.source(instruction.operands[1], width, instruction)

    def step(machine: Machine, group: Group) -> None:
        addresses = machine.value(where, group).astype(np.int64) & WINDOW_BYTES - 1
        rank = addresses >> CLUSTER_SHIFT
        own = machine.block_of[group.lanes] % machine.context.launch.cluster_size
        value = np.where(rank > 0, rank - 1, own).astype(np.uint32)
        machine.assign_lanes(target, value, group)

    return Action(step=step)
