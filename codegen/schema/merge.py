"""The argument of kernels that merge parts of attention: a row per field."""

from __future__ import annotations

import ctypes

from gqa_cutlass.codegen.schema.rounding import reciprocal
from gqa_cutlass.codegen.schema.structs import (
    INT32,
    INT64,
    UINT32,
    Field,
    Struct,
    Type,
    array,
    pointer,
)

DIVISOR = Struct(
    cpp="Divisor",
    c="gqa_divisor",
    doc="A number by which others below 2^31 are divided: times the multiplier, shifted right.",
    fields=tuple(Field(name=name, type=UINT32) for name in ("number", "multiplier", "shift")),
)


class Divisor(ctypes.Structure):
    """A number to divide by."""

    _fields_ = DIVISOR.ctypes_fields()


def divisor(number: int) -> Divisor:
    """What divides numbers below 2^31 by one from 1 to 2^31; see `reciprocal`."""
    return Divisor(number, *reciprocal(number))


_DIVISOR = Type(cpp=DIVISOR.cpp, c=DIVISOR.c, ctype=Divisor)
MAX_PARTS = 16  # that may lie anywhere; more lie as far apart as the first of them

_FIELDS = tuple(
    Field(name=name, type=kind, doc=doc)
    for name, kind, doc in (
        ("num_threads", UINT32, ""),
        ("row_vectors", UINT32, "of one head and token"),
        ("row_threads", _DIVISOR, "which have one or two of them each"),
        ("num_heads", _DIVISOR, ""),
        ("num_tokens", _DIVISOR, ""),
        ("num_parts", INT32, ""),
        ("out_batch", INT64, "distances in elements between neighbours in a part's output"),
        ("out_token", INT64, ""),
        ("out_head", INT64, ""),
        ("lse_batch", INT64, "the same of a part's log-sum-exps"),
        ("lse_head", INT64, ""),
        ("lse_token", INT64, ""),
        ("outs_step", INT64, "from a part to the one as many as `outs` holds behind it"),
        ("lses_step", INT64, ""),
        ("out", pointer("void"), "[batch, num_tokens, num_heads, head_dim] contiguous"),
        ("lse", pointer("float"), "[batch, num_heads, num_tokens] contiguous"),
        ("outs", array(pointer("void", const=True), MAX_PARTS), "the first parts' outputs"),
        ("lses", array(pointer("float", const=True), MAX_PARTS), "and their log-sum-exps"),
    )
)
MERGE_PARAMS = Struct(
    cpp="MergeParams",
    c="gqa_merge_params",
    doc="What a launch that merges is told.",
    fields=_FIELDS,
)


class MergeParams(ctypes.Structure):
    """The argument of kernels that merge."""

    _fields_ = MERGE_PARAMS.ctypes_fields()
