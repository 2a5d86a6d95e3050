"""Policies: one per slot, in headers that keep the slots' contracts, spelled out in a source."""

from __future__ import annotations

import pickle
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from gqa_cutlass.codegen import DType, KernelConfig, Math, Schedule, default_config, render
from gqa_cutlass.codegen.headers import Headers, include_dir, our_headers
from gqa_cutlass.codegen.render import check_contract
from gqa_cutlass.codegen.schema.params import PARAMS
from gqa_cutlass.codegen.schema.policies import DEFAULTS, E4M3_OF_TOKENS, POLICIES, Policy
from gqa_cutlass.codegen.schema.slots import LOGIT, SLOTS, Slot
from gqa_cutlass.errors import ConfigError

CONFIG = default_config(Math.TENSOROP, DType.F16, 128, 4, 8)
CUBIC = Policy(slot=LOGIT, tag="cubic", cpp="Cubic", header="policy/logit_cubic.cuh")
PROMISES = [(slot, name) for slot in SLOTS for name in slot.contract]


@pytest.fixture
def include(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Another include folder, which kernels are rendered for meanwhile."""
    folder = tmp_path / "include"
    shutil.copytree(str(include_dir()), folder)
    module = sys.modules["gqa_cutlass.codegen.render"]
    monkeypatch.setattr(module, "our_headers", lambda: Headers(folder))
    yield folder
    module._check_policy.cache_clear()


def header_of(policy: Policy) -> str:
    return our_headers().text(f"gqa/{policy.header}")


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_headers_keep_their_contracts(policy: Policy) -> None:
    check_contract(policy, header_of(policy))


@pytest.mark.parametrize(("slot", "name"), PROMISES, ids=[f"{s.alias}-{n}" for s, n in PROMISES])
def test_a_header_without_part_of_its_contract_is_named(slot: Slot, name: str) -> None:
    policy = DEFAULTS[slot]
    text = re.sub(rf"(?<!\w){re.escape(name)}(?=\(| \{{| =)", "other", header_of(policy))
    wanted = rf"{policy.header}: got {policy.cpp} without {re.escape(name)}; the slot {slot.alias}"
    with pytest.raises(ConfigError, match=wanted):
        check_contract(policy, text)


def test_a_header_without_its_struct_is_named() -> None:
    text = header_of(DEFAULTS[LOGIT]).replace("struct Scaled", "struct Other")
    with pytest.raises(ConfigError, match=r"logit_scaled\.cuh: got no struct Scaled; the slot"):
        check_contract(DEFAULTS[LOGIT], text)


def test_no_kernel_is_rendered_with_a_policy_that_lacks_its_contract(include: Path) -> None:
    config = replace(CONFIG, policies=(CUBIC,))
    with pytest.raises(ConfigError, match=r"got gqa/policy/logit_cubic\.cuh"):
        render(config)
    header = include / "gqa" / CUBIC.header
    header.write_text("struct Cubic {\n  int slope;\n};\n")
    with pytest.raises(ConfigError, match=r"got Cubic without operator\(\); the slot Logit"):
        render(config)
    header.write_text("struct Cubic {\n  float operator()(float, int, Position) const;\n};\n")
    assert "using Logit = gqa::Cubic<T>;" in render(config)


def test_two_policies_for_one_slot_are_refused() -> None:
    other = Policy(slot=LOGIT, tag="sqrt", cpp="Root", header="policy/logit_root.cuh")
    with pytest.raises(ConfigError, match="got Cubic and Root for the slot Logit; allowed: one"):
        replace(CONFIG, policies=(CUBIC, other))
    with pytest.raises(ConfigError, match="got Scaled and Cubic for the slot Logit"):
        replace(CONFIG, policies=(DEFAULTS[LOGIT], CUBIC))


def test_what_is_no_policy_is_refused() -> None:
    with pytest.raises(ConfigError, match="policies: got 'cap'; allowed: objects of"):
        replace(CONFIG, policies=("cap",))  # type: ignore[arg-type]


def test_a_policy_that_a_schedule_lacks_is_refused() -> None:
    walked = replace(CUBIC, schedules=frozenset({Schedule.MULTISTAGE}))
    assert replace(CONFIG, policies=(walked,)).policies == (walked,)
    with pytest.raises(ConfigError, match="schedule: got .*tma.*; allowed: multistage with Cubic"):
        default_config(Math.TENSOROP, DType.F16, 128, 4, 8, Schedule.TMA, (walked,))


def test_defaults_are_the_same_whether_they_are_said_or_not() -> None:
    said = replace(CONFIG, policies=tuple(DEFAULTS.values()))
    assert said == CONFIG and said.policies == ()


def test_a_source_spells_out_every_slot() -> None:
    text = render(CONFIG)
    for slot in SLOTS:
        assert f"template <class T> using {slot.alias} = gqa::{DEFAULTS[slot].cpp}<T>;" in text
        assert f"#include <gqa/{DEFAULTS[slot].header}>" in text


@pytest.mark.parametrize("schedule", Schedule)
def test_a_source_includes_what_a_policy_has_for_its_schedule(schedule: Schedule) -> None:
    config = default_config(Math.TENSOROP, DType.F16, 64, 4, 8, schedule, (E4M3_OF_TOKENS,))
    included = our_headers().closure(render(config))
    assert f"gqa/{E4M3_OF_TOKENS.header}" in included
    for other, header in E4M3_OF_TOKENS.parts:
        assert (f"gqa/{header}" in included) == (other is schedule)


def test_names_tell_policies_apart() -> None:
    config = replace(CONFIG, policies=(CUBIC,))
    assert config.name == f"{CONFIG.name}_cubic" and config != CONFIG
    assert replace(config, pdl=True).name.endswith("s1_cubic_pdl")
    with pytest.raises(ConfigError, match="kernel name: got the tag 'cubic'; allowed: "):
        KernelConfig.from_name(config.name)  # which is not among ours


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_policies_are_themselves_in_another_process(policy: Policy) -> None:
    assert pickle.loads(pickle.dumps(policy)) is policy


@pytest.mark.parametrize("policy", [p for p in POLICIES if p.tag], ids=repr)
def test_what_a_policy_reads_is_part_of_the_kernels_argument(policy: Policy) -> None:
    assert set(policy.fields) <= set(PARAMS.fields)
    assert {f.feature for f in policy.fields} <= {policy.feature}
