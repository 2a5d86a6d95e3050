"""Commands that look at a decode step, at a kernel, and at this machine."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from gqa_cutlass.cli.options import fraction, number
from gqa_cutlass.cli.output import print_wide, say

if TYPE_CHECKING:
    import torch

    from gqa_cutlass.proof.sim import SimRun
    from gqa_cutlass.ptxsim.prepare import Program

_ADDRESSES = 2**63 - 1  # bytes, more than which no tensor has


def explain(
    q_heads: Annotated[int, number("Query heads.")],
    kv_heads: Annotated[int, number("KV heads.")],
    head_dim: Annotated[int, number("Dimension per head.")],
    batch: Annotated[int, number("Sequences.")] = 1,
    max_seq_len: Annotated[int, number("Tokens that the cache holds.")] = 4096,
    dtype: Annotated[str, typer.Option(help="float16 or bfloat16.")] = "float16",
    arch: Annotated[str, typer.Option(help="Target.")] = "sm_90a",
    ragged: Annotated[bool, typer.Option(help="Whether lengths may differ much.")] = True,
    dependent: Annotated[
        bool, typer.Option(help="Start while the kernel before finishes, where it pays.")
    ] = False,
    window: Annotated[int, number("Tokens attended to, the new one included. 0: all.")] = 0,
    softcap: Annotated[float, fraction("Bound of the scores. 0: none.")] = 0,
    sinks: Annotated[bool, typer.Option("--sinks", help="One more logit per query head.")] = False,
    alibi: Annotated[bool, typer.Option("--alibi", help="A bias by distance.")] = False,
) -> None:
    """Say which kernel a decode step would run, why, and how it is launched."""
    import torch

    from gqa_cutlass.ahead import explain as explain_call
    from gqa_cutlass.sizes import check_room, check_sizes

    check_sizes("explain", batch=batch, max_seq_len=max_seq_len, q_heads=q_heads,
                kv_heads=kv_heads, head_dim=head_dim, window=window)  # fmt: skip
    check_room(
        "explain", "max_seq_len", max_seq_len, least=1, each=4 * batch * kv_heads * head_dim,
        fixed=0, room=_ADDRESSES, where="what can be addressed",
    )  # fmt: skip
    kind = _element_type("explain", dtype)

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=kind, device="meta")

    cache = empty(batch, max_seq_len, kv_heads, head_dim)
    token = empty(batch, kv_heads, head_dim)
    q = empty(batch, q_heads, head_dim)
    per_head = torch.empty(q_heads, dtype=torch.float32, device="meta")
    found = explain_call(
        q, cache, cache, token, token, ragged=ragged, dependent=dependent, arch=arch,
        window_size=(window - 1, 0), softcap=softcap, sinks=per_head if sinks else None,
        alibi_slopes=per_head if alibi else None,
    )  # fmt: skip
    say(str(found))


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
    say(provenance(where))
    for position, step in enumerate(steps, 1):
        say(f"{position}. {step.name}: {'passed' if step.passed else 'FAILED'}")
        say(textwrap.indent("\n".join(step.evidence), "   "))
    passed = sum(step.passed for step in steps)
    say(f"{passed} of {len(steps)} passed")
    if passed < len(steps):
        raise typer.Exit(1)


def sim(
    kernel: Annotated[str, typer.Option(help="A kernel's name, as `list` prints it.")],
    cache_len: Annotated[int, number("Tokens in the cache before the step.")],
    batch: Annotated[int, number("Sequences.")] = 1,
    kv_heads: Annotated[int, number("KV heads.")] = 1,
    splits: Annotated[int, number("Parts per sequence. 0: as dispatched.")] = 0,
    trace: Annotated[bool, typer.Option("--trace", help="Print every instruction.")] = False,
    no_races: Annotated[bool, typer.Option("--no-races", help="Do not look for races.")] = False,
) -> None:
    """Run one kernel without a GPU: check it, and count what it does."""
    from gqa_cutlass.codegen import KernelConfig
    from gqa_cutlass.proof.sim import run_sim

    run = run_sim(
        KernelConfig.from_name(kernel), cache_len=cache_len, batch=batch, kv_heads=kv_heads,
        num_splits=splits, races=not no_races, trace=_print_step if trace else None,
    )  # fmt: skip
    _print_sim(run)


def doctor() -> None:
    """Report what the package finds on this machine: compiler, headers, GPU, store."""
    from gqa_cutlass.doctor import findings

    found = findings()
    for finding in found:
        say(str(finding))
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


def _print_sim(run: SimRun) -> None:
    """The result against the reference, then what was executed and moved."""
    from gqa_cutlass.ptxsim import report

    shape, stats = run.shape, run.stats
    moved, stored = report.global_bytes(stats)
    for what, value in (
        (
            "launch",
            f"grid {shape.grid} in clusters of {shape.cluster}, {shape.block} threads, "
            f"{shape.shared_bytes} bytes shared",
        ),
        ("ptxsim", f"{run.seconds:.2f} s, no fault"),
        ("output", f"error {run.error:.2e}; PyTorch in the same type: {run.error_torch:.2e}"),
        ("lse", f"error {run.lse_error:.2e}"),
        ("append", "exact to the bit" if run.appended else "WRONG"),
        ("reads", f"{moved} bytes, {moved / run.least_bytes:.2f}x the least possible"),
        ("writes", f"{stored} bytes"),
    ):
        print(f"{what:<8} {value}")
    mix = report.instruction_mix(run.program, stats)
    table = Table("instruction", "warps", "share", title="instruction mix")
    for name, count in mix.most_common(24):
        table.add_row(name, str(count), f"{count / mix.total():.1%}")
    print_wide(table)
    for title, unit, accesses in (
        ("shared memory", "passes", report.shared_accesses(run.program, stats)),
        ("global memory", "sectors", report.global_accesses(run.program, stats)),
    ):
        table = Table("instruction", "source", "requests", unit, "least", "excess", title=title)
        for access in accesses:
            a = access.stats
            table.add_row(
                access.instruction, access.source, str(a.requests), str(a.passes), str(a.ideal),
                f"{access.excess:.2f}x",
            )  # fmt: skip
        print_wide(table)
