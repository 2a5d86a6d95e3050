"""Which kernels ship, and picking kernels from them."""

from __future__ import annotations

from collections import Counter

import pytest

from gqa_cutlass.codegen import (
    ARCHES,
    DType,
    Math,
    Schedule,
    default_config,
    shipped,
)
from gqa_cutlass.codegen.models import MODELS, Model
from gqa_cutlass.codegen.schema.policies import named
from gqa_cutlass.codegen.schema.slots import QUERIES
from gqa_cutlass.codegen.variants import PROOFS, policies_of

SHIPPED = set(shipped())


@pytest.mark.parametrize("dtype", DType)
@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_kernels_ship_for_every_model(model: Model, dtype: DType) -> None:
    assert {
        default_config(
            Math.TENSOROP, dtype, model.head_dim, model.group_size, 8, schedule, policies
        )
        for schedule in Schedule
        for policies in policies_of(model)
    } <= SHIPPED


def test_every_kernel_ships_for_a_model_or_says_why() -> None:
    models = {(m.head_dim, None, m.group_size, 8, each) for m in MODELS for each in policies_of(m)}
    proofs = [(d, v, group, w, each) for _, d, v, group, widths, each in PROOFS for w in widths]
    assert models.isdisjoint(proofs) and len(set(proofs)) == len(proofs)
    assert all(why for why, *_ in PROOFS)
    shapes = {(c.head_dim, c.head_dim_v, c.group_size, c.vec_width, c.policies) for c in SHIPPED}
    assert shapes == models.union(proofs)


def test_models_with_features_have_kernels_with_them() -> None:
    win, cap, sink = (named(name) for name in ("SlidingWindow", "SoftCapped", "SinkInSum"))
    expected = {
        "llama3-8b": {()}, "mistral-7b-v0.1": {(win,), ()}, "gemma3-27b": {(win,), ()},
        "gemma2-9b": {(win, cap), (cap,)}, "gpt-oss-20b": {(win, sink), (sink,)},
    }  # fmt: skip
    found = {model.name: set(policies_of(model)) for model in MODELS}
    assert {name: found[name] for name in expected} == expected
    proofs = {(d, group, each) for _, d, _, group, _, each in PROOFS if each}
    with_features = {(c.head_dim, c.group_size, c.policies) for c in SHIPPED if c.policies} - proofs
    assert with_features == {
        (128, 4, (win,)), (256, 4, (win,)), (256, 2, (win,)), (128, 2, (win,)),
        (256, 2, (win, cap)), (256, 2, (cap,)), (128, 2, (win, cap)), (128, 2, (cap,)),
        (64, 8, (win, sink)), (64, 8, (sink,)),
    }  # fmt: skip


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_models_are_what_attention_can_be(model: Model) -> None:
    assert model.num_q_heads == model.group_size * model.num_kv_heads
    assert model.source.count("/") == 1
    assert set(model.needs) <= {"window_size", "softcap", "sinks"}


def test_models_have_names_of_their_own() -> None:
    assert len({model.name for model in MODELS}) == len(MODELS)


@pytest.mark.parametrize("vec_width", [8, 4, 2, 1])
def test_every_width_ships(vec_width: int) -> None:
    assert {c.dtype for c in SHIPPED if c.vec_width == vec_width} == set(DType)


def test_cuda_cores_ship_for_single_elements_alone() -> None:
    """Dispatch picks them for nothing else."""
    assert {c.vec_width for c in SHIPPED if c.math is Math.SIMT} == {1}


def test_shipped_names_are_unique() -> None:
    counts = Counter(config.name for config in shipped())
    assert len(counts) > 100
    assert set(counts.values()) == {1}


def test_shipped_kernels_are_what_dispatch_asks_for() -> None:
    """Of four tokens, where they take several."""
    for c in shipped():
        tokens = 4 if any(policy.slot is QUERIES for policy in c.policies) else 1
        asked = default_config(
            c.math, c.dtype, c.head_dim, c.group_size, c.vec_width, c.schedule, c.policies,
            c.head_dim_v, tokens,
        )  # fmt: skip
        assert asked == c


def test_every_aligned_tensorop_kernel_has_a_counterpart_with_tensor_copies() -> None:
    def problems(schedule: Schedule) -> set[object]:
        return {
            (c.dtype, c.head_dim, c.head_dim_v, c.group_size, c.policies)
            for c in shipped()
            if (c.math, c.vec_width, c.schedule) == (Math.TENSOROP, 8, schedule)
        }

    assert problems(Schedule.TMA) == problems(Schedule.MULTISTAGE)


def test_with_one_stage_two_blocks_of_tensor_copies_share_a_multiprocessor() -> None:
    hopper = ARCHES["sm_90a"]
    small = [
        c for c in shipped()
        if c.tma and c.head_dim == c.value_dim <= 128 and c.block_h == 8
    ]  # fmt: skip
    assert {c.min_blocks for c in small} == {2}
    assert {c.blocks_per_sm(hopper) for c in small} == {1}
