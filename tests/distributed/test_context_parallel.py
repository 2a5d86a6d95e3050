"""Decode attention over contexts that ranks share, in processes of their own with gloo."""

from __future__ import annotations

import context_ranks  # noqa: F401 - which has cases
import pytest
import torch
import torch.distributed as dist
from helpers import REPOSITORY, THOROUGH, call_tensors
from ranks import run_ranks, runs

from gqa_cutlass import InputError
from gqa_cutlass.distributed import decode_context_parallel
from gqa_cutlass.distributed.exchange import chosen, received_bytes
from gqa_cutlass.distributed.groups import Ranks, check_backend

SOME = runs(thorough=False)


@pytest.fixture(scope="module")
def outcome(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> list[dict[str, str]]:
    """What came of all cases, by rank."""
    program = REPOSITORY / "tests" / "context_ranks.py"
    thorough = bool(request.config.getoption("--thorough"))
    return run_ranks(program, tmp_path_factory.mktemp("ranks"), thorough=thorough)


@pytest.mark.parametrize(
    "name,size",
    [pytest.param(*run, marks=() if run in SOME else THOROUGH) for run in runs(thorough=True)],
)
def test_among_ranks(outcome: list[dict[str, str]], name: str, size: int) -> None:
    said = [rank.get(f"{name}-{size}", f"did not run: {rank}") for rank in outcome[:size]]
    assert said == [""] * size, "\n".join(said)


def test_ranks_that_are_late_or_gone_are_errors(outcome: list[dict[str, str]]) -> None:
    assert [rank.get("last") for rank in outcome] == [""] * len(outcome)


def test_without_a_process_group_it_is_said_how_to_make_one() -> None:
    tensors = call_tensors()
    tensors.pop("out")
    with pytest.raises(InputError, match="not initialised; allowed: a process group. Start the"):
        decode_context_parallel(**tensors, cache_seqlens=3)


def test_a_backend_that_does_not_move_the_tensors_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dist, "get_backend_config", lambda group: "cuda:nccl")
    ranks = Ranks(group=None, rank=0, size=2)  # type: ignore[arg-type]
    check_backend(ranks, torch.device("cuda", 1))
    with pytest.raises(InputError, match="backends cuda:nccl, and tensors on cpu; allowed: .*gloo"):
        check_backend(ranks, torch.device("cpu"))


def test_much_is_exchanged_in_shares() -> None:
    assert chosen(2, 32, 128, sharded=False) == "all_gather"
    assert chosen(8, 64 * 64, 128, sharded=False) == "all_to_all"
    assert chosen(2, 32, 128, sharded=True) == "all_to_all"


def test_bytes_received_are_those_of_the_parts() -> None:
    """Of 10 rows of 64: parts in float32, and merged rows in 16 bits, each with its sum."""
    part, merged = 10 * (64 * 4 + 4), 10 * (64 * 2 + 4)
    assert received_bytes("all_gather", 5, 10, 64) == 4 * part
    assert received_bytes("all_to_all", 5, 10, 64) == 4 * (part + merged) // 5
    sums = 10 * 4
    assert received_bytes("reduce_scatter", 5, 10, 64) == 4 * sums + 4 * (10 * 256 + merged) // 5
