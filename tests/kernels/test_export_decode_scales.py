"""The C library decodes from caches whose scales are of tokens, and writes them, like Python."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from c_and_python import (
    WIDE_64,
    Result,
    assert_same,
    chosen_for,
    featured_by_python,
    restore,
    step_for,
)
from c_build import build, write_dummies
from c_library import Config, config_of, fresh_copy, workspace_of
from c_simulator import Simulator
from cases import Step
from helpers import every
from torch import Tensor

from gqa_cutlass.call.record import parse
from gqa_cutlass.call.stored import FP8
from gqa_cutlass.codegen import DType, KernelConfig, Math, Schedule, default_config
from gqa_cutlass.codegen.schema.policies import OF_TOKENS, named, tagged
from gqa_cutlass.proof.reference import same_bits, scale_of_row

NARROW = default_config(Math.TENSOROP, DType.F16, 64, 4, 2, policies=tagged("e4m3t"))
KERNELS = {
    "_".join(("tma",) * kernel.tma + tuple(policy.tag for policy in kernel.policies)): kernel
    for kernel in (
        default_config(Math.TENSOROP, DType.F16, 64, 4, 8, policies=tagged("e4m3t")),
        default_config(Math.TENSOROP, DType.BF16, 128, 2, 8, policies=tagged("e5m2t")),
        default_config(Math.TENSOROP, DType.BF16, 64, 4, 8, policies=tagged("paged_e5m2t")),
        default_config(Math.TENSOROP, DType.F16, 64, 8, 8, policies=tagged("idx_pad_win_e4m3t")),
        default_config(Math.TENSOROP, DType.F16, 40, 4, 4, policies=tagged("idx_paged_e4m3t")),
        default_config(Math.TENSOROP, DType.BF16, 128, 4, 8, Schedule.TMA, tagged("e4m3t")),
    )
}


@dataclass
class Scales:
    """Those of a step's tokens, and what they were before it."""

    tensors: tuple[Tensor, Tensor]
    before: tuple[Tensor, ...]

    @classmethod
    def of(cls, step: Step) -> Scales:
        """Random ones, of keys in rows that lie apart."""
        rows, room, heads, _ = step.k_cache.shape
        generator = torch.Generator().manual_seed(room)
        apart = torch.rand(rows, room + 3, heads, generator=generator)[:, :room] / 100
        packed = torch.rand(rows, room, heads, generator=generator) / 100
        step.k_scale, step.v_scale = apart, packed
        return cls((apart, packed), (apart.clone(), packed.clone()))

    def check(self, step: Step) -> None:
        """The new tokens' are what rows ask for, and no others have changed."""
        for now, before, new in zip(self.tensors, self.before, (step.k, step.v), strict=True):
            assert new is not None
            right = before.clone()
            for b, length in enumerate(step.lengths):
                right[step.place(b, length)] = scale_of_row(new[b], step.k_cache.dtype)
            assert torch.equal(now, right)

    def restore(self) -> None:
        """Make them as they were."""
        for now, before in zip(self.tensors, self.before, strict=True):
            now.copy_(before)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library of kernels with such scales, and of others."""
    folder = tmp_path_factory.mktemp("scales")
    kernels = WIDE_64, NARROW, *KERNELS.values()
    return build(write_dummies(folder, kernels, ("sm_80", "sm_90a")), folder / "libgqa.so")


def step_of(kernel: KernelConfig, batch: int = 2, length: int = 30) -> Step:
    """A step for which dispatch takes a kernel, but for its scales."""
    step = step_for(kernel, batch, length).asking_for_all(kernel.policies)
    dtypes = [d for d, p in zip(FP8, OF_TOKENS, strict=True) if p in kernel.policies]
    step.into_fp8(dtypes[0])
    return step


def decode_both(library: Path, kernel: KernelConfig, batch: int, *, ragged: bool) -> None:
    """Decode in C as in Python, by this kernel, which the log names."""
    step, lines = step_of(kernel, batch), list[str]()
    scales, overflow = Scales.of(step), torch.zeros(1, dtype=torch.int32)
    workspace = workspace_of(chosen_for(step, ragged=ragged))
    expected = featured_by_python(step, step.seqlens if ragged else step.lengths[0])
    scales.check(step)
    scales.restore()
    simulator = Simulator(fresh_copy(library))
    simulator.library.log_to(lines)
    if ragged:
        launched = simulator.decode_ragged(step, overflow, workspace)
    else:
        launched = simulator.decode(step, workspace)
    assert launched.kernel == parse(lines[-1])["kernel"] == kernel.name
    assert_same(Result.of(launched, step), expected)
    scales.check(step)
    assert overflow.item() == 0


@pytest.mark.parametrize("kernel", every(2, KERNELS.values()), ids=KERNELS)
def test_scales_of_tokens_decode_like_python(library: Path, kernel: KernelConfig) -> None:
    """Of two sequences, or, where an index says which, of one that has one of two rows."""
    decode_both(library, kernel, 1 if named("IndexedRow") in kernel.policies else 2, ragged=True)


def test_scales_of_tokens_decode_like_python_with_one_length(library: Path) -> None:
    decode_both(library, KERNELS["e4m3t"], 2, ragged=False)


def test_one_row_may_have_any_stride(library: Path) -> None:
    """Which the kernel is not told, in C as in Python."""
    kernel = KERNELS["e4m3t"]
    step = step_of(kernel, batch=1)
    scales = Scales.of(step)
    expected = featured_by_python(step, 30)
    for stride in (0, 1, 2**31 - 1):
        scales.restore()
        config = config_of(step)
        config.k_scale_batch_stride, config.k_scale_head_stride = stride, 1
        launched = launched_with(library, step, config)
        assert launched["k_scale_batch"] == launched["k_scale_head"] == 0
        assert same_bits(step.out, expected.out)
        scales.check(step)
        restore(step)


def launched_with(library: Path, step: Step, config: Config) -> dict[str, object]:
    """Run a step with another configuration; returns the kernel's argument."""
    simulator = Simulator(fresh_copy(library))
    simulator.bind(step)
    status = simulator.library.decode(step, config)
    return simulator.launched(status).argument


def test_packed_rows_need_no_stride(library: Path) -> None:
    step = step_of(KERNELS["e4m3t"])
    scales = Scales.of(step)
    expected = featured_by_python(step, 30)
    scales.restore()
    config = config_of(step)
    assert config.v_scale_batch_stride == step.k_cache.shape[1] * step.k_cache.shape[2]
    config.v_scale_batch_stride = 0
    argument = launched_with(library, step, config)
    assert argument["v_scale_batch"] == expected.launched.argument["v_scale_batch"] != 0
    assert same_bits(step.out, expected.out)
    scales.check(step)


def test_rows_at_multiples_of_four_bytes_have_a_kernel_and_narrower_ones_none(
    library: Path,
) -> None:
    step = step_of(KERNELS["e4m3t"], batch=1)
    Scales.of(step)
    c = fresh_copy(library)
    assert step.k is not None
    for offset, status in ((4, "GQA_SUCCESS"), (2, "GQA_ERROR_INVALID_VALUE")):
        config = config_of(step)
        assert c.decode(step, config, k=step.k.data_ptr() + offset) == status, c.error
    assert "scales_of_tokens: got 1 with narrow rows; allowed: tensors whose rows are at" in c.error
    assert c.driver.launches == 1
