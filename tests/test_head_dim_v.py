"""Values and outputs of another head_dim than keys: every schedule and math, cut in every way."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from cases import Step, make_step
from edges import Edge
from helpers import THOROUGH, check, run, share_of_step, skip_unless_it_runs

import gqa_cutlass
from gqa_cutlass import KVCache, gqa_decode
from gqa_cutlass.codegen import DType, KernelConfig, Math, Schedule, default_config
from gqa_cutlass.codegen.config import HEAD_DIMS
from gqa_cutlass.codegen.schema.policies import named, special
from gqa_cutlass.errors import ConfigError, InputError
from gqa_cutlass.proof.reference import attend

KINDS = {
    "tensorop": (Math.TENSOROP, DType.F16, 8, Schedule.MULTISTAGE),
    "simt": (Math.SIMT, DType.BF16, 1, Schedule.MULTISTAGE),
    "tma": (Math.TENSOROP, DType.BF16, 8, Schedule.TMA),
}
# Narrower and wider values; dims past the last whole box, and past what an MMA takes, in one of
# both or in both.
PAIRS = [(192, 128), (64, 256), (72, 40), (40, 64), (128, 88)]
CUTS = {
    "edges": Edge(lengths=(0, 1, 15, 16, 17, 130), capacity=131, layout="HND"),
    "splits": Edge(lengths=(300, 37), capacity=512, splits=2, layout="padded"),
    "attend only": Edge(lengths=(37,), capacity=64, append=False, by_value=True),
}


def kernel_of(kind: str, head_dim: int, head_dim_v: int, *features: str) -> KernelConfig:
    math, dtype, width, schedule = KINDS[kind]
    policies = special(tuple(map(named, features)))
    return default_config(math, dtype, head_dim, 4, width, schedule, policies, head_dim_v)


@pytest.mark.sanitized
@pytest.mark.parametrize(
    ("dims", "kind"),
    [
        pytest.param(dims, kind, id=f"{kind}-{dims[0]}-{dims[1]}", marks=THOROUGH if i > 2 else ())
        for i, dims in enumerate(PAIRS)
        for j, kind in enumerate(KINDS)
        if i == 0 or j == i % len(KINDS)
    ],
)
def test_every_schedule_and_math_matches_the_reference(
    kind: str, dims: tuple[int, int], device: str
) -> None:
    config = kernel_of(kind, *dims)
    skip_unless_it_runs(config, device)
    for name, edge in CUTS.items():
        assert share_of_step(edge, config, edge.step(config, device)) <= 1, name


@pytest.mark.parametrize("kind", ["tensorop", "tma"])
def test_features_go_with_it(kind: str, device: str) -> None:
    config = kernel_of(kind, 64, 128, "SlidingWindow", "SoftCapped", "SinkInSum")
    skip_unless_it_runs(config, device)
    edge = Edge(lengths=(150, 20), capacity=160, splits=2)
    assert share_of_step(edge, config, edge.step(config, device)) <= 1


def a_step(device: str, **problem: int) -> Step:
    return make_step(
        head_dim=64, head_dim_v=32, lengths=[37, 5], max_seq_len=64, device=device, **problem
    )


def test_a_call_takes_it_from_the_cache_of_values(device: str) -> None:
    step = a_step(device)
    out, lse = run(step, return_lse=True)
    assert out.shape == (2, 8, 32) and out.is_contiguous()
    torch.testing.assert_close(lse.double(), step.reference()[1], atol=2e-5, rtol=2e-6)
    check(step, out)


def test_a_plan_and_a_dimension_for_one_token(device: str) -> None:
    step = a_step(device)
    q, k, v = (t.unsqueeze(1) for t in (step.q, step.k, step.v) if t is not None)
    plan = gqa_cutlass.plan(q, step.k_cache, step.v_cache, k, v, cache_seqlens=step.seqlens)
    out = plan(q, step.k_cache, step.v_cache, k, v, step.seqlens)
    assert out.shape == (2, 1, 8, 32)
    check(step, out[:, 0])


def test_torch_compile_knows_the_shape(device: str) -> None:
    step = a_step(device)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def decode(*tensors: torch.Tensor) -> torch.Tensor:
        return gqa_decode(*tensors, cache_seqlens=step.seqlens) + 0

    out = decode(*step.tensors())
    assert out.shape == (2, 8, 32)
    check(step, out)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("v", lambda s: s.q.new_zeros(2, 2, 64), r"v: got shape .*64\]; allowed: \[2, 2, 32\]"),
        ("k", lambda s: s.q.new_zeros(2, 2, 32), r"k: got shape .*32\]; allowed: \[2, 2, 64\]"),
        ("out", lambda s: s.q.new_zeros(2, 8, 64), r"out: got shape .*64\]; allowed: \[2, 8, 32\]"),
        ("v_cache", lambda s: s.v_cache[..., :28], r"head_dim of v_cache: got 28; allowed: mult"),
        ("v_cache", lambda s: s.q.new_zeros(2, 64, 2, 264), "head_dim of v_cache: got 264"),
        ("k_cache", lambda s: s.v_cache.clone(), r"k_cache: got shape .*32\]; allowed: .*64\]"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_and_nothing_is_written(
    name: str, value: object, message: str
) -> None:
    step = a_step("cpu")
    names = "q", "k_cache", "v_cache", "k", "v"
    given = dict(zip(names, step.tensors(), strict=True)) | {"out": step.out}
    given[name] = value(step)  # type: ignore[operator]
    with pytest.raises(InputError, match=message):
        gqa_decode(**given, cache_seqlens=step.seqlens)
    step.check_memory(rejected=(0, 1))


# KVCache.


@pytest.mark.parametrize("dims", [(64, 32), (32, 64)], ids=str)
def test_a_cache_of_both_is_filled_moved_and_attended(
    dims: tuple[int, int], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against a reference that holds plain tensors; rows are moved in many small pieces."""
    monkeypatch.setattr("gqa_cutlass.cache.rows._TEMPORARY_BYTES", 2**9)
    generator = torch.Generator(device).manual_seed(3)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device).half()

    cache = KVCache(2, 24, 2, dims[0], device=device, head_dim_v=dims[1])
    assert (cache.k.shape[-1], cache.v.shape[-1]) == dims
    k, v = (random(2, 9, 2, dim) for dim in dims)
    cache.prefill(k, v, lengths=[9, 5])
    more = [random(2, 2, dim) for dim in dims]
    cache.append(*more)
    cache.reorder([1, 0])
    cache.truncate([5, 10])
    q, new = random(2, 8, dims[0]), [random(2, 2, dim) for dim in dims]
    out = cache.decode(q, *new)
    held = [
        torch.cat((old[0], late[:1], fresh[1:]))
        for old, late, fresh in zip((k, v), more, new, strict=True)
    ]
    short = [torch.cat((old[1, :5], fresh[:1])) for old, fresh in zip((k, v), new, strict=True)]
    assert cache.lengths == [6, 11] and out.shape == (2, 8, dims[1])
    for b, (keys, values) in enumerate((short, held)):
        expected, _ = attend(
            q[b : b + 1], keys[None], values[None], [len(keys)], dims[0] ** -0.5, torch.float64
        )
        torch.testing.assert_close(out[b].double(), expected[0], atol=2e-3, rtol=2e-3)


def test_a_cache_says_its_sizes_and_refuses_those_that_differ() -> None:
    sizes = {"batch_size": 2, "max_seq_len": 8, "num_kv_heads": 3, "head_dim": 64}
    cache = KVCache(**sizes, device="cpu", head_dim_v=40)
    assert "head_dim=64, head_dim_v=40, dtype" in repr(cache)
    needed = KVCache.bytes_needed(**sizes, head_dim_v=40, num_layers=2)
    assert needed == 2 * 2 * 8 * 3 * (64 + 40) * 2 + 3 * 2 * 4
    (layer,) = KVCache.for_layers(1, **sizes, device="cpu", head_dim_v=40)
    assert layer.v.shape == (2, 8, 3, 40)
    k, v = torch.zeros(2, 3, 64).half(), torch.zeros(2, 3, 40).half()
    for wrong, message in (
        ((k, k), r"append: v: got .*\[2, 3, 64\].*head_dim 40"),
        ((v, v), r"append: k: got .*\[2, 3, 40\].*head_dim 64"),
    ):
        with pytest.raises(InputError, match=message):
            cache.append(*wrong)
    with pytest.raises(InputError, match="prefill: v: got .*as many tokens as k, 2"):
        cache.prefill(torch.zeros(2, 2, 3, 64).half(), torch.zeros(2, 1, 3, 40).half())
    assert cache.lengths == [0, 0]
    with pytest.raises(InputError, match="head_dim_v: got 20; allowed: multiples of 8"):
        KVCache(**sizes, device="cpu", head_dim_v=20)


# Names.


def test_names_tell_kernels_apart_and_say_no_more_than_they_must() -> None:
    config = kernel_of("tma", 192, 128)
    assert "_d192v128_g4_" in config.name
    assert KernelConfig.from_name(config.name) == config
    assert kernel_of("tma", 64, 64) == default_config(
        Math.TENSOROP, DType.BF16, 64, 4, 8, Schedule.TMA
    )
    with pytest.raises(ConfigError, match="kernel name"):
        KernelConfig.from_name(config.name.replace("d192v128", "d128v128"))


@pytest.mark.parametrize("head_dim_v", [0, 20, 260, 8, -64, 2.0, "64", True])
def test_a_configuration_refuses_what_no_kernel_has(head_dim_v: object) -> None:
    with pytest.raises(ConfigError, match=r"head_dim_v: got .*multiples of 8"):
        default_config(Math.TENSOROP, DType.F16, 128, 4, 8, head_dim_v=head_dim_v)  # type: ignore[arg-type]


# Every pair of dimensions has kernels.


@pytest.mark.parametrize("schedule", Schedule)
def test_every_pair_and_group_has_a_kernel(schedule: Schedule) -> None:
    """With tma, a warp's partial output must find room in its tiles, however narrow the keys'."""
    for head_dim, head_dim_v in product(HEAD_DIMS, HEAD_DIMS):
        for group_size in (1, 8, 9, 16, 17, 32, 100):
            config = default_config(
                Math.TENSOROP, DType.F16, head_dim, group_size, 8, schedule, (), head_dim_v
            )
            assert config.value_dim == head_dim_v


@pytest.mark.sanitized
def test_wide_values_of_many_heads_take_the_tma_schedule(device: str) -> None:
    step = make_step(
        head_dim=64, head_dim_v=256, group_size=9, num_kv_heads=1, lengths=[129], max_seq_len=150,
        device=device,
    )  # fmt: skip
    plan = gqa_cutlass.plan(*step.tensors(), cache_seqlens=step.seqlens)
    if device == "cpu":
        assert plan.dispatch.config.tma
    check(step, plan(*step.tensors(), step.seqlens))
