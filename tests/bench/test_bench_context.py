"""The benchmark of shared contexts, with one rank in ptxsim: what it records, what it refuses."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from bench import context_parallel
from bench.context_parallel import Point, measure
from gqa_cutlass.distributed.exchange import EXCHANGES
from gqa_cutlass.distributed.groups import Ranks, ranks_of

CPU = torch.device("cpu")
POINT = Point(batch=1, tokens=9, num_q_heads=4, num_kv_heads=1, head_dim=64)


@pytest.fixture
def rank(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ranks]:
    monkeypatch.setattr(context_parallel, "GPU", False)
    monkeypatch.setattr(context_parallel, "WARM_UP", 0)
    monkeypatch.setattr(context_parallel, "ROUNDS", 1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield ranks_of(None)
    dist.destroy_process_group()


def test_every_exchange_is_measured_and_said(rank: Ranks) -> None:
    rows = measure(POINT, rank, rank.group, CPU)
    assert [row.exchange for row in rows] == list(EXCHANGES)
    assert [row.is_default for row in rows] == [True, False, False]
    for row in rows:
        assert min(row.one_gpu, row.local, row.exchanged, row.total) > 0
        assert str(row).startswith(f"1 x 9, {row.exchange}{'*' * row.is_default}: one GPU ")


def test_a_wrong_result_is_refused(rank: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        context_parallel.Data, "on_one", lambda self, i: torch.ones_like(self.q) * 3
    )
    with pytest.raises(ValueError, match="all_gather: relative error"):
        measure(POINT, rank, rank.group, CPU)
