"""The decode kernels on a GPU and in ptxsim, on the same inputs.

What PTX leaves open in them are `ex2.approx` and, on tensor cores, how `mma` rounds its sums; and
the compiler may fuse a product and a sum that follow each other. Everything else is the same to the
bit, so the two may differ by no more than `allowed` derives from that.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from calibration import Calibration, KernelRow, Timing
from cases import Step, make_step, snapshot
from helpers import by_name
from numpy.typing import NDArray
from torch import Tensor

import gqa_cutlass
from gqa_cutlass.codegen import DType, KernelConfig, Math, Schedule, default_config
from gqa_cutlass.codegen.schema.rounding import ceil_div
from gqa_cutlass.gpu.driver import describe_device
from gqa_cutlass.kernels.store import Store, build_all

pytestmark = pytest.mark.gpu

F64 = NDArray[np.float64]
DEVICE = "cuda"
F16, BF16, TENSOROP, SIMT = DType.F16, DType.BF16, Math.TENSOROP, Math.SIMT
KERNELS = [
    default_config(*choice)
    for choice in (
        (TENSOROP, F16, 64, 1, 8),
        (TENSOROP, BF16, 64, 4, 8),
        (TENSOROP, F16, 72, 4, 8),
        (TENSOROP, F16, 80, 8, 8),
        (TENSOROP, BF16, 96, 16, 8),
        (TENSOROP, F16, 128, 4, 8),
        (TENSOROP, BF16, 128, 8, 8),
        (TENSOROP, BF16, 128, 4, 2),
        (TENSOROP, F16, 256, 16, 8),
        (TENSOROP, BF16, 256, 1, 8),
        (SIMT, F16, 64, 1, 8),
        (SIMT, BF16, 64, 4, 4),
        (SIMT, F16, 72, 1, 8),
        (SIMT, BF16, 80, 1, 2),
        (SIMT, F16, 128, 4, 1),
        (SIMT, BF16, 256, 1, 8),
        (TENSOROP, BF16, 64, 8, 8, Schedule.TMA),
        (TENSOROP, F16, 96, 4, 8, Schedule.TMA),
        (TENSOROP, F16, 128, 4, 8, Schedule.TMA),
        (TENSOROP, BF16, 256, 16, 8, Schedule.TMA),
    )
]
# Lengths, splits, whether a token is appended.
CASES = [([0, 5, 150, 299], 1, True), ([40, 600], 3, True), ([37, 130], 1, False)]
# Significant bits of the element types, and the exponent of their smallest normal number.
FORMATS = {F16: (11, -14), BF16: (8, -126)}


@pytest.fixture(scope="module", autouse=True)
def _built() -> None:
    """Compile for both, on all cores."""
    device = describe_device(torch.cuda.current_device()).arch.name
    wanted = [(config, arch) for config in KERNELS for arch in (device, config.ptx_arch)]
    list(build_all(Store.default(), wanted))


def twins(config: KernelConfig, lengths: list[int], append: bool, seed: int) -> tuple[Step, Step]:
    """Make one step twice: for the GPU and for ptxsim."""
    on_gpu, on_cpu = (
        make_step(
            dtype=config.dtype, head_dim=config.head_dim, group_size=config.group_size,
            vec_width=config.vec_width, lengths=lengths, max_seq_len=max(lengths) + 8,
            append=append, seed=seed, device=device,
        )
        for device in (DEVICE, "cpu")
    )  # fmt: skip
    for name in on_cpu.before:
        getattr(on_gpu, name).copy_(getattr(on_cpu, name))
    snapshot(on_gpu)
    return on_gpu, on_cpu


def run(step: Step, config: KernelConfig, splits: int) -> tuple[Tensor, Tensor]:
    """Run a step, check memory, and return output and lse on the CPU."""
    plan = gqa_cutlass.plan(
        *step.tensors(), cache_seqlens=step.seqlens, num_splits=splits, return_lse=True,
        out=step.out, kernel=config,
    )  # fmt: skip
    out, lse = plan(*step.tensors(), step.seqlens, step.out)
    step.check_memory()
    return out.cpu(), lse.cpu()


# Relative error of one ex2.approx.ftz.f32: 2 ulp on the GPU, half an ulp in ptxsim, whose
# difference that bounds (PTX ISA, "ex2"). An ulp is at most 2^-23 of the number.
EX2 = 2.0**-22 + 2.0**-24
# The same of one rcp.approx.ftz.f32: 1 ulp and half an ulp (PTX ISA, "rcp").
RCP = 2.0**-23 + 2.0**-24
UNIT = 2.0**-24  # of f32: half an ulp, relative


def allowed(step: Step, config: KernelConfig, splits: int) -> tuple[F64, F64]:
    """Bound the difference of two runs' outputs and lse, per element.

    With weights w_t = 2^(s_t - m), an output is sum w_t v_t / sum w_t and lse is ln sum 2^(s_t).
    The two runs' weights of a token differ by a relative eta_t, in which a common factor, like a
    different running maximum m, does not count. Let p be the exact softmax, H = sum p_t eta_t and
    A = sum p_t |v_t|. To first order the outputs differ by

        sum p_t eta_t |v_t| + (H + RCP) |out| + (rounding of both sums) + one ulp of its type,

    and lse by H and the roundings. That eta_t is made of

    - E = EX2 for the weight itself, and again for each time that it is rescaled: once per tile that
      raises the maximum, once when warps merge and twice at most when splits do;
    - for tensor cores, ln 2 times the difference of scores. S = head_dim / 16 steps of mma, each of
      which differs from the exact one by at most (16 * 2^-24 + 2 * 2^-23) M on the GPU
      (`mma_bound`) and 2^-24 M in ptxsim, where M = sum |k_i q_i|, make (21 S + 4) 2^-24 M with
      the sum of the two chains and the product with the scale. The difference from the maximum
      then is rounded, which makes 2^-24 |s_t - m| in each run. On CUDA cores scores are the same
      to the bit.

    On tensor cores w_t is rounded to the element type before it multiplies v_t (not in sum w_t):
    by u in each run, 2^-11 (f16) or 2^-8 (bf16), or below f16's normal range by 2^-25 of the
    largest weight. One such rounding of P in each run makes 2 u A, by far the largest term.
    """
    k, v, lengths = step.attended()
    work = Work(config=config, splits=splits)
    out_bounds, lse_bounds = [], []
    for b, length in enumerate(lengths):
        keys, values = (_array(part[b, :length]) for part in (k, v))
        queries = _array(step.q[b]).reshape(keys.shape[1], -1, config.head_dim)
        for head, group in enumerate(queries):
            bounds = work.bounds(keys[:, head], values[:, head], group, step.scale)
            out_bounds.append(bounds[0])
            lse_bounds.append(bounds[1])
    heads = step.q.shape[:2]
    return np.concatenate(out_bounds).reshape(*heads, -1), np.concatenate(lse_bounds).reshape(heads)


@dataclass(frozen=True, kw_only=True)
class Work:
    """What of a kernel its error depends on."""

    config: KernelConfig
    splits: int

    def bounds(self, keys: F64, values: F64, queries: F64, scale: float) -> tuple[F64, F64]:
        """Bound one KV head of a sequence: (g, d) for outputs, (g,) for lse."""
        config, tokens = self.config, len(keys)
        tensor = config.math is TENSOROP
        scores = queries @ keys.T * scale
        p = np.exp(scores - scores.max(axis=1, keepdims=True))
        mass = p.sum(axis=1, keepdims=True)
        p /= mass

        tiles = ceil_div(ceil_div(tokens, config.block_n), config.num_warps)  # of one warp
        rescalings = tiles + 3
        eta = np.full(scores.shape, EX2 * (1 + rescalings))
        if tensor:
            eta += math.log(2) * self._score_difference(keys, queries, scores, scale)
        merges = config.num_warps + self.splits + rescalings + 8
        sum_rounding = 2 * UNIT * (tiles * (config.block_n // 8) + 5 + merges)
        if tensor:
            out_rounding = UNIT * (21 * tiles * ceil_div(config.block_n, 16) + 2 * merges)
        else:
            out_rounding = 2 * UNIT * (tiles * config.block_n + merges)

        size = np.abs(values)
        out = np.abs(p @ values)
        change = (p * eta).sum(axis=1, keepdims=True)
        bound = (p * eta) @ size + (change + sum_rounding + RCP) * out + out_rounding * (p @ size)
        if tensor:
            bits, smallest = FORMATS[config.dtype]
            bound += 2.0 ** (1 - bits) * (p @ size)
            bound += 2.0 ** (smallest - bits + 2) * size.sum(axis=0) / mass
        lse = np.abs(scores.max(axis=1) + np.log(mass[:, 0]))
        # log2, the maximum added and the product with ln 2 are rounded in each run.
        lse_rounding = 2 * UNIT * (2 * lse + 2 * np.log(mass[:, 0]) + 2)
        bound += _spacing(out + bound, config.dtype)
        return bound, change[:, 0] + sum_rounding + lse_rounding

    def _score_difference(self, keys: F64, queries: F64, scores: F64, scale: float) -> F64:
        """In units of log2, as the kernel holds scores."""
        steps = ceil_div(self.config.head_dim, 16)
        magnitude = np.abs(queries) @ np.abs(keys).T * scale
        below = scores.max(axis=1, keepdims=True) - scores
        return ((21 * steps + 4) * UNIT * magnitude + 2 * UNIT * below) / math.log(2)


def _array(tensor: Tensor) -> F64:
    found: F64 = tensor.cpu().double().numpy()
    return found


def _spacing(values: F64, dtype: DType) -> F64:
    """Distance of neighbouring numbers of the element type at values."""
    bits, smallest = FORMATS[dtype]
    exponent = np.maximum(np.frexp(np.abs(values))[1] - 1, smallest)
    return np.ldexp(1.0, exponent + 1 - bits)


@dataclass
class Seen:
    """What the launches of a kernel gave."""

    outputs: int = 0
    equal: int = 0
    ulp: float = 0.0
    out_share: float = 0.0
    lse: float = 0.0
    lse_share: float = 0.0

    def add(self, gpu: Any, simulated: Any, step: Step, config: KernelConfig, splits: int) -> None:
        out_bound, lse_bound = allowed(step, config, splits)
        pairs = zip(gpu, simulated, strict=True)
        out, lse = (np.abs(_array(ours) - _array(theirs)) for ours, theirs in pairs)
        ours, theirs = (pair[0].contiguous().view(torch.int16) for pair in (gpu, simulated))
        largest = np.abs(_array(simulated[0])).max(axis=-1, keepdims=True)
        self.outputs += ours.numel()
        self.equal += int((ours == theirs).sum())
        self.ulp = max(self.ulp, float((out / _spacing(largest, config.dtype)).max()))
        self.out_share = max(self.out_share, float((out / out_bound).max()))
        self.lse = max(self.lse, float(lse.max()))
        self.lse_share = max(self.lse_share, float((lse / lse_bound).max()))

    def row(self, config: KernelConfig) -> KernelRow:
        return KernelRow(
            kernel=config.name,
            cases=len(CASES),
            outputs=self.outputs,
            equal=round(self.equal / self.outputs, 6),
            ulp=round(self.ulp, 3),
            out_share=round(self.out_share, 4),
            lse=float(f"{self.lse:.3g}"),
            lse_share=round(self.lse_share, 4),
        )


@pytest.mark.parametrize("config", by_name(KERNELS))
def test_kernel_agrees_with_ptxsim(config: KernelConfig, calibration: Calibration) -> None:
    seen = Seen()
    for seed, (lengths, splits, append) in enumerate(CASES):
        on_gpu, on_cpu = twins(config, lengths, append, seed)
        results = run(on_gpu, config, splits), run(on_cpu, config, splits)
        for name in ("k_cache", "v_cache"):
            ours, theirs = getattr(on_gpu, name).cpu(), getattr(on_cpu, name)
            assert torch.equal(ours.view(torch.int16), theirs.view(torch.int16)), name
        seen.add(*results, on_cpu, config, splits)
    row = seen.row(config)
    calibration.kernels.append(row)
    print(row)
    assert max(seen.out_share, seen.lse_share) <= 1, row


def test_time_of_a_long_problem(calibration: Calibration) -> None:
    config = default_config(TENSOROP, F16, 128, 4, 8)
    on_gpu, on_cpu = twins(config, [2047], True, 0)
    gpu = run(on_gpu, config, 4)
    run(on_cpu, config, 4)  # compiles
    snapshot(on_cpu)
    start = time.perf_counter()
    simulated = run(on_cpu, config, 4)
    seconds = time.perf_counter() - start
    seen = Seen()
    seen.add(gpu, simulated, on_cpu, config, 4)
    kv_heads = on_cpu.k_cache.shape[2]
    problem = f"`{config.name}`, 2,048 tokens, {kv_heads} KV heads, 4 splits"
    calibration.timings.append(Timing(problem=problem, seconds=round(seconds, 2)))
    print(problem, seconds, seen)
    assert max(seen.out_share, seen.lse_share) <= 1, seen
