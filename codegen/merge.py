"""The identity of a kernel that merges parts of attention."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NoReturn

from gqa_cutlass.codegen.config import ARCHES, KernelConfig
from gqa_cutlass.codegen.schema.launch import NumberType
from gqa_cutlass.errors import ConfigError

TAGS = {NumberType.FLOAT32: "f32", NumberType.FLOAT16: "f16", NumberType.BFLOAT16: "bf16"}
_NUMBERS = {tag: number for number, tag in TAGS.items()}
_BYTES = {NumberType.FLOAT32: 4, NumberType.FLOAT16: 2, NumberType.BFLOAT16: 2}
_TAG = "|".join(_NUMBERS)
_NAME = re.compile(rf"gqa_merge_sm80_({_TAG})_({_TAG})_align([1248])_p([48])")
PARTS_AT_ONCE = (4, 8)
_VECTORS_AT_ONCE = 8  # of all these parts: more would not fit into the registers
_WIDEST_BYTES = 16
_MAX_REGISTERS = 80


@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """One kernel that merges. Two with equal configurations are the same kernel.

    Args:
        dtype: Element type of the parts' outputs.
        out_dtype: Element type of the merged output.
        vec_width: Elements per global memory access to the parts: 1, 2 or 4, and 8 of 16 bits.
            Every address must be a multiple of it.
        parts_at_once: Parts that a thread asks for together, 4 or 8: with 4, it has two vectors of
            a row, and two parts or four take no more than one latency of memory.

    Raises:
        ConfigError: A rule is broken; the message names it.
    """

    dtype: NumberType
    out_dtype: NumberType
    vec_width: int
    parts_at_once: int

    def __post_init__(self) -> None:
        for field, value in (("dtype", self.dtype), ("out_dtype", self.out_dtype)):
            if not isinstance(value, NumberType):
                _fail(field, value, "a NumberType")
        allowed = [width for width in (1, 2, 4, 8) if width <= widest(self.dtype)]
        if type(self.vec_width) is not int or self.vec_width not in allowed:
            _fail("vec_width", self.vec_width, f"one of {allowed} with {TAGS[self.dtype]}")
        if type(self.parts_at_once) is not int or self.parts_at_once not in PARTS_AT_ONCE:
            _fail("parts_at_once", self.parts_at_once, f"one of {list(PARTS_AT_ONCE)}")

    @property
    def name(self) -> str:
        """The kernel's name: file, symbol, manifest key and log entry."""
        parts, result = TAGS[self.dtype], TAGS[self.out_dtype]
        return f"gqa_merge_sm80_{parts}_{result}_align{self.vec_width}_p{self.parts_at_once}"

    @property
    def vectors(self) -> int:
        """Vectors of a row that a thread has."""
        return _VECTORS_AT_ONCE // self.parts_at_once

    @classmethod
    def from_name(cls, name: str) -> MergeConfig:
        """Parse what `name` produced.

        Raises:
            ConfigError: Not the name of a kernel that merges.
        """
        match = _NAME.fullmatch(name)
        if match is None:
            _fail("name", name, "names as `gqa-cutlass list` prints them")
        parts, result, width, at_once = match.groups()
        return cls(
            dtype=_NUMBERS[parts],
            out_dtype=_NUMBERS[result],
            vec_width=int(width),
            parts_at_once=int(at_once),
        )

    # What follows is as in `KernelConfig`.
    archs = tuple(ARCHES)
    ptx_arch = "compute_80"
    num_threads = 128
    shared_bytes = 0
    max_registers = _MAX_REGISTERS
    min_blocks = 65536 // (num_threads * _MAX_REGISTERS)
    pdl = False


Kernel = KernelConfig | MergeConfig  # what is rendered, compiled, stored and loaded


def widest(dtype: NumberType) -> int:
    """Elements per access at most."""
    return _WIDEST_BYTES // _BYTES[dtype]


def _fail(field: str, got: object, allowed: str) -> NoReturn:
    raise ConfigError(f"MergeConfig: {field}: got {got!r}; allowed: {allowed}")
