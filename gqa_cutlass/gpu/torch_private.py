"""Ways through torch that cost less and are private to it. Where one is absent, another serves.

What is there is chosen on import; what has to be tried out, when it is first needed.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from functools import cache, partial, reduce
from operator import or_
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

_Comparison = Callable[..., bool]

# Its `_current_level` is not negative while a tensor may have a tangent.
FORWARD_AD: Any = (
    forward_ad if hasattr(forward_ad, "_current_level") else SimpleNamespace(_current_level=0)
)
_BACKENDS = {"cpu": "CPU", "cuda": "CUDA", "meta": "Meta"}


def _private(name: str, substitute: Callable[..., int]) -> Callable[..., int]:
    """A function of torch._C, or what stands in for it where torch has none."""
    found: Callable[..., int] = getattr(torch._C, name, substitute)
    return found


def _handle_of_current_stream(index: int) -> int:
    """As `current_stream`, by public means."""
    return int(torch.cuda.current_stream(index).cuda_stream)


# What Inductor and Triton use; the public ways cost 5 us more. The current GPU's index, and the
# handle of a GPU's current stream.
current_device = _private("_cuda_getDevice", torch.cuda.current_device)
current_stream = _private("_cuda_getCurrentRawStream", _handle_of_current_stream)


def _loaded_dynamo() -> object:
    """What may take up frames, where torch does not say whether it does; None: nothing."""
    return sys.modules.get("torch._dynamo")


# What takes up the frames that run, to compile them: None where nothing does, as outside compiled
# code and in its graphs.
frame_callback: Callable[[], object] = getattr(
    torch._C._dynamo.eval_frame, "get_eval_frame_callback", _loaded_dynamo
)


_num_modes = _private("_len_torch_dispatch_stack", lambda: 0)
_jit_trace: Callable[[], object] = getattr(torch._C, "_get_tracing_state", lambda: None)


def is_watching() -> bool:
    """Whether torch records its operations, or does them otherwise: a mode, or torch.jit.trace."""
    return bool(_num_modes()) or _jit_trace() is not None


class _Subclass(Tensor):
    """A tensor of another type."""


def comparison(tensors: Sequence[object]) -> _Comparison:
    """What tells whether as many others have the types and layouts of these tensors, in order.

    A yes means equal shapes, strides, dtypes, devices and `requires_grad`. A no asks for a closer
    look: it is also said under inference mode when this was made outside, and for a tensor that
    comes twice. Done in C++ by what Dynamo guards its graphs with: 0.1 us per tensor. It asks for
    strides, at which a nested tensor ends the process: never pass one.
    """
    return _guard(tensors) if _guards_work() else unequal


def unequal(*tensors: object) -> bool:
    """Say no, where there is no comparison."""
    return False


def _guard(tensors: Sequence[object]) -> _Comparison:
    guards = torch._C._dynamo.guards.TensorGuards
    guard = guards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)
    return guard.check


@cache
def _guards_work() -> bool:
    """Whether torch's guards are there and tell apart all that a plan's signature does."""
    try:
        with torch.inference_mode(False):
            one = torch.zeros(2, 4, 8, dtype=torch.float16, device="cpu")
            others = (
                None, 0, one[:1], one[0], one[..., :4], one.mT, one.bfloat16(),
                torch.zeros(2, 4, 16, dtype=torch.float16, device="cpu")[..., :8],
                torch.empty_like(one, device="meta"), one.clone().requires_grad_(),
                one.as_subclass(_Subclass), one.to_sparse(),
            )  # fmt: skip
            equal = _guard([one])
            return equal(one.clone()) is True and not any(equal(other) for other in others)
    except (AttributeError, TypeError, RuntimeError):
        return False


def allocator(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Callable[[], Tensor]:
    """What makes contiguous tensors, on the current device of the given one's type."""
    shortcut = _allocation(device.type)
    if shortcut is None:
        return partial(torch.empty, shape, dtype=dtype, device=device)
    strides = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    return partial(shortcut, shape, strides, dtype)


@cache
def _allocation(device_type: str) -> Callable[..., Tensor] | None:
    """What Inductor's code allocates with, in a third of the time of torch.empty."""
    try:
        shortcut = getattr(torch._C._dynamo.guards, f"_empty_strided_{device_type}")
        made = shortcut((2, 3), (3, 1), torch.float16)
    except (AttributeError, TypeError, RuntimeError):
        return None
    right = made.device.type == device_type and made.dtype == torch.float16
    return shortcut if right and made.shape == (2, 3) and made.stride() == (3, 1) else None


# The keys by which torch dispatches a tensor.
dispatch_keys: Callable[[Tensor], Any] = torch._C._dispatch_keys


def foreign_keys(tensor: Tensor) -> str | None:
    """Names of the keys by which torch dispatches a tensor, but no plain one.

    Nested, sparse and quantised tensors, negated views, wrappers of vmap and of functionalisation,
    subclasses with `__torch_dispatch__`, zero tensors and kinds yet to come have one. Empty also on
    devices that run no kernels; None where torch does not tell.
    """
    plain, foreign = plain_keys()
    if plain is None:
        return None
    keys = dispatch_keys(tensor)
    if not keys.raw_repr() & foreign:
        return ""
    with torch._C.DisableTorchFunctionSubclass():  # a subclass may answer as it likes
        if tensor.device.type not in _BACKENDS:
            return ""
    return str(keys - plain).removeprefix("DispatchKeySet(").removesuffix(")")


@cache
def plain_keys() -> tuple[torch._C.DispatchKeySet | None, int]:
    """All keys that a plain tensor may have, and the bits of all others."""
    names = ["ADInplaceOrView", "AutocastCPU", "AutocastCUDA"]
    for backend in _BACKENDS.values():
        names += backend, f"Autograd{backend}"
    try:
        keys = (torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name)) for name in names)
        plain = reduce(or_, keys)
        foreign, one = ~plain.raw_repr(), dispatch_keys(torch.empty(0, device="cpu"))
        return (plain, foreign) if one.raw_repr() and not one.raw_repr() & foreign else (None, 0)
    except (AttributeError, TypeError, RuntimeError):
        return None, 0
