"""A step decoded by the C library and by Python: the same launch, and the same bits."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from c_driver import Launched
from c_library import NUM_MERGE_COUNTERS, float32, fresh_library, workspace_of
from c_simulator import Simulator, recorded
from cases import Step, make_step
from torch import Tensor

import gqa_cutlass
from gqa_cutlass import CacheOverflowError, GQADecodeConfig, gqa_attention_decode, gqa_decode
from gqa_cutlass.codegen import DType, KernelConfig, Math, Schedule, default_config
from gqa_cutlass.dispatch import Dispatch

WIDE_64 = default_config(Math.TENSOROP, DType.F16, 64, 4, 8)
TMA_128 = default_config(Math.TENSOROP, DType.BF16, 128, 4, 8, Schedule.TMA)
MADE = "split_workspace", "merge_counters", "lse"
OWN_MEMORY = *MADE, "overflow_flag"  # that each of the two has for itself


@dataclass(frozen=True)
class Result:
    """What a decode step launched, and what it left behind."""

    launched: Launched
    out: Tensor
    k_cache: Tensor
    v_cache: Tensor
    lse: Tensor | None = None
    scales: tuple[Tensor, ...] = ()  # of tokens

    @classmethod
    def of(cls, launched: Launched, step: Step, lse: Tensor | None = None) -> Result:
        """The step's memory as it is now."""
        return cls(launched, step.out.clone(), step.k_cache.clone(), step.v_cache.clone(), lse)


def step_of(**sizes: Any) -> Step:
    """A step on the CPU with a scale that float32 holds."""
    step = make_step(**sizes, device="cpu")
    step.scale = float32(step.scale)
    return step


def by_python(step: Step) -> Result:
    """Decode in Python, and undo it."""
    batch, num_q_heads, head_dim = step.q.shape
    _, max_seq_len, num_kv_heads, _ = step.k_cache.shape
    config = GQADecodeConfig(
        batch_size=batch, cache_len=step.lengths[0], num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads, head_dim=head_dim, scale=step.scale, max_seq_len=max_seq_len,
    )  # fmt: skip
    out = step.out.view(batch, 1, num_q_heads * head_dim)
    assert step.k is not None and step.v is not None
    tokens = (t.unsqueeze(1) for t in (step.q, step.k, step.v))
    with recorded() as launches:
        gqa_attention_decode(out, *tokens, step.k_cache, step.v_cache, config)
    return _undone(launches[-1], step)


def ragged_by_python(step: Step) -> Result:
    """The same, with lengths on the device; whether one was too large is read and forgotten."""
    return featured_by_python(step, step.seqlens)


def featured_by_python(step: Step, lengths: int | Tensor, *, with_lse: bool = False) -> Result:
    """The same with what the step asks for."""
    with recorded() as launches:
        found = gqa_decode(
            *step.tensors(), cache_seqlens=lengths, softmax_scale=step.scale, out=step.out,
            return_lse=with_lse, **step.features(),
        )  # fmt: skip
    with suppress(CacheOverflowError):
        gqa_cutlass.check_overflow("cpu")
    return _undone(launches[-1], step, found[1] if with_lse else None)


def _undone(launched: Launched, step: Step, lse: Tensor | None = None) -> Result:
    result = Result.of(launched, step, lse)
    restore(step)
    return result


def restore(step: Step) -> None:
    """Make the step's memory as it was."""
    step.k_cache.copy_(step.before["k_cache"])
    step.v_cache.copy_(step.before["v_cache"])
    step.out.fill_(float("nan"))


def assert_same(ours: Result, theirs: Result) -> None:
    """The same launch, but for where workspace and flag are, with the same result to the bit."""
    assert ours.launched.kernel == theirs.launched.kernel
    assert ours.launched.shape == theirs.launched.shape
    argument, expected = ours.launched.argument, theirs.launched.argument
    assert list(argument) == list(expected)
    assert {
        name: (value, expected[name])
        for name, value in argument.items()
        if name not in OWN_MEMORY and value != expected[name]
    } == {}
    for name in MADE:
        assert bool(argument[name]) == bool(expected[name]), name
    for name in ("out", "k_cache", "v_cache"):
        assert same_bits(getattr(ours, name), getattr(theirs, name)), f"{name} differs"
    assert (ours.lse is None) == (theirs.lse is None)
    if ours.lse is not None and theirs.lse is not None:
        assert same_bits(ours.lse, theirs.lse), "lse differs"
    assert len(ours.scales) == len(theirs.scales)
    assert all(map(same_bits, ours.scales, theirs.scales)), "scales differ"


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal, NaNs included."""
    return torch.equal(a.view(torch.int16), b.view(torch.int16))


def chosen_for(step: Step, *, ragged: bool = False) -> Dispatch:
    """What Python launches for a step."""
    lengths = step.seqlens if ragged else step.lengths[0]
    plan = gqa_cutlass.plan(*step.tensors(), cache_seqlens=lengths, out=step.out, **step.features())
    return plan.dispatch


def decode_both(step: Step) -> Launched:
    """Decode a step in C as in Python; returns what both launched."""
    expected = by_python(step)
    workspace = workspace_of(chosen_for(step))
    launched = Simulator(fresh_library()).decode(step, workspace)
    assert_same(Result.of(launched, step), expected)
    step.check_memory()
    assert step.errors(step.out).share <= 1
    assert launched.argument["overflow_flag"] is launched.argument["seqlens"] is None
    assert workspace is None or not workspace[:NUM_MERGE_COUNTERS].any()
    return launched


def capacity_for(kernel: KernelConfig) -> int:
    """Tokens of a cache for which dispatch takes this schedule: more than one block's warps at
    once take with tma, fewer otherwise."""
    return kernel.block_n * kernel.num_warps + 9 if kernel.tma else 41


def step_for(kernel: KernelConfig, batch: int, length: int) -> Step:
    """A step for which dispatch takes this kernel."""
    return step_of(
        dtype=kernel.dtype, head_dim=kernel.head_dim, group_size=kernel.group_size,
        lengths=[length] * batch, max_seq_len=capacity_for(kernel),
    )  # fmt: skip
