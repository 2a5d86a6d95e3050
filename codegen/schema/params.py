"""The kernels' one argument: a row per field."""

from __future__ import annotations

import ctypes

from gqa_cutlass.codegen.schema.launch import Pdl
from gqa_cutlass.codegen.schema.policies import POLICIES
from gqa_cutlass.codegen.schema.structs import FLOAT, INT32, INT64, Field, Struct, Type, pointer

TENSOR_MAP_BYTES = 128
TENSOR_MAP_ALIGN = 64
_MAP_ALIGN_IN_C = 128  # CUtensorMap's since CUDA 13

ROW_STRIDES = Struct(
    cpp="RowStrides",
    c="gqa_row_strides",
    doc="Distances between neighbours, in elements. The head dimension itself is contiguous.",
    fields=tuple(Field(name=name, type=INT64) for name in ("batch", "head")),
)
CACHE_STRIDES = Struct(
    cpp="CacheStrides",
    c="gqa_cache_strides",
    doc="The same of a cache.",
    fields=tuple(Field(name=name, type=INT64) for name in ("batch", "token", "head")),
)


class RowStrides(ctypes.Structure):
    """Distances between neighbours, in elements."""

    _fields_ = ROW_STRIDES.ctypes_fields()


class CacheStrides(ctypes.Structure):
    """Distances between neighbours, in elements."""

    _fields_ = CACHE_STRIDES.ctypes_fields()


_PDL = Type(cpp=Pdl.__name__, c="int32_t", ctype=ctypes.c_int32)
_ROW = Type(cpp=ROW_STRIDES.cpp, c=ROW_STRIDES.c, ctype=RowStrides)
_CACHE = Type(cpp=CACHE_STRIDES.cpp, c=CACHE_STRIDES.c, ctype=CacheStrides)
_READ, _WRITTEN = pointer("void", const=True), pointer("void")
_LENGTHS, _FLAG = pointer("int32_t", const=True), pointer("int32_t")
_FLOATS, _COUNTERS = pointer("float"), pointer("uint32_t")

_FIELDS = tuple(
    Field(name=name, type=kind, doc=doc)
    for name, kind, doc in (
        ("seqlens", _LENGTHS, "[batch], or null: every sequence holds `seqlen` tokens"),
        ("seqlen", INT32, ""),
        ("prefetch_limit", INT32, "tokens that may be read before lengths are known"),
        ("max_seq_len", INT32, ""),
        ("num_splits", INT32, ""),
        ("num_stages", INT32, "tma: K tiles (and V tiles) that a warp keeps in flight"),
        ("pdl", _PDL, "kernels that start before the one before them is done"),
        ("q", _READ, "[batch, num_q_heads, head_dim]"),
        ("q_stride", _ROW, ""),
        ("k_new", _READ, "[batch, num_kv_heads, head_dim], or null: attend only"),
        ("v_new", _READ, "likewise"),
        ("k_new_stride", _ROW, ""),
        ("v_new_stride", _ROW, ""),
        ("k_cache", _WRITTEN, "[batch, max_seq_len, num_kv_heads, head_dim], or pages of tokens"),
        ("v_cache", _WRITTEN, "likewise"),
        ("out", _WRITTEN, "[batch, num_q_heads, head_dim]"),
        ("scale_log2", FLOAT, "softmax_scale * log2(e): exponentials are powers of two"),
        ("num_kv_heads", INT32, ""),
        ("k_cache_stride", _CACHE, ""),
        ("v_cache_stride", _CACHE, ""),
        ("out_stride", _ROW, ""),
        ("lse", _FLOATS, "[batch, num_q_heads] contiguous, or null"),
        ("split_workspace", _FLOATS, "partial O of all splits, then (m, l); null for one split"),
        ("merge_counters", _COUNTERS, "one zero per merge; zero again afterwards"),
        ("overflow_flag", _FLAG, "receives 1 + index of a sequence whose length is not allowed"),
    )
)
PARAMS = Struct(
    cpp="Params",
    c="gqa_params",
    doc="What one launch is told. In the order of first use: the constant cache fetches lines of "
    "64 bytes, and a miss delays the first loads, or waits behind them.",
    multiple=_MAP_ALIGN_IN_C,  # the maps may follow, and move when it grows
    fields=_FIELDS + tuple(field for policy in POLICIES for field in policy.fields),
)


class Params(ctypes.Structure):
    """The kernels' argument."""

    _fields_ = PARAMS.ctypes_fields()


_MAP = Type(cpp="TensorMap", c="gqa_tensor_map", ctype=ctypes.c_ubyte * TENSOR_MAP_BYTES)
TMA_PARAMS = Struct(
    cpp="TmaParams",
    c="gqa_tma_params",
    doc="What a kernel of the TMA schedule is told. The maps are those of K and V, swizzled by 128 "
    "bytes. Where head_dim is a multiple of 64, their dimensions are, innermost first, [64, token, "
    "head_dim / 64, KV head, sequence], and boxes 64 x kBlockN x all; otherwise "
    "[head_dim, token, KV head, sequence], and boxes 64 x kBlockN. Of pools, tokens are those of a "
    "page, which stands in place of the sequence, and boxes have 16 of them.",
    fields=(
        Field(
            name="decode",
            type=Type(cpp=PARAMS.cpp, c=PARAMS.c, ctype=Params),
        ),
        Field(name="keys", type=_MAP),
        Field(name="values", type=_MAP),
    ),
)


class TmaParams(ctypes.Structure):
    """The argument of kernels of the TMA schedule; what `Params` names is where they have it."""

    _fields_ = TMA_PARAMS.ctypes_fields()
