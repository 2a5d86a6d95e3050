"""Dispatch: which kernel, how many splits, what launch shape."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from gqa_cutlass.codegen import ARCHES, DType, KernelConfig, Math, Schedule, default_config, shipped
from gqa_cutlass.codegen.schema.launch import Pdl
from gqa_cutlass.codegen.schema.policies import FP8, OF_TOKENS, Policy, named, special
from gqa_cutlass.codegen.schema.problem import MAX_SPLITS, Problem
from gqa_cutlass.dispatch import choose_config, dispatch, model_device
from gqa_cutlass.dispatch.compare import runner_up
from gqa_cutlass.errors import InputError

H200 = model_device(ARCHES["sm_90a"])
LLAMA_3_8B = Problem(
    batch_size=1,
    num_q_heads=32,
    num_kv_heads=8,
    head_dim=128,
    max_seq_len=4096,
    dtype=DType.F16,
    vec_width=8,
    append=True,
)
MODELS = {  # query heads, KV heads, head_dim
    "llama-3-8b": (32, 8, 128),
    "llama-3-70b": (64, 8, 128),
    "qwen2.5-0.5b": (14, 2, 64),
    "qwen2.5-7b": (28, 4, 128),
    "qwen3-30b-a3b": (32, 4, 128),
    "phi-3-mini": (32, 32, 96),
    "phi-3-medium": (40, 10, 128),
    "gemma-2-9b": (16, 8, 256),
}
PROBLEMS = [
    replace(LLAMA_3_8B, batch_size=batch, max_seq_len=tokens, num_q_heads=heads, head_dim=dim)
    for batch in (1, 3, 32, 500)
    for tokens in (1, 100, 4096, 131072)
    for heads, dim in ((8, 64), (32, 128), (256, 128), (64, 256))
]


@pytest.mark.parametrize("page_size", [None, 16])
@pytest.mark.parametrize("element", [*FP8, *OF_TOKENS], ids=str)
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_wide_values_beside_narrow_keys_of_8_bits_have_a_launch(
    element: Policy, page_size: int | None, arch: str
) -> None:
    policies = (element,) if page_size is None else (named("PagedCache"), element)
    problem = replace(
        LLAMA_3_8B, num_q_heads=16, num_kv_heads=2, head_dim=64, head_dim_v=256,
        policies=special(policies), page_size=page_size,
    )  # fmt: skip
    device = model_device(ARCHES[arch])
    found = dispatch(problem, device)
    tma = arch == "sm_90a" and page_size is None
    assert found.config.tma == tma and found.config.value_dim == 256
    assert runner_up(problem, device, found) is not None


@pytest.mark.parametrize("vec_width", [8, 4, 2])
def test_tensor_cores_serve_what_cp_async_can_move(vec_width: int) -> None:
    config, why = choose_config(replace(LLAMA_3_8B, vec_width=vec_width), H200)
    assert (config.math, config.vec_width) == (Math.TENSOROP, vec_width)
    assert f"aligned to {2 * vec_width} bytes" in why


def test_cuda_cores_serve_single_elements() -> None:
    config, why = choose_config(replace(LLAMA_3_8B, vec_width=1), H200)
    assert (config.math, config.vec_width) == (Math.SIMT, 1)
    assert "simt" in why and "aligned to 2 bytes" in why


@pytest.mark.parametrize(("head_dim", "origin"), [(128, "shipped"), (104, "compiled on first use")])
def test_reason_says_where_the_kernel_comes_from(head_dim: int, origin: str) -> None:
    assert origin in choose_config(replace(LLAMA_3_8B, head_dim=head_dim), H200)[1]


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
@pytest.mark.parametrize("arch", ARCHES)
def test_splits_fill_the_gpu_and_give_every_warp_a_tile(problem: Problem, arch: str) -> None:
    device = model_device(ARCHES[arch])
    chosen = dispatch(problem, device)
    config, (x, y, z) = chosen.config, chosen.shape.grid
    slots = device.num_sms * config.blocks_per_sm(device.arch)
    tiles = -(-problem.max_seq_len // config.block_n)
    assert y == chosen.num_splits >= 1
    assert y == 1 or x * y * z <= slots
    assert y == 1 or (y - 1) * config.num_warps < tiles
    assert y <= MAX_SPLITS


def _problem(batch: int, tokens: int, heads: tuple[int, int, int] = (32, 8, 128)) -> Problem:
    """Sequences with room for so many tokens, of query heads, KV heads and head_dim."""
    q_heads, kv_heads, head_dim = heads
    return replace(
        LLAMA_3_8B, batch_size=batch, max_seq_len=tokens, num_q_heads=q_heads,
        num_kv_heads=kv_heads, head_dim=head_dim,
    )  # fmt: skip


QWEN, ONE_HEAD, NO_GROUPS = (28, 4, 128), (8, 1, 128), (32, 32, 128)
SHARED_BY_CLUSTERS = [  # splits, cluster, stages
    pytest.param(_problem(1, 1024), (8, 8, 1), id="1x1024"),
    pytest.param(_problem(1, 4096), (8, 8, 2), id="1x4096"),
    pytest.param(_problem(1, 16384), (8, 8, 2), id="1x16384"),
    pytest.param(_problem(8, 1024), (2, 2, 1), id="8x1024"),
    pytest.param(_problem(1, 32768, QWEN), (16, 8, 2), id="1x32768-of-4-heads"),
    pytest.param(_problem(1, 8192, ONE_HEAD), (64, 8, 1), id="1x8192-of-1-head"),
    pytest.param(_problem(1, 1024, NO_GROUPS), (2, 2, 2), id="1x1024-of-32-heads"),
    pytest.param(_problem(1, 8192, (16, 8, 256)), (8, 8, 1), id="largest-dim-has-one-stage"),
    pytest.param(_problem(1, 131072), (8, 8, 2), id="large"),
    pytest.param(_problem(2, 131072), (4, 4, 2), id="large-of-16-heads"),
    pytest.param(_problem(1, 131072, (40, 10, 128)), (8, 8, 2), id="large-of-10-heads"),
    pytest.param(_problem(1, 32768, (32, 32, 128)), (4, 2, 2), id="large-of-32-heads"),
    pytest.param(_problem(1, 262144, (8, 2, 128)), (64, 8, 1), id="large-of-2-heads"),
    pytest.param(_problem(1, 65536, (16, 8, 256)), (8, 8, 1), id="large-with-one-stage"),
]


@pytest.mark.parametrize(("problem", "shape"), SHARED_BY_CLUSTERS)
def test_few_heads_and_small_caches_are_shared_by_clusters_of_hopper(
    problem: Problem, shape: tuple[int, int, int]
) -> None:
    chosen = dispatch(problem, H200)
    assert chosen.config.schedule is Schedule.TMA
    assert (chosen.num_splits, chosen.shape.cluster, chosen.num_stages) == shape
    assert chosen.shape.shared_bytes == chosen.config.shared_bytes_with(chosen.num_stages)
    assert chosen.config in shipped()


@pytest.mark.parametrize(
    ("problem", "why"),
    [
        pytest.param(
            _problem(1, 16384, (40, 40, 128)),
            "320.0 MiB at length 16384, 40 KV heads in the batch, more than 32",
            id="large-of-many-heads",
        ),
        pytest.param(
            _problem(1, 128),
            "0.5 MiB at length 128, which the warps of one block read at once",
            id="one-blocks-tiles",
        ),
        pytest.param(
            _problem(16, 1024),
            "64.0 MiB at length 1024, 128 KV heads in the batch, more than 64",
            id="many-heads",
        ),
        pytest.param(
            _problem(1, 4096, (32, 32, 96)),
            "48.0 MiB at length 4096, more than 16, in rows of partial copies",
            id="partial-boxes",
        ),
        pytest.param(
            _problem(4, 5000),
            "78.1 MiB at length 5000, of which 32 pairs of blocks would leave multiprocessors idle",
            id="pairs-of-blocks",
        ),
        pytest.param(
            replace(LLAMA_3_8B, vec_width=4),
            "the copy engine wants rows aligned to 16 bytes",
            id="misaligned",
        ),
    ],
)
def test_all_else_is_served_by_the_multistage_schedule(problem: Problem, why: str) -> None:
    chosen = dispatch(problem, H200)
    assert chosen.config.schedule is Schedule.MULTISTAGE
    assert (chosen.shape.cluster, chosen.num_stages) == (1, chosen.config.num_stages)
    assert f"multistage: {why}" in chosen.reasons[0]


@pytest.mark.parametrize("arch", [arch for arch in ARCHES if arch != "sm_90a"])
def test_other_architectures_are_served_by_the_multistage_schedule(arch: str) -> None:
    chosen = dispatch(_problem(1, 1024), model_device(ARCHES[arch]))
    assert chosen.config.schedule is Schedule.MULTISTAGE
    assert f"multistage: {arch} is not among sm_90a" in chosen.reasons[0]


@pytest.mark.parametrize(("batch", "ragged", "schedule"), [
    (1, True, Schedule.TMA), (2, False, Schedule.TMA), (2, True, Schedule.MULTISTAGE),
])  # fmt: skip
def test_large_caches_are_shared_by_clusters_if_none_can_be_ragged(
    batch: int, ragged: bool, schedule: Schedule
) -> None:
    chosen = dispatch(_problem(batch, 65536), H200, ragged=ragged)
    assert chosen.config.schedule is schedule
    rest = "at length 65536, more than 128, ragged" if ragged else "more than 128; few heads"
    assert batch == 1 or rest in chosen.reasons[0]


@pytest.mark.parametrize("num_tokens", [1, 3])
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_scales_of_tokens_take_the_schedule_of_one_scale(problem: Problem, num_tokens: int) -> None:
    several = (named("SeveralQueries"),) if num_tokens > 1 else ()
    one, each = (
        dispatch(replace(problem, policies=(*several, stored), num_tokens=num_tokens), H200)
        for stored in (FP8[0], OF_TOKENS[0])
    )
    assert each.config.schedule is one.config.schedule


@pytest.mark.parametrize("vec_width", [8, 4, 2, 1])
def test_single_elements_are_not_read_before_lengths_are_known(vec_width: int) -> None:
    """They come by loads, which race with the block that appends."""
    problem = replace(_problem(1, 128, (9, 1, 32)), vec_width=vec_width)
    for arch in ("sm_80", "sm_90a"):
        assert dispatch(problem, model_device(ARCHES[arch])).prefetch_first_tile == (vec_width > 1)


@pytest.mark.parametrize(("tokens", "early"), [(32768, True), (32769, False)])
def test_large_caches_are_not_read_before_lengths_are_known(tokens: int, early: bool) -> None:
    chosen = dispatch(_problem(1, tokens), H200)
    assert (chosen.config.schedule, chosen.prefetch_first_tile) == (Schedule.TMA, early)


@pytest.mark.parametrize(("problem", "larger"), [
    pytest.param(
        _problem(1, 8193, (32, 32, 128)), _problem(1, 8193, (33, 33, 128)), id="32-large-heads"
    ),
    pytest.param(_problem(8, 256), _problem(9, 256), id="64-heads-of-the-batch"),
    pytest.param(
        _problem(1, 1365, (32, 32, 96)), _problem(1, 1366, (32, 32, 96)),
        id="16-MiB-in-partial-boxes",
    ),
])  # fmt: skip
def test_limits_of_clusters_are_exact(problem: Problem, larger: Problem) -> None:
    assert dispatch(problem, H200).config.schedule is Schedule.TMA
    assert dispatch(larger, H200).config.schedule is Schedule.MULTISTAGE


STARTS = [
    pytest.param(_problem(1, 1280), Pdl.WHOLE, id="5-MiB"),
    pytest.param(_problem(1, 1281), Pdl.END, id="more"),
    pytest.param(_problem(1, 8192), Pdl.END, id="32-MiB"),
    pytest.param(_problem(1, 8193), Pdl.NONE, id="still-more"),
]


@pytest.mark.parametrize(("problem", "next_starts"), STARTS)
def test_small_caches_are_launched_as_dependents_if_wanted(
    problem: Problem, next_starts: Pdl
) -> None:
    chosen, plain = dispatch(problem, H200, pdl=True), dispatch(problem, H200)
    assert (chosen.pdl, plain.pdl) == (next_starts, Pdl.NONE)
    pays = next_starts is not Pdl.NONE
    assert chosen.shape.pdl == chosen.config.pdl == pays
    assert not plain.shape.pdl and not plain.config.pdl
    assert replace(chosen.config, pdl=False) == plain.config
    assert ("dependent launch" if pays else "ordinary launch: more than 32") in chosen.reasons[-1]


@pytest.mark.parametrize("arch", ARCHES)
def test_dependent_launches_want_hopper_or_newer(arch: str) -> None:
    chosen = dispatch(_problem(1, 128), model_device(ARCHES[arch]), pdl=True)
    newer = ARCHES[arch].capability >= 90
    assert chosen.shape.pdl == newer
    assert newer or f"{arch} has no dependent ones" in chosen.reasons[-1]
    assert arch in chosen.config.archs


def test_a_kernel_chosen_by_hand_is_launched_as_a_dependent_too() -> None:
    kernel = default_config(Math.TENSOROP, DType.F16, 128, 4, 8)
    chosen = dispatch(_problem(1, 1024), H200, 0, kernel, pdl=True)
    assert chosen.config == replace(kernel, pdl=True)


@pytest.mark.parametrize("problem", [p for p in PROBLEMS if p.cache_bytes <= 32 * 2**20] + [
    _problem(2, 4096), _problem(2, 8192, (16, 4, 128)), _problem(4, 8192, (8, 2, 128)),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("arch", ["sm_90a", "sm_120f"])
def test_dependent_launches_leave_the_next_one_no_room_to_crowd(
    problem: Problem, ragged: bool, arch: str
) -> None:
    """As many blocks fit on a multiprocessor as it gets, unless two launches fit side by side."""
    device = model_device(ARCHES[arch])
    chosen = dispatch(problem, device, ragged=ragged, pdl=True)
    plain = dispatch(problem, device, ragged=ragged)
    blocks = math.prod(chosen.shape.grid)
    fit, fit_plain = (
        device.num_sms * (device.arch.shared_per_sm // (d.shape.shared_bytes + 1024))
        for d in (chosen, plain)
    )
    assert chosen.shape.shared_bytes <= device.arch.shared_per_block
    assert 2 * blocks <= device.num_sms or fit < blocks + device.num_sms
    assert fit >= blocks or fit == fit_plain


def test_a_dependent_kernel_chosen_by_hand_is_kept() -> None:
    kernel = replace(default_config(Math.TENSOROP, DType.F16, 128, 4, 8), pdl=True)
    chosen = dispatch(_problem(1, 16384), H200, 0, kernel, pdl=True)
    assert (chosen.config, chosen.pdl) == (kernel, Pdl.NONE)


def test_clusters_start_where_one_blocks_warps_do_not_take_all_tokens_at_once() -> None:
    assert dispatch(_problem(1, 128), H200).config.schedule is Schedule.MULTISTAGE
    assert dispatch(_problem(1, 129), H200).config.schedule is Schedule.TMA


@pytest.mark.parametrize(
    ("splits", "cluster"), [(1, 1), (2, 2), (3, 1), (4, 4), (6, 2), (8, 8), (12, 4), (16, 8)]
)
def test_splits_that_are_asked_for_form_the_largest_clusters(splits: int, cluster: int) -> None:
    chosen = dispatch(_problem(1, 1024), H200, splits)
    assert (chosen.num_splits, chosen.shape.cluster) == (splits, cluster)
    assert chosen.num_stages == chosen.config.num_stages
    assert chosen.num_partials == splits // cluster


def test_clusters_cover_the_grid() -> None:
    for case in SHARED_BY_CLUSTERS:
        shape = dispatch(case.values[0], H200).shape
        assert shape.cluster in (1, 2, 4, 8) and shape.grid[1] % shape.cluster == 0


def test_only_clusters_that_share_a_sequence_need_workspace() -> None:
    one, two = dispatch(_problem(1, 16384), H200), dispatch(_problem(1, 32768, QWEN), H200)
    assert (one.num_partials, one.num_merge_counters, one.partial_floats) == (1, 0, 0)
    # Every block of a cluster merges the dims that it owns, for each head.
    merges = 4 * two.shape.cluster
    assert (two.num_partials, two.num_merge_counters) == (2, merges)
    assert two.partial_floats == merges * 2 * two.config.block_h * (128 + 2)


def test_long_sequences_of_one_request_are_split() -> None:
    chosen = dispatch(replace(LLAMA_3_8B, max_seq_len=131072, vec_width=4), H200)
    assert chosen.shape.grid[0] * chosen.num_splits >= 0.8 * H200.num_sms


def test_full_gpu_and_short_sequences_are_not_split() -> None:
    assert dispatch(replace(LLAMA_3_8B, batch_size=500), H200).num_splits == 1
    assert dispatch(replace(LLAMA_3_8B, max_seq_len=16), H200).num_splits == 1


@pytest.mark.parametrize("num_splits", [1, 2, 7, MAX_SPLITS])
def test_splits_that_are_asked_for_are_used(num_splits: int) -> None:
    chosen = dispatch(LLAMA_3_8B, H200, num_splits)
    assert chosen.num_splits == chosen.shape.grid[1] == num_splits
    assert f"{num_splits} split{'s' * (num_splits > 1)}, as asked" in chosen.reasons


@pytest.mark.parametrize("group_size", [1, 4, 7, 16, 32, 48])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_grid_covers_every_head_of_every_sequence_once(group_size: int, head_dim: int) -> None:
    problem = replace(
        LLAMA_3_8B, batch_size=3, num_q_heads=8 * group_size, head_dim=head_dim, vec_width=8
    )
    chosen = dispatch(problem, H200, num_splits=2)
    blocks = -(-group_size // chosen.config.block_h)
    assert chosen.shape.grid == (8 * blocks, 2, 3)
    assert chosen.shape.block == 32 * chosen.config.num_warps
    assert chosen.shape.shared_bytes == chosen.config.shared_bytes


def test_large_groups_take_several_blocks_per_kv_head() -> None:
    one_kv_head = replace(LLAMA_3_8B, num_q_heads=32, num_kv_heads=1)
    chosen = dispatch(one_kv_head, H200)
    assert chosen.config.block_h < 32
    assert chosen.shape.grid[0] == 32 // chosen.config.block_h


def test_workspace_holds_every_blocks_partial_output() -> None:
    chosen = dispatch(replace(LLAMA_3_8B, batch_size=2), H200, num_splits=3)
    blocks = 8 * chosen.config.head_blocks * 3 * 2
    assert chosen.partial_floats == blocks * chosen.config.block_h * (128 + 2)  # O, m and l
    assert chosen.num_merge_counters == 8 * chosen.config.head_blocks * 2


def test_one_split_needs_no_workspace() -> None:
    chosen = dispatch(LLAMA_3_8B, H200, num_splits=1)
    assert (chosen.partial_floats, chosen.num_merge_counters) == (0, 0)


@pytest.mark.parametrize(
    "kernel",
    [
        default_config(Math.SIMT, DType.F16, 128, 4, 8),
        default_config(Math.TENSOROP, DType.F16, 128, 4, 2),
        replace(default_config(Math.TENSOROP, DType.F16, 128, 4, 8), num_warps=2),
        replace(default_config(Math.TENSOROP, DType.F16, 128, 4, 8, Schedule.TMA), num_warps=4),
    ],
    ids=lambda kernel: kernel.name,
)
def test_kernel_that_fits_may_be_chosen_by_hand(kernel: KernelConfig) -> None:
    chosen = dispatch(LLAMA_3_8B, H200, 0, kernel)
    assert chosen.config == kernel
    assert chosen.shape.block == kernel.num_threads
    assert chosen.reasons[0] == "this kernel, as asked"


@pytest.mark.parametrize("arch", ["sm_80", "sm_100f", "sm_120f"])
def test_kernel_for_another_architecture_is_refused(arch: str) -> None:
    kernel = default_config(Math.TENSOROP, DType.F16, 128, 4, 8, Schedule.TMA)
    with pytest.raises(InputError, match=f"kernel: got {kernel.name} for {arch}; .*: sm_90a"):
        dispatch(LLAMA_3_8B, model_device(ARCHES[arch]), 0, kernel)


@pytest.mark.parametrize(
    ("kernel", "vec_width"),
    [
        (default_config(Math.TENSOROP, DType.BF16, 128, 4, 8), 8),
        (default_config(Math.TENSOROP, DType.F16, 64, 4, 8), 8),
        (default_config(Math.TENSOROP, DType.F16, 128, 8, 8), 8),
        (default_config(Math.TENSOROP, DType.F16, 128, 4, 8), 4),
        (default_config(Math.TENSOROP, DType.F16, 128, 4, 8, Schedule.TMA), 4),
    ],
    ids=["dtype", "head_dim", "group_size", "alignment", "alignment-of-tensor-copies"],
)
def test_kernel_that_does_not_fit_is_refused(kernel: KernelConfig, vec_width: int) -> None:
    with pytest.raises(InputError) as raised:
        dispatch(replace(LLAMA_3_8B, vec_width=vec_width), H200, 0, kernel)
    message = str(raised.value)
    assert f"kernel: got {kernel.name}; allowed: kernels for f16, head_dim 128" in message
    assert f"group size 4 and an alignment of at most {vec_width} elements" in message
