"""Every instruction of ptxsim on a GPU: equal bits, or within the bound that the ISA states."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from agreement import Tally, compare, is_approximate
from calibration import Calibration
from instructions import Array, Form, Opcode, compiled, element_wise
from operands import operands
from runners import Loaded
from warp_agreement import defined, election_is_wrong, judge_exact, judge_mma
from warp_instructions import WARP, exchanges, matrices, products, split
from warp_operands import exchange_operands, matrix_operands, mma_operands

from gqa_cutlass.ptxsim.element.arith import APPROXIMATE

pytestmark = pytest.mark.gpu

EQUAL = "equal bits"


class Kernels:
    """All instructions, compiled and loaded."""

    def __init__(self) -> None:
        every = [*element_wise(), *exchanges(), *matrices(), *products()]
        self._module: dict[str, Loaded] = {}
        for program, cubin in compiled(every, "sm_90a"):
            module = Loaded(cubin)
            self._module |= {form.symbol: module for form in program}

    def run(self, form: Form, inputs: Sequence[Array]) -> list[Array]:
        """Run one on the GPU."""
        return self._module[form.symbol].run(form, inputs)


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    """Compile on all cores, once."""
    return Kernels()


def family_of(opcode: Opcode) -> str:
    """Approximations by their opcode, as their bounds differ; everything else by its mnemonic."""
    if is_approximate(opcode):
        return ".".join(part for part in opcode if part != "ftz")
    return opcode[0]


def families(forms: Sequence[Form]) -> list[pytest.ParameterSet]:
    ordered = sorted(forms, key=lambda form: family_of(form.opcode))
    grouped = itertools.groupby(ordered, key=lambda form: family_of(form.opcode))
    return [pytest.param(name, list(members), id=name) for name, members in grouped]


def finish(calibration: Calibration, tally: Tally, family: str, bound: str) -> None:
    """Keep the row, print it for those who look (-rA), and fail if there were mismatches."""
    row = tally.row(family, bound)
    calibration.instructions.append(row)
    print(row)
    tally.check()


@pytest.mark.parametrize(("family", "members"), families(element_wise()))
def test_element_wise_instruction(
    family: str, members: list[Form], kernels: Kernels, calibration: Calibration
) -> None:
    tally = Tally()
    for form in members:
        sources = operands(form)
        compare(tally, form, sources, kernels.run(form, sources), form.run(*sources))
    finish(calibration, tally, family, APPROXIMATE.get(family, EQUAL))


@pytest.mark.parametrize(("family", "members"), families([*exchanges(), *matrices()]))
def test_warp_level_instruction(
    family: str, members: list[Form], kernels: Kernels, calibration: Calibration
) -> None:
    tally, bound = Tally(), EQUAL
    for form in members:
        sources = (matrix_operands if "matrix" in family else exchange_operands)(form)
        got, expected = kernels.run(form, sources), form.run(*sources)
        tally.begin(sources)
        for ours, theirs in zip(got, expected, strict=True):
            verdict = judge_exact(ours, theirs, defined(form, sources))
            tally.add(verdict)
            wrong = verdict.wrong.reshape(len(ours), -1).any(axis=1)
            tally.blame(form.name, wrong, sources, ours, theirs)
        if family == "elect":
            bound = "one member, the same for all"
            wrong = election_is_wrong(sources[-1], *got)
            tally.blame(form.name, wrong, sources, np.stack(got, 1), np.stack(expected, 1))
    finish(calibration, tally, family, bound)


@pytest.mark.parametrize("form", products(), ids=lambda form: ".".join(form.opcode[3:]))
def test_mma(form: Form, kernels: Kernels, calibration: Calibration) -> None:
    sources, tally = mma_operands(form), Tally()
    got, expected = kernels.run(form, sources), form.run(*sources)
    verdict = judge_mma(form, sources, got, expected)
    tally.forms, tally.inputs = 1, len(sources[0]) // WARP
    tally.add(verdict)
    mismatches = verdict.wrong.any(axis=(1, 2))
    by_warp = [np.stack(part, 1) for part in split(form.opcode, sources)]
    ours, theirs = (np.stack([r.reshape(-1, WARP) for r in d], 1) for d in (got, expected))
    tally.blame(f"{form.name} (by warp)", mismatches, by_warp, ours, theirs)
    finish(calibration, tally, form.name.replace("sync.aligned.", ""), "`mma_bound`, half an ulp")
