"""What torch.compile needs to know, and nothing that loads its compiler: that takes seconds."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from gqa_cutlass.gpu.torch_private import frame_callback

_Given = ParamSpec("_Given")
_Result = TypeVar("_Result")

# Dynamo takes it for True, and for everybody else it is False: 30 ns, a third of is_compiling.
is_traced = torch.compiler.is_dynamo_compiling


def untraced(
    function: Callable[_Given, _Result], why: str | None = None
) -> Callable[_Given, _Result]:
    """Decorate what only the host can do: compiled code breaks its graph for it, and says why."""

    @wraps(function)
    def call(*args: _Given.args, **kwargs: _Given.kwargs) -> _Result:
        if is_traced():
            return break_graph(function, why or HOST_ONLY)(*args, **kwargs)
        if frame_callback() is not None:  # Dynamo takes up what is called by frames that it skips
            disabled: Callable[_Given, _Result] = _disabled(function)
            return disabled(*args, **kwargs)
        return function(*args, **kwargs)

    return call


@cache
def _disabled(function: Callable[_Given, _Result]) -> Callable[_Given, _Result]:
    disabled: Callable[_Given, _Result] = torch.compiler.disable(function)
    return disabled


HOST_ONLY = (
    "gqa_cutlass: plan, Plan, warmup, explain and check_overflow run on the host; in compiled code "
    "call gqa_decode or KVCache.decode, which are operators there"
)


def break_graph(function: Callable[_Given, _Result], why: str) -> Callable[_Given, _Result]:
    """A function as traced code may call it: beside its graphs, and nothing below it is traced."""
    torch._dynamo.graph_break(msg=why)
    disabled: Callable[_Given, _Result] = torch.compiler.disable(function)
    return disabled


def mark_static(*tensors: Tensor) -> None:
    """Promise that tensors stay where they are, so that CUDA graphs may write to them in place.

    Inductor gives up on CUDA graphs for functions that write to any others. This is what
    `torch._dynamo.mark_static_address` does, which could not be called without loading it.
    """
    for tensor in tensors:
        tensor._dynamo_static_input_type = "unguarded"  # type: ignore[attr-defined]
