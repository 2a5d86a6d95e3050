"""Commands that make sources, list what there is, and look after it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gqa_cutlass.checkout import need_checkout
from gqa_cutlass.cli.options import (
    DryRun,
    DTypes,
    Exclude,
    Json,
    Kernels,
    Model,
    Paged,
    Tp,
    folder,
)
from gqa_cutlass.cli.output import print_table, say, say_json
from gqa_cutlass.cli.picking import archs_of, asked_by, choose, for_archs, pick
from gqa_cutlass.cli.table import Column

_DEFAULT = Path("generated")
_LISTED = (
    Column(head="kernel"),
    Column(head="threads", number=True),
    Column(head="shared", unit="B", number=True),
    Column(head="blocks/KV head", number=True, keep=0),
    Column(head="GPU evidence"),
)
_MODELS = (
    Column(head="preset"),
    Column(head="query", unit="heads", number=True),
    Column(head="KV", unit="heads", number=True),
    Column(head="head_dim", number=True),
    Column(head="dtype", keep=1),
    Column(head="source"),
    Column(head="layers", keep=0),
)


def generate(
    out: Annotated[Path | None, folder("Folder to bring up to date. Default: generated.")] = None,
    kernels: Kernels = None,
    exclude: Exclude = None,
    model: Model = None,
    tp: Tp = None,
    dtype: DTypes = None,
    paged: Paged = False,
    arch: Annotated[
        str | None,
        typer.Option("--arch", help="Only kernels for these targets. Default: all."),
    ] = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Render kernels and a manifest: every shipped one, and the headers that the schema gives.

    Those of a model, or of a filter, go to a folder of their own. Needs no GPU and no torch.
    """
    from gqa_cutlass.codegen import Kernel
    from gqa_cutlass.codegen.manifest import emit, generated_files
    from gqa_cutlass.codegen.manifest import generate as write
    from gqa_cutlass.errors import InputError

    chosen = choose("generate", model, tp, dtype)
    picked: list[Kernel] | None = None
    headers: list[str] = []
    if chosen or kernels or exclude or arch or dtype or paged:
        if out is None and not dry_run:
            raise InputError(
                "generate: --out: got none, for some kernels; allowed: a folder of their own, for "
                f"{_DEFAULT} is that of all which are shipped."
            )
        picked = pick(
            "generate", model=chosen, dtype=dtype, kernels=kernels, exclude=exclude, paged=paged
        )
        if arch:
            wanted = for_archs(picked, archs_of(arch), arch)
            picked = list(dict.fromkeys(config for config, _ in wanted))
    folder_ = out or _DEFAULT
    if chosen and not as_json:
        chosen.show()
    if picked is None and not dry_run:
        headers = emit()
    files = sorted(generated_files(picked))
    changed = [] if dry_run else write(folder_, picked)
    if as_json:
        say_json({"out": str(folder_), "dry_run": dry_run, "headers": headers, "files": files,
                  "changed": changed})  # fmt: skip
        return
    for header in headers:
        say(f"templates/{header} changed")
    if dry_run:
        say("\n".join(files))
        where = folder_ if picked is None or out else "a folder that --out names"
        say(f"{len(files)} files for {where}; nothing was written")
    else:
        say(f"{len(files)} files in {folder_}, {len(changed)} changed")


def list_(kernels: Kernels = None, exclude: Exclude = None, as_json: Json = False) -> None:
    """List the shipped kernels with their launch bounds and their GPU evidence."""
    from gqa_cutlass.codegen import MergeConfig, select_any
    from gqa_cutlass.proof.evidence import Evidence

    evidence = Evidence.shipped()
    rows = [
        {
            "name": config.name, "archs": list(config.archs), "threads": config.num_threads,
            "shared_bytes": config.shared_bytes,
            "blocks_per_kv_head": None if isinstance(config, MergeConfig) else config.head_blocks,
            "evidence": evidence.describe(config),
        }
        for config in select_any(kernels, exclude)
    ]  # fmt: skip
    if as_json:
        say_json({"kernels": rows})
        return
    shown = ("name", "threads", "shared_bytes", "blocks_per_kv_head", "evidence")
    cells = [["" if row[key] is None else str(row[key]) for key in shown] for row in rows]
    print_table(_LISTED, cells)


def models(as_json: Json = False) -> None:
    """List the presets of --model, with the repositories that they were read from."""
    from gqa_cutlass.codegen.models import MODELS

    if as_json:
        rows = [
            {
                "name": m.name, "source": m.source, "num_q_heads": m.num_q_heads,
                "num_kv_heads": m.num_kv_heads, "head_dim": m.head_dim, "dtype": m.dtype,
                "window": m.window or None, "softcap": m.softcap or None, "sinks": m.sinks,
                "layer_types": [layers.name for layers in m.attention.layer_types],
            }
            for m in MODELS
        ]  # fmt: skip
        say_json({"models": rows})
        return
    cells = [
        [
            m.name, str(m.num_q_heads), str(m.num_kv_heads), str(m.head_dim), m.dtype, m.source,
            "; ".join(
                ", ".join((layers.name.removesuffix("_attention"), *asked_by(layers)))
                for layers in m.attention.layer_types
            ),
        ]
        for m in MODELS
    ]  # fmt: skip
    print_table(_MODELS, cells)


def check(as_json: Json = False) -> None:
    """Fail when what is generated has drifted from its source, or a kernel lacks GPU evidence."""
    from gqa_cutlass.codegen import carried
    from gqa_cutlass.codegen.manifest import drift, emitted_drift
    from gqa_cutlass.proof.evidence import Evidence

    root = need_checkout("check", "generated/ and the GPU evidence")
    evidence = Evidence.shipped()
    headers = emitted_drift()
    # Kernels are compared once what they include is right.
    wrong = [] if headers else drift(root / "generated")
    unproven = [] if headers else [config.name for config in evidence.missing(carried())]
    if as_json:
        say_json({"headers": headers, "drifted": wrong, "without_evidence": unproven})
    else:
        for name in headers:
            say(f"drift: templates/{name}; run `gqa-cutlass generate`")
        for name in wrong:
            say(f"drift: generated/{name}; run `gqa-cutlass generate`")
        for name in unproven:
            say(f"no current GPU evidence: {name}; run `make gpu-test` on a GPU")
        if not headers:
            say(f"{len(wrong)} files drifted, {len(unproven)} kernels without GPU evidence")
    if headers or wrong or unproven:
        raise typer.Exit(1)


def clean(as_json: Json = False) -> None:
    """Remove this user's compiled kernels."""
    from gqa_cutlass.kernels.store import Store

    store = Store.default()
    removed = store.clean()
    if as_json:
        say_json({"folder": str(store.root), "removed": removed})
    else:
        say(f"{removed} files removed from {store.root}")
