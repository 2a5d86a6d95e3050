"""PagedKVCache: what it holds, who shares it, and what is counted when."""

from __future__ import annotations

import copy
import pickle
from contextlib import suppress
from typing import Any

import pytest
import torch
from executors import Notes
from paged_model import (
    DIM,
    F16,
    GROUP,
    HEADS,
    State,
    Told,
    appending,
    new_cache,
    nothing_changed,
    same_bits,
)
from paged_walk import walk

from gqa_cutlass import InputError, OutOfPagesError, PagedKVCache, api
from gqa_cutlass.cache.paged import step as step_module


@pytest.fixture
def instant_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    """Appends, and attends to nothing."""
    monkeypatch.setattr(step_module, "gqa_decode", appending)


# What a cache is


def test_pools_are_contiguous_and_typed(device: str) -> None:
    cache = PagedKVCache(5, 3, 2, 64, torch.bfloat16, device, num_layers=2, head_dim_v=32)
    for pools, dim in ((cache.k, 64), (cache.v, 32)):
        assert [pool.shape for pool in pools] == [(5, 3, 2, dim)] * 2
        assert all(pool.is_contiguous() and pool.dtype == torch.bfloat16 for pool in pools)
        assert {pool.device for pool in pools} == {cache.device}
    assert (cache.num_pages, cache.page_size, cache.num_layers) == (5, 3, 2)
    assert (cache.free_pages, cache.sequences) == (5, [])
    assert cache.device.type == device


def test_bytes_needed_is_what_is_allocated() -> None:
    cache = PagedKVCache(5, 3, 2, 64, F16, "cpu", num_layers=2, head_dim_v=32)
    held = sum(pool.untyped_storage().nbytes() for pool in (*cache.k, *cache.v))
    assert PagedKVCache.bytes_needed(5, 3, 2, 64, num_layers=2, head_dim_v=32) == held
    assert PagedKVCache.bytes_needed(5, 3, 2, 64) == 2 * 5 * 3 * 2 * 64 * 2


def test_repr_names_sizes_and_what_is_free() -> None:
    told = Told(new_cache(12, 4, layers=2))
    told.allocate(5)
    assert repr(told.cache) == (
        "PagedKVCache(num_pages=12, page_size=4, num_kv_heads=1, head_dim=64, "
        "dtype=torch.float16, device='cpu', num_layers=2, bytes=24576, sequences=1, free_pages=10)"
    )


# What is held


@pytest.mark.parametrize(
    ("seed", "by_token"), [(seed, False) for seed in range(6)] + [(0, True), (1, True)], ids=str
)
def test_any_sequence_of_operations_keeps_the_tokens(
    seed: int, by_token: bool, device: str
) -> None:
    """Scales of tokens too. `python tests/paged_walk.py --operations 100000` does more of them."""
    done = walk(seed, 250, device, by_token)
    freed = done.pop("steps with pages freed", 0)
    assert min(done.values()) > 0 and done["out of pages"] > 0
    assert (freed > 50) == seed % 2  # it had a window


def test_prompts_go_across_pages_and_tokens_behind_them(device: str) -> None:
    told = Told(new_cache(layers=2, device=device))
    first, second = told.allocate(6), told.allocate(4)
    told.append(second, first)
    told.check()
    assert told.cache.pages(first) == [0, 1] and told.cache.pages(second) == [2, 3]
    table, lengths = told.cache.table([second, first])
    assert table.tolist() == [[2, 3], [0, 1]] and lengths.tolist() == [5, 7]
    assert table.dtype == lengths.dtype == torch.int32


def test_tables_are_as_wide_as_a_power_of_two() -> None:
    told = Told(new_cache(16, 1))
    empty, some, most = told.allocate(), told.allocate(3), told.allocate(5)
    assert told.cache.table([empty])[0].tolist() == [[-1]]
    assert told.cache.table([some])[0].tolist() == [[0, 1, 2, -1]]
    table, _ = told.cache.table([some, most])
    assert table.tolist() == [[0, 1, 2] + [-1] * 5, [3, 4, 5, 6, 7, -1, -1, -1]]


def test_a_fork_copies_nothing_until_somebody_writes_into_the_shared_page(device: str) -> None:
    told = Told(new_cache(layers=2, device=device))
    cache, parent = told.cache, told.allocate(6)
    one, two = told.fork(parent), told.fork(parent, 5)
    assert [cache.pages(s) for s in (parent, one, two)] == [[0, 1]] * 3
    assert cache.free_pages == 10 and cache.pages_needed([one, two]) == 2
    told.append(one, two)
    assert [cache.pages(s) for s in (parent, one, two)] == [[0, 1], [0, 2], [0, 3]]
    told.check()
    told.append(parent)  # nobody shares its last page any more
    assert cache.pages(parent) == [0, 1]
    told.check()


def test_who_writes_last_into_a_shared_page_needs_no_copy() -> None:
    """The page is of one sequence alone, when the others of the same step have theirs."""
    told = Told(new_cache())
    parent = told.allocate(6)
    child = told.fork(parent)
    assert told.cache.pages_needed([parent, child]) == 1
    told.append(parent, child)
    assert [told.cache.pages(s) for s in (parent, child)] == [[0, 2], [0, 1]]
    told.check()


def test_full_pages_are_shared_for_good() -> None:
    told = Told(new_cache())
    prefix = told.allocate(8)
    requests = [told.fork(prefix) for _ in range(3)]
    told.append(*requests)
    assert [told.cache.pages(s)[:2] for s in requests] == [[0, 1]] * 3
    assert told.cache.free_pages == 12 - 2 - 3
    told.cache.free(prefix)
    del told.held[prefix]
    told.check()
    told.cache.free(requests)
    assert told.cache.free_pages == 12


def test_a_prefix_of_full_pages_is_shared_though_more_is_held() -> None:
    told = Told(new_cache())
    other = told.allocate(11)
    request = told.fork(other, 8)
    told.append(request)
    assert told.cache.pages(request) == [0, 1, 3]
    told.check()


def test_beams_are_reordered_without_a_copy() -> None:
    told = Told(new_cache(layers=2))
    beams = [told.allocate(n) for n in (5, 3, 2)]
    before, first = State(told.cache).bits, told.held[beams[0]]
    told.cache.reorder(beams, [0, 0, -1])
    told.held.update(zip(beams, ([*first], [*first], []), strict=True))
    told.check()
    assert same_bits(State(told.cache).bits, before)
    told.append(*beams)
    told.check()


def test_tokens_are_taken_back_and_so_are_pages() -> None:
    told = Told(new_cache())
    sequence = told.allocate(9)
    told.cache.truncate(sequence, 4)
    del told.held[sequence][4:]
    assert told.cache.pages(sequence) == [0]
    told.append(sequence)
    told.check()
    told.cache.truncate(sequence, 99)  # keeps all of them
    told.check()


def test_pages_are_reserved_and_given_back() -> None:
    told = Told(new_cache())
    ahead = told.cache.allocate(tokens=9)
    told.held[ahead] = []
    assert (told.cache.free_pages, told.cache.pages(ahead)) == (9, [0, 1, 2])
    told.cache.reserve([ahead], 12)
    assert told.cache.free_pages == 9 and told.cache.pages_needed([ahead], 13) == 1
    told.append(ahead)
    told.check()
    told.cache.truncate(ahead, 1)
    assert told.cache.free_pages == 11


# Steps


def test_a_step_counts_once_for_all_layers(instant_decode: None) -> None:
    told = Told(new_cache(layers=3))
    sequences = [told.allocate(4), told.allocate(2)]
    tokens = told.new(2)
    with told.cache.step(sequences) as step:
        assert step.seqlens.tolist() == [4, 2]
        assert step.block_table.tolist() == [[0, 2], [1, -1]]
        for layer in told.layers:
            k, v = told.rows(tokens, layer)
            held = step.gather(layer, sequences[0])
            assert len(held[0]) == len(held[1]) == 4
            step.decode(layer, k.expand(-1, GROUP, -1), k, v)
            assert step.gather(layer, sequences[0])[0][4].equal(k[0])
            assert told.cache.length(sequences[0]) == 4
    told.add(sequences, tokens)
    told.check()


def test_steps_have_a_plan_for_every_power_of_two_of_pages(
    notes: Notes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No other call looks for one."""
    found: list[object] = []
    find = api._PLANS.find
    monkeypatch.setattr(api._PLANS, "find", lambda *a, **o: (found.append(a), find(*a, **o))[1])
    cache = new_cache(32, 4, layers=2)
    sequences = [cache.allocate(), cache.allocate()]
    q = torch.zeros(2, HEADS * GROUP, DIM, dtype=F16)
    k, v = torch.zeros(2, 2, HEADS, DIM, dtype=F16)
    for _ in range(20):
        with cache.step(sequences) as step:
            for layer in range(2):
                step.decode(layer, q, k, v, out=torch.empty_like(q))
    assert len(notes.launches) == 40
    assert len(found) == len(notes.loaded) == 4, "1, 2, 4 and 8 pages"


def test_what_a_layer_attends_to_includes_the_token_that_it_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[list[int]] = []

    def noted(q: torch.Tensor, *_: object, **options: Any) -> torch.Tensor:
        asked.append(options.pop("cache_seqlens").tolist())
        assert options.pop("block_table").tolist() == [[0]]
        assert options == {"return_lse": False, "softcap": 30.0}
        return q

    monkeypatch.setattr(step_module, "gqa_decode", noted)
    told = Told(new_cache(layers=1))
    sequence = told.allocate(2)
    q = torch.zeros(1, HEADS * GROUP, DIM, dtype=F16)
    with told.cache.step([sequence]) as step:
        step.decode(0, q, softcap=30.0)
        step.append(0, *told.rows(told.new(1), 0))
        step.decode(0, q, softcap=30.0)
    told.cache.decode([sequence], q, softcap=30.0)
    assert asked == [[2], [3], [3]]


def test_an_error_in_a_step_takes_it_back(instant_decode: None) -> None:
    told = Told(new_cache(layers=2))
    parent = told.allocate(6)
    child, full = told.fork(parent), told.allocate(4)
    k, v = told.rows(told.new(3), 0)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError), told.cache.step([parent, child, full]) as step:
            step.decode(0, k.expand(-1, GROUP, -1), k, v)
            raise ZeroDivisionError
        told.check()
        assert [len(told.cache.pages(s)) for s in (parent, child, full)] == [2, 2, 1]
    told.append(parent, child, full)
    told.check()


def test_a_step_without_a_layer_is_an_error_and_does_not_count(instant_decode: None) -> None:
    told = Told(new_cache(layers=3))
    sequence = told.allocate(4)
    message = r"PagedKVCache.step: layers: got no tokens for \[1, 2\]; .* lengths are as they were"
    with pytest.raises(InputError, match=message), told.cache.step([sequence]) as step:
        step.append(0, *told.rows(told.new(1), 0))
    told.check()
    assert told.cache.free_pages == 11


def test_while_a_step_is_open_nothing_else_changes_the_cache(instant_decode: None) -> None:
    told = Told(new_cache())
    cache, one, other = told.cache, told.allocate(4), told.allocate(4)
    batch = cache.batch(2, 8)
    rows = told.all_rows([1])
    with pytest.raises(ZeroDivisionError), cache.step([one]) as step:
        for call in (
            lambda: cache.allocate(),
            lambda: cache.free(other),
            lambda: cache.fork(other),
            lambda: cache.truncate(other, 1),
            lambda: cache.reorder([other], [0]),
            lambda: cache.reserve([other], 1),
            lambda: cache.append([other], *rows),
            lambda: cache.prefill(other, *rows),
            lambda: cache.decode([other], rows[0][0].expand(-1, GROUP, -1)),
            lambda: cache.step([other]).__enter__(),
            lambda: batch.assign([other]),
            lambda: batch.reserve(1),
            lambda: batch.step().__enter__(),
            lambda: batch.run(lambda: None),
        ):
            with nothing_changed(cache), pytest.raises(InputError, match="while a step is open"):
                call()
        cache.table([other]), cache.gather(0, other), cache.length(one), cache.pages(one)
        raise ZeroDivisionError
    told.check()
    for call in (lambda: step.decode(0, rows[0]), lambda: step.append(0, *rows)):
        with pytest.raises(InputError, match="got a step that is over; allowed: one whose `with`"):
            call()


def test_too_few_pages_are_told_before_anything_is_written() -> None:
    told = Told(new_cache(4, 4))
    full, some = told.allocate(8), told.allocate(3)
    for call in (
        lambda: told.cache.append([full, some], *told.all_rows([0, 1])),
        lambda: told.cache.prefill(some, *told.all_rows(range(6))),
        lambda: told.cache.reserve([some, full], [6, 1]),
        lambda: told.cache.allocate(9),
        lambda: told.cache.batch(2, 99).assign([some], 10),
        lambda: told.cache.step([some, full], [1, 7]).__enter__(),
    ):
        told.cache.truncate(full, 8)
        ahead = told.cache.allocate(4)
        told.held[ahead] = []
        with nothing_changed(told.cache), pytest.raises(OutOfPagesError) as raised:
            call()
        error = raised.value
        assert error.free == 0 and error.missing == error.asked > 0
        said = f"got {error.asked} to take, with 0 of 4 free; {error.missing} missing"
        assert said in str(error)
        told.check()
        told.cache.free(ahead)
        del told.held[ahead]


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("by_token", [False, True], ids=["f16", "e4m3"])
def test_a_copy_has_the_sequences_and_pools_of_its_own(how: str, by_token: bool) -> None:
    """And no batches; nothing that is done to it changes the cache."""
    told = Told(new_cache(by_token=by_token))
    sequence = told.allocate(3)
    batch = told.cache.batch(1, 8)
    batch.assign([sequence])
    copies = {"deepcopy": copy.deepcopy, "pickle": lambda cache: pickle.loads(pickle.dumps(cache))}
    copied = copies[how](told.cache)
    for mine, theirs in zip(
        told.cache.gather(0, sequence), copied.gather(0, sequence), strict=True
    ):
        assert mine.dtype == theirs.dtype and torch.equal(mine.float(), theirs.float())
    copied.truncate(sequence, 0)
    assert copied.allocate() not in told.cache.sequences
    assert not {pool.data_ptr() for pool in copied.k} & {pool.data_ptr() for pool in told.cache.k}
    told.check()
    with suppress(InputError), told.cache.step([told.allocate()]):
        with pytest.raises(InputError, match="one while a step is open"):
            copies[how](told.cache)
