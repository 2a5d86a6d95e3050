"""Instructions to actions: which opcode is built by what, and the kernel as a whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from gqa_cutlass.errors import PtxError
from gqa_cutlass.ptxsim.element.arith import lookup
from gqa_cutlass.ptxsim.element.bits import KINDS, Arithmetic
from gqa_cutlass.ptxsim.memory.access import build_atom, build_cvta, build_ld, build_st, resize
from gqa_cutlass.ptxsim.memory.bulk import build_bulk, build_bulk_prefetch
from gqa_cutlass.ptxsim.memory.copies import build_cp_async
from gqa_cutlass.ptxsim.memory.store_async import build_st_async
from gqa_cutlass.ptxsim.memory.tensor import build_tensor, build_tensor_prefetch
from gqa_cutlass.ptxsim.operands import arity, items
from gqa_cutlass.ptxsim.order.cluster import build_cluster_barrier, build_getctarank, build_mapa
from gqa_cutlass.ptxsim.order.mbarrier import build_mbarrier
from gqa_cutlass.ptxsim.order.pdl import build_griddepcontrol
from gqa_cutlass.ptxsim.order.sync import build_bar, build_fence
from gqa_cutlass.ptxsim.program import UNSIGNED, Action, Slots, unknown
from gqa_cutlass.ptxsim.text.syntax import Instruction, Not, Operand, Pair, Vector
from gqa_cutlass.ptxsim.warp.instructions import (
    build_activemask,
    build_elect,
    build_ldmatrix,
    build_match,
    build_mma,
    build_movmatrix,
    build_redux,
    build_shfl,
    build_vote,
)

if TYPE_CHECKING:
    from gqa_cutlass.ptxsim.group import Group
    from gqa_cutlass.ptxsim.machine import Machine

Builder = Callable[[Instruction, Slots], Action]


# Hints and what only makes things faster, which have no effect that can be seen: their modifiers.
_EVICT = {f"L2::{word}" for word in (
    "evict_last", "evict_normal", "evict_first", "evict_unchanged", "cache_hint",
)}  # fmt: skip
_HINTS: dict[str, set[str]] = {
    "nanosleep": {"u32"},
    "prefetch": {"global", "local", "const", "param", "tensormap", "L1", "L2", *_EVICT},
    "prefetchu": {"L1"},
    "discard": {"global", "L2"},
    "applypriority": {"global", *_EVICT},
    "setmaxnreg": {"inc", "dec", "sync", "aligned", "u32"},
}


def _nothing(instruction: Instruction, slots: Slots) -> Action:
    """One of `_HINTS`."""
    if not _HINTS[instruction.opcode[0]].issuperset(instruction.opcode[1:]):
        raise unknown(instruction)
    arity(instruction, 1, 2)
    return Action(step=lambda machine, group: None)


def _build_createpolicy(instruction: Instruction, slots: Slots) -> Action:
    """`createpolicy`: a cache policy is opaque; ours is zero."""
    if not {"fractional", "range", "global", "b64", *_EVICT}.issuperset(instruction.opcode[1:]):
        raise unknown(instruction)
    target = slots.destination(instruction.operands[0], 64, instruction)
    policy = np.zeros(1, dtype=np.uint64)
    return Action(step=lambda machine, group: machine.assign(target, policy, group))


def _plain_form(instruction: Instruction, operands: int, *modifiers: str) -> None:
    """Refuse other modifiers and another number of operands."""
    if instruction.opcode[1:] not in ((), *((word,) for word in modifiers)):
        raise unknown(instruction)
    arity(instruction, operands)


def _build_bra(instruction: Instruction, slots: Slots) -> Action:
    _plain_form(instruction, 1, "uni")
    target = slots.target(instruction)

    def step(machine: Machine, group: Group) -> None:
        machine.resume(group.mask, target)

    return Action(step=step, ends=True)


def _build_exit(instruction: Instruction, slots: Slots) -> Action:
    _plain_form(instruction, 0, *(("uni",) if instruction.opcode[0] == "ret" else ()))
    return Action(step=lambda machine, group: machine.retire(group), ends=True)


def _build_trap(instruction: Instruction, slots: Slots) -> Action:
    _plain_form(instruction, 0)

    def step(machine: Machine, group: Group) -> None:
        raise machine.fault("trap", int(group.lanes[0]))

    return Action(step=step)


def _build_mov(instruction: Instruction, slots: Slots) -> Action:
    """`mov`, also between a register and a vector of narrower ones."""
    target, source = instruction.operands
    if isinstance(target, Vector) or isinstance(source, Vector):
        return _build_pack(instruction, slots)
    return _build_arithmetic(instruction, slots)


def _build_pack(instruction: Instruction, slots: Slots) -> Action:
    """`mov` that packs or unpacks: the first element is the lowest."""
    _, kind = instruction.opcode
    target, source = instruction.operands
    parts = items(target if isinstance(target, Vector) else source)
    width = KINDS[kind].width
    part = width // len(parts)
    if part not in (8, 16, 32) or part * len(parts) != width:
        raise unknown(instruction, f"vector of {len(parts)}")
    if isinstance(target, Vector):
        whole = slots.source(source, width, instruction)
        targets = [slots.sink(t, part, instruction) for t in parts]

        def unpack(machine: Machine, group: Group) -> None:
            value = machine.read(whole)
            columns = value.view(UNSIGNED[part]).reshape(-1, len(parts)).T
            for slot, column in zip(targets, columns, strict=True):
                if slot is not None:
                    machine.assign(slot, np.ascontiguousarray(column), group)

        return Action(step=unpack)
    sources = [slots.source(s, part, instruction) for s in parts]
    result = slots.destination(target, width, instruction)

    def pack(machine: Machine, group: Group) -> None:
        columns = np.broadcast_arrays(*(machine.read(s) for s in sources))
        value = np.ascontiguousarray(np.stack(columns, axis=1)).view(UNSIGNED[width])
        machine.assign(result, value.reshape(-1), group)

    return Action(step=pack)


def _build_arithmetic(instruction: Instruction, slots: Slots) -> Action:
    """Everything element-wise."""
    found = lookup(instruction.opcode)
    if found is None:
        raise unknown(instruction)
    targets = _targets(instruction.operands[0], found, slots, instruction)
    sources = _sources(instruction.operands[1:], found, slots, instruction)
    results = zip(targets, found.results, strict=True)
    fits = all(t is None or slots.width(t) == w for t, w in results)
    narrow = [
        (i, UNSIGNED[w])
        for i, ((s, _), w) in enumerate(zip(sources, found.sources, strict=True))
        if slots.width(s) != w
    ]
    negated = [i for i, (_, negate) in enumerate(sources) if negate]
    where = tuple(s for s, _ in sources)
    if fits and not narrow and not negated and len(targets) == 1 and targets[0] is not None:
        return Action(step=_plain(found, targets[0], where))

    def step(machine: Machine, group: Group) -> None:
        values = [machine.read(s) for s in where]
        for i, dtype in narrow:
            values[i] = values[i].astype(dtype)
        for i in negated:
            values[i] = ~values[i]
        result = found.run(*values)
        results = result if isinstance(result, tuple) else (result,)
        for slot, value in zip(targets, results, strict=True):
            if slot is not None:
                wide = resize(value, UNSIGNED[slots.width(slot)], found.signed)
                machine.assign(slot, wide, group)

    return Action(step=step)


def _plain(found: Arithmetic, target: int, where: tuple[int, ...]) -> Callable[..., None]:
    """The common case: registers of the right width in, one out."""
    run: Callable[..., Any] = found.run
    if len(where) == 1:
        (one,) = where
        return lambda machine, group: machine.assign(target, run(machine.regs[one]), group)
    if len(where) == 2:
        one, two = where
        return lambda machine, group: machine.assign(
            target, run(machine.regs[one], machine.regs[two]), group
        )

    def step(machine: Machine, group: Group) -> None:
        regs = machine.regs
        machine.assign(target, run(*[regs[s] for s in where]), group)

    return step


def _targets(
    operand: Operand, found: Arithmetic, slots: Slots, instruction: Instruction
) -> list[int | None]:
    given = [operand.first, operand.second] if isinstance(operand, Pair) else [operand]
    if len(given) > len(found.results):
        raise unknown(instruction, f"{len(given)} destinations")
    found_slots = [
        slots.sink(g, w, instruction, wider=True)
        for g, w in zip(given, found.results, strict=False)
    ]
    return found_slots + [None] * (len(found.results) - len(given))


def _sources(
    operands: tuple[Operand, ...], found: Arithmetic, slots: Slots, instruction: Instruction
) -> list[tuple[int, bool]]:
    if len(operands) != len(found.sources):
        raise unknown(instruction, f"number of operands, {len(operands)},")
    sources = []
    for operand, width in zip(operands, found.sources, strict=True):
        negated = isinstance(operand, Not)
        if negated and width != 1:
            raise unknown(instruction, f"operand {operand}")
        inner = operand.reg if isinstance(operand, Not) else operand
        sources.append((slots.source(inner, width, instruction, wider=True), negated))
    return sources


BUILDERS: dict[str, Builder] = {
    "ld": build_ld,
    "ldu": build_ld,
    "st": build_st,
    "atom": build_atom,
    "red": build_atom,
    "cvta": build_cvta,
    "mov": _build_mov,
    "bra": _build_bra,
    "ret": _build_exit,
    "exit": _build_exit,
    "trap": _build_trap,
    "bar": build_bar,
    "barrier": build_bar,
    "fence": build_fence,
    "membar": build_fence,
    "shfl": build_shfl,
    "vote": build_vote,
    "match": build_match,
    "redux": build_redux,
    "elect": build_elect,
    "activemask": build_activemask,
    "mma": build_mma,
    "ldmatrix": build_ldmatrix,
    "stmatrix": build_ldmatrix,
    "movmatrix": build_movmatrix,
    "createpolicy": _build_createpolicy,
    "mbarrier": build_mbarrier,
    "mapa": build_mapa,
    "getctarank": build_getctarank,
    "griddepcontrol": build_griddepcontrol,
    **dict.fromkeys(_HINTS, _nothing),
}


_PREFIXES: list[tuple[tuple[str, ...], Builder]] = [
    (("cp", "async", "bulk", "prefetch", "tensor"), build_tensor_prefetch),
    (("cp", "async", "bulk", "prefetch"), build_bulk_prefetch),
    (("cp", "async", "bulk", "tensor"), build_tensor),
    (("cp", "async", "bulk"), build_bulk),
    (("cp", "async"), build_cp_async),
    (("st", "async"), build_st_async),
    (("barrier", "cluster"), build_cluster_barrier),
]


def build(instruction: Instruction, slots: Slots) -> Action:
    """What an instruction does.

    Raises:
        PtxError: It, one of its modifiers or one of its operands is not known.
    """
    head = instruction.opcode[0]
    builder = BUILDERS.get(head, _build_arithmetic)
    for prefix, special in _PREFIXES:
        if instruction.opcode[: len(prefix)] == prefix:
            builder = special
            break
    try:
        return builder(instruction, slots)
    except (IndexError, ValueError, AttributeError, KeyError, TypeError) as error:
        if isinstance(error, PtxError):
            raise
        raise unknown(instruction, "form") from error
