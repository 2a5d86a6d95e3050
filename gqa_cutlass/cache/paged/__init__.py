"""PagedKVCache: keys and values in pages of a pool, which sequences take and give back.

Imported on first use: whoever only counts pages needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gqa_cutlass.cache.paged.batch import PagedBatch
    from gqa_cutlass.cache.paged.indptr import block_table_from_indptr, block_table_to_indptr
    from gqa_cutlass.cache.paged.page_allocator import PageAllocator
    from gqa_cutlass.cache.paged.paged_kv_cache import PagedKVCache

_HOMES = {
    "PageAllocator": "page_allocator",
    "PagedBatch": "batch",
    "PagedKVCache": "paged_kv_cache",
    "block_table_from_indptr": "indptr",
    "block_table_to_indptr": "indptr",
}
__all__ = [  # noqa: F822 - provided by __getattr__
    "PageAllocator",
    "PagedBatch",
    "PagedKVCache",
    "block_table_from_indptr",
    "block_table_to_indptr",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'gqa_cutlass.cache.paged' has no attribute {name!r}")
    return getattr(import_module(f"gqa_cutlass.cache.paged.{_HOMES[name]}"), name)
