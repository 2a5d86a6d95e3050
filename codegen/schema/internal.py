"""What the C library's files share among themselves, and with the tables that an export fills."""

from __future__ import annotations

import ctypes
from collections.abc import Collection

from gqa_cutlass.codegen.schema.launch import NumberType, Pdl
from gqa_cutlass.codegen.schema.policies import FEATURES, FP8, OF_TOKENS, Policy
from gqa_cutlass.codegen.schema.public import ASKED_BY
from gqa_cutlass.codegen.schema.structs import (
    DOUBLE,
    FLOAT,
    INT32,
    INT64,
    TEXT,
    UINT32,
    Constant,
    Enumeration,
    Field,
    Struct,
    Type,
    array,
)

MAX_STAGES = 8
MAX_ARCHS = 8
MAXIMA = Enumeration(
    c="",
    members=(
        Constant(name="kGqaMaxKernels", value=4096),
        Constant(name="kGqaMaxStages", value=MAX_STAGES),
        Constant(name="kGqaMaxArchs", value=MAX_ARCHS),
    ),
)


def feature_bits(policies: Collection[Policy]) -> int:
    """Features as the C library has them: a bit each."""
    return sum(1 << i for i, policy in enumerate(FEATURES) if policy in policies)


_BITS = {f"kGqa{policy.cpp}": (feature_bits([policy]), policy) for policy in FEATURES}
_LATE = [policy for policy in FEATURES if not policy.prefetches_first_tile]
FEATURE_BITS = Enumeration(
    c="",
    members=(
        *(Constant(name=name, value=bit, doc=p.feature) for name, (bit, p) in _BITS.items()),
        Constant(
            name="kGqaNoPrefetch", value=feature_bits(_LATE), doc="those that wait for lengths"
        ),
        Constant(name="kGqaStored", value=feature_bits(FP8 + OF_TOKENS), doc="caches of 8 bits"),
        Constant(name="kGqaOfTokens", value=feature_bits(OF_TOKENS), doc="those scaled by tokens"),
    ),
)
# The bit of each, and the field of GQADecodeConfig that asks for it.
FEATURE_FIELDS = {name: ASKED_BY[policy.feature] for name, (_, policy) in _BITS.items()}
NUMBERS = Enumeration(
    c="",
    members=tuple(
        Constant(name=f"kGqaNumber{number.name.title()}", value=number.value, doc=number.doc)
        for number in NumberType
    ),
)
PDL = Enumeration(
    c="",
    members=tuple(Constant(name=f"kGqaPdl{pdl.name.title()}", value=pdl.value) for pdl in Pdl),
)

_IMAGE = Type(cpp="uint64_t const*", c="uint64_t const*", ctype=ctypes.c_void_p)
_KERNEL = Type(cpp="gqa_kernel const*", c="gqa_kernel const*", ctype=ctypes.c_void_p)


def _struct(name: str, doc: str, *rows: tuple[str, Type, str]) -> Struct:
    fields = tuple(Field(name=field, type=kind, doc=text) for field, kind, text in rows)
    return Struct(cpp=name, c=name, doc=doc, fields=fields)


ARCH = _struct(
    "gqa_arch",
    "A GPU architecture that kernels were compiled for.",
    ("name", TEXT, ""),
    ("capability", INT32, "90 for compute capability 9.0"),
    ("exact", INT32, "whether it runs on that capability alone"),
    ("dependents", INT32, "whether it has programmatic dependent launches"),
    ("shared_per_block", INT32, "bytes of shared memory that a block may have"),
    ("shared_per_sm", INT32, "and that a multiprocessor has"),
)
KERNEL = _struct(
    "gqa_kernel",
    "A kernel of this library.",
    ("name", TEXT, "and entry point"),
    ("image", _IMAGE, "fat binary"),
    ("dtype", INT32, "gqa_dtype"),
    ("head_dim", INT32, ""),
    ("head_dim_v", INT32, "of values and outputs"),
    ("group_size", INT32, ""),
    ("vec_width", INT32, "elements per access that every address must allow"),
    ("tma", INT32, "schedule: tensor copies and clusters"),
    ("pdl", INT32, "whether it may start before the kernel before it is done"),
    ("block_n", INT32, "KV tokens per tile"),
    ("num_warps", INT32, ""),
    ("num_stages", INT32, "with tma: at most"),
    ("block_h", INT32, "rows of a block: pairs of a head and a token"),
    ("features", INT32, "bits of what it has beyond the plain kernel"),
    ("partial_floats", INT32, "floats of a partial output in the workspace"),
    ("tile_bytes", INT32, "of K and V in the cache"),
    ("bytes_in_flight", INT32, "that one block can have under way"),
    ("shared_bytes", array(INT32, MAX_STAGES, "kGqaMaxStages"), "by stages in use - 1"),
    (
        "blocks_per_sm",
        array(INT32, MAX_ARCHS, "kGqaMaxArchs"),
        "by architecture; 0: not compiled for it",
    ),
)
MODEL = _struct(
    "gqa_model",
    "The dispatch model's measured constants.",
    ("bytes_per_sm_and_microsecond", DOUBLE, ""),
    ("microseconds_per_split", DOUBLE, ""),
    ("bytes_in_flight", DOUBLE, ""),
    ("tma_mib", DOUBLE, ""),
    ("tma_mib_partial_boxes", DOUBLE, ""),
    ("tma_heads", INT64, ""),
    ("tma_blocks", INT64, ""),
    ("tma_pairs_mib", DOUBLE, ""),
    ("tma_early_dims", INT64, ""),
    ("tma_large_heads", INT64, ""),
    ("tma_large_cluster", INT64, ""),
    ("tma_few_heads", INT64, ""),
    ("box_dims", INT64, ""),
    ("page_tokens", INT64, ""),
    ("max_cluster", INT64, ""),
    ("prefetch_mib", DOUBLE, ""),
    ("pdl_whole_mib", DOUBLE, ""),
    ("pdl_end_mib", DOUBLE, ""),
    ("balanced_batch", INT64, ""),
    ("balanced_tokens", INT64, ""),
    ("balanced_rounds", INT64, ""),
    ("most_tiles", INT64, ""),
)
LIMITS = _struct(
    "gqa_limits",
    "What configurations may hold.",
    ("min_head_dim", INT32, ""),
    ("max_head_dim", INT32, ""),
    ("head_dim_step", INT32, ""),
    ("max_batch", INT32, ""),
    ("max_seq_len", INT32, ""),
    ("max_group_size", INT32, ""),
    ("max_tokens", INT32, "query tokens of a sequence"),
    ("min_capability", INT32, ""),
    ("max_scale", FLOAT, ""),
    ("max_softcap", DOUBLE, ""),
    ("min_cache_scale", FLOAT, "of a cache of 8 bits, where the host knows it"),
    ("max_cache_scale", FLOAT, ""),
)
PROBLEM = _struct(
    "gqa_problem",
    "What a kernel is chosen for.",
    ("batch_size", INT64, ""),
    ("num_q_heads", INT64, ""),
    ("num_kv_heads", INT64, ""),
    ("head_dim", INT64, ""),
    ("head_dim_v", INT64, "of values and outputs"),
    ("max_seq_len", INT64, ""),
    ("dtype", INT32, "gqa_dtype"),
    ("vec_width", INT32, "widest access, in elements, that every address allows"),
    ("ragged", INT32, "whether lengths, which the host does not know, may differ much"),
    ("features", INT32, "bits of what the kernel must have, and must not have beyond"),
    ("window", INT64, "tokens that are seen; 0 for all"),
    ("page_size", INT64, "tokens of a page; 0 without pages"),
    ("dependent", INT64, "whether it may start before the kernel before it is done"),
    ("num_tokens", INT64, "query tokens of a sequence, at most"),
)
TARGET = _struct(
    "gqa_target",
    "Where it will run.",
    ("arch", INT32, "index into gqa_archs"),
    ("num_sms", INT32, "multiprocessors"),
)
DISPATCH = _struct(
    "gqa_dispatch",
    "What was chosen.",
    ("kernel", _KERNEL, ""),
    ("grid", array(UINT32, 3), "KV heads times head blocks, splits, sequences"),
    ("cluster", UINT32, ""),
    ("block", UINT32, ""),
    ("shared_bytes", UINT32, ""),
    ("num_splits", INT32, ""),
    ("num_stages", INT32, ""),
    ("prefetch_first_tile", INT32, "whether warps ask for it before they know the length"),
    ("pdl", INT32, "when the next kernel may start; not 0: a dependent launch"),
    ("num_merge_counters", INT64, "counters, of merges in global memory"),
    ("partial_floats", INT64, "floats of partial outputs in global memory"),
)
STRUCTS = (ARCH, KERNEL, MODEL, LIMITS, PROBLEM, TARGET, DISPATCH)
