"""ld, st, atom, red, and what turns one kind of address into another (PTX ISA 9.7.9)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gqa_cutlass.ptxsim.element.bits import Bits
from gqa_cutlass.ptxsim.memory.spaces import (
    LOCAL_WINDOW,
    PARAM_WINDOW,
    SHARED_WINDOW,
    WINDOW_BYTES,
    AccessError,
)
from gqa_cutlass.ptxsim.operands import Addresses, Pointer, arity, items, pointer
from gqa_cutlass.ptxsim.program import UNSIGNED, Action, Slots, unknown
from gqa_cutlass.ptxsim.text.syntax import Instruction

if TYPE_CHECKING:
    from gqa_cutlass.ptxsim.group import Group
    from gqa_cutlass.ptxsim.machine import Machine

SCOPES = {"cta": "cta", "cluster": "cluster", "gpu": "gpu", "sys": "gpu"}
_EVICT = ("evict_normal", "evict_unchanged", "evict_first", "evict_last", "no_allocate")
_CACHE = {
    "ca", "cg", "cs", "lu", "cv", "nc", "wb", "wt", "L2::64B", "L2::128B", "L2::256B",
    *(f"{level}::{word}" for level in ("L1", "L2") for word in _EVICT),
}  # fmt: skip
_SPACES = {
    "global": "global", "shared": "shared", "shared::cta": "shared", "shared::cluster": "cluster",
    "local": "local", "param": "param", "param::entry": "param", "const": "global",
}  # fmt: skip
_WINDOWS = {
    "shared": SHARED_WINDOW, "shared::cta": SHARED_WINDOW, "shared::cluster": SHARED_WINDOW,
    "local": LOCAL_WINDOW, "param": PARAM_WINDOW, "global": 0, "const": 0,
}  # fmt: skip
# Where generic addresses are taken, too.
_SPACE_WINDOWS = {"shared": SHARED_WINDOW, "cluster": SHARED_WINDOW, "param": PARAM_WINDOW}
_WINDOW_STARTS = (SHARED_WINDOW, LOCAL_WINDOW, PARAM_WINDOW)
_TYPES = {f"{kind}{bits}": bits for kind in "bus" for bits in (8, 16, 32, 64)} | {
    "f32": 32, "f64": 64, "f16": 16, "bf16": 16, "f16x2": 32, "bf16x2": 32,
}  # fmt: skip
_ORDERS = {"relaxed", "acquire", "release", "acq_rel"}


@dataclass(kw_only=True)
class Modifiers:
    """What the dots of a memory instruction say."""

    space: str = "generic"
    order: str = "weak"
    scope: str = "gpu"
    count: int = 1
    type: str = ""
    hint: bool = False  # a cache policy is the last operand
    rest: list[str] = field(default_factory=list)

    @property
    def width(self) -> int:
        """Bits of an element."""
        return _TYPES[self.type]

    @property
    def shared_width(self) -> int:
        """Bytes of an access, if it may be one to shared memory, else 0."""
        shared = self.space in ("generic", "shared", "cluster")
        return self.width * self.count // 8 if shared else 0

    @property
    def strong(self) -> bool:
        """Whether it may race with others of its kind."""
        return self.order != "weak"


def modifiers(instruction: Instruction) -> Modifiers:
    """Read the dots; what not all memory instructions know, or comes twice, goes to `rest`."""
    m = Modifiers()
    for word in instruction.opcode[1:]:
        if word in _SPACES and m.space == "generic":
            m.space = _SPACES[word]
        elif (word in _ORDERS or word == "volatile") and m.order == "weak":
            m.order = word if word in _ORDERS else "relaxed"
        elif word in ("v2", "v4", "v8") and m.count == 1:
            m.count = int(word[1:])
        elif word in _TYPES and not m.type:
            m.type = word
        elif word == "L2::cache_hint":
            m.hint = True
        elif word in SCOPES:
            m.scope = SCOPES[word]
        elif word not in _CACHE and word != "weak":
            m.rest.append(word)
    if not m.type:
        raise unknown(instruction, "type")
    if m.width * m.count > 128:
        raise unknown(instruction, f"vector of {m.count}")
    return m


def load(machine: Machine, group: Group, space: str, addresses: Addresses, m: Modifiers) -> Bits:
    """Read from one space for the lanes of a group: [n], or [n, count]."""
    lanes, size = group.lanes, m.width * m.count // 8
    try:
        if space == "global":
            values = machine.context.memory.load(addresses, m.width, m.count)
            note_global(machine, lanes, addresses, size, write=False, strong=m.strong)
            return values
        if space in ("shared", "cluster"):
            blocks, local = machine.shared_places(lanes, addresses, space)
            at = machine.shared.index(blocks, local, size)
            note = machine.shadow.read_strong if m.strong else machine.shadow.read
            machine.note_shared(note, lanes, at, addresses, size)
            return machine.shared.load(at, m.width, m.count)
        memory, at = _private(machine, lanes, space, addresses, size)
        return _rows(memory, m.width, m.count)[at // size]
    except AccessError as error:
        raise machine.memory_fault(error, lanes, space) from None


def store(
    machine: Machine, group: Group, space: str, addresses: Addresses, values: Bits, strong: bool
) -> None:
    """Write to one space for the lanes of a group."""
    lanes, size = group.lanes, values[0].nbytes
    machine.progress.changes += 1
    try:
        if space == "global":
            note_global(machine, lanes, addresses, size, write=True, strong=strong)
            machine.context.memory.store(addresses, values)
        elif space in ("shared", "cluster"):
            blocks, local = machine.shared_places(lanes, addresses, space)
            at = machine.shared.index(blocks, local, size)
            note = partial(machine.shadow.write, strong=strong)
            machine.note_shared(note, lanes, at, addresses, size)
            machine.shared.store(at, values)
        elif space == "local":
            memory, at = _private(machine, lanes, space, addresses, size)
            _rows(memory, values.dtype.itemsize * 8, values[0].size)[at // size] = values
        else:
            raise AccessError(0, int(addresses[0]), "parameters cannot be written")
    except AccessError as error:
        raise machine.memory_fault(error, lanes, space) from None


_ACCESSES = 256  # what any number of accesses takes, times what one more of them does


def note_global(
    machine: Machine,
    lanes: Addresses,
    addresses: Addresses,
    size: int,
    *,
    write: bool,
    strong: bool,
    overread: bool = False,
) -> None:
    """Enter accesses to global memory into the ledger and the statistics.

    With `overread` not where a region allows reading what is written meanwhile.

    Raises:
        KernelFault: A lane should have waited for the kernel before this one.
    """
    machine.progress.one_by_one(_ACCESSES + len(lanes))
    machine.predecessor.check(lanes, addresses, write)
    context = machine.context
    if context.ledger is not None:
        kept = ~context.memory.overread(addresses) if overread else slice(None)
        context.ledger.note(
            lanes[kept], addresses[kept], size, write=write, strong=strong, pc=machine.pc
        )
        if context.ledger.overfull:
            raise machine.fault(
                "more accesses to global memory than can be compared, to find races: "
                f"{context.ledger.overfull}. Look for races in a smaller launch, or not at all",
                int(lanes[0]),
            )
    if context.stats is not None:
        context.stats.global_(machine.pc, lanes, addresses, size, write=write)


def _private(
    machine: Machine, lanes: Addresses, space: str, addresses: Addresses, size: int
) -> tuple[NDArray[np.uint8], Addresses]:
    """Local memory or parameters, and the positions of accesses in them."""
    memory, limit, start = machine.local, machine.context.program.local_bytes, lanes
    if space == "param":
        memory, limit = machine.context.params, machine.context.program.param_bytes
        start = np.zeros_like(lanes)
    wrong = (addresses < 0) | (addresses > limit - size) | (addresses % size != 0)
    if wrong.any():
        position = int(wrong.argmax())
        why = f"outside the {limit} bytes there are, or not a multiple of {size} bytes"
        raise AccessError(position, int(addresses[position]), why)
    return memory, start * limit + addresses


def _rows(memory: NDArray[np.uint8], width: int, count: int) -> NDArray[Any]:
    elements = memory.view(UNSIGNED[width])
    return elements.reshape(-1, count) if count > 1 else elements


def by_space(
    machine: Machine, group: Group, place: Pointer, space: str
) -> Iterator[tuple[Group, str, Addresses]]:
    """A group's accesses, by the spaces that generic addresses point into."""
    addresses = place.addresses(machine, group)
    if space != "generic":
        window = _SPACE_WINDOWS.get(space, 0)
        if window and int(addresses.max()) >= window:
            inside = addresses & -WINDOW_BYTES == window
            addresses = np.where(inside, addresses - window, addresses)
        yield group, space, addresses
        return
    windows = addresses & ~np.int64(WINDOW_BYTES - 1)
    for window, name in (
        (SHARED_WINDOW, "cluster"), (LOCAL_WINDOW, "local"), (PARAM_WINDOW, "param"),
        (0, "global"),
    ):  # fmt: skip
        mine = windows == window if window else ~np.isin(windows, _WINDOW_STARTS)
        if mine.all():
            yield group, name, addresses - window
            return
        if mine.any():
            part = machine.group(machine.mask_of(group.lanes[mine]))
            yield part, name, addresses[mine] - window


def build_ld(instruction: Instruction, slots: Slots) -> Action:
    """`ld`."""
    m = modifiers(instruction)
    if m.rest or m.order in ("release", "acq_rel"):
        raise unknown(instruction, f"modifier {m.rest or m.order}")
    arity(instruction, 2 + m.hint)
    targets = [
        slots.destination(t, m.width, instruction, wider=True)
        for t in items(instruction.operands[0])
    ]
    place = pointer(instruction.operands[1], slots, instruction)
    dtypes = [UNSIGNED[slots.width(t)] for t in targets]
    signed = m.type.startswith("s")
    if len(targets) != m.count:
        raise unknown(instruction, f"{len(targets)} destinations")

    def step(machine: Machine, group: Group) -> None:
        for part, space, addresses in by_space(machine, group, place, m.space):
            values = load(machine, part, space, addresses, m)
            columns = values.T if m.count > 1 else (values,)
            for target, dtype, column in zip(targets, dtypes, columns, strict=True):
                machine.assign_lanes(target, resize(column, dtype, signed), part)
            if m.strong:
                machine.atomics.read(part, space, addresses, m.scope, m.order == "acquire")

    return Action(step=step, shared_width=m.shared_width)


def resize(values: Bits, dtype: type[np.generic], signed: bool) -> Bits:
    """Extend or cut values to a register's width."""
    if values.dtype == dtype:
        return np.ascontiguousarray(values)
    if signed:
        values = np.ascontiguousarray(values).view(f"i{values.dtype.itemsize}")
        return values.astype(f"i{np.dtype(dtype).itemsize}").view(dtype)
    return values.astype(dtype)


def build_st(instruction: Instruction, slots: Slots) -> Action:
    """`st`."""
    m = modifiers(instruction)
    if m.rest or m.order in ("acquire", "acq_rel"):
        raise unknown(instruction, f"modifier {m.rest or m.order}")
    arity(instruction, 2 + m.hint)
    place = pointer(instruction.operands[0], slots, instruction)
    sources = [
        slots.source(s, m.width, instruction, wider=True) for s in items(instruction.operands[1])
    ]
    if len(sources) != m.count:
        raise unknown(instruction, f"{len(sources)} sources")

    def step(machine: Machine, group: Group) -> None:
        for part, space, addresses in by_space(machine, group, place, m.space):
            values = [resize(machine.value(s, part), UNSIGNED[m.width], False) for s in sources]
            if m.strong:
                machine.atomics.write(part, space, addresses, m.scope, m.order == "release")
            data = np.stack(values, axis=1) if m.count > 1 else values[0]
            store(machine, part, space, addresses, data, m.strong)

    return Action(step=step, shared_width=m.shared_width)


def build_cvta(instruction: Instruction, slots: Slots) -> Action:
    """`cvta`: between generic addresses and those of a space."""
    words = list(instruction.opcode[1:])
    to = words[0] == "to"
    space, kind = words[1:] if to else words
    if space not in _WINDOWS or kind not in ("u64", "u32"):
        raise unknown(instruction)
    window = _WINDOWS[space]
    width = int(kind[1:])
    arity(instruction, 2)
    if window and width == 32:
        raise unknown(instruction, "address of 32 bits")
    target = slots.destination(instruction.operands[0], width, instruction)
    source = slots.source(instruction.operands[1], width, instruction)
    shift = np.array([-window % 2**64 if to else window], dtype=np.uint64)

    def step(machine: Machine, group: Group) -> None:
        value = machine.read(source)
        machine.assign(target, value + shift if window else value, group)

    return Action(step=step)


# Atomics: what becomes of a cell, from its value and the operands.
_Update = Callable[..., Any]


def _wrap_inc(old: int, limit: int) -> int:
    return 0 if old >= limit else old + 1


def _wrap_dec(old: int, limit: int) -> int:
    return limit if old == 0 or old > limit else old - 1


_UPDATES: dict[str, _Update] = {
    "add": lambda old, b: old + b,
    "min": min,
    "max": max,
    "and": lambda old, b: old & b,
    "or": lambda old, b: old | b,
    "xor": lambda old, b: old ^ b,
    "exch": lambda old, b: b,
    "inc": _wrap_inc,
    "dec": _wrap_dec,
    "cas": lambda old, compare, b: b if old == compare else old,
}
_UPDATE_TYPES = {
    "add": ("u32", "s32", "u64", "f32"),
    "min": ("u32", "s32", "u64", "s64"), "max": ("u32", "s32", "u64", "s64"),
    "and": ("b32", "b64"), "or": ("b32", "b64"), "xor": ("b32", "b64"),
    "exch": ("b32", "b64"), "cas": ("b32", "b64"), "inc": ("u32",), "dec": ("u32",),
}  # fmt: skip


_ATOMIC = 64  # times what an access takes


def _flushed(value: float) -> float:
    """A subnormal as a zero of its sign: what `add.f32` on global memory makes of it."""
    return math.copysign(0.0, value) if abs(value) < 2.0**-126 else value


def build_atom(instruction: Instruction, slots: Slots) -> Action:
    """`atom` and `red`, on 32 and 64 bits of integers and `add.f32`."""
    m = modifiers(instruction)
    if m.order == "weak":
        m.order = "relaxed"
    if len(m.rest) != 1 or m.type not in _UPDATE_TYPES.get(m.rest[0], ()) or m.count != 1:
        raise unknown(instruction, f"modifiers {m.rest}")
    if instruction.opcode[0] == "red" and m.rest[0] in ("exch", "cas"):
        raise unknown(instruction)
    is_atom = instruction.opcode[0] == "atom"
    operands = instruction.operands[is_atom:]
    target = slots.sink(instruction.operands[0], m.width, instruction) if is_atom else None
    place = pointer(operands[0], slots, instruction)
    wanted = 2 if m.rest[0] == "cas" else 1
    values = operands[1 : 1 + wanted]
    if len(operands) != 1 + wanted + m.hint:
        raise unknown(instruction, f"{len(operands)} operands")
    sources = [slots.source(v, m.width, instruction) for v in values]
    update = _UPDATES[m.rest[0]]
    kind = "f4" if m.type == "f32" else ("i" if m.type[0] == "s" else "u") + str(m.width // 8)
    modulus = None if kind[0] == "f" else 1 << m.width

    def one(old: Any, arguments: list[Any], flush: bool) -> Any:
        if modulus is None:
            values = [_flushed(v) if flush else v for v in (old, *arguments)]
            total = np.float32(update(*values))
            return np.float32(_flushed(float(total))) if flush else total
        new = update(old, *arguments)
        new %= modulus
        return new - modulus if kind[0] == "i" and new >= modulus // 2 else new

    def step(machine: Machine, group: Group) -> None:
        for part, space, addresses in by_space(machine, group, place, m.space):
            if space not in ("global", "shared", "cluster"):
                raise machine.fault(f"atomic on {space} memory", int(part.lanes[0]))
            given = [machine.value(s, part).view(kind) for s in sources]
            olds = np.zeros(len(part), dtype=kind)
            cells = _cells(machine, part, space, addresses, kind)
            machine.progress.one_by_one(_ATOMIC * len(part))
            for i in range(len(part)):
                memory, at = cells(i)
                olds[i] = memory[at]
                memory[at] = one(memory[at].item(), [g[i].item() for g in given], space == "global")
                machine.progress.changes += memory[at] != olds[i]
            wrote = olds == given[0] if wanted == 2 else np.ones(len(part), dtype=bool)
            machine.atomics.update(part, space, addresses, m.scope, m.order, wrote)
            if target is not None:
                machine.assign_lanes(target, olds.view(UNSIGNED[m.width]), part)

    return Action(step=step, shared_width=m.shared_width)


def _cells(
    machine: Machine, group: Group, space: str, addresses: Addresses, kind: str
) -> Callable[[int], tuple[NDArray[Any], int]]:
    """Where each lane's cell lies, bounds checked."""
    size = int(kind[1:])
    try:
        if space == "global":
            note_global(machine, group.lanes, addresses, size, write=True, strong=True)
            return machine.context.memory.cells(addresses, kind)
        blocks, local = machine.shared_places(group.lanes, addresses, space)
        at = machine.shared.index(blocks, local, size)
        machine.shadowed(machine.shadow.update, group.lanes, at, addresses, size)
    except AccessError as error:
        raise machine.memory_fault(error, group.lanes, space) from None
    view = machine.shared.bytes.view(kind)
    return lambda i: (view, int(at[i]) // size)
