"""The checkout of the repository that this package is in, if it is: not what pip installed."""

from __future__ import annotations

from pathlib import Path

from gqa_cutlass.errors import GqaError

ROOT = Path(__file__).resolve().parent.parent


def is_checkout() -> bool:
    """Whether the repository's folders are beside this package."""
    return (ROOT / "pyproject.toml").is_file()


def need_checkout(command: str, what: str) -> Path:
    """The checkout's folder, for a command that works on what is nowhere else.

    Args:
        command: As users say it.
        what: What it needs from there.

    Raises:
        GqaError: There is none.
    """
    if not is_checkout():
        raise GqaError(
            f"{command}: got the installed package in {ROOT}; needed: {what}, of a checkout of the "
            f"repository. Run `make demo` there once, then `.venv/bin/gqa-cutlass {command}`."
        )
    return ROOT
