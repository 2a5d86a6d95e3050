"""Sequences whose steps are captured into CUDA graphs: a table that stays where it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

from gqa_cutlass.cache.guard import with_memory
from gqa_cutlass.cache.inputs import surroundings_flaw
from gqa_cutlass.cache.paged.host import on_host
from gqa_cutlass.cache.paged.inputs import counts
from gqa_cutlass.cache.paged.sequences import NONE, Held, refuse
from gqa_cutlass.cache.paged.step import DecodeStep
from gqa_cutlass.cache.paged.storage import Storage
from gqa_cutlass.cache.paged.tables import Table, fill_rows
from gqa_cutlass.devices import capturing
from gqa_cutlass.errors import InputError, shown
from gqa_cutlass.tracing import is_traced, mark_static

R = TypeVar("R")
_INT_BYTES = 4


class PagedBatch:
    """Rows for sequences, and what a captured step reads: a block table, and lengths that grow.

    Rows without a sequence are inactive: nothing is read or written, and they get zeros. The host
    takes pages for some steps ahead, and counts the steps that it is told of: so run graphs by
    `run`, which does both. Nothing but `check` waits for the GPU.

    While a batch holds sequences, nothing else changes them; `assign` others, or none, before they
    are freed, forked or truncated. Made by `PagedKVCache.batch`.

    Args:
        storage: Of the cache.
        batch_size: Rows.
        max_pages: Pages that a sequence may have.
        tokens: Tokens that a step adds to each.

    Attributes:
        batch_size: Rows.
        tokens: Tokens that a step adds to each sequence.
        sequences: Those of the first rows, in their order.
        steps_left: Steps that there are pages for.
    """

    def __init__(self, storage: Storage, batch_size: int, max_pages: int, tokens: int = 1) -> None:
        self._storage = storage
        # Normal tensors, even in inference mode: outside of it nobody may write to the others.
        with torch.inference_mode(False):
            size = self.bytes_needed(batch_size, max_pages) // _INT_BYTES
            self._memory = torch.full((size,), NONE, dtype=torch.int32, device=storage.device)
        self.batch_size, self._max_pages, self.tokens = batch_size, max_pages, tokens
        table, self._lengths = self._parts(self._memory)
        self._table = Table(block_table=table, before=self._lengths[0], after=self._lengths[1])
        mark_static(table, *self._lengths)
        self.sequences: tuple[int, ...] = ()
        self.steps_left = 0
        self._widest = 0  # window of all steps so far, captured ones included
        self._given: list[Held] = []
        self._counts_itself = True  # a step that is not captured
        self._settled = True  # host and device know the same
        storage.batches.add(self)

    @staticmethod
    def bytes_needed(batch_size: int, max_pages: int) -> int:
        """Bytes of a table and of the lengths before and after a step."""
        return batch_size * (max_pages + 2) * _INT_BYTES

    def __repr__(self) -> str:
        return (
            f"PagedBatch(batch_size={self.batch_size}, max_seq_len={self.max_seq_len}, "
            f"sequences={list(self.sequences)}, steps_left={self.steps_left})"
        )

    @property
    def max_seq_len(self) -> int:
        """Tokens that a sequence can have here."""
        return self._max_pages * self._storage.pools.page_size

    @property
    def block_table(self) -> Tensor:
        """Pages of every row, int32 [batch_size, max_pages]; -1 for none. It stays where it is."""
        return self._table.block_table

    @property
    def seqlens(self) -> Tensor:
        """Tokens of every row, int32 [batch_size]; -1 for no sequence. It stays where it is."""
        return self._table.before

    @on_host
    def assign(self, sequences: Sequence[int], steps: int = 1) -> None:
        """Let the first rows have these sequences, with pages for so many steps, and others none.

        Args:
            sequences: Up to batch_size of them; sequences that were assigned before and are not
                among them are free to be changed again.
            steps: Steps to take pages for, 0 and more; each adds `tokens` to every sequence.

        Raises:
            OutOfPagesError: There are too few. The batch is as it was.
            CacheAllocationError: There is no memory for temporaries. The batch is as it was.
            InputError: There is no such sequence, one is named twice or held by another batch, they
                are too many or would be too long, tokens that its steps attend to are gone, a step
                is open, or a graph is being captured.
        """
        call = "PagedBatch.assign"
        given = self._storage.changing(call, sequences, self)
        if len(given) > self.batch_size:
            refuse(call, "sequences", f"{len(given)}", f"up to {self.batch_size}, the rows")
        upload = self._grown(call, given, steps)
        self._settle(upload, tuple(sequences), given, steps)

    @on_host
    def reserve(self, steps: int) -> None:
        """Take the pages for so many steps from now on.

        Args:
            steps: 0 and more, those that there are pages for already included.

        Raises:
            GqaError: As for `assign`. The batch is as it was.
        """
        call = "PagedBatch.reserve"
        self._storage.changing(call, self.sequences, self)
        upload = self._grown(call, self._given, steps)
        self._settle(upload, self.sequences, self._given, steps)

    @on_host
    def accept(self, tokens: int | Sequence[int]) -> None:
        """Keep the first tokens of those that the last step added, if a step adds several.

        Their pages stay the sequences', for the next steps: `steps_left` says how many.

        Args:
            tokens: How many each sequence keeps: one int for all, or one for each.

        Raises:
            CacheAllocationError: There is no memory for temporaries. The batch is as it was.
            InputError: Not such a number; there were no drafts, or they were accepted before; a
                step is open, or a graph is being captured. The batch is as it was.
        """
        call, storage = "PagedBatch.accept", self._storage
        given = storage.changing(call, self.sequences, self)
        self._check_host(call)
        self._check_left(call, 0)
        added = counts(call, tokens, len(given))
        after = storage.sequences.accepted(call, given, added)
        host = with_memory(call, storage.device, self._on_the_host)
        self._settled = False
        storage.sequences.keep(given, after)
        room = [self._room(held) for held in given]
        left = min(room, default=0)
        self._settle(self._filled(host, given), self.sequences, given, left)

    @contextmanager
    def step(self) -> Iterator[DecodeStep]:
        """New tokens of every sequence, layer by layer; can be captured.

        At the end of the block lengths grow on the device. Captured, that is what every replay
        does; else the host counts the step as well.

        Yields:
            The step, whose `decode` takes a layer, and q, k and v with a row for each of the
            batch's rows.

        Raises:
            InputError: There are no pages for another step, or a layer got no token. No length was
                changed.
        """
        call, storage = "PagedBatch.step", self._storage
        storage.check_no_step(call)
        if not is_traced() and (found := surroundings_flaw()):
            refuse(call, "surroundings", *found)
        counts = self._counts_itself and not capturing(storage.device)
        if counts:
            self._check_left(call, 1)
        reach = storage.sequences.reach(self._given)
        of = call, storage.pools, self._table, [self.tokens]
        longest = max([held.length for held in self._given], default=0) if counts else None
        with storage.in_step(), DecodeStep(*of, reach, longest) as step:
            yield step
            step.check_complete()
        self._widest = max(self._widest, step.widest)
        self._settled &= not counts
        with_memory(call, storage.device, self._advance)
        if counts:
            self._count(1)

    def run(self, replay: Callable[[], R], steps: int = 1) -> R:
        """Replay a graph, and count its steps.

        Args:
            replay: `graph.replay` of a graph in which so many steps of this batch were captured;
                or a function that does them, where there is no graph.
            steps: 1 and more.

        Returns:
            What `replay` returns.

        Raises:
            InputError: There are no pages for so many steps, or an error ended an earlier replay or
                step in its middle, and nothing was assigned or reserved since. Nothing was
                replayed.
        """
        call = "PagedBatch.run"
        self._storage.check_no_step(call)
        if type(steps) is not int or steps < 1:
            refuse(call, "steps", shown(steps), "an int, 1 and more")
        if not callable(replay):
            refuse(call, "replay", shown(replay), "graph.replay, or another function")
        self._check_left(call, steps)
        self._counts_itself = self._settled = False
        try:
            result = replay()
        finally:
            self._counts_itself = True
        self._count(steps)
        return result

    @on_host
    def check(self) -> None:
        """Wait for the device, and raise InputError if its lengths are not those that were counted.

        Whoever replays a graph without `run` is found out here, and must not go on.
        """
        held = [held.length for held in self._given]
        expected = held + [NONE] * (self.batch_size - len(held))
        for row, (found, counted) in enumerate(zip(self.seqlens.tolist(), expected, strict=True)):
            if found != counted:
                raise InputError(
                    f"PagedBatch.check: seqlens[{row}]: got {found} on the device; allowed: "
                    f"{counted}, as run() and step() counted. Graphs were replayed without run(), "
                    "or did another number of steps. Free the sequences, and fill them anew."
                )

    def _grown(self, call: str, given: list[Held], steps: int) -> Tensor:
        """Take the pages for so many steps.

        Returns:
            What the batch's memory is to hold then, on the host.
        """
        storage = self._storage
        self._check_host(call)
        if type(steps) is not int or steps < 0:
            refuse(call, "steps", shown(steps), "an int, 0 and more")
        for held in given:
            if held.length + steps * self.tokens > self.max_seq_len:
                of = f" of {self.tokens}" * (self.tokens > 1)
                got = f"a sequence of {held.length} tokens and {shown(steps)} steps{of}"
                refuse(call, "sequences", got, f"up to {self.max_seq_len} tokens, max_seq_len")
        reach = storage.sequences.reach(given)
        if reach is not None and reach < self._widest:
            got = f"one that has its tokens in a window of {reach} (others were freed before)"
            refuse(call, "sequences", got, f"those that have {self._widest}, as its steps ask for")
        host = with_memory(call, storage.device, self._on_the_host)
        storage.grow(call, given, [steps * self.tokens] * len(given))
        for held in given:
            held.kept = len(held.pages)  # by accept()
        return self._filled(host, given)

    def _check_host(self, call: str) -> None:
        self._storage.check_surroundings(call)
        if not self._counts_itself:
            refuse(call, "call", "one from what run() replays", "calls before and after run()")

    def _filled(self, host: Tensor, given: list[Held]) -> Tensor:
        """The batch's memory with these sequences in it."""
        table, (before, after) = (part.numpy() for part in self._parts(host))
        fill_rows(table, given)
        before[: len(given)] = [held.length for held in given]
        after[: len(given)] = [held.length + self.tokens for held in given]
        return host

    def _room(self, held: Held) -> int:
        """Steps that a sequence has pages for."""
        there = min(len(held.pages), self._max_pages) * self._storage.pools.page_size
        return (there - held.length) // self.tokens

    def _on_the_host(self) -> Tensor:
        pinned = self._storage.device.type == "cuda"
        return torch.full(self._memory.shape, NONE, dtype=torch.int32, pin_memory=pinned)

    def _parts(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """The table, [batch_size, max_pages], and the lengths before and after, [2, batch_size]."""
        table, lengths = memory.split([self.batch_size * self._max_pages, 2 * self.batch_size])
        return table.view(self.batch_size, self._max_pages), lengths.view(2, self.batch_size)

    def _settle(
        self, upload: Tensor, sequences: tuple[int, ...], given: list[Held], steps: int
    ) -> None:
        """Let the device, and then the host, have what was taken for these sequences."""
        self._settled = False
        self._memory.copy_(upload, non_blocking=True)
        self.sequences, self._given, self.steps_left = sequences, given, steps
        self._settled = True

    def _advance(self) -> None:
        self._lengths.add_((self._lengths[:1] >= 0) * self.tokens)

    def _check_left(self, call: str, steps: int) -> None:
        if not self._settled:
            got = "one that an error left in the middle of a step"
            refuse(call, "batch", got, "one whose sequences were assigned or reserved for since")
        if self._given and steps > self.steps_left:
            got = f"{shown(steps)} with pages for {self.steps_left} more"
            refuse(call, "steps", got, "as many as there are pages for; reserve() more first")

    def _count(self, steps: int) -> None:
        count, tokens, given = self._storage.sequences.count_all, self.tokens, self._given
        drafts = tokens if tokens > 1 else 0
        count(given, [steps * tokens - drafts] * len(given))
        count(given, [drafts] * len(given), [len(held.pages) for held in given])
        if self._given:
            self.steps_left -= steps
        self._settled = True
