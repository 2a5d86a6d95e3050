"""Bugs that are planted into the kernel that merges, each of which ptxsim must find."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from merging import FLOAT32, merged_by_kernel, parts, worst_share
from mutants.planted import headers, program

from gqa_cutlass.codegen import render
from gqa_cutlass.cpu import executor as cpu
from gqa_cutlass.errors import KernelFault

HEADER = "merge_parts.cuh"


@dataclass(frozen=True, kw_only=True)
class Planted:
    """A bug in the kernel, and the fault that it must end in; without one, the result is wrong."""

    name: str
    old: str
    new: str
    fault: str = ""
    num_parts: int = 20


BUGS = (
    Planted(
        name="threads beyond the last",
        old="if (index >= p.num_threads) return;",
        new="",
        fault="outside",
    ),
    Planted(
        name="a second vector behind an odd row",
        old="has_two ? p.row_threads.number : 0",
        new="p.row_threads.number",
        fault="outside|race",
        num_parts=4,  # of more, a thread has one vector
    ),
    Planted(
        name="empty parts counted",
        old="if (batch.lse[i] == kEmptyPart) continue;",
        new="",
    ),
    Planted(
        name="sums of earlier parts not scaled",
        old="sum * weight(old_base)",
        new="sum",
    ),
    Planted(
        name="the first parts again",
        old="merged.add(parts.load(part)",
        new="merged.add(parts.load(0)",
    ),
    Planted(
        name="parts behind the listed at no distance",
        old="part / kListed * p_.outs_step + out_offset_",
        new="out_offset_",
    ),
    Planted(
        name="tokens and heads of sums the wrong way round",
        old="token * p.lse_token + head * p.lse_head",
        new="head * p.lse_token + token * p.lse_head",
    ),
    Planted(
        name="a logarithm to base 2",
        old="log2f(sum) * kLn2",
        new="log2f(sum)",
    ),
)


def share_with(monkeypatch: pytest.MonkeyPatch, bug: Planted | None, num_parts: int) -> float:
    """Merge in ptxsim what shows all of the bugs; returns the error over what is allowed."""
    change = (HEADER, bug.old, bug.new) if bug else ()
    monkeypatch.setattr(cpu, "program_of", lambda config: program(config, *change))
    outs, lses = parts(num_parts, 2, 3, 3, 20)
    lses[:, 0, 1] = torch.linspace(-40, 40, num_parts).unsqueeze(-1)
    outs[1, 1], lses[1, 1] = math.nan, -math.inf
    return worst_share(merged_by_kernel("cpu", outs, lses), outs.nan_to_num(), lses)


@pytest.mark.parametrize("num_parts", sorted({bug.num_parts for bug in BUGS}))
def test_the_kernels_as_they_are_pass(num_parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert share_with(monkeypatch, None, num_parts) <= 1


@pytest.mark.parametrize("bug", [pytest.param(b, id=b.name.replace(" ", "-")) for b in BUGS])
def test_ptxsim_finds_planted_bugs(bug: Planted, monkeypatch: pytest.MonkeyPatch) -> None:
    if bug.fault:
        with pytest.raises(KernelFault, match=bug.fault):
            share_with(monkeypatch, bug, bug.num_parts)
    else:
        assert not share_with(monkeypatch, bug, bug.num_parts) <= 1


def test_every_bug_has_its_place_in_the_source() -> None:
    text = headers(render(FLOAT32))[HEADER]
    assert all(text.count(bug.old) == 1 for bug in BUGS)
