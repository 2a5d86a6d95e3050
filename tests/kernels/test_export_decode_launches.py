"""The C library launches like Python where lengths are about equal, and dependent launches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from c_and_python import Result, assert_same, restore, step_of
from c_build import as_dependents, kernels
from c_library import config_of, fresh_library, workspace_of
from c_simulator import Simulator, recorded
from cases import Step

import gqa_cutlass
from gqa_cutlass.call.record import LaunchRecord, parse
from gqa_cutlass.codegen import ARCHES
from gqa_cutlass.codegen.schema.launch import Pdl
from gqa_cutlass.dispatch import Dispatch

# Sizes, and when the next launch may start.
DEPENDENT: dict[str, tuple[dict[str, Any], Pdl]] = {
    "at once": (dict(lengths=[20], max_seq_len=40), Pdl.WHOLE),
    "at the end, in clusters": (
        dict(lengths=[20], max_seq_len=2**14, num_kv_heads=1, poison=False), Pdl.END,
    ),
    "no room beside it": (
        dict(lengths=[20] * 9, max_seq_len=40, num_kv_heads=8, poison=False), Pdl.WHOLE,
    ),
    "too large": (
        dict(lengths=[20], max_seq_len=2**16 + 1, num_kv_heads=1, poison=False), Pdl.NONE,
    ),
}  # fmt: skip


def explained(step: Step, **options: Any) -> Dispatch:
    """What Python would launch for a step."""
    return gqa_cutlass.explain(*step.tensors(), out=step.out, **options).dispatch


@pytest.mark.parametrize(("sizes", "next_starts"), DEPENDENT.values(), ids=DEPENDENT)
def test_dependent_launches_are_launched_as_in_python(
    sizes: dict[str, Any], next_starts: Pdl
) -> None:
    """And said so in the log."""
    step, library, lines = step_of(**sizes), fresh_library(), list[str]()
    library.log_to(lines)
    chosen = explained(step, ragged=False, dependent=True)
    assert chosen.pdl == next_starts
    config = config_of(step, workspace_of(chosen), dependent=1)
    assert library.decode(step, config) == "GQA_SUCCESS", library.error
    launched = library.driver.last_launch()
    assert (launched.kernel, launched.shape) == (chosen.config.name, chosen.shape)
    assert launched.argument["pdl"] == next_starts
    assert parse(lines[0])["dependent"] == str(next_starts is not Pdl.NONE)
    allowed = ARCHES["sm_90a"].shared_per_block if next_starts else chosen.config.shared_bytes
    assert library.driver.shared_bytes(chosen.config.name, 0) == allowed


def test_a_dependent_launch_decodes_like_python() -> None:
    step, lines = step_of(lengths=[20, 7], max_seq_len=40), list[str]()
    simulator = Simulator(fresh_library())
    simulator.library.log_to(lines)
    overflow, lse = torch.zeros(1, dtype=torch.int32), torch.zeros(step.q.shape[:2])
    plan = gqa_cutlass.plan(
        *step.tensors(), cache_seqlens=step.seqlens, out=step.out, softmax_scale=step.scale,
        dependent=True, return_lse=True,
    )  # fmt: skip
    with recorded() as launches:
        _, expected_lse = plan(*step.tensors(), step.seqlens, step.out)
    expected = Result.of(launches[-1], step, expected_lse)
    restore(step)
    launched = simulator.decode_ragged(step, overflow, lse=lse, dependent=1)
    assert launched.kernel.endswith("_pdl") and launched.shape.pdl
    assert_same(Result.of(launched, step, lse), expected)
    step.check_memory()
    expected_line = parse(f"launch {LaunchRecord.of(plan, step.seqlens, 0, 0)}")
    found = parse(lines[0])
    assert {key for key in found if found[key] != expected_line[key]} <= {"softmax_scale"}
    assert found["return_lse"] == found["dependent"] == "True"


def test_older_gpus_have_ordinary_launches() -> None:
    step, library = step_of(lengths=[20], max_seq_len=40), fresh_library()
    library.driver.set_device(0, 80, 108)
    assert library.decode(step, config_of(step, dependent=1)) == "GQA_SUCCESS", library.error
    launched = library.driver.last_launch()
    assert not launched.shape.pdl and not launched.kernel.endswith("_pdl")
    assert launched.argument["pdl"] == Pdl.NONE


def test_a_dependent_launch_without_a_kernel_is_unsupported_and_says_how_to_get_it() -> None:
    """The library has one of ordinary launches."""
    step, library = step_of(lengths=[3], max_seq_len=30, group_size=7), fresh_library()
    assert library.decode(step, config_of(step)) == "GQA_SUCCESS", library.error
    launched = library.driver.last_launch()
    assert as_dependents(k for k in kernels() if k.name == launched.kernel)[0] not in kernels()
    assert library.decode(step, config_of(step, dependent=1)) == "GQA_ERROR_UNSUPPORTED"
    assert "no kernel of dependent launches for float16, head_dim 128, 7 query" in library.error
    assert "Export one that has it: gqa-cutlass export --dependent --kernels ..." in library.error
    assert library.driver.launches == 1


def test_about_equal_lengths_are_launched_as_in_python() -> None:
    step, library = step_of(lengths=[700, 3], max_seq_len=4096, vec_width=4), fresh_library()
    flag, rows = torch.zeros(1, dtype=torch.int32), []
    for ragged in (True, False):
        chosen = explained(step, ragged=ragged)
        config = config_of(step, workspace_of(chosen), equal_lengths=int(not ragged))
        assert library.decode_ragged(step, flag, config) == "GQA_SUCCESS", library.error
        launched = library.driver.last_launch()
        assert (launched.kernel, launched.shape) == (chosen.config.name, chosen.shape)
        limit = step.k_cache.shape[1] if chosen.prefetch_first_tile else 0
        assert launched.argument["prefetch_limit"] == limit
        rows.append(launched.shape.grid[1])
    assert rows[0] > rows[1]
