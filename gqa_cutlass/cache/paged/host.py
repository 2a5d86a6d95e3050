"""What counts pages and tokens, and so must run for every call, on the host."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

from gqa_cutlass.tracing import untraced

_HOST_ONLY = (
    "gqa_cutlass: a PagedKVCache counts on the host; in compiled code call `decode` of a step that "
    "was begun outside of it, or the step of a PagedBatch"
)
P = ParamSpec("P")
R = TypeVar("R")


def on_host(method: Callable[P, R]) -> Callable[P, R]:
    """Decorate what counts: traced, its pages and lengths would be those of the trace."""
    return untraced(method, _HOST_ONLY)
