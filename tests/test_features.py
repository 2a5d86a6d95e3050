"""Features of a call, one row each: right on every schedule and math, alone and with the others,
refused where they are wrong, and without effect where they are off."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import Edge, Step, edges_of, make_step, snapshot
from helpers import check, remodelled, run, share_of_step, skip_unless_it_runs
from torch import Tensor

import gqa_cutlass
from gqa_cutlass import gqa_decode
from gqa_cutlass.codegen import DType, KernelConfig, Math, Schedule, default_config
from gqa_cutlass.codegen.schema.policies import named
from gqa_cutlass.errors import CacheOverflowError, InputError

CAP, SINK = named("SoftCapped"), named("SinkInSum")
# A cap so low that it bends most scores; sinks as heavy as all keys together, or as none of them.
FEATURES: dict[str, dict[str, Any]] = {
    "softcap": {"softcap": 1.5},
    "sinks": {"sinks": torch.float32},
    "softcap and sinks": {"softcap": 1.5, "sinks": torch.bfloat16},
}
POLICIES = {"softcap": (CAP,), "sinks": (SINK,), "softcap and sinks": (CAP, SINK)}
KINDS = {
    "tensorop": (Math.TENSOROP, DType.F16, 8, Schedule.MULTISTAGE),
    "simt": (Math.SIMT, DType.F16, 1, Schedule.MULTISTAGE),
    "tma": (Math.TENSOROP, DType.BF16, 8, Schedule.TMA),
}
ALL = "softcap and sinks"
FEW = {
    "splits": Edge(lengths=(300, 37, 0), capacity=512, splits=2),
    "attend only": Edge(lengths=(37, 0), capacity=64, append=False),
}
every_feature = pytest.mark.parametrize("feature", FEATURES)


def kernel_of(kind: str, feature: str) -> KernelConfig:
    math_, dtype, width, schedule = KINDS[kind]
    return default_config(math_, dtype, 64, 4, width, schedule, POLICIES[feature])


def with_feature(step: Step, feature: str) -> Step:
    """The step, asking for a feature."""
    wanted = FEATURES[feature]
    step.softcap = wanted.get("softcap", 0.0)
    if "sinks" in wanted:
        heads = step.q.shape[1]
        sinks = torch.linspace(-2, 7, heads, dtype=torch.float32, device=step.q.device)
        step.sinks = sinks.to(wanted["sinks"])
    return step


def step_of(feature: str, **problem: Any) -> Step:
    return with_feature(make_step(**problem), feature)


@every_feature
@pytest.mark.parametrize("kind", KINDS)
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


@every_feature
@pytest.mark.parametrize("sizes", ["d40_g2", "d128_g32"])
def test_odd_rows_and_several_head_blocks(feature: str, sizes: str, device: str) -> None:
    head_dim, group_size = (int(word[1:]) for word in sizes.split("_"))
    step = step_of(
        feature, lengths=[70, 3], max_seq_len=100, head_dim=head_dim, group_size=group_size,
        device=device,
    )  # fmt: skip
    check(step, run(step))


@every_feature
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


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sign", [1, -1], ids=["huge", "hugely-negative"])
def test_extreme_logits_are_capped(kind: str, sign: int, device: str) -> None:
    config = kernel_of(kind, "softcap")
    skip_unless_it_runs(config, device)
    step = Edge(lengths=(37,), capacity=64).step(config, device)
    step.softcap = 50.0
    step.q.fill_(64)
    step.k_cache.fill_(64 * sign)
    step.k.fill_(64 * sign)
    snapshot(step)
    plan = gqa_cutlass.plan(
        *step.tensors(), cache_seqlens=step.seqlens, return_lse=True, kernel=config, softcap=50.0
    )
    out, lse = plan(*step.tensors(), step.seqlens)
    torch.testing.assert_close(
        lse, torch.full_like(lse, 50 * sign + math.log(38)), rtol=2e-6, atol=0
    )
    assert step.errors(out).share <= 1  # the mean of the values


@pytest.mark.parametrize("cap", [1e-3, 30.0, 50.0, 1e5])
def test_caps_leave_the_lse_as_exact_as_it_was(cap: float, device: str) -> None:
    """Of scores around the cap and far below it."""
    step = make_step(lengths=[37], max_seq_len=64, head_dim=64, device=device)
    step.q.mul_(8)
    step.softcap = cap
    out, lse = run(step, return_lse=True)
    torch.testing.assert_close(lse.double(), step.reference()[1], atol=2e-5, rtol=2e-6)
    assert step.errors(out).share <= 1


@pytest.mark.parametrize("kind", KINDS)
def test_with_nothing_to_attend_to_only_the_sink_is_left(kind: str, device: str) -> None:
    config = kernel_of(kind, "sinks")
    skip_unless_it_runs(config, device)
    edge = Edge(lengths=(0,), capacity=64, splits=2, append=False)
    step = with_feature(edge.step(config, device), "sinks")
    plan = gqa_cutlass.plan(
        *step.tensors(), cache_seqlens=step.seqlens, return_lse=True, kernel=config, num_splits=2,
        **step.features(),
    )  # fmt: skip
    out, lse = plan(*step.tensors(), step.seqlens)
    assert (out == 0).all()
    torch.testing.assert_close(lse[0], step.sinks, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("value", [-math.inf, -1e4, 1e4, math.nan])
def test_extreme_sinks(value: float, device: str) -> None:
    step = make_step(lengths=[37, 0], max_seq_len=64, head_dim=64, append=False, device=device)
    plain, plain_lse = run(step, return_lse=True)
    step.sinks = torch.full((8,), value, device=device)
    out, lse = run(step, return_lse=True)
    if math.isnan(value):
        assert out.isnan().all() and lse.isnan().all()
    elif value > 0:
        assert (out == 0).all()
        torch.testing.assert_close(lse, torch.full_like(lse, value))
    else:
        assert torch.equal(out, plain) and torch.equal(lse[0], plain_lse[0])
        torch.testing.assert_close(lse[1], step.sinks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("element", DType)
def test_sinks_of_every_type_with_queries_of_every_type(
    element: DType, dtype: torch.dtype, device: str
) -> None:
    step = make_step(
        dtype=element, lengths=[37], max_seq_len=64, head_dim=64, num_kv_heads=4, device=device
    )
    step.sinks = torch.linspace(-1, 5, 16, dtype=torch.float32, device=device).to(dtype)
    out, lse = run(step, return_lse=True)
    torch.testing.assert_close(lse.double(), step.reference()[1], atol=2e-5, rtol=2e-6)
    check(step, out)


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
    ]  # fmt: skip
    for _ in range(2):  # the second time from the plans that are kept
        for row in rows:
            step.softcap, step.sinks = row.get("softcap", 0.0), row.get("sinks")
            check(step, run(step))


def test_sinks_that_change_in_place_count_as_they_are(device: str) -> None:
    step = step_of("sinks", lengths=[37], max_seq_len=64, head_dim=64, append=False, device=device)
    for _ in range(2):
        check(step, run(step))
        step.sinks.add_(1)


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


@pytest.mark.parametrize("feature", ["softcap", "sinks"])
def test_explain_names_the_kernel_that_has_it(feature: str) -> None:
    step = step_of(feature, lengths=[37], max_seq_len=64, head_dim=64, device="cpu")
    found = gqa_cutlass.explain(*step.tensors(), **step.features()).dispatch.config
    assert found.policies == POLICIES[feature]
    assert KernelConfig.from_name(found.name) == found


def test_off_is_the_kernel_without() -> None:
    step = make_step(lengths=[37], max_seq_len=64, head_dim=64, device="cpu")
    off = gqa_cutlass.explain(*step.tensors(), softcap=0, sinks=None).dispatch.config
    assert off == gqa_cutlass.explain(*step.tensors()).dispatch.config and not off.policies


@pytest.mark.parametrize("kernel", [(), (CAP,)], ids=["without", "with"])
def test_a_kernel_given_by_hand_must_have_what_is_asked_for(kernel: tuple[Any, ...]) -> None:
    step = make_step(lengths=[37], max_seq_len=64, head_dim=64, device="cpu")
    config = default_config(Math.TENSOROP, DType.F16, 64, 4, 8, policies=kernel)
    softcap = 0.0 if kernel else 1.0
    wanted = "no feature" if kernel else "softcap"
    with pytest.raises(InputError, match=f"kernels with what the call asks for: {wanted}"):
        gqa_cutlass.plan(*step.tensors(), cache_seqlens=37, kernel=config, softcap=softcap)


BAD: dict[str, tuple[Callable[[Step], dict[str, Any]], str]] = {
    "a negative cap": (lambda s: {"softcap": -1.0}, "softcap: got -1.0; allowed: 0"),
    "no number": (lambda s: {"softcap": math.nan}, "softcap: got nan"),
    "an endless cap": (lambda s: {"softcap": math.inf}, "softcap: got inf"),
    "a cap that underflows": (lambda s: {"softcap": 1e-42}, "softcap: got 1e-42; allowed: .* more"),
    "a cap as text": (lambda s: {"softcap": "50"}, "softcap: got '50'"),
    "a list for a cap": (lambda s: {"softcap": [50.0]}, r"softcap: got \[50.0\]"),
    "a truth for a cap": (lambda s: {"softcap": True}, "softcap: got True"),
    "too few sinks": (lambda s: {"sinks": s.q.new_zeros(4)}, r"sinks: got shape \[4\]"),
    "sinks per sequence": (lambda s: {"sinks": s.q.new_zeros(1, 8)}, r"sinks: got shape \[1, 8\]"),
    "sinks in double": (lambda s: {"sinks": s.q.new_zeros(8).double()}, "sinks: got torch.float64"),
    "sinks elsewhere": (lambda s: {"sinks": s.q.new_zeros(8).to("meta")}, "sinks: got .* on meta"),
    "sinks apart": (lambda s: {"sinks": s.q.new_zeros(16)[::2]}, r"sinks: got strides \[2\]"),
    "sinks in a list": (lambda s: {"sinks": [0.0] * 8}, "sinks: got a list"),
    "sinks that learn": (lambda s: {"sinks": s.q.new_zeros(8).requires_grad_()}, "sinks: .* grad"),
    "out in the sinks": (lambda s: {"sinks": s.out[0, 0, :8]}, "out: got memory that sinks also"),
    "sinks in the cache": (
        lambda s: {"sinks": s.k_cache[0, 37, 0, :8]}, "sinks: got memory of k_cache, to which this"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_features_launch_nothing_and_write_nothing(name: str, device: str) -> None:
    step = make_step(lengths=[37], max_seq_len=64, head_dim=64, device=device)
    options, message = BAD[name]
    with pytest.raises(InputError, match=message):
        gqa_decode(*step.tensors(), cache_seqlens=37, out=step.out, **options(step))
    with pytest.raises(InputError, match=message):
        plan = gqa_cutlass.plan(*step.tensors(), cache_seqlens=37, out=step.out, **options(step))
        plan(*step.tensors(), 37, step.out)
    assert step.out.isnan().all()
    step.check_memory(rejected=(0,))


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
