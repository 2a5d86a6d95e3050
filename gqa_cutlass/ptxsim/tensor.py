"""cp.async.bulk.tensor from global to shared memory, by a tensor map (PTX ISA 9.7.9.25.5).

What the ISA leaves open is as an H100 does it: rows of a box in shared memory start at multiples
of the swizzle's span, the swizzle goes by the bits of the address in the block, and a box that
starts within 16 bytes, or has another rank than the instruction, is an illegal instruction.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gqa_cutlass.errors import InputError
from gqa_cutlass.ptxsim.landing import BARRIER_BYTES, COMPLETES, aligned, keys, land, read_global
from gqa_cutlass.ptxsim.mbarrier import Ints
from gqa_cutlass.ptxsim.memory import (
    LOCAL_WINDOW,
    PARAM_WINDOW,
    SHARED_WINDOW,
    WINDOW_BYTES,
)
from gqa_cutlass.ptxsim.operands import pointer
from gqa_cutlass.ptxsim.program import Action, Slots, unknown
from gqa_cutlass.ptxsim.syntax import Address, Instruction
from gqa_cutlass.tensormap import TENSOR_MAP_ALIGN, TENSOR_MAP_BYTES, UNIT_BYTES, TensorMap

if TYPE_CHECKING:
    from gqa_cutlass.ptxsim.machine import Group, Machine

_TARGET_ALIGN = 128  # bytes
_SPACES = {"shared::cluster": "cluster", "shared::cta": "shared"}
_ROW_SHIFT, _PIECE_SHIFT = 7, 4  # of the address bits that a swizzle joins


def build_tensor(instruction: Instruction, slots: Slots) -> Action:
    """`cp.async.bulk.tensor`, to shared memory."""
    dimensions, to, *rest = instruction.opcode[4:]
    hint = rest[-1] == "L2::cache_hint"
    rest = [word for word in rest[: len(rest) - hint] if word != "tile"]
    if to not in _SPACES or rest != ["global", COMPLETES]:
        raise unknown(instruction)
    to_operand, what, barrier_operand, *_ = instruction.operands
    if len(instruction.operands) != 3 + hint or not isinstance(what, Address):
        raise unknown(instruction, "operands")
    if dimensions != f"{len(what.coordinates)}d" or not 1 <= len(what.coordinates) <= 5:
        raise unknown(instruction, f"number of coordinates, {len(what.coordinates)},")
    target = pointer(to_operand, slots, instruction)
    barrier = pointer(barrier_operand, slots, instruction)
    table = pointer(Address(what.base, what.offset), slots, instruction)
    starts = [slots.source(c, 32, instruction) for c in what.coordinates]

    def step(machine: Machine, group: Group) -> None:
        goals, bars = keys(machine, group, target, _SPACES[to]), keys(machine, group, barrier)
        addresses = table.addresses(machine, group).tolist()
        coordinates = np.stack([machine.value(s, group).view(np.int32) for s in starts], axis=1)
        for i, lane in enumerate(group.lanes.tolist()):
            aligned(machine, lane, bars[i], BARRIER_BYTES, "mbarrier")
            aligned(machine, lane, goals[i], _TARGET_ALIGN, "destination of a tensor copy")
            tensor = _tensor_map(machine, lane, addresses[i])
            data = _read(machine, lane, tensor, coordinates[i].tolist())
            places = _swizzled(goals[i][1] + _places(tensor), tensor.swizzle)
            source = machine.clocks.release_own(lane)
            land(machine, np.full(len(places), lane), goals[i][0], places, data, bars[i], source)

    return Action(step=step, shared_width=UNIT_BYTES)


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


def _read(machine: Machine, lane: int, tensor: TensorMap, start: list[int]) -> NDArray[np.uint64]:
    """The box at these coordinates in units of 16 bytes, zeros where it is not in the tensor."""
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
    where, inside = _sources(tensor, start)
    data = np.zeros((len(where), UNIT_BYTES), dtype=np.uint8)
    whole = inside == UNIT_BYTES
    if whole.any():
        data[whole] = read_global(machine, lane, where[whole], UNIT_BYTES, overread=True)
    ragged = (inside > 0) & ~whole
    if ragged.any():
        length = int(inside[ragged][0])  # the same wherever the innermost dimension ends
        unit = min(length & -length, 8)
        for at in range(0, length, unit):
            piece = read_global(machine, lane, where[ragged] + at, unit, overread=True)
            data[ragged, at : at + unit] = piece
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


def _places(tensor: TensorMap) -> Ints:
    """Where the box's units lie in shared memory before they change places, from its start."""
    units = np.arange(0, tensor.inner_bytes, UNIT_BYTES)
    count = int(np.prod(tensor.box[1:], dtype=np.int64))
    return (np.arange(count)[:, None] * tensor.row_pitch + units).reshape(-1)


def _swizzled(addresses: Ints, swizzle: int) -> Ints:
    """Addresses of units after they have changed places."""
    if not swizzle:
        return addresses
    rows = addresses >> _ROW_SHIFT & swizzle // UNIT_BYTES - 1
    return addresses ^ rows << _PIECE_SHIFT
