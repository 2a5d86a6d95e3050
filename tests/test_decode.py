"""Decode steps through the public calls, in ptxsim and on a GPU: layouts, lengths, errors."""

from __future__ import annotations

import logging
from itertools import product

import pytest
import torch
from cases import make_step, snapshot
from helpers import THOROUGH, check, diagonal, on_devices, remodelled, run

import gqa_cutlass
from gqa_cutlass import gqa_decode
from gqa_cutlass.codegen import DType
from gqa_cutlass.errors import CacheOverflowError, InputError


def finish(device: str) -> None:
    """Wait for what was launched."""
    if device == "cuda":
        torch.cuda.synchronize()


@pytest.mark.parametrize(("vec_width", "layout"), diagonal([8, 4, 2, 1], ["NHD", "HND", "padded"]))
def test_misaligned_and_strided_tensors(vec_width: int, layout: str, device: str) -> None:
    step = make_step(
        device=device, lengths=[33, 200, 0], max_seq_len=256, layout=layout, vec_width=vec_width
    )
    plan = gqa_cutlass.plan(*step.tensors(), cache_seqlens=step.seqlens)
    assert plan.dispatch.config.vec_width == vec_width
    check(step, run(step))


@pytest.mark.parametrize("vec_width", [8, 2, 1])
def test_tiny_caches_that_several_blocks_read_and_one_appends_to(
    vec_width: int, device: str
) -> None:
    """The first tile holds the row that is appended, and may be asked for before that is known."""
    for max_seq_len, on_device in product((1, 5, 33), (True, False)):
        length = min(3, max_seq_len - 1)
        step = make_step(
            device=device, lengths=[length, length], max_seq_len=max_seq_len, head_dim=32,
            group_size=33, num_kv_heads=1, vec_width=vec_width,
        )  # fmt: skip
        lengths = step.seqlens if on_device else length
        plan = gqa_cutlass.plan(*step.tensors(), cache_seqlens=lengths)
        assert plan.dispatch.config.head_blocks > 1
        check(step, plan(*step.tensors(), lengths))


# In ptxsim those that no kernel has that ships.
@pytest.mark.parametrize(
    ("device", "head_dim"),
    on_devices((32, 104, 200), range(32, 257, 8)),
)
def test_every_head_dim(head_dim: int, device: str) -> None:
    step = make_step(
        device=device, lengths=[70, 3], max_seq_len=100, head_dim=head_dim, group_size=2
    )
    check(step, run(step))


@pytest.mark.parametrize(
    ("device", "group_size"),
    on_devices((9, 15, 24, 71), (*range(1, 17), 24, 32, 48, 71)),
)
def test_every_group_size(group_size: int, device: str) -> None:
    step = make_step(
        device=device, lengths=[70, 3], max_seq_len=100, group_size=group_size, num_kv_heads=1
    )
    check(step, run(step))


def test_32_query_heads_on_one_kv_head_of_the_largest_dim(device: str) -> None:
    step = make_step(
        device=device,
        lengths=[99],
        max_seq_len=100,
        head_dim=256,
        group_size=32,
        num_kv_heads=1,
        dtype=DType.BF16,
    )
    check(step, run(step))


@pytest.mark.parametrize(
    "splits", [0, 1, 7, 300, *(pytest.param(n, marks=THOROUGH) for n in (2, 64))]
)
def test_any_number_of_splits_gives_the_answer(splits: int, device: str) -> None:
    """More than there are tiles, and more than a block has threads, with less for ptxsim to do."""
    sizes = (
        dict(lengths=[4000, 100, 0, 1], max_seq_len=4096)
        if device == "cuda"
        else dict(lengths=[700, 1], max_seq_len=1024, num_kv_heads=1)
    )
    step = make_step(device=device, **sizes)
    check(step, run(step, num_splits=splits))


@pytest.mark.parametrize(
    ("lengths", "capacity", "cluster"),
    [([1023, 40, 0], 1024, 2), ([300, 300, 300], 1024, 2), ([2000], 2048, 8), ([3], 2048, 8)],
    ids=["pairs-of-any-length", "pairs", "clusters", "clusters-of-a-short-sequence"],
)
def test_clusters_of_large_caches(
    lengths: list[int], capacity: int, cluster: int, device: str
) -> None:
    """What is large is lowered to a size that ptxsim can take."""
    step = make_step(device=device, lengths=lengths, max_seq_len=capacity)
    with remodelled(tma_mib=0, tma_blocks=12):
        plan = gqa_cutlass.plan(*step.tensors(), cache_seqlens=step.seqlens, ragged=False)
    if device == "cuda" and not plan.dispatch.config.tma:
        pytest.skip("tensor copies are for Hopper")
    assert plan.dispatch.shape.cluster == cluster < plan.dispatch.num_splits
    assert not plan.dispatch.prefetch_first_tile
    check(step, plan(*step.tensors(), step.seqlens))


@pytest.mark.parametrize("bound", [1, 20, 64, 300])
def test_a_bound_of_lengths_that_is_wrong_changes_no_result(bound: int, device: str) -> None:
    """Whether first tiles are asked for early or not, in either schedule."""
    for lengths, capacity in (([9, 250, 40], 512), ([700], 1024)):
        step = make_step(device=device, lengths=lengths, max_seq_len=capacity)
        check(step, run(step, max_seqlen=bound))


def test_int_and_device_lengths_agree_to_the_bit(device: str) -> None:
    steps = [make_step(device=device, lengths=[333] * 2, max_seq_len=512) for _ in range(2)]
    from_tensor = run(steps[0])
    from_int = gqa_decode(*steps[1].tensors(), cache_seqlens=333)
    assert torch.equal(from_tensor, from_int)
    for step in steps:
        step.check_memory()


def test_four_dimensional_queries(device: str) -> None:
    step = make_step(device=device, lengths=[77], max_seq_len=128)
    out, lse = gqa_decode(
        step.q.unsqueeze(1), step.k_cache, step.v_cache, step.k.unsqueeze(1), step.v.unsqueeze(1),
        cache_seqlens=77, return_lse=True,
    )  # fmt: skip
    assert out.shape == (1, 1, 8, 128) and lse.shape == (1, 8) and lse.dtype == torch.float32
    check(step, out.squeeze(1))


def test_attend_only_leaves_the_cache_alone(device: str) -> None:
    step = make_step(device=device, lengths=[77, 128, 1], max_seq_len=128, append=False)
    check(step, run(step))


def test_attending_to_nothing_gives_zeros(device: str) -> None:
    step = make_step(device=device, lengths=[0, 5], max_seq_len=128, append=False)
    out, lse = run(step, return_lse=True)
    assert (out[0] == 0).all() and (lse[0] == float("-inf")).all()
    step.check_memory()
    assert not out[1].isnan().any()


def test_a_second_token_sees_the_first(device: str) -> None:
    step = make_step(device=device, lengths=[60, 15], max_seq_len=100)
    for _ in range(20):
        check(step, run(step))
        step.lengths = [n + 1 for n in step.lengths]
        step.seqlens += 1
        step.k.normal_()
        step.v.normal_()
        snapshot(step)


def test_overflow_of_an_int_length_writes_nothing(device: str) -> None:
    step = make_step(device=device, lengths=[128], max_seq_len=128, append=False)
    k = v = torch.zeros(1, 2, 128, device=device, dtype=torch.float16)
    with pytest.raises(CacheOverflowError, match="holds 128 tokens.*max_seq_len is 128"):
        gqa_decode(*step.tensors()[:3], k, v, cache_seqlens=128)
    finish(device)
    step.check_memory()


@pytest.mark.parametrize(("bad", "splits"), diagonal([128, 129, 2**31 - 1], [1, 4]))
def test_overflow_on_the_device_spoils_only_its_sequence(
    bad: int, splits: int, device: str
) -> None:
    step = make_step(device=device, lengths=[100, 5, 60], max_seq_len=128)
    step.seqlens[1] = bad
    out, lse = run(step, return_lse=True, num_splits=splits)
    with pytest.raises(CacheOverflowError, match=r"cache_seqlens\[1\]"):
        gqa_cutlass.check_overflow(device)
    gqa_cutlass.check_overflow(device)  # reported once
    assert out[1].isnan().all() and lse[1].isnan().all()
    step.check_memory(rejected=(1,))
    assert not out[0].isnan().any() and not out[2].isnan().any()


@pytest.mark.parametrize(
    ("splits", "append", "negative"), diagonal([1, 4], [True, False], [-1, -(2**31)])
)
def test_rows_of_negative_length_are_inactive(
    splits: int, append: bool, negative: int, device: str
) -> None:
    """As CUDA graphs pad their batches; on multistage, and with one KV head in clusters."""
    for heads, room in ((2, 128), (1, 600)):
        step = make_step(
            device=device, lengths=[100, 5, 60], max_seq_len=room, num_kv_heads=heads, append=append
        )
        step.seqlens[1] = negative
        step.k_cache[1] = step.v_cache[1] = torch.nan
        snapshot(step)
        out, lse = run(step, return_lse=True, num_splits=splits)
        gqa_cutlass.check_overflow(device)
        assert (out[1] == 0).all() and (lse[1] == -torch.inf).all()
        step.check_memory(rejected=(1,))
        expected, _ = step.reference()
        for right in (0, 2):
            assert (out[right].double() - expected[right]).abs().max() < 5e-3


def test_the_next_call_reports_an_overflow_on_the_device(device: str) -> None:
    step = make_step(device=device, lengths=[100], max_seq_len=128)
    step.seqlens.fill_(128)
    run(step)
    finish(device)
    with pytest.raises(CacheOverflowError, match="earlier call"):
        run(step)
    step.seqlens.fill_(100)
    check(step, run(step))


def test_bad_input_launches_nothing_and_writes_nothing(device: str) -> None:
    step = make_step(device=device, lengths=[100], max_seq_len=128)
    q, k_cache, v_cache, k, v = step.tensors()
    bad_calls = [
        dict(cache_seqlens=-1),
        dict(cache_seqlens=step.seqlens.long()),
        dict(cache_seqlens=step.seqlens.to("meta")),
        dict(cache_seqlens=step.seqlens.repeat(2)),
        dict(cache_seqlens=100, out=q),
        dict(cache_seqlens=100, out=k_cache[:, :1].expand(1, 8, 2, 128)[:, :, 0]),
        dict(cache_seqlens=100, softmax_scale=float("nan")),
        dict(cache_seqlens=100, num_splits=-1),
    ]
    for options in bad_calls:
        with pytest.raises(InputError):
            gqa_decode(q, k_cache, v_cache, k, v, **options)
    with pytest.raises(InputError, match="device"):
        gqa_decode(q, k_cache.to("meta"), v_cache, k, v, cache_seqlens=100)
    finish(device)
    step.check_memory(rejected=(0,))


def test_a_plan_refuses_other_layouts(device: str) -> None:
    step = make_step(device=device, lengths=[100], max_seq_len=128)
    other = make_step(device=device, lengths=[100], max_seq_len=256)
    plan = gqa_cutlass.plan(*step.tensors(), cache_seqlens=step.seqlens)
    with pytest.raises(InputError, match="plan"):
        plan(*other.tensors(), other.seqlens)
    with pytest.raises(InputError, match="plan was made for"):
        plan(*step.tensors(), 100)
    other.check_memory(rejected=(0,))
    step.check_memory(rejected=(0,))


def test_a_second_call_with_aliased_caches_is_refused(device: str) -> None:
    step = make_step(device=device, lengths=[100], max_seq_len=128)
    run(step)
    snapshot(step)
    with pytest.raises(InputError, match="memory that k_cache also uses"):
        gqa_decode(step.q, step.k_cache, step.k_cache, step.k, step.v, cache_seqlens=step.seqlens)
    with pytest.raises(InputError, match="memory that q also uses"):
        gqa_decode(*step.tensors(), cache_seqlens=step.seqlens, out=step.q)
    finish(device)
    step.check_memory(rejected=(0,))


def test_one_debug_line_per_launch(caplog: pytest.LogCaptureFixture, device: str) -> None:
    step = make_step(device=device, lengths=[10], max_seq_len=64)
    with caplog.at_level(logging.DEBUG, logger="gqa_cutlass"):
        run(step)
    launches = [r for r in caplog.records if r.name == "gqa_cutlass" and r.levelno == logging.DEBUG]
    (line,) = [r.getMessage() for r in launches]
    for part in ("kernel=gqa_decode_sm80_", "grid=", "block=", "shared_bytes=", "num_splits=",
                 "batch_size=1", "num_q_heads=8", "head_dim=128", "stream="):  # fmt: skip
        assert part in line
