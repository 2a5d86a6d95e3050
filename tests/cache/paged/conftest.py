"""Numbers of sequences in tests."""

from __future__ import annotations

import itertools

import pytest


@pytest.fixture(autouse=True)
def first_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences of a test's first cache are 0, 1, 2, ..., as in a process of its own."""
    monkeypatch.setattr("gqa_cutlass.cache.paged.storage._CACHES", itertools.count())
