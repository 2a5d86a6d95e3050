"""Which rows of a paged cache a launch may touch: those of its sequences' own tokens.

What the kernel finds out on the device, this finds out on the host, in another way: lengths, table
and slots are tensors of the CPU. Free pages, pages of other sequences and rows behind a sequence's
last token are then outside of all that a launch may read.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gqa_cutlass.codegen.schema.params import Params
from gqa_cutlass.codegen.schema.rounding import round_up
from gqa_cutlass.ptxsim.memory.spaces import OVERREAD, READ, WRITE, Region
from gqa_cutlass.tensormap import TensorMap

Ints = NDArray[np.int64]
_POOLS = ("k_cache", "v_cache")


def by_page(regions: list[Region], argument: Any, batch: int) -> list[Region]:
    """Let a launch touch no other rows of pools than its sequences' tokens.

    A cached token that is attended to can be read, and nothing before a window or behind padding's
    end. The copy engine reads whole boxes, whose other rows may be written meanwhile: nobody uses
    what it finds there. Only the rows of new tokens can be written.

    Args:
        regions: All that it may touch, under the names of `Params`.
        argument: What it reads.
        batch: Its sequences.

    Returns:
        The same regions, where the cache is not paged.
    """
    params = getattr(argument, "decode", argument)
    if not getattr(params, "block_table", None):
        return regions
    tensors = {r.name: r for r in regions}
    box = TensorMap.from_bytes(bytes(argument.keys)).box[1] if params is not argument else 1
    rows = _Rows(params, tensors, batch).found(box)
    return [replace(r, rows=rows) if r.name in _POOLS else r for r in regions]


class _Rows:
    """The rows of pools that a launch has business with.

    Args:
        params: What it is told.
        tensors: What it may touch, by name.
        batch: Its sequences.
    """

    def __init__(self, params: Params, tensors: Mapping[str, Region], batch: int) -> None:
        self._params = params
        self._tensors = tensors
        self._table = self._values("block_table", np.int32)
        self._lengths = self._of_each("seqlens", np.full(batch, params.seqlen))
        self._row = self._of_each("cache_batch_idx", np.arange(batch))
        new = params.num_new_tokens or int(bool(params.k_new))
        self._new = self._counts("cu_seqlens_k_new", new if params.k_new else 0, batch)
        self._begins = np.concatenate([[0], np.cumsum(self._new)])  # of slots
        self._queries = self._counts("cu_seqlens_q", params.num_query_tokens or 1, batch)
        self._first = np.maximum(self._of_each("cache_leftpad", np.zeros(batch, dtype=np.int64)), 0)
        if params.window_left >= 0:
            oldest = self._lengths + self._new - self._queries
            self._first = np.maximum(self._first, oldest - params.window_left)
        self._slots = None
        if params.slot_mapping:
            self._slots = self._values("slot_mapping", np.int64).reshape(-1)

    def found(self, box: int) -> Mapping[int, Ints]:
        """What may be done with which rows, where copies bring so many at a time."""
        read, reached, written = [], [], []
        params, lengths = self._params, self._lengths
        active = (lengths >= 0) & (lengths <= params.max_seq_len - self._new)
        active &= (self._row >= 0) & (self._row < len(self._table))
        for b in np.flatnonzero(active).tolist():
            first, end = int(self._first[b]), int(lengths[b])
            read.append(self._tokens(b, first, end))
            reached.append(self._tokens(b, first // box * box, round_up(end, box)))
            if self._slots is None:
                written.append(self._tokens(b, end, end + int(self._new[b])))
            else:
                written.append(self._slots[self._begins[b] : self._begins[b + 1]])
        used, boxes, new = (
            np.unique(np.concatenate([np.zeros(0, dtype=np.int64), *rows]))
            for rows in (read, reached, written)
        )
        new = new[(new >= 0) & (new < params.num_pages * params.page_size)]
        return {READ: used, READ | OVERREAD: np.setdiff1d(boxes, used, True), WRITE: new}

    def _tokens(self, b: int, first: int, end: int) -> Ints:
        """Rows of tokens of a sequence, but of those in no page."""
        size = self._params.page_size
        tokens = np.arange(first, min(end, self._params.max_seq_len))
        pages = self._table[self._row[b], tokens // size].astype(np.int64)
        exists = (pages >= 0) & (pages < self._params.num_pages)
        rows: Ints = (pages * size + tokens % size)[exists]
        return rows

    def _counts(self, name: str, each: int, batch: int) -> Ints:
        """Tokens of the sequences: as many in each, or what an index says."""
        if not getattr(self._params, name):
            return np.full(batch, each)
        return np.maximum(np.diff(self._values(name, np.int32).astype(np.int64)), 0)

    def _of_each(self, name: str, default: Ints) -> Ints:
        """Numbers of the sequences, if the launch is given them."""
        given = self._values(name, np.int32) if getattr(self._params, name) else default
        return given.astype(np.int64)

    def _values(self, name: str, dtype: Any) -> NDArray[Any]:
        region = self._tensors[name]
        raw = (ctypes.c_uint8 * region.span).from_address(region.address)
        values = np.ctypeslib.as_array(raw).view(dtype)
        return np.lib.stride_tricks.as_strided(values, region.shape, region.strides)
