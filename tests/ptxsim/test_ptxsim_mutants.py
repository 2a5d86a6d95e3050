"""ptxsim finds bugs: each one in `mutants` is planted in the kernels' own source, compiled and run.

What breaks the rules of memory or of concurrency must end in a fault that names it. What only
computes something else must show in what the launch leaves behind.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import Step
from helpers import THOROUGH
from mutants import MUTANTS
from mutants.cases import CASES, Case
from mutants.mutant import MAX_STEPS, Mutant
from mutants.planted import headers, program
from torch import Tensor

from gqa_cutlass import api  # noqa: F401 - whose calls `check` knows
from gqa_cutlass.call.addresses import constants
from gqa_cutlass.call.asked import TENSORS, check, fields_of
from gqa_cutlass.call.executor import Task
from gqa_cutlass.call.given import Seen, see, tokens_of
from gqa_cutlass.call.layout import problem_of
from gqa_cutlass.call.stored import in_pairs
from gqa_cutlass.codegen import KernelConfig, render
from gqa_cutlass.codegen.schema.params import Params, TmaParams
from gqa_cutlass.codegen.schema.policies import CALL
from gqa_cutlass.cpu.executor import Checks, overreads, regions_of, run
from gqa_cutlass.errors import KernelFault
from gqa_cutlass.ptxsim.prepare import Program
from gqa_cutlass.tensormap import map_of


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
    tokens = tokens_of(layout)
    problem = problem_of(layout, policies, asked.window_size[0], asked.out_dtype, tokens)
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
        out_dtype=asked.out_dtype or step.q.dtype,
        fields=fields_of(asked, layout, step.scale, problem.policies, tokens), tokens=tokens,
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
    maps = [map_of(t.address, *in_pairs(t), config.box_tokens).to_bytes() for t in caches]
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
    """The rule that is broken, as the first word of the fault says, or what comes out wrong."""
    return mutant.wrong or re.findall(r"\w+", mutant.fault)[:1]


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
