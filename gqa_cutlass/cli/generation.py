"""Commands that make, compile and pack kernels, and look after what they made."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from gqa_cutlass.checkout import need_checkout
from gqa_cutlass.cli.options import Archs, Jobs, Kernels, folder
from gqa_cutlass.cli.output import print_wide, progress, say

if TYPE_CHECKING:
    from gqa_cutlass.kernels.store import StoredKernel


def generate(
    out: Annotated[Path, folder("Folder to bring up to date.")] = Path("generated"),
) -> None:
    """Render every shipped kernel and the manifest, and the headers that the schema gives.

    Needs no GPU and no torch.
    """
    from gqa_cutlass.codegen.manifest import emit, generated_files
    from gqa_cutlass.codegen.manifest import generate as write

    for header in emit():
        say(f"templates/{header} changed")
    changed = write(out)
    say(f"{len(generated_files())} files in {out}, {len(changed)} changed")


def list_(kernels: Kernels = None) -> None:
    """List the shipped kernels with their launch bounds and their GPU evidence."""
    from gqa_cutlass.codegen import MergeConfig, select_any
    from gqa_cutlass.proof.evidence import Evidence

    evidence = Evidence.shipped()
    table = Table("kernel", "threads", "shared", "blocks/KV head", "GPU evidence")
    for config in select_any(kernels):
        blocks = "" if isinstance(config, MergeConfig) else str(config.head_blocks)
        table.add_row(
            config.name, str(config.num_threads), str(config.shared_bytes), blocks,
            evidence.describe(config),
        )  # fmt: skip
    print_wide(table)


def build(
    kernels: Kernels = None,
    arch: Archs = "sm_90a",
    out: Annotated[
        Path | None, folder("Folder for GQA_CUTLASS_KERNEL_DIR. Default: this user's store.")
    ] = None,
    jobs: Jobs = 0,
) -> None:
    """Compile kernels ahead of time, to cubins or (compute_80, compute_90) to PTX. Needs no GPU.

    Those whose schedule needs another architecture are left out.
    """
    from gqa_cutlass.codegen import select_any
    from gqa_cutlass.codegen.compile import compiles_for
    from gqa_cutlass.errors import ConfigError
    from gqa_cutlass.kernels.store import Store, build_all

    store = Store(root=out, private=False) if out else Store.default()
    archs = _archs(arch)
    picked = select_any(kernels)
    wanted = [(config, a) for a in archs for config in picked if compiles_for(config, a)]
    if not wanted:
        raise ConfigError(
            f"--arch: got {arch!r}, which none of these kernels is for; allowed: "
            f"{', '.join(dict.fromkeys(a for config in picked for a in config.archs))}"
        )
    built = []
    with progress() as bar:
        for stored in bar.track(build_all(store, wanted, jobs), total=len(wanted)):
            built.append(stored)
    print_wide(built_table(built))
    say(f"{sum(s.was_built for s in built)} of {len(built)} compiled, in {store.root}")


def export(
    out: Annotated[Path, folder("Folder to write.")],
    kernels: Kernels = None,
    arch: Archs = "sm_90a",
    jobs: Jobs = 0,
    dependent: Annotated[
        bool, typer.Option("--dependent", help="With a kernel of dependent launches for each.")
    ] = False,
) -> None:
    """Write a C library and a Rust crate with the kernels in them. Needs no GPU."""
    from gqa_cutlass.kernels.export import compiled, plan_export, write_bundle
    from gqa_cutlass.kernels.store import Store

    wanted = plan_export(kernels, _archs(arch), dependent)
    cubins = compiled(wanted, Store.default(), jobs)
    with progress() as bar:
        tracked = bar.track(cubins, total=len(wanted.wanted))
        files = write_bundle(out, wanted, tracked)
    names = ", ".join(a.name for a in wanted.archs)
    say(f"{len(files)} files in {out}: {len(wanted.kernels)} kernels for {names}")


def check() -> None:
    """Fail when what is generated has drifted from its source, or a kernel lacks GPU evidence."""
    from gqa_cutlass.codegen import carried
    from gqa_cutlass.codegen.manifest import drift, emitted_drift
    from gqa_cutlass.proof.evidence import Evidence

    root = need_checkout("check", "generated/ and the GPU evidence")
    evidence = Evidence.shipped()
    headers = emitted_drift()
    for name in headers:
        say(f"drift: templates/{name}; run `gqa-cutlass generate`")
    if headers:  # kernels are compared once what they include is right
        raise typer.Exit(1)
    wrong = drift(root / "generated")
    for name in wrong:
        say(f"drift: generated/{name}; run `gqa-cutlass generate`")
    unproven = evidence.missing(carried())
    for config in unproven:
        say(f"no current GPU evidence: {config.name}; run `make gpu-test` on a GPU")
    say(f"{len(wrong)} files drifted, {len(unproven)} kernels without GPU evidence")
    if wrong or unproven:
        raise typer.Exit(1)


def clean() -> None:
    """Remove this user's compiled kernels."""
    from gqa_cutlass.kernels.store import Store

    store = Store.default()
    say(f"{store.clean()} files removed from {store.root}")


def _archs(given: str) -> list[str]:
    """The targets that --arch names, each once."""
    from gqa_cutlass.codegen import ARCHES

    names = ARCHES if given == "all" else [entry.strip() for entry in given.split(",")]
    return list(dict.fromkeys(names))


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
