"""The memory that pages are of: copies within it, tokens into it and out of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gqa_cutlass.cache.paged.sequences import Held, refuse
from gqa_cutlass.cache.rows import buffer, gather, widest
from gqa_cutlass.cache.scales import Scales, picked, raw
from gqa_cutlass.call.plan import Result
from gqa_cutlass.codegen.schema.rounding import ceil_div


class Pools:
    """Keys and values of all layers; a page has the same number in each of them.

    Args:
        layers: Keys and values of each layer, [num_pages, page_size, num_kv_heads, head_dim].
        scales: Of each layer's elements, or one for all.
    """

    def __init__(
        self, layers: Sequence[tuple[Tensor, Tensor]], scales: Sequence[Scales] = (Scales(),)
    ) -> None:
        self.scales = [scales[i % len(scales)] for i in range(len(layers))]
        self.k, self.v = (tuple(tensors) for tensors in zip(*layers, strict=True))
        self.num_pages: int = self.k[0].shape[0]
        self.attend: Callable[..., Result] | None = None  # what decodes instead of `gqa_decode`
        self.rows: int = self.k[0].shape[1]  # of a page
        self.num_layers = len(layers)
        self.of_tokens = tuple(each for layer in self.scales for each in layer.of_tokens)

    def __getstate__(self) -> dict[str, object]:
        """The same with elements of 8 bits as bytes: torch cannot read those that it pickled."""
        k, v = ([each.view(torch.uint8) for each in pools] for pools in (self.k, self.v))
        return vars(self) | {"k": k, "v": v, "dtype": self.k[0].dtype}

    def __setstate__(self, state: dict[str, Any]) -> None:
        dtype = state.pop("dtype")
        self.__dict__.update(state)
        self.k, self.v = (tuple(t.view(dtype) for t in pools) for pools in (self.k, self.v))

    @property
    def device(self) -> torch.device:
        """Where they are: of a copy that `torch.load` was told a place for, another one."""
        place: torch.device = self.k[0].device
        return place

    @property
    def page_size(self) -> int:
        """Tokens of a page."""
        return self.rows

    def here(self, tokens: int) -> int:
        """How many of a sequence's first tokens have rows here."""
        return tokens

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy pages over others, as if all at once.

        Args:
            pairs: The page to read and the page to write, which is written once.
        """
        if pairs:
            sources, targets = to_device(np.array(pairs, dtype=np.int64).T, self.device)
            pools = [raw(pool) for pool in (*self.k, *self.v, *self.of_tokens)]
            through = buffer(widest(pools), len(pairs), self.rows)
            gather(pools, self.rows, sources, targets, through)

    def slots(
        self, given: Sequence[Held], tokens: Sequence[int], skipped: Sequence[int] | None = None
    ) -> Tensor:
        """Where tokens go that follow those of each sequence: rows of a pool, int64, packed.

        Not of the first ones of them, if some are skipped.
        """
        rows = [np.empty(0, dtype=np.int64)]
        for held, count, skip in zip(given, tokens, skipped or [0] * len(given), strict=True):
            new = np.arange(held.length + skip, held.length + count)
            page, row = np.divmod(new, self.page_size)
            rows.append(np.asarray(held.pages, dtype=np.int64)[page] * self.page_size + row)
        return to_device(np.concatenate(rows), self.device)

    def write(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Write tokens of a layer, [tokens, num_kv_heads, head_dim], where `slots` says."""
        for name, pool, tokens in (("k", self.k[layer], k), ("v", self.v[layer], v)):
            for held, new in self.scales[layer].stored(pool, name, tokens[None]):
                held.view(-1, *held.shape[2:]).index_copy_(0, slots, new[0])

    def write_all(self, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Write tokens of all layers, [layers, tokens, num_kv_heads, head_dim], likewise."""
        for layer in range(self.num_layers):
            self.write(layer, slots, k[layer], v[layer])

    def read(self, layer: int, held: Held, tokens: int) -> tuple[Tensor, Tensor]:
        """The first tokens of a sequence, but those that are gone: [tokens, ...], new tensors."""
        return self._read((self.k[layer], self.v[layer]), held, tokens)

    def read_scales(self, layer: int, held: Held, tokens: int) -> tuple[Tensor, Tensor]:
        """The scales of these tokens, of keys and of values, which are of tokens."""
        return self._read(self.scales[layer].of_tokens, held, tokens)

    def _read(self, pools: Sequence[Tensor], held: Held, tokens: int) -> tuple[Tensor, Tensor]:
        pages = np.asarray(held.pages[held.gone : ceil_div(tokens, self.page_size)], dtype=np.int64)
        rows = self.here(tokens) - held.gone * self.rows
        index = to_device(pages, self.device)
        k, v = (picked(pool, 0, index).flatten(0, 1)[:rows] for pool in pools)
        return k, v


def check_scaled(call: str, pools: Pools) -> None:
    """Raise InputError unless scales are of tokens."""
    if not pools.of_tokens:
        allowed = "a cache with k_scale='token'; others have their scales in k_scale and v_scale"
        refuse(call, "scales", "none of tokens", allowed, "Nothing was copied.")


def to_device(values: np.ndarray, device: torch.device) -> Tensor:
    """An array on a device, without waiting for it."""
    host = torch.from_numpy(np.ascontiguousarray(values))
    if device.type == "cpu":
        return host
    # Pinned: from other memory the driver may wait until it has a buffer of its own to copy to.
    pinned = torch.empty(host.shape, dtype=host.dtype, pin_memory=True)
    return pinned.copy_(host).to(device, non_blocking=True)
