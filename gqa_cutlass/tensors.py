"""What a tensor must be for a kernel to work on its memory: plain, dense, and all of it there.

A kernel is told an address, strides and a type. Where the same bytes mean something else to torch
(negated views, quantised values, wrappers of vmap, fakes), or where they end before the tensor
does, it must not be asked.
"""

from __future__ import annotations

from typing import NamedTuple, TypeGuard

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.parameter import is_lazy

from gqa_cutlass.gpu.torch_private import FORWARD_AD, foreign_keys

_PLAIN = "a plain, dense torch.Tensor, whose elements are what its memory holds"


class Flaw(NamedTuple):
    """What keeps a value from being used, in the words of an error message.

    Args:
        got: What it is.
        allowed: What it must be, and what makes it so.
    """

    got: str
    allowed: str


def is_tensor(value: object) -> TypeGuard[Tensor]:
    """Whether a value is a tensor by its type, whatever it says of itself."""
    return issubclass(type(value), Tensor)


def flaw(value: object) -> Flaw | None:
    """Why a value is no plain, dense tensor; None when it is one.

    Subclasses and parameters will do, on any device, with or without memory; see `memory_flaw`.
    """
    if type(value) is not Tensor:
        if not is_tensor(value):
            return Flaw(f"a {type(value).__name__}", "a torch.Tensor")
        if is_lazy(value):
            return Flaw("a parameter that is not initialised", "a dense (strided) tensor")
    keys = foreign_keys(value)
    if keys != "" and (found := _flaw_of_kind(value, keys)):
        return found
    in_level = FORWARD_AD._current_level >= 0
    if in_level and forward_ad.unpack_dual(value).tangent is not None:
        return Flaw(
            "a tensor with a tangent (there is no forward-mode derivative)",
            "tensors without tangents; call it outside forward_ad.dual_level()",
        )
    return None


def _flaw_of_kind(tensor: Tensor, keys: str | None) -> Flaw | None:
    """What to call a tensor that torch dispatches by such keys, if it is known by which."""
    with torch._C.DisableTorchFunctionSubclass():  # a subclass may answer as it likes
        if tensor.is_nested:
            return Flaw("a nested tensor", "a dense (strided) tensor")
        if tensor.layout is not torch.strided:
            return Flaw(f"a {tensor.layout} tensor", "a dense (strided) tensor")
        if tensor.is_neg():
            return Flaw("a negated view", f"{_PLAIN}; call .resolve_neg()")
        if tensor.is_conj():
            return Flaw("a conjugated view", f"{_PLAIN}; call .resolve_conj()")
    if keys:
        # Each device decodes the heads, or the sequences, of which it has a shard.
        remedy = "; pass each device its own part: .to_local()" * hasattr(tensor, "to_local")
        return Flaw(f"a {type(tensor).__name__} that torch dispatches by {keys}", _PLAIN + remedy)
    return None


def plain_shape(value: object) -> tuple[int, ...]:
    """Sizes of a plain tensor, whatever its class says of them; of anything else, none."""
    if flaw(value):
        return ()
    with torch._C.DisableTorchFunctionSubclass():
        return tuple(value.shape)  # type: ignore[attr-defined]


def memory_flaw(tensor: Tensor, reach: int | None = None) -> Flaw | None:
    """Why a plain tensor's memory does not hold all of its elements; None when it does.

    Memory may be missing although shape and address look right: storage can be freed or shrunk
    under the views that are left (`untyped_storage().resize_`).

    Args:
        tensor: On a device that has memory, unlike meta.
        reach: `byte_reach` of it, where it is known.
    """
    reach = byte_reach(tensor) if reach is None else reach
    needed = tensor.storage_offset() * tensor.element_size() + reach if reach else 0
    held = tensor.untyped_storage().nbytes()
    if held == 0 and needed or reach and not tensor.data_ptr():
        return Flaw(
            "a tensor without memory (its storage was freed)", "tensors that hold their elements"
        )
    if held < needed:
        return Flaw(
            f"a tensor that ends {needed} bytes into a storage of {held} (which was shrunk)",
            "tensors that hold their elements",
        )
    return None


def byte_reach(tensor: Tensor) -> int:
    """Bytes from a tensor's first to the one past its last; 0 for one without elements."""
    if tensor.is_contiguous():  # the shorter way
        return tensor.nbytes
    if not tensor.numel():
        return 0
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()
