"""Features of a call: right on every schedule and math, alone and with others."""

from __future__ import annotations

import math
from itertools import cycle, product
from typing import Any

import pytest
import torch
from cases import make_step
from edges import edges_of
from featured import (
    ALL,
    ALL_IN_8_BITS,
    ALL_OF_TOKENS,
    FEW,
    KINDS,
    OWN,
    PAIRS,
    POLICIES,
    kernel_of,
    policies_of,
    step_of,
    with_feature,
)
from helpers import THOROUGH, check, remodelled, run, share_of_step, skip_unless_it_runs
from torch import Tensor

import gqa_cutlass
from gqa_cutlass import gqa_decode
from gqa_cutlass.codegen import KernelConfig
from gqa_cutlass.errors import CacheOverflowError

PROCESS = "features"  # has all tests of this folder, for they have kernels in common


@pytest.mark.sanitized
@pytest.mark.parametrize(
    ("feature", "kind"),
    [
        pytest.param(*pair, marks=() if pair[0] in OWN[pair[1]] else THOROUGH)
        for pair in product((*POLICIES, ALL, ALL_IN_8_BITS, *ALL_OF_TOKENS), KINDS)
    ],
)
def test_every_schedule_and_math_matches_the_reference(
    kind: str, feature: str, device: str
) -> None:
    """All edges of a kernel with everything, a few of one with a single feature."""
    config = kernel_of(kind, feature)
    skip_unless_it_runs(config, device)
    edges = edges_of(config) if feature == ALL else FEW
    for name, edge in edges.items():
        step = with_feature(edge.step(config, device), feature)
        assert share_of_step(edge, config, step) <= 1, name


@pytest.mark.parametrize(
    ("feature", "kind"),
    [
        pytest.param(*pair, id=" ".join(pair), marks=THOROUGH)
        for pair in zip(PAIRS, cycle(KINDS), strict=False)
    ],
)
def test_every_pair_matches_the_reference(feature: str, kind: str, device: str) -> None:
    """Each on one of the kinds of kernels. CI has each feature alone, and all at once."""
    config = kernel_of(kind, feature)
    skip_unless_it_runs(config, device)
    for name, edge in FEW.items():
        step = with_feature(edge.step(config, device), feature)
        assert share_of_step(edge, config, step) <= 1, name


@pytest.mark.parametrize("sizes", ["d40_g2", "d128_g32"])
@pytest.mark.parametrize(
    "feature",
    [ALL_IN_8_BITS, ALL_OF_TOKENS[0], *(pytest.param(n, marks=THOROUGH) for n in (ALL, *POLICIES))],
)
def test_odd_rows_and_several_head_blocks(feature: str, sizes: str, device: str) -> None:
    head_dim, group_size = (int(word[1:]) for word in sizes.split("_"))
    step = step_of(
        feature, lengths=[70, 3], max_seq_len=100, head_dim=head_dim, group_size=group_size,
        device=device,
    )  # fmt: skip
    check(step, run(step))


@pytest.mark.sanitized
@pytest.mark.parametrize(
    "feature",
    [ALL, ALL_OF_TOKENS[0], *(pytest.param(name, marks=THOROUGH) for name in POLICIES)],
)
def test_ragged_batches_that_are_dealt_out_by_length(feature: str, device: str) -> None:
    """What is long is lowered to what ptxsim can take."""
    step = step_of(
        feature, lengths=[300, 3, 0, 17], max_seq_len=512, num_kv_heads=1, head_dim=64,
        device=device,
    )  # fmt: skip
    with remodelled(balanced_tokens=1, tma_heads=0):
        plan = gqa_cutlass.plan(*step.tensors(), cache_seqlens=step.seqlens, **step.features())
    assert plan.dispatch.balanced
    check(step, plan(*step.tensors(), step.seqlens))


def test_a_sequence_that_overflows_is_nan_sink_or_not(device: str) -> None:
    step = step_of("softcap and sinks", lengths=[40, 5], max_seq_len=64, head_dim=64, device=device)
    step.seqlens[0] = 64
    out, lse = run(step, return_lse=True)
    with pytest.raises(CacheOverflowError):
        gqa_cutlass.check_overflow(device)
    assert out[0].isnan().all() and lse[0].isnan().all() and not out[1].isnan().any()


def test_calls_that_differ_in_their_features_alone_have_plans_of_their_own(device: str) -> None:
    step = make_step(lengths=[37], max_seq_len=64, head_dim=64, append=False, device=device)
    rows: list[dict[str, Any]] = [
        {}, {"softcap": 1.0}, {"softcap": 2.0}, {"sinks": torch.zeros(8, device=device)},
        {"sinks": torch.full((8,), 3.0, device=device)},
        {"sinks": torch.zeros(8, device=device, dtype=torch.bfloat16), "softcap": 1},
        {"window_size": (1, 0)}, {"window_size": [4, 0]},
        {"alibi_slopes": torch.zeros(8, device=device)},
        {"alibi_slopes": torch.ones(1, 8, device=device)},
    ]  # fmt: skip
    for _ in range(2):  # the second time from the plans that are kept
        for row in rows:
            step.softcap, step.sinks = row.get("softcap", 0.0), row.get("sinks")
            step.window_size = row.get("window_size", (-1, -1))
            step.alibi_slopes = row.get("alibi_slopes")
            check(step, run(step))


def test_a_cache_decodes_with_features(device: str) -> None:
    cache = gqa_cutlass.KVCache(1, 64, 2, 64, torch.float16, device)
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(1, n, 64, generator=generator).half().to(device) for n in (8, 2, 2)]
    sinks = torch.linspace(-1, 1, 8, device=device)
    out = cache.decode(*rows, softcap=1.0, sinks=sinks)
    plain = gqa_decode(
        *rows[:1], cache.k, cache.v, cache_seqlens=1, softcap=1.0, sinks=sinks, num_splits=1
    )
    torch.testing.assert_close(out, plain)
    exact = cache.decode(rows[0], softcap=1.0, sinks=sinks, out_dtype=torch.float32)
    assert exact.dtype == torch.float32 and torch.equal(exact.half(), plain)


@pytest.mark.parametrize("feature", POLICIES)
def test_explain_names_the_kernel_that_has_it(feature: str) -> None:
    step = step_of(feature, lengths=[37], max_seq_len=64, head_dim=64, device="cpu")
    found = gqa_cutlass.explain(*step.tensors(), **step.features()).dispatch.config
    assert found.policies == policies_of(feature)
    assert KernelConfig.from_name(found.name) == found


def test_off_is_the_kernel_without() -> None:
    step = make_step(lengths=[37], max_seq_len=64, head_dim=64, device="cpu")
    off = gqa_cutlass.explain(*step.tensors(), softcap=0, sinks=None).dispatch.config
    assert off == gqa_cutlass.explain(*step.tensors()).dispatch.config and not off.policies


def test_reference_of_a_capped_step_is_that_of_its_capped_scores() -> None:
    """The reference itself, against a formula that shares nothing with it."""
    step = step_of("softcap and sinks", lengths=[3], max_seq_len=4, head_dim=32, num_kv_heads=1,
                   group_size=1, append=False, device="cpu")  # fmt: skip
    q, keys = step.q[0, 0].double(), step.k_cache[0, :3, 0].double()
    capped = [1.5 * math.tanh(float(q @ key) * 32**-0.5 / 1.5) for key in keys]
    total = sum(map(math.exp, capped)) + math.exp(float(step.sinks[0]))
    expected: Tensor = sum(
        math.exp(s) / total * step.v_cache[0, i, 0].double() for i, s in enumerate(capped)
    )
    out, lse = step.reference()
    torch.testing.assert_close(out[0, 0], expected)
    assert float(lse) == pytest.approx(math.log(total))
