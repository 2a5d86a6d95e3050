"""Every shipped kernel on a GPU, against the reference and around every edge."""

from __future__ import annotations

import itertools

import pytest
import torch
from cases import Layout, Step, make_step
from conftest import Record

import gqa_cutlass
from gqa_cutlass.codegen import KernelConfig, Math, shipped
from gqa_cutlass.store import Store, build_all

pytestmark = pytest.mark.gpu

MAX_SEQ_LEN = 261


def lengths_of(config: KernelConfig) -> list[list[int]]:
    """Empty, tiny, both sides of every edge of tiles and rounds, nearly full, and ragged."""
    tile, whole = config.block_n, config.block_n * config.num_warps
    edges = {0, 1, 2, 100, MAX_SEQ_LEN - 1}
    edges |= {edge + d for edge in (tile, 2 * tile, whole) for d in (-2, -1, 0, 1)}
    uniform = [[n] for n in sorted(edges) if n < MAX_SEQ_LEN]
    return [*uniform, [0, 100, MAX_SEQ_LEN - 1, 1, tile, 37]]


@pytest.fixture(scope="module", autouse=True)
def _built() -> None:
    """Compile the grid once, on all cores."""
    from gqa_cutlass.launcher import describe_device

    arch = describe_device(torch.cuda.current_device()).arch.name
    list(build_all(Store.default(), [(config, arch) for config in shipped()]))


@pytest.mark.parametrize("config", shipped(), ids=lambda config: config.name)
def test_matches_reference(config: KernelConfig, record: Record) -> None:
    layouts: list[Layout] = ["NHD", "HND", "padded"]
    worst, cases = 0.0, 0
    for seed, (lengths, splits) in enumerate(itertools.product(lengths_of(config), (0, 3))):
        step = make_step(
            dtype=config.dtype,
            head_dim=config.head_dim,
            group_size=config.group_size,
            lengths=lengths,
            max_seq_len=MAX_SEQ_LEN,
            layout=layouts[seed % 3],
            vec_width=config.vec_width,
            append=seed % 5 != 4 or 0 in lengths,
            seed=seed,
        )
        worst = max(worst, _run(step, config, splits))
        cases += 1
    assert worst <= 1, f"error is {worst:.2f} of what the rule allows"
    record.add(config, cases, worst)


def _run(step: Step, config: KernelConfig, splits: int) -> float:
    """Run a step with a kernel, check memory and lse, and return the error over its bound."""
    plan = gqa_cutlass.plan(
        *step.tensors(), cache_seqlens=step.seqlens, num_splits=splits, return_lse=True,
        out=step.out, kernel=config,
    )  # fmt: skip
    out, lse = plan(*step.tensors(), step.seqlens, step.out)
    assert out.data_ptr() == step.out.data_ptr()
    step.check_memory()
    torch.testing.assert_close(lse.double(), step.reference()[1], atol=2e-5, rtol=2e-6)
    return step.errors(out).share


@pytest.mark.parametrize("config", shipped(), ids=lambda config: config.name)
def test_dispatcher_picks_the_kernel(config: KernelConfig) -> None:
    step = make_step(
        dtype=config.dtype,
        head_dim=config.head_dim,
        group_size=config.group_size,
        lengths=[5],
        max_seq_len=64,
        vec_width=config.vec_width,
    )
    chosen = gqa_cutlass.plan(*step.tensors(), cache_seqlens=5, out=step.out).dispatch.config
    forced_only = config.math is Math.SIMT and config.vec_width > 1
    assert (chosen == config) != forced_only
