"""What dispatch says of its choices, as sentences: counts agree with nouns, and nothing twice."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

import pytest

from gqa_cutlass.codegen import ARCHES, DType, Schedule, default_config
from gqa_cutlass.codegen.schema.kinds import Math
from gqa_cutlass.codegen.schema.problem import Problem
from gqa_cutlass.codegen.variants import policies_for
from gqa_cutlass.dispatch import Choice, Dispatch, dispatch, model_device
from gqa_cutlass.dispatch.splits import counted

H200 = model_device(ARCHES["sm_90a"])
LLAMA = Problem(
    batch_size=1, num_q_heads=32, num_kv_heads=8, head_dim=128, max_seq_len=4096, dtype=DType.F16,
    vec_width=8, append=True,
)  # fmt: skip
ONE = replace(LLAMA, num_q_heads=1, num_kv_heads=1)  # head
PAGED = replace(LLAMA, page_size=1, policies=policies_for(["block_table"]))
TMA = default_config(Math.TENSOROP, DType.F16, 128, 4, 8, Schedule.TMA)
MULTISTAGE = default_config(Math.TENSOROP, DType.F16, 128, 4, 8)


def found() -> Iterator[Dispatch]:
    """Choices of every kind, over sizes from one of everything."""
    for base in (LLAMA, ONE, PAGED, replace(LLAMA, vec_width=1), replace(LLAMA, num_tokens=9)):
        for batch, room in ((1, 1), (1, 64), (1, 4096), (4, 65536), (300, 8192)):
            problem = replace(base, batch_size=batch, max_seq_len=room)
            for ragged in (False, True):
                yield dispatch(problem, H200, ragged=ragged)
                yield dispatch(problem, H200, 1, ragged=ragged, pdl=True, longest=1)
                yield dispatch(problem, H200, ragged=ragged, invariant=True)
    for room in (1, 4096):
        for config, splits, cluster in ((TMA, 1, 1), (TMA, 8, 4), (MULTISTAGE, 1, 1)):
            problem = replace(LLAMA, batch_size=2, max_seq_len=room)
            yield dispatch(problem, H200, kernel=config)
            for spare in (0, 1, 3) if config is MULTISTAGE else (0,):
                launch = Choice(
                    config=config, splits=splits, num_stages=config.num_stages, cluster=cluster,
                    spare=spare,
                )  # fmt: skip
                for asked in (0, 2):
                    yield dispatch(problem, H200, asked, launch, ragged=True)


def test_counts_agree_with_their_nouns() -> None:
    singular = re.compile(r"(?<![\d.])1 (?:spare )?[a-z]+s\b")
    plural = re.compile(r"(?<!\d)(?:0|[2-9]|\d{2,}) (?:spare )?(split|cluster|block|tile|token)\b")
    for chosen in found():
        text = "; ".join(chosen.reasons)
        assert not singular.search(text) and not plural.search(text), text
    assert (counted(0, "split"), counted(1, "split")) == ("0 splits", "1 split")


def test_clusters_are_named_where_there_are_some() -> None:
    for chosen in found():
        said = "cluster" in "; ".join(chosen.reasons)
        assert said <= (chosen.shape.cluster > 1)


def test_nothing_is_said_twice() -> None:
    for chosen in found():
        parts = re.split("[;,:] ", "; ".join(chosen.reasons))
        asked = [part for part in parts if part != "as asked"]  # of a kernel, and of splits
        assert len(asked) == len(set(asked)), chosen.reasons


@pytest.mark.parametrize(
    ("launch", "asked", "reasons"),
    [
        ((TMA, 8, 4, 0), 0, ("this kernel and launch, as asked", "8 splits in clusters of 4")),
        ((TMA, 1, 1, 0), 0, ("this kernel and launch, as asked", "1 split")),
        (
            (MULTISTAGE, 2, 1, 1),
            0,
            (
                "this kernel and launch, as asked",
                "2 splits",
                "1 spare split, to balance ragged lengths",
            ),
        ),
        ((MULTISTAGE, 2, 1, 1), 5, ("this kernel, as asked", "5 splits, as asked")),
    ],
    ids=["clusters", "one split", "spare", "other splits"],
)
def test_a_launch_that_was_asked_for_is_said_once(
    launch: tuple[object, ...], asked: int, reasons: tuple[str, ...]
) -> None:
    config, splits, cluster, spare = launch
    choice = Choice(
        config=config, splits=splits, num_stages=config.num_stages, cluster=cluster, spare=spare
    )
    problem = replace(LLAMA, batch_size=2)
    assert dispatch(problem, H200, asked, choice, ragged=True).reasons == reasons
