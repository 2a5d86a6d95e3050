"""Which pages of a pool are free, and how many hold each of the others. Host only, no torch."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Sequence
from typing import NoReturn

from gqa_cutlass.errors import InputError, OutOfPagesError, shown

MAX_PAGES = 2**31 - 1  # a block table is of int32


class PageAllocator:
    """Gives out the pages of a pool by their numbers, and counts who holds them.

    A page that was given out has one holder; `share` adds one, `release` takes one away, and a page
    without holders is free. All of them take constant time per page, and do all or nothing. The
    page that became free last is given out first: what it held may still be in a cache of the GPU.

    Args:
        num_pages: Pages of the pool, 1 to 2**31 - 1.

    Raises:
        InputError: There is no such pool.
    """

    def __init__(self, num_pages: int) -> None:
        if type(num_pages) is not int or not 1 <= num_pages <= MAX_PAGES:
            _refuse("num_pages", shown(num_pages), f"an int from 1 to {MAX_PAGES}")
        self._num_pages = num_pages
        self._holders: list[int] = []  # of the pages that were given out at some time
        self._free: list[int] = []  # of those; the last one is the next

    @property
    def num_pages(self) -> int:
        """Pages of the pool."""
        return self._num_pages

    @property
    def num_free(self) -> int:
        """Pages that nobody holds."""
        return len(self._free) + self._num_pages - len(self._holders)

    def holders(self, page: int) -> int:
        """How many hold a page.

        Raises:
            InputError: There is no such page.
        """
        return self._held(self._page(page))

    def allocate(self, count: int = 1, asker: str = "PageAllocator.allocate") -> list[int]:
        """Take free pages.

        Args:
            count: How many, 0 and more.
            asker: In whose name an error is.

        Returns:
            Their numbers.

        Raises:
            OutOfPagesError: There are fewer. None was taken.
            InputError: Not a number of pages.
        """
        if type(count) is not int or count < 0:
            _refuse("count", shown(count), "an int, 0 and more")
        free = self.num_free
        if count > free:
            raise OutOfPagesError(
                f"{asker}: pages: got {shown(count)} to take, with {free} of {self.num_pages} "
                f"free; {shown(count - free)} missing. None was taken, and nothing was written. "
                "Free or truncate sequences, or make a cache of more pages.",
                count,
                free,
            )
        kept = max(0, len(self._free) - count)
        taken = self._free[kept:][::-1]
        first = len(self._holders)
        new = range(first, first + count - len(taken))
        self._holders += [1] * len(new)
        del self._free[kept:]
        for page in taken:
            self._holders[page] = 1
        return [*taken, *new]

    def share(self, pages: Sequence[int]) -> None:
        """Add a holder to each of these pages; to one that is named twice, two.

        Raises:
            InputError: There is no such page, or nobody holds it. Nothing was changed.
        """
        for page in _listed(pages):
            if not self.holders(page):
                _refuse(f"share of page {page}", "a page that is free", "a page that is held")
        for page in pages:
            self._holders[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """Take a holder from each of these pages; from one that is named twice, two.

        Raises:
            InputError: There is no such page, or not so many hold it. Nothing was changed.
        """
        for page, times in Counter(map(self._page, _listed(pages))).items():
            held = self._held(page)
            if held < times:
                got = f"{times} releases of a page that {held} hold"
                got = got if held else "a page that is free: it was released before"
                _refuse(f"release of page {page}", got, "one release by each that holds it")
        for page in pages:
            self._holders[page] -= 1
            if not self._holders[page]:
                self._free.append(page)

    def _held(self, page: int) -> int:
        return self._holders[page] if page < len(self._holders) else 0

    def _page(self, page: int) -> int:
        if type(page) is not int or not 0 <= page < self.num_pages:
            _refuse("page", shown(page), f"an int from 0 to {self.num_pages - 1}")
        return page


def _listed(pages: Sequence[int]) -> Sequence[int]:
    if not isinstance(pages, (Sequence, array)):
        _refuse("pages", shown(pages), "a sequence of ints")
    return pages


def _refuse(what: str, got: str, allowed: str) -> NoReturn:
    raise InputError(f"PageAllocator: {what}: got {got}; allowed: {allowed}. Nothing was changed.")
