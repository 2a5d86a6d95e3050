"""The checkout that a run belongs to: which commit is measured, and where its results are kept."""

from __future__ import annotations

import subprocess
from pathlib import Path

RESULTS = Path(__file__).parent / "results"  # not packaged
UNKNOWN = "unknown"
_ROOT = Path(__file__).parent.parent
DOCUMENT = _ROOT / "docs" / "benchmark.md"  # not packaged


def results_folder() -> Path:
    """Where results go by default: the checkout's, or else the current folder."""
    return RESULTS if RESULTS.is_dir() else Path()


def commit() -> str:
    """The checkout's commit, with "-dirty" where files differ from it; "unknown" outside of one.

    Results do not count: they are what a run changes.
    """
    if not (_ROOT / ".git").exists():
        return UNKNOWN
    try:
        head = _git("rev-parse", "HEAD")
        changes = _git("status", "--porcelain", "--", ".", ":!bench/results")
    except (OSError, subprocess.CalledProcessError):
        return UNKNOWN
    return f"{head}-dirty" if changes else head


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(_ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
