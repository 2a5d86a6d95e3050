"""PagedKVCache with a window: which pages it frees, when, and what is then refused."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from paged_model import GROUP, Told, appending, new_cache, nothing_changed

from gqa_cutlass import InputError, OutOfPagesError
from gqa_cutlass.cache.paged import step as step_module
from gqa_cutlass.cache.paged.pools import Pools


@pytest.fixture
def instant_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    """Appends, and attends to nothing."""
    monkeypatch.setattr(step_module, "gqa_decode", appending)


@pytest.mark.parametrize(("window", "size"), [(1, 1), (1, 4), (8, 4), (9, 4), (10, 4), (7, 3)])
def test_a_sequence_of_any_length_needs_the_pages_of_its_window(window: int, size: int) -> None:
    """While it grows by single tokens one page more; and not one less will do."""
    most = -(-window // size) + 1
    told = Told(new_cache(most, size, layers=2, window=window))
    sequence = told.allocate()
    for _ in range(window + 4 * size):
        told.append(sequence)
        told.check()
    assert len(told.held[sequence]) - told.cache.freed(sequence) < window + size
    less = Told(new_cache(most - 1, size, window=window))
    sequence = less.allocate()
    with pytest.raises(OutOfPagesError, match="1 missing"):
        for _ in range(window + 4 * size):
            less.append(sequence)
    less.check()


def test_a_prompt_of_any_length_needs_the_pages_of_its_window(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A step, whose layers may attend to all of it, takes them all until it is over."""
    told = Told(new_cache(6, 4, layers=2, window=8))
    cache, sequence = told.cache, told.allocate(42)
    assert cache.freed(sequence) == 32 and cache.free_pages == 3
    assert cache.pages(sequence)[:8] == [-1] * 8
    child, tokens = told.fork(sequence), told.new(20)
    prefill = partial(cache.prefill, sequence, *told.all_rows(tokens))
    with nothing_changed(cache), monkeypatch.context() as patch:
        patch.setattr(Pools, "write", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prefill()
    prefill()
    told.held[sequence] += tokens
    told.check()
    assert cache.free_pages == 0 and cache.pages(sequence)[:13] == [-1] * 13
    with nothing_changed(cache), pytest.raises(OutOfPagesError, match="got 3 to .* 3 missing"):
        prefill()
    cache.free(child)
    del told.held[child]
    with pytest.raises(OutOfPagesError, match="got 5"), cache.step([sequence], 20):
        pass
    told.append(sequence)
    told.check()


@pytest.mark.parametrize("size", [4, 16])
def test_decodes_as_a_cache_that_keeps_all_does(size: int, device: str) -> None:
    """Pages that were freed hold NaN: whoever reads them shows it; in ptxsim it is a fault, too."""
    outs = []
    for window in (None, 21):
        told = Told(new_cache(24, size, device=device, window=window))
        sequences = [told.allocate(n) for n in (45, 3, 20)]
        out = []
        for _ in range(3):
            k, v = told.rows(told.new(3), 0)
            q = k.expand(-1, GROUP, -1).contiguous() / 64
            out.append(told.cache.decode(sequences, q, k, v, window_size=(20, 0)))
            out.append(told.cache.decode(sequences, q, window_size=(20, 0)))
            held = {page for s in sequences for page in told.cache.pages(s)}
            free = [page for page in range(24) if page not in held]
            told.cache.k[0][free] = told.cache.v[0][free] = torch.nan
        assert (told.cache.freed(sequences[0]) > 0) == bool(window)
        table, _ = told.cache.table(sequences)
        assert (table[0, : told.cache.freed(sequences[0]) // size] == -1).all()
        outs.append(torch.stack(out))
    assert torch.equal(*outs)


def test_a_shared_page_stays_until_all_windows_have_passed_it() -> None:
    told = Told(new_cache(12, 4, window=4))
    parent = told.allocate(8)
    assert told.cache.pages(parent)[0] == -1
    child = told.fork(parent)
    page = told.cache.pages(parent)[1]
    for _ in range(4):
        told.append(parent)
    assert told.cache.pages(parent)[1] == -1 and told.cache.pages(child) == [-1, page]
    assert told.cache._storage.pages.holders(page) == 1
    told.check()
    for _ in range(4):
        told.append(child)
    told.check()
    assert told.cache.free_pages == 10


def test_nothing_goes_back_into_what_was_freed(instant_decode: None) -> None:
    """A window wider than steps ask for leaves room to take tokens back."""
    told = Told(new_cache(12, 4, window=8))
    cache, sequence = told.cache, told.allocate(18)
    for call in (cache.truncate, cache.fork):
        with (
            nothing_changed(cache),
            pytest.raises(InputError, match="got 8 of a sequence whose first 8 were freed.* 0, or"),
        ):
            call(sequence, 8)
    cache.truncate(sequence, 13)
    del told.held[sequence][13:]
    k, v = told.rows(told.new(1), 0)
    q = k.expand(-1, GROUP, -1)
    for bad, got in (
        ((-1, -1), r"\(-1, -1\), no window"), ((7, 0), r"\(7, 0\), a window of 8 tokens"),
        ((5, -1), r"\(5, -1\), a window of 6 tokens"),
    ):  # fmt: skip
        allowed = rf"decode: window_size: got {got}; allowed: \(4, 0\) and less: .*Nothing was wri"
        with nothing_changed(cache), pytest.raises(InputError, match=allowed):
            cache.decode([sequence], q, k, v, window_size=bad)
    with nothing_changed(cache), pytest.raises(InputError, match=r"allowed: \(4, 0\) and less"):
        cache.decode([sequence], q, k, v)
    cache.decode([sequence], q, k, v, window_size=(4, 0))
    cache.truncate(sequence, 0)
    assert cache.freed(sequence) == 0 and cache.free_pages == 12
    told.held[sequence] = []
    told.append(sequence)
    told.check()


def test_a_batch_frees_what_its_steps_leave_behind(instant_decode: None) -> None:
    told = Told(new_cache(12, 4, window=8))
    cache, sequence = told.cache, told.allocate(6)
    batch = cache.batch(2, 40)

    def forward() -> None:
        tokens = told.new(2)
        with batch.step() as step:
            k, v = told.rows(tokens, 0)
            step.decode(0, k.expand(-1, GROUP, -1), k, v, window_size=(5, 0))
        told.add(batch.sequences, tokens[: len(batch.sequences)])

    batch.assign([sequence], 12)
    for _ in range(12):
        batch.run(forward)
    told.check()
    assert cache.freed(sequence) == 8
    batch.reserve(4)
    assert batch.block_table[0].tolist()[:3] == [-1, -1, cache.pages(sequence)[2]]
    batch.check()
    batch.assign([])
    cache.truncate(sequence, 12)
    del told.held[sequence][12:]
    with nothing_changed(cache), pytest.raises(InputError, match="in a window of 4 .* have 6"):
        batch.assign([sequence], 1)
    assert batch.sequences == ()


def test_an_error_frees_nothing(instant_decode: None) -> None:
    told = Told(new_cache(12, 4, window=4))
    sequence = told.allocate(7)
    k, v = told.rows(told.new(1), 0)
    before = told.cache.pages(sequence)
    with pytest.raises(ZeroDivisionError), told.cache.step([sequence]) as step:
        step.decode(0, k.expand(-1, GROUP, -1), k, v, window_size=(3, 0))
        raise ZeroDivisionError
    assert told.cache.pages(sequence) == before == [0, 1]
    told.check()


def test_what_it_says_of_itself() -> None:
    cache = new_cache(12, 4, window=8)
    assert cache.window == 8 and "num_layers=1, window=8, bytes=" in repr(cache)
    assert new_cache().window is None and "window" not in repr(new_cache())
    assert cache.bytes_needed(12, 4, 1, 64, window=8) == cache.bytes_needed(12, 4, 1, 64)
