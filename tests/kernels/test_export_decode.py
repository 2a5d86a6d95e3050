"""The C library decodes like Python: on the same memory it launches the same kernel in the same
shape with the same argument, and what the kernel writes in ptxsim is the same to the bit."""

from __future__ import annotations

import math
from itertools import cycle, product
from typing import Any

import pytest
import torch
from c_and_python import (
    TMA_128,
    WIDE_64,
    Result,
    assert_same,
    by_python,
    capacity_for,
    chosen_for,
    decode_both,
    ragged_by_python,
    restore,
    same_bits,
    step_for,
    step_of,
)
from c_build import FAMILIES
from c_library import NUM_MERGE_COUNTERS, config_of, float32, fresh_library, workspace_of
from c_simulator import Simulator
from helpers import by_name, diagonal, sampled

from gqa_cutlass import CacheOverflowError, gqa_decode
from gqa_cutlass.codegen import DType, KernelConfig, Math, Schedule, default_config
from gqa_cutlass.codegen.schema.params import Params

KERNELS = [  # in one type each, by turns
    default_config(Math.TENSOROP, dtype, head_dim, group_size, 8, schedule)
    for (schedule, (head_dim, group_size)), dtype in zip(product(Schedule, FAMILIES), cycle(DType))
]


def family_of(kernel: KernelConfig) -> object:
    """What CI takes once, schedules by turns; steps of the other tests have more of both."""
    return kernel.head_dim, kernel.group_size


@pytest.mark.parametrize("kernel", sampled((*KERNELS[::2], *KERNELS[1::2]), family_of))
def test_c_library_decodes_like_python(kernel: KernelConfig) -> None:
    step = step_for(kernel, batch=2, length=capacity_for(kernel) // 3)
    assert decode_both(step).kernel == kernel.name


@pytest.mark.parametrize("kernel", by_name([WIDE_64, TMA_128]))
def test_the_first_and_the_last_token_decode_like_python(kernel: KernelConfig) -> None:
    for batch, length in ((3, 0), (1, capacity_for(kernel) - 1)):
        assert decode_both(step_for(kernel, batch, length)).kernel == kernel.name


# Sizes of steps with few tokens in large caches, with how many splits, in clusters of how many.
SHARED: dict[str, tuple[dict[str, Any], int, int]] = {
    "a cluster per head": (dict(lengths=[300], max_seq_len=512), 4, 4),
    "clusters that meet": (dict(lengths=[1100], max_seq_len=4096, num_kv_heads=1), 32, 8),
    "splits": (dict(lengths=[200] * 2, max_seq_len=512, vec_width=4), 4, 1),
    "splits of aligned rows": (
        dict(lengths=[100], max_seq_len=1366, num_kv_heads=32, head_dim=96, dtype=DType.BF16), 4, 1,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("sizes", "splits", "cluster"), SHARED.values(), ids=SHARED)
def test_sequences_that_blocks_share_decode_like_python(
    sizes: dict[str, Any], splits: int, cluster: int
) -> None:
    launched = decode_both(step_of(**sizes))
    assert launched.argument["num_splits"] == launched.shape.grid[1] == splits
    assert launched.shape.cluster == cluster
    assert bool(launched.argument["split_workspace"]) == (splits > cluster)


def test_scales_reach_the_kernel_rounded_once() -> None:
    library, step = fresh_library(), step_of(lengths=[9], max_seq_len=20, head_dim=64)
    scales = [0.0, -0.3, 1.0, 1e-30, 1e38, *(1 / n for n in range(1, 100))]
    for scale in scales:
        step.scale = float32(scale)
        assert library.decode(step) == "GQA_SUCCESS"
        found = library.driver.last_launch().argument["scale_log2"]
        assert found == Params(scale_log2=step.scale * math.log2(math.e)).scale_log2


def test_negative_scales_decode_like_python() -> None:
    step = step_of(lengths=[9], max_seq_len=20, head_dim=64)
    step.scale = float32(-0.3)
    decode_both(step)


RAGGED: dict[str, tuple[dict[str, Any], int]] = {
    "multistage": (dict(lengths=[0, 17, 39], max_seq_len=40), 1),
    "clusters": (dict(lengths=[130, 0], max_seq_len=140, dtype=DType.BF16), 2),
    "dealt out by length": (dict(lengths=[700, 3], max_seq_len=4096, vec_width=4), 33),
}


@pytest.mark.parametrize(("sizes", "rows"), RAGGED.values(), ids=RAGGED)
def test_ragged_lengths_decode_like_python(sizes: dict[str, Any], rows: int) -> None:
    step, overflow = step_of(**sizes), torch.zeros(1, dtype=torch.int32)
    expected = ragged_by_python(step)
    workspace = workspace_of(chosen_for(step, ragged=True))
    launched = Simulator(fresh_library()).decode_ragged(step, overflow, workspace)
    assert_same(Result.of(launched, step), expected)
    step.check_memory()
    assert step.errors(step.out).share <= 1
    assert launched.shape.grid[1] == rows
    early = chosen_for(step, ragged=True).prefetch_first_tile
    assert launched.argument["prefetch_limit"] == (step.k_cache.shape[1] if early else 0)
    assert overflow.item() == 0


@pytest.mark.parametrize(  # multistage and clusters
    ("wrong", "max_seq_len"), diagonal(["full", "beyond", "largest"], [40, 140])
)
def test_a_sequence_that_does_not_fit_spoils_itself_alone(max_seq_len: int, wrong: str) -> None:
    lengths = {"full": max_seq_len, "beyond": max_seq_len + 1, "largest": 2**31 - 1}
    step = step_of(lengths=[0, 17, 5, 39], max_seq_len=max_seq_len)
    simulator = Simulator(fresh_library())
    overflow = torch.full((1,), 77, dtype=torch.int32)  # left alone when all fit
    simulator.decode_ragged(step, overflow, workspace_of(chosen_for(step, ragged=True)))
    right = step.out.clone()
    assert overflow.item() == 77
    restore(step)
    step.seqlens[2] = lengths[wrong]
    overflow.zero_()
    expected = ragged_by_python(step)
    launched = simulator.decode_ragged(step, overflow, workspace_of(chosen_for(step, ragged=True)))
    assert_same(Result.of(launched, step), expected)
    assert overflow.item() == 1 + 2
    assert step.out[2].isnan().all()
    others = torch.tensor([0, 1, 3])
    assert same_bits(step.out[others], right[others])
    step.check_memory(rejected=(2,))


@pytest.mark.parametrize("max_seq_len", [40, 140], ids=["multistage", "clusters"])
def test_a_sequence_of_negative_length_is_inactive(max_seq_len: int) -> None:
    step = step_of(lengths=[0, 17, 5, 39], max_seq_len=max_seq_len)
    step.seqlens[2] = -1
    overflow = torch.full((1,), 77, dtype=torch.int32)
    expected = ragged_by_python(step)
    launched = Simulator(fresh_library()).decode_ragged(
        step, overflow, workspace_of(chosen_for(step, ragged=True))
    )
    assert_same(Result.of(launched, step), expected)
    assert overflow.item() == 77 and (step.out[2] == 0).all() and not step.out.isnan().any()
    step.check_memory(rejected=(2,))


@pytest.mark.parametrize("cache_len", [40, 41, 2**31 - 1])
def test_overflow_is_refused_before_anything_is_written(cache_len: int) -> None:
    step, library = step_of(lengths=[3], max_seq_len=40), fresh_library()
    Simulator(library)
    config = config_of(step)
    config.cache_len = cache_len
    out = step.out.clone()
    assert library.decode(step, config) == "GQA_ERROR_CACHE_OVERFLOW"
    with pytest.raises(CacheOverflowError) as refused:
        gqa_decode(*step.tensors(), cache_seqlens=cache_len)
    assert f"gqa_decode: {library.error}" == str(refused.value)
    assert same_bits(step.out, out)
    step.check_memory(rejected=(0,))
    assert library.driver.all_calls() == {}


# Steps that need different amounts of workspace, or none; in clusters and in splits.
CONFIGURATIONS: list[dict[str, Any]] = [
    dict(lengths=[1100], max_seq_len=4096, num_kv_heads=1),
    dict(lengths=[200, 200], max_seq_len=512, vec_width=4),
    dict(lengths=[9], max_seq_len=30),
    dict(lengths=[300], max_seq_len=600, vec_width=2, head_dim=64, dtype=DType.BF16),
]


def test_one_workspace_serves_every_configuration_in_any_order() -> None:
    simulator = Simulator(fresh_library())
    steps = [step_of(**sizes) for sizes in CONFIGURATIONS]
    expected = [by_python(step) for step in steps]
    size = max(simulator.library.workspace_size(config_of(step)) for step in steps)
    workspace = torch.zeros(size // 4, dtype=torch.int32)
    for index in (0, 1, 2, 3, 1, 0):
        step = steps[index]
        launched = simulator.decode(step, workspace)
        assert_same(Result.of(launched, step), expected[index])
        assert not workspace[:NUM_MERGE_COUNTERS].any(), "counters are zero again"
        if launched.argument["merge_counters"]:
            assert launched.argument["merge_counters"] == workspace.data_ptr()
            assert launched.argument["split_workspace"] == workspace[NUM_MERGE_COUNTERS:].data_ptr()
        restore(step)
    assert workspace[NUM_MERGE_COUNTERS:].any(), "something was merged"


def test_a_workspace_that_is_asked_for_suffices_for_any_length_and_alignment() -> None:
    library = fresh_library()
    for sizes, width in ((s, w) for s in CONFIGURATIONS for w in (8, 4, 2)):
        step = step_of(**sizes | {"vec_width": width})
        workspace = torch.zeros(library.workspace_size(config_of(step)) // 4, dtype=torch.int32)
        overflow = torch.zeros(1, dtype=torch.int32)
        assert library.decode(step, config_of(step, workspace)) == "GQA_SUCCESS", library.error
        assert library.decode_ragged(step, overflow, config_of(step, workspace)) == "GQA_SUCCESS"


NARROW = {8: 8, 4: 4, 2: 2, 1: 1}  # elements to which a tensor is aligned, and the kernel's


@pytest.mark.parametrize("width", NARROW)
@pytest.mark.parametrize("tensor", ["output", "q", "k", "v", "kv_cache_k", "kv_cache_v"])
def test_a_misaligned_tensor_gets_a_narrower_kernel(tensor: str, width: int) -> None:
    step, library = step_of(lengths=[30], max_seq_len=512, num_kv_heads=1), fresh_library()
    field = {"output": "out", "kv_cache_k": "k_cache", "kv_cache_v": "v_cache"}.get(tensor, tensor)
    other = step_of(lengths=[30], max_seq_len=512, num_kv_heads=1, vec_width=width)
    setattr(step, field, getattr(other, field))
    chosen = chosen_for(step)
    assert chosen.config.vec_width == NARROW[width]
    config = config_of(step, workspace_of(chosen))
    assert library.decode(step, config) == "GQA_SUCCESS", library.error
    launched = library.driver.last_launch()
    assert (launched.kernel, launched.shape) == (chosen.config.name, chosen.shape)


@pytest.mark.parametrize("width", [4, 2, 1])
def test_narrow_kernels_decode_like_python(width: int) -> None:
    step = step_of(lengths=[11], max_seq_len=64, head_dim=64, vec_width=width)
    assert f"_align{width}_" in decode_both(step).kernel


@pytest.mark.parametrize(("head_dim", "group_size", "width"), [(128, 7, 4), (64, 7, 2), (96, 4, 1)])
def test_a_misaligned_tensor_without_a_narrow_kernel_is_unsupported(
    head_dim: int, group_size: int, width: int
) -> None:
    library = fresh_library()
    sizes = dict(lengths=[3], max_seq_len=30, head_dim=head_dim, group_size=group_size)
    assert library.decode(step_of(**sizes)) == "GQA_SUCCESS"
    assert library.decode(step_of(**sizes, vec_width=width)) == "GQA_ERROR_UNSUPPORTED"
    assert f"head_dim {head_dim}, {group_size} query heads per KV head, " in library.error
    assert f"rows aligned to {2 * width} bytes, on sm_90a" in library.error
    assert library.driver.launches == 1


def test_the_stream_is_the_callers() -> None:
    step, library = step_of(lengths=[3], max_seq_len=30), fresh_library()
    for stream in (None, 0x7F3A_0000_1C40):
        assert library.decode(step, stream=stream) == "GQA_SUCCESS"
        assert library.driver.last_launch().stream == (stream or 0)
