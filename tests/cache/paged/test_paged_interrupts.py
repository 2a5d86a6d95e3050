"""An interrupt between any two lines of what counts pages: they may be lost, and never shared."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest

from gqa_cutlass.cache.paged import page_allocator, sequences
from gqa_cutlass.cache.paged.page_allocator import PageAllocator
from gqa_cutlass.cache.paged.sequences import Sequences

COUNTING = {page_allocator.__file__, sequences.__file__}


class Interrupt:
    """Raises KeyboardInterrupt instead of a line, the one with this number."""

    def __init__(self, number: int) -> None:
        self.left = number

    def __enter__(self) -> None:
        sys.settrace(self.trace)

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def trace(self, frame: FrameType, event: str, arg: Any) -> Any:
        if frame.f_code.co_filename not in COUNTING:
            return None
        if event == "line":
            self.left -= 1
            if self.left < 0:
                sys.settrace(None)
                raise KeyboardInterrupt
        return self.trace


def some_sequences() -> Sequences:
    """0 of 6 tokens, 1 that shares them, and 2 of 3."""
    made = Sequences(PageAllocator(24), 4)
    for tokens in (6, 3):
        sequence = made.new("new", tokens)
        made.get("get", sequence).length = tokens
        if not sequence:
            made.fork("fork", sequence, None)
    return made


def grow(made: Sequences) -> None:
    made.give(made.take("grow", made.each("grow", [0, 2]), [9, 9]))


def count(made: Sequences) -> None:
    """Two sequences get tokens, for which there are pages."""
    made.count_all(made.each("count", [0, 2]), [1, 1])


def drafts(made: Sequences) -> None:
    made.count_all(made.each("count", [0, 2]), [1, 1], kept=[2, 1])


OPERATIONS: dict[str, Callable[[Sequences], object]] = {
    "grow": grow,
    "count": count,
    "drafts": drafts,
    "new": lambda made: made.new("new", 9),
    "fork": lambda made: made.fork("fork", 0, 5),
    "free": lambda made: made.free("free", [0, 2]),
    "truncate": lambda made: made.truncate("truncate", 0, 1),
    "reorder": lambda made: made.reorder("reorder", [0, 2], [1, 0]),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_interrupt_gives_no_page_to_two(name: str) -> None:
    number, ended = 0, False
    while not ended:
        made = some_sequences()
        before = sys.gettrace()  # of a debugger, or of what measures coverage
        try:
            with Interrupt(number):
                OPERATIONS[name](made)
            ended = True
        except KeyboardInterrupt:
            number += 1
        finally:
            sys.settrace(before)
        held = Counter[int]()
        for sequence in made:
            one = made.get("get", sequence)
            held.update(one.pages)
            assert len(one.pages) >= made.pages_of(one.length)
        assert all(made.pages.holders(page) >= count for page, count in held.items())
        free = made.pages.allocate(made.pages.num_free)
        assert not set(free) & held.keys() and len(set(free)) == len(free)
    assert number > 10


@pytest.mark.parametrize("operation", [count, drafts])
def test_an_interrupt_counts_a_step_of_all_sequences_or_of_none(
    operation: Callable[[Sequences], None],
) -> None:
    found = set()
    for number in range(60):
        made = some_sequences()
        before = sys.gettrace()
        try:
            with Interrupt(number):
                operation(made)
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(before)
        found.add(tuple(made.get("get", sequence).length for sequence in (0, 2)))
    assert found == {(6, 3), (7, 4)}
