"""The record of ptxsim beside a GPU, and the tables of the documentation made from it."""

from __future__ import annotations

import pytest
from calibration import DOCUMENT, Calibration, InstructionRow, KernelRow, Timing, render, replaced

EXACT = InstructionRow(
    family="add", forms=54, inputs=1000, defined=990, equal=990, open=10, open_equal=9, ulp=0.0,
    share=0.0, bound="equal bits",
)  # fmt: skip
APPROXIMATE = InstructionRow(
    family="ex2.approx.f32", forms=2, inputs=100_000, defined=100_000, equal=99_999, open=0,
    open_equal=0, ulp=1.0, share=0.61, bound="2 ulp",
)  # fmt: skip
KERNEL = KernelRow(
    kernel="gqa_decode", cases=3, outputs=4096, equal=0.9975, ulp=1.0, out_share=0.25, lse=4.8e-07,
    lse_share=0.125,
)  # fmt: skip
RECORD = Calibration(
    run={"gpu": "H200", "driver": "580 (CUDA 13.0)", "date": "2026-01-01"},
    instructions=[EXACT, APPROXIMATE],
    kernels=[KERNEL],
    timings=[Timing(problem="2,048 tokens", seconds=0.31)],
)


def test_the_tables_say_what_was_found() -> None:
    text = render(RECORD)
    assert "H200, driver 580 (CUDA 13.0), 2026-01-01" in text
    assert "| `add` | 54 | 1,000 | all (90.000% of 10 left open) | none | equal bits |" in text
    assert "| 100,000 | 99.999% | 1 ulp, 0.61 of the bound | 2 ulp |" in text
    assert "| `gqa_decode` | 3 | 99.75% of 4,096 | 1 ulp, 0.25 of the bound |" in text
    assert "2,048 tokens: 0.3 s in ptxsim." in text


def test_a_record_reads_as_it_was_written(
    tmp_path: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("calibration.RECORD", tmp_path / "record.json")
    assert Calibration.recorded() is None
    RECORD.write(RECORD.run)
    assert Calibration.recorded() == RECORD


def test_only_what_stands_between_the_markers_changes() -> None:
    document = "a\n<!-- calibration -->\nold\n<!-- /calibration -->\nb\n"
    once = replaced(document, "new")
    assert once == "a\n<!-- calibration -->\n\nnew\n\n<!-- /calibration -->\nb\n"
    assert replaced(once, "new") == once
    with pytest.raises(ValueError, match="0 pairs of calibration markers"):
        replaced("no markers", "new")


def test_the_documentation_shows_the_record() -> None:
    record = Calibration.recorded()
    if record is None:
        pytest.skip("there is no record yet; `make gpu-test` on a GPU machine writes it")
    document = DOCUMENT.read_text()
    assert replaced(document, render(record)) == document, "run `python tests/calibration.py`"
