"""Features: a policy each, one policy per slot of the kernel.

A policy is a struct template in a header of its own below templates/include/gqa/policy/, which
slots.cuh explains and whose names slots.py lists; here is all else that is known of it.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, replace

from gqa_cutlass.codegen.schema.arguments import ARGUMENTS, Argument, Elements, Table
from gqa_cutlass.codegen.schema.kinds import Schedule
from gqa_cutlass.codegen.schema.launch import NumberType
from gqa_cutlass.codegen.schema.slots import (
    BIAS,
    CACHE,
    ELEMENT,
    LOGIT,
    MASK,
    NEW_TOKEN,
    NORM,
    OUTPUT,
    QUERIES,
    RESULT,
    ROTARY,
    ROW,
    SLOTS,
    START,
    Slot,
)
from gqa_cutlass.codegen.schema.structs import (
    FLOAT,
    INT32,
    INT64,
    UINT32,
    Field,
    Type,
    check_distinct,
    pointer,
)
from gqa_cutlass.errors import ConfigError


@dataclass(frozen=True, kw_only=True, eq=False)
class Policy:
    """What stands in a slot. Policies are compared by identity.

    Args:
        slot: Where.
        tag: What the names of its kernels end with; empty for a slot's default.
        cpp: Its struct.
        header: Where that is, below templates/include/gqa/.
        parts: Headers of what belongs to it in one schedule alone, likewise, which include that.
        feature: The option of a call that asks for it; empty for a slot's default. Its fields and
            arguments are told that it is theirs.
        fields: Of the kernel's argument, that it reads.
        arguments: Tensors of a call, that it reads; calls may leave each of them out.
        schedules: Those that implement it.
        prefetches_first_tile: Whether warps may ask for their first tile before they know the
            length of their sequence.
    """

    slot: Slot
    tag: str = ""
    cpp: str
    header: str
    parts: tuple[tuple[Schedule, str], ...] = ()
    feature: str = ""
    fields: tuple[Field, ...] = ()
    arguments: tuple[Argument, ...] = ()
    schedules: frozenset[Schedule] = frozenset(Schedule)
    prefetches_first_tile: bool = True

    def __post_init__(self) -> None:
        fields = tuple(replace(row, feature=self.feature) for row in self.fields)
        tensors = (replace(row, feature=self.feature, optional=True) for row in self.arguments)
        object.__setattr__(self, "fields", fields)
        object.__setattr__(self, "arguments", tuple(tensors))

    def header_of(self, schedule: Schedule) -> str:
        """What a kernel of a schedule includes for it."""
        return dict(self.parts).get(schedule, self.header)

    def __reduce__(self) -> tuple[object, tuple[str]]:
        """Pickle by name, so that another process has its own."""
        return named, (self.cpp,)

    def __repr__(self) -> str:
        return self.cpp


_INT32S, _FLOATS = pointer("int32_t", const=True), pointer("float", const=True)
_NUMBERS = pointer("void", const=True)  # of the type that a field of _NUMBER_TYPE says
_NUMBER_TYPE = Type(cpp=NumberType.__name__, c="int32_t", ctype=ctypes.c_int32)
_ROTARY_TABLE = ("rotary_positions", "rotary_half")
POLICIES: tuple[Policy, ...] = (
    Policy(slot=ROW, cpp="OwnRow", header="policy/row_own.cuh"),
    Policy(
        slot=ROW,
        tag="idx",
        cpp="IndexedRow",
        header="policy/row_indexed.cuh",
        feature="cache_batch_idx",
        fields=(
            Field(name="cache_batch_idx", type=_INT32S, doc="[batch], rows of the caches"),
            Field(name="cache_rows", type=INT32, doc="how many there are"),
        ),
        arguments=(Argument(name="cache_batch_idx", dims=("batch",), elements=Elements.INT32),),
        prefetches_first_tile=False,
    ),
    Policy(slot=CACHE, cpp="DenseCache", header="policy/cache_dense.cuh"),
    Policy(slot=START, cpp="FirstRow", header="policy/start_first.cuh"),
    Policy(
        slot=START,
        tag="pad",
        cpp="LeftPadded",
        header="policy/start_leftpad.cuh",
        feature="cache_leftpad",
        fields=(Field(name="cache_leftpad", type=_INT32S, doc="[batch], tokens of padding"),),
        arguments=(Argument(name="cache_leftpad", dims=("batch",), elements=Elements.INT32),),
        prefetches_first_tile=False,
    ),
    Policy(slot=MASK, cpp="WholeSequence", header="policy/mask_whole.cuh"),
    Policy(
        slot=MASK,
        tag="win",
        cpp="SlidingWindow",
        header="policy/mask_window.cuh",
        feature="window_size",
        fields=(Field(name="window_left", type=INT32, doc="tokens seen before the newest"),),
        prefetches_first_tile=False,
    ),
    Policy(slot=LOGIT, cpp="Scaled", header="policy/logit_scaled.cuh"),
    Policy(
        slot=LOGIT,
        tag="cap",
        cpp="SoftCapped",
        header="policy/logit_softcap.cuh",
        feature="softcap",
        fields=(
            Field(name="softcap_in", type=FLOAT, doc="softmax_scale / cap"),
            Field(name="softcap_out", type=FLOAT, doc="cap * log2(e)"),
        ),
    ),
    Policy(slot=BIAS, cpp="Unbiased", header="policy/bias_none.cuh"),
    Policy(
        slot=BIAS,
        tag="alibi",
        cpp="Alibi",
        header="policy/bias_alibi.cuh",
        feature="alibi_slopes",
        fields=(
            Field(name="alibi_slopes", type=_FLOATS, doc="[num_q_heads], or of each sequence"),
            Field(name="alibi_batch_stride", type=INT32, doc="between sequences, or 0"),
        ),
        arguments=(
            Argument(
                name="alibi_slopes",
                dims=("batch", "num_q_heads"),
                elements=Elements.FLOAT32,
                any_first=True,
            ),
        ),
    ),
    Policy(slot=NEW_TOKEN, cpp="CopiedToken", header="policy/token_copied.cuh"),
    Policy(slot=ELEMENT, cpp="NativeOperands", header="policy/element_native.cuh"),
    Policy(slot=OUTPUT, cpp="KeysAlone", header="policy/output_plain.cuh"),
    Policy(
        slot=OUTPUT,
        tag="sink",
        cpp="SinkInSum",
        header="policy/output_sink.cuh",
        feature="sinks",
        fields=(
            Field(name="sinks", type=_NUMBERS, doc="[num_q_heads] contiguous"),
            Field(name="sinks_type", type=_NUMBER_TYPE, doc="what they are"),
        ),
        arguments=(
            Argument(
                name="sinks",
                dims=("num_q_heads",),
                elements=Elements.NUMBER,
                type_field="sinks_type",
            ),
        ),
    ),
    Policy(slot=RESULT, cpp="AsQueries", header="policy/result_native.cuh"),
    Policy(
        slot=RESULT,
        tag="f32",
        cpp="InFloat32",
        header="policy/result_float32.cuh",
        feature="out_dtype",
    ),
    Policy(
        slot=CACHE,
        tag="paged",
        cpp="PagedCache",
        header="policy/cache_paged.cuh",
        feature="block_table",
        fields=(
            Field(name="num_pages", type=INT32, doc="of the pools, a batch stride apart"),
            Field(
                name="block_table", type=_INT32S, doc="[rows, max_pages], pages of each sequence"
            ),
            Field(name="block_table_stride", type=INT64, doc="between rows"),
            Field(
                name="slot_mapping",
                type=pointer("int64_t", const=True),
                doc="[batch], where new tokens go, or null",
            ),
            Field(name="page_size", type=INT32, doc="in tokens"),
            Field(name="page_magic", type=UINT32, doc="which a token is multiplied by,"),
            Field(name="page_shift", type=INT32, doc="and shifted, to divide it by page_size"),
        ),
        arguments=(
            Argument(
                name="block_table",
                dims=("rows", "max_pages"),
                elements=Elements.INT32,
                rows_apart=True,
            ),
            Argument(name="slot_mapping", dims=("batch",), elements=Elements.INT64),
        ),
        prefetches_first_tile=False,
    ),
    Policy(slot=QUERIES, cpp="OneQuery", header="policy/queries_one.cuh"),
    Policy(
        slot=QUERIES,
        tag="multi",
        cpp="SeveralQueries",
        header="policy/queries_several.cuh",
        feature="num_tokens",
        fields=(
            Field(name="row_blocks", type=INT32, doc="blocks that share a KV head"),
            Field(name="num_query_tokens", type=INT32, doc="of a sequence, at most"),
            Field(name="num_new_tokens", type=INT32, doc="likewise"),
            Field(name="all_query_tokens", type=INT32, doc="of all sequences"),
            Field(name="all_new_tokens", type=INT32, doc="likewise"),
            Field(name="new_token_step", type=INT32, doc="slots between sequences, or 0"),
            Field(name="window_right", type=INT32, doc="tokens seen behind a query's own"),
            Field(name="q_token_stride", type=INT64, doc="as of RowStrides"),
            Field(name="k_new_token_stride", type=INT64, doc="likewise"),
            Field(name="v_new_token_stride", type=INT64, doc="likewise"),
            Field(name="out_token_stride", type=INT64, doc="likewise"),
            Field(name="lse_batch_stride", type=INT64, doc="between sequences, or 0"),
            Field(name="lse_head_stride", type=INT64, doc="between heads"),
            Field(
                name="cu_seqlens_q",
                type=_INT32S,
                doc="[batch + 1], where each begins in q, or null",
            ),
            Field(
                name="cu_seqlens_k_new", type=_INT32S, doc="[batch + 1], and in k and v, or null"
            ),
        ),
        arguments=(
            Argument(name="cu_seqlens_q", dims=("batch_ends",), elements=Elements.INT32),
            Argument(name="cu_seqlens_k_new", dims=("batch_ends",), elements=Elements.INT32),
        ),
    ),
    Policy(
        slot=QUERIES,
        tag="tree",
        cpp="TreeOfQueries",
        header="policy/queries_tree.cuh",
        feature="tree_mask",
        fields=(
            Field(
                name="tree_mask",
                type=pointer("uint32_t", const=True),
                doc="[batch, tokens, words], bits of drafts",
            ),
        ),
        arguments=(
            Argument(
                name="tree_mask",
                dims=("batch", "num_tokens", "tree_words"),
                elements=Elements.UINT32,
            ),
        ),
    ),
    Policy(slot=NORM, cpp="Unnormed", header="policy/norm_none.cuh"),
    Policy(
        slot=NORM,
        tag="norm",
        cpp="RmsNormed",
        header="policy/norm_rms.cuh",
        feature="q_norm_weight",
        fields=(
            Field(name="q_norm_weight", type=_NUMBERS, doc="[head_dim], or null"),
            Field(name="k_norm_weight", type=_NUMBERS, doc="likewise"),
            Field(name="q_norm_type", type=_NUMBER_TYPE, doc="what they are"),
            Field(name="k_norm_type", type=_NUMBER_TYPE, doc="likewise"),
            Field(name="norm_eps", type=FLOAT, doc="added to mean squares"),
            Field(name="norm_offset", type=FLOAT, doc="added to weights"),
        ),
        arguments=tuple(
            Argument(
                name=name,
                dims=("head_dim",),
                elements=Elements.NUMBER,
                type_field=f"{name[0]}_norm_type",
            )
            for name in ("q_norm_weight", "k_norm_weight")
        ),
    ),
    Policy(slot=ROTARY, cpp="Unrotated", header="policy/rotary_none.cuh"),
    Policy(
        slot=ROTARY,
        tag="rope",
        cpp="RotatedByTables",
        header="policy/rotary_tables.cuh",
        feature="rotary_cos",
        fields=(
            Field(name="rotary_cos", type=_NUMBERS, doc="[positions, rotary_dim / 2]"),
            Field(name="rotary_sin", type=_NUMBERS, doc="likewise"),
            Field(
                name="rotary_seqlens",
                type=_INT32S,
                doc="[batch], first positions, or null: the lengths",
            ),
            Field(name="rotary_cos_stride", type=INT64, doc="between positions"),
            Field(name="rotary_sin_stride", type=INT64, doc="likewise"),
            Field(name="rotary_type", type=_NUMBER_TYPE, doc="what they are"),
            Field(name="rotary_positions", type=INT32, doc="how many there are"),
            Field(name="rotary_dim", type=INT32, doc="dims that are turned"),
            Field(name="rotary_interleaved", type=INT32, doc="whether neighbours are"),
            Field(name="rotary_step", type=INT32, doc="from a sequence's query to its next"),
        ),
        arguments=(
            Argument(
                name="rotary_cos",
                dims=_ROTARY_TABLE,
                elements=Elements.NUMBER,
                rows_apart=True,
                type_field="rotary_type",
            ),
            Argument(
                name="rotary_sin", dims=_ROTARY_TABLE, elements=Elements.NUMBER, rows_apart=True
            ),
            Argument(name="rotary_seqlens", dims=("batch",), elements=Elements.INT32),
        ),
    ),
)
# Caches whose elements are not of the queries' type, which asks for it. Both read the scales.
E4M3, E5M2 = FP8 = (
    Policy(
        slot=ELEMENT,
        tag="e4m3",
        cpp="E4m3Operands",
        header="policy/element_e4m3.cuh",
        feature="float8_e4m3fn",
        fields=(
            Field(name="k_scales", type=_FLOATS, doc="[batch, num_kv_heads], or null: k_scale"),
            Field(name="v_scales", type=_FLOATS, doc="likewise"),
            Field(name="k_scale", type=FLOAT, doc="what stored keys are multiplied by"),
            Field(name="v_scale", type=FLOAT, doc="likewise"),
            Field(name="k_scale_batch", type=INT32, doc="between sequences, or 0"),
            Field(name="k_scale_head", type=INT32, doc="between KV heads, or 0"),
            Field(name="v_scale_batch", type=INT32, doc="likewise"),
            Field(name="v_scale_head", type=INT32, doc="likewise"),
        ),
        arguments=tuple(
            Argument(
                name=f"{part}_scale",
                dims=("batch", "num_kv_heads"),
                elements=Elements.FLOAT32,
                field=f"{part}_scales",
                spread=True,
            )
            for part in ("k", "v")
        ),
    ),
    Policy(
        slot=ELEMENT,
        tag="e5m2",
        cpp="E5m2Operands",
        header="policy/element_e5m2.cuh",
        feature="float8_e5m2",
    ),
)
# The same, with scales of tokens and KV heads, which the append computes.
E4M3_OF_TOKENS, E5M2_OF_TOKENS = OF_TOKENS = tuple(
    Policy(
        slot=ELEMENT,
        tag=f"{policy.tag}t",
        cpp=policy.cpp.replace("Operands", "OfTokens"),
        header="policy/element_fp8_tokens.cuh",
        parts=(
            (Schedule.MULTISTAGE, "schedule/multistage/attend_of_tokens.cuh"),
            (Schedule.TMA, "schedule/tma/scales_of_tokens.cuh"),
        ),
        feature=f"{policy.feature} with scales of tokens",
    )
    for policy in FP8
)
POLICIES += FP8 + OF_TOKENS
check_distinct("policies", "policies", (policy.cpp for policy in POLICIES))
check_distinct("policies", "tags", (policy.tag for policy in POLICIES if policy.tag))
# All tensors that a call may pass, in the order in which they are looked at.
CALL = Table(rows=ARGUMENTS.rows + tuple(row for policy in POLICIES for row in policy.arguments))
DEFAULTS = {policy.slot: policy for policy in POLICIES if not policy.tag}
# What C and Rust have, bit by bit.
FEATURES = tuple(policy for policy in POLICIES if policy.feature)


def packed(policies: tuple[Policy, ...]) -> int:
    """Elements of a cache in 16 bits: 2 of a type of 8 bits."""
    return 2 if any(policy.slot is ELEMENT for policy in special(policies)) else 1


def named(cpp: str) -> Policy:
    """The policy of a struct's name."""
    return next(policy for policy in POLICIES if policy.cpp == cpp)


def tagged(tags: str) -> tuple[Policy, ...]:
    """The policies of the tags in a kernel's name, "_cap_sink" for instance.

    Raises:
        ConfigError: One is not known.
    """
    known = {policy.tag: policy for policy in POLICIES if policy.tag}
    found = [tag for tag in tags.split("_") if tag]
    if unknown := [tag for tag in found if tag not in known]:
        raise ConfigError(
            f"kernel name: got the tag {unknown[0]!r}; allowed: {', '.join(known) or 'none'}"
        )
    return tuple(known[tag] for tag in found)


def special(policies: tuple[Policy, ...]) -> tuple[Policy, ...]:
    """Those that are not their slot's default, in the order of the slots.

    Raises:
        ConfigError: Two are for one slot, or something is no policy.
    """
    for policy in policies:
        if not isinstance(policy, Policy):
            raise ConfigError(
                f"policies: got {policy!r}; allowed: objects of codegen.schema.policies"
            )
    by_slot: dict[Slot, Policy] = {}
    for policy in policies:
        other = by_slot.setdefault(policy.slot, policy)
        if other is not policy:
            raise ConfigError(
                f"policies: got {other} and {policy} for the slot {policy.slot.alias}; allowed: "
                "one per slot. No kernel was generated."
            )
    return tuple(by_slot[s] for s in SLOTS if s in by_slot and by_slot[s] is not DEFAULTS[s])


def in_every_slot(policies: tuple[Policy, ...]) -> tuple[Policy, ...]:
    """One per slot: the given ones, and defaults."""
    by_slot = DEFAULTS | {policy.slot: policy for policy in policies}
    return tuple(by_slot[slot] for slot in SLOTS)
