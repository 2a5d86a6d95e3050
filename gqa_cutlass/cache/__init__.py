"""KVCache: keys and values of sequences, and how many tokens each holds.

Imported on first use: the parts of it that others use do not need it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gqa_cutlass.cache.kv_cache import KVCache

__all__ = ["KVCache"]  # noqa: F822 - provided by __getattr__


def __getattr__(name: str) -> object:
    if name != "KVCache":
        raise AttributeError(f"module 'gqa_cutlass.cache' has no attribute {name!r}")
    return import_module("gqa_cutlass.cache.kv_cache").KVCache
