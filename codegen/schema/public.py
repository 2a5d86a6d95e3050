"""What callers of the C library and of the Rust crate share with it."""

from __future__ import annotations

from collections.abc import Mapping

from gqa_cutlass.codegen.schema.kinds import DType
from gqa_cutlass.codegen.schema.launch import NumberType
from gqa_cutlass.codegen.schema.policies import FEATURES
from gqa_cutlass.codegen.schema.structs import (
    FLOAT,
    INT32,
    INT64,
    MEMORY,
    SIZE,
    TEXT,
    UINT32,
    Constant,
    Enumeration,
    Field,
    Growth,
    Struct,
    Type,
    array,
    own_size,
    pointer,
    zeroed,
)
from gqa_cutlass.errors import ConfigError

STATUS = Enumeration(
    c="gqa_status",
    rust="c_int",
    doc="What every function that can fail returns.",
    members=tuple(
        Constant(name=name, value=value, doc=doc)
        for value, (name, doc) in enumerate(
            (
                ("GQA_SUCCESS", "all is well; everything else launched and wrote nothing"),
                ("GQA_ERROR_NULL_POINTER", "a pointer that must not be null is"),
                ("GQA_ERROR_INVALID_VALUE", "a size, an address or the scale is not allowed"),
                ("GQA_ERROR_CACHE_OVERFLOW", "the new tokens do not fit into the cache"),
                ("GQA_ERROR_UNSUPPORTED", "exported without a kernel for the configuration"),
                ("GQA_ERROR_WORKSPACE", "the workspace is missing, too small or misaligned"),
                ("GQA_ERROR_NO_DRIVER", "no libcuda, too old a one, or no GPU"),
                ("GQA_ERROR_DEVICE", "the GPU is too old, or none of those exported for"),
                ("GQA_ERROR_LAUNCH", "the driver refused to load or to launch a kernel"),
                ("GQA_ERROR_UNSUPPORTED_FEATURE", "the caller asks for what is newer than this"),
            )
        )
    ),
)
DTYPE = Enumeration(
    c="gqa_dtype",
    rust="i32",
    doc="What tensors hold; elements are all of one of the first two, but for caches of 8 bits.",
    members=(
        Constant(name="GQA_FLOAT16", value=0, doc="IEEE half precision"),
        Constant(name="GQA_BFLOAT16", value=1, doc="the upper half of a float"),
        Constant(name="GQA_FLOAT32", value=2, doc="of what is not an element"),
        Constant(name="GQA_FLOAT8_E4M3FN", value=3, doc="of caches, up to 448"),
        Constant(name="GQA_FLOAT8_E5M2", value=4, doc="of caches, the upper half of float16"),
    ),
)
DTYPE_CODES = {DType.F16: DTYPE["GQA_FLOAT16"], DType.BF16: DTYPE["GQA_BFLOAT16"]}
NUMBER_CODES = {
    NumberType.FLOAT32: DTYPE["GQA_FLOAT32"],
    NumberType.FLOAT16: DTYPE["GQA_FLOAT16"],
    NumberType.BFLOAT16: DTYPE["GQA_BFLOAT16"],
}
ENUMERATIONS = (STATUS, DTYPE)

_DTYPE = Type(cpp="int32_t", c="int32_t", ctype=INT32.ctype, rust="gqa_dtype")
_NUMBERS = pointer("void", const=True, rust="c_void")
_FLOATS = pointer("float", const=True, rust="f32")
_INTS = pointer("int32_t", const=True, rust="i32")
# The tensors of a call, in its order, and the dimensions that a configuration has strides of.
STRIDED = {
    **dict.fromkeys(("output", "q", "k", "v"), ("batch", "head")),
    **dict.fromkeys(("kv_cache_k", "kv_cache_v"), ("batch", "token", "head")),
}
_NEIGHBOURS = {"batch": "sequences", "token": "tokens", "head": "heads"}


def check_asked(asked_by: Mapping[str, str], config: Struct) -> None:
    """Raise ConfigError unless every feature can be asked for by a field of a configuration."""
    names = [field.name for field in config.fields]
    missing = [p.feature for p in FEATURES if asked_by.get(p.feature) not in names]
    if missing or len(asked_by) != len(FEATURES):
        raise ConfigError(
            f"schema: {config.cpp}: got no field for {', '.join(missing) or 'some'}; needed: one "
            f"for each of {', '.join(p.feature for p in FEATURES)}. Nothing was generated."
        )


CONFIG = Struct(
    cpp="GQADecodeConfig",
    c="GQADecodeConfig",
    doc="The sizes of a step. Fields that the caller's version lacks have their default, 0. A "
    "newer caller's fields that this library lacks must be 0, or are refused.",
    growth=Growth(required="dtype", least="kGqaConfigLeastBytes", initial="GQA_DECODE_CONFIG_INIT"),
    fields=(own_size("GQADecodeConfig"),)
    + tuple(
        Field(name=name, type=kind, doc=doc)
        for name, kind, doc in (
            ("batch_size", INT32, "sequences, 1 to 65535"),
            (
                "cache_len",
                INT32,
                "tokens cached before the step, below `max_seq_len`",
            ),
            ("num_q_heads", INT32, "query heads, a multiple of `num_kv_heads`"),
            ("num_kv_heads", INT32, "KV heads"),
            ("head_dim", INT32, "elements per head, a multiple of 8 from 32 to 256"),
            ("scale", FLOAT, "factor on the scores, usually 1 / sqrt(`head_dim`)"),
            ("max_seq_len", INT32, "tokens that the cache can hold per sequence"),
            ("dtype", _DTYPE, "`gqa_dtype` of every tensor"),
            ("workspace", MEMORY, "device memory; may be null where none is needed"),
            ("workspace_size", SIZE, "its bytes"),
        )
    )
    + tuple(
        Field(name=name, type=zeroed(kind), doc=doc)
        for name, kind, doc in (
            ("softcap", FLOAT, "bound of the scores, as in Gemma 2; 0: none"),
            ("window", INT32, "tokens seen, the newest the last of them; 0: all"),
            ("sinks", _NUMBERS, "`num_q_heads` logits, one more per head; or null"),
            ("sinks_type", _DTYPE, "`gqa_dtype` of `sinks`; 0 without"),
            ("alibi_batch_stride", INT32, "`num_q_heads`: slopes of each sequence; 0: of all"),
            ("alibi_slopes", _FLOATS, "`num_q_heads`, or as many per sequence; or null"),
            ("cache_leftpad", _INTS, "`batch_size` numbers, padding of each; or null"),
            ("cache_batch_idx", _INTS, "`batch_size` rows, of the caches, one each; or null"),
            ("cache_rows", INT32, "how many they have with it; 0: `batch_size`"),
            ("equal_lengths", INT32, "1: those on the device are about equal"),
            ("lse", pointer("float", rust="f32"), "`batch_size` * `num_q_heads`; or null"),
            *(
                (f"{name}_{dim}_stride", INT64, f"elements between {_NEIGHBOURS[dim]}; 0: packed")
                for name, dims in STRIDED.items()
                for dim in dims
            ),
            ("dependent", INT32, "1: programmatic dependent launch"),
            ("head_dim_v", INT32, "the same of values and output; 0: as `head_dim`"),
            ("output_float32", INT32, "1: the output is of float32, not rounded"),
            ("page_size", INT32, "tokens of a page, with `block_table`"),
            ("block_table", _INTS, "rows of `max_pages` pages, of each sequence; or null"),
            ("block_table_stride", INT64, "elements between its rows; 0: packed"),
            (
                "slot_mapping",
                pointer("int64_t", const=True, rust="i64"),
                "`batch_size` places of new tokens; or null",
            ),
            ("max_pages", INT32, "pages that a sequence can have"),
            ("num_pages", INT32, "pages of the caches"),
            ("num_tokens", INT32, "query tokens of a sequence, at most; 0: one"),
            ("num_new_tokens", INT32, "the same of `k` and `v`; 0: as `num_tokens`"),
            ("not_causal", INT32, "1: each query sees all; 0: up to its own token"),
            ("window_right", INT32, "of `not_causal`: tokens seen from its own on; 0: all"),
            *(
                (f"{name}_token_stride", INT64, "elements between tokens; 0: packed")
                for name, dims in STRIDED.items()
                if "token" not in dims
            ),
            ("cu_seqlens_q", _INTS, "`batch_size` + 1 ends in `q` and output; or null"),
            ("cu_seqlens_k_new", _INTS, "the same in `k` and `v`; or null"),
            ("total_tokens", INT32, "query tokens of all, with `cu_seqlens_q`"),
            ("total_new_tokens", INT32, "new tokens of all, with `cu_seqlens_k_new`"),
            ("rotary_cos", _NUMBERS, "by position, `rotary_dim` / 2 each; or null"),
            ("rotary_sin", _NUMBERS, "likewise"),
            ("rotary_seqlens", _INTS, "`batch_size` first positions; or null: the lengths"),
            ("rotary_cos_stride", INT64, "elements between positions; 0: packed"),
            ("rotary_sin_stride", INT64, "elements between positions; 0: packed"),
            ("rotary_type", _DTYPE, "`gqa_dtype` of both: `dtype`, or `GQA_FLOAT32`"),
            ("rotary_positions", INT32, "how many both have"),
            ("rotary_dim", INT32, "elements of a head that turn; 0: `head_dim`"),
            ("rotary_interleaved", INT32, "1: neighbours turn together, as in GPT-J"),
            ("q_norm_weight", _NUMBERS, "`head_dim` weights, RMS norm of `q`; or null"),
            ("k_norm_weight", _NUMBERS, "the same of `k`; or null"),
            ("q_norm_type", _DTYPE, "`gqa_dtype` of the former; 0 without"),
            ("k_norm_type", _DTYPE, "`gqa_dtype` of the latter; 0 without"),
            ("norm_eps", FLOAT, "added to mean squares, usually 1e-6"),
            ("norm_plus_one", INT32, "1: to weights 1 is added, as in Gemma"),
            (
                "tree_mask",
                pointer("uint32_t", const=True, rust="u32"),
                "bits of drafts, which of them each sees; or null",
            ),
            ("cache_type", _DTYPE, "`gqa_dtype` of the caches, if of 8 bits; 0: `dtype`"),
            ("k_scale", FLOAT, "what their keys are multiplied by; 0: 1"),
            ("v_scale", FLOAT, "the same of values"),
            *(
                (f"{part}_scale_{dim}_stride", INT32, f"of `{part}_scales`, {between}; 0: for all")
                for part in ("k", "v")
                for dim, between in (("batch", "between sequences"), ("head", "between KV heads"))
            ),
            ("scales_of_tokens", INT32, "1: `k_scales` and `v_scales` are of tokens"),
            ("k_scales", _FLOATS, "instead of `k_scale`, on the device; or null"),
            ("v_scales", _FLOATS, "instead of `v_scale`, on the device; or null"),
        )
    ),
)
# The field that asks for a feature when it is not zero, by what Python calls the feature. Types of
# caches have one field, whose value says which, and one that says of what their scales are.
ASKED_BY = {
    "cache_batch_idx": "cache_batch_idx",
    "cache_leftpad": "cache_leftpad",
    "window_size": "window",
    "softcap": "softcap",
    "alibi_slopes": "alibi_slopes",
    "sinks": "sinks",
    "out_dtype": "output_float32",
    "block_table": "block_table",
    "num_tokens": "num_tokens",
    "tree_mask": "tree_mask",
    "q_norm_weight": "q_norm_weight",
    "rotary_cos": "rotary_cos",
    "float8_e4m3fn": "cache_type",
    "float8_e5m2": "cache_type",
    "float8_e4m3fn with scales of tokens": "scales_of_tokens",
    "float8_e5m2 with scales of tokens": "scales_of_tokens",
}
check_asked(ASKED_BY, CONFIG)
LAUNCH = Struct(
    cpp="gqa_launch",
    c="gqa_launch",
    doc="What would be launched. As much of it is written as the caller's version has; a newer "
    "caller's fields that this library lacks become 0.",
    growth=Growth(required="kernel", least="kGqaLaunchLeastBytes", initial="GQA_LAUNCH_INIT"),
    fields=(own_size("gqa_launch"),)
    + tuple(
        Field(name=name, type=kind, doc=doc)
        for name, kind, doc in (
            ("kernel", TEXT, "the kernel's name; never freed"),
            ("grid", array(UINT32, 3), "blocks: KV heads times head blocks, splits, sequences"),
            ("cluster", UINT32, "blocks of a cluster, along y"),
            ("block", UINT32, "threads"),
            ("shared_bytes", UINT32, "shared memory of a block"),
            ("num_splits", INT32, "blocks that share a sequence"),
            ("num_stages", INT32, "tiles that a warp has under way at a time"),
            ("workspace_size", SIZE, "bytes of workspace that this launch uses"),
        )
    ),
)
STRUCTS = (CONFIG, LAUNCH)

# More bytes than any version will have: a size beyond is none, and is not read up to.
MOST_STRUCT_BYTES = 1024
SIZES = Enumeration(
    c="",
    members=(
        *(
            Constant(name=s.growth.least, value=s.least_bytes, doc=f"up to `{s.growth.required}`")
            for s in STRUCTS
            if s.growth is not None
        ),
        Constant(name="kGqaMostStructBytes", value=MOST_STRUCT_BYTES),
    ),
)
