"""PTX with something wrong in it is refused, or its run is a fault: nothing else ever passes."""

from __future__ import annotations

import random
from collections import Counter
from functools import partial

from ptx_fuzz import Snippet, kernels, outcome, watched_registers


def test_damaged_instructions_are_refused_or_faults() -> None:
    """With odd values in their registers."""
    found = Counter[str]()
    with watched_registers():
        for seed in range(160):
            snippet = Snippet.random(random.Random(seed))
            try:
                found[outcome(snippet.run)] += 1
            except Exception as error:
                raise AssertionError(f"seed {seed}: {snippet}") from error
    assert min(found[how] for how in ("ran", "refused", "fault")) > 20


def test_damaged_kernels_are_refused_or_faults() -> None:
    found = Counter[str]()
    with watched_registers():
        for seed, kernel in enumerate(kernels() * 2):
            try:
                found[outcome(partial(kernel.run, kernel.mutant(random.Random(seed))))] += 1
            except Exception as error:
                raise AssertionError(f"seed {seed} of {kernel.name}") from error
    assert min(found[how] for how in ("ran", "refused")) > 0
