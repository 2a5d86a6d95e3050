"""Windows: of every sequence the cache has the newest tokens only, in a ring.

Token t of a sequence is in slot t modulo `slots`. Kernels know pages, not rings: a table that never
changes says that page i of a sequence is page i modulo so many of its own, and the window that no
page before it is read. So kernels append to a ring and attend to it as to any pages.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any, NoReturn

import torch
from torch import Tensor

from gqa_cutlass.cache.allocation import Memory
from gqa_cutlass.cache.inputs import ints, new_tokens, refuse
from gqa_cutlass.cache.lengths import Lengths
from gqa_cutlass.cache.paged.inputs import check_reach, check_seen
from gqa_cutlass.cache.sizes import BLOCK, SPARE_SHARE, BatchSizes
from gqa_cutlass.cache.sizes import refuse as refuse_size
from gqa_cutlass.codegen.schema.problem import MAX_TOKENS
from gqa_cutlass.errors import shown
from gqa_cutlass.tensors import is_tensor
from gqa_cutlass.tracing import mark_static

TOKENS = 32  # of a call, unless its user says more
_WIDE = 1024  # tokens of a window from which on pages are large, for speed
_PAGE, _LARGE_PAGE = 16, 64  # tensor copies take multiples of 16 tokens

LayerWindows = int | None | Sequence[int | None]


@dataclass(frozen=True, kw_only=True)
class Window:
    """What a layer keeps of every sequence.

    Args:
        size: Newest tokens that a query may see, its own included.
        tokens: Queries, and new tokens, of one call at most; so many may be taken back.
    """

    size: int
    tokens: int

    @property
    def page(self) -> int:
        """Tokens of a page."""
        return _LARGE_PAGE if self.size >= _WIDE else _PAGE

    @property
    def kept(self) -> int:
        """Newest tokens, counted from the longest that a sequence was, that are surely there.

        When as many as a call appends were taken back, the first query of a call that appends none
        sees the window before as many tokens again.
        """
        return self.size - 1 + 2 * self.tokens

    def slots(self, max_seq_len: int) -> int:
        """Tokens of a sequence that there is memory for, whole pages.

        Where a window begins within a page, what is before it is read as well, and ignored; new
        tokens must not be written there at the same time.
        """
        return min(_up(self.kept + self.page - 1, self.page), _up(max_seq_len, self.page))


@dataclass(frozen=True, kw_only=True)
class WindowedSizes(BatchSizes):
    """Of caches of which some layers have windows; `max_seq_len` is rounded up to whole pages.

    Args:
        windows: Of the layers, None for one that keeps all; or one for all of them.
    """

    windows: tuple[Window | None, ...]

    @property
    def room(self) -> int:
        """Tokens that a sequence can hold."""
        return _up(self.max_seq_len, max(window.page for window in self.distinct))

    @property
    def rows(self) -> dict[str, int]:
        """The first two dimensions of a layer that keeps all."""
        return {"batch_size": self.batch_size, "max_seq_len": self.room}

    @property
    def layer_shapes(self) -> list[tuple[int, ...]]:
        """Of keys and values, layer by layer."""
        each = self._slots * (self.num_layers // len(self.windows))
        return [(self.batch_size, slots, *shape[2:]) for slots in each for shape in self.shapes]

    @property
    def distinct(self) -> list[Window]:
        """The windows that there are, each once."""
        return list(dict.fromkeys(window for window in self.windows if window))

    @property
    def table_shapes(self) -> list[tuple[int, ...]]:
        """Of the tables, one for each of the `distinct` windows."""
        return [(self.batch_size, self.room // window.page) for window in self.distinct]

    @property
    def text(self) -> str:
        """The shapes, as messages say them."""
        rings = [window.slots(self.room) for window in self.distinct]
        return f"{super().text}, of which layers with a window have {max(rings)} tokens"

    @property
    def total_bytes(self) -> int:
        """Bytes of K and V of all layers, of their scales, and of what they share."""
        return self._bytes(1)

    def largest(self, available: int) -> int:
        """The largest `max_seq_len` that is sure to fit into so many bytes; 0 for none."""
        usable = available - available // SPARE_SHARE - BLOCK
        page = max(window.page for window in self.distinct)
        least, most = 0, self.room // page
        while least < most:
            pages = (least + most + 1) // 2
            if replace(self, max_seq_len=pages * page)._bytes(BLOCK) <= usable:
                least = pages
            else:
                most = pages - 1
        return least * page

    @property
    def _slots(self) -> list[int]:
        """Tokens of a sequence that the layers have memory for, as `windows` says them."""
        return [w.slots(self.room) if w else self.room for w in self.windows]

    def _bytes(self, block: int) -> int:
        """Bytes in all, where every tensor of a layer takes whole blocks."""
        layers = sum(_up(n * row, block) for n in self._slots for row in self._unit_bytes)
        tables = sum(_up(4 * math.prod(shape), block) for shape in self.table_shapes)
        return layers * (self.num_layers // len(self.windows)) + tables + self._state_bytes


class Ring:
    """The memory of a layer with a window, as kernels see it.

    Args:
        window: What it keeps.
        k: Keys, [batch, slots, num_kv_heads, head_dim].
        v: Values, likewise.
        table: Int32 [batch, pages], as `rings` filled it.

    Attributes:
        k: Keys, [batch * pages of a ring, page, num_kv_heads, head_dim].
        v: Values, likewise.
    """

    def __init__(self, window: Window, k: Tensor, v: Tensor, table: Tensor) -> None:
        self.window, self.table = window, table
        self.k, self.v = (t.view(-1, window.page, *t.shape[2:]) for t in (k, v))
        mark_static(self.k, self.v, table)

    def options(self, q: object, k: object, options: dict[str, Any]) -> dict[str, Any]:
        """The options of a decode call, with the window and the table.

        Raises:
            InputError: The call looks further back than there are tokens, or has too many.
        """
        window = self.window
        asked = options.get("window_size")
        if asked is None:
            asked = window.size - 1, 0
        else:
            check_seen("KVCache.decode", asked, window.size)
        for name, count in (("q", new_tokens(q)), ("k", new_tokens(k))):
            if count > window.tokens:
                allowed = f"{window.tokens}, as `tokens_per_call` says, where there is a window"
                refuse("decode", name, f"{count} tokens", f"up to {allowed}")
        return options | {"window_size": asked, "block_table": self.table}


def rings(sizes: BatchSizes, memory: Memory) -> list[Ring | None]:
    """The rings of the layers, None for those that keep all; fills the tables."""
    if not isinstance(sizes, WindowedSizes):
        return [None] * len(memory.layers)
    tables = dict(zip(sizes.distinct, memory.tables, strict=True))
    for window, table in tables.items():
        _fill(table, window.slots(sizes.room) // window.page)
    found: list[Ring | None] = []
    for i, (k, v) in enumerate(memory.layers):
        kept = sizes.windows[i % len(sizes.windows)]
        found.append(None if kept is None else Ring(kept, k, v, tables[kept]))
    return found


def lengths_of(sizes: BatchSizes, memory: Memory) -> Lengths:
    """What layers share."""
    if not isinstance(sizes, WindowedSizes):
        return Lengths(memory.state, sizes.max_seq_len)
    lossy = [window for window in sizes.distinct if window.slots(sizes.room) < sizes.room]
    if not lossy:
        return Lengths(memory.state, sizes.room)
    return WindowedLengths(memory.state, sizes.room, lossy)


def sizes_of(
    num_layers: int, batch_size: int, max_seq_len: int, num_kv_heads: int, head_dim: int,
    dtype: torch.dtype, head_dim_v: int | None, window: LayerWindows, tokens_per_call: int,
    by_token: bool,
) -> BatchSizes:  # fmt: skip
    """The sizes of caches, given in this order.

    Raises:
        InputError: One is not allowed.
    """
    sizes = BatchSizes(
        num_layers=num_layers, batch_size=batch_size, max_seq_len=max_seq_len,
        num_kv_heads=num_kv_heads, head_dim=head_dim, dtype=dtype, head_dim_v=head_dim_v,
        by_token=by_token,
    )  # fmt: skip
    windows = _windows(num_layers, window, tokens_per_call)
    if not windows:
        return sizes
    named = {field.name: getattr(sizes, field.name) for field in fields(sizes)}
    return WindowedSizes(**named, windows=windows)


def _fill(table: Tensor, own: int) -> None:
    """Say where pages are, int32 [batch, pages], of which each sequence has so many."""
    batch, pages = table.shape
    table.copy_(torch.arange(pages, device=table.device).remainder_(own))
    table.add_(torch.arange(0, batch * own, own, device=table.device, dtype=torch.int32)[:, None])


class WindowedLengths(Lengths):
    """Lengths of sequences of which some layers keep the newest tokens only.

    What was overwritten depends on how long a sequence has been since it was empty. The host
    follows that as it does the lengths.

    Args:
        state: As for `Lengths`.
        limit: As for `Lengths`.
        windows: Of the layers that lose tokens.
    """

    def __init__(self, state: Tensor, limit: int, windows: Sequence[Window]) -> None:
        super().__init__(state, limit)
        self._kept = min(window.kept for window in windows)
        self._back = min(window.tokens for window in windows)
        self._peak = 0  # no sequence was longer, while the host knew a bound
        self._longest: list[int] | None = [0] * self.batch_size  # that each of them was

    def truncate(self, lengths: int | Sequence[int] | Tensor) -> None:
        """As `Lengths.truncate`, where what is left has its window.

        Raises:
            InputError: The lengths are not allowed, or tokens before them are gone.
        """
        if max(self._peak, self.reach) > self._kept:  # or else nothing was overwritten
            self._check_kept(lengths)
        super().truncate(lengths)

    def refresh(self) -> list[int]:
        """As `Lengths.refresh`; how long sequences have been meanwhile nobody knows."""
        self._longest = None
        return super().refresh()

    @contextmanager
    def reordering(self, order: Tensor, host: list[int] | None, leads: bool) -> Iterator[None]:
        """As `Lengths.reordering`: with a ring goes what it lacks."""
        before = self._longest
        with super().reordering(order, host, leads):
            yield
            if before is not None and host is not None and leads:
                before = [before[row] if row >= 0 else 0 for row in host]
            self._longest = before if host is not None or not leads else None

    def _know(self, known: list[int] | None, bound: int) -> None:
        super()._know(known, bound)
        most = self._bound
        if self._known is None:
            self._longest = None
        else:
            before = self._longest or [n + self._back for n in self._known]
            self._longest = [n and max(n, m) for n, m in zip(self._known, before, strict=True)]
            most = max(self._longest)
        self._peak = max(self._peak, most) if most else 0

    def _check_kept(self, lengths: int | Sequence[int] | Tensor) -> None:
        """Refuse lengths whose windows are gone, or may be."""
        if is_tensor(lengths):
            _refuse_back("lengths on the device", "ints, which the host can check")
        counts = [lengths] * self.batch_size if isinstance(lengths, int) else lengths
        counts = ints("truncate", "lengths", counts, 0, self.limit, self.batch_size)
        if not any(counts):
            return
        longest, known = self._longest, self.settled
        if longest is None or known is None:
            got = "lengths that the host does not know, or that a CUDA graph changes"
            _refuse_back(got, "0; or a refresh() before, where there are no graphs")
        for b, (to, n, most) in enumerate(zip(counts, known, longest, strict=True)):
            if 0 < to < min(n, most - self._back) and most > self._kept:
                got = f"{to} for sequence {b}, which has had {most} tokens"
                _refuse_back(got, f"0, or {most - self._back} and more there (`tokens_per_call`)")


def _windows(num_layers: int, window: LayerWindows, tokens: object) -> tuple[Window | None, ...]:
    """The windows of a cache's layers, or one for all; none at all where no layer has one.

    Raises:
        InputError: One is not allowed, or there are not as many as layers.
    """
    if type(tokens) is not int or not 1 <= tokens <= MAX_TOKENS:
        refuse_size("KVCache", "tokens_per_call", shown(tokens), f"an int from 1 to {MAX_TOKENS}")
    given: Sequence[Any] = window if isinstance(window, (list, tuple)) else [window]
    if isinstance(window, (list, tuple)) and len(window) != num_layers:
        allowed = f"one for all layers, or a list of {num_layers}"
        refuse_size("KVCache", "window", f"{len(window)} windows", allowed)
    for each in given:
        check_reach("KVCache", each)
    if not any(given):
        return ()
    return tuple(None if size is None else Window(size=size, tokens=tokens) for size in given)


def _up(count: int, step: int) -> int:
    return -(-count // step) * step


def _refuse_back(got: str, allowed: str) -> NoReturn:
    refuse("truncate", "lengths", f"{got}, where windows have lost older tokens", allowed)
