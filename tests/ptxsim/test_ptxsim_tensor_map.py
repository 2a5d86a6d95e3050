"""Tensor maps themselves: their bytes, and what the driver refuses."""

from __future__ import annotations

from typing import Any

import pytest
from tensor_copies import MAP

from gqa_cutlass.errors import InputError
from gqa_cutlass.tensormap import TensorMap

FINE: dict[str, Any] = {
    "address": 1 << 20, "element_bytes": 2, "sizes": (64, 9, 4), "strides": (128, 2048),
    "box": (64, 3, 2), "swizzle": 128,
}  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        {}, {"swizzle": 0, "box": (256, 256, 256)}, {"sizes": (1 << 32, 1, 1)},
        {"strides": (0, 16)}, {"strides": ((1 << 40) - 16, 0)},
        {"element_bytes": 8, "box": (16, 1, 1)}, {"sizes": (8,), "strides": (), "box": (8,)},
        {"sizes": (8, 1, 2, 3, 4), "strides": (16, 32, 48, 64), "box": (8, 1, 1, 1, 256)},
    ],
)  # fmt: skip
def test_a_tensor_map_survives_its_bytes(change: dict[str, Any]) -> None:
    made = TensorMap(**{**FINE, **change})
    data = made.to_bytes()
    assert len(data) == 128
    assert TensorMap.from_bytes(data) == made


@pytest.mark.parametrize(
    ("change", "essential"),
    [
        ({"address": (1 << 20) + 8}, "got address 0x100008; allowed: positive multiples of 16"),
        ({"address": 0}, "got address 0x0"),
        ({"element_bytes": 3}, "got elements of 3 bytes; allowed: .1, 2, 4, 8."),
        ({"sizes": (64, 0, 4)}, "got sizes .64, 0, 4.; allowed: 1 to 2.32"),
        ({"sizes": ((1 << 32) + 1, 1, 1)}, "got sizes"),
        ({"sizes": (), "strides": (), "box": ()}, "got 0 sizes"),
        ({"sizes": (1,) * 6, "strides": (16,) * 5, "box": (8,) * 6}, "got 6 sizes"),
        ({"strides": (128,)}, "got 3 sizes, 1 strides"),
        ({"box": (64, 3)}, "2 extents of the box"),
        ({"strides": (136, 2048)}, "got strides .136, 2048.; allowed: multiples of 16 bytes below"),
        ({"strides": (128, 1 << 40)}, "got strides"),
        ({"strides": (-128, 128)}, "got strides"),
        ({"box": (64, 257, 1)}, "got box .64, 257, 1.; allowed: 1 to 256"),
        ({"box": (64, 0, 1)}, "got box"),
        ({"box": (4, 1, 1)}, "got a box of 8 bytes in the innermost dimension; allowed: multiples"),
        ({"box": (72, 1, 1)}, "got a box of 144 bytes in the innermost dimension; allowed: up to"),
        ({"swizzle": 64}, "got a box of 128 bytes .*; allowed: up to 64 with this swizzle"),
        ({"swizzle": 48}, "got swizzle 48; allowed: .0, 32, 64, 128."),
    ],
    ids=str,
)
def test_a_tensor_map_that_the_driver_refuses(change: dict[str, Any], essential: str) -> None:
    with pytest.raises(InputError, match=essential):
        TensorMap(**{**FINE, **change})


@pytest.mark.parametrize(
    "data",
    [b"", bytes(128), b"gqaTMA", MAP.to_bytes()[:-1]],
    ids=["nothing", "zeros", "a beginning", "a byte less"],  # a map holds an address
)
def test_other_bytes_are_no_tensor_map(data: bytes) -> None:
    with pytest.raises(InputError, match="tensor map: got"):
        TensorMap.from_bytes(data)
