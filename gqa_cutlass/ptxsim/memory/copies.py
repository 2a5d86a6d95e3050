"""cp.async: copies that finish when they are waited for (PTX ISA 9.7.9.25.3).

The bytes are there at once, but nobody may look: their granules are under way until the lane that
started the copy has waited for its group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gqa_cutlass.ptxsim.memory.access import note_global
from gqa_cutlass.ptxsim.memory.spaces import AccessError
from gqa_cutlass.ptxsim.operands import arity, integer, pointer
from gqa_cutlass.ptxsim.program import Action, Slots, unknown
from gqa_cutlass.ptxsim.text.syntax import Imm, Instruction

if TYPE_CHECKING:
    from gqa_cutlass.ptxsim.group import Group
    from gqa_cutlass.ptxsim.machine import Machine

Ints = NDArray[np.int64]
_HINTS = ("L2::cache_hint", "L2::64B", "L2::128B", "L2::256B")
_SIZES = {"ca": (4, 8, 16), "cg": (16,)}


@dataclass(kw_only=True)
class _Copy:
    """One instruction's copies: lanes, the group that each belongs to, granules [n, k]."""

    lanes: Ints
    group: Ints
    cells: Ints


class Copies:
    """Copies under way of one machine."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._committed = np.zeros(machine.num_lanes, dtype=np.int64)
        self._under_way: list[_Copy] = []

    def start(self, group: Group, target: Ints, source: Ints, size: int, length: Ints) -> None:
        """Copy `length` bytes for every lane, zeros up to `size`."""
        machine, lanes = self._machine, group.lanes
        machine.progress.changes += 1
        data = np.zeros((len(lanes), size // 4), dtype=np.uint32)
        try:
            self._read(data, lanes, source, size, length)
        except AccessError as error:
            raise machine.memory_fault(error, lanes, "global") from None
        try:
            at = machine.shared.index(machine.block_of[lanes], target, size)
        except AccessError as error:
            raise machine.memory_fault(error, lanes, "shared") from None
        cells = machine.note_shared(machine.shadow.begin_copy, lanes, at, target, size)
        machine.shared.store(at, data if size > 4 else data[:, 0])
        self._under_way.append(_Copy(lanes=lanes, group=self._committed[lanes], cells=cells))

    def _read(
        self, data: NDArray[np.uint32], lanes: Ints, source: Ints, size: int, length: Ints
    ) -> None:
        """Fill rows of `data` with as many bytes as each lane asks for."""
        machine = self._machine
        wrong = (length < 0) | (length > size)
        if wrong.any():
            raise machine.fault(
                f"cp.async: source size {int(length[wrong][0])}; allowed: 0 to {size}",
                int(lanes[wrong.argmax()]),
            )
        for bytes_read in np.unique(length[length > 0]).tolist():
            rows = np.flatnonzero(length == bytes_read)
            if len(rows) == len(lanes):
                rows = np.arange(len(lanes))
            where = source[rows]
            misaligned = where % size != 0
            if misaligned.any():
                position = int(rows[misaligned.argmax()])
                why = f"not a multiple of {size} bytes"
                raise AccessError(position, int(source[position]), why)
            try:
                unit = 8 * min(bytes_read & -bytes_read, 4)
                words = bytes_read * 8 // unit
                view = data.view(f"u{unit // 8}")
                together = words if words & words - 1 == 0 and words <= 4 else 1
                for i in range(0, words, together):
                    place = where + i * unit // 8
                    loaded = machine.context.memory.load(place, unit, together)
                    view[rows, i : i + together] = loaded.reshape(len(rows), together)
                    size_of = together * unit // 8
                    note_global(
                        machine, lanes[rows], place, size_of, write=False, strong=False,
                        overread=True,
                    )  # fmt: skip
            except AccessError as error:
                raise AccessError(int(rows[error.position]), error.address, str(error)) from None

    def commit(self, group: Group) -> None:
        """Close the open group of every lane."""
        self._committed[group.lanes] += 1

    def wait(self, group: Group, newest: int) -> None:
        """Wait until all but the newest groups of every lane have finished."""
        limit = self._committed - newest
        left = []
        for copy in self._under_way:
            done = copy.group < limit[copy.lanes]
            if not group.full:
                done &= group.mask[copy.lanes]
            if done.all():
                self._machine.shadow.end_copy(copy.lanes, copy.cells)
            elif done.any():
                self._machine.shadow.end_copy(copy.lanes[done], copy.cells[done])
                left.append(
                    _Copy(lanes=copy.lanes[~done], group=copy.group[~done], cells=copy.cells[~done])
                )
            else:
                left.append(copy)
        self._under_way = left


def build_cp_async(instruction: Instruction, slots: Slots) -> Action:
    """`cp.async`: the copy, commit_group, wait_group and wait_all."""
    words = instruction.opcode[2:]
    if words == ("commit_group",):
        arity(instruction, 0)
        return Action(step=lambda machine, group: machine.copies.commit(group))
    if words == ("wait_all",):
        arity(instruction, 0)
        return Action(step=_wait_all)
    if words == ("wait_group",):
        arity(instruction, 1)
        newest = integer(instruction.operands[0], instruction)
        return Action(step=lambda machine, group: machine.copies.wait(group, newest))
    cache, *rest = words
    if cache not in _SIZES or rest[:2] not in (["shared", "global"], ["shared::cta", "global"]):
        raise unknown(instruction)
    if any(word not in _HINTS for word in rest[2:]):
        raise unknown(instruction, f"modifier {rest[2:]}")
    hint = "L2::cache_hint" in rest
    arity(instruction, 3 + hint, 4 + hint)
    operands = instruction.operands[: len(instruction.operands) - hint]
    size = integer(operands[2], instruction)
    if size not in _SIZES[cache]:
        raise unknown(instruction, f"size {size}")
    target = pointer(operands[0], slots, instruction)
    source = pointer(operands[1], slots, instruction)
    given = operands[3] if len(operands) == 4 else Imm(size)
    ignores = slots.is_predicate(given)
    length = slots.source(given, 1 if ignores else 32, instruction)

    def step(machine: Machine, group: Group) -> None:
        lengths = machine.value(length, group)
        lengths = np.where(lengths, 0, size) if ignores else lengths.view(np.int32).astype(np.int64)
        machine.copies.start(
            group, target.addresses(machine, group), source.addresses(machine, group), size, lengths
        )

    return Action(step=step, shared_width=size)


def _wait_all(machine: Machine, group: Group) -> None:
    machine.copies.commit(group)
    machine.copies.wait(group, 0)
