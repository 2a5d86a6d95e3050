"""The C library decodes with features like Python."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from c_and_python import (
    TMA_128,
    WIDE_64,
    Result,
    assert_same,
    capacity_for,
    chosen_for,
    featured_by_python,
    restore,
    step_for,
)
from c_build import build, write_dummies
from c_library import NUMBERS, config_of, fresh_copy, fresh_library, workspace_of
from c_simulator import Simulator
from cases import Step
from helpers import every

import gqa_cutlass
from gqa_cutlass.call.record import LaunchRecord, parse
from gqa_cutlass.codegen import DType, KernelConfig, Math, Schedule, default_config
from gqa_cutlass.codegen.schema.policies import FEATURES, special, tagged
from gqa_cutlass.codegen.schema.slots import ELEMENT, NORM, QUERIES, ROTARY

# What steps ask for: nothing is done to their rows, and they have one token. Caches have one type.
OF_STEPS = tuple(
    policy for policy in FEATURES if policy.slot not in (QUERIES, NORM, ROTARY, ELEMENT)
)
# Each feature alone, and pairs as Gemma 2 and gpt-oss have them; pages with an index of rows, and
# in clusters; all together in clusters.
FEATURED = {
    "_".join((*(policy.tag for policy in kernel.policies), *["tma"] * kernel.tma)): kernel
    for kernel in (
        *(replace(WIDE_64, policies=(policy,)) for policy in OF_STEPS),
        default_config(Math.TENSOROP, DType.BF16, 128, 2, 8, policies=tagged("win_cap")),
        default_config(Math.TENSOROP, DType.BF16, 64, 8, 8, policies=tagged("win_sink")),
        replace(WIDE_64, policies=tagged("idx_paged")),
        replace(TMA_128, policies=tagged("paged")),
        *(
            default_config(Math.TENSOROP, DType.F16, 64, 4, 8, policies=tagged(tag))
            for tag in ("e4m3", "e5m2", "paged_e5m2")
        ),
        default_config(Math.TENSOROP, DType.BF16, 128, 4, 8, Schedule.TMA, tagged("e4m3")),
        default_config(Math.TENSOROP, DType.F16, 192, 4, 8, Schedule.TMA, tagged("paged_e5m2")),
        default_config(
            Math.TENSOROP, DType.BF16, 64, 4, 8, Schedule.TMA, policies=special(OF_STEPS)
        ),
        default_config(
            Math.TENSOROP, DType.BF16, 64, 4, 8, policies=special((*OF_STEPS, *tagged("e4m3")))
        ),
    )
}
WITHOUT_ONE_LENGTH = {"cache_batch_idx", "block_table"}


@pytest.fixture(scope="module")
def with_features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library of kernels with features."""
    folder = tmp_path_factory.mktemp("features")
    bundle = write_dummies(folder, FEATURED.values(), ("sm_80", "sm_90a"))
    return build(bundle, folder / "libgqa.so")


@pytest.mark.parametrize("kernel", every(2, FEATURED.values()), ids=FEATURED)
def test_features_decode_like_python(with_features: Path, kernel: KernelConfig) -> None:
    """With one length for all where that is possible, and with lengths on the device."""
    capacity, features = capacity_for(kernel), {policy.feature for policy in kernel.policies}
    length = capacity - 1 if kernel.tma else capacity // 2
    step = step_for(kernel, batch=2, length=length)
    if "block_table" in features and not kernel.tma:
        step.into_pages(3)  # which are of 16 with tma
    step.asking_for_all(kernel.policies)
    if "window_size" in features and kernel.tma:
        step.window_size = (capacity - 3, 0)  # a smaller one is for one block
    overflow = torch.zeros(1, dtype=torch.int32)
    simulator = Simulator(fresh_copy(with_features))
    for ragged in (True,) if features & WITHOUT_ONE_LENGTH else (False, True):
        workspace = workspace_of(chosen_for(step, ragged=ragged))
        if ragged:
            expected = featured_by_python(step, step.seqlens)
            launched = simulator.decode_ragged(step, overflow, workspace)
        else:
            expected = featured_by_python(step, step.lengths[0])
            launched = simulator.decode(step, workspace)
        assert launched.kernel == kernel.name
        assert_same(Result.of(launched, step), expected)
        step.check_memory()
        assert step.errors(step.out).share <= 1
        assert overflow.item() == 0
        restore(step)


def test_features_are_logged_as_in_python(with_features: Path) -> None:
    for tags in ("win_cap", "sink", "alibi", "pad", "paged"):
        kernel, lines = FEATURED[tags], list[str]()
        step = step_for(kernel, batch=2, length=20).asking_for_all(kernel.policies)
        library = fresh_copy(with_features)
        library.log_to(lines)
        lengths = step.seqlens if tags == "paged" else 20
        if tags == "paged":
            status = library.decode_ragged(step, torch.zeros(1, dtype=torch.int32), config_of(step))
        else:
            status = library.decode(step, config_of(step))
        assert status == "GQA_SUCCESS", library.error
        plan = gqa_cutlass.plan(
            *step.tensors(), cache_seqlens=lengths, out=step.out, softmax_scale=step.scale,
            **step.features(),
        )  # fmt: skip
        expected, found = parse(f"launch {LaunchRecord.of(plan, lengths, 0, 0)}"), parse(lines[0])
        assert float(found.pop("softmax_scale")) == pytest.approx(step.scale, rel=1e-7)
        assert found | {"softmax_scale": expected["softmax_scale"]} == expected
        assert list(found) == [key for key in expected if key != "softmax_scale"]


@pytest.mark.parametrize("kind", NUMBERS)
def test_sinks_of_every_type_decode_like_python(with_features: Path, kind: torch.dtype) -> None:
    step = step_for(FEATURED["sink"], batch=1, length=20).asking_for_all(FEATURED["sink"].policies)
    assert step.sinks is not None
    step.sinks = step.sinks.to(kind)
    expected = featured_by_python(step, 20)
    launched = Simulator(fresh_copy(with_features)).decode(step)
    assert_same(Result.of(launched, step), expected)


def test_an_index_that_names_no_row_spoils_its_sequence_alone(with_features: Path) -> None:
    kernel = FEATURED["idx"]
    step = step_for(kernel, batch=2, length=20).asking_for_all(kernel.policies)
    assert step.cache_batch_idx is not None
    step.cache_batch_idx[1] = step.k_cache.shape[0]
    overflow = torch.zeros(1, dtype=torch.int32)
    expected = featured_by_python(step, step.seqlens)
    launched = Simulator(fresh_copy(with_features)).decode_ragged(step, overflow)
    assert_same(Result.of(launched, step), expected)
    assert overflow.item() == 1 + 1
    assert step.out[1].isnan().all() and not step.out[0].isnan().any()


def paged_step(page_size: int) -> Step:
    """Of two sequences, in pages."""
    step = step_for(FEATURED["paged"], batch=2, length=20)
    step.into_pages(page_size)
    return step


@pytest.mark.parametrize("page_size", [1, 3, 16, 41])
def test_a_page_that_pools_do_not_have_spoils_its_sequence_alone(
    with_features: Path, page_size: int
) -> None:
    step, overflow = paged_step(page_size), torch.zeros(1, dtype=torch.int32)
    assert step.block_table is not None
    step.block_table[1, 20 // page_size] = step.k_cache.shape[0]
    expected = featured_by_python(step, step.seqlens)
    launched = Simulator(fresh_copy(with_features)).decode_ragged(step, overflow)
    assert_same(Result.of(launched, step), expected)
    step.check_memory(rejected=(1,))
    assert overflow.item() == 1 + 1
    assert step.out[1].isnan().all() and not step.out[0].isnan().any()


def test_new_tokens_go_to_slots_like_in_python(with_features: Path) -> None:
    """Where the table says, nowhere, and to another page than the table's, which has none."""
    step, overflow = paged_step(4), torch.zeros(1, dtype=torch.int32)
    assert step.block_table is not None and step.v is not None
    (page, at), (free, _) = step.place(0, 20), step.place(1, 20)
    step.block_table[1, 20 // 4] = -1
    for slot in (-1, 4 * free + 1):
        step.slot_mapping = torch.tensor([4 * page + at, slot])
        expected = featured_by_python(step, step.seqlens)
        launched = Simulator(fresh_copy(with_features)).decode_ragged(step, overflow)
        assert launched.argument["slot_mapping"] == step.slot_mapping.data_ptr()
        assert_same(Result.of(launched, step), expected)
        assert torch.equal(step.v_cache[page, at], step.v[0])
        assert torch.equal(step.v_cache[free, 1], step.v[1]) == (slot >= 0)
        assert not step.out.isnan().any() and overflow.item() == 0
        restore(step)


def test_a_window_that_hides_nothing_decodes_like_python() -> None:
    """By the plain kernel."""
    step = step_for(WIDE_64, batch=1, length=20)
    for left in (step.k_cache.shape[1] - 1, 2**30 - 1):
        step.window_size = (left, 0)
        expected = featured_by_python(step, 20)
        launched = Simulator(fresh_library()).decode(step)
        assert launched.kernel == WIDE_64.name
        assert_same(Result.of(launched, step), expected)
        restore(step)
