"""Configuration to source text. Pure: the same configuration always gives the same bytes."""

from __future__ import annotations

import hashlib
from functools import cache
from importlib import resources
from importlib.resources.abc import Traversable

from jinja2 import Environment, PackageLoader, StrictUndefined

from gqa_cutlass.codegen.config import DType, KernelConfig, Math, Schedule

_TEMPLATE = "decode.cu.jinja"
_ELEMENT = {DType.F16: "cutlass::half_t", DType.BF16: "cutlass::bfloat16_t"}
_SCHEDULE = {
    Schedule.MULTISTAGE: "gqa::Schedule::kMultistage",
    Schedule.TMA: "gqa::Schedule::kTma",
}
_MATH = {Math.TENSOROP: "gqa::Math::kTensorOp", Math.SIMT: "gqa::Math::kSimt"}


@cache
def render(config: KernelConfig) -> str:
    """Render the source of one kernel: its traits spelled out and its entry point."""
    template = environment().get_template(_TEMPLATE)
    return template.render(
        config=config,
        element=_ELEMENT[config.dtype],
        math=_MATH[config.math],
        schedule=_SCHEDULE[config.schedule],
        template=_TEMPLATE,
    )


@cache
def source_digest(config: KernelConfig) -> str:
    """Digest of everything of ours that a kernel is compiled from: rendered text and headers."""
    return hashlib.sha256((render(config) + _headers_digest()).encode()).hexdigest()[:16]


def include_dir() -> Traversable:
    """The folder that holds our own headers, `gqa/*.cuh`."""
    return resources.files("gqa_cutlass.templates") / "include"


@cache
def _headers_digest() -> str:
    digest = hashlib.sha256()
    for header in sorted((include_dir() / "gqa").iterdir(), key=lambda entry: entry.name):
        digest.update(header.name.encode() + b"\0" + header.read_bytes() + b"\0")
    return digest.hexdigest()


@cache
def environment() -> Environment:
    """Where every template is rendered."""
    return Environment(
        loader=PackageLoader("gqa_cutlass.templates", package_path=""),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
