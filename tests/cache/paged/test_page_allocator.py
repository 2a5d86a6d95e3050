"""PageAllocator: every page is free or held, by as many as took it."""

from __future__ import annotations

import pickle
import random
from typing import Any

import pytest
from helpers import run_python

from gqa_cutlass import CacheOverflowError, InputError, OutOfPagesError, PageAllocator


def test_pages_are_given_out_once_and_the_last_one_back_is_the_next() -> None:
    pages = PageAllocator(4)
    assert pages.num_pages == pages.num_free == 4
    assert (pages.allocate(3), pages.allocate()) == ([0, 1, 2], [3])
    pages.release([1, 3])
    assert (pages.num_free, pages.allocate(2)) == (2, [3, 1])
    assert pages.allocate(0) == []


def test_a_page_is_free_when_all_who_hold_it_have_released_it() -> None:
    pages = PageAllocator(3)
    pages.allocate(2)
    pages.share([1, 1])
    assert [pages.holders(page) for page in range(3)] == [1, 3, 0]
    pages.release([1, 0, 1])
    assert ([pages.holders(page) for page in range(3)], pages.num_free) == ([0, 1, 0], 2)
    pages.release([1])
    assert pages.num_free == 3


def test_too_few_pages_are_told_in_numbers_and_none_is_taken() -> None:
    pages = PageAllocator(5)
    pages.allocate(3)
    with pytest.raises(OutOfPagesError, match="got 7 to take, with 2 of 5 free; 5 miss") as raised:
        pages.allocate(7)
    assert isinstance(raised.value, CacheOverflowError)
    for error in (raised.value, pickle.loads(pickle.dumps(raised.value))):
        assert (error.asked, error.free, error.missing) == (7, 2, 5)
    assert pages.num_free == 2 and pages.allocate(2) == [3, 4]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: p.release([2]), "release of page 2: got a page that is free"),
        (lambda p: p.release([0, 1, 0]), "release of page 0: got 2 releases of a page that 1 hold"),
        (lambda p: p.release([0, 3]), "page: got 3; allowed: an int from 0 to 2"),
        (lambda p: p.release([0, -1]), "page: got -1"),
        (lambda p: p.release([0, True]), "page: got True"),
        (lambda p: p.release([0, None]), "page: got None"),
        (lambda p: p.share([0, 2]), "share of page 2: got a page that is free"),
        (lambda p: p.share([0, 9]), "page: got 9"),
        (lambda p: p.holders("0"), "page: got '0'"),
        (lambda p: p.allocate(-1), "count: got -1"),
        (lambda p: p.allocate(1.0), "count: got 1.0"),
        (lambda p: PageAllocator(0), "num_pages: got 0; allowed: an int from 1 to 2147483647"),
        (lambda p: PageAllocator(True), "num_pages: got True"),
        (lambda p: PageAllocator(2**31), "num_pages: got 2147483648"),
        (lambda p: p.share(1), "pages: got 1; allowed: a sequence of ints"),
        (lambda p: p.release(None), "pages: got None; allowed: a sequence of ints"),
    ],
)
def test_what_is_refused_changes_nothing(call: Any, message: str) -> None:
    pages = PageAllocator(3)
    pages.allocate(2)
    with pytest.raises(InputError) as raised:
        call(pages)
    assert f"PageAllocator: {message}" in str(raised.value)
    assert "Nothing was changed." in str(raised.value)
    assert [pages.holders(page) for page in range(3)] == [1, 1, 0] and pages.num_free == 1


def test_the_largest_pool_is_counted_in_no_time_and_memory() -> None:
    pages = PageAllocator(2**31 - 1)
    assert pages.allocate(3) == [0, 1, 2]
    pages.release([1])
    assert pages.allocate(2) == [1, 3] and pages.num_free == 2**31 - 5
    assert (pages.holders(3), pages.holders(2**31 - 2)) == (1, 0)
    with pytest.raises(InputError, match="release of page 2147483646: got a page that is free"):
        pages.release([2**31 - 2])
    with pytest.raises(OutOfPagesError, match="got an? int that cannot be shown to take, with"):
        pages.allocate(10**5000)
    assert pages.num_free == 2**31 - 5


def test_no_page_is_lost_or_held_by_too_many() -> None:
    rng, pages, held = random.Random(0), PageAllocator(20), list[int]()
    for _ in range(2000):
        taken = [page for page in held if rng.random() < 0.2]
        if rng.random() < 0.5:
            count = rng.randint(0, 4)
            taken = pages.allocate(count) if count <= pages.num_free else []
            assert not set(taken) & set(held)
            held += taken
        elif rng.random() < 0.5:
            pages.share(taken)
            held += taken
        else:
            pages.release(taken)
            for page in taken:
                held.remove(page)
        assert [pages.holders(page) for page in range(20)] == list(map(held.count, range(20)))
        assert pages.num_free == 20 - len(set(held))


def test_pages_are_counted_without_torch() -> None:
    code = """
import sys
from gqa_cutlass import PageAllocator
from gqa_cutlass.cache.paged.sequences import Sequences
print(PageAllocator(2).allocate(), "torch" in sys.modules)
"""
    assert run_python(code).split("\n")[0] == "[0] False"
