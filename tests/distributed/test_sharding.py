"""Which tokens a rank holds, against counting them one by one."""

from __future__ import annotations

import pytest
import torch

from gqa_cutlass import pack_tree_mask
from gqa_cutlass.distributed.several import tabulate_several
from gqa_cutlass.distributed.sharding import INACTIVE, Sharding, tabulate

CPU = torch.device("cpu")
SIZES = [(1, 1), (2, 1), (3, 1), (3, 4), (4, 3), (5, 2)]


def _held(sharding: Sharding, tokens: int) -> list[int]:
    """The tokens of a sequence that a rank holds, by the definition."""
    each = sharding.interleave
    return [t for t in range(tokens) if t // each % sharding.size == sharding.rank]


def _ranks(size: int, interleave: int) -> list[Sharding]:
    return [Sharding(rank=r, size=size, interleave=interleave) for r in range(size)]


@pytest.mark.parametrize("size,interleave", SIZES)
def test_counts_and_positions_are_those_of_the_definition(size: int, interleave: int) -> None:
    lengths = torch.arange(41, dtype=torch.int32)
    for sharding in _ranks(size, interleave):
        held = _held(sharding, 40)
        assert [sharding.count(n) for n in range(41)] == [
            len(_held(sharding, n)) for n in range(41)
        ]
        assert sharding.count(lengths).tolist() == [sharding.count(n) for n in range(41)]
        assert [sharding.position(i) for i in range(len(held))] == held
        assert [t for t in range(40) if sharding.owns(t)] == held
        for n in (0, 1, 5, 13):
            here = [sum(t < start + n for t in held if t >= start) for start in range(25)]
            assert max(here) == sharding.most(n)


@pytest.mark.parametrize("size,interleave", SIZES)
@pytest.mark.parametrize("local_max", [1, 4, 5, 7])
def test_capacity_is_what_no_shard_is_too_small_for(
    size: int, interleave: int, local_max: int
) -> None:
    ranks = _ranks(size, interleave)
    capacity = ranks[0].capacity(local_max)
    assert all(len(_held(sharding, capacity)) <= local_max for sharding in ranks)
    assert any(len(_held(sharding, capacity + 1)) > local_max for sharding in ranks)


@pytest.mark.parametrize("new", [0, 1, 3])
@pytest.mark.parametrize("size,interleave", SIZES)
def test_tables_say_what_is_attended_appended_hidden_and_behind(
    size: int, interleave: int, new: int
) -> None:
    local_max, window = 5, 6
    for sharding in _ranks(size, interleave):
        capacity = sharding.capacity(local_max)
        table = tabulate(sharding, local_max, CPU, new=new, window=window, behind=interleave == 1)
        lengths = torch.arange(capacity + 1 - new, dtype=torch.int32)
        found = table.look_up(lengths)
        for n in lengths.tolist():
            held = _held(sharding, n + new)
            assert found["attended"][n] == len(held)
            if new:
                first = [i for i, t in enumerate(held) if t >= n]
                assert found["appended"][n] == (first[0] if first else INACTIVE)
            assert found["hidden"][n] == sum(t < n + new - 1 - window for t in held)
            if interleave == 1:
                assert found["behind"][n] == (n + new - 1 - held[-1] if held else 0)


@pytest.mark.parametrize("new", [0, 1, 3])
def test_lengths_that_no_shard_is_for_are_inactive_or_too_long_on_every_rank(new: int) -> None:
    for sharding in _ranks(3, 2):
        capacity = sharding.capacity(5)
        lengths = [-1, -2, -(2**31), capacity + 1 - new, capacity + 9, 2**31 - 1]
        table = tabulate(sharding, 5, CPU, new=new)
        found = table.look_up(torch.tensor(lengths, dtype=torch.int32))
        assert found["attended"].tolist() == [-1] * 3 + [6] * 3
        assert not new or found["appended"].tolist() == [-1] * 6


@pytest.mark.parametrize("queries,new", [(1, 3), (3, 3), (4, 1), (5, 7), (34, 0)])
@pytest.mark.parametrize("size,interleave", SIZES)
def test_queries_see_tokens_up_to_their_own_and_ranks_get_theirs(
    size: int, interleave: int, queries: int, new: int
) -> None:
    for sharding in _ranks(size, interleave):
        several = tabulate_several(sharding, queries, new, CPU)
        for n in range(2 * sharding.stripe + queries):
            place = torch.tensor([n % sharding.stripe], dtype=torch.int32)
            held = _held(sharding, n + new)
            last = held[-queries:]
            first_query = n + new - queries
            bits = several.seen(place, None)[0].view(torch.int32)
            for i, words in enumerate(bits.tolist()):
                seen = [words[j // 32] >> j % 32 & 1 for j in range(queries)][queries - len(last) :]
                assert seen == [t <= first_query + i for t in last]
            here = several.here[place.long()][0].tolist()
            assert here == [n + i in held for i in range(new)]
            assert sum(here) <= several.most


def test_drafts_of_other_ranks_are_left_out_of_a_tree() -> None:
    """Of three drafts, the second and an older token are here."""
    several = tabulate_several(Sharding(rank=1, size=3, interleave=1), 3, 3, CPU)
    tree = torch.tensor([[[1, 0, 0], [1, 1, 1], [0, 0, 1]]], dtype=torch.bool)
    place = torch.zeros(1, dtype=torch.int32)
    for given in (tree, pack_tree_mask(tree)):
        assert several.seen(place, given).tolist() == [[[1, 1, 0], [1, 1, 1], [1, 1, 0]]]


def test_new_tokens_lie_behind_one_another_in_their_order() -> None:
    sharding = Sharding(rank=1, size=2, interleave=2)
    several = tabulate_several(sharding, 1, 5, CPU)
    lengths = torch.tensor([0, 1, 3, 2], dtype=torch.int32)
    comes = torch.tensor([0, 0, 1, -1], dtype=torch.int32)
    k = torch.arange(20.0).view(4, 5, 1, 1)
    keys, values, ends = several.arriving(lengths % 4, comes, k, -k)
    assert ends.tolist() == [0, 2, 4, 7, 7]
    assert keys.flatten().tolist()[:7] == [2, 3, 6, 7, 10, 13, 14]
    assert torch.equal(values, -keys) and len(keys) == 4 * sharding.most(5)
