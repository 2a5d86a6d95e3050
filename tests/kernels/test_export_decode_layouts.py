"""The C library decodes tensors of any strides, and says their log-sum-exp, like Python."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

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
    step_of,
)
from c_library import config_of, fresh_library, workspace_of
from c_simulator import Simulator
from cases import Step, snapshot

from gqa_cutlass.codegen import DType, KernelConfig, Math, default_config

UNLIKE_64 = default_config(Math.TENSOROP, DType.F16, 64, 4, 8, head_dim_v=80)


def fused(step: Step) -> None:
    """Slices of one projection, and keys and values in one buffer, heads before tokens."""
    assert step.k is not None and step.v is not None
    heads, kv_heads = step.q.shape[1], step.k.shape[1]
    projection = torch.cat([step.q, step.k, step.v], dim=1)
    step.q, step.k = projection[:, :heads], projection[:, heads : heads + kv_heads]
    step.v = projection[:, heads + kv_heads :]
    both = torch.stack([step.k_cache, step.v_cache], dim=1).transpose(2, 3).contiguous()
    step.k_cache, step.v_cache = both.transpose(2, 3).unbind(1)


def unlike(step: Step) -> None:
    """Keys and values of different strides: a row of each packs both, and tokens stand apart."""
    packed = torch.cat([step.k_cache, step.k_cache], dim=-1)
    step.k_cache = packed[..., : step.k_cache.shape[-1]]
    step.v_cache = step.v_cache.repeat_interleave(2, dim=1)[:, ::2]


@dataclass(frozen=True)
class Layout:
    """How a step's tensors lie.

    Args:
        kernel: That decodes it.
        sizes: What else of it is not as usual.
        change: What to do to it.
    """

    kernel: KernelConfig
    sizes: dict[str, Any]
    change: Callable[[Step], None] | None = None


LAYOUTS = {
    "packed": Layout(WIDE_64, {}),
    "heads before tokens": Layout(WIDE_64, dict(layout="HND")),
    "gaps between rows": Layout(WIDE_64, dict(layout="padded")),
    "one projection, one buffer": Layout(WIDE_64, {}, fused),
    "keys unlike values": Layout(WIDE_64, {}, unlike),
    "values of another head_dim": Layout(UNLIKE_64, dict(head_dim_v=80)),
    "values of another head_dim, heads before tokens": Layout(
        UNLIKE_64, dict(head_dim_v=80, layout="HND")
    ),
    "clusters, gaps between rows": Layout(TMA_128, dict(layout="padded")),
    "clusters, one projection, one buffer": Layout(TMA_128, {}, fused),
}


def step_in(layout: Layout) -> Step:
    """A step whose tensors lie like that."""
    kernel = layout.kernel
    capacity = capacity_for(kernel)
    step = step_of(
        dtype=kernel.dtype, head_dim=kernel.head_dim, lengths=[capacity // 3] * 2,
        max_seq_len=capacity, **layout.sizes,
    )  # fmt: skip
    if layout.change is not None:
        layout.change(step)
        snapshot(step)
    return step


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_strides_and_lse_decode_like_python(layout: Layout) -> None:
    """With one length for all, and with lengths on the device."""
    step, flag = step_in(layout), torch.zeros(1, dtype=torch.int32)
    simulator = Simulator(fresh_library())
    for lengths in (step.lengths[0], step.seqlens):
        ragged = lengths is step.seqlens
        expected = featured_by_python(step, lengths, with_lse=True)
        workspace = workspace_of(chosen_for(step, ragged=ragged))
        lse = torch.full(step.q.shape[:2], torch.nan, dtype=torch.float32)
        if ragged:
            launched = simulator.decode_ragged(step, flag, workspace, lse)
        else:
            launched = simulator.decode(step, workspace, lse)
        assert launched.kernel == layout.kernel.name
        assert launched.argument["lse"] == lse.data_ptr()
        assert_same(Result.of(launched, step, lse), expected)
        step.check_memory()
        assert step.errors(step.out).share <= 1
        restore(step)


@pytest.mark.parametrize("width", [4, 2, 1])
def test_strides_that_are_less_aligned_get_a_narrower_kernel(width: int) -> None:
    """Of addresses at multiples of 16 bytes, with a row too wide by a few elements."""
    step, library = step_of(lengths=[30] * 2, max_seq_len=512, head_dim=64), fresh_library()
    for name in ("q", "k", "v", "out", "k_cache", "v_cache"):
        usual = getattr(step, name)
        wide = torch.zeros(*usual.shape[:-1], usual.shape[-1] + width, dtype=usual.dtype)
        setattr(step, name, wide[..., : usual.shape[-1]])
        chosen = chosen_for(step)
        assert chosen.config.vec_width == width
        config = config_of(step, workspace_of(chosen))
        assert library.decode(step, config) == "GQA_SUCCESS", library.error
        launched = library.driver.last_launch()
        assert (launched.kernel, launched.shape) == (chosen.config.name, chosen.shape)
        found = library.explain(config, "sm_90a", 132)
        assert found.kernel.decode() == chosen.config.name
        setattr(step, name, usual)


def test_strides_where_there_is_but_one_do_not_count() -> None:
    """Neither for the alignment nor in a tensor map."""
    step, library = step_of(lengths=[130], max_seq_len=140, num_kv_heads=1), fresh_library()
    chosen = chosen_for(step)
    config = config_of(step, workspace_of(chosen))
    for stride in (0, 1, 2**63 - 1):
        for field in ("q_batch", "k_head", "kv_cache_k_batch", "kv_cache_v_head"):
            setattr(config, f"{field}_stride", stride)
        assert library.decode(step, config) == "GQA_SUCCESS", library.error
        assert library.driver.last_launch().kernel == chosen.config.name
        assert chosen.config.tma
