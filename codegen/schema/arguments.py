"""The memory that a launch touches: a row per tensor of a call, and per buffer behind it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from gqa_cutlass.codegen.schema.structs import check_distinct


class Access(StrEnum):
    """What a kernel does with memory."""

    READ = "read"
    WRITE = "write"  # and never reads
    APPEND = "append"  # reads, and writes the new token's rows if there is one
    SCRATCH = "scratch"  # writes, then reads what it wrote
    COUNT = "count"  # reads and writes


class Elements(StrEnum):
    """What memory holds."""

    ELEMENT = "element"  # of the kernel's type
    STORED = "stored"  # of that type, or what a policy of the slot Operands makes of it
    RESULT = "result"  # of that type, or what a policy of the slot Result makes of outputs
    FLOAT32 = "float32"
    INT32 = "int32"
    INT64 = "int64"
    UINT32 = "uint32"
    NUMBER = "number"  # of any `NumberType`


@dataclass(frozen=True, kw_only=True)
class Argument:
    """Memory that a launch touches.

    Args:
        name: As calls name it.
        dims: The names of its dimensions' sizes; strides of the last one are 1.
        elements: What it holds.
        field: The field of `Params` that holds its address; empty where that has the same name.
        stride: The field of `Params` that holds its strides; None for contiguous memory.
        access: What kernels do with it.
        optional: Whether a call may leave it out: its address is then null, unless the call
            allocates it.
        single_token: Whether calls may pass it with a dimension of size 1 behind the first.
        any_first: Whether calls may pass it without its first dimension, equal for all.
        spread: Whether calls may leave out dimensions at its beginning, or say one number for all,
            with any strides.
        rows_apart: Whether there may be gaps between its rows, of memory that is contiguous else.
        type_field: The field of `Params` that says which `NumberType` it holds.
        feature: The policy that it belongs to.
    """

    name: str
    dims: tuple[str, ...]
    elements: Elements = Elements.ELEMENT
    field: str = ""
    stride: str | None = None
    access: Access = Access.READ
    optional: bool = False
    single_token: bool = False
    any_first: bool = False
    spread: bool = False
    rows_apart: bool = False
    type_field: str | None = None
    feature: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "field", self.field or self.name)


@dataclass(frozen=True, kw_only=True)
class Table:
    """Arguments in the order in which calls pass them.

    Args:
        rows: Them.

    Raises:
        ConfigError: A name, or a field of `Params`, stands in it twice.
    """

    rows: tuple[Argument, ...]

    def __post_init__(self) -> None:
        check_distinct("arguments", "arguments", (row.name for row in self.rows))
        check_distinct("arguments", "fields", (row.field for row in self.rows))


_QUERY = ("batch", "num_q_heads", "head_dim")
_TOKEN = ("batch", "num_kv_heads", "head_dim")
_CACHE = ("rows", "max_seq_len", "num_kv_heads", "head_dim")
_OUT, _TOKEN_V, _CACHE_V = ((*dims[:-1], "head_dim_v") for dims in (_QUERY, _TOKEN, _CACHE))

ARGUMENTS = Table(
    rows=(
        Argument(name="q", dims=_QUERY, field="q", stride="q_stride", single_token=True),
        Argument(
            name="k_cache", dims=_CACHE, elements=Elements.STORED, field="k_cache",
            stride="k_cache_stride", access=Access.APPEND,
        ),
        Argument(
            name="v_cache", dims=_CACHE_V, elements=Elements.STORED, field="v_cache",
            stride="v_cache_stride", access=Access.APPEND,
        ),
        Argument(
            name="k", dims=_TOKEN, field="k_new", stride="k_new_stride", optional=True,
            single_token=True,
        ),
        Argument(
            name="v", dims=_TOKEN_V, field="v_new", stride="v_new_stride", optional=True,
            single_token=True,
        ),
        Argument(
            name="out", dims=_OUT, elements=Elements.RESULT, field="out", stride="out_stride",
            access=Access.WRITE, optional=True, single_token=True,
        ),
        Argument(
            name="cache_seqlens", dims=("batch",), elements=Elements.INT32, field="seqlens",
            optional=True,
        ),
    )
)  # fmt: skip

# What a launch touches besides: what calls allocate, or keep.
BUFFERS = Table(
    rows=(
        Argument(
            name="lse", dims=("batch", "num_q_heads"), elements=Elements.FLOAT32, field="lse",
            access=Access.WRITE, optional=True,
        ),
        Argument(
            name="split_workspace", dims=("partial_floats",), elements=Elements.FLOAT32,
            field="split_workspace", access=Access.SCRATCH, optional=True,
        ),
        Argument(
            name="merge_counters", dims=("num_merge_counters",), elements=Elements.UINT32,
            field="merge_counters", access=Access.COUNT, optional=True,
        ),
        Argument(
            name="overflow_flag", dims=("one",), elements=Elements.INT32, field="overflow_flag",
            access=Access.WRITE,
        ),
    )
)  # fmt: skip
