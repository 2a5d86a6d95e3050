"""Grouped-query decode attention: the fastest kernels, generated, compiled and run from Python.

Attributes are imported on first use: `import gqa_cutlass.codegen` must not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gqa_cutlass.ahead import explain, warmup
    from gqa_cutlass.api import check_overflow, gqa_decode, plan
    from gqa_cutlass.cache import KVCache
    from gqa_cutlass.cache.paged import (
        PageAllocator,
        PagedBatch,
        PagedKVCache,
        block_table_from_indptr,
        block_table_to_indptr,
    )
    from gqa_cutlass.call.plan import Plan
    from gqa_cutlass.call.tokens import pack_tree_mask
    from gqa_cutlass.decode_config import GQADecodeConfig, gqa_attention_decode
    from gqa_cutlass.errors import (
        CacheAllocationError,
        CacheOverflowError,
        CollectiveError,
        CompileError,
        CompilerMissingError,
        ConfigError,
        DeviceError,
        ExportError,
        GqaError,
        InputError,
        KernelFault,
        KernelMissingError,
        LaunchError,
        OutOfPagesError,
        OutputError,
        PtxError,
        StoreError,
    )
    from gqa_cutlass.flash_attn import flash_attn_with_kvcache
    from gqa_cutlass.merge import merge_states
    from gqa_cutlass.version import __version__

_HOMES = {
    "GQADecodeConfig": "decode_config",
    "block_table_from_indptr": "cache.paged.indptr",
    "block_table_to_indptr": "cache.paged.indptr",
    "check_overflow": "api",
    "explain": "ahead",
    "gqa_attention_decode": "decode_config",
    "gqa_decode": "api",
    "plan": "api",
    "warmup": "ahead",
    "KVCache": "cache.kv_cache",
    "PageAllocator": "cache.paged.page_allocator",
    "PagedBatch": "cache.paged.batch",
    "PagedKVCache": "cache.paged.paged_kv_cache",
    "Plan": "call.plan",
    "CacheAllocationError": "errors",
    "CacheOverflowError": "errors",
    "CollectiveError": "errors",
    "CompileError": "errors",
    "CompilerMissingError": "errors",
    "ConfigError": "errors",
    "DeviceError": "errors",
    "ExportError": "errors",
    "GqaError": "errors",
    "InputError": "errors",
    "KernelFault": "errors",
    "KernelMissingError": "errors",
    "LaunchError": "errors",
    "OutOfPagesError": "errors",
    "OutputError": "errors",
    "PtxError": "errors",
    "StoreError": "errors",
    "__version__": "version",
    "flash_attn_with_kvcache": "flash_attn",
    "merge_states": "merge",
    "pack_tree_mask": "call.tokens",
}
__all__ = [  # noqa: F822 - provided by __getattr__
    "CacheAllocationError",
    "CacheOverflowError",
    "CollectiveError",
    "CompileError",
    "CompilerMissingError",
    "ConfigError",
    "DeviceError",
    "ExportError",
    "GQADecodeConfig",
    "GqaError",
    "InputError",
    "KVCache",
    "KernelFault",
    "KernelMissingError",
    "LaunchError",
    "OutOfPagesError",
    "OutputError",
    "PageAllocator",
    "PagedBatch",
    "PagedKVCache",
    "Plan",
    "PtxError",
    "StoreError",
    "__version__",
    "block_table_from_indptr",
    "block_table_to_indptr",
    "check_overflow",
    "explain",
    "flash_attn_with_kvcache",
    "gqa_attention_decode",
    "gqa_decode",
    "merge_states",
    "pack_tree_mask",
    "plan",
    "warmup",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'gqa_cutlass' has no attribute {name!r}")
    return getattr(import_module(f"gqa_cutlass.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    """The public names, whether or not they were imported."""
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
