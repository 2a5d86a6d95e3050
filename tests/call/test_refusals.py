"""No kind of tensor gets through a public call but plain, dense ones, and none ends the process."""

from __future__ import annotations

from helpers import REPOSITORY, run_python


def test_every_kind_of_tensor_is_refused_as_every_argument_of_every_call() -> None:
    *tried, total = run_python(
        "import refusals; refusals.main()", PYTHONPATH=REPOSITORY / "tests"
    ).splitlines()
    assert [line for line in tried if not line.endswith(": refused")] == []
    assert total == f"tried {len(tried) - 3}" and len(tried) > 1000  # and three modes
