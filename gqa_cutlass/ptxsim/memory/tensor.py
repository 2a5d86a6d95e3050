"""cp.async.bulk.tensor from global to shared memory, by a tensor map (PTX ISA 9.7.9.25.5).

Prefetches to L2 go by the same maps and coordinates, and copy nothing.

What the ISA leaves open is as an H100 does it: rows of a box in shared memory start at multiples
of the swizzle's span, the swizzle goes by the bits of the address in the block, and a box that
starts within 16 bytes, or has another rank than the instruction, is an illegal instruction.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gqa_cutlass.codegen.schema.params import TENSOR_MAP_ALIGN, TENSOR_MAP_BYTES
from gqa_cutlass.errors import InputError
from gqa_cutlass.ptxsim import limits
from gqa_cutlass.ptxsim.memory.landing import (
    BARRIER_BYTES,
    COMPLETES,
    aligned,
    check_global,
    keys,
    land,
    read_global,
)
from gqa_cutlass.ptxsim.memory.spaces import (
    LOCAL_WINDOW,
    PARAM_WINDOW,
    SHARED_WINDOW,
    WINDOW_BYTES,
)
from gqa_cutlass.ptxsim.operands import Pointer, arity, pointer
from gqa_cutlass.ptxsim.order.mbarrier import Ints
from gqa_cutlass.ptxsim.program import Action, Slots, unknown
from gqa_cutlass.ptxsim.text.syntax import Address, Instruction, Operand
from gqa_cutlass.tensormap import UNIT_BYTES, TensorMap

if TYPE_CHECKING:
    from gqa_cutlass.ptxsim.group import Group
    from gqa_cutlass.ptxsim.machine import Machine

_TARGET_ALIGN = 128  # bytes
_SPACES = {"shared::cluster": "cluster", "shared::cta": "shared"}
_ROW_SHIFT, _PIECE_SHIFT = 7, 4  # of the address bits that a swizzle joins


@dataclass(frozen=True, kw_only=True)
class _Boxes:
    """The operand [map, {coordinates}].

    Args:
        table: Where the tensor map lies.
        starts: Slots of the coordinates, innermost first.
    """

    table: Pointer
    starts: list[int]

    def of(self, machine: Machine, group: Group) -> Iterator[tuple[int, TensorMap, list[int]]]:
        """Every lane of a group with its tensor map and its coordinates, which fit the map."""
        addresses = self.table.addresses(machine, group).tolist()
        values = [machine.value(s, group).view(np.int32) for s in self.starts]
        coordinates = np.stack(values, axis=1).tolist()
        for lane, address, start in zip(group.lanes.tolist(), addresses, coordinates, strict=True):
            tensor = _tensor_map(machine, lane, address)
            _check_map(machine, lane, tensor)
            _check_start(machine, lane, tensor, start)
            yield lane, tensor, start


def build_tensor(instruction: Instruction, slots: Slots) -> Action:
    """`cp.async.bulk.tensor`, to shared memory."""
    dimensions, to, *rest = instruction.opcode[4:]
    rest, hint = _without_options(rest)
    if to not in _SPACES or rest != ["global", COMPLETES]:
        raise unknown(instruction)
    arity(instruction, 3 + hint)
    boxes = _boxes(instruction.operands[1], dimensions, slots, instruction)
    target, barrier = (pointer(instruction.operands[i], slots, instruction) for i in (0, 2))

    def step(machine: Machine, group: Group) -> None:
        goals, bars = keys(machine, group, target, _SPACES[to]), keys(machine, group, barrier)
        for goal, bar, (lane, tensor, start) in zip(
            goals, bars, boxes.of(machine, group), strict=True
        ):
            aligned(machine, lane, bar, BARRIER_BYTES, "mbarrier")
            aligned(machine, lane, goal, _TARGET_ALIGN, "destination of a tensor copy")
            data = _read(machine, lane, tensor, start)
            places = _swizzled(goal[1] + _places(tensor), tensor.swizzle)
            source = machine.clocks.release_own(lane)
            land(machine, np.full(len(places), lane), goal[0], places, data, bar, source)

    return Action(step=step, shared_width=UNIT_BYTES)


def build_tensor_prefetch(instruction: Instruction, slots: Slots) -> Action:
    """`cp.async.bulk.prefetch.tensor`: reads the map; what that asks for must be there."""
    dimensions, *rest = instruction.opcode[5:]
    rest, hint = _without_options(rest)
    if rest != ["L2", "global"]:
        raise unknown(instruction)
    arity(instruction, 1 + hint)
    boxes = _boxes(instruction.operands[0], dimensions, slots, instruction)

    def step(machine: Machine, group: Group) -> None:
        for lane, tensor, start in boxes.of(machine, group):
            for piece in _pieces(*_sources(tensor, start)):
                check_global(machine, lane, piece.where, piece.size)

    return Action(step=step)


def _without_options(words: list[str]) -> tuple[list[str], bool]:
    """Modifiers without `tile`, which is the default, and whether a cache policy was the last."""
    hint = words[-1] == "L2::cache_hint"
    return [word for word in words[: len(words) - hint] if word != "tile"], hint


def _boxes(operand: Operand, dimensions: str, slots: Slots, instruction: Instruction) -> _Boxes:
    if not isinstance(operand, Address):
        raise unknown(instruction, "operands")
    count = len(operand.coordinates)
    if dimensions != f"{count}d" or not 1 <= count <= 5:
        raise unknown(instruction, f"number of coordinates, {count},")
    return _Boxes(
        table=pointer(Address(operand.base, operand.offset), slots, instruction),
        starts=[slots.source(c, 32, instruction) for c in operand.coordinates],
    )


def _tensor_map(machine: Machine, lane: int, address: int) -> TensorMap:
    """The tensor map at a generic address: in the parameters, or in global memory."""
    if address % TENSOR_MAP_ALIGN:
        raise machine.fault(
            f"tensor map not at a multiple of {TENSOR_MAP_ALIGN} bytes", lane, address
        )
    window = address & -WINDOW_BYTES
    if window in (SHARED_WINDOW, LOCAL_WINDOW):
        raise machine.fault("tensor map in neither parameters nor global memory", lane, address)
    if window == PARAM_WINDOW:
        start = address - PARAM_WINDOW
        data = machine.context.params[start : start + TENSOR_MAP_BYTES].tobytes()
    else:
        where = address + np.arange(0, TENSOR_MAP_BYTES, UNIT_BYTES)
        data = read_global(machine, lane, where, UNIT_BYTES, overread=True).tobytes()
    try:
        return TensorMap.from_bytes(data)
    except InputError as error:
        raise machine.fault(f"no tensor map there ({error})", lane, address) from None


def _check_map(machine: Machine, lane: int, tensor: TensorMap) -> None:
    """Refuse a tensor that no memory holds, and a box that no shared memory does."""
    reach = sum((n - 1) * s for n, s in zip(tensor.sizes[1:], tensor.strides, strict=True))
    end = tensor.address + reach + tensor.sizes[0] * tensor.element_bytes
    if end > 1 << 63:
        raise machine.fault(f"tensor map of a tensor that ends at {end:#x}", lane)
    box = tensor.row_pitch * math.prod(tensor.box[1:])
    if box > limits.SHARED:
        raise machine.fault(
            f"tensor map with a box of {box} bytes; allowed: up to {limits.SHARED}", lane
        )


def _check_start(machine: Machine, lane: int, tensor: TensorMap, start: list[int]) -> None:
    """Refuse coordinates that do not fit the tensor map."""
    first = start[0] * tensor.element_bytes
    if len(start) != tensor.rank:
        raise machine.fault(
            f"tensor map of {tensor.rank} dimensions, and coordinates of {len(start)}", lane
        )
    if first % UNIT_BYTES:
        raise machine.fault(
            f"innermost coordinate {start[0]}, byte {first}; allowed: multiples of "
            f"{UNIT_BYTES} bytes",
            lane,
        )


def _read(machine: Machine, lane: int, tensor: TensorMap, start: list[int]) -> NDArray[np.uint64]:
    """The box at these coordinates in units of 16 bytes, zeros where it is not in the tensor."""
    where, inside = _sources(tensor, start)
    data = np.zeros((len(where), UNIT_BYTES), dtype=np.uint8)
    for piece in _pieces(where, inside):
        found = read_global(machine, lane, piece.where, piece.size, overread=True)
        data[piece.units, piece.at : piece.at + piece.size] = found
    return data.view(np.uint64)


def _sources(tensor: TensorMap, start: list[int]) -> tuple[Ints, Ints]:
    """Addresses of the box's units in global memory, and how many bytes of each are inside."""
    rows = np.array([tensor.address])
    fine = np.ones(1, dtype=bool)
    for first, count, size, stride in zip(
        start[1:], tensor.box[1:], tensor.sizes[1:], tensor.strides, strict=True
    ):
        index = first + np.arange(count)
        rows = ((index * stride)[:, None] + rows).reshape(-1)
        fine = (((index >= 0) & (index < size))[:, None] & fine).reshape(-1)
    column = start[0] * tensor.element_bytes + np.arange(0, tensor.inner_bytes, UNIT_BYTES)
    left = np.clip(tensor.sizes[0] * tensor.element_bytes - column, 0, UNIT_BYTES) * (column >= 0)
    return (rows[:, None] + column).reshape(-1), (fine[:, None] * left).reshape(-1)


@dataclass(frozen=True, kw_only=True)
class _Piece:
    """Bytes of a box that are in the tensor, to be read at once.

    Args:
        units: [n], of which of the box's units.
        at: Their first byte in the unit.
        where: [n], their addresses in global memory.
        size: How many of each.
    """

    units: Ints
    at: int
    where: Ints
    size: int


def _pieces(where: Ints, inside: Ints) -> Iterator[_Piece]:
    """What of a box is in the tensor, from what `_sources` returns."""
    whole = np.flatnonzero(inside == UNIT_BYTES)
    if len(whole):
        yield _Piece(units=whole, at=0, where=where[whole], size=UNIT_BYTES)
    ragged = np.flatnonzero((inside > 0) & (inside < UNIT_BYTES))
    if len(ragged):
        length = int(inside[ragged[0]])  # the same wherever the innermost dimension ends
        size = min(length & -length, 8)
        for at in range(0, length, size):
            yield _Piece(units=ragged, at=at, where=where[ragged] + at, size=size)


def _places(tensor: TensorMap) -> Ints:
    """Where the box's units lie in shared memory before they change places, from its start."""
    units = np.arange(0, tensor.inner_bytes, UNIT_BYTES)
    count = math.prod(tensor.box[1:])
    return (np.arange(count)[:, None] * tensor.row_pitch + units).reshape(-1)


def _swizzled(addresses: Ints, swizzle: int) -> Ints:
    """Addresses of units after they have changed places."""
    if not swizzle:
        return addresses
    rows = addresses >> _ROW_SHIFT & swizzle // UNIT_BYTES - 1
    return addresses ^ rows << _PIECE_SHIFT
