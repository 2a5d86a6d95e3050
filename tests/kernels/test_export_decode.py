"""The C library decodes like Python: on the same memory it launches the same kernel in the same
shape with the same argument, and what the kernel writes in ptxsim is the same to the bit."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import cycle, product
from pathlib import Path
from typing import Any

import pytest
import torch
from c_build import FAMILIES, build, write_dummies
from c_driver import DriverLaunch, Launched, argument_of, fields_of
from c_library import (
    NUM_MERGE_COUNTERS,
    NUMBERS,
    Library,
    config_of,
    float32,
    fresh_copy,
    fresh_library,
    workspace_of,
)
from c_simulator import Simulator, recorded
from cases import Step, make_step
from helpers import by_name, diagonal
from torch import Tensor

import gqa_cutlass
from gqa_cutlass import CacheOverflowError, GQADecodeConfig, gqa_attention_decode, gqa_decode
from gqa_cutlass.call.record import LaunchRecord, parse
from gqa_cutlass.codegen import DType, KernelConfig, Math, Schedule, default_config
from gqa_cutlass.codegen.schema.params import Params
from gqa_cutlass.codegen.schema.policies import FEATURES, special, tagged
from gqa_cutlass.dispatch import Dispatch

KERNELS = [  # in one type each, by turns
    default_config(Math.TENSOROP, dtype, head_dim, group_size, 8, schedule)
    for (schedule, (head_dim, group_size)), dtype in zip(product(Schedule, FAMILIES), cycle(DType))
]
WIDE_64 = default_config(Math.TENSOROP, DType.F16, 64, 4, 8)
TMA_128 = default_config(Math.TENSOROP, DType.BF16, 128, 4, 8, Schedule.TMA)
OWN_MEMORY = (
    "split_workspace",
    "merge_counters",
    "overflow_flag",
)  # that each of the two has for itself


@dataclass(frozen=True)
class Result:
    """What a decode step launched, and what it left behind."""

    launched: Launched
    out: Tensor
    k_cache: Tensor
    v_cache: Tensor

    @classmethod
    def of(cls, launched: Launched, step: Step) -> Result:
        """The step's memory as it is now."""
        return cls(launched, step.out.clone(), step.k_cache.clone(), step.v_cache.clone())


def step_of(**sizes: Any) -> Step:
    """A step on the CPU with a scale that float32 holds."""
    step = make_step(**sizes, device="cpu")
    step.scale = float32(step.scale)
    return step


def by_python(step: Step) -> Result:
    """Decode in Python, and undo it."""
    batch, num_q_heads, head_dim = step.q.shape
    _, max_seq_len, num_kv_heads, _ = step.k_cache.shape
    config = GQADecodeConfig(
        batch_size=batch, cache_len=step.lengths[0], num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads, head_dim=head_dim, scale=step.scale, max_seq_len=max_seq_len,
    )  # fmt: skip
    out = step.out.view(batch, 1, num_q_heads * head_dim)
    assert step.k is not None and step.v is not None
    tokens = (t.unsqueeze(1) for t in (step.q, step.k, step.v))
    with recorded() as launches:
        gqa_attention_decode(out, *tokens, step.k_cache, step.v_cache, config)
    return _undone(launches[-1], step)


def ragged_by_python(step: Step) -> Result:
    """The same, with lengths on the device; whether one was too large is read and forgotten."""
    return featured_by_python(step, step.seqlens)


def featured_by_python(step: Step, lengths: int | Tensor) -> Result:
    """The same with what the step asks for."""
    with recorded() as launches:
        gqa_decode(
            *step.tensors(), cache_seqlens=lengths, softmax_scale=step.scale, out=step.out,
            **step.features(),
        )  # fmt: skip
    with suppress(CacheOverflowError):
        gqa_cutlass.check_overflow("cpu")
    return _undone(launches[-1], step)


def _undone(launched: Launched, step: Step) -> Result:
    result = Result.of(launched, step)
    restore(step)
    return result


def restore(step: Step) -> None:
    """Make the step's memory as it was."""
    step.k_cache.copy_(step.before["k_cache"])
    step.v_cache.copy_(step.before["v_cache"])
    step.out.fill_(float("nan"))


def assert_same(ours: Result, theirs: Result) -> None:
    """The same launch, but for where workspace and flag are, with the same result to the bit."""
    assert ours.launched.kernel == theirs.launched.kernel
    assert ours.launched.shape == theirs.launched.shape
    argument, expected = ours.launched.argument, theirs.launched.argument
    assert list(argument) == list(expected)
    assert {
        name: (value, expected[name])
        for name, value in argument.items()
        if name not in OWN_MEMORY and value != expected[name]
    } == {}
    for name in ("split_workspace", "merge_counters"):
        assert bool(argument[name]) == bool(expected[name]), name
    for name in ("out", "k_cache", "v_cache"):
        assert same_bits(getattr(ours, name), getattr(theirs, name)), f"{name} differs"


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal, NaNs included."""
    return torch.equal(a.view(torch.int16), b.view(torch.int16))


def chosen_for(step: Step, *, ragged: bool = False) -> Dispatch:
    """What Python launches for a step."""
    lengths = step.seqlens if ragged else step.lengths[0]
    plan = gqa_cutlass.plan(*step.tensors(), cache_seqlens=lengths, out=step.out, **step.features())
    return plan.dispatch


def decode_both(step: Step) -> Launched:
    """Decode a step in C as in Python; returns what both launched."""
    expected = by_python(step)
    workspace = workspace_of(chosen_for(step))
    launched = Simulator(fresh_library()).decode(step, workspace)
    assert_same(Result.of(launched, step), expected)
    step.check_memory()
    assert step.errors(step.out).share <= 1
    assert launched.argument["overflow_flag"] is launched.argument["seqlens"] is None
    assert workspace is None or not workspace[:NUM_MERGE_COUNTERS].any()
    return launched


def capacity_for(kernel: KernelConfig) -> int:
    """Tokens of a cache for which dispatch takes this schedule: more than one block's warps at
    once take with tma, fewer otherwise."""
    return kernel.block_n * kernel.num_warps + 9 if kernel.tma else 41


def step_for(kernel: KernelConfig, batch: int, length: int) -> Step:
    """A step for which dispatch takes this kernel."""
    return step_of(
        dtype=kernel.dtype, head_dim=kernel.head_dim, group_size=kernel.group_size,
        lengths=[length] * batch, max_seq_len=capacity_for(kernel),
    )  # fmt: skip


@pytest.mark.parametrize("kernel", by_name(KERNELS))
def test_c_library_decodes_like_python(kernel: KernelConfig) -> None:
    step = step_for(kernel, batch=2, length=capacity_for(kernel) // 3)
    assert decode_both(step).kernel == kernel.name


@pytest.mark.parametrize("kernel", by_name([WIDE_64, TMA_128]))
def test_the_first_and_the_last_token_decode_like_python(kernel: KernelConfig) -> None:
    for batch, length in ((3, 0), (1, capacity_for(kernel) - 1)):
        assert decode_both(step_for(kernel, batch, length)).kernel == kernel.name


# Sizes of steps with few tokens in large caches, with how many splits, in clusters of how many.
SHARED: dict[str, tuple[dict[str, Any], int, int]] = {
    "a cluster per head": (dict(lengths=[300], max_seq_len=512), 4, 4),
    "clusters that meet": (dict(lengths=[1100], max_seq_len=4096, num_kv_heads=1), 32, 8),
    "splits": (dict(lengths=[200] * 2, max_seq_len=512, vec_width=4), 4, 1),
    "splits of aligned rows": (
        dict(lengths=[100], max_seq_len=1366, num_kv_heads=32, head_dim=96, dtype=DType.BF16), 4, 1,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("sizes", "splits", "cluster"), SHARED.values(), ids=SHARED)
def test_sequences_that_blocks_share_decode_like_python(
    sizes: dict[str, Any], splits: int, cluster: int
) -> None:
    launched = decode_both(step_of(**sizes))
    assert launched.argument["num_splits"] == launched.shape.grid[1] == splits
    assert launched.shape.cluster == cluster
    assert bool(launched.argument["split_workspace"]) == (splits > cluster)


def test_scales_reach_the_kernel_rounded_once() -> None:
    library, step = fresh_library(), step_of(lengths=[9], max_seq_len=20, head_dim=64)
    scales = [0.0, -0.3, 1.0, 1e-30, 1e38, *(1 / n for n in range(1, 100))]
    for scale in scales:
        step.scale = float32(scale)
        assert library.decode(step) == "GQA_SUCCESS"
        found = library.driver.last_launch().argument["scale_log2"]
        assert found == Params(scale_log2=step.scale * math.log2(math.e)).scale_log2


def test_negative_scales_decode_like_python() -> None:
    step = step_of(lengths=[9], max_seq_len=20, head_dim=64)
    step.scale = float32(-0.3)
    decode_both(step)


RAGGED: dict[str, tuple[dict[str, Any], int]] = {
    "multistage": (dict(lengths=[0, 17, 39], max_seq_len=40), 1),
    "clusters": (dict(lengths=[130, 0], max_seq_len=140, dtype=DType.BF16), 2),
    "dealt out by length": (dict(lengths=[700, 3], max_seq_len=4096, vec_width=4), 33),
}


@pytest.mark.parametrize(("sizes", "rows"), RAGGED.values(), ids=RAGGED)
def test_ragged_lengths_decode_like_python(sizes: dict[str, Any], rows: int) -> None:
    step, overflow = step_of(**sizes), torch.zeros(1, dtype=torch.int32)
    expected = ragged_by_python(step)
    workspace = workspace_of(chosen_for(step, ragged=True))
    launched = Simulator(fresh_library()).decode_ragged(step, overflow, workspace)
    assert_same(Result.of(launched, step), expected)
    step.check_memory()
    assert step.errors(step.out).share <= 1
    assert launched.shape.grid[1] == rows
    early = chosen_for(step, ragged=True).prefetch_first_tile
    assert launched.argument["prefetch_limit"] == (step.k_cache.shape[1] if early else 0)
    assert overflow.item() == 0


@pytest.mark.parametrize(  # multistage and clusters
    ("wrong", "max_seq_len"), diagonal(["full", "beyond", "largest"], [40, 140])
)
def test_a_sequence_that_does_not_fit_spoils_itself_alone(max_seq_len: int, wrong: str) -> None:
    lengths = {"full": max_seq_len, "beyond": max_seq_len + 1, "largest": 2**31 - 1}
    step = step_of(lengths=[0, 17, 5, 39], max_seq_len=max_seq_len)
    simulator = Simulator(fresh_library())
    overflow = torch.full((1,), 77, dtype=torch.int32)  # left alone when all fit
    simulator.decode_ragged(step, overflow, workspace_of(chosen_for(step, ragged=True)))
    right = step.out.clone()
    assert overflow.item() == 77
    restore(step)
    step.seqlens[2] = lengths[wrong]
    overflow.zero_()
    expected = ragged_by_python(step)
    launched = simulator.decode_ragged(step, overflow, workspace_of(chosen_for(step, ragged=True)))
    assert_same(Result.of(launched, step), expected)
    assert overflow.item() == 1 + 2
    assert step.out[2].isnan().all()
    others = torch.tensor([0, 1, 3])
    assert same_bits(step.out[others], right[others])
    step.check_memory(rejected=(2,))


@pytest.mark.parametrize("max_seq_len", [40, 140], ids=["multistage", "clusters"])
def test_a_sequence_of_negative_length_is_inactive(max_seq_len: int) -> None:
    step = step_of(lengths=[0, 17, 5, 39], max_seq_len=max_seq_len)
    step.seqlens[2] = -1
    overflow = torch.full((1,), 77, dtype=torch.int32)
    expected = ragged_by_python(step)
    launched = Simulator(fresh_library()).decode_ragged(
        step, overflow, workspace_of(chosen_for(step, ragged=True))
    )
    assert_same(Result.of(launched, step), expected)
    assert overflow.item() == 77 and (step.out[2] == 0).all() and not step.out.isnan().any()
    step.check_memory(rejected=(2,))


# Each feature alone, and pairs as Gemma 2 and gpt-oss have them; all together in clusters.
FEATURED = {
    "_".join(policy.tag for policy in kernel.policies): kernel
    for kernel in (
        *(replace(WIDE_64, policies=(policy,)) for policy in FEATURES),
        default_config(Math.TENSOROP, DType.BF16, 128, 2, 8, policies=tagged("win_cap")),
        default_config(Math.TENSOROP, DType.BF16, 64, 8, 8, policies=tagged("win_sink")),
        default_config(
            Math.TENSOROP, DType.BF16, 64, 4, 8, Schedule.TMA, policies=special(FEATURES)
        ),
    )
}


@pytest.fixture(scope="module")
def with_features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library of kernels with features."""
    folder = tmp_path_factory.mktemp("features")
    bundle = write_dummies(folder, FEATURED.values(), ("sm_80", "sm_90a"))
    return build(bundle, folder / "libgqa.so")


@pytest.mark.parametrize("kernel", FEATURED.values(), ids=FEATURED)
def test_features_decode_like_python(with_features: Path, kernel: KernelConfig) -> None:
    """With one length for all where that is possible, and with lengths on the device."""
    capacity, features = capacity_for(kernel), {policy.feature for policy in kernel.policies}
    length = capacity - 1 if kernel.tma else capacity // 2
    step = step_for(kernel, batch=2, length=length).asking_for_all(kernel.policies)
    if kernel.tma:
        step.window_size = (capacity - 3, 0)  # a smaller one is for one block
    overflow = torch.zeros(1, dtype=torch.int32)
    simulator = Simulator(fresh_copy(with_features))
    for ragged in (False, True) if "cache_batch_idx" not in features else (True,):
        workspace = workspace_of(chosen_for(step, ragged=ragged))
        if ragged:
            expected = featured_by_python(step, step.seqlens)
            launched = simulator.decode_ragged(step, overflow, workspace)
        else:
            expected = featured_by_python(step, step.lengths[0])
            launched = simulator.decode(step, workspace)
        assert launched.kernel == kernel.name
        assert_same(Result.of(launched, step), expected)
        step.check_memory()
        assert step.errors(step.out).share <= 1
        assert overflow.item() == 0
        restore(step)


def test_features_are_logged_as_in_python(with_features: Path) -> None:
    for tags in ("win_cap", "sink", "alibi", "pad"):
        kernel, lines = FEATURED[tags], list[str]()
        step = step_for(kernel, batch=2, length=20).asking_for_all(kernel.policies)
        library = fresh_copy(with_features)
        library.log_to(lines)
        assert library.decode(step, config_of(step)) == "GQA_SUCCESS", library.error
        plan = gqa_cutlass.plan(
            *step.tensors(), cache_seqlens=20, out=step.out, softmax_scale=step.scale,
            **step.features(),
        )  # fmt: skip
        expected, found = parse(f"launch {LaunchRecord.of(plan, 20, 0, 0)}"), parse(lines[0])
        assert float(found.pop("softmax_scale")) == pytest.approx(step.scale, rel=1e-7)
        assert found | {"softmax_scale": expected["softmax_scale"]} == expected
        assert list(found) == [key for key in expected if key != "softmax_scale"]


@pytest.mark.parametrize("kind", NUMBERS)
def test_sinks_of_every_type_decode_like_python(with_features: Path, kind: torch.dtype) -> None:
    step = step_for(FEATURED["sink"], batch=1, length=20).asking_for_all(FEATURED["sink"].policies)
    assert step.sinks is not None
    step.sinks = step.sinks.to(kind)
    expected = featured_by_python(step, 20)
    launched = Simulator(fresh_copy(with_features)).decode(step)
    assert_same(Result.of(launched, step), expected)


def test_an_index_that_names_no_row_spoils_its_sequence_alone(with_features: Path) -> None:
    kernel = FEATURED["idx"]
    step = step_for(kernel, batch=2, length=20).asking_for_all(kernel.policies)
    assert step.cache_batch_idx is not None
    step.cache_batch_idx[1] = step.k_cache.shape[0]
    overflow = torch.zeros(1, dtype=torch.int32)
    expected = featured_by_python(step, step.seqlens)
    launched = Simulator(fresh_copy(with_features)).decode_ragged(step, overflow)
    assert_same(Result.of(launched, step), expected)
    assert overflow.item() == 1 + 1
    assert step.out[1].isnan().all() and not step.out[0].isnan().any()


def test_a_window_that_hides_nothing_decodes_like_python() -> None:
    """By the plain kernel."""
    step = step_for(WIDE_64, batch=1, length=20)
    for left in (step.k_cache.shape[1] - 1, 2**30 - 1):
        step.window_size = (left, 0)
        expected = featured_by_python(step, 20)
        launched = Simulator(fresh_library()).decode(step)
        assert launched.kernel == WIDE_64.name
        assert_same(Result.of(launched, step), expected)
        restore(step)


@pytest.mark.parametrize("cache_len", [40, 41, 2**31 - 1])
def test_overflow_is_refused_before_anything_is_written(cache_len: int) -> None:
    step, library = step_of(lengths=[3], max_seq_len=40), fresh_library()
    Simulator(library)
    config = config_of(step)
    config.cache_len = cache_len
    out = step.out.clone()
    assert library.decode(step, config) == "GQA_ERROR_CACHE_OVERFLOW"
    with pytest.raises(CacheOverflowError) as refused:
        gqa_decode(*step.tensors(), cache_seqlens=cache_len)
    assert f"gqa_decode: {library.error}" == str(refused.value)
    assert same_bits(step.out, out)
    step.check_memory(rejected=(0,))
    assert library.driver.all_calls() == {}


# Steps that need different amounts of workspace, or none; in clusters and in splits.
CONFIGURATIONS: list[dict[str, Any]] = [
    dict(lengths=[1100], max_seq_len=4096, num_kv_heads=1),
    dict(lengths=[200, 200], max_seq_len=512, vec_width=4),
    dict(lengths=[9], max_seq_len=30),
    dict(lengths=[300], max_seq_len=600, vec_width=2, head_dim=64, dtype=DType.BF16),
]


def test_one_workspace_serves_every_configuration_in_any_order() -> None:
    simulator = Simulator(fresh_library())
    steps = [step_of(**sizes) for sizes in CONFIGURATIONS]
    expected = [by_python(step) for step in steps]
    size = max(simulator.library.workspace_size(config_of(step)) for step in steps)
    workspace = torch.zeros(size // 4, dtype=torch.int32)
    for index in (0, 1, 2, 3, 1, 0):
        step = steps[index]
        launched = simulator.decode(step, workspace)
        assert_same(Result.of(launched, step), expected[index])
        assert not workspace[:NUM_MERGE_COUNTERS].any(), "counters are zero again"
        if launched.argument["merge_counters"]:
            assert launched.argument["merge_counters"] == workspace.data_ptr()
            assert launched.argument["split_workspace"] == workspace[NUM_MERGE_COUNTERS:].data_ptr()
        restore(step)
    assert workspace[NUM_MERGE_COUNTERS:].any(), "something was merged"


def test_a_workspace_that_is_asked_for_suffices_for_any_length_and_alignment() -> None:
    library = fresh_library()
    for sizes, width in ((s, w) for s in CONFIGURATIONS for w in (8, 4, 2)):
        step = step_of(**sizes | {"vec_width": width})
        workspace = torch.zeros(library.workspace_size(config_of(step)) // 4, dtype=torch.int32)
        overflow = torch.zeros(1, dtype=torch.int32)
        assert library.decode(step, config_of(step, workspace)) == "GQA_SUCCESS", library.error
        assert library.decode_ragged(step, overflow, config_of(step, workspace)) == "GQA_SUCCESS"


NARROW = {8: 8, 4: 4, 2: 2, 1: 1}  # elements to which a tensor is aligned, and the kernel's


@pytest.mark.parametrize("width", NARROW)
@pytest.mark.parametrize("tensor", ["output", "q", "k", "v", "kv_cache_k", "kv_cache_v"])
def test_a_misaligned_tensor_gets_a_narrower_kernel(tensor: str, width: int) -> None:
    step, library = step_of(lengths=[30], max_seq_len=512, num_kv_heads=1), fresh_library()
    field = {"output": "out", "kv_cache_k": "k_cache", "kv_cache_v": "v_cache"}.get(tensor, tensor)
    other = step_of(lengths=[30], max_seq_len=512, num_kv_heads=1, vec_width=width)
    setattr(step, field, getattr(other, field))
    chosen = chosen_for(step)
    assert chosen.config.vec_width == NARROW[width]
    config = config_of(step, workspace_of(chosen))
    assert library.decode(step, config) == "GQA_SUCCESS", library.error
    launched = library.driver.last_launch()
    assert (launched.kernel, launched.shape) == (chosen.config.name, chosen.shape)


@pytest.mark.parametrize("width", [4, 2, 1])
def test_narrow_kernels_decode_like_python(width: int) -> None:
    step = step_of(lengths=[11], max_seq_len=64, head_dim=64, vec_width=width)
    assert f"_align{width}_" in decode_both(step).kernel


@pytest.mark.parametrize(("head_dim", "group_size", "width"), [(128, 7, 4), (64, 7, 2), (96, 4, 1)])
def test_a_misaligned_tensor_without_a_narrow_kernel_is_unsupported(
    head_dim: int, group_size: int, width: int
) -> None:
    library = fresh_library()
    sizes = dict(lengths=[3], max_seq_len=30, head_dim=head_dim, group_size=group_size)
    assert library.decode(step_of(**sizes)) == "GQA_SUCCESS"
    assert library.decode(step_of(**sizes, vec_width=width)) == "GQA_ERROR_UNSUPPORTED"
    assert f"head_dim {head_dim}, {group_size} query heads per KV head, " in library.error
    assert f"rows aligned to {2 * width} bytes, on sm_90a" in library.error
    assert library.driver.launches == 1


def test_the_stream_is_the_callers() -> None:
    step, library = step_of(lengths=[3], max_seq_len=30), fresh_library()
    for stream in (None, 0x7F3A_0000_1C40):
        assert library.decode(step, stream=stream) == "GQA_SUCCESS"
        assert library.driver.last_launch().stream == (stream or 0)


# -- examples/decode.c

EXAMPLES = {
    "multistage": ((2, 8, 2, 64, 11, 40, "f16"), WIDE_64),
    "clusters": ((1, 8, 2, 128, 140, 300, "bf16"), TMA_128),
}


@pytest.fixture(scope="module")
def built_example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library with the example, whose main is a function like others."""
    folder = tmp_path_factory.mktemp("example")
    bundle = write_dummies(folder, [kernel for _, kernel in EXAMPLES.values()], ("sm_90a",))
    source = bundle / "examples" / "decode.c"
    return build(bundle, folder / "libgqa.so", "-Dmain=example", str(source))


@pytest.fixture
def example(built_example: Path) -> Library:
    """The same as in a new process."""
    return fresh_copy(built_example)


def run_example(library: Library, arguments: tuple[object, ...]) -> int:
    """The example's exit status."""
    words = [b"decode", *(str(argument).encode() for argument in arguments)]
    status = int(library.c.example(len(words), (ctypes.c_char_p * len(words))(*words)))
    ctypes.CDLL(None).fflush(None)
    return status


def simulate_example(library: Library, arguments: tuple[Any, ...]) -> Callable[[DriverLaunch], int]:
    """Runs the example's launch in ptxsim."""
    batch, q_heads, kv_heads, head_dim, _, max_seq_len, dtype = arguments
    kind = {"f16": torch.float16, "bf16": torch.bfloat16}[dtype]
    query, token = (batch, q_heads, head_dim), (batch, kv_heads, head_dim)
    cache = (batch, max_seq_len, kv_heads, head_dim)
    shapes = {"q": query, "k_cache": cache, "v_cache": cache, "k_new": token, "v_new": token,
              "out": query}  # fmt: skip
    simulator = Simulator(library)

    def at(address: int, shape: tuple[int, ...]) -> Tensor:
        memory = (ctypes.c_char * (2 * math.prod(shape))).from_address(address)
        return torch.frombuffer(memory, dtype=kind).view(shape)

    def launch(launched: DriverLaunch) -> int:
        fields = fields_of(argument_of(launched))
        simulator.tensors = {name: at(fields[name], shape) for name, shape in shapes.items()}
        return simulator.launch(launched)

    return launch


@pytest.mark.parametrize(("arguments", "kernel"), EXAMPLES.values(), ids=EXAMPLES)
def test_the_example_decodes_and_finds_itself_right(
    example: Library, arguments: tuple[Any, ...], kernel: KernelConfig,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    example.driver.on_launch(simulate_example(example, arguments))
    assert run_example(example, arguments) == 0
    printed = dict(line.split(" ", 1) for line in capfd.readouterr().out.splitlines())
    assert printed["kernel"] == kernel.name
    error, _, allowed = printed["error"].split()
    assert 0 < float(error) <= float(allowed)


def test_the_example_finds_a_kernel_that_does_nothing(
    example: Library, capfd: pytest.CaptureFixture[str]
) -> None:
    example.driver.on_launch(lambda launch: 0)
    assert run_example(example, EXAMPLES["multistage"][0]) == 1
    assert "the caches do not hold what they should" in capfd.readouterr().err


def test_the_example_takes_seven_arguments(example: Library) -> None:
    for arguments in ((), (1, 8, 2, 64, 11, 40), (1, 8, 2, 64, 11, 40, "f32")):
        assert run_example(example, arguments) == 2


def test_the_example_says_where_there_is_no_gpu(
    example: Library, capfd: pytest.CaptureFixture[str]
) -> None:
    example.driver.remove()
    assert run_example(example, EXAMPLES["multistage"][0]) == 77
    assert "no usable GPU" in capfd.readouterr().err
