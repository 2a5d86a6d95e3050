"""Features of a call, one row each: right on every schedule and math, alone and with the others,
refused where they are wrong, and without effect where they are off."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import combinations, cycle, product
from typing import Any

import pytest
import torch
from cases import Edge, Step, edges_of, make_step, snapshot
from helpers import (
    THOROUGH,
    check,
    diagonal,
    remodelled,
    run,
    share_of_step,
    skip_unless_it_runs,
)
from torch import Tensor

import gqa_cutlass
from gqa_cutlass import gqa_decode
from gqa_cutlass.codegen import DType, KernelConfig, Math, Schedule, default_config
from gqa_cutlass.codegen.schema.policies import Policy, named, special
from gqa_cutlass.errors import CacheOverflowError, InputError
from gqa_cutlass.ptxsim.report import global_bytes
from gqa_cutlass.ptxsim.stats import Stats

CAP, SINK, WINDOW = named("SoftCapped"), named("SinkInSum"), named("SlidingWindow")
POLICIES = {
    "softcap": CAP, "sinks": SINK, "window": WINDOW, "alibi": named("Alibi"),
    "leftpad": named("LeftPadded"), "index": named("IndexedRow"), "float32": named("InFloat32"),
}  # fmt: skip
NAMES = list(POLICIES)
# As few as have every feature.
DISJOINT = [(NAMES[i], NAMES[i + len(NAMES) // 2]) for i in range((len(NAMES) + 1) // 2)]
PAIRS = [" and ".join(p) for p in dict.fromkeys([*DISJOINT, *combinations(NAMES, 2)])]
ALL = " and ".join(POLICIES)
KINDS = {
    "tensorop": (Math.TENSOROP, DType.F16, 8, Schedule.MULTISTAGE),
    "simt": (Math.SIMT, DType.F16, 1, Schedule.MULTISTAGE),
    "tma": (Math.TENSOROP, DType.BF16, 8, Schedule.TMA),
}
FEW = {
    "splits": Edge(lengths=(300, 37, 0), capacity=512, splits=2),
    "attend only": Edge(lengths=(37, 0), capacity=64, append=False),
}
# Where CI has the general test of a single feature; that of all together it has on every kind.
HOME = dict.fromkeys(POLICIES, "tma") | {"window": "simt", "leftpad": "tensorop"}
PROCESS = "features"  # has all tests here, for they have kernels in common
every_feature = pytest.mark.parametrize("feature", [*POLICIES, ALL])
# Multistage is the same for CUDA cores but for its arithmetic, so that CI leaves those out.
every_schedule = pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=THOROUGH if k == "simt" else ()) for k in KINDS]
)


def policies_of(feature: str) -> tuple[Policy, ...]:
    return special(tuple(POLICIES[name] for name in feature.split(" and ")))


def kernel_of(kind: str, feature: str) -> KernelConfig:
    math_, dtype, width, schedule = KINDS[kind]
    return default_config(math_, dtype, 64, 4, width, schedule, policies_of(feature))


def with_feature(step: Step, feature: str) -> Step:
    """The step, asking for a feature."""
    for name in feature.split(" and "):
        FEATURES[name](step)
    snapshot(step)
    return step


def add_cap(step: Step) -> None:
    """So low that it bends most scores."""
    step.softcap = 1.5


def add_sinks(step: Step) -> None:
    """As heavy as all keys together, or as none of them; of another type in every size."""
    heads = step.q.shape[1]
    sinks = torch.linspace(-2, 7, heads, dtype=torch.float32, device=step.q.device)
    step.sinks = sinks.to((torch.float32, torch.bfloat16)[step.q.shape[0] % 2])


def add_window(step: Step, window: int = 19) -> None:
    """That begins and ends within tiles; what it hides is not to be used, nor its NaN."""
    step.window_size = (window - 1, 0)
    for b, length in enumerate(step.lengths):
        hidden = max(0, length + (step.k is not None) - window)
        step.k_cache[b, :hidden] = step.v_cache[b, :hidden] = math.nan


def add_slopes(step: Step) -> None:
    """From heads that see all to heads that see few; of each sequence its own, or for all."""
    batch, heads, _ = step.q.shape
    slopes = torch.linspace(-0.01, 0.7, batch * heads, device=step.q.device).view(batch, heads)
    step.alibi_slopes = slopes if batch % 2 else slopes[0].contiguous()


def add_padding(step: Step, *rows: int) -> None:
    """Within a tile, none, and all that there is; what it holds is not to be used, nor its NaN."""
    numbers = rows or [(21, 0, 3, 40)[b % 4] for b in range(len(step.lengths))]
    step.cache_leftpad = torch.tensor(numbers, dtype=torch.int32, device=step.q.device)
    for b, length in enumerate(step.lengths):
        hidden = min(max(numbers[b], 0), length)
        step.k_cache[step.row(b), :hidden] = step.v_cache[step.row(b), :hidden] = math.nan


def add_index(step: Step, spare: int = 2) -> None:
    """Backwards, into caches of more rows, which hold NaN where nothing is."""
    batch = len(step.lengths)
    for name in ("k_cache", "v_cache"):
        cache = getattr(step, name)
        rows = torch.full_like(cache[:1], math.nan).expand(spare, -1, -1, -1)
        setattr(step, name, torch.cat([rows, cache.flip(0)]))
    order = range(spare + batch - 1, spare - 1, -1)
    step.cache_batch_idx = torch.tensor(list(order), dtype=torch.int32, device=step.q.device)


FEATURES: dict[str, Callable[[Step], None]] = {
    "softcap": add_cap, "sinks": add_sinks, "window": add_window,
    "alibi": add_slopes,
    "leftpad": add_padding,
    "index": add_index,
    "float32": Step.in_float32,
}  # fmt: skip


def step_of(feature: str, **problem: Any) -> Step:
    return with_feature(make_step(**problem), feature)


@pytest.mark.parametrize(
    ("feature", "kind"),
    [
        pytest.param(*pair, marks=() if HOME.get(pair[0], pair[1]) == pair[1] else THOROUGH)
        for pair in product((*POLICIES, ALL), KINDS)
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
        pytest.param(*pair, id=" ".join(pair), marks=THOROUGH if i >= len(DISJOINT) else ())
        for i, pair in enumerate(zip(PAIRS, cycle(KINDS), strict=False))
    ],
)
def test_every_pair_matches_the_reference(feature: str, kind: str, device: str) -> None:
    """Each on one of the kinds of kernels. CI takes every feature and every kind once."""
    config = kernel_of(kind, feature)
    skip_unless_it_runs(config, device)
    for name, edge in FEW.items():
        step = with_feature(edge.step(config, device), feature)
        assert share_of_step(edge, config, step) <= 1, name


@pytest.mark.parametrize("sizes", ["d40_g2", "d128_g32"])
@pytest.mark.parametrize(
    "feature", [ALL, *(pytest.param(name, marks=THOROUGH) for name in POLICIES)]
)
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


@pytest.mark.parametrize(("kind", "append"), diagonal(KINDS, [True, False]))
def test_windows_of_every_size(kind: str, append: bool, device: str) -> None:
    """They begin and end at, before and behind the edges of tiles, and what they hide is NaN."""
    config = kernel_of(kind, "window")
    skip_unless_it_runs(config, device)
    tile = config.block_n
    for window in (1, tile - 1, tile, tile + 1, 3 * tile):
        lengths = [4 * tile - 2, 4 * tile - 1, 4 * tile, window - 1, window, 0]
        step = make_step(
            dtype=config.dtype, lengths=lengths, max_seq_len=6 * tile, head_dim=64, num_kv_heads=1,
            vec_width=config.vec_width, append=append, device=device,
        )  # fmt: skip
        add_window(step, window)
        snapshot(step)
        plan = gqa_cutlass.plan(
            *step.tensors(), cache_seqlens=step.seqlens, return_lse=True, kernel=config,
            num_splits=2, **step.features(),
        )  # fmt: skip
        out, lse = plan(*step.tensors(), step.seqlens)
        check(step, out)
        torch.testing.assert_close(lse.double(), step.reference()[1], atol=2e-5, rtol=2e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_window_that_is_walked_in_one_block_and_in_a_cluster(kind: str, device: str) -> None:
    """More tiles than warps, so that slots which were cleared are filled again."""
    config = kernel_of(kind, "window")
    skip_unless_it_runs(config, device)
    block = config.block_n * config.num_warps
    for splits, by_value in ((1, True), (2, False)):
        edge = Edge(
            lengths=(3 * block + 5,), capacity=3 * block + 9, splits=splits, stages=1,
            by_value=by_value,
        )  # fmt: skip
        step = edge.step(config, device)
        add_window(step, 2 * block + 7)
        snapshot(step)
        assert share_of_step(edge, config, step) <= 1


@pytest.mark.parametrize("kind", KINDS)
def test_tiles_outside_of_a_window_are_not_read(kind: str) -> None:
    """As many bytes as a cache that holds no more than the window, and an edge of a tile."""
    window = 64
    read = []
    # The newest token is appended.
    for feature, length, room in (("window", 500, 512), ("softcap", window, window)):
        step = make_step(
            dtype=KINDS[kind][1], lengths=[length - 1] * 2, max_seq_len=room, head_dim=64,
            vec_width=KINDS[kind][2], num_kv_heads=1, device="cpu",
        )  # fmt: skip
        if feature == "window":
            add_window(step, window)
        else:
            step.softcap = 1.5
        config = kernel_of(kind, feature)
        plan: Any = gqa_cutlass.plan(
            *step.tensors(), cache_seqlens=step.seqlens, kernel=config, num_splits=1,
            **step.features(),
        )  # fmt: skip
        plan.kernel.stats = Stats(len(plan.kernel.program.code))
        plan(*step.tensors(), step.seqlens)
        read.append(global_bytes(plan.kernel.stats)[0])
    assert read[0] <= read[1] + 2 * config.tile_bytes  # of two sequences


@pytest.mark.parametrize("append", [True, False], ids=["append", "attend"])
def test_windows_that_hide_nothing_are_none(append: bool) -> None:
    step = make_step(lengths=[37], max_seq_len=64, head_dim=64, append=append, device="cpu")
    plain = gqa_cutlass.explain(*step.tensors()).dispatch
    for none in ((-1, -1), [-1, 0], (63, 0), (64, -1), (2**40, 7)):
        assert gqa_cutlass.explain(*step.tensors(), window_size=none).dispatch == plain
    found = gqa_cutlass.explain(*step.tensors(), window_size=(62, 0)).dispatch
    assert found.config.policies == (WINDOW,) and not found.prefetch_first_tile


def test_the_right_side_of_a_window_makes_no_difference(device: str) -> None:
    step = step_of("window", lengths=[37], max_seq_len=64, head_dim=64, append=False, device=device)
    for right in (-1, 0, 5):
        step.window_size = (step.window_size[0], right)
        check(step, run(step))


def meta_step(max_seq_len: int) -> tuple[Tensor, ...]:
    """Llama-3's tensors, without memory."""
    q = torch.empty(1, 32, 128, dtype=torch.float16, device="meta")
    cache, row = (
        torch.empty(1, *n, 8, 128, dtype=q.dtype, device="meta") for n in ((max_seq_len,), ())
    )
    return q, cache, cache, row, row


def test_launches_are_as_large_as_the_window_and_not_as_the_cache() -> None:
    windowed = gqa_cutlass.explain(*meta_step(131072), window_size=(1023, 0))
    small = gqa_cutlass.explain(*meta_step(1024))
    assert windowed.kv_bytes == small.kv_bytes
    assert windowed.dispatch.shape.grid == small.dispatch.shape.grid
    assert windowed.dispatch.config.schedule is small.dispatch.config.schedule
    assert "a window of 1024 of at most 131072 tokens" in str(windowed)


@pytest.mark.parametrize(("kind", "sign"), diagonal(KINDS, [1, -1]))
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


@every_schedule
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
    torch.testing.assert_close(lse[0], step.sinks.float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("kind", "append"), diagonal(KINDS, [True, False]))
def test_padding_of_every_size(kind: str, append: bool, device: str) -> None:
    """It ends at, before and behind the edges of tiles, and of the sequence."""
    config = kernel_of(kind, "leftpad")
    skip_unless_it_runs(config, device)
    tile = config.block_n
    length = 3 * tile + 5
    sizes = [
        0,
        1,
        tile - 1,
        tile,
        tile + 1,
        length - 1,
        length,
        length + 1,
        2**31 - 1,
        -7,
        -(2**31),
    ]
    for splits in (1, 3):
        step = make_step(
            dtype=config.dtype, lengths=[length] * len(sizes), max_seq_len=4 * tile, head_dim=64,
            num_kv_heads=1, vec_width=config.vec_width, append=append, device=device,
        )  # fmt: skip
        add_padding(step, *sizes)
        snapshot(step)
        plan = gqa_cutlass.plan(
            *step.tensors(), cache_seqlens=step.seqlens, return_lse=True, kernel=config,
            num_splits=splits, **step.features(),
        )  # fmt: skip
        out, lse = plan(*step.tensors(), step.seqlens)
        check(step, out)
        torch.testing.assert_close(lse.double(), step.reference()[1], atol=2e-5, rtol=2e-6)
        nothing = [b for b, size in enumerate(sizes) if size >= length + append]
        assert nothing and (out[nothing] == 0).all() and (lse[nothing] == -math.inf).all()


@pytest.mark.parametrize("bad", [4, 2**31 - 1, -1, -(2**31)])
@every_schedule
def test_an_index_of_no_row_spoils_only_its_sequence(kind: str, bad: int, device: str) -> None:
    """Nothing is read or written through it; that of an inactive row does not matter."""
    config = kernel_of(kind, "index")
    skip_unless_it_runs(config, device)
    step = make_step(
        dtype=config.dtype, lengths=[30, 5, 60], max_seq_len=80, head_dim=64, num_kv_heads=1,
        vec_width=config.vec_width, device=device,
    )  # fmt: skip
    add_index(step, spare=1)
    snapshot(step)
    expected = step.reference()[0]
    for length in (5, -1):
        step.cache_batch_idx[1], step.seqlens[1] = bad, length
        plan = gqa_cutlass.plan(
            *step.tensors(), cache_seqlens=step.seqlens, return_lse=True, kernel=config,
            num_splits=2, cache_batch_idx=step.cache_batch_idx,
        )  # fmt: skip
        out, lse = plan(*step.tensors(), step.seqlens)
        if length < 0:
            gqa_cutlass.check_overflow(device)
            assert (out[1] == 0).all() and (lse[1] == -math.inf).all()
        else:
            with pytest.raises(CacheOverflowError, match=r"cache_seqlens\[1\] .*cache_batch_idx"):
                gqa_cutlass.check_overflow(device)
            assert out[1].isnan().all() and lse[1].isnan().all()
        step.check_memory(rejected=(1,))
        for right in (0, 2):
            assert (out[right].double() - expected[right]).abs().max() < 4e-2


def test_sequences_may_share_a_row_that_they_only_read(device: str) -> None:
    step = make_step(
        lengths=[37, 20, 9], max_seq_len=64, head_dim=64, append=False, poison=False, device=device
    )
    step.cache_batch_idx = torch.tensor([2, 2, 0], dtype=torch.int32, device=device)
    check(step, run(step))


def test_rows_of_padded_batches_that_are_inactive(device: str) -> None:
    """With everything: as a continuous batch pads a CUDA graph, of numbers that mean nothing."""
    step = step_of(ALL, lengths=[37, 50, 20], max_seq_len=64, head_dim=64, device=device)
    step.seqlens[1] = -1
    step.cache_batch_idx[1], step.cache_leftpad[1] = -1, 99
    out, lse = run(step, return_lse=True)
    gqa_cutlass.check_overflow(device)
    assert (out[1] == 0).all()
    torch.testing.assert_close(lse[1], step.sinks.float(), rtol=1e-6, atol=1e-6)
    step.check_memory(rejected=(1,))
    expected = step.reference()[1]
    torch.testing.assert_close(lse[[0, 2]].double(), expected[[0, 2]], atol=2e-5, rtol=2e-6)


@every_schedule
def test_extreme_slopes(kind: str, device: str) -> None:
    """Steep ones leave the newest token alone; one that is no number spoils its head alone."""
    config = kernel_of(kind, "alibi")
    skip_unless_it_runs(config, device)
    step = Edge(lengths=(37,), capacity=64).step(config, device)
    step.alibi_slopes = torch.tensor([1e30, 0.0, math.nan, 1e30], device=device)
    plan = gqa_cutlass.plan(
        *step.tensors(), cache_seqlens=step.seqlens, return_lse=True, kernel=config,
        alibi_slopes=step.alibi_slopes,
    )  # fmt: skip
    out, lse = plan(*step.tensors(), step.seqlens)
    assert step.v is not None
    for head in (0, 3):
        torch.testing.assert_close(out[0, head], step.v[0, 0], rtol=1e-3, atol=1e-3)
    assert out[0, 2].isnan().all() and lse[0, 2].isnan()
    assert not out[0, [0, 1, 3]].isnan().any()


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
    exact = cache.decode(rows[0], softcap=1.0, sinks=sinks, out_dtype=torch.float32)
    assert exact.dtype == torch.float32 and torch.equal(exact.half(), plain)


@pytest.mark.parametrize("feature", POLICIES)
def test_explain_names_the_kernel_that_has_it(feature: str) -> None:
    step = step_of(feature, lengths=[37], max_seq_len=64, head_dim=64, device="cpu")
    found = gqa_cutlass.explain(*step.tensors(), **step.features()).dispatch.config
    assert found.policies == policies_of(feature)
    assert KernelConfig.from_name(found.name) == found


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_in_float32_are_those_before_they_are_rounded(kind: str, device: str) -> None:
    """In one block, in splits, and of rows aligned no better than numbers must be."""
    config = kernel_of(kind, "float32")
    skip_unless_it_runs(config, device)
    for splits in (1, 2):
        step = Edge(lengths=(300, 37, 0), capacity=512).step(config, device)
        call: dict[str, Any] = {"cache_seqlens": step.seqlens, "num_splits": splits}
        exact = gqa_cutlass.plan(*step.tensors(), **call, kernel=config, out_dtype=torch.float32)
        without = default_config(
            config.math, config.dtype, 64, 4, config.vec_width, config.schedule
        )
        rounded = gqa_cutlass.plan(*step.tensors(), **call, kernel=without)
        out = exact(*step.tensors(), step.seqlens)
        assert out.dtype == torch.float32 and not torch.equal(out, out.to(step.q.dtype).float())
        assert torch.equal(out.to(step.q.dtype), rounded(*step.tensors(), step.seqlens))


def test_out_dtype_that_of_q_is_the_kernel_without() -> None:
    step = make_step(lengths=[37], max_seq_len=64, head_dim=64, device="cpu")
    plain = gqa_cutlass.explain(*step.tensors()).dispatch
    for same in (None, torch.float16):
        assert gqa_cutlass.explain(*step.tensors(), out_dtype=same).dispatch == plain


def test_rows_of_float32_are_as_wide_as_they_are_aligned() -> None:
    """An address of 4 bytes more allows accesses of 4 bytes, two elements of the cache."""
    step = make_step(lengths=[37], max_seq_len=64, head_dim=64, device="cpu")
    memory = torch.empty(1 + 8 * 68)
    for first, stride, width in ((0, 64, 8), (0, 68, 8), (0, 66, 4), (0, 65, 2), (1, 64, 2)):
        out = memory.as_strided((1, 8, 64), (0, stride, 1), first)
        problem = gqa_cutlass.explain(*step.tensors(), out=out, out_dtype=torch.float32).problem
        assert problem.vec_width == width


@pytest.mark.parametrize("stride", [66, 65])
def test_outputs_in_float32_of_narrow_rows(stride: int, device: str) -> None:
    step = make_step(lengths=[37], max_seq_len=64, head_dim=64, device=device)
    memory = torch.full((8 * stride,), math.nan, device=device)
    out = memory.as_strided((1, 8, 64), (8 * stride, stride, 1))
    step.out_dtype = torch.float32
    run(step, out=out)
    check(step, out)
    assert memory.view(8, stride)[:, 64:].isnan().all()


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
    "one number for a window": (lambda s: {"window_size": 5}, "window_size: got 5; allowed: two"),
    "no window": (lambda s: {"window_size": None}, "window_size: got None"),
    "three numbers": (lambda s: {"window_size": (1, 2, 3)}, r"window_size: got \(1, 2, 3\)"),
    "a window below none": (lambda s: {"window_size": (-2, 0)}, r"window_size: got \(-2, 0\)"),
    "a right below none": (lambda s: {"window_size": (5, -2)}, r"window_size: got \(5, -2\)"),
    "half a window": (lambda s: {"window_size": (5.0, 0)}, r"window_size: got \(5.0, 0\)"),
    "truth for a window": (lambda s: {"window_size": (5, False)}, r"window_size: got \(5, False\)"),
    "too few slopes": (
        lambda s: {"alibi_slopes": s.q.new_zeros(4).float()}, r"alibi_slopes: got shape \[4\]"
    ),
    "slopes of more sequences": (
        lambda s: {"alibi_slopes": s.q.new_zeros(2, 8).float()},
        r"alibi_slopes: got shape \[2, 8\]; allowed: \[1, 8\]",
    ),
    "slopes in half": (lambda s: {"alibi_slopes": s.q.new_zeros(8)}, "slopes: got torch.float16"),
    "slopes elsewhere": (
        lambda s: {"alibi_slopes": s.q.new_zeros(8).float().to("meta")}, "slopes: got .* on meta"
    ),
    "slopes apart": (
        lambda s: {"alibi_slopes": s.q.new_zeros(16).float()[::2]}, r"slopes: got strides \[2\]"
    ),
    "a slope": (lambda s: {"alibi_slopes": 0.5}, "alibi_slopes: got a float"),
    "slopes that learn": (
        lambda s: {"alibi_slopes": s.q.new_zeros(8).float().requires_grad_()}, "slopes: .* grad"
    ),
    "out in the slopes": (
        lambda s: {"alibi_slopes": s.out.view(torch.float32)[0, 0, :8]},
        "out: got memory that alibi_slopes also uses",
    ),
    **{
        f"{name}: {what}": (lambda s, name=name, make=make: {name: make(s)}, f"{name}: got {said}")
        for name in ("cache_leftpad", "cache_batch_idx")
        for what, make, said in (
            ("too many", lambda s: s.seqlens.new_zeros(2), r"shape \[2\]"),
            ("long", lambda s: s.seqlens.long(), "torch.int64"),
            ("elsewhere", lambda s: s.seqlens.to("meta"), ".* on meta"),
            ("a list", lambda s: [0], "a list"),
            ("a number", lambda s: 0, "an? int"),
        )
    },
    "padding in the cache": (
        lambda s: {"cache_leftpad": s.k_cache.view(torch.int32)[0, 37, 0, :1]},
        "cache_leftpad: got memory of k_cache, to which this",
    ),
    "an output of whole numbers": (
        lambda s: {"out_dtype": torch.int32}, "out_dtype: got torch.int32; allowed: None, q's dt"
    ),
    "an output of another half": (
        lambda s: {"out_dtype": torch.bfloat16}, "out_dtype: got torch.bfloat16; allowed: None, q's"
    ),
    "a dtype by name": (lambda s: {"out_dtype": "float32"}, "out_dtype: got 'float32'; allowed"),
    "an out that is not wide": (
        lambda s: {"out_dtype": torch.float32}, "out: got torch.float16; allowed: out_dtype, torch"
    ),
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
