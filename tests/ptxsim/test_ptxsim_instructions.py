"""Instructions from CUDA C++ by way of PTX: the compiler's text, parsed and run, does what the
functions behind it do."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from instructions import BLOCK, Array, Form, element_wise
from operands import operands
from runners import Interpreted
from warp_instructions import WARP, exchanges, matrices, products
from warp_operands import FULL_WARPS, exchange_operands, matrix_operands, mma_operands

from gqa_cutlass.codegen.compile import compile_source

ARCH = "compute_90"


def covering(forms: Sequence[Form]) -> list[Form]:
    """Choose forms until every part of an opcode and every number of parts has been seen."""
    seen: set[tuple[object, ...]] = set()
    chosen = []
    for form in forms:
        parts = {(form.opcode[0], len(form.opcode)), ("types", *form.outputs)}
        parts |= {(part,) for part in form.opcode} | {("last", form.opcode[-2:])}
        if not parts <= seen:
            seen |= parts
            chosen.append(form)
    return chosen


def by_mnemonic(forms: Sequence[Form]) -> list[pytest.ParameterSet]:
    ordered = sorted(forms, key=lambda form: form.opcode[0])
    grouped = itertools.groupby(ordered, key=lambda form: form.opcode[0])
    return [pytest.param(covering(list(members)), id=name) for name, members in grouped]


def interpreted(forms: list[Form]) -> Interpreted:
    source = "\n".join(form.source for form in forms)
    return Interpreted(compile_source(source, forms[0].symbol, ARCH).code.decode())


def some(arrays: list[Array]) -> list[Array]:
    """Take one block's worth of operands from all over."""
    threads = len(arrays[0])
    return [array[:: threads // BLOCK][:BLOCK] for array in arrays]


@pytest.mark.parametrize("forms", by_mnemonic(element_wise()))
def test_element_wise_instruction(forms: list[Form]) -> None:
    module = interpreted(forms)
    for form in forms:
        sources = some(operands(form))
        check(form, module.run(form, sources), form.run(*sources))


@pytest.mark.parametrize("forms", by_mnemonic(exchanges()))
def test_exchange(forms: list[Form]) -> None:
    module = interpreted(forms)
    for form in forms:
        sources = exchange_operands(form)
        if form.opcode[0] == "shfl":
            # To read a lane that does not take part is a fault.
            sources = [source[: FULL_WARPS * WARP] for source in sources]
        check(form, module.run(form, sources), form.run(*sources))


@pytest.mark.parametrize("forms", by_mnemonic(matrices()))
def test_matrix_movement(forms: list[Form]) -> None:
    module = interpreted(forms)
    for form in forms:
        sources = matrix_operands(form)
        check(form, module.run(form, sources), form.run(*sources))


def test_mma() -> None:
    module = interpreted(products())
    for form in products():
        sources = mma_operands(form)
        check(form, module.run(form, sources), form.run(*sources))


def check(form: Form, got: list[Array], expected: list[Array]) -> None:
    for ours, theirs in zip(got, expected, strict=False):  # p|q of some setp is p alone
        assert np.array_equal(ours, theirs), form.name
