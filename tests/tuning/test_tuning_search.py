"""The search for launches: what is tried, what is kept, and how it is measured."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gqa_cutlass.codegen import ARCHES, DType, Schedule
from gqa_cutlass.codegen.schema.problem import Problem
from gqa_cutlass.codegen.variants import policies_for
from gqa_cutlass.dispatch import Choice, dispatch, model_device
from gqa_cutlass.errors import InputError, OutputError
from gqa_cutlass.tuning import measure, run, search
from gqa_cutlass.tuning.candidates import candidates, chosen, kernels_of, lengths_of, variants
from gqa_cutlass.tuning.measure import Stand, pool_bytes, sets_of
from gqa_cutlass.tuning.search import Tuned, lowest_of, ranked, regret, tune
from gqa_cutlass.tuning.table import Table
from gqa_cutlass.tuning.timing import random_pool

H200 = model_device(ARCHES["sm_90a"])
SMALL = Problem(
    batch_size=2, num_q_heads=4, num_kv_heads=2, head_dim=64, max_seq_len=64, dtype=DType.F16,
    vec_width=8, append=True,
)  # fmt: skip
LLAMA = replace(SMALL, batch_size=8, num_q_heads=32, num_kv_heads=8, head_dim=128, max_seq_len=8192)


@pytest.mark.parametrize("batch", [1, 8, 64, 256])
@pytest.mark.parametrize("room", [1, 100, 1024, 131072])
def test_candidates_are_launches_that_dispatch_makes_as_they_say(batch: int, room: int) -> None:
    problem = replace(LLAMA, batch_size=batch, max_seq_len=room)
    found = candidates(problem, H200)
    assert len(found) == len(set(found)) >= 2
    for choice in found:
        launch = dispatch(problem, H200, 0, choice, True)
        assert chosen(launch) == choice and launch.config == choice.config
        assert launch.shape.grid[1] == choice.splits + choice.spare
    for ragged in (True, False):
        assert chosen(dispatch(problem, H200, ragged=ragged)) in found


def test_candidates_of_several_sequences_have_both_schedules_and_balance() -> None:
    found = candidates(LLAMA, H200)
    assert {c.config.schedule for c in found} == {*Schedule}
    assert {c.spare for c in found} == {0, 1, 3} and {c.cluster for c in found} == {1, 2, 4, 8}
    assert not any(c.spare for c in candidates(replace(LLAMA, batch_size=1), H200))
    ampere = candidates(LLAMA, model_device(ARCHES["sm_80"]))
    assert {c.config.schedule for c in ampere} == {Schedule.MULTISTAGE}


def test_lengths_fill_the_room_and_less_and_differ_where_there_are_several() -> None:
    lengths = lengths_of(LLAMA)
    assert lengths["8191 each"] == (8191,) * 8 and lengths["15 each"] == (15,) * 8
    assert lengths["one of 8191"] == (8191, *[63] * 7)
    assert len(set(lengths["lognormal 2048"])) > 4 and lengths == lengths_of(LLAMA)
    assert sorted(lengths["uniform"]) == [8191 * (2 * i + 1) // 16 for i in range(8)]
    for problem in (LLAMA, replace(LLAMA, batch_size=64), replace(LLAMA, max_seq_len=1)):
        held = lengths_of(problem)
        assert all(0 <= n < problem.max_seq_len for each in held.values() for n in each)
        assert all(len(each) == problem.batch_size for each in held.values())


def test_variants_have_other_tiles_that_fit_or_another_first_tile() -> None:
    choice = chosen(dispatch(replace(LLAMA, batch_size=1), H200))
    found = variants(choice)
    assert replace(choice, prefetch=False) in found and choice not in found
    assert len({c.config for c in found}) > 3
    assert all(c.config.shared_bytes <= H200.arch.shared_per_block for c in found)
    assert variants(choice, tiles=False) == [replace(choice, prefetch=False)]


def test_variants_with_smaller_tiles_have_as_many_blocks_or_as_many_tokens_for_each() -> None:
    choice = chosen(dispatch(replace(LLAMA, batch_size=1), H200))
    choice = replace(choice, splits=2, cluster=2)
    base = choice.config
    smaller = [c for c in variants(choice) if c.config.num_warps == base.num_warps // 2
               and c.config.block_n == base.block_n]  # fmt: skip
    assert base.tma and {(c.splits, c.cluster) for c in smaller} == {(2, 2), (4, 4)}


def _fake(cost: Callable[[Choice, str], float]) -> tuple[search.Measure, list[tuple[int, int]]]:
    rounds: list[tuple[int, int]] = []

    def timed(choices: Sequence[Choice], repeats: int) -> dict[Choice, Mapping[str, float]]:
        rounds.append((len(choices), repeats))
        return {c: {name: cost(c, name) for name in lengths_of(LLAMA)} for c in choices}

    return timed, rounds


def test_the_search_finds_the_least_regret_and_halves_what_it_measures() -> None:
    best = Choice(
        config=dispatch(LLAMA, H200, ragged=False).config, splits=4,
        num_stages=dispatch(LLAMA, H200, ragged=False).config.num_stages, prefetch=False,
    )  # fmt: skip
    timed, rounds = _fake(lambda c, name: 1.0 if c == best else 2.0 + c.splits / 100)
    tuned = tune(LLAMA, H200, timed)
    assert tuned.best == best and {*candidates(LLAMA, H200)} < {*tuned.times}
    assert {c.config for c in tuned.times} <= {*kernels_of(LLAMA, H200)}
    (first, _), (varied, _), *later = rounds
    assert first + varied == len(tuned.times)
    counts = [count for count, _ in later]
    assert counts == sorted(counts, reverse=True) and counts[-1] <= 3
    assert all(a[1] < b[1] for a, b in zip(later, later[1:], strict=False))


def test_without_other_tiles_all_kernels_are_those_that_dispatch_takes() -> None:
    timed, _ = _fake(lambda c, name: 1.0 + c.splits / 100)
    tuned = tune(LLAMA, H200, timed, tiles=False)
    kernels = {c.config for c in tuned.times}
    assert kernels == {*kernels_of(LLAMA, H200, tiles=False)}
    assert kernels == {c.config for c in candidates(LLAMA, H200)}
    assert {c.prefetch for c in tuned.times} == {False, True}


def test_regret_is_the_geometric_mean_over_lengths() -> None:
    first, second = candidates(LLAMA, H200)[:2]
    times = {first: {"a": 1.0, "b": 8.0}, second: {"a": 2.0, "b": 2.0}}
    lowest = lowest_of(times)
    assert lowest == {"a": 1.0, "b": 2.0}
    assert [regret(each, lowest) for each in times.values()] == pytest.approx([2, 2**0.5])


def test_what_loses_where_caches_are_full_is_behind_all_others() -> None:
    first, second, third = candidates(LLAMA, H200)[:3]
    times = {
        first: {"full": 102.0, "short": 1.0},
        second: {"full": 100.4, "short": 5.0},
        third: {"full": 100.0, "short": 9.0},
    }
    assert ranked(times) == [second, third, first]
    assert ranked(times, slack=1.03) == [first, second, third]
    assert ranked(times, first) == [first, second, third]  # nothing is slower than this one there
    assert ranked({c: times[c] for c in (second, third)}, first) == [second, third]
    brief = {first: {"full": 1.02, "short": 1.0}, second: {"full": 1.0, "short": 2.0}}
    assert ranked(brief) == [first, second]  # hundredths of a microsecond are none


def test_choices_that_do_not_run_are_left_out() -> None:
    def timed(choices: Sequence[Choice], repeats: int) -> search.Times:
        return {c: {"a": float(c.splits)} for c in choices if c.config.tma}

    tuned = tune(LLAMA, H200, timed)
    assert all(c.config.tma for c in tuned.times) and tuned.best.splits == 1


# Measuring, with kernels in ptxsim and a clock that counts.


class FakeGraph:
    def __init__(self, call: Callable[[int], object], num_sets: int) -> None:
        self.call = call
        call(num_sets - 1)

    def micros_per_call(self) -> float:
        return 5.0


@pytest.fixture
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "Graph", FakeGraph)
    monkeypatch.setattr(measure, "evict", lambda: None)


@pytest.mark.usefixtures("without_gpu")
@pytest.mark.parametrize("stored", ["", "float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("page_size", [None, 16])
def test_candidates_run_and_agree(page_size: int | None, stored: str) -> None:
    policies = policies_for(["block_table"] * bool(page_size) + [stored])
    problem = replace(SMALL, page_size=page_size, policies=policies)
    stand = Stand(problem, {"63 each": (63, 63)}, random_pool(pool_bytes(problem), "cpu"))
    choices = [c for c in candidates(problem, H200) if c.splits == 1][:3]
    assert stand.measure(choices, 2) == {c: {"63 each": 5.0} for c in choices}


@pytest.mark.usefixtures("without_gpu")
def test_graphs_end_with_what_is_measured() -> None:
    """Not when something is collected, which may be while another graph is captured."""
    gc.disable()
    try:
        stand = Stand(SMALL, {"63 each": (63, 63)}, random_pool(pool_bytes(SMALL), "cpu"))
        stand.measure(candidates(SMALL, H200)[:2], 1)
        graphs = [weakref.ref(graph) for graph in stand._graphs.values()]
        del stand
        assert graphs and not any(graph() for graph in graphs)
    finally:
        gc.enable()


@pytest.mark.usefixtures("without_gpu")
def test_a_candidate_that_is_wrong_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    stand = Stand(SMALL, {"20 each": (20, 20)}, random_pool(pool_bytes(SMALL), "cpu"))
    choice = chosen(dispatch(SMALL, H200))
    outs = iter((torch.ones(3), torch.full((3,), 2.0)))

    class Wrong:
        def __call__(self, *tensors: object) -> torch.Tensor:
            return next(outs)

    monkeypatch.setattr(measure, "plan", lambda *tensors, **options: Wrong())
    stand._first = Wrong()  # type: ignore[assignment]
    assert stand.measure([choice], 1) == {}


def test_large_caches_are_gone_through_fewer_times() -> None:
    assert sets_of(SMALL) == 24 and sets_of(replace(LLAMA, batch_size=256)) == 8


# Runs over several problems.


@pytest.fixture
def searched(monkeypatch: pytest.MonkeyPatch) -> list[Problem]:
    """What is searched for, at once."""
    asked: list[Problem] = []

    def found(problem: Problem, *rest: object) -> Tuned:
        asked.append(problem)
        choice = chosen(dispatch(problem, H200))
        return Tuned(
            problem=problem, lengths={"1 each": (1,) * problem.batch_size},
            times={choice: {"1 each": 2.5}},
        )  # fmt: skip

    for name, value in {
        "tune": found, "gpu": lambda device: H200, "provenance": lambda: {"gpu": "NVIDIA X1"},
        "kernels_of": lambda problem, device, tiles: [],
        "random_pool": lambda num_bytes: torch.zeros(num_bytes // 2, dtype=torch.float16),
    }.items():  # fmt: skip
        monkeypatch.setattr(run, name, value)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 << 22, 1 << 22))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    return asked


def test_a_run_goes_on_where_it_was_interrupted(searched: list[Problem], tmp_path: Path) -> None:
    said: list[str] = []
    other = replace(SMALL, max_seq_len=32)
    path = tmp_path / "new" / "x.json"
    run.tune_all([SMALL], path, lambda name, outcome: said.append(name + outcome))
    table = run.tune_all([SMALL, other], path, lambda name, outcome: said.append(name))
    assert searched == [SMALL, other] and len(said) == 2 and "4/2/64 2x64" in said[0]
    assert "s left" in said[0]
    assert Table.load(path) == table and [t.problem for t in table.found] == searched
    assert table.device == replace(H200, name="NVIDIA X1")


def test_a_run_again_takes_the_place_of_the_one_before(
    searched: list[Problem], tmp_path: Path
) -> None:
    other = replace(SMALL, max_seq_len=32)
    path, times = tmp_path / "x.json", {chosen(dispatch(SMALL, H200)): {"1 each": 9.5}}
    old = Tuned(problem=SMALL, lengths={"1 each": (1, 1)}, times=times)
    Table(run={"gpu": "NVIDIA X1"}, found=(old, replace(old, problem=other))).save(path)
    run.tune_all([SMALL], path, lambda name, outcome: None)
    assert searched == []
    run.tune_all([SMALL], path, lambda name, outcome: None, again=True)
    assert searched == [SMALL]
    micros = {t.problem: next(iter(t.times.values()))["1 each"] for t in Table.load(path).found}
    assert list(micros.items()) == [(SMALL, 2.5), (other, 9.5)]


def test_tables_keep_the_first_launches_and_those_that_calls_take() -> None:
    """Where lengths are equal as where they are not, by the table as by the model."""
    choices = candidates(LLAMA, H200)
    model = [chosen(dispatch(LLAMA, H200, ragged=ragged)) for ragged in (True, False)]
    choices = [c for c in choices if c not in model]
    times = {c: {"full": 100.0, "unlike": 50.0 + i} for i, c in enumerate(choices)}
    times[choices[30]]["full"] = 90.0  # best where lengths are equal
    times |= {choice: {"full": 99.0, "unlike": 99.0} for choice in model}
    lengths = {"full": (8191,) * 8, "unlike": (8191, *[1] * 7)}
    kept = Tuned(problem=LLAMA, lengths=lengths, times=times).kept(H200)
    assert list(kept.times) == [*choices[:10], choices[30], *model]
    assert all(kept.times[choice] == times[choice] for choice in kept.times)
    for ragged in (True, False):
        assert kept.best_of(ragged=ragged) == choices[0 if ragged else 30]


@pytest.mark.usefixtures("searched")
def test_what_another_run_finds_meanwhile_stays(tmp_path: Path) -> None:
    path, other = tmp_path / "x.json", replace(SMALL, max_seq_len=32)

    def beside(name: str, outcome: str) -> None:
        if len(Table.load(path).found) == 1:
            run.tune_all([other], path, lambda name, outcome: None)

    third = replace(SMALL, max_seq_len=16)
    run.tune_all([SMALL, third], path, beside)
    assert [t.problem for t in Table.load(path).found] == [SMALL, other, third]


def test_a_file_that_cannot_be_written_is_an_error_before_the_search(
    searched: list[Problem], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="tune: --out: got .*file, where files cannot be written"):
        run.tune_all([SMALL], tmp_path / "file" / "x.json", lambda name, outcome: None)
    assert searched == []


@pytest.mark.usefixtures("searched")
def test_another_gpus_table_is_not_gone_on_with(tmp_path: Path) -> None:
    Table(run={"gpu": "NVIDIA Y2"}).save(tmp_path / "x.json")
    with pytest.raises(InputError, match="a table of NVIDIA Y2; allowed: one of this GPU"):
        run.tune_all([SMALL], tmp_path / "x.json", lambda name, outcome: None)


@pytest.mark.usefixtures("searched")
def test_a_problem_that_has_no_room_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="batch 8, room 8192: got caches of"):
        run.tune_all([LLAMA], tmp_path / "x.json", lambda name, outcome: None)
