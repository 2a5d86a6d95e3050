"""Work for worker processes, which import this file: so it imports little."""

from __future__ import annotations

import time
from pathlib import Path


def touch_late(item: tuple[float, Path]) -> Path:
    """Make a file after some seconds; returns it."""
    seconds, path = item
    time.sleep(seconds)
    path.touch()
    return path
