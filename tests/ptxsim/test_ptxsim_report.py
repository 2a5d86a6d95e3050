"""What ptxsim counts: conflicts of banks, sectors, bytes, instructions, and the run that asks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from gqa_cutlass.codegen import DType, KernelConfig, Math, default_config
from gqa_cutlass.codegen.schema.policies import OF_TOKENS, POLICIES, named
from gqa_cutlass.errors import InputError
from gqa_cutlass.proof.sim import run_sim
from gqa_cutlass.ptxsim import report
from gqa_cutlass.ptxsim.stats import AccessStats, Stats

LANES = np.arange(32)
CONFIG = default_config(Math.TENSOROP, DType.F16, 64, 4, 8)
SIMT = default_config(Math.SIMT, DType.F16, 64, 1, 8)


@pytest.mark.parametrize(
    ("addresses", "size", "passes", "least"),
    [
        pytest.param(LANES * 4, 4, 1, 1, id="consecutive words"),
        pytest.param(LANES * 0, 4, 1, 1, id="one word for all"),
        pytest.param(LANES * 8, 4, 2, 1, id="every second word"),
        pytest.param(LANES * 128, 4, 32, 1, id="one bank"),
        pytest.param(LANES * 2, 2, 1, 1, id="two lanes per word"),
        pytest.param(LANES * 8, 8, 2, 2, id="8 bytes, a half warp at a time"),
        pytest.param(LANES * 16, 16, 4, 4, id="16 bytes, a quarter at a time"),
        pytest.param(LANES * 128, 16, 32, 4, id="rows of 128 bytes"),
        pytest.param(LANES * 144, 16, 4, 4, id="rows an odd number of chunks apart"),
    ],
)
def test_passes_over_the_banks(addresses: np.ndarray, size: int, passes: int, least: int) -> None:
    stats = Stats(1)
    stats.shared(0, LANES, addresses, size)
    seen = stats.shared_memory[0]
    assert (seen.requests, seen.passes, seen.ideal) == (1, passes, least)
    assert seen.bytes == 32 * size


@pytest.mark.parametrize(
    ("addresses", "size", "sectors", "least"),
    [
        pytest.param(LANES * 4, 4, 4, 4, id="consecutive words"),
        pytest.param(LANES * 4 + 4, 4, 5, 4, id="across a boundary"),
        pytest.param(LANES * 0, 4, 1, 1, id="one word for all"),
        pytest.param(LANES * 64, 4, 32, 4, id="a sector each"),
        pytest.param(LANES * 16, 16, 16, 16, id="16 bytes"),
    ],
)
def test_sectors_of_a_request(addresses: np.ndarray, size: int, sectors: int, least: int) -> None:
    stats = Stats(1)
    stats.global_(0, LANES, addresses + 4096, size, write=False)
    seen = stats.global_memory[0]
    assert (seen.requests, seen.passes, seen.ideal) == (1, sectors, least)


def test_warps_are_requests_of_their_own() -> None:
    stats = Stats(1)
    lanes = np.arange(64)
    stats.shared(0, lanes, lanes % 32 * 128, 4)
    assert stats.shared_memory[0] == AccessStats(requests=2, passes=64, ideal=2, bytes=256)


@pytest.mark.parametrize("config", [CONFIG, SIMT], ids=lambda config: config.name)
def test_a_run_counts_what_the_kernel_must_move(config: KernelConfig) -> None:
    found = run_sim(config, cache_len=100, batch=2, kv_heads=2, num_splits=1)
    read, written = report.global_bytes(found.stats)
    row = 2 * config.head_dim
    tokens = 2 * 2 * 2 * 101 * row  # K and V, sequences, heads
    queries = 2 * 2 * config.group_size * row
    assert found.least_bytes == tokens + queries
    # The new token is read twice: attended to and appended. Every warp reads the queries.
    assert tokens + queries <= read <= tokens + 8 * row + config.num_warps * queries
    assert written == queries + 8 * row + 4 * 4 * config.group_size  # out, appended rows, lse
    assert found.appended and found.error <= 2 * found.error_torch and found.lse_error < 1e-5


@pytest.mark.parametrize("scaled", ["of heads", "of tokens"])
def test_a_run_of_a_kernel_with_features_asks_for_them(scaled: str) -> None:
    """One per slot: the caches are of 8 bits, and sequences have several tokens."""
    left_out = OF_TOKENS if scaled == "of heads" else ()
    policies = {p.slot: p for p in POLICIES if p.tag and p not in left_out}
    config = replace(CONFIG, policies=tuple(policies.values()))
    found = run_sim(config, cache_len=20, kv_heads=4)
    assert found.appended and found.error <= 2 * found.error_torch and found.lse_error < 1e-5


def test_a_run_of_a_kernel_with_values_of_another_head_dim() -> None:
    config = default_config(Math.TENSOROP, DType.F16, 64, 4, 8, head_dim_v=80)
    found = run_sim(config, cache_len=20)
    assert found.least_bytes == 2 * (21 * (64 + 80) + 4 * 64)
    assert found.appended and found.error <= 2 * found.error_torch and found.lse_error < 1e-5


def test_a_run_of_a_kernel_with_a_window_reads_no_more_than_it_shows() -> None:
    config = replace(CONFIG, policies=(named("SlidingWindow"), named("Alibi")))
    trial = run_sim(config, cache_len=399, num_splits=1)
    assert trial.least_bytes == 2 * config.head_dim * (2 * 200 + config.group_size)
    queries = 2 * config.head_dim * config.block_h * config.num_warps
    slopes = 4 * 2 * 32 * config.num_warps  # of the heads that a lane has, in every lane
    read, _ = report.global_bytes(trial.stats)
    assert trial.least_bytes <= read <= trial.least_bytes + queries + slopes + 8 * config.head_dim
    assert trial.error <= 2 * trial.error_torch and trial.lse_error < 1e-5


def test_the_instruction_mix_counts_warps() -> None:
    found = run_sim(CONFIG, cache_len=CONFIG.block_n * CONFIG.num_warps - 1)
    mix = report.instruction_mix(found.program, found.stats)
    steps = CONFIG.head_dim // 16  # of an MMA, over the dims
    per_tile = 2 * steps * CONFIG.block_n // 16
    assert mix["mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"] == per_tile * CONFIG.num_warps
    assert mix["ldmatrix.sync.aligned.x4.m8n8.shared.b16"] == per_tile // 2 * CONFIG.num_warps


def test_tiles_are_read_without_bank_conflicts() -> None:
    found = run_sim(CONFIG, cache_len=200)
    tiles = [
        a for a in report.shared_accesses(found.program, found.stats) if "matrix" in a.instruction
    ]
    assert {a.excess for a in tiles} == {1.0}
    assert {".trans" in a.instruction for a in tiles} == {False, True}  # of K, and of V


def test_a_trace_shows_every_instruction_in_order() -> None:
    seen: list[tuple[str, int, int]] = []
    found = run_sim(
        CONFIG,
        cache_len=5,
        trace=lambda program, pc, warps, lanes: seen.append(
            (program.code[pc].instruction.name, warps, lanes)
        ),
    )
    assert sum(warps for _, warps, _ in seen) == sum(found.stats.executed)
    assert seen[-1][0] in ("ret", "exit") and seen[0][1:] == (8, 256)


@pytest.mark.parametrize("wrong", [{"cache_len": -1}, {"batch": 0}, {"kv_heads": 0}])
def test_impossible_sizes_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(InputError, match=f"sim: {next(iter(wrong))}: got .*; allowed"):
        run_sim(CONFIG, **{"cache_len": 5, **wrong})
