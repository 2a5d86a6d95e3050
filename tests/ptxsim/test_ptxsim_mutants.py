"""ptxsim finds bugs: each one in `mutants` is planted in the kernels' own source, compiled and run.

What breaks the rules of memory or of concurrency must end in a fault that names it. What only
computes something else must show in what the launch leaves behind.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from cases import Step
from helpers import THOROUGH
from mutants import MUTANTS
from mutants.cases import CASES, Case
from mutants.mutant import MAX_STEPS, Mutant
from torch import Tensor

from gqa_cutlass import api  # noqa: F401 - whose calls `check` knows
from gqa_cutlass.call.addresses import constants
from gqa_cutlass.call.executor import Task
from gqa_cutlass.call.given import Seen, see
from gqa_cutlass.call.layout import problem_of
from gqa_cutlass.call.options import TENSORS, check, fields_of
from gqa_cutlass.codegen import KernelConfig, render
from gqa_cutlass.codegen.compile import compile_source
from gqa_cutlass.codegen.headers import include_dir
from gqa_cutlass.codegen.schema.params import Params, TmaParams
from gqa_cutlass.codegen.schema.policies import CALL
from gqa_cutlass.cpu.executor import Checks, overreads, program_from, regions_of, run
from gqa_cutlass.errors import KernelFault
from gqa_cutlass.ptxsim.prepare import Program
from gqa_cutlass.tensormap import map_of

_INCLUDE = re.compile(r"#include <gqa/([\w/]+\.cuh)>\n")
_FOREIGN_INCLUDE = re.compile(r"#include <(?!gqa/).*>\n")


@cache
def headers(source: str) -> dict[str, str]:
    """The headers that a source includes, by file name, each behind those that it includes."""
    folder = include_dir() / "gqa"
    found: dict[str, str] = {}

    def visit(text: str) -> None:
        for path in _INCLUDE.findall(text):
            name = path.rpartition("/")[2]
            if name not in found:
                header = folder.joinpath(*path.split("/")).read_text(encoding="utf-8")
                visit(header)
                found[name] = header

    visit(source)
    return found


@cache
def program(config: KernelConfig, header: str = "", old: str = "", new: str = "") -> Program:
    """A kernel compiled from one text, in which one place of one header is replaced.

    Headers that are not ours come first, so that all texts can share them.
    """
    source = render(config)
    foreign = _FOREIGN_INCLUDE.findall("".join(headers(source).values()))
    parts = [*dict.fromkeys(foreign), "#pragma nv_hdrstop\n"]
    assert not header or header in headers(source)
    for name, text in headers(source).items():
        if name == header:
            assert text.count(old) == 1, f"{old!r} must occur once in {name}"
            text = text.replace(old, new)
        text = _INCLUDE.sub("\n", text.replace("#pragma once", ""))
        parts.append(f'#line 1 "{name}"\n{text}')
    own = f'#line 1 "{config.name}.cu"\n' + _INCLUDE.sub("\n", source)
    ptx = compile_source("".join(parts) + own, config.name, config.ptx_arch).code.decode()
    return program_from(ptx, config.name)


def launch(case: Case, program: Program) -> set[str]:
    """Run a decode step; returns what it got wrong.

    Raises:
        KernelFault: The kernel did what no kernel may.
    """
    config, step = case.config, case.step()
    tensors = {name: getattr(step, name, None) for name in TENSORS}
    given = *step.tensors(), step.out, step.seqlens, *tensors.values()
    options = {name: getattr(step, name) for name in ("softcap", "window_size", "out_dtype")}
    asked, policies = check("plan", options, given)
    layout = see(given)
    problem = problem_of(layout, policies, asked.window_size[0], asked.out_dtype)
    chosen = case.dispatch(problem)
    lse = torch.full(step.q.shape[:2], float("nan"))
    counters = torch.zeros(chosen.num_merge_counters, dtype=torch.int32)
    tensors = {row.field: tensor for row, tensor in zip(CALL.rows, given, strict=True)} | {
        "lse": lse,
        "split_workspace": torch.empty(chosen.partial_floats),
        "merge_counters": counters,
        "overflow_flag": torch.zeros(1, dtype=torch.int32),
    }
    task = Task(
        layout=layout, problem=problem, dispatch=chosen, asked=asked, softmax_scale=step.scale,
        out_dtype=asked.out_dtype or step.q.dtype, fields=fields_of(asked, layout, step.scale),
    )  # fmt: skip
    params = constants(task, 0)
    for field, tensor in tensors.items():
        setattr(params, field, 0 if tensor is None else tensor.data_ptr())
    argument = _with_maps(params, layout, config) if config.tma else params
    checks = Checks(max_steps=MAX_STEPS)
    run(
        program, chosen.shape, argument, regions_of(tensors, case.append, overreads(chosen)), checks
    )
    return wrong(step, lse, counters)


def _with_maps(params: Params, layout: dict[str, Seen], config: KernelConfig) -> TmaParams:
    """The argument of a kernel that copies by tensor maps."""
    caches = layout["k_cache"], layout["v_cache"]
    maps = [
        map_of(t.address, t.shape, t.strides, t.itemsize, config.block_n).to_bytes() for t in caches
    ]
    return TmaParams.from_buffer_copy(bytes(params) + b"".join(maps))


def wrong(step: Step, lse: Tensor, counters: Tensor) -> set[str]:
    """What a launch got wrong."""
    found = set()
    if step.errors(step.out).share > 1:
        found.add("output")
    if not torch.allclose(lse.double(), step.reference()[1], atol=2e-5, rtol=2e-6):
        found.add("lse")
    if counters.any():
        found.add("merge_counters")
    try:
        step.check_memory()
    except AssertionError:
        found.add("caches")
    return found


@pytest.mark.parametrize("mutant", MUTANTS, ids=[m.name.replace(" ", "-") for m in MUTANTS])
def test_every_bug_has_its_place_in_the_source(mutant: Mutant) -> None:
    """Also those that CI leaves out."""
    text = headers(render(mutant.case.config))[mutant.header]
    assert text.count(mutant.old) == 1 and mutant.new != mutant.old


def firsts(named: dict[str, Any], kind: Callable[[Any], object]) -> list[Any]:
    """Test parameters, of which CI takes the first of every kind."""
    kinds = [kind(each) for each in named.values()]
    return [
        pytest.param(each, id=name, marks=THOROUGH if kinds[i] in kinds[:i] else ())
        for i, (name, each) in enumerate(named.items())
    ]


def what_finds(mutant: Mutant) -> object:
    """The rule that is broken, as the first words of the fault say, or what comes out wrong."""
    return mutant.wrong or re.findall(r"\w+", mutant.fault)[:2]


def way_of(case: Case) -> object:
    """What the main loop is made for; features have tests of their own."""
    return case.schedule, case.math, case.pdl


@pytest.mark.parametrize("case", firsts(CASES, way_of))
def test_the_kernels_as_they_are_pass(case: Case) -> None:
    assert launch(case, program(case.config)) == set()


@pytest.mark.parametrize(
    "mutant",
    firsts({mutant.name.replace(" ", "-"): mutant for mutant in MUTANTS}, what_finds),
)
def test_finds(mutant: Mutant) -> None:
    case = mutant.case
    kernel = program(case.config, mutant.header, mutant.old, mutant.new)
    if mutant.fault:
        with pytest.raises(KernelFault, match=mutant.fault):
            launch(case, kernel)
    else:
        assert mutant.wrong in launch(case, kernel)
