"""Which tokens a rank holds, against counting them one by one."""

from __future__ import annotations

import pytest
import torch

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


@pytest.mark.parametrize("append", [False, True])
@pytest.mark.parametrize("size,interleave", SIZES)
def test_tables_say_what_is_attended_appended_hidden_and_behind(
    size: int, interleave: int, append: bool
) -> None:
    local_max, window = 5, 6
    for sharding in _ranks(size, interleave):
        capacity = sharding.capacity(local_max)
        table = tabulate(
            sharding, local_max, CPU, append=append, window=window, behind=interleave == 1
        )
        lengths = torch.arange(capacity + 1 - append, dtype=torch.int32)
        found = table.look_up(lengths)
        for n in lengths.tolist():
            held = _held(sharding, n + append)
            assert found["attended"][n] == len(held)
            if append:
                assert found["appended"][n] == (held.index(n) if n in held else INACTIVE)
            assert found["hidden"][n] == sum(t < n + append - 1 - window for t in held)
            if interleave == 1:
                assert found["behind"][n] == (n + append - 1 - held[-1] if held else 0)


@pytest.mark.parametrize("append", [False, True])
def test_lengths_that_no_shard_is_for_are_inactive_or_too_long_on_every_rank(append: bool) -> None:
    for sharding in _ranks(3, 2):
        capacity = sharding.capacity(5)
        lengths = [-1, -2, -(2**31), capacity + 1 - append, capacity + 9, 2**31 - 1]
        table = tabulate(sharding, 5, CPU, append=append)
        found = table.look_up(torch.tensor(lengths, dtype=torch.int32))
        assert found["attended"].tolist() == [-1] * 3 + [6] * 3
        assert not append or found["appended"].tolist() == [-1] * 6
