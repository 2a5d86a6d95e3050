"""What a call gives: tensors by the rows of the table of arguments, looked at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from gqa_cutlass.codegen.schema.policies import CALL
from gqa_cutlass.errors import InputError
from gqa_cutlass.gpu import torch_private
from gqa_cutlass.gpu.torch_private import FORWARD_AD
from gqa_cutlass.tensors import flaw, is_tensor, memory_flaw

ALIGNMENT = 16  # of the widest access
LENGTHS = "cache_seqlens"  # the one argument that may be an int instead
PAGES = "block_table"  # the one argument that makes pools of the caches
SLOTS = "slot_mapping"  # which goes with it
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
        elif not (ROWS[name].optional and value is None) and (found := flaw(value)):
            fail(name, found.got, found.allowed + ROWS[name].optional * " or None")


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
