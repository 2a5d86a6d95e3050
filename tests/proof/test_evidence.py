"""GPU evidence: what counts as current, and which runs may write it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import conftest
import pytest
from calibration import Calibration, Timing

from gqa_cutlass.codegen import shipped
from gqa_cutlass.codegen.render import code_digest
from gqa_cutlass.proof.evidence import FILE, Evidence


def test_evidence_counts_for_the_source_that_was_tested() -> None:
    proven, outdated, unknown = shipped()[:3]
    evidence = Evidence(
        run={"gpu": "H200", "date": "2026-01-01"},
        kernels={
            proven.name: {"digest": code_digest(proven)},
            outdated.name: {"digest": "0" * 16},
        },
    )
    assert evidence.missing([proven, outdated, unknown]) == [outdated, unknown]
    described = [evidence.describe(config) for config in (proven, outdated, unknown)]
    assert described == ["H200, 2026-01-01", "outdated", "none"]


SUITE = """
import pytest
gpu = pytest.mark.gpu

@gpu
def test_one(): pass

@gpu
def test_two(): pass

def test_three(): pass
"""


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        pytest.param(["test_suite.py"], "only a part of the GPU suite was run", id="a file"),
        pytest.param(["-k", "one"], "only a part of the GPU suite was run", id="a selection"),
        pytest.param(["-m", "not gpu"], "only a part of the GPU suite was run", id="no GPU tests"),
        pytest.param([], "kernels were not tested", id="too few kernels"),
    ],
)
def test_a_part_of_the_gpu_suite_writes_nothing(
    arguments: list[str],
    why: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "test_suite.py").write_text(SUITE)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    monkeypatch.chdir(tmp_path)
    before = FILE.read_bytes() if FILE.exists() else None
    left_out = ("cacheprovider", "xdist", "unraisableexception")  # the last collects garbage often
    options = [*(f"-pno:{name}" for name in left_out), "--import-mode=importlib"]
    arguments = [*options, "--gpu-evidence", *arguments]
    assert pytest.main(arguments, plugins=[conftest]) is pytest.ExitCode.USAGE_ERROR
    said = capsys.readouterr().err
    assert "no evidence written: " in said and why in said
    assert (FILE.read_bytes() if FILE.exists() else None) == before


def test_what_several_processes_have_seen_is_put_together() -> None:
    stash = pytest.Stash()
    stash[conftest._RECORD], stash[conftest._CALIBRATION] = conftest.Record(), Calibration()
    stash[conftest._LEFT_OUT] = False
    for name, seconds, left_out in (("b", 2.0, False), ("a", 1.0, True)):
        seen = Calibration(timings=[Timing(problem=name, seconds=seconds)])
        node = SimpleNamespace(
            config=SimpleNamespace(stash=stash),
            workeroutput={"seen": ({name: {"cases": 1}}, seen.text(), left_out)},
        )
        conftest.pytest_testnodedown(node, None)
    conftest.pytest_testnodedown(SimpleNamespace(config=SimpleNamespace(stash=stash)), None)
    assert stash[conftest._RECORD].kernels == {"a": {"cases": 1}, "b": {"cases": 1}}
    assert [t.problem for t in stash[conftest._CALIBRATION].timings] == ["a", "b"]
    assert stash[conftest._LEFT_OUT]
