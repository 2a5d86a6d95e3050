"""PagedKVCache: keys and values in pages of a pool, which sequences take and give back.

Imported on first use: whoever only counts pages needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gqa_cutlass.cache.paged.page_allocator import PageAllocator
    from gqa_cutlass.cache.paged.paged_kv_cache import PagedKVCache

_HOMES = {
    "PageAllocator": "page_allocator",
    "PagedKVCache": "paged_kv_cache",
}
__all__ = [  # noqa: F822 - provided by __getattr__
    "PageAllocator",
    "PagedKVCache",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'gqa_cutlass.cache.paged' has no attribute {name!r}")
    return getattr(import_module(f"gqa_cutlass.cache.paged.{_HOMES[name]}"), name)
