"""Commands that run a decode step, and look at a kernel and at this machine."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from gqa_cutlass.cli.options import Json, kernel_names, number
from gqa_cutlass.cli.output import print_table, progress, say, say_json, say_labelled
from gqa_cutlass.cli.table import Column

if TYPE_CHECKING:
    import torch

    from gqa_cutlass.proof.sim import SimRun
    from gqa_cutlass.ptxsim.prepare import Program

_MIX = (
    Column(head="instruction"),
    Column(head="count", number=True),
    Column(head="share", unit="%", number=True),
)
_ACCESSES = (
    Column(head="instruction"),
    Column(head="source", keep=0),
    Column(head="requests", number=True),
    Column(head="passes", number=True),
    Column(head="least", number=True),
    Column(head="excess", unit="x", number=True),
)
_MOST_NAMES = 24
_INDENT = 23  # of the text behind the doctor's labels


def verify(
    cache_len: Annotated[int, number("Tokens in the cache before the step.")] = 10,
    batch: Annotated[int, number("Sequences.")] = 2,
    q_heads: Annotated[int, number("Query heads.")] = 32,
    kv_heads: Annotated[int, number("KV heads.")] = 8,
    head_dim: Annotated[int, number("Dimension per head.")] = 128,
    dtype: Annotated[str, typer.Option(help="float16 or bfloat16.")] = "float16",
    max_seq_len: Annotated[
        int | None,
        number("Tokens that the cache holds. Default: 64, or cache-len + 16 if more."),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(help="cuda, cuda:1, ... or cpu (in ptxsim). Default: a GPU if there is one."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Run a decode step and show what it did: output, cache, log, and that overflow is refused."""
    from gqa_cutlass.proof.verify import choose_device, provenance
    from gqa_cutlass.proof.verify import verify as verify_step

    where = choose_device(device)
    steps = verify_step(
        cache_len=cache_len, batch_size=batch, num_q_heads=q_heads, num_kv_heads=kv_heads,
        head_dim=head_dim, max_seq_len=max_seq_len, dtype=_element_type("verify", dtype),
        device=where,
    )  # fmt: skip
    passed = sum(step.passed for step in steps)
    if as_json:
        say_json({"where": provenance(where), "passed": passed,
                  "steps": [asdict(step) for step in steps]})  # fmt: skip
    else:
        say(provenance(where))
        for position, step in enumerate(steps, 1):
            say(f"{position}. {step.name}: {'passed' if step.passed else 'FAILED'}")
            say_labelled(textwrap.indent("\n".join(step.evidence), "   "), 3)
        say(f"{passed} of {len(steps)} passed")
    if passed < len(steps):
        raise typer.Exit(1)


def sim(
    kernel: Annotated[
        str,
        typer.Option(help="A kernel's name, or parts of it.", autocompletion=kernel_names),
    ],
    cache_len: Annotated[int, number("Tokens in the cache before the step.")],
    batch: Annotated[int, number("Sequences.")] = 1,
    kv_heads: Annotated[int, number("KV heads.")] = 1,
    splits: Annotated[int, number("Parts per sequence. 0: as dispatched.")] = 0,
    trace: Annotated[bool, typer.Option("--trace", help="Print every instruction.")] = False,
    no_races: Annotated[bool, typer.Option("--no-races", help="Do not look for races.")] = False,
    as_json: Json = False,
) -> None:
    """Run one kernel without a GPU: check it, and count what it does."""
    from gqa_cutlass.codegen import KernelConfig
    from gqa_cutlass.codegen.selection import kernel_named
    from gqa_cutlass.errors import InputError
    from gqa_cutlass.proof.sim import STEPS, run_sim

    if trace and as_json:
        raise InputError("sim: --json: got --trace as well, which prints lines; leave one out.")
    config = kernel_named(kernel)
    if not isinstance(config, KernelConfig):
        raise InputError(f"sim: --kernel: got {config.name}, which merges; allowed: what decodes.")
    with progress(0 if trace else STEPS) as step:  # a bar would stand in the trace's way
        run = run_sim(
            config, cache_len=cache_len, batch=batch, kv_heads=kv_heads, num_splits=splits,
            races=not no_races, trace=_print_step if trace else None,
            told=lambda outcome: step(config.name, outcome),
        )  # fmt: skip
    if as_json:
        say_json(_sim_facts(run))
    else:
        _print_sim(run)


def inspect(
    name: Annotated[
        str,
        typer.Argument(help="A kernel's name, or parts of it.", autocompletion=kernel_names),
    ],
    arch: Annotated[
        str | None, typer.Option("--arch", help="Target. Default: sm_90a, or the kernel's first.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Disassemble one kernel and count: instructions, wide loads, spills, tensor cores."""
    from gqa_cutlass.codegen import ARCHES
    from gqa_cutlass.codegen.sass import disassemble, statistics
    from gqa_cutlass.codegen.selection import kernel_named
    from gqa_cutlass.errors import ConfigError
    from gqa_cutlass.kernels.facts import of_result
    from gqa_cutlass.kernels.store import Store

    config = kernel_named(name)
    target = arch or ("sm_90a" if "sm_90a" in config.archs else config.archs[0])
    if target not in config.archs:
        raise ConfigError(
            f"inspect: --arch: got {target!r}; allowed for {config.name}: {', '.join(config.archs)}"
        )
    stored = Store.default().get(config, target, jit=True)
    facts, found = of_result(stored), statistics(disassemble(stored.compiled.code))
    if as_json:
        say_json({**asdict(facts), "sass": asdict(found)})
        return
    share = f"{100 * (facts.occupancy or 0):.0f}% of {ARCHES[target].max_threads_per_sm} threads"
    for what, value in (
        ("kernel", config.name),
        ("arch", target),
        ("registers", f"{facts.registers} per thread"),
        ("shared", f"{facts.shared_bytes} bytes per block"),
        ("occupancy", f"{share} of a multiprocessor"),
        ("spills", f"{facts.spill_bytes} bytes, {found.spills} accesses to local memory"),
        ("wide loads", f"{found.wide_loads} of 128 bits"),
        ("tensor cores", f"{found.tensor_core} instructions"),
        ("instructions", str(found.instructions)),
        ("cubin", f"{stored.path} ({facts.code_bytes} bytes)"),
    ):
        say_labelled(f"{what:<13} {value}", 14)
    _print_mix("instruction mix", found.mix, found.instructions)


def doctor(as_json: Json = False) -> None:
    """Report what the package finds on this machine, and the remedy for what is missing.

    Versions, compiler and headers, driver, GPU, store and its permissions. The status is 1 when
    something is missing.
    """
    from gqa_cutlass.doctor import findings

    found = findings()
    if as_json:
        say_json({"findings": [asdict(finding) for finding in found]})
    else:
        for finding in found:
            say_labelled(str(finding), _INDENT)
    if any(finding.missing for finding in found):
        raise typer.Exit(1)


def _element_type(command: str, name: str) -> torch.dtype:
    """The dtype of a name.

    Raises:
        InputError: Kernels have no such type.
    """
    import torch

    from gqa_cutlass.errors import InputError

    types = {"float16": torch.float16, "bfloat16": torch.bfloat16}
    if name not in types:
        raise InputError(f"{command}: dtype: got {name!r}; allowed: {', '.join(types)}.")
    return types[name]


def _print_step(program: Program, pc: int, warps: int, lanes: int) -> None:
    """One line of a trace."""
    instruction = program.code[pc].instruction
    print(f"{pc:5} {warps:4} warps {lanes:6} lanes  {instruction.name:40} {instruction.where}")


def _sim_facts(run: SimRun) -> dict[str, object]:
    """A run for programs."""
    from gqa_cutlass.ptxsim import report

    moved, stored = report.global_bytes(run.stats)
    return {
        "grid": run.shape.grid, "cluster": run.shape.cluster, "block": run.shape.block,
        "shared_bytes": run.shape.shared_bytes, "seconds": run.seconds, "error": run.error,
        "error_torch": run.error_torch, "lse_error": run.lse_error, "appended": run.appended,
        "bytes_read": moved, "least_bytes": run.least_bytes, "bytes_written": stored,
        "instructions": dict(report.instruction_mix(run.program, run.stats).most_common()),
    }  # fmt: skip


def _print_sim(run: SimRun) -> None:
    """The result against the reference, then what was executed and moved."""
    from gqa_cutlass.ptxsim import report

    shape, stats = run.shape, run.stats
    moved, stored = report.global_bytes(stats)
    clusters = f" in clusters of {shape.cluster}" if shape.cluster > 1 else ""
    for what, value in (
        (
            "launch",
            f"grid {shape.grid}{clusters}, {shape.block} threads, "
            f"{shape.shared_bytes} bytes shared",
        ),
        ("ptxsim", f"{run.seconds:.2f} s, no fault"),
        ("output", f"error {run.error:.2e}; PyTorch in the same type: {run.error_torch:.2e}"),
        ("lse", f"error {run.lse_error:.2e}"),
        ("append", "exact to the bit" if run.appended else "WRONG"),
        ("reads", f"{moved} bytes, {moved / run.least_bytes:.2f}x the least possible"),
        ("writes", f"{stored} bytes"),
    ):
        say(f"{what:<8} {value}")
    mix = report.instruction_mix(run.program, stats)
    _print_mix("instruction mix, by warps", dict(mix.most_common(_MOST_NAMES)), mix.total())
    for title, accesses in (
        ("shared memory, in passes", report.shared_accesses(run.program, stats)),
        ("global memory, in sectors", report.global_accesses(run.program, stats)),
    ):
        rows = [
            [
                a.instruction, a.source, str(a.stats.requests), str(a.stats.passes),
                str(a.stats.ideal), f"{a.excess:.2f}",
            ]
            for a in accesses
        ]  # fmt: skip
        print_table(_ACCESSES, rows, title)


def _print_mix(title: str, mix: Mapping[str, int], total: int) -> None:
    rows = [[name, str(count), f"{100 * count / total:.1f}"] for name, count in mix.items()]
    print_table(_MIX, rows, title)
