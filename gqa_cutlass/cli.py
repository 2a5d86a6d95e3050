"""`gqa-cutlass`: thin commands over the package, each importing only what it needs."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from gqa_cutlass.errors import GqaError

if TYPE_CHECKING:
    import torch

    from gqa_cutlass.ptxsim.prepare import Program
    from gqa_cutlass.store import StoredKernel
    from gqa_cutlass.trial import Trial

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help=__doc__, pretty_exceptions_enable=False
)
console = Console()

Kernels = Annotated[
    str | None,
    typer.Option(
        "--kernels",
        help="Comma-separated; each entry is `*`-separated substrings of a name. Default: all.",
    ),
]
Archs = Annotated[
    str, typer.Option("--arch", help="Comma-separated targets, or `all`. Default: sm_90a.")
]
Jobs = Annotated[int, typer.Option(help="Kernels to compile at a time. 0: one per CPU.")]


@app.command()
def generate(
    out: Annotated[Path, typer.Option(help="Folder to bring up to date.")] = Path("generated"),
) -> None:
    """Render every shipped kernel and the manifest, and the headers that the schema gives.

    Needs no GPU and no torch.
    """
    from gqa_cutlass.codegen.manifest import emit, generated_files
    from gqa_cutlass.codegen.manifest import generate as write

    for header in emit():
        console.print(f"templates/{header} changed")
    changed = write(out)
    console.print(f"{len(generated_files())} files in {out}, {len(changed)} changed")


@app.command("list")
def list_(kernels: Kernels = None) -> None:
    """List the shipped kernels with their launch bounds and their GPU evidence."""
    from gqa_cutlass.codegen import select
    from gqa_cutlass.evidence import Evidence

    evidence = Evidence.shipped()
    table = Table("kernel", "threads", "shared", "blocks/KV head", "GPU evidence")
    for config in select(kernels):
        table.add_row(
            config.name, str(config.num_threads), str(config.shared_bytes),
            str(config.head_blocks), evidence.describe(config),
        )  # fmt: skip
    _print_wide(table)


@app.command()
def build(
    kernels: Kernels = None,
    arch: Archs = "sm_90a",
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for GQA_CUTLASS_KERNEL_DIR. Default: this user's store."),
    ] = None,
    jobs: Jobs = 0,
) -> None:
    """Compile kernels ahead of time, to cubins or (compute_80, compute_90) to PTX. Needs no GPU.

    Those whose schedule needs another architecture are left out.
    """
    from gqa_cutlass.codegen import select
    from gqa_cutlass.codegen.compile import compiles_for
    from gqa_cutlass.errors import ConfigError
    from gqa_cutlass.store import Store, build_all

    store = Store(root=out, private=False) if out else Store.default()
    archs = _archs(arch)
    wanted = [(config, a) for a in archs for config in select(kernels) if compiles_for(config, a)]
    if not wanted:
        raise ConfigError(
            f"--arch: got {arch!r}, which none of these kernels is for; allowed: "
            f"{', '.join(dict.fromkeys(a for config in select(kernels) for a in config.archs))}"
        )
    built = []
    with Progress(console=console, transient=True) as progress:
        for stored in progress.track(build_all(store, wanted, jobs), total=len(wanted)):
            built.append(stored)
    _print_wide(built_table(built))
    console.print(f"{sum(s.was_built for s in built)} of {len(built)} compiled, in {store.root}")


@app.command()
def export(
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    kernels: Kernels = None,
    arch: Archs = "sm_90a",
    jobs: Jobs = 0,
) -> None:
    """Write a C library and a Rust crate with the kernels in them. Needs no GPU."""
    from gqa_cutlass.export import compiled, plan_export, write_bundle
    from gqa_cutlass.store import Store

    wanted = plan_export(kernels, _archs(arch))
    cubins = compiled(wanted, Store.default(), jobs)
    with Progress(console=console, transient=True) as progress:
        tracked = progress.track(cubins, total=len(wanted.wanted))
        files = write_bundle(out, wanted, tracked)
    names = ", ".join(a.name for a in wanted.archs)
    console.print(f"{len(files)} files in {out}: {len(wanted.kernels)} kernels for {names}")


@app.command()
def check() -> None:
    """Fail when what is generated has drifted from its source, or a kernel lacks GPU evidence."""
    from gqa_cutlass.codegen import shipped
    from gqa_cutlass.codegen.manifest import drift, emitted_drift
    from gqa_cutlass.evidence import FILE, Evidence

    headers = emitted_drift()
    for name in headers:
        console.print(f"drift: templates/{name}; run `gqa-cutlass generate`")
    if headers:  # kernels are compared once what they include is right
        raise typer.Exit(1)
    wrong = drift()
    for name in wrong:
        console.print(f"drift: generated/{name}; run `gqa-cutlass generate`")
    if not FILE.parent.is_dir():
        raise GqaError("check: works in a checkout of the repository, whose evidence it reads")
    unproven = Evidence.shipped().missing(shipped())
    for config in unproven:
        console.print(f"no current GPU evidence: {config.name}; run `make gpu-test` on a GPU")
    console.print(f"{len(wrong)} files drifted, {len(unproven)} kernels without GPU evidence")
    if wrong or unproven:
        raise typer.Exit(1)


@app.command()
def clean() -> None:
    """Remove this user's compiled kernels."""
    from gqa_cutlass.store import Store

    store = Store.default()
    console.print(f"{store.clean()} files removed from {store.root}")


@app.command()
def explain(
    q_heads: Annotated[int, typer.Option(help="Query heads.")],
    kv_heads: Annotated[int, typer.Option(help="KV heads.")],
    head_dim: Annotated[int, typer.Option(help="Dimension per head.")],
    batch: Annotated[int, typer.Option(help="Sequences.")] = 1,
    max_seq_len: Annotated[int, typer.Option(help="Tokens that the cache holds.")] = 4096,
    dtype: Annotated[str, typer.Option(help="float16 or bfloat16.")] = "float16",
    arch: Annotated[str, typer.Option(help="Target.")] = "sm_90a",
    ragged: Annotated[bool, typer.Option(help="Whether lengths may differ much.")] = True,
    dependent: Annotated[
        bool, typer.Option(help="Start while the kernel before finishes, where it pays.")
    ] = False,
) -> None:
    """Say which kernel a decode step would run, why, and how it is launched."""
    import torch

    from gqa_cutlass.api import explain as explain_call

    kind = _element_type("explain", dtype)

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=kind, device="meta")

    cache = empty(batch, max_seq_len, kv_heads, head_dim)
    token = empty(batch, kv_heads, head_dim)
    q = empty(batch, q_heads, head_dim)
    print(
        explain_call(q, cache, cache, token, token, ragged=ragged, dependent=dependent, arch=arch)
    )


@app.command()
def verify(
    cache_len: Annotated[int, typer.Option(help="Tokens in the cache before the step.")] = 10,
    batch: Annotated[int, typer.Option(help="Sequences.")] = 2,
    q_heads: Annotated[int, typer.Option(help="Query heads.")] = 32,
    kv_heads: Annotated[int, typer.Option(help="KV heads.")] = 8,
    head_dim: Annotated[int, typer.Option(help="Dimension per head.")] = 128,
    dtype: Annotated[str, typer.Option(help="float16 or bfloat16.")] = "float16",
    max_seq_len: Annotated[
        int | None,
        typer.Option(help="Tokens that the cache holds. Default: 64, or cache-len + 16 if more."),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(help="cuda, cuda:1, ... or cpu (in ptxsim). Default: a GPU if there is one."),
    ] = None,
) -> None:
    """Run a decode step and show what it did: output, cache, log, and that overflow is refused."""
    from gqa_cutlass.verify import choose_device, provenance
    from gqa_cutlass.verify import verify as verify_step

    where = choose_device(device)
    steps = verify_step(
        cache_len=cache_len, batch_size=batch, num_q_heads=q_heads, num_kv_heads=kv_heads,
        head_dim=head_dim, max_seq_len=max_seq_len, dtype=_element_type("verify", dtype),
        device=where,
    )  # fmt: skip
    print(provenance(where))
    for number, step in enumerate(steps, 1):
        print(f"{number}. {step.name}: {'passed' if step.passed else 'FAILED'}")
        print(textwrap.indent("\n".join(step.evidence), "   "))
    passed = sum(step.passed for step in steps)
    print(f"{passed} of {len(steps)} passed")
    if passed < len(steps):
        raise typer.Exit(1)


@app.command()
def sim(
    kernel: Annotated[str, typer.Option(help="A kernel's name, as `list` prints it.")],
    cache_len: Annotated[int, typer.Option(help="Tokens in the cache before the step.")],
    batch: Annotated[int, typer.Option(help="Sequences.")] = 1,
    kv_heads: Annotated[int, typer.Option(help="KV heads.")] = 1,
    splits: Annotated[int, typer.Option(help="Parts per sequence. 0: as dispatched.")] = 0,
    trace: Annotated[bool, typer.Option("--trace", help="Print every instruction.")] = False,
    no_races: Annotated[bool, typer.Option("--no-races", help="Do not look for races.")] = False,
) -> None:
    """Run one kernel without a GPU: check it, and count what it does."""
    from gqa_cutlass.codegen import KernelConfig
    from gqa_cutlass.trial import run_trial

    trial = run_trial(
        KernelConfig.from_name(kernel), cache_len=cache_len, batch=batch, kv_heads=kv_heads,
        num_splits=splits, races=not no_races, trace=_print_step if trace else None,
    )  # fmt: skip
    _print_trial(trial)


@app.command()
def bench(
    points: Annotated[
        str, typer.Option(help="Measure only points whose name contains this. Needs --out.")
    ] = "",
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for JSON, CSV and plots. Default: bench/results of a checkout, or here; "
            "with --from: write nothing."
        ),
    ] = None,
    source: Annotated[
        Path | None,
        typer.Option("--from", help="Measure nothing: show this record's tables."),
    ] = None,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the README's tables.")
    ] = False,
    commit: Annotated[
        str | None, typer.Option(help="Commit measured. Default: the checkout's, asked of git.")
    ] = None,
) -> None:
    """Time decode steps on the GPU against PyTorch and a kernel that only reads the same bytes."""
    from gqa_cutlass.bench.command import bench as run

    run(points=points, out=out, source=source, markdown=markdown, commit=commit)


@app.command()
def doctor() -> None:
    """Report what the package finds on this machine: compiler, headers, GPU, store."""
    from gqa_cutlass.doctor import findings

    table = Table("what", "found", show_header=False)
    for what, found in findings():
        table.add_row(what, found)
    _print_wide(table)


def main() -> None:
    """Run a command; an error is one line, not a traceback."""
    try:
        app()
    except (GqaError, OSError) as error:
        print(f"gqa-cutlass: {error}", file=sys.stderr)
        sys.exit(2)


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


def _archs(given: str) -> list[str]:
    """The targets that --arch names."""
    from gqa_cutlass.codegen import ARCHES

    return list(ARCHES) if given == "all" else [entry.strip() for entry in given.split(",")]


def built_table(built: list[StoredKernel]) -> Table:
    """Compiled kernels: registers, shared memory, spills, seconds, cubin size."""
    table = Table("kernel", "arch", "registers", "shared", "spills", "seconds", "cubin")
    for stored in built:
        c, config = stored.compiled, stored.config
        table.add_row(
            config.name, stored.arch, str(c.registers), str(config.shared_bytes),
            str(c.spill_bytes), f"{c.seconds:.2f}", f"{len(c.code)}",
        )  # fmt: skip
    return table


def _print_step(program: Program, pc: int, warps: int, lanes: int) -> None:
    """One line of a trace."""
    instruction = program.code[pc].instruction
    print(f"{pc:5} {warps:4} warps {lanes:6} lanes  {instruction.name:40} {instruction.where}")


def _print_trial(trial: Trial) -> None:
    """The result against the reference, then what was executed and moved."""
    from gqa_cutlass.ptxsim import report

    shape, stats = trial.shape, trial.stats
    moved, stored = report.global_bytes(stats)
    for what, value in (
        (
            "launch",
            f"grid {shape.grid} in clusters of {shape.cluster}, {shape.block} threads, "
            f"{shape.shared_bytes} bytes shared",
        ),
        ("ptxsim", f"{trial.seconds:.2f} s, no fault"),
        ("output", f"error {trial.error:.2e}; PyTorch in the same type: {trial.error_torch:.2e}"),
        ("lse", f"error {trial.lse_error:.2e}"),
        ("append", "exact to the bit" if trial.appended else "WRONG"),
        ("reads", f"{moved} bytes, {moved / trial.least_bytes:.2f}x the least possible"),
        ("writes", f"{stored} bytes"),
    ):
        print(f"{what:<8} {value}")
    mix = report.instruction_mix(trial.program, stats)
    table = Table("instruction", "warps", "share", title="instruction mix")
    for name, count in mix.most_common(24):
        table.add_row(name, str(count), f"{count / mix.total():.1%}")
    _print_wide(table)
    for title, unit, accesses in (
        ("shared memory", "passes", report.shared_accesses(trial.program, stats)),
        ("global memory", "sectors", report.global_accesses(trial.program, stats)),
    ):
        table = Table("instruction", "source", "requests", unit, "least", "excess", title=title)
        for access in accesses:
            a = access.stats
            table.add_row(
                access.instruction, access.source, str(a.requests), str(a.passes), str(a.ideal),
                f"{access.excess:.2f}x",
            )  # fmt: skip
        _print_wide(table)


def _print_wide(table: Table) -> None:
    """Print without folding kernel names, however narrow the terminal."""
    Console(width=max(console.width, 160)).print(table)
