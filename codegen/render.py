"""Configuration to source text. Pure: the same configuration always gives the same bytes."""

from __future__ import annotations

import re
from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined

from gqa_cutlass.codegen.config import KernelConfig
from gqa_cutlass.codegen.headers import code_of, our_headers
from gqa_cutlass.codegen.merge import Kernel, MergeConfig
from gqa_cutlass.codegen.schema.emit import check_emitted
from gqa_cutlass.codegen.schema.kinds import DType, Math, Schedule
from gqa_cutlass.codegen.schema.policies import Policy, in_every_slot
from gqa_cutlass.errors import ConfigError

_DECODE, _MERGE = "decode.cu.jinja", "merge.cu.jinja"
_ELEMENT = {DType.F16: "cutlass::half_t", DType.BF16: "cutlass::bfloat16_t"}
_SCHEDULE = {
    Schedule.MULTISTAGE: "gqa::Schedule::kMultistage",
    Schedule.TMA: "gqa::Schedule::kTma",
}
_MATH = {Math.TENSOROP: "gqa::Math::kTensorOp", Math.SIMT: "gqa::Math::kSimt"}


@cache
def render(config: Kernel) -> str:
    """Render the source of one kernel: its traits spelled out and its entry point.

    Raises:
        ConfigError: A header is not what the schema says.
    """
    return _merge(config) if isinstance(config, MergeConfig) else _decode(config)


def _merge(config: MergeConfig) -> str:
    _check_params("gqa/merge/merge_params.cuh")
    return environment().get_template(_MERGE).render(config=config, template=_MERGE)


def _decode(config: KernelConfig) -> str:
    _check_params("gqa/params.cuh")
    policies = in_every_slot(config.policies)
    for policy in policies:
        _check_policy(policy)
    return (
        environment()
        .get_template(_DECODE)
        .render(
            config=config,
            element=_ELEMENT[config.dtype],
            math=_MATH[config.math],
            schedule=_SCHEDULE[config.schedule],
            policies=policies,
            template=_DECODE,
        )
    )


@cache
def _check_params(header: str) -> None:
    check_emitted(f"include/{header}", our_headers().text(header))


@cache
def _check_policy(policy: Policy) -> None:
    check_contract(policy, our_headers().text(f"gqa/{policy.header}"))


def check_contract(policy: Policy, header: str) -> None:
    """Compare a policy's header with what its slot asks for.

    Args:
        policy: The policy.
        header: The text.

    Raises:
        ConfigError: The struct, or something in it, is missing; the message names it.
    """
    body = re.search(rf"^struct {policy.cpp}\b.*?^}};", header, re.MULTILINE | re.DOTALL)
    missing = [
        name
        for name in policy.slot.contract
        if body is None
        or not re.search(rf"(?<!\w){re.escape(name)}\(|(struct|using) {re.escape(name)}\b", body[0])
    ]
    if missing:
        what = f"{policy.cpp} without {', '.join(missing)}" if body else f"no struct {policy.cpp}"
        raise ConfigError(
            f"{policy.header}: got {what}; the slot {policy.slot.alias} asks for "
            f"{', '.join(policy.slot.contract)}, as policy/slots.cuh says. No kernel was generated."
        )


@cache
def source_digest(config: Kernel) -> str:
    """Digest of all of ours that a kernel is compiled from: rendered text, headers it includes."""
    return our_headers().digest(render(config))


@cache
def code_digest(config: Kernel) -> str:
    """The same without comments and layout: what is true of a kernel's machine code stays so."""
    return our_headers().digest(render(config), code_of)


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
