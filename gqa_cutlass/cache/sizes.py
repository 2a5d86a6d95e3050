"""The sizes of caches: what is allowed, how many bytes that is, and what would fit instead."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from bisect import bisect_right
from dataclasses import dataclass
from typing import ClassVar, NoReturn

import torch
from torch import Tensor

from gqa_cutlass.cache.paged.page_allocator import MAX_PAGES
from gqa_cutlass.call.layout import DTYPES
from gqa_cutlass.call.stored import FP8, FP8_NAMES
from gqa_cutlass.codegen.config import HEAD_DIM_RULE, HEAD_DIMS
from gqa_cutlass.codegen.schema.problem import MAX_BATCH, MAX_SEQ_LEN
from gqa_cutlass.errors import InputError, shown

_MOST = 2**31 - 1  # of what has no other limit; a kernel's int is no larger
BLOCK = 2**21  # torch's allocator, and the driver below it, hand out large blocks in such steps
SPARE_SHARE = 256  # one part in so many is left to the driver's tables and to workspaces
_INT_BYTES = _SCALE_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class Sizes(ABC):
    """The sizes of the caches of a model's layers, of which one is what grows with the memory.

    Args:
        num_layers: Layers.
        num_kv_heads: KV heads.
        head_dim: Dimension per head of keys.
        dtype: Element type: torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2.
        head_dim_v: Dimension per head of values; None: as head_dim.
        by_token: Whether there is a float32 scale beside every head of every token.

    Attributes:
        owner: In whose name errors are.
        limits: The largest values of the sizes that are counts, by their names.
        grows: The size that grows with the memory.
        remedy: What to do where there is too little, in words.

    Raises:
        InputError: One of them is not allowed.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    head_dim_v: int | None = None
    by_token: bool = False

    owner: ClassVar[str]
    limits: ClassVar[dict[str, int]]
    grows: ClassVar[str]
    remedy: ClassVar[str]

    def __post_init__(self) -> None:
        for name, most in self.limits.items():
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= most:
                refuse(self.owner, name, shown(value), f"an int from 1 to {most}")
        for name, dim in (("head_dim", self.head_dim), ("head_dim_v", self._dims[1])):
            if type(dim) is not int or dim not in HEAD_DIMS:
                refuse(self.owner, name, shown(dim), HEAD_DIM_RULE)
        types = *DTYPES, *FP8
        if not isinstance(self.dtype, torch.dtype) or self.dtype not in types:
            refuse(self.owner, "dtype", shown(self.dtype), " or ".join(map(str, types)))
        if self.by_token and self.dtype not in FP8:
            got = f"'token', with caches of {self.dtype}"
            refuse(self.owner, "k_scale", got, f"None, or caches of {FP8_NAMES}")

    @property
    @abstractmethod
    def rows(self) -> dict[str, int]:
        """The first two dimensions of keys and values, by their names."""

    @property
    @abstractmethod
    def state_shape(self) -> tuple[int, ...]:
        """Of the int32 that all layers share."""

    @property
    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of one layer's keys, and of its values."""
        k, v = ((*self.rows.values(), self.num_kv_heads, dim) for dim in self._dims)
        return k, v

    @property
    def layer_shapes(self) -> list[tuple[int, ...]]:
        """Of keys and values, layer by layer."""
        return [*self.shapes] * self.num_layers

    @property
    def table_shapes(self) -> list[tuple[int, ...]]:
        """Of int32 that layers need besides."""
        return []

    @property
    def text(self) -> str:
        """The shapes, as messages say them."""
        k, v = map(list, self.shapes)
        shapes = f"k and v of {k}" if k == v else f"k of {k} and v of {v}"
        layers = f" in each of {self.num_layers} layers" * (self.num_layers > 1)
        names = ", ".join(self.rows)
        scales = ", float32 scales of tokens and KV heads" * self.by_token
        return f"{shapes} ({names}, num_kv_heads, head_dim), {self.dtype}{scales}{layers}"

    @property
    def total_bytes(self) -> int:
        """Bytes of K and V of all layers, of their scales, and of what they share."""
        grown: int = getattr(self, self.grows)
        return self.num_layers * grown * sum(self._unit_bytes) + self._state_bytes

    def largest(self, available: int) -> int:
        """The largest of what grows that is sure to fit into so many bytes; 0 for none."""
        usable = available - available // SPARE_SHARE - self._state_bytes
        blocks = usable // BLOCK - 1  # one for the state
        units = self._unit_bytes

        def taken(count: int) -> int:
            return self.num_layers * sum(-(-count * unit // BLOCK) for unit in units)

        return bisect_right(range(1, self.limits[self.grows] + 1), blocks, key=taken)

    @property
    def _dims(self) -> tuple[int, int]:
        """Of keys and of values."""
        return self.head_dim, self.head_dim if self.head_dim_v is None else self.head_dim_v

    @property
    def _unit_bytes(self) -> list[int]:
        """Bytes of one of what grows, in one layer: of keys, of values, of scales of each."""
        each = math.prod(n for name, n in self.rows.items() if name != self.grows)
        rows = [dim * self.dtype.itemsize for dim in self._dims]
        rows += [_SCALE_BYTES] * (2 * self.by_token)
        return [each * self.num_kv_heads * row for row in rows]

    @property
    def _state_bytes(self) -> int:
        return math.prod(self.state_shape) * _INT_BYTES


@dataclass(frozen=True, kw_only=True)
class BatchSizes(Sizes):
    """Of caches with a row per sequence.

    Args:
        batch_size: Sequences.
        max_seq_len: Tokens that a sequence's cache can hold.
    """

    batch_size: int
    max_seq_len: int

    owner = "KVCache"
    limits = {
        "num_layers": _MOST, "batch_size": MAX_BATCH, "max_seq_len": MAX_SEQ_LEN,
        "num_kv_heads": _MOST,
    }  # fmt: skip
    grows = "max_seq_len"
    remedy = "shorten the cache, take fewer sequences, or free memory"

    @property
    def rows(self) -> dict[str, int]:
        """The first two dimensions."""
        return {"batch_size": self.batch_size, "max_seq_len": self.max_seq_len}

    @property
    def state_shape(self) -> tuple[int, ...]:
        """Lengths, whether sequences overflowed, and lengths before drafts."""
        return 3, self.batch_size


@dataclass(frozen=True, kw_only=True)
class PoolSizes(Sizes):
    """Of pools of pages.

    Args:
        num_pages: Pages.
        page_size: Tokens of a page.
    """

    num_pages: int
    page_size: int

    owner = "PagedKVCache"
    limits = {
        "num_layers": _MOST, "num_pages": MAX_PAGES, "page_size": MAX_SEQ_LEN, "num_kv_heads": _MOST
    }  # fmt: skip
    grows = "num_pages"
    remedy = "take fewer pages, or free memory"

    @property
    def rows(self) -> dict[str, int]:
        """The first two dimensions."""
        return {"num_pages": self.num_pages, "page_size": self.page_size}

    @property
    def state_shape(self) -> tuple[int, ...]:
        """Nothing."""
        return (0,)


def rows_text(k: Tensor, v: Tensor) -> str:
    """What rows of a cache are, as its representation says it."""
    num_kv_heads, head_dim = k.shape[2:]
    head_dim_v = v.shape[-1]
    values = f"head_dim_v={head_dim_v}, " if head_dim_v != head_dim else ""
    return f"num_kv_heads={num_kv_heads}, head_dim={head_dim}, {values}dtype={k.dtype}"


def refuse(owner: str, what: str, got: str, allowed: str) -> NoReturn:
    """Raise InputError for what cannot be allocated."""
    raise InputError(f"{owner}: {what}: got {got}; allowed: {allowed}. Nothing was allocated.")
