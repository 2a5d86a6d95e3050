"""mbarrier objects (PTX ISA 9.7.13.15)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gqa_cutlass.ptxsim.memory.spaces import SHARED_WINDOW, WINDOW_BYTES, AccessError
from gqa_cutlass.ptxsim.operands import Pointer, arity, pointer
from gqa_cutlass.ptxsim.order.clocks import Vector, by_warp, joined
from gqa_cutlass.ptxsim.program import Action, Slots, unknown
from gqa_cutlass.ptxsim.text.syntax import Instruction

if TYPE_CHECKING:
    from gqa_cutlass.ptxsim.group import Group
    from gqa_cutlass.ptxsim.machine import Machine

Ints = NDArray[np.int64]
_BYTES = 8
_MAX_COUNT = (1 << 20) - 1
Key = tuple[int, int]  # block of the machine, address in its shared memory


@dataclass(kw_only=True)
class _Object:
    """One mbarrier, and the agent (see `Clocks`) whose writes the copies become."""

    agent: int
    count: int
    pending: int
    bytes: int = 0  # still to come in this phase
    phase: int = 0
    arrived: Vector | None = None  # what arrivals of this phase published
    passed: Vector | None = None  # what those of completed phases did
    copies: list[Ints] = field(default_factory=list)  # granules [n, k] of those under way
    sources: Vector | None = None  # what publishes that their sources have been read


@dataclass(kw_only=True)
class _Waiter:
    """Lanes at a try_wait whose phase has not completed."""

    pc: int
    lanes: Ints
    key: Key


class MBarriers:
    """The mbarriers of one machine, and the copies that complete on them."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._objects: dict[Key, _Object] = {}
        self._waiters: list[_Waiter] = []
        self._agents: dict[Key, int] = {}  # also of mbarriers that are no more
        self._made = np.zeros(machine.num_blocks, dtype=np.int64)  # agents of every block
        self._epochs: dict[tuple[int, int], int] = {}  # by cluster and agent
        self._filled: NDArray[np.bool_] | None = None  # granules that copies ever wrote to
        self.inits: dict[int, Vector] = {}  # by lane, what publishes its mbarrier.init

    def locate(self, group: Group, place: Pointer, space: str) -> list[tuple[Key, Ints]]:
        """Lanes of a group by the mbarrier that they name, which must be whole."""
        machine = self._machine
        machine.progress.one_by_one(len(group))
        addresses = place.addresses(machine, group)
        window = addresses & -WINDOW_BYTES
        outside = window != SHARED_WINDOW
        if space != "generic":
            outside &= window != 0
        if outside.any():
            i = int(outside.argmax())
            raise machine.fault(
                "mbarrier outside shared memory", int(group.lanes[i]), int(addresses[i])
            )
        addresses = addresses & WINDOW_BYTES - 1
        try:
            where = "cluster" if space == "generic" else space
            blocks, local = machine.shared_places(group.lanes, addresses, where)
            machine.shared.index(blocks, local, _BYTES)
        except AccessError as error:
            raise machine.memory_fault(error, group.lanes, "shared") from None
        found: dict[Key, list[int]] = {}
        for lane, block, at in zip(
            group.lanes.tolist(), blocks.tolist(), local.tolist(), strict=True
        ):
            found.setdefault((block, at), []).append(lane)
        return [(key, np.array(lanes)) for key, lanes in found.items()]

    def init(self, key: Key, lanes: Ints, count: int) -> None:
        """`mbarrier.init`."""
        machine = self._machine
        machine.progress.changes += 1
        if not 0 < count <= _MAX_COUNT:
            raise machine.fault(
                f"mbarrier.init: count {count}; allowed: 1 to {_MAX_COUNT}", int(lanes[0])
            )
        if key in self._objects:
            raise machine.fault(
                "mbarrier.init of an mbarrier that is in use, without mbarrier.inval",
                int(lanes[0]),
                key[1],
            )
        if len(lanes) > 1:
            raise machine.fault("mbarrier.init by several threads", int(lanes[1]), key[1])
        self._shadow(machine.shadow.write, key, lanes)
        self._objects[key] = _Object(agent=self._agent(key), count=count, pending=count)
        self.inits[int(lanes[0])] = machine.clocks.release_own(int(lanes[0]))

    def _agent(self, key: Key) -> int:
        """The agent of an mbarrier: its own, unless a block has very many."""
        if key not in self._agents:
            rank = key[0] % self._machine.context.launch.cluster_size
            number = int(self._made[key[0]])
            self._agents[key] = self._machine.clocks.column_of_agent(rank, number)
            self._made[key[0]] += 1
        return self._agents[key]

    def invalidate(self, key: Key, lanes: Ints) -> None:
        """`mbarrier.inval`."""
        self._machine.progress.changes += 1
        copying = bool(self.known(key, lanes).copies)
        if copying or any(w.key == key for w in self._waiters):
            why = "asynchronous copies are under way" if copying else "threads wait for it"
            raise self._machine.fault(f"mbarrier.inval while {why}", int(lanes[0]), key[1])
        del self._objects[key]

    def known(self, key: Key, lanes: Ints, touched: bool = True) -> _Object:
        """An mbarrier that these lanes may use: initialised, and they know it.

        Args:
            key: Which.
            lanes: Whose instruction it is.
            touched: Whether they change it themselves; what completes on it later does not.
        """
        found = self._objects.get(key)
        if found is None:
            raise self._machine.fault("mbarrier that was not initialised", int(lanes[0]), key[1])
        shadow = self._machine.shadow
        self._shadow(shadow.read_strong if touched else shadow.check, key, lanes)
        return found

    def _shadow(self, note: Callable[[Ints, Ints, int], None], key: Key, lanes: Ints) -> None:
        machine = self._machine
        at = np.full(len(lanes), key[0] * machine.shared.pitch + key[1])
        machine.shadowed(note, lanes, at, np.full(len(lanes), key[1]), _BYTES)

    def expect(self, key: Key, lanes: Ints, amount: int, complete: bool = True) -> None:
        """More bytes will come in this phase (or, negative, have come)."""
        barrier = self.known(key, lanes)
        self._count_bytes(key, barrier, int(lanes[0]), amount)
        if complete:
            self._complete(key, barrier)

    def _count_bytes(self, key: Key, barrier: _Object, lane: int, amount: int) -> None:
        self._machine.progress.changes += 1
        barrier.bytes += amount
        if abs(barrier.bytes) > _MAX_COUNT:
            raise self._machine.fault(
                f"mbarrier: {barrier.bytes} bytes to come; allowed: up to {_MAX_COUNT}",
                lane,
                key[1],
            )

    def arrive(self, key: Key, lanes: Ints, count: int, release: bool, drop: bool) -> int:
        """Every lane arrives `count` times; returns the phase that it arrived in."""
        barrier = self.known(key, lanes)
        self._machine.progress.changes += 1
        if not 0 < count <= _MAX_COUNT:
            raise self._machine.fault(
                f"mbarrier: {count} arrivals; allowed: 1 to {_MAX_COUNT}", int(lanes[0]), key[1]
            )
        phase = barrier.phase
        for of_warp in by_warp(lanes):
            if release:
                self._publish(barrier, self._machine.clocks.release(of_warp))
                continue
            for lane in of_warp.tolist():
                vector = self._machine.atomics.fenced(lane, "cta")
                if vector is not None:
                    self._publish(barrier, vector)
        barrier.pending -= count * len(lanes)
        if drop:
            barrier.count -= count * len(lanes)
        if barrier.pending < 0:
            raise self._machine.fault(
                f"mbarrier: {-barrier.pending} arrivals too many; {barrier.count} were expected",
                int(lanes[-1]),
                key[1],
            )
        self._complete(key, barrier)
        return phase

    def _publish(self, barrier: _Object, vector: Vector) -> None:
        barrier.arrived = joined(barrier.arrived, vector)

    def _complete(self, key: Key, barrier: _Object) -> None:
        """Go on to the next phase when nothing is missing."""
        if barrier.pending or barrier.bytes:
            return
        if barrier.copies:
            self._finish(key, barrier)
        barrier.passed = joined(barrier.arrived, barrier.passed)
        barrier.arrived = None
        barrier.phase += 1
        barrier.pending = barrier.count
        self._wake(key)

    def _finish(self, key: Key, barrier: _Object) -> None:
        """Let the copies of a phase be writes that are known to who waits for the phase."""
        machine = self._machine
        place = key[0] // machine.context.launch.cluster_size, barrier.agent
        epoch = self._epochs[place] = self._epochs.get(place, 0) + 1
        self._publish(barrier, machine.clocks.alone(barrier.agent, epoch))
        for cells in barrier.copies:
            machine.shadow.land(cells, epoch << 32 | barrier.agent)
        if barrier.sources is not None:
            self._publish(barrier, barrier.sources)
        barrier.copies, barrier.sources = [], None

    def _wake(self, key: Key) -> None:
        for waiter in [w for w in self._waiters if w.key == key]:
            self._waiters.remove(waiter)
            self._machine.resume(self._machine.mask_of(waiter.lanes), waiter.pc)

    def see(self, barrier: _Object, lanes: Ints, acquire: bool) -> None:
        """Lanes saw that a phase completed."""
        passed = barrier.passed
        if passed is None:
            return
        for of_warp in by_warp(lanes):
            if acquire:
                self._machine.clocks.acquire(of_warp, passed)
            else:
                self._machine.atomics.observe(of_warp, passed, "cta")

    def hold(self, key: Key, lanes: Ints) -> None:
        """Lanes wait at the present instruction for a phase to complete."""
        self._waiters.append(_Waiter(pc=self._machine.pc, lanes=lanes, key=key))

    def waiting(self) -> list[tuple[int, Ints, str]]:
        """Who waits where, for reports."""
        found = []
        for waiter in self._waiters:
            barrier = self._objects[waiter.key]
            what = (
                f"mbarrier {waiter.key[1]:#x}, {barrier.pending} arrivals and {barrier.bytes} "
                f"bytes from the end of phase {barrier.phase}"
            )
            found.append((waiter.pc, waiter.lanes, what))
        return found

    def begin_copy(
        self, key: Key, lanes: Ints, at: Ints, addresses: Ints, unit: int, source: Vector | None
    ) -> None:
        """Lanes start copies that this mbarrier waits for.

        Args:
            key: The mbarrier.
            lanes: [n], who starts each unit's copy.
            at: [n], positions in shared memory that the units go to.
            addresses: [n], the same as addresses of the block.
            unit: Bytes of a unit.
            source: What publishes that the lanes have read the source.
        """
        shadow = self._machine.shadow
        cells = self._machine.shadowed(shadow.begin_copy, lanes, at, addresses, unit)
        barrier = self._objects[key]
        barrier.copies.append(cells)
        barrier.sources = joined(barrier.sources, source)
        if self._filled is None:
            size = len(self._machine.shared.bytes) // shadow.granule
            self._filled = np.zeros(size, dtype=bool)
        self._filled[cells] = True

    @property
    def had_copies(self) -> bool:
        """Whether any copy was ever started."""
        return self._filled is not None

    def filled(self, granules: Ints) -> Ints:
        """Those among granules of shared memory that copies ever wrote to."""
        return granules[:0] if self._filled is None else granules[self._filled[granules]]

    def of_agent(self, lane: int, agent: int) -> str:
        """The copies of an agent of a lane's cluster, in words."""
        machine = self._machine
        size = machine.context.launch.cluster_size
        cluster = lane // (machine.threads * size)
        for (block, address), found in self._objects.items():
            if block // size == cluster and found.agent == agent:
                where = tuple(int(i) for i in machine.block_ids[block])
                return f"one that completes on mbarrier {address:#x} of block {where}"
        return "one whose mbarrier is no more"

    def landed(self, key: Key, lane: int, size: int) -> None:
        """So many bytes of copies that an mbarrier waits for are there."""
        barrier = self._objects[key]
        self._count_bytes(key, barrier, lane, -size)
        self._complete(key, barrier)


_SPACES = {"shared": "shared", "shared::cta": "shared", "shared::cluster": "cluster"}


def _parse(instruction: Instruction) -> tuple[list[str], str, str]:
    """What an mbarrier instruction does, where, and in which order ("" if it does not say)."""
    words = [w for w in instruction.opcode[1:] if w not in ("b64", "cta", "cluster")]
    space = next((_SPACES[w] for w in words if w in _SPACES), "generic")
    order = next((w for w in words if w in ("release", "acquire", "relaxed")), "")
    rest = [w for w in words if w not in _SPACES and w != order]
    return rest, space, order


def _per_lane(machine: Machine, group: Group, slot: int) -> dict[int, int]:
    """A register's value by lane."""
    return dict(zip(group.lanes.tolist(), machine.value(slot, group).tolist(), strict=True))


def build_mbarrier(instruction: Instruction, slots: Slots) -> Action:
    """`mbarrier`."""
    (verb, *more), space, order = _parse(instruction)
    if verb in ("test_wait", "try_wait") and more in ([], ["parity"]):
        return _build_wait(instruction, slots, space, verb == "try_wait", bool(more), order)
    if verb in ("arrive", "arrive_drop") and more in ([], ["expect_tx"], ["noComplete"]):
        return _build_arrive(instruction, slots, space, "expect_tx" in more, order)
    if more or verb not in ("init", "inval", "expect_tx", "complete_tx"):
        raise unknown(instruction)
    arity(instruction, 1 if verb == "inval" else 2)
    place = pointer(instruction.operands[0], slots, instruction)
    amount = slots.constant(0, 32)
    if verb != "inval":
        amount = slots.source(instruction.operands[1], 32, instruction)

    def step(machine: Machine, group: Group) -> None:
        amounts = _per_lane(machine, group, amount)
        for key, lanes in machine.mbarriers.locate(group, place, space):
            if verb == "init":
                machine.mbarriers.init(key, lanes, amounts[int(lanes[0])])
            elif verb == "inval":
                machine.mbarriers.invalidate(key, lanes)
            else:
                total = sum(amounts[lane] for lane in lanes.tolist())
                machine.mbarriers.expect(key, lanes, total if verb == "expect_tx" else -total)

    return Action(step=step, shared_width=_BYTES)


def _build_arrive(
    instruction: Instruction, slots: Slots, space: str, expects: bool, order: str
) -> Action:
    arity(instruction, 2, 3)
    state, where, *rest = instruction.operands
    target = slots.sink(state, 64, instruction)
    place = pointer(where, slots, instruction)
    count = slots.source(rest[0], 32, instruction) if rest else slots.constant(1, 32)
    drop = instruction.opcode[1] == "arrive_drop"

    def step(machine: Machine, group: Group) -> None:
        given = _per_lane(machine, group, count)
        phases: dict[int, int] = {}
        for key, lanes in machine.mbarriers.locate(group, place, space):
            for lane in lanes.tolist():
                one = np.array([lane])
                times = 1 if expects else given[lane]
                if expects:
                    machine.mbarriers.expect(key, one, given[lane], complete=False)
                phases[lane] = machine.mbarriers.arrive(key, one, times, order != "relaxed", drop)
        if target is not None:
            values = np.array([phases[lane] for lane in group.lanes.tolist()], dtype=np.uint64)
            machine.assign_lanes(target, values, group)

    return Action(step=step, shared_width=_BYTES)


def _build_wait(
    instruction: Instruction, slots: Slots, space: str, blocks: bool, parity: bool, order: str
) -> Action:
    """try_wait holds its lanes until the phase completes; test_wait answers at once."""
    arity(instruction, 3, 4)
    result, where, wanted, *_ = instruction.operands
    target = slots.destination(result, 1, instruction)
    place = pointer(where, slots, instruction)
    which = slots.source(wanted, 32 if parity else 64, instruction)

    def step(machine: Machine, group: Group) -> Group | None:
        wanted_of = _per_lane(machine, group, which)
        answer = np.zeros(machine.num_lanes, dtype=bool)
        held = np.zeros(machine.num_lanes, dtype=bool)
        for key, lanes in machine.mbarriers.locate(group, place, space):
            barrier = machine.mbarriers.known(key, lanes)
            asked = np.array([wanted_of[lane] for lane in lanes.tolist()])
            done = (asked & 1) != (barrier.phase & 1) if parity else asked < barrier.phase
            answer[lanes[done]] = True
            machine.mbarriers.see(barrier, lanes[done], order != "relaxed")
            if blocks and not done.all():
                machine.mbarriers.hold(key, lanes[~done])
                held[lanes[~done]] = True
        going = machine.group(group.mask & ~held)
        if len(going):
            machine.assign(target, answer, going)
        return going

    return Action(step=step, ends=blocks, shared_width=_BYTES)
