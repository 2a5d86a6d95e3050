"""Commands that compile kernels and pack them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gqa_cutlass.cli.options import (
    Archs,
    DryRun,
    DTypes,
    Exclude,
    Jobs,
    Json,
    Kernels,
    Model,
    Paged,
    Tp,
    folder,
)
from gqa_cutlass.cli.output import note, print_table, progress, say, say_json
from gqa_cutlass.cli.picking import archs_of, choose, dtypes_of, for_archs, pick
from gqa_cutlass.cli.table import Column

if TYPE_CHECKING:
    from gqa_cutlass.codegen import Kernel
    from gqa_cutlass.kernels.export import Cubin
    from gqa_cutlass.kernels.facts import KernelFacts
    from gqa_cutlass.kernels.store import Store

REPORT = "report.json"
_COLUMNS = (
    Column(head="kernel"),
    Column(head="arch"),
    Column(head="config", keep=0),
    Column(head="registers", number=True),
    Column(head="spills", unit="B", number=True),
    Column(head="shared", unit="B", number=True),
    Column(head="occupancy", unit="%", number=True),
    Column(head="in flight", unit="KiB", number=True, keep=3),
    Column(head="cubin", unit="KiB", number=True, keep=4),
    Column(head="seconds", number=True, keep=1),
    Column(head="state"),
)


def build(
    kernels: Kernels = None,
    exclude: Exclude = None,
    model: Model = None,
    tp: Tp = None,
    dtype: DTypes = None,
    paged: Paged = False,
    arch: Archs = "sm_90a",
    out: Annotated[
        Path | None,
        folder("Folder for GQA_CUTLASS_KERNEL_DIR, with report.json. Default: this user's store."),
    ] = None,
    jobs: Jobs = 0,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Compile kernels ahead of time, to cubins or (compute_80, compute_90) to PTX. Needs no GPU.

    Those whose schedule needs another architecture are left out. One that the compiler rejects does
    not keep the others from being built; the status is 1 then.
    """
    from gqa_cutlass.kernels.store import Store

    chosen = choose("build", model, tp, dtype)
    picked = pick("build", model=chosen, dtype=dtype, kernels=kernels, exclude=exclude, paged=paged)
    wanted = for_archs(picked, archs_of(arch), arch)
    store = Store(root=out, private=False) if out else Store.default()
    if chosen and not as_json:
        chosen.show()
    _bring(store, wanted, jobs, dry_run=dry_run, as_json=as_json, out=out)


def warmup(
    model: Model = None,
    tp: Tp = None,
    dtype: DTypes = None,
    paged: Paged = False,
    kernels: Kernels = None,
    exclude: Exclude = None,
    arch: Annotated[
        str | None,
        typer.Option(
            "--arch",
            help="Comma-separated targets, or `all`. Default: the GPU's; without one, what ptxsim "
            "runs.",
        ),
    ] = None,
    jobs: Jobs = 0,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Compile kernels into this user's store, so that first calls on this machine need not."""
    from gqa_cutlass.kernels.store import Store

    chosen = choose("warmup", model, tp, dtype)
    picked = pick(
        "warmup", model=chosen, dtype=dtype, kernels=kernels, exclude=exclude, paged=paged
    )
    target = arch or _arch_here()
    if target is None:
        wanted = [(config, config.ptx_arch) for config in picked]
    else:
        wanted = for_archs(picked, archs_of(target), target)
    if chosen and not as_json:
        chosen.show()
    _bring(Store.default(), wanted, jobs, dry_run=dry_run, as_json=as_json, out=None)


def export(
    out: Annotated[Path, folder("Folder to write.")],
    kernels: Kernels = None,
    exclude: Exclude = None,
    model: Model = None,
    tp: Tp = None,
    dtype: DTypes = None,
    paged: Paged = False,
    arch: Archs = "sm_90a",
    jobs: Jobs = 0,
    dependent: Annotated[
        bool, typer.Option("--dependent", help="With a kernel of dependent launches for each.")
    ] = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Write a C library and a Rust crate with the kernels in them. Needs no GPU."""
    from gqa_cutlass.codegen import shipped
    from gqa_cutlass.errors import InputError
    from gqa_cutlass.kernels.export import compiled, plan_export, write_bundle
    from gqa_cutlass.kernels.store import Store

    chosen = choose("export", model, tp, dtype)
    pool = None
    if chosen:
        pool = chosen.kernels(paged=paged)
    elif paged:
        raise InputError("--paged: got no model; name one with --model, or kernels with --kernels.")
    elif types := dtypes_of("export", dtype):
        pool = [config for config in shipped() if config.dtype in types]
    plan = plan_export(kernels, archs_of(arch), dependent, exclude, pool)
    if chosen and not as_json:
        chosen.show()
    store = Store.default()
    if dry_run:
        _show_plan(store, plan.wanted, as_json)
        return
    with progress(len(plan.wanted)) as step:

        def followed() -> Iterator[Cubin]:
            for config, target, code in compiled(plan, store, jobs):
                step(f"{config.name} {target}")
                yield config, target, code

        files = write_bundle(out, plan, followed())
    names = [a.name for a in plan.archs]
    if as_json:
        say_json(
            {"out": str(out), "files": len(files), "archs": names,
             "kernels": [config.name for config in plan.kernels]}
        )  # fmt: skip
    else:
        say(f"{len(files)} files in {out}: {len(plan.kernels)} kernels for {', '.join(names)}")


def print_kernels(facts: Sequence[KernelFacts]) -> None:
    """Print a table of kernels for their targets."""
    print_table(_COLUMNS, [_cells(each) for each in facts])


def _bring(
    store: Store, wanted: list[tuple[Kernel, str]], jobs: int, *, dry_run: bool, as_json: bool,
    out: Path | None,
) -> None:  # fmt: skip
    """Bring kernels into a store and say what came of it."""
    from gqa_cutlass.kernels import facts as known
    from gqa_cutlass.kernels.store import build_each

    if dry_run:
        _show_plan(store, wanted, as_json)
        return
    facts: list[KernelFacts] = []
    with progress(len(wanted)) as step:
        for result in build_each(store, wanted, jobs):
            facts.append(known.of_result(result))
            step(f"{facts[-1].name} {facts[-1].arch}", facts[-1].state)
    failed = [each for each in facts if each.state == known.FAILED]
    if as_json:
        say_json({"folder": str(store.root), "failed": len(failed), "kernels": _rows(facts)})
    else:
        print_kernels(facts)
        count = sum(each.state == known.COMPILED for each in facts)
        say(f"{count} of {len(facts)} compiled, in {store.root}")
    if out:
        _write_report(out, facts)
    for each in failed:
        note(f"gqa-cutlass: {each.name} for {each.arch} failed: {_first_error(each.error or '')}")
    if failed:
        raise typer.Exit(1)


def _show_plan(store: Store, wanted: Sequence[tuple[Kernel, str]], as_json: bool) -> None:
    """Say what would be built."""
    from gqa_cutlass.kernels import facts as known

    facts = [known.planned(config, arch, store.find(config, arch)) for config, arch in wanted]
    if as_json:
        say_json({"folder": str(store.root), "dry_run": True, "kernels": _rows(facts)})
        return
    print_kernels(facts)
    count = sum(each.state == known.PLANNED for each in facts)
    say(f"{count} of {len(facts)} to compile, in {store.root}; nothing was written")


def _write_report(out: Path, facts: Sequence[KernelFacts]) -> None:
    import json

    from gqa_cutlass.codegen.compile import compiler_version
    from gqa_cutlass.codegen.files import read_json, update, writing
    from gqa_cutlass.errors import InputError
    from gqa_cutlass.kernels.facts import report
    from gqa_cutlass.version import __version__

    earlier: object = None
    with suppress(InputError):  # there is none
        earlier = read_json("build", out / REPORT, "a report")
    with writing("build: --out", out):
        names = (path.name.split(".") for path in out.glob("*.*.json"))
        content = report(
            facts, version=__version__, compiler=compiler_version(), earlier=earlier,
            there={(name, arch) for name, arch, *_ in names},
        )  # fmt: skip
        update(out, {REPORT: json.dumps(content, indent=1) + "\n"})


def _arch_here() -> str | None:
    """The target of this machine's GPU; None where there is none."""
    from gqa_cutlass.errors import DeviceError
    from gqa_cutlass.gpu.driver import describe_device, driver_version

    try:
        driver_version()
    except DeviceError:
        return None
    return describe_device(0).arch.name


def _rows(facts: Sequence[KernelFacts]) -> list[dict[str, object]]:
    return [asdict(each) for each in facts]


def _cells(facts: KernelFacts) -> list[str]:
    f = facts
    return [
        f.name, f.arch, f.config, _text(f.registers), _text(f.spill_bytes), _text(f.shared_bytes),
        "-" if f.occupancy is None else f"{100 * f.occupancy:.0f}",
        _kib(f.bytes_in_flight), _kib(f.code_bytes),
        "-" if f.seconds is None else f"{f.seconds:.2f}", f.state,
    ]  # fmt: skip


def _text(value: object) -> str:
    return "-" if value is None else str(value)


def _kib(size: int | None) -> str:
    return "-" if size is None else f"{size / 1024:.1f}"


def _first_error(log: str) -> str:
    """The line of a compiler's log that says what was wrong."""
    lines = log.splitlines() or [""]
    return next((line for line in lines[1:] if "error" in line), lines[0]).strip()
