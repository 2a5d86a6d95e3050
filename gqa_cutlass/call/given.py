"""What a call gives: tensors by the rows of the table of arguments, looked at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from gqa_cutlass.codegen.schema.policies import CALL
from gqa_cutlass.codegen.schema.problem import MAX_TOKENS
from gqa_cutlass.errors import InputError, shown
from gqa_cutlass.gpu import torch_private
from gqa_cutlass.gpu.torch_private import FORWARD_AD
from gqa_cutlass.tensors import flaw, is_tensor, memory_flaw

ALIGNMENT = 16  # of the widest access
LENGTHS = "cache_seqlens"  # the one argument that may be an int instead
PAGES = "block_table"  # the one argument that makes pools of the caches
SLOTS = "slot_mapping"  # which goes with it
Q_ENDS, NEW_ENDS = "cu_seqlens_q", "cu_seqlens_k_new"  # of sequences with unlike many tokens
_LATER = (
    "longer prompts go to torch's scaled_dot_product_attention or to FlashAttention, and their "
    "keys and values to KVCache.prefill"
)
ROWS = {row.name: row for row in CALL.rows}
Given = Sequence[Any]  # by the rows of the table; those that are left out at its end are absent


class Seen(NamedTuple):
    """What a call has to know of a tensor, asked for once.

    Args:
        shape: Its sizes.
        strides: Distances between neighbours, in elements.
        dtype: What it holds.
        device: Where it is.
        requires_grad: Whether it learns.
        itemsize: Bytes of an element.
        address: Of the first element; 0 on the meta device.
        reach: Bytes from there to the one past the last element; 0 without elements.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool
    itemsize: int
    address: int
    reach: int


Layout = Mapping[str, Seen]  # of the tensors that are given, in the table's order


def see(given: Given) -> dict[str, Seen]:
    """Look at the tensors of a call.

    Returns:
        What each is, by name, of those that are given.

    Raises:
        InputError: One is no plain, dense tensor; k comes without v.
    """
    tensors = {name: t for name, t in zip(ROWS, given, strict=False) if t is not None}
    complete = tensors.keys() >= _REQUIRED and ("k" in tensors) == ("v" in tensors)
    if type(tensors.get(LENGTHS)) is int:
        del tensors[LENGTHS]
    if not complete or not all([is_plain(t) for t in tensors.values()]):
        _check_kinds(given)
    return {name: look(t) for name, t in tensors.items()}


_ADDRESS = Seen._fields.index("address")
_REQUIRED = {row.name for row in CALL.rows if not row.optional} | {LENGTHS}


def look(tensor: Tensor) -> Seen:
    """See one tensor, which is plain."""
    shape, strides, itemsize = tensor.shape, tensor.stride(), tensor.element_size()
    last = sum([(n - 1) * s for n, s in zip(shape, strides, strict=True)])
    return Seen(
        shape=shape,
        strides=strides,
        dtype=tensor.dtype,
        device=tensor.device,
        requires_grad=tensor.requires_grad,
        itemsize=itemsize,
        address=tensor.data_ptr(),
        reach=(last + 1) * itemsize if tensor.numel() else 0,
    )


def is_plain(value: object) -> bool:
    """Whether a value is a plain tensor for sure; `flaw` says what else there is."""
    plain, foreign = torch_private.plain_keys()
    return (
        type(value) is Tensor
        and plain is not None
        and FORWARD_AD._current_level < 0
        and not torch_private.dispatch_keys(value).raw_repr() & foreign
    )


def _check_kinds(given: Given) -> None:
    """Raise InputError unless all are plain, dense tensors, or absent where they may be."""
    values = dict(zip(ROWS, given, strict=False))
    if (values["k"] is None) != (values["v"] is None):
        missing = "v" if values["v"] is None else "k"
        fail("k and v", f"no {missing}", "both (append the token) or neither (attend only)")
    for name, value in values.items():
        if name == LENGTHS:
            _check_kind_of_lengths(value)
        elif not ((row := ROWS[name]).optional and value is None) and (found := flaw(value)):
            number = row.spread * "a number or "
            fail(name, found.got, number + found.allowed + row.optional * " or None")


def _check_kind_of_lengths(lengths: object) -> None:
    if type(lengths) is int:
        return
    if not is_tensor(lengths):
        fail(LENGTHS, f"a {type(lengths).__name__}", "an int or an int32 tensor")
    if found := flaw(lengths):
        fail(LENGTHS, *found)


def key_of(layout: Layout) -> tuple[object, ...]:
    """What a plan depends on: layouts, types, devices and alignments; of lengths, nothing."""
    return tuple(
        [
            (name, t.address % ALIGNMENT if ROWS[name].stride else 0, *t[:_ADDRESS])
            for name, t in layout.items()
            if name != LENGTHS
        ]
    )


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """The tokens of a call.

    Args:
        batch: Sequences.
        queries: Query tokens of a sequence; at most, where they differ.
        all_queries: Those of all sequences.
        new: New tokens of a sequence; at least, where they differ.
        all_new: Those of all sequences.
        ragged_q: Whether sequences differ in query tokens, which then lie one behind the other.
        ragged_new: The same of new tokens.
        lse_shape: The sizes of the log-sum-exp.
        flat: The arguments that have one sequence's tokens behind those of another.
        several: Whether one query and one new token per sequence are not all.
    """

    batch: int
    queries: int = 1
    all_queries: int
    new: int = 1
    all_new: int
    ragged_q: bool = False
    ragged_new: bool = False
    lse_shape: tuple[int, ...]
    flat: frozenset[str] = frozenset()
    several: bool = False


def tokens_of(layout: Layout, max_seqlen_q: int | None = None) -> Tokens:
    """Look at the sizes of queries and new tokens.

    Args:
        layout: What `see` saw.
        max_seqlen_q: Query tokens of a sequence at most, where they differ.

    Raises:
        InputError: A tensor has not so many dimensions, or there are too many tokens or none.
    """
    q, k = layout["q"], layout.get("k")
    ends = layout.get(Q_ENDS, layout.get(NEW_ENDS))
    ragged_q, ragged_new = Q_ENDS in layout, NEW_ENDS in layout
    if ragged_new and k is None:
        fail(NEW_ENDS, "one without k", "one with k and v: it says whose their tokens are")
    sides = ("q", ragged_q), ("out", ragged_q), ("k", ragged_new), ("v", ragged_new)
    for name, side in sides:
        if name in layout:
            _check_rank(name, layout[name], ragged=side)
    if ragged_q and ends is not None:
        if len(ends.shape) != 1 or ends.shape[0] < 2:
            fail(Q_ENDS, shape_text(ends.shape), "[batch + 1]")
        batch, queries = ends.shape[0] - 1, q.shape[0]
        if max_seqlen_q is not None:
            queries = min(max_seqlen_q, queries)
        all_queries = q.shape[0]
        what = "max_seqlen_q" if max_seqlen_q is not None else "tokens of q, without max_seqlen_q"
    else:
        batch, queries = q.shape[0], q.shape[1] if len(q.shape) == 4 else 1
        all_queries = batch * queries
        what = "tokens of q"
    if not 1 <= queries <= MAX_TOKENS:
        fail(what, shown(queries), f"1 to {MAX_TOKENS} per sequence; {_LATER}")
    new = 0 if k is None or ragged_new else k.shape[1] if len(k.shape) == 4 else 1
    if k is not None and not ragged_new and not 1 <= new <= MAX_TOKENS:
        fail("tokens of k", shown(new), f"1 to {MAX_TOKENS} per sequence; {_LATER}")
    heads, flat = q.shape[-2], [name for name, s in sides if s]
    one = batch, heads
    return Tokens(
        batch=batch,
        queries=queries,
        all_queries=all_queries,
        new=new,
        all_new=0 if k is None else k.shape[0] if ragged_new else batch * new,
        ragged_q=ragged_q,
        ragged_new=ragged_new,
        lse_shape=(heads, all_queries) if ragged_q else one if queries == 1 else (*one, queries),
        flat=frozenset(flat),
        several=queries > 1 or new > 1 or ragged_q or ragged_new,
    )


def _check_rank(name: str, t: Seen, *, ragged: bool) -> None:
    if ragged and len(t.shape) != 3:
        which = NEW_ENDS if name in ("k", "v") else Q_ENDS
        fail(name, shape_text(t.shape), f"[all tokens, heads, head_dim], with {which}")
    if len(t.shape) not in (3, 4):
        allowed = "[batch, heads, head_dim] or [batch, tokens, heads, head_dim]"
        fail(name, shape_text(t.shape), allowed)


def check_mode() -> None:
    """Raise InputError while torch makes tensors that no kernel can work on."""
    made = torch.empty(1, device="cpu")
    if not is_plain(made) and (found := flaw(made) or memory_flaw(made)):
        fail(
            "torch's mode",
            f"one in which a new tensor is {found.got}",
            "calls outside of FakeTensorMode and of the transforms of torch.func",
        )


def shape_text(shape: Sequence[int]) -> str:
    """A shape in the words of an error."""
    return f"shape {list(shape)}"


def fail(what: str, got: str, allowed: str) -> NoReturn:
    """Raise InputError in the house's words."""
    raise InputError(f"gqa_decode: {what}: got {got}; allowed: {allowed}. Nothing was launched.")
