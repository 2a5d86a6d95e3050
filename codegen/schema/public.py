"""What callers of the C library and of the Rust crate share with it."""

from __future__ import annotations

from gqa_cutlass.codegen.schema.kinds import DType
from gqa_cutlass.codegen.schema.structs import (
    FLOAT,
    INT32,
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
)

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
                ("GQA_ERROR_CACHE_OVERFLOW", "the new token does not fit into the cache"),
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
    doc="The element type of every tensor of a call.",
    members=(
        Constant(name="GQA_FLOAT16", value=0, doc="IEEE half precision"),
        Constant(name="GQA_BFLOAT16", value=1, doc="the upper half of a float"),
    ),
)
DTYPE_CODES = {DType.F16: DTYPE["GQA_FLOAT16"], DType.BF16: DTYPE["GQA_BFLOAT16"]}
ENUMERATIONS = (STATUS, DTYPE)

_DTYPE = Type(cpp="int32_t", c="int32_t", ctype=INT32.ctype, rust="gqa_dtype")

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
                "tokens in each cache before the step, 0 to `max_seq_len` - 1",
            ),
            ("num_q_heads", INT32, "query heads, a multiple of `num_kv_heads`"),
            ("num_kv_heads", INT32, "KV heads"),
            ("head_dim", INT32, "elements per head, a multiple of 8 from 32 to 256"),
            ("scale", FLOAT, "factor on the scores, usually 1 / sqrt(`head_dim`)"),
            ("max_seq_len", INT32, "tokens that the cache can hold per sequence"),
            ("dtype", _DTYPE, "`gqa_dtype` of every tensor"),
            (
                "workspace",
                MEMORY,
                "device memory; may be null where `gqa_workspace_size` is 0",
            ),
            ("workspace_size", SIZE, "its bytes"),
        )
    ),
)
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
