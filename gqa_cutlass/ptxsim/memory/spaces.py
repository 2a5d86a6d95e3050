"""Global and shared memory: real bytes, with the bounds of every tensor.

Global addresses are the host's own, so a kernel gets the very pointers that the tensors have.
Shared and local memory and the parameters lie in windows that no host address falls into.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gqa_cutlass.ptxsim.element.bits import Bits
from gqa_cutlass.ptxsim.program import UNSIGNED

SHARED_WINDOW = 1 << 60  # generic addresses; a block's own shared memory
LOCAL_WINDOW = 1 << 61
PARAM_WINDOW = 1 << 62
WINDOW_BYTES = 1 << 32
CLUSTER_SHIFT = 24  # a shared::cluster address: 1 + the block's rank, and the address in the block
_ALIGN = 16  # widest access

READ, WRITE = 1, 2
_FRESH = 4  # can be read once it has been written
OVERREAD = 8  # asynchronous copies may read what another thread writes meanwhile
Indices = NDArray[np.int64]


class AccessError(Exception):
    """An access that memory refuses: which lanes' access (a position), and why."""

    def __init__(self, position: int, address: int, why: str) -> None:
        super().__init__(why)
        self.position = position
        self.address = address


@dataclass(frozen=True, kw_only=True)
class Region:
    """A tensor, or another piece of global memory that a kernel may use.

    Args:
        name: What messages call it.
        address: Of its first element.
        shape: Elements in every dimension.
        strides: Bytes between neighbours in every dimension, not negative.
        itemsize: Bytes per element.
        readable: Whether the kernel may read it.
        writable: Whether it may write it.
        fresh: Its contents are not defined before the kernel writes them.
        overread: Asynchronous copies may read what another thread writes meanwhile: they bring
            whole tiles, of which the kernel discards what it has no business with.
        rows: Where only some rows may be touched: READ, WRITE and OVERREAD, and the rows that they
            are for, numbered through the first two dimensions.
    """

    name: str
    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    itemsize: int
    readable: bool = True
    writable: bool = False
    fresh: bool = False
    overread: bool = False
    rows: Mapping[int, Indices] | None = None

    @property
    def span(self) -> int:
        """Bytes from the first element's start to the last one's end."""
        if 0 in self.shape:
            return 0
        return self.itemsize + sum(
            (n - 1) * s for n, s in zip(self.shape, self.strides, strict=True)
        )

    @property
    def dense(self) -> bool:
        """Whether the elements fill the span, without a gap."""
        reach = self.itemsize
        for stride, size in sorted(zip(self.strides, self.shape, strict=True)):
            if size > 1 and stride > reach:
                return False
            reach += (size - 1) * stride
        return True

    def describe(self) -> str:
        """Name, size and place."""
        return f"{self.name} ({self.span} bytes at {self.address:#x})"

    def place(self, offset: int) -> str:
        """Where a byte lies that is not behind the end, in words."""
        found = f"at byte {offset} of {self.describe()}"
        if self.rows is None:
            return found
        index = [0] * len(self.shape)
        for i in sorted(range(len(index)), key=lambda i: -self.strides[i]):
            if self.shape[i] > 1:
                index[i], offset = divmod(offset, max(self.strides[i], 1))
        return f"{found}, in row {index[1]} of page {index[0]}"


class _Segment:
    """Regions that share memory, or one alone: a view of bytes, and who may touch which."""

    def __init__(self, regions: Sequence[Region]) -> None:
        self.regions = regions
        self.start = min(r.address for r in regions)
        self.end = max(r.address + r.span for r in regions)
        self.base = self.start - self.start % _ALIGN
        length = -(-(self.end - self.base) // _ALIGN) * _ALIGN
        raw = (ctypes.c_uint8 * length).from_address(self.base)
        self.bytes: NDArray[np.uint8] = np.ctypeslib.as_array(raw)
        self.allowed = self._allowed()

    def _allowed(self) -> NDArray[np.uint8] | int:
        """What is allowed: one answer for all bytes, or one for each."""
        first = self.regions[0]
        if len(self.regions) == 1 and first.dense and not first.fresh and first.rows is None:
            return READ * first.readable | WRITE * first.writable
        allowed = np.zeros(len(self.bytes), dtype=np.uint8)
        for r in self.regions:
            flags = WRITE * r.writable
            if r.readable:
                flags |= _FRESH if r.fresh else READ
            # Once where a dimension is expanded: there may be very many copies.
            shape = [n if s else 1 for n, s in zip(r.shape, r.strides, strict=True)]
            cells = np.lib.stride_tricks.as_strided(
                allowed[r.address - self.base :], (*shape, r.itemsize), (*r.strides, 1)
            )
            if r.rows is None:
                cells |= flags
                continue
            for some, rows in r.rows.items():  # pools are large, and few of their pages in use
                i, j = np.divmod(rows, r.shape[1])
                cells[np.minimum(i, shape[0] - 1), np.minimum(j, shape[1] - 1)] |= some
        return allowed

    def view(self, width: int, count: int) -> NDArray[Any]:
        """The bytes as elements of `width` bits, or rows of `count` of them."""
        elements = self.bytes.view(UNSIGNED[width])
        return elements.reshape(-1, count) if count > 1 else elements

    def check(self, addresses: Indices, size: int, wanted: int) -> int | None:
        """Position of the first access that is not allowed."""
        if isinstance(self.allowed, int):
            return None if self.allowed & wanted == wanted else 0
        width, count = min(size, 8), max(1, size // 8)
        cells = self.allowed.view(UNSIGNED[8 * width]).reshape(-1, count)
        asked = np.frombuffer(bytes([wanted]) * width, dtype=cells.dtype)
        wrong = ((cells[(addresses - self.base) // size] & asked) != asked).any(axis=1)
        return int(wrong.argmax()) if wrong.any() else None

    def written(self, addresses: Indices, size: int) -> None:
        """What was written can be read from now on."""
        if not isinstance(self.allowed, int):
            at = addresses - self.base
            cells = at[:, None] + np.arange(size)
            self.allowed[cells] |= (self.allowed[cells] & _FRESH) // _FRESH * READ


class GlobalMemory:
    """All regions of a launch.

    Args:
        regions: May share memory with one another; then a byte allows what any of them allows.
    """

    def __init__(self, regions: Sequence[Region]) -> None:
        self.regions = [r for r in regions if r.span]
        self.segments = [_Segment(group) for group in _overlapping(self.regions)]
        self._starts = np.array([s.start for s in self.segments], dtype=np.int64)

    def load(self, addresses: Indices, width: int, count: int) -> Bits:
        """Read `count` elements of `width` bits at every address.

        Returns:
            [n] or, for count > 1, [n, count].

        Raises:
            AccessError: Outside all tensors, or not readable.
        """
        size = width * count // 8
        shape = (len(addresses), count) if count > 1 else (len(addresses),)
        parts = self._split(addresses, size, READ)
        if len(parts) == 1:
            segment, _ = parts[0]
            return _gather(segment, addresses, width, count)
        result = np.zeros(shape, dtype=UNSIGNED[width])
        for segment, at in parts:
            result[at] = _gather(segment, addresses[at], width, count)
        return result

    def store(self, addresses: Indices, values: Bits) -> None:
        """Write values, [n] or [n, count].

        Raises:
            AccessError: Outside all tensors, or not writable.
        """
        count = values.shape[1] if values.ndim > 1 else 1
        width = values.dtype.itemsize * 8
        size = width * count // 8
        for segment, at in self._split(addresses, size, WRITE):
            some, data = addresses[at], values[at]
            segment.view(width, count)[(some - segment.base) // size] = data
            segment.written(some, size)

    def cells(self, addresses: Indices, kind: str) -> Callable[[int], tuple[NDArray[Any], int]]:
        """Where single elements of a NumPy type lie, to be read and written one after another.

        Returns:
            From the position of an address, an array and an index into it.

        Raises:
            AccessError: Outside all tensors, or not both readable and writable.
        """
        size = int(kind[1:])
        self._split(addresses, size, READ | WRITE)

        def cell(i: int) -> tuple[NDArray[Any], int]:
            address = int(addresses[i])
            segment = self.segments[int(np.searchsorted(self._starts, address, "right")) - 1]
            return segment.bytes.view(kind), (address - segment.base) // size

        return cell

    def check_read(self, addresses: Indices, size: int) -> None:
        """Refuse what `load` of `size` bytes at every address would refuse.

        Raises:
            AccessError: Outside all tensors, or not readable.
        """
        self._split(addresses, size, READ)

    def overread(self, addresses: Indices) -> NDArray[np.bool_]:
        """Which addresses tensor copies may read while they are written."""
        found = np.zeros(len(addresses), dtype=bool)
        for r in self.regions:
            if r.overread:
                inside = (addresses >= r.address) & (addresses < r.address + r.span)
                found |= inside if r.rows is None else self._marked(addresses, inside)
        return found

    def _marked(self, addresses: Indices, inside: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Which of some addresses are of rows marked OVERREAD, where all that are inside is one."""
        found = np.zeros(len(addresses), dtype=bool)
        some = addresses[inside]
        if len(some):
            segment = self.segments[int(np.searchsorted(self._starts, some[0], "right")) - 1]
            found[inside] = (np.asarray(segment.allowed)[some - segment.base] & OVERREAD) > 0
        return found

    def locate(self, address: int) -> str:
        """Where an address lies, in words."""
        address %= 1 << 64
        near = sorted(self.regions, key=lambda r: _distance(r, address))
        if not near:
            return "no tensor was given"
        r = near[0]
        if address < r.address:
            return f"{r.address - address} bytes before {r.describe()}"
        if address >= r.address + r.span:
            return f"{address - r.address - r.span} bytes past the end of {r.describe()}"
        return r.place(address - r.address)

    def _split(
        self, addresses: Indices, size: int, wanted: int
    ) -> list[tuple[_Segment, Indices | slice]]:
        """Accesses by segment, all of them checked."""
        if len(addresses) == 0:
            return []
        if not self.segments:
            raise AccessError(0, int(addresses[0]), "outside all tensors")
        misaligned = addresses & (size - 1)
        if misaligned.any():
            position = int(misaligned.argmax())
            raise AccessError(position, int(addresses[position]), f"not a multiple of {size} bytes")
        low, high = int(addresses.min()), int(addresses.max()) + size
        first = max(0, int(np.searchsorted(self._starts, low, "right")) - 1)
        segment = self.segments[first]
        if segment.start <= low and high <= segment.end:
            self._check(segment, addresses, size, wanted, None)
            return [(segment, slice(None))]
        index = np.searchsorted(self._starts, addresses, "right") - 1
        parts: list[tuple[_Segment, Indices | slice]] = []
        for i in np.unique(index):
            at = np.flatnonzero(index == i)
            segment = self.segments[max(0, int(i))]
            # Not from the addresses' end, which may be too large a number.
            outside = (addresses[at] < segment.start) | (addresses[at] > segment.end - size)
            if outside.any():
                position = int(at[outside.argmax()])
                raise AccessError(position, int(addresses[position]), "outside all tensors")
            self._check(segment, addresses[at], size, wanted, at)
            parts.append((segment, at))
        return parts

    def _check(
        self, segment: _Segment, addresses: Indices, size: int, wanted: int, at: Indices | None
    ) -> None:
        wrong = segment.check(addresses, size, wanted)
        if wrong is None:
            return
        address = int(addresses[wrong])
        inside = [r for r in segment.regions if r.address <= address < r.address + r.span]
        why = "outside all tensors"
        if inside and wanted & WRITE and not any(r.writable for r in inside):
            why = "not to be written"
        elif inside and wanted & READ and not any(r.readable for r in inside):
            why = "not to be read"
        elif any(r.fresh for r in inside) and wanted & READ:
            why = "never written before"
        elif any(r.rows is not None for r in inside):
            does = "write" if wanted & WRITE else "read"
            why = f"in no row of its pages that this launch may {does}"
        raise AccessError(wrong if at is None else int(at[wrong]), address, why)


def _gather(segment: _Segment, addresses: Indices, width: int, count: int) -> NDArray[Any]:
    rows: NDArray[Any] = segment.view(width, count)[
        (addresses - segment.base) // (width * count // 8)
    ]
    return rows


def _distance(region: Region, address: int) -> int:
    return max(region.address - address, address - region.address - region.span + 1, 0)


def _overlapping(regions: Sequence[Region]) -> list[list[Region]]:
    """Regions in the order of their addresses, those that share memory together."""
    groups: list[list[Region]] = []
    end = -1
    for region in sorted(regions, key=lambda r: r.address):
        if groups and region.address < end:
            groups[-1].append(region)
        else:
            groups.append([region])
        end = max(end, region.address + region.span)
    return groups


class SharedMemory:
    """The shared memory of the blocks that run together.

    Args:
        blocks: How many blocks.
        base: Address of the first byte; addresses below are not a block's to use.
        size: Bytes of a block.
    """

    def __init__(self, blocks: int, base: int, size: int) -> None:
        self.base = base
        self.size = size
        self.pitch = -(-(base + size) // 128) * 128
        self.bytes = np.zeros(blocks * self.pitch, dtype=np.uint8)

    def index(self, blocks: Indices, addresses: Indices, size: int) -> Indices:
        """Positions in `bytes` of accesses of `size` bytes.

        Raises:
            AccessError: Outside the block's shared memory, or misaligned.
        """
        wrong = (addresses < self.base) | (addresses > self.base + self.size - size)
        if wrong.any():
            position = int(wrong.argmax())
            raise AccessError(
                position,
                int(addresses[position]),
                f"outside the block's {self.size} bytes of shared memory at {self.base:#x}",
            )
        misaligned = addresses & (size - 1)
        if misaligned.any():
            position = int(misaligned.argmax())
            raise AccessError(position, int(addresses[position]), f"not a multiple of {size} bytes")
        return blocks * self.pitch + addresses

    def load(self, at: Indices, width: int, count: int) -> NDArray[Any]:
        """Read `count` elements of `width` bits at every position."""
        rows: NDArray[Any] = self._view(width, count)[at // (width * count // 8)]
        return rows

    def store(self, at: Indices, values: NDArray[Any]) -> None:
        """Write values, [n] or [n, count]."""
        count = values.shape[1] if values.ndim > 1 else 1
        width = values.dtype.itemsize * 8
        self._view(width, count)[at // (width * count // 8)] = values

    def _view(self, width: int, count: int) -> NDArray[Any]:
        elements = self.bytes.view(UNSIGNED[width])
        return elements.reshape(-1, count) if count > 1 else elements
