"""The benchmark's comparison with whole prompts, as far as it goes without a GPU."""

from __future__ import annotations

import math

import pytest
import torch
from bench_fakes import SMALL, FakePlan, pool
from torch import Tensor
from torch.nn.attention import SDPBackend

import gqa_cutlass
from bench import data as bench_data
from bench import prefill, timing
from bench.data import Data, check, num_sets, pool_bytes
from bench.points import PREFILL, Point
from bench.prefill import Prompts, measure_prefill


@pytest.fixture(autouse=True)
def _few_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_data, "MAX_SETS", 2)


@pytest.fixture
def prompts() -> tuple[Prompts, Tensor]:
    """Prompts, and what the step after them gives."""
    data = Data(SMALL, pool(SMALL))
    step, _ = check(FakePlan(), data)
    return Prompts(data), step


def test_prompts_end_with_the_step(prompts: tuple[Prompts, Tensor]) -> None:
    found, step = prompts
    out = found.attend(SDPBackend.MATH)(0)
    assert out.shape == (3, 48, 4, 64)
    assert found.error(out, step) < 1e-2
    assert found.error(found.attend(SDPBackend.MATH)(1), step) > 0.1  # another set


@pytest.mark.parametrize("token", [0, -1], ids=["first", "last"])
@pytest.mark.parametrize("wrong", [0.0, math.nan])
def test_a_wrong_first_or_last_token_is_found(
    prompts: tuple[Prompts, Tensor], token: int, wrong: float
) -> None:
    found, step = prompts
    out = found.attend(SDPBackend.MATH)(0)
    out[:, token] = wrong
    assert not found.error(out, step) < 0.5


def test_attention_that_is_not_causal_is_found(
    prompts: tuple[Prompts, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    attention = torch.nn.functional.scaled_dot_product_attention

    def of_everything(*tensors: Tensor, is_causal: bool, enable_gqa: bool) -> Tensor:
        return attention(*tensors, enable_gqa=enable_gqa)

    monkeypatch.setattr(prefill.F, "scaled_dot_product_attention", of_everything)
    found, step = prompts
    assert found.error(found.attend(SDPBackend.MATH)(0), step) > 0.5


@pytest.mark.parametrize("point", PREFILL, ids=str)
def test_prompts_rotate_through_the_caches_sets(
    point: Point, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_data, "MAX_SETS", 512)
    with torch.device("meta"):
        found = Prompts(Data(point, torch.empty(pool_bytes(point) // 2, dtype=torch.float16)))
    query_bytes = found.q[0].numel() * 2
    assert 2 <= found.num_sets <= num_sets(point.read_bytes)
    assert found.num_sets * (point.read_bytes + query_bytes) >= 256 << 20
    assert found.num_sets * query_bytes <= 1 << 29


def test_the_step_is_timed_before_the_prompts_and_not_among_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    turns: list[list[str]] = []

    def interleaved(graphs: dict[str, object]) -> dict[str, float]:
        turns.append(list(graphs))
        return dict.fromkeys(graphs, 2.0 * len(turns))

    monkeypatch.setattr(gqa_cutlass, "plan", lambda *args, **kwargs: FakePlan())
    for module in (prefill, timing):
        monkeypatch.setattr(module, "Graph", lambda call, count: call(0))
    monkeypatch.setattr(prefill, "interleaved", interleaved)
    monkeypatch.setattr(prefill, "SDPA", {"one": SDPBackend.MATH, "other": SDPBackend.MATH})
    found = measure_prefill(SMALL, pool(SMALL))
    assert turns == [["decode"], ["one", "other"]]
    assert found is not None and (found.decode, found.measured) == (2.0, {"one": 4.0, "other": 4.0})


def test_prompts_that_no_backend_attends_are_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*args: object, **options: object) -> Tensor:
        raise RuntimeError("No available kernel. Aborting execution.")

    monkeypatch.setattr(prefill.F, "scaled_dot_product_attention", refused)
    monkeypatch.setattr(gqa_cutlass, "plan", lambda *args, **kwargs: FakePlan())
    monkeypatch.setattr(prefill, "Graph", lambda call, count: None)
    monkeypatch.setattr(prefill, "interleaved", lambda graphs: dict.fromkeys(graphs, 1.0))
    assert measure_prefill(SMALL, pool(SMALL)) is None
    said = capsys.readouterr().err
    assert f"SDPA flash left out at {SMALL}: No available kernel." in said
    assert f"SDPA cuDNN left out at {SMALL}: No available kernel." in said
