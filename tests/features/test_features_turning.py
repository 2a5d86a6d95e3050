"""RMS norm and rotary embedding of queries and new keys, before these are cached."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import Step, make_step, snapshot
from featured import KINDS, every_schedule, policies_of
from helpers import check_lse, diagonal, skip_unless_it_runs
from tokens import take_tokens
from turnings import Turning

import gqa_cutlass
from gqa_cutlass.codegen import KernelConfig, default_config
from gqa_cutlass.errors import CacheOverflowError, InputError
from gqa_cutlass.proof.turning import turned

PROCESS = "features"  # has all tests of this folder, for they have kernels in common


def config_of(kind: str, feature: str) -> KernelConfig:
    math_, dtype, width, schedule = KINDS[kind]
    return default_config(math_, dtype, 64, 4, width, schedule, policies_of(feature))


def step_for(config: KernelConfig, device: str, lengths: list[int] | None = None) -> Step:
    """Of one token."""
    return make_step(
        dtype=config.dtype, head_dim=64, group_size=4, vec_width=config.vec_width,
        lengths=lengths or [37, 0, 100], max_seq_len=104, num_kv_heads=1, device=device,
    )  # fmt: skip


def tables(step: Step, rotary_dim: int, wide: bool = True, interleaved: bool = False) -> Turning:
    """Those of the step, halves of one table of a type."""
    found = step.turning.rotated(step.q, step.room(), rotary_dim)
    assert found.rotary_cos is not None and found.rotary_sin is not None
    both = torch.cat([found.rotary_cos, found.rotary_sin], dim=1)
    cos, sin = both.to(torch.float32 if wide else step.q.dtype).chunk(2, dim=1)
    return replace(found, rotary_cos=cos, rotary_sin=sin, rotary_interleaved=interleaved)


def hold(step: Step, config: KernelConfig | None = None) -> None:
    """The step is right, and so are the keys that it caches."""
    snapshot(step)
    plan = gqa_cutlass.plan(
        *step.tensors(), cache_seqlens=step.seqlens, return_lse=True, out=step.out, kernel=config,
        num_splits=2, **step.features(),
    )  # fmt: skip
    out, lse = plan(*step.tensors(), step.seqlens, step.out)
    gqa_cutlass.check_overflow(step.q.device)
    step.check_memory()
    check_lse(step, lse)
    assert step.errors(out).share <= 1


@pytest.mark.parametrize(
    ("kind", "rotary_dim", "wide", "interleaved"),
    diagonal(["tma", "tensorop", "simt"], [64, 48, 16, 32], [True, False], [True, True, False]),
)
def test_rotations_of_all_dims_and_some(
    kind: str, rotary_dim: int, wide: bool, interleaved: bool, device: str
) -> None:
    """By tables of two types, whose rows lie apart; neighbours turn together, or halves."""
    config = config_of(kind, "rotary")
    skip_unless_it_runs(config, device)
    step = step_for(config, device)
    step.turning = tables(step, rotary_dim, wide, interleaved)
    hold(step, config)


@pytest.mark.parametrize(
    ("kind", "side", "plus_one"),
    diagonal(["tma", "tensorop", "simt"], ["both", "q", "k"], [True, False]),
)
def test_norms_of_queries_and_of_keys(kind: str, side: str, plus_one: bool, device: str) -> None:
    """Of both, or one; weights count as they are, or one more."""
    config = config_of(kind, "norm")
    skip_unless_it_runs(config, device)
    step = step_for(config, device)
    none = {"q": {"k_norm_weight": None}, "k": {"q_norm_weight": None}, "both": {}}[side]
    step.turning = replace(step.turning.normed(step.q), norm_plus_one=plus_one, **none)  # type: ignore[arg-type]
    hold(step, config)


def test_norms_of_zeros_and_of_huge_rows_are_numbers(device: str) -> None:
    step = step_for(config_of("tensorop", "norm"), device)
    assert step.k is not None
    step.turning = replace(step.turning.normed(step.q), norm_eps=1e-6)
    step.q[0], step.k[0] = 0, 0
    step.q[1], step.k[1] = 60000, -60000
    hold(step)


@every_schedule
def test_positions_that_are_not_lengths(kind: str, device: str) -> None:
    """A sequence that lost its first tokens goes on from where it was."""
    config = config_of(kind, "rotary")
    skip_unless_it_runs(config, device)
    step = step_for(config, device)
    places = torch.tensor([90, 5, 103], dtype=torch.int32, device=device)
    step.turning = replace(tables(step, 64), rotary_seqlens=places)
    hold(step, config)


@pytest.mark.parametrize(
    ("causal", "window"), [(True, (-1, -1)), (False, (-1, -1)), (False, (9, 2))]
)
def test_queries_have_positions_of_their_own_or_that_of_the_first(
    causal: bool, window: tuple[int, int], device: str
) -> None:
    step = step_for(config_of("tensorop", "rotary"), device, [30, 7])
    take_tokens(step, 5)
    step.causal, step.window_size = causal, window
    step.turning = tables(step, 64).normed(step.q)
    hold(step)


@every_schedule
def test_positions_that_the_tables_lack_spoil_their_sequence(kind: str, device: str) -> None:
    """Of the last of several new tokens, or before the first: nothing is written."""
    config = config_of(kind, "rotary and tokens")
    skip_unless_it_runs(config, device)
    step = step_for(config, device, [30, 60, 20])
    take_tokens(step, 3)
    step.turning = tables(step, 64)
    cos, sin = step.turning.rotary_cos, step.turning.rotary_sin
    assert cos is not None and sin is not None
    expected = step.reference()[0]
    short = {"rotary_cos": cos[:60], "rotary_sin": sin[:60]}  # as far as the first two tokens
    negative = {"rotary_seqlens": step.seqlens.clone()}
    negative["rotary_seqlens"][1] = -1
    for changes in (short, negative):
        snapshot(step)
        plan = gqa_cutlass.plan(
            *step.tensors(), cache_seqlens=step.seqlens, return_lse=True, kernel=config,
            **step.features() | changes,
        )  # fmt: skip
        out, lse = plan(*step.tensors(), step.seqlens)
        with pytest.raises(CacheOverflowError, match=r"cache_seqlens\[1\] .*lack its positions"):
            gqa_cutlass.check_overflow(device)
        assert out[1].isnan().all() and lse[1].isnan().all()
        step.check_memory(rejected=(1,))
        for right in (0, 2):
            assert (out[right].double() - expected[right]).abs().max() < 4e-2
        for name in ("k_cache", "v_cache"):
            getattr(step, name).copy_(step.before[name])


def test_a_length_beyond_the_tables_is_refused_before_the_launch(device: str) -> None:
    step = step_for(config_of("tensorop", "rotary"), device, [37])
    step.turning = tables(step, 64)
    asked = step.features()
    for name in ("rotary_cos", "rotary_sin"):
        asked[name] = asked[name][:37]
    plan = gqa_cutlass.plan(*step.tensors(), cache_seqlens=36, **asked)
    for refused in (
        lambda: gqa_cutlass.gqa_decode(*step.tensors(), cache_seqlens=37, **asked),
        lambda: plan(*step.tensors(), 37),
    ):
        with pytest.raises(InputError, match="cache_seqlens: got 37; allowed: at most 36, for wh"):
            refused()
    step.check_memory(rejected=(0,))
    asked["rotary_seqlens"] = torch.tensor([36], dtype=torch.int32, device=device)
    gqa_cutlass.gqa_decode(*step.tensors(), cache_seqlens=37, **asked)
    gqa_cutlass.check_overflow(device)


def test_the_reference_turns_as_complex_numbers_do() -> None:
    """Against formulas that share nothing with it."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 2, 32, generator=generator, dtype=torch.float64)
    angles = torch.rand(9, 8, generator=generator, dtype=torch.float64) * 6
    places = torch.tensor([4, 0, 8])
    turn = torch.polar(torch.ones_like(angles), angles)[places].unsqueeze(1)
    rotated = torch.view_as_real(torch.view_as_complex(x[..., :16].view(3, 2, 8, 2)) * turn)
    expected = torch.cat([rotated.flatten(-2), x[..., 16:]], dim=-1)
    found = turned(x, places, cos=angles.cos(), sin=angles.sin(), interleaved=True)
    torch.testing.assert_close(found, expected)
    halves = torch.cat([x[..., :16:2], x[..., 1:16:2], x[..., 16:]], dim=-1)
    apart = turned(halves, places, cos=angles.cos(), sin=angles.sin())
    torch.testing.assert_close(apart[..., :8], expected[..., :16:2])
    torch.testing.assert_close(apart[..., 8:16], expected[..., 1:16:2])
    weight = torch.rand(32, generator=generator)
    normed = turned(x, places, weight=weight, eps=0.1, plus_one=True)
    theirs = torch.nn.functional.rms_norm(x, (32,), weight.double() + 1, eps=0.1)
    torch.testing.assert_close(normed, theirs)
