"""Tensor maps: what the TMA unit is told of a tensor, as cuTensorMapEncodeTiled takes it.

Traversal strides are 1, nothing is interleaved, and what lies outside the tensor reads as zero.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from gqa_cutlass.codegen.schema.params import TENSOR_MAP_BYTES
from gqa_cutlass.codegen.schema.storage import BOX_DIMS
from gqa_cutlass.errors import InputError

UNIT_BYTES = 16  # what the TMA unit moves at a time, and the least alignment in global memory
MAX_RANK = 5
_MAGIC = b"gqaTMA\0\1"
# Magic, address, element bytes, rank, swizzle; box, sizes and strides, with zeros beyond the rank.
_LAYOUT = struct.Struct(f"<8sQBBH{MAX_RANK}H2x{MAX_RANK}Q{MAX_RANK - 1}Q24x")
_ELEMENT_BYTES = (1, 2, 4, 8)
_SWIZZLES = (0, 32, 64, 128)
_MAX_SIZE, _MAX_STRIDE, _MAX_BOX = 1 << 32, 1 << 40, 256


@dataclass(frozen=True, kw_only=True)
class TensorMap:
    """A tensor in global memory, and the box of it that one copy brings.

    Args:
        address: Of the first element, a multiple of 16.
        element_bytes: Bytes of an element: 1, 2, 4 or 8.
        sizes: Elements in every dimension, innermost first; 1 to 5 dimensions.
        strides: Bytes between neighbours in every dimension but the innermost, multiples of 16.
        box: Elements of the box in every dimension, 1 to 256.
        swizzle: Bytes in which 16-byte pieces of shared memory change places: 0, 32, 64 or 128.

    Raises:
        InputError: The CUDA driver would not take it.
    """

    address: int
    element_bytes: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    swizzle: int

    def __post_init__(self) -> None:
        for wrong, got, allowed in self._rules():
            if wrong:
                raise InputError(
                    f"tensor map: got {got}; allowed: {allowed}. Copy the tensor into memory that "
                    "fits, or load it without TMA."
                )

    def _rules(self) -> list[tuple[bool, str, str]]:
        """What may be wrong: whether it is, what was given, what is allowed."""
        rank = len(self.sizes)
        if not 1 <= rank <= MAX_RANK or (len(self.strides), len(self.box)) != (rank - 1, rank):
            given = f"{rank} sizes, {len(self.strides)} strides, {len(self.box)} extents of the box"
            allowed = f"1 to {MAX_RANK} sizes, one stride fewer, as many extents"
            return [(True, given, allowed)]
        inner, span = self.inner_bytes, self.swizzle or _MAX_BOX * max(_ELEMENT_BYTES)
        address = self.address
        return [
            (self.element_bytes not in _ELEMENT_BYTES, f"elements of {self.element_bytes} bytes",
             f"{_ELEMENT_BYTES}"),
            (self.swizzle not in _SWIZZLES, f"swizzle {self.swizzle}", f"{_SWIZZLES}"),
            (not 0 < address < 1 << 63 or address % UNIT_BYTES != 0, f"address {address:#x}",
             f"positive multiples of {UNIT_BYTES}"),
            (any(s < 0 or s >= _MAX_STRIDE or s % UNIT_BYTES for s in self.strides),
             f"strides {self.strides}", f"multiples of {UNIT_BYTES} bytes below 2^40"),
            (any(not 1 <= n <= _MAX_SIZE for n in self.sizes), f"sizes {self.sizes}", "1 to 2^32"),
            (any(not 1 <= n <= _MAX_BOX for n in self.box), f"box {self.box}", f"1 to {_MAX_BOX}"),
            (inner % UNIT_BYTES != 0, f"a box of {inner} bytes in the innermost dimension",
             f"multiples of {UNIT_BYTES}"),
            (inner > span, f"a box of {inner} bytes in the innermost dimension",
             f"up to {span} with this swizzle"),
        ]  # fmt: skip

    @property
    def rank(self) -> int:
        """Dimensions."""
        return len(self.sizes)

    @property
    def inner_bytes(self) -> int:
        """Bytes of the box in the innermost dimension."""
        return self.box[0] * self.element_bytes

    @property
    def row_pitch(self) -> int:
        """Bytes between the box's rows in shared memory: with a swizzle its span, however short."""
        return self.swizzle or self.inner_bytes

    def to_bytes(self) -> bytes:
        """Encode for ptxsim, as long as the driver's own encoding, which is not public."""
        return _LAYOUT.pack(
            _MAGIC, self.address, self.element_bytes, self.rank, self.swizzle,
            *_filled(self.box, MAX_RANK), *_filled(self.sizes, MAX_RANK),
            *_filled(self.strides, MAX_RANK - 1),
        )  # fmt: skip

    @classmethod
    def from_bytes(cls, data: bytes) -> TensorMap:
        """Decode what `to_bytes` gave.

        Args:
            data: 128 bytes.

        Raises:
            InputError: They are no such encoding.
        """
        if len(data) != TENSOR_MAP_BYTES or not data.startswith(_MAGIC):
            raise InputError(
                f"tensor map: got {len(data)} bytes that start with {data[:8].hex()}; allowed: the "
                f"{TENSOR_MAP_BYTES} bytes of TensorMap.to_bytes(). Check the address they are at."
            )
        _, address, element_bytes, rank, swizzle, *rest = _LAYOUT.unpack(data)
        box, sizes, strides = rest[:MAX_RANK], rest[MAX_RANK : 2 * MAX_RANK], rest[2 * MAX_RANK :]
        found = cls(
            address=address, element_bytes=element_bytes, sizes=tuple(sizes[:rank]),
            strides=tuple(strides[: max(rank - 1, 0)]), box=tuple(box[:rank]), swizzle=swizzle,
        )  # fmt: skip
        if found.to_bytes() != data:
            raise InputError(
                "tensor map: got bytes beyond those of its dimensions; allowed: zeros. Check that "
                "nothing was written over it."
            )
        return found


def map_of(
    address: int, shape: Sequence[int], strides: Sequence[int], itemsize: int, tokens: int
) -> TensorMap:
    """The tensor map of a cache, as load_tma.cuh wants it.

    Boxes are 64 dims wide. Where head_dim is a multiple of that, it is two dimensions of the map,
    so that one copy brings whole rows; otherwise the last box of a row reaches beyond head_dim.

    Args:
        address: Of the cache.
        shape: [batch, max_seq_len, num_kv_heads, head_dim], or [num_pages, page_size, ...].
        strides: Its strides, in elements.
        itemsize: Bytes of an element.
        tokens: Those of a box.
    """
    batch, max_seq_len, num_kv_heads, head_dim = shape
    to_sequence, to_token, to_head = [
        # Where there is nothing to step to, what was given need be no multiple of 16 bytes.
        itemsize * (stride if length > 1 else head_dim)
        for length, stride in zip(shape[:3], strides[:3], strict=True)
    ]
    columns, span = BOX_DIMS, BOX_DIMS * itemsize
    whole = head_dim % columns == 0
    boxes = head_dim // columns
    return TensorMap(
        address=address,
        element_bytes=itemsize,
        sizes=(
            (columns, max_seq_len, boxes, num_kv_heads, batch)
            if whole
            else (head_dim, max_seq_len, num_kv_heads, batch)
        ),
        strides=(to_token, *([span] if whole else []), to_head, to_sequence),
        box=(columns, tokens, *([boxes] if whole else []), 1, 1),
        swizzle=span,
    )


def _filled(values: tuple[int, ...], count: int) -> tuple[int, ...]:
    return values + (0,) * (count - len(values))
