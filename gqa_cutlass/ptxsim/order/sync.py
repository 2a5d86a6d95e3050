"""Barriers of warps, blocks and clusters, and fences (PTX ISA 9.7.13)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gqa_cutlass.ptxsim.memory.access import SCOPES
from gqa_cutlass.ptxsim.operands import arity
from gqa_cutlass.ptxsim.order.clocks import WARP, Vector, by_warp
from gqa_cutlass.ptxsim.program import Action, Members, Slots, unknown
from gqa_cutlass.ptxsim.text.syntax import Instruction

if TYPE_CHECKING:
    from gqa_cutlass.ptxsim.group import Group
    from gqa_cutlass.ptxsim.machine import Machine

Key = tuple[int, int]  # block of the machine, number of the barrier
_MAX_BARRIER = 15
_BARRIER = 512  # times what an access takes
_LEVELS = {"cta": "cta", "gl": "gpu", "gpu": "gpu", "sys": "sys"}  # of membar
_FENCES = ((), ("sc",), ("acq_rel",), ("acquire",), ("release",))
_PROXIES = ("alias", "async")
_PROXY_SPACES = ("global", "shared::cta", "shared::cluster")


@dataclass(kw_only=True)
class _Waiting:
    """Lanes of one warp that wait, and where they go on."""

    lanes: NDArray[np.int64]
    pc: int


class Barriers:
    """Barriers of the blocks of one machine: bar.sync and bar.arrive."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._waiting: dict[Key, list[_Waiting]] = {}
        # Of barriers that somebody has come to: how many threads, how many are expected (0: all of
        # the block), and what was known to those that did not wait.
        self._count: dict[Key, int] = {}
        self._expected: dict[Key, int] = {}
        self._published: dict[Key, list[Vector]] = {}

    def sync(self, group: Group, number: NDArray[np.int64], expected: NDArray[np.int64]) -> None:
        """Lanes come to a barrier of their block, and wait; each by its number and its count."""
        for key, lanes in self._by_barrier(group, number, expected):
            self._waiting.setdefault(key, []).append(_Waiting(lanes=lanes, pc=self._machine.pc))
            self._complete(key)

    def arrive(self, group: Group, number: NDArray[np.int64], expected: NDArray[np.int64]) -> None:
        """Lanes come to a barrier, and go on."""
        self._machine.progress.changes += 1
        for key, lanes in self._by_barrier(group, number, expected):
            self._published.setdefault(key, []).extend(self._publish(lanes))
            self._complete(key)

    def _by_barrier(
        self, group: Group, number: NDArray[np.int64], expected: NDArray[np.int64]
    ) -> Iterator[tuple[Key, NDArray[np.int64]]]:
        """Arrivals, one after another: of the lanes of a warp, or of all that come to a barrier."""
        place = self._machine.block_of[group.lanes] * (_MAX_BARRIER + 1) + number
        places = np.unique(place).tolist()
        self._machine.progress.one_by_one(_BARRIER * len(places))
        for at in places:
            mine = place == at
            key = at // (_MAX_BARRIER + 1), at % (_MAX_BARRIER + 1)
            lanes, wanted = group.lanes[mine], expected[mine]
            if len(lanes) <= int(wanted.min()) or not wanted.any():
                self._enter(key, lanes, wanted)
                yield key, lanes
                continue
            for warp in np.unique(lanes // WARP):  # some may complete it before others come
                of_warp = lanes // WARP == warp
                self._enter(key, lanes[of_warp], wanted[of_warp])
                yield key, lanes[of_warp]

    def _enter(self, key: Key, lanes: NDArray[np.int64], wanted: NDArray[np.int64]) -> None:
        machine = self._machine
        everybody = machine.threads  # what no count means
        held = self._expected.setdefault(key, int(wanted[0])) or everybody
        other = np.where(wanted == 0, everybody, wanted) != held
        if other.any():
            raise machine.fault(
                f"barrier {key[1]}: arrivals for {held} and for {int(wanted[other][0])} threads",
                int(lanes[other.argmax()]),
            )
        self._count[key] = self._count.get(key, 0) + len(lanes)

    def _publish(self, lanes: NDArray[np.int64]) -> list[Vector]:
        return [self._machine.clocks.release(of_warp) for of_warp in by_warp(lanes)]

    def _needed(self, key: Key) -> int:
        expected = self._expected[key]
        if expected:
            return expected
        threads = self._machine.threads
        return int(np.count_nonzero(self._machine.live[key[0] * threads : (key[0] + 1) * threads]))

    def _complete(self, key: Key) -> None:
        """Let everybody go if nobody is missing."""
        machine, needed = self._machine, self._needed(key)
        count = self._count[key]
        waiting = self._waiting.get(key, [])
        if count > needed:
            lane = int(waiting[0].lanes[0]) if waiting else key[0] * machine.threads
            raise machine.fault(
                f"barrier {key[1]}: {count} threads came, {needed} were expected", lane
            )
        if count < needed:
            return
        exited = machine.threads - needed
        if not self._expected[key] and exited:
            raise machine.fault(
                f"unbalanced barrier {key[1]}: {exited} threads of the block have exited without "
                "coming to it",
                int(waiting[0].lanes[0]),
                pc=waiting[0].pc,
            )
        published = self._published.pop(key, [])
        for table in (self._waiting, self._count, self._expected):
            table.pop(key, None)
        self._meet([w.lanes for w in waiting], published)
        for w in waiting:
            machine.resume(machine.mask_of(w.lanes), w.pc + 1)

    def _meet(self, waiting: list[NDArray[np.int64]], published: list[Vector]) -> None:
        """Everybody who waited knows what everybody did."""
        clocks = self._machine.clocks
        if not waiting:
            return
        lanes = np.concatenate(waiting)
        warps = np.unique(lanes // WARP)
        clocks.barrier(warps[None, :])
        for vector in published:
            for warp in warps:
                clocks.acquire(warp * WARP + np.arange(WARP), vector)

    def recheck(self) -> None:
        """Lanes have exited: somebody may have waited for them alone."""
        for key in list(self._count):
            if not self._expected[key] and self._waiting.get(key):
                self._complete(key)

    def waiting(self) -> list[tuple[int, NDArray[np.int64], str]]:
        """Who waits where, for reports."""
        return [
            (entry.pc, entry.lanes, f"barrier {number}")
            for (_, number), entries in self._waiting.items()
            for entry in entries
        ]


def build_bar(instruction: Instruction, slots: Slots) -> Action:
    """`bar{.cta}` and `barrier{.cta}`: sync and arrive; `bar.warp.sync`."""
    words = [w for w in instruction.opcode[1:] if w not in ("cta", "aligned")]
    if words == ["warp", "sync"]:
        arity(instruction, 1)
        mask = slots.source(instruction.operands[0], 32, instruction)
        return Action(step=_warp_sync, members=Members(mask=mask))
    if words not in (["sync"], ["arrive"]):
        raise unknown(instruction)
    arity(instruction, 1, 2)
    number = slots.source(instruction.operands[0], 32, instruction)
    given = instruction.operands[1] if len(instruction.operands) > 1 else None
    count = slots.constant(0, 32) if given is None else slots.source(given, 32, instruction)
    waits = words == ["sync"]
    if given is None and not waits:
        raise unknown(instruction, "form without a count")
    counted = given is not None

    def step(machine: Machine, group: Group) -> Group | None:
        numbers = machine.value(number, group).astype(np.int64)
        expected = machine.value(count, group).astype(np.int64)
        wrong = (numbers > _MAX_BARRIER) | (expected % WARP != 0) | (expected > machine.threads)
        wrong |= (expected == 0) & counted
        if wrong.any():
            i = int(wrong.argmax())
            raise machine.fault(
                f"barrier {int(numbers[i])} for {int(expected[i])} threads; allowed: barriers 0 to "
                f"{_MAX_BARRIER}, multiples of {WARP} threads up to {machine.threads}",
                int(group.lanes[i]),
            )
        if waits:
            machine.barriers.sync(group, numbers, expected)
            return None
        machine.barriers.arrive(group, numbers, expected)
        return group

    return Action(step=step, ends=waits, members=Members())


def _warp_sync(machine: Machine, group: Group) -> None:
    """Only complete warps gain knowledge of one another; a part of a warp gains none."""
    per_warp = group.mask.reshape(-1, WARP) | ~machine.live.reshape(-1, WARP)
    machine.clocks.warp_sync(
        np.flatnonzero(per_warp.all(axis=1) & group.mask.reshape(-1, WARP).any(axis=1))
    )


def build_fence(instruction: Instruction, slots: Slots) -> Action:
    """`fence` and `membar`. Proxy fences order what this simulator runs in order anyway."""
    words = instruction.opcode[1:]
    arity(instruction, 0)
    if words[:1] == ("proxy",):
        if words[1] not in _PROXIES or any(word not in _PROXY_SPACES for word in words[2:]):
            raise unknown(instruction)
        return Action(step=lambda machine, group: None)
    if words == ("mbarrier_init", "release", "cluster"):
        return Action(step=lambda machine, group: machine.atomics.fence_inits(group))
    *order, scope = words
    if instruction.opcode[0] == "membar" and not order and scope in _LEVELS:
        scope = _LEVELS[scope]
    elif instruction.opcode[0] != "fence" or tuple(order) not in _FENCES or scope not in SCOPES:
        raise unknown(instruction)
    scope = SCOPES[scope]
    return Action(step=lambda machine, group: machine.atomics.fence(group, scope))
