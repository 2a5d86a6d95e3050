"""GPU evidence: what counts as current, and which runs may write it."""

from __future__ import annotations

import subprocess
import sys

import pytest
from helpers import REPOSITORY

from gqa_cutlass.codegen import shipped, source_digest
from gqa_cutlass.evidence import FILE, Evidence


def test_evidence_counts_for_the_source_that_was_tested() -> None:
    proven, outdated, unknown = shipped()[:3]
    evidence = Evidence(
        run={"gpu": "H200", "date": "2026-01-01"},
        kernels={
            proven.name: {"digest": source_digest(proven)},
            outdated.name: {"digest": "0" * 16},
        },
    )
    assert evidence.missing([proven, outdated, unknown]) == [outdated, unknown]
    described = [evidence.describe(config) for config in (proven, outdated, unknown)]
    assert described == ["H200, 2026-01-01", "outdated", "none"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["-m", "gpu", "tests/test_numerics.py"],
        ["-m", "gpu", "-k", "test_softmax_scale"],
        ["-m", "not gpu", "-k", "test_gather"],
    ],
    ids=["a file", "a selection", "no GPU tests"],
)
def test_a_part_of_the_gpu_suite_writes_nothing(arguments: list[str]) -> None:
    before = FILE.read_bytes() if FILE.exists() else None
    finished = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--gpu-evidence", *arguments],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert finished.returncode != 0
    assert "no evidence written" in finished.stdout + finished.stderr or finished.returncode == 5
    assert (FILE.read_bytes() if FILE.exists() else None) == before
