"""What is in generated/: one source per shipped kernel, and a manifest that describes them."""

from __future__ import annotations

import json
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

from gqa_cutlass.codegen.config import KernelConfig
from gqa_cutlass.codegen.render import render, source_digest
from gqa_cutlass.codegen.variants import shipped

MANIFEST = "manifest.json"


def generated_files() -> dict[str, str]:
    """Name and content of every file that belongs in generated/."""
    files = {f"{config.name}.cu": render(config) for config in shipped()}
    files[MANIFEST] = json.dumps({"kernels": [entry(c) for c in shipped()]}, indent=1) + "\n"
    return files


def entry(config: KernelConfig) -> dict[str, object]:
    """One kernel as the manifest lists it; `symbol` is the entry point's name in the cubin."""
    return {
        "name": config.name,
        "symbol": config.name,
        "math": config.math.value,
        "dtype": config.dtype.value,
        "head_dim": config.head_dim,
        "group_size": config.group_size,
        "vec_width": config.vec_width,
        "block_h": config.block_h,
        "block_n": config.block_n,
        "num_stages": config.num_stages,
        "threads": config.num_threads,
        "shared_bytes": config.shared_bytes,
        "blocks_per_kv_head": config.head_blocks,
        "source_digest": source_digest(config),
    }


def generate(out: Path) -> list[str]:
    """Bring a folder up to date; returns the names of the files that changed.

    Files of kernels that are no longer shipped are removed; what the generator did not write (an
    `__init__.py`, say) is left alone.
    """
    out.mkdir(parents=True, exist_ok=True)
    files = generated_files()
    changed = [name for name, text in files.items() if _write_if_different(out / name, text)]
    for stale in sorted(set(path.name for path in out.glob("*.cu")) - set(files)):
        (out / stale).unlink()
        changed.append(stale)
    return changed


def drift(out: Traversable | None = None) -> list[str]:
    """Names of files in generated/ that differ from the templates' output, are missing or stale."""
    folder = resources.files("gqa_cutlass.generated") if out is None else out
    present = {e.name: e for e in folder.iterdir() if e.name.endswith((".cu", ".json"))}
    expected = generated_files()
    wrong = [
        name
        for name, text in expected.items()
        if name not in present or present[name].read_text(encoding="utf-8") != text
    ]
    return wrong + sorted(set(present) - set(expected))


def _write_if_different(path: Path, text: str) -> bool:
    if path.exists() and path.read_text(encoding="utf-8") == text:
        return False
    path.write_text(text, encoding="utf-8")
    return True
