"""The package's version, as it was installed."""

from __future__ import annotations

import importlib.metadata

__version__ = importlib.metadata.version("gqa-cutlass")
