"""Every shipped kernel on a GPU, against the reference and around every edge."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from cases import Layout, make_step
from conftest import Record
from edges import Edge, edges_of
from helpers import (
    check_registers,
    compiled,
    present_arch,
    share_of_bound,
    skip_unless_it_runs,
)

import gqa_cutlass
from gqa_cutlass.codegen import KernelConfig, shipped
from gqa_cutlass.codegen.compile import compile_kernel
from gqa_cutlass.kernels.store import Store, build_all

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
    """Compile what ships once, on all cores."""
    arch = present_arch()
    list(
        build_all(Store.default(), [(config, arch) for config in shipped() if arch in config.archs])
    )


def edges(config: KernelConfig) -> list[Edge]:
    """Every length with and without splits, in every layout; and the edges of its schedule."""
    layouts: list[Layout] = ["NHD", "HND", "padded"]
    splits = (0, 3, 2, 8) if config.tma else (0, 3)
    found = [
        Edge(
            lengths=tuple(lengths), capacity=MAX_SEQ_LEN, splits=count, layout=layouts[seed % 3],
            stages=1 if config.tma and seed % 2 else None,
            append=seed % 5 != 4 or 0 in lengths, kv_heads=2,
        )
        for seed, (lengths, count) in enumerate(itertools.product(lengths_of(config), splits))
    ]  # fmt: skip
    return [*found, *edges_of(config).values()]


@pytest.mark.parametrize("config", shipped(), ids=lambda config: config.name)
def test_matches_reference(config: KernelConfig, record: Record) -> None:
    skip_unless_it_runs(config, "cuda")
    shares = [share_of_bound(edge, config, "cuda") for edge in edges(config)]
    assert max(shares) <= 1, f"error is {max(shares):.2f} of what the rule allows"
    record.add(config, len(shares), max(shares))


@pytest.mark.parametrize("config", shipped(), ids=lambda config: config.name)
def test_dispatcher_picks_the_kernel(config: KernelConfig) -> None:
    skip_unless_it_runs(config, "cuda")
    # Tensor copies are for more than the warps of one block take at once.
    tokens = 2 * config.block_n * config.num_warps if config.tma else 64
    step = make_step(
        dtype=config.dtype,
        head_dim=config.head_dim,
        group_size=config.group_size,
        lengths=[5],
        max_seq_len=tokens,
        vec_width=config.vec_width,
        head_dim_v=config.head_dim_v,
    ).asking_for(config.policies)
    plan = gqa_cutlass.plan(*step.tensors(), cache_seqlens=5, out=step.out, **step.features())
    chosen = plan.dispatch.config
    if chosen.several_queries:  # whose blocks are of as many rows as the step's tokens make
        chosen = replace(chosen, block_h=config.block_h)
    assert chosen == config


@pytest.mark.parametrize("config", shipped(), ids=lambda config: config.name)
def test_shipped_kernel_compiles_without_spills(config: KernelConfig) -> None:
    skip_unless_it_runs(config, "cuda")
    check_registers(compiled(config, present_arch()), config.max_registers)


def test_a_kernel_that_was_compiled_before_has_its_figures() -> None:
    """The compiler keeps what it has compiled where there is a driver, without its figures; spills
    are known by these."""
    config = next(each for each in shipped() if present_arch() in each.archs)
    first, second = (compile_kernel(config, present_arch()) for _ in range(2))
    check_registers(first, config.max_registers)
    check_registers(second, config.max_registers)
