"""Warp-level instructions: what `exchange` and `matrix` compute, between registers and memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from gqa_cutlass.ptxsim.element.bits import KINDS, Bits
from gqa_cutlass.ptxsim.memory.spaces import SHARED_WINDOW, WINDOW_BYTES, AccessError
from gqa_cutlass.ptxsim.operands import arity, items, pointer
from gqa_cutlass.ptxsim.order.clocks import WARP
from gqa_cutlass.ptxsim.program import Action, Members, Slots, unknown
from gqa_cutlass.ptxsim.text.syntax import Instruction, Operand, Pair
from gqa_cutlass.ptxsim.warp import exchange, matrix

if TYPE_CHECKING:
    from gqa_cutlass.ptxsim.group import Group
    from gqa_cutlass.ptxsim.machine import Machine

_ALL = Members(strict=True)
_LDMATRIX_WORDS = ("sync", "aligned", "m8n8", "shared", "shared::cta", "b16")


def _two(operand: Operand, slots: Slots, instruction: Instruction) -> tuple[int | None, int | None]:
    """Slots of a register of 32 bits and a predicate, `d|p`, of which either may be missing."""
    if not isinstance(operand, Pair):
        return slots.sink(operand, 32, instruction), None
    first = slots.sink(operand.first, 32, instruction)
    return first, slots.sink(operand.second, 1, instruction)


def _uniform(machine: Machine, slot: int) -> Bits:
    """A register as [warps, 32], or as [1, 1] where all threads share it."""
    value = machine.regs[slot]
    if value is not None and len(value) == 1:
        return value.reshape(1, 1)
    return machine.whole(slot)


def _assign(machine: Machine, slot: int | None, value: Bits, group: Group) -> None:
    """Write a destination, if it is wanted, given values that spread to [warps, 32]."""
    if slot is not None:
        whole = np.broadcast_to(value, (machine.num_lanes // WARP, WARP))
        machine.assign(slot, whole.reshape(-1), group)


def build_shfl(instruction: Instruction, slots: Slots) -> Action:
    """`shfl.sync`."""
    words = instruction.opcode
    if len(words) != 4 or words[1] != "sync" or words[3] != "b32":
        raise unknown(instruction)
    mode = words[2]
    if mode not in ("up", "down", "bfly", "idx"):
        raise unknown(instruction, f"mode {mode}")
    arity(instruction, 5)
    result, predicate = _two(instruction.operands[0], slots, instruction)
    value, lane, clamp, mask = (slots.source(o, 32, instruction) for o in instruction.operands[1:])

    def step(machine: Machine, group: Group) -> None:
        active = group.mask.reshape(-1, WARP)
        read, in_range, absent = exchange.shfl(
            mode, machine.whole(value), _uniform(machine, lane), _uniform(machine, clamp), active
        )
        if len(machine.read(mask)) > 1:
            masks = machine.whole(mask)
            others, *_ = exchange.shfl(
                mode, masks, _uniform(machine, lane), _uniform(machine, clamp), active
            )
            absent |= active & (others != masks)  # takes part, but with others
        if absent.any():
            raise machine.fault(
                "shfl reads a lane that does not take part", int(absent.reshape(-1).argmax())
            )
        _assign(machine, result, read, group)
        _assign(machine, predicate, in_range, group)

    return Action(step=step, members=Members(mask=mask))


def build_vote(instruction: Instruction, slots: Slots) -> Action:
    """`vote.sync`."""
    words = instruction.opcode
    kinds = {"all": "pred", "any": "pred", "uni": "pred", "ballot": "b32"}
    if len(words) != 4 or words[1] != "sync" or kinds.get(words[2]) != words[3]:
        raise unknown(instruction)
    arity(instruction, 3)
    width = KINDS[words[3]].width
    result = slots.destination(instruction.operands[0], width, instruction)
    predicate = slots.predicate(instruction.operands[1], instruction)
    mask = slots.source(instruction.operands[2], 32, instruction)

    def step(machine: Machine, group: Group) -> None:
        votes = machine.whole(predicate.slot)
        votes = ~votes if predicate.negated else votes
        active = group.mask.reshape(-1, WARP)
        value = exchange.vote(words[2], votes, _uniform(machine, mask), active)
        _assign(machine, result, value, group)

    return Action(step=step, members=Members(mask=mask))


def build_match(instruction: Instruction, slots: Slots) -> Action:
    """`match.sync`."""
    words = instruction.opcode
    if len(words) != 4 or words[2] != "sync" or words[1] not in ("any", "all"):
        raise unknown(instruction)
    if words[3] not in ("b32", "b64"):
        raise unknown(instruction, f"type {words[3]}")
    arity(instruction, 3)
    result, predicate = _two(instruction.operands[0], slots, instruction)
    value = slots.source(instruction.operands[1], int(words[3][1:]), instruction)
    mask = slots.source(instruction.operands[2], 32, instruction)

    def step(machine: Machine, group: Group) -> None:
        active = group.mask.reshape(-1, WARP)
        found, agreed = exchange.match(
            words[1], machine.whole(value), _uniform(machine, mask), active
        )
        _assign(machine, result, found, group)
        _assign(machine, predicate, agreed, group)

    return Action(step=step, members=Members(mask=mask))


def build_redux(instruction: Instruction, slots: Slots) -> Action:
    """`redux.sync` of integers."""
    words = instruction.opcode
    if len(words) != 4 or (words[2], words[3]) not in exchange.REDUCTIONS:
        raise unknown(instruction)
    arity(instruction, 3)
    result = slots.destination(instruction.operands[0], 32, instruction)
    value, mask = (slots.source(o, 32, instruction) for o in instruction.operands[1:])

    def step(machine: Machine, group: Group) -> None:
        active = group.mask.reshape(-1, WARP)
        total = exchange.redux(
            words[2], words[3], machine.whole(value), _uniform(machine, mask), active
        )
        _assign(machine, result, total, group)

    return Action(step=step, members=Members(mask=mask))


def build_elect(instruction: Instruction, slots: Slots) -> Action:
    """`elect.sync`."""
    if instruction.opcode != ("elect", "sync"):
        raise unknown(instruction)
    arity(instruction, 2)
    leader, predicate = _two(instruction.operands[0], slots, instruction)
    mask = slots.source(instruction.operands[1], 32, instruction)

    def step(machine: Machine, group: Group) -> None:
        active = group.mask.reshape(-1, WARP)
        lane, elected = exchange.elect(_uniform(machine, mask), active)
        _assign(machine, leader, lane, group)
        _assign(machine, predicate, elected, group)

    return Action(step=step, members=Members(mask=mask))


def build_activemask(instruction: Instruction, slots: Slots) -> Action:
    """`activemask.b32`."""
    if instruction.opcode != ("activemask", "b32"):
        raise unknown(instruction)
    arity(instruction, 1)
    result = slots.destination(instruction.operands[0], 32, instruction)

    def step(machine: Machine, group: Group) -> None:
        active = group.mask.reshape(-1, WARP)
        everyone = np.ones((1, WARP), dtype=bool)
        word = exchange.vote("ballot", everyone, np.array([[0xFFFFFFFF]], np.uint32), active)
        _assign(machine, result, word, group)

    return Action(step=step)


def build_mma(instruction: Instruction, slots: Slots) -> Action:
    """`mma.sync`."""
    found = matrix.lookup_mma(instruction.opcode)
    if found is None:
        raise unknown(instruction)
    mma = found
    arity(instruction, 4)
    d = [slots.destination(o, 32, instruction) for o in items(instruction.operands[0])]
    a, b, c = (
        [slots.source(o, 32, instruction) for o in items(x)] for x in instruction.operands[1:]
    )
    if (len(a), len(b), len(c)) != mma.registers or len(d) != len(c):
        raise unknown(instruction, "number of registers")

    def step(machine: Machine, group: Group) -> None:
        results = mma.run(*([machine.whole(s) for s in part] for part in (a, b, c)))
        for slot, value in zip(d, results, strict=True):
            machine.assign(slot, value.reshape(-1), group)

    return Action(step=step, members=_ALL)


def build_movmatrix(instruction: Instruction, slots: Slots) -> Action:
    """`movmatrix`."""
    if instruction.opcode != ("movmatrix", "sync", "aligned", "m8n8", "trans", "b16"):
        raise unknown(instruction)
    arity(instruction, 2)
    target = slots.destination(instruction.operands[0], 32, instruction)
    source = slots.source(instruction.operands[1], 32, instruction)

    def step(machine: Machine, group: Group) -> None:
        machine.assign(target, matrix.movmatrix(machine.whole(source)).reshape(-1), group)

    return Action(step=step, members=_ALL)


def build_ldmatrix(instruction: Instruction, slots: Slots) -> Action:
    """`ldmatrix` and `stmatrix` of 8x8 matrices of 16-bit elements."""
    head, *words = instruction.opcode
    rest = [w for w in words if w not in _LDMATRIX_WORDS]
    transposed = "trans" in rest
    number = next((w for w in rest if w in ("x1", "x2", "x4")), "")
    if not number or set(rest) - {"trans", number} or not {"m8n8", "b16"} <= set(words):
        raise unknown(instruction)
    num = int(number[1:])
    arity(instruction, 2)
    is_load = head == "ldmatrix"
    registers, place = instruction.operands if is_load else instruction.operands[::-1]
    find = slots.destination if is_load else slots.source
    slots_of = [find(r, 32, instruction) for r in items(registers)]
    where = pointer(place, slots, instruction)
    providers = matrix.ldmatrix_rows(num).reshape(-1)
    if len(slots_of) != num:
        raise unknown(instruction, "number of registers")

    def rows(machine: Machine, group: Group) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Lanes that give the rows' addresses, the addresses, and where those lie."""
        warps = group.lanes[::WARP] // WARP
        lanes = (warps[:, None] * WARP + providers).reshape(-1)
        given = where.addresses(machine, group).reshape(-1, WARP)
        addresses = given[:, providers].reshape(-1)
        if int(addresses.max()) >= SHARED_WINDOW:
            inside = addresses & -WINDOW_BYTES == SHARED_WINDOW
            addresses = np.where(inside, addresses - SHARED_WINDOW, addresses)
        try:
            return lanes, addresses, machine.shared.index(machine.block_of[lanes], addresses, 16)
        except AccessError as error:
            raise machine.memory_fault(error, lanes, "shared") from None

    def run_load(machine: Machine, group: Group) -> None:
        lanes, addresses, at = rows(machine, group)
        machine.note_shared(machine.shadow.read, lanes, at, addresses, 16)
        data = machine.shared.load(at, 32, 4).reshape(-1, num, 8, 4)
        for slot, value in zip(slots_of, matrix.distribute(data, num, transposed), strict=True):
            machine.assign_lanes(slot, value.reshape(-1), group)

    def run_store(machine: Machine, group: Group) -> None:
        lanes, addresses, at = rows(machine, group)
        machine.progress.changes += 1
        machine.note_shared(machine.shadow.write, lanes, at, addresses, 16)
        values = [machine.value(s, group).reshape(-1, WARP) for s in slots_of]
        machine.shared.store(at, matrix.collect(values, num, transposed).reshape(-1, 4))

    return Action(step=run_load if is_load else run_store, members=_ALL, shared_width=16)
