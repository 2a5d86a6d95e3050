"""`gqa-cutlass`: thin commands over the package, each importing only what it needs."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gqa_cutlass.cli.application import app

__all__ = ["app", "main"]


def main() -> None:
    """Run a command; whatever goes wrong is a line, also while what it needs is imported."""
    try:
        from gqa_cutlass.cli.application import run
    except KeyboardInterrupt:
        sys.exit(130)
    except ImportError as error:
        print(f"gqa-cutlass: {error}; remedy: install gqa-cutlass again", file=sys.stderr)
        sys.exit(2)
    sys.exit(run(sys.argv[1:]))


def __getattr__(name: str) -> object:
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from gqa_cutlass.cli.application import app

    return app
