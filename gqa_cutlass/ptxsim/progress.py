"""Whether a run still gets anywhere: how much it may do, and whether a state comes again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gqa_cutlass.errors import KernelFault
from gqa_cutlass.ptxsim.element.bits import Bits

if TYPE_CHECKING:
    from gqa_cutlass.ptxsim.group import Group
    from gqa_cutlass.ptxsim.machine import Machine

Mask = NDArray[np.bool_]
# Work is counted in instructions, as they take time: one for so many threads counts once more, and
# so does what is done for so many threads one after another.
THREADS_SHIFT, _ONE_BY_ONE_SHIFT = 11, 6
# What a batch of blocks may do, and what more for every byte of the tensors: for a thread that
# reads them byte by byte, which takes 10, and for blocks that all read them, as those of heads that
# share a cache do, which takes 0.3 a block where it is read by 2 bytes.
_WORK, _WORK_PER_BYTE, _WORK_PER_BYTE_AND_BLOCK = 1 << 20, 16, 1
_FIRST_STATE = 1 << 12  # work after which a state is kept for comparison; then twice as much


@dataclass(frozen=True, kw_only=True)
class _State:
    """All that decides what threads do next, memory aside.

    Args:
        steps: Instructions that had been executed.
        changes: How often memory had been changed.
        pc: Where the group stands that is next.
        groups: Threads by where they stand.
        held: Threads that wait for their warp, by where.
        waiting: Who waits at barriers.
        registers: By slot.
    """

    steps: int
    changes: int
    pc: int
    groups: dict[int, Mask]
    held: dict[int, Mask]
    waiting: list[tuple[int, bytes, str]]
    registers: Sequence[Bits | None]


class Progress:
    """How far one machine has come.

    If all threads stand where they stood, with the same registers, and each of them has moved while
    no memory changed, they will be there again and again: nothing else acts on them. States are
    kept at work that doubles (Brent, "An improved Monte Carlo factorization algorithm", 1980), so
    that a loop is found in twice the time that leads to it and through it.

    Args:
        machine: Whose run.
        max_steps: Instructions that it may execute.
        num_bytes: Of all the tensors that it may use, with what is expanded.
    """

    def __init__(self, machine: Machine, max_steps: int, num_bytes: int) -> None:
        self._machine = machine
        self._max_steps = max_steps
        per_byte = _WORK_PER_BYTE + _WORK_PER_BYTE_AND_BLOCK * machine.num_blocks
        self._most = _WORK + per_byte * num_bytes
        self.steps = 0
        self.work = 0
        self.changes = 0  # of memory and of what barriers hold
        self._state: _State | None = None
        self._next_state = _FIRST_STATE
        self._moved: set[int] = set()  # from where threads have gone on since
        self._differs = 0  # a register that has changed

    def execute(self, group: Group, acting: Group) -> None:
        """An instruction is executed.

        Raises:
            KernelFault: It is one too many.
        """
        self.steps += 1
        self.work += acting.weight
        if self.steps > self._max_steps or self.work > self._most:
            raise self._no_end(self.steps - 1, "", int(group.lanes[0]))

    def one_by_one(self, count: int) -> None:
        """Something is done for so many threads, one after another."""
        self.work += count >> _ONE_BY_ONE_SHIFT

    def look(self, pc: int) -> None:
        """See whether the state is an earlier one, with the group at `pc` next.

        Raises:
            KernelFault: It is.
        """
        state = self._state
        if state is not None and self.changes == state.changes:
            if pc == state.pc and self._same(state):
                since = self.steps - state.steps
                self._machine.pc = pc
                what = f"; all threads are where they were {since} instructions before, and memory "
                what += "has not changed"
                raise self._no_end(self.steps, what, int(self._machine.groups[pc].argmax()))
            self._moved.add(pc)
        if self.work >= self._next_state:
            self._keep(pc)

    def _keep(self, pc: int) -> None:
        machine = self._machine
        self._state = _State(
            steps=self.steps,
            changes=self.changes,
            pc=pc,
            groups=dict(machine.groups),
            held=dict(machine.held),
            waiting=self._waiting(),
            registers=list(machine.regs),
        )
        self._next_state = 2 * self.work
        self._moved = {pc}

    def _same(self, state: _State) -> bool:
        """Whether all is as it was, and everybody has moved since."""
        machine = self._machine
        now, before = machine.regs, state.registers
        if not _equal(now[self._differs], before[self._differs]):
            return False
        for slot, (value, old) in enumerate(zip(now, before, strict=True)):
            if value is not old and not _equal(value, old):
                self._differs = slot
                return False
        return (
            self._moved.issuperset(machine.groups)
            and _same_masks(machine.groups, state.groups)
            and _same_masks(machine.held, state.held)
            and self._waiting() == state.waiting
        )

    def _waiting(self) -> list[tuple[int, bytes, str]]:
        return [(pc, lanes.tobytes(), what) for pc, lanes, what in self._machine.waiting()]

    def _no_end(self, steps: int, more: str, lane: int) -> KernelFault:
        return self._machine.fault(
            f"no end after {steps} instructions: the kernel loops, or waits for what does not "
            f"happen{more}",
            lane,
        )


def _equal(a: Bits | None, b: Bits | None) -> bool:
    return a is b or (a is not None and b is not None and np.array_equal(a, b))


def _same_masks(a: dict[int, Mask], b: dict[int, Mask]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[pc], b[pc]) for pc in a)
