"""What the site's pages take from the code when it is built: the commands and the presets.

A page says where by a comment, `<!-- generated: commands -->`.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from gqa_cutlass.cli.picking import asked_by
from gqa_cutlass.codegen.models import MODELS

MARK = re.compile(r"^<!-- generated: (\w+) -->$", re.MULTILINE)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fill in what a page asks for."""
    return MARK.sub(lambda found: GENERATED[found[1]](), markdown)


def commands() -> str:
    """Every command with its options, from second-level headings on; by typer's own command."""
    program = ["gqa_cutlass.cli.application", "utils", "docs", "--name", "gqa-cutlass"]
    done = subprocess.run(
        [sys.executable, "-m", "typer", *program], capture_output=True, check=True, text=True
    )
    _, _, usage = done.stdout.partition("**Usage**")
    return f"**Usage**{usage}"


def presets() -> str:
    """The presets of `--model`, as a table."""
    heads = "preset", "query heads", "KV heads", "head_dim", "dtype", "layers attend with", "source"
    rows = [
        (
            f"`{m.name}`", m.num_q_heads, m.num_kv_heads, m.head_dim, m.dtype,
            "; ".join(
                f"{layers.name.removesuffix('_attention')}: {', '.join(asked)}"
                for layers in m.attention.layer_types
                if (asked := asked_by(layers))
            ),
            m.source,
        )
        for m in MODELS
    ]  # fmt: skip
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in lines)


GENERATED: dict[str, Callable[[], str]] = {"commands": commands, "presets": presets}
