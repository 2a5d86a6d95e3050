"""What a paged cache, its steps and its batches work on: pools, sequences, and who may change them.

The host knows every length, because it counts every step itself; so it takes pages ahead of a
launch without asking the device. A call takes pages first, copies next, and only then lets
sequences have them: where it fails, what it took is free again.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Protocol
from weakref import WeakSet

import torch

from gqa_cutlass.cache.guard import with_memory
from gqa_cutlass.cache.inputs import surroundings_flaw
from gqa_cutlass.cache.paged.host import on_host
from gqa_cutlass.cache.paged.page_allocator import PageAllocator
from gqa_cutlass.cache.paged.pools import Pools
from gqa_cutlass.cache.paged.sequences import Held, Sequences, refuse
from gqa_cutlass.devices import capturing
from gqa_cutlass.tensors import memory_flaw

_CACHES = itertools.count()  # in this process, so that no sequence of one is another's
_NUMBERS = 1 << 32  # of each


class Holder(Protocol):
    """A batch whose graphs write to sequences."""

    sequences: tuple[int, ...]

    def __hash__(self) -> int: ...


@dataclass
class Added:
    """What there is to say of tokens that a step adds.

    Args:
        drafts: Whether some may be taken back.
    """

    drafts: bool = False


class Storage:
    """Pools, and the sequences that have their pages.

    Args:
        pools: The memory.
        window: Newest tokens of a sequence that keep their pages; None: all.
    """

    def __init__(self, pools: Pools, window: int | None = None) -> None:
        self.pools = pools
        self.pages = PageAllocator(pools.num_pages)
        first = next(_CACHES) * _NUMBERS
        self.sequences = Sequences(self.pages, pools.page_size, window, first)
        self.batches: WeakSet[Holder] = WeakSet()
        self._in_step = False

    def __getstate__(self) -> dict[str, object]:
        """What a copy has: neither this one's graphs, nor an open step.

        Raises:
            InputError: A step is open.
        """
        self.check_no_step("copying or pickling")
        return {name: value for name, value in vars(self).items() if name != "batches"}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self.batches = WeakSet()

    @property
    def device(self) -> torch.device:
        """Where the pools are."""
        return self.pools.device

    def changing(self, call: str, sequences: Sequence[int], by: Holder | None = None) -> list[Held]:
        """What sequences have, if it may be changed.

        Raises:
            InputError: There is no such sequence, or one is named twice; a step is open; or graphs
                of a batch, of another than `by`, write to it.
        """
        self.check_no_step(call)
        found = self.sequences.each(call, sequences)
        for batch in self.batches:
            for sequence in set(batch.sequences).intersection(sequences):
                if batch is not by:
                    got = f"{sequence}, which a batch holds, to whose pages its graphs write"
                    allowed = "sequences that none holds; assign others to the batch first"
                    refuse(call, "sequence", got, allowed)
        return found

    def check_no_step(self, call: str) -> None:
        """Raise InputError if a step is open."""
        if self._in_step:
            allowed = "calls before and after; leave the `with` block of the step first"
            refuse(call, "call", "one while a step is open", allowed)

    @on_host
    def check_surroundings(self, call: str) -> None:
        """Raise InputError where tensors are not what they seem, and in a capture."""
        if found := surroundings_flaw():
            refuse(call, "surroundings", *found)
        if capturing(self.device):
            allowed = "PagedKVCache.batch(), whose steps can be captured; or a call before it"
            refuse(call, "in a CUDA-graph capture", "what no replay could repeat", allowed)
        pools = self.pools
        for name, held in (("k", pools.k), ("v", pools.v), ("scales", pools.of_tokens)):
            for pool in held:
                if found := memory_flaw(pool):
                    refuse(call, f"the cache's {name}", *found)

    @on_host
    def grow(
        self,
        call: str,
        given: Sequence[Held],
        tokens: Sequence[int],
        skipped: Sequence[int] | None = None,
    ) -> None:
        """Let sequences have the pages for so many more tokens each, all of them their own.

        With `skipped` not for the first ones of those.

        Raises:
            OutOfPagesError: There are too few. Nothing was taken.
            CacheAllocationError: There is no memory for temporaries. Nothing was taken.
            InputError: A sequence would be too long.
        """
        growth = self.sequences.take(call, given, tokens, skipped)
        pairs = [(grown.copied, grown.taken[0]) for grown in growth if grown.copied is not None]
        try:
            with_memory(call, self.device, partial(self.pools.copy, pairs))
        except BaseException:
            self.sequences.give_back(growth)
            raise
        self.sequences.give(growth)

    @contextmanager
    def stepping(
        self,
        call: str,
        given: Sequence[Held],
        tokens: Sequence[int],
        skipped: Sequence[int] | None = None,
    ) -> Iterator[Added]:
        """Let sequences have so many tokens more, if nothing fails meanwhile.

        Yields:
            What is said of the tokens before they count.

        Raises:
            GqaError: As for `grow`.
        """
        kept = [len(held.pages) for held in given]
        self.grow(call, given, tokens, skipped)
        added = Added()
        try:
            with self.in_step():
                yield added
        except BaseException:
            for held, num_pages in zip(given, kept, strict=True):
                self.sequences.cut(held, num_pages)
            raise
        self.sequences.count_all(given, tokens, kept if added.drafts else None)

    @contextmanager
    def in_step(self) -> Iterator[None]:
        """Refuse meanwhile whatever changes sequences."""
        try:
            self._in_step = True
            yield
        finally:
            self._in_step = False
