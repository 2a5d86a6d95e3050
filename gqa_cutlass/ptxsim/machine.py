"""Runs the blocks of a launch together: one NumPy operation executes an instruction for all lanes.

Lanes that stand at the same instruction form a group, and the group that is furthest behind goes
first, so lanes that diverged meet again where their paths join. Instructions that a whole warp must
execute together, and barriers, hold lanes back until the others are there; if nobody can go on and
somebody waits, that is reported as a deadlock.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from gqa_cutlass.errors import KernelFault
from gqa_cutlass.ptxsim.element.bits import Bits
from gqa_cutlass.ptxsim.group import Group, Lanes, Mask
from gqa_cutlass.ptxsim.memory.copies import Copies
from gqa_cutlass.ptxsim.memory.spaces import CLUSTER_SHIFT, AccessError, GlobalMemory, SharedMemory
from gqa_cutlass.ptxsim.order.atomics import Atomics, Cells
from gqa_cutlass.ptxsim.order.clocks import WARP, Clocks
from gqa_cutlass.ptxsim.order.cluster import ClusterBarriers
from gqa_cutlass.ptxsim.order.ledger import GlobalLedger
from gqa_cutlass.ptxsim.order.mbarrier import MBarriers
from gqa_cutlass.ptxsim.order.pdl import Predecessor
from gqa_cutlass.ptxsim.order.shadow import Shadow, ShadowError
from gqa_cutlass.ptxsim.order.sync import Barriers
from gqa_cutlass.ptxsim.prepare import Launch, Program
from gqa_cutlass.ptxsim.program import Code, Members
from gqa_cutlass.ptxsim.progress import Progress
from gqa_cutlass.ptxsim.stats import Stats

_T = TypeVar("_T")
_LANES = np.arange(WARP, dtype=np.uint32)
_EVERYBODY = 0xFFFFFFFF  # as a membermask
_SHARED = 4  # times the work of an access to global memory
# Turns after which another group gets one, since spinning ends by others' work; then half as many.
_PATIENCE, _LEAST_PATIENCE = 1024, 16


@dataclass(kw_only=True)
class Context:
    """What one launch shares between its batches of blocks."""

    program: Program
    launch: Launch
    params: NDArray[np.uint8]
    memory: GlobalMemory
    ledger: GlobalLedger | None
    stats: Stats | None
    max_steps: int
    num_bytes: int  # of all the tensors
    cells: Cells = field(default_factory=dict)  # what atomics on global memory published


class Machine:
    """One batch of blocks.

    Args:
        context: The launch.
        block_ids: [n, 3], whole clusters.
        first_block: Position of the first one among all blocks of the launch.
        races: Whether to look for races.
    """

    def __init__(
        self,
        context: Context,
        block_ids: NDArray[np.int64],
        first_block: int,
        races: bool,
    ) -> None:
        launch, program = context.launch, context.program
        self.context = context
        self.block_ids = block_ids
        self.first_block = first_block
        self.threads = launch.block
        self.num_blocks = len(block_ids)
        self.num_lanes = self.num_blocks * launch.block
        self.num_live = self.num_lanes
        self.live: Mask = np.ones(self.num_lanes, dtype=bool)
        self.block_of: Lanes = np.arange(self.num_lanes) // launch.block
        self.regs: list[Bits | None] = program.registers(launch, block_ids)
        self.defined: dict[int, Mask] = {
            slot: np.zeros(self.num_lanes, dtype=bool) for slot in program.watched
        }
        self.clocks = Clocks(self.num_blocks, launch.block, launch.cluster_size, program.agents)
        self.shared = SharedMemory(
            self.num_blocks, program.shared_base, program.shared_size(launch)
        )
        self.shadow = Shadow(
            len(self.shared.bytes),
            program.granule,
            self.clocks,
            races and context.ledger is not None,
        )
        self.local = np.zeros(0, dtype=np.uint8)
        if program.local_bytes:
            self.local = np.zeros(self.num_lanes * program.local_bytes, dtype=np.uint8)
        self.predecessor = Predecessor(self, program.awaits_predecessor)
        self.copies = Copies(self)
        self.atomics = Atomics(self, context.cells)
        self.barriers = Barriers(self)
        self.mbarriers = MBarriers(self)
        self.cluster_barriers = ClusterBarriers(self)
        self.groups: dict[int, Mask] = {}
        self.held: dict[int, Mask] = {}  # lanes waiting for the rest of their warp
        self.pc = 0
        self.progress = Progress(self, context.max_steps, context.num_bytes)
        if context.ledger is not None:
            context.ledger.begin(first_block * launch.block, self.clocks)

    def run(self) -> None:
        """Execute until every lane has exited.

        Raises:
            KernelFault: What a kernel may not do, or a deadlock.
        """
        self.groups[0] = self.live.copy()
        turns, patience, others = 0, _PATIENCE, 0
        while self.num_live:
            if not self.groups:
                self._deadlock()
            turns += 1
            pc = min(self.groups)
            if len(self.groups) == 1:
                turns, patience = 0, _PATIENCE
            elif turns > patience:  # who is behind may wait for what others have to do
                turns, patience, others = 0, max(patience // 2, _LEAST_PATIENCE), others + 1
                pc = sorted(self.groups)[others % len(self.groups)]
            self.progress.look(pc)
            self._advance(pc, self.groups.pop(pc))

    def group(self, mask: Mask) -> Group:
        """Lanes as a group."""
        return Group(mask, self)

    def mask_of(self, lanes: Lanes) -> Mask:
        """Lanes as a mask."""
        mask = np.zeros(self.num_lanes, dtype=bool)
        mask[lanes] = True
        return mask

    def resume(self, mask: Mask, pc: int) -> None:
        """Let lanes go on at an instruction."""
        other = self.groups.get(pc)
        self.groups[pc] = mask if other is None else mask | other

    def _advance(self, pc: int, mask: Mask) -> None:
        """Execute up to where lanes part, meet others or wait."""
        program = self.context.program
        group: Group | None = Group(mask, self)
        while group is not None:
            code = program.code[pc]
            self.pc = pc
            acting = group if code.guard is None else self._guarded(code, group)
            members = code.action.members
            if members is not None and len(acting) and not self._complete(members, acting):
                group = acting = self._together(members, group, acting)
                if not len(group):
                    return
            if len(acting):
                group = self._execute(code, group, acting)
            pc += 1
            if group is not None and self.groups and pc in program.leaders:
                self.resume(group.mask, pc)
                return

    def _execute(self, code: Code, group: Group, acting: Group) -> Group | None:
        """Execute one instruction; returns who goes on behind it."""
        self.progress.execute(group, acting)
        if self.defined:
            self._check_defined(code, acting)
        if self.context.stats is not None:
            self.context.stats.count(self.pc, acting)
        going = code.action.step(self, acting)
        if not code.action.ends:
            if group.full:
                for slot in code.dead:
                    self.regs[slot] = None
            return group
        stay = group.mask & ~acting.mask
        if going is not None:
            stay |= going.mask
        return Group(stay, self) if stay.any() else None

    def _guarded(self, code: Code, group: Group) -> Group:
        """The lanes of a group whose guard holds."""
        if code.guard in self.defined:
            self._check_read(code.guard, group)
        assert code.guard is not None
        predicate = self.read(code.guard)
        mask = group.mask & (~predicate if code.instruction.negated else predicate)
        return group if np.count_nonzero(mask) == len(group) else Group(mask, self)

    def _complete(self, members: Members, acting: Group) -> bool:
        """Whether lanes are whole warps that name one another, by far the most common case."""
        if members.mask is None:
            return acting.whole
        words = self.read(members.mask)
        return acting.whole and len(words) == 1 and int(words[0]) == _EVERYBODY

    def _together(self, members: Members, group: Group, acting: Group) -> Group:
        """Warps of which everybody is here who must be; the others are held back.

        Lanes whose guard does not hold go on.
        """
        passing = group.mask & ~acting.mask
        if passing.any():
            self.resume(passing, self.pc + 1)
        held = self.held.pop(self.pc, None)
        mask = acting.mask if held is None else acting.mask | held
        here = mask.reshape(-1, WARP)
        needed = self.live.reshape(-1, WARP) | members.strict
        if members.mask is not None:
            words = np.where(here, self.whole(members.mask), np.uint32(0))
            missing = here & (words >> _LANES & np.uint32(1) == 0)
            if missing.any():
                lane = int(missing.reshape(-1).argmax())
                mask_of = int(words.reshape(-1)[lane])
                raise self.fault(f"the lane is not in its membermask, {mask_of:#010x}", lane)
            asked = np.bitwise_or.reduce(words, axis=1)[:, None]
            needed = (asked >> _LANES & np.uint32(1)).astype(bool)
        absent = np.asarray((needed & ~here).any(axis=1))
        ready = here & ~absent[:, None]
        rest = (here & ~ready).reshape(-1)
        if rest.any():
            self.held[self.pc] = rest
        return Group(ready.reshape(-1), self)

    def retire(self, group: Group) -> None:
        """Lanes have exited."""
        self.progress.changes += 1
        self.live = self.live & ~group.mask
        self.cluster_barriers.leave(group)
        self.num_live = int(np.count_nonzero(self.live))
        held, self.held = self.held, {}
        for pc, mask in held.items():  # they may have waited for these lanes
            self.resume(mask, pc)
        self.barriers.recheck()
        self.cluster_barriers.recheck()

    def _check_defined(self, code: Code, acting: Group) -> None:
        for slot in code.reads:
            if slot in self.defined:
                self._check_read(slot, acting)
        for slot in code.writes:
            if slot in self.defined:
                self.defined[slot] |= acting.mask

    def _check_read(self, slot: int, readers: Group) -> None:
        undefined = ~self.defined[slot][readers.lanes]
        if undefined.any():
            raise self._undefined(slot, int(readers.lanes[undefined.argmax()]))

    def _undefined(self, slot: int, lane: int) -> KernelFault:
        name = self.context.program.slot_name(slot)
        return self.fault(f"register {name} is read and was never written", lane)

    def shared_places(self, lanes: Lanes, addresses: Lanes, space: str) -> tuple[Lanes, Lanes]:
        """Blocks of the machine, and addresses in them, of accesses to shared memory.

        Raises:
            AccessError: A block that is not of the cluster.
        """
        blocks = self.block_of[lanes]
        if space != "cluster":
            return blocks, addresses
        size = self.context.launch.cluster_size
        rank = addresses >> CLUSTER_SHIFT
        wrong = (rank > size) | (rank < 0)
        if wrong.any():
            position = int(wrong.argmax())
            raise AccessError(position, int(addresses[position]), "outside the cluster")
        places = np.where(rank > 0, blocks // size * size + rank - 1, blocks)
        there = np.asarray(self.live.reshape(-1, self.threads).any(axis=1))
        if not there.all() and not there[places].all():
            position = int((~there[places]).argmax())
            raise AccessError(position, int(addresses[position]), "to a block that has exited")
        return places, addresses & (1 << CLUSTER_SHIFT) - 1

    def shadowed(
        self,
        note: Callable[[Lanes, Lanes, int], _T],
        lanes: Lanes,
        at: Lanes,
        addresses: Lanes,
        size: int,
    ) -> _T:
        """Enter accesses to shared memory, by a method of its shadow.

        Raises:
            KernelFault: The shadow refused one.
        """
        try:
            return note(lanes, at, size)
        except ShadowError as error:
            raise self.shadow_fault(error, lanes, addresses) from None

    def note_shared(
        self,
        note: Callable[[Lanes, Lanes, int], _T],
        lanes: Lanes,
        at: Lanes,
        addresses: Lanes,
        size: int,
    ) -> _T:
        """As `shadowed`, and count the accesses."""
        self.progress.one_by_one(_SHARED * len(lanes))
        noted = self.shadowed(note, lanes, at, addresses, size)
        if self.context.stats is not None:
            self.context.stats.shared(self.pc, lanes, at % self.shared.pitch, size)
        return noted

    def value(self, slot: int, group: Group) -> Bits:
        """A register's value for every lane of a group."""
        value = self.read(slot)
        if group.full:
            return value if len(value) == self.num_lanes else np.repeat(value, self.num_lanes)
        return value[group.lanes] if len(value) > 1 else np.repeat(value, len(group))

    def read(self, slot: int) -> Bits:
        """A register as it is held: one value per lane of the machine, or one for all of them."""
        value = self.regs[slot]
        if value is None:  # what the check for undefined registers has not found
            raise self._undefined(slot, int(self.live.argmax()))
        return value

    def whole(self, slot: int) -> Bits:
        """A register's value for all lanes of the machine, [warps, 32]."""
        value = self.regs[slot]
        if value is None:  # read for lanes that are not there
            value = np.zeros(1, dtype=self.context.program.dtype(slot))
        return np.broadcast_to(value, self.num_lanes).reshape(-1, WARP)

    def assign(self, slot: int, value: Bits, group: Group) -> None:
        """Write a register, given values for all lanes of the machine (or one for all of them)."""
        if not group.covers:
            old = self.regs[slot]
            if old is None:
                old = np.zeros(1, dtype=value.dtype)
            value = np.where(group.mask, value, old)
        self.regs[slot] = value

    def assign_lanes(self, slot: int, value: Bits, group: Group) -> None:
        """Write a register, given one value per lane of the group."""
        if group.full:
            self.regs[slot] = value
            return
        old = self.regs[slot]
        new = np.zeros(self.num_lanes, dtype=value.dtype)
        if old is not None and not group.covers:
            new[:] = old
        new[group.lanes] = value
        self.regs[slot] = new

    def lane_name(self, lane: int) -> str:
        """Block, warp and lane in words."""
        block = tuple(int(i) for i in self.block_ids[lane // self.threads])
        thread = lane % self.threads
        return f"block {block}, warp {thread // WARP}, lane {thread % WARP}"

    def fault(
        self, what: str, lane: int, address: int | None = None, pc: int | None = None
    ) -> KernelFault:
        """The error for what a lane did."""
        return self.context.program.fault(
            what, self.lane_name(lane), self.pc if pc is None else pc, address
        )

    def memory_fault(self, error: AccessError, lanes: Lanes, space: str) -> KernelFault:
        """The error for an access that memory refused."""
        where = f"; {self.context.memory.locate(error.address)}" if space == "global" else ""
        return self.fault(
            f"{space} access {error}{where}", int(lanes[error.position]), error.address
        )

    def shadow_fault(self, error: ShadowError, lanes: Lanes, addresses: Lanes) -> KernelFault:
        """The error for an access that shared memory's shadow refused."""
        lane = int(lanes[error.row])
        address = int(addresses[error.row]) + error.column * self.shadow.granule
        other = ""
        if error.other is not None and error.other >= self.clocks.lanes:
            other = f" ({self.mbarriers.of_agent(lane, error.other)})"
        elif error.other is not None:
            size = self.threads * self.context.launch.cluster_size
            other = f" ({self.lane_name(lane // size * size + error.other)})"
        return self.fault(f"{error}{other}", lane, address)

    def waiting(self) -> list[tuple[int, Lanes, str]]:
        """Who waits at barriers: where, which lanes, for what."""
        waits = (self.barriers, self.mbarriers, self.cluster_barriers)
        return [waiting for barriers in waits for waiting in barriers.waiting()]

    def _deadlock(self) -> None:
        """Report who waits where."""
        waiting: list[str] = []
        first: tuple[int, int] | None = None
        held = [
            (pc, np.flatnonzero(mask), "the rest of its warp") for pc, mask in self.held.items()
        ]
        for pc, lanes, what in [*held, *self.waiting()]:
            if len(lanes):
                first = first or (int(lanes[0]), pc)
                where = self.context.program.code[pc].instruction
                waiting.append(
                    f"{len(lanes)} threads, first {self.lane_name(int(lanes[0]))}, wait for {what} "
                    f"in `{where.name}` at {where.where}"
                )
        lane, pc = first or (0, self.pc)
        raise self.fault("deadlock: nobody can go on; " + "; ".join(waiting), lane, pc=pc)
