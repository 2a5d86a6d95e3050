"""The kernel that merges: any layout, one launch, and who else has to do it."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from compiling import GROUP
from conftest import Record
from helpers import THOROUGH, by_name, check_registers, compiled, diagonal
from merging import DTYPES, FLOAT32, merged_by_kernel, parts, worst_share
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import gqa_cutlass.merge as module
from gqa_cutlass import merge_states, warmup
from gqa_cutlass.call.merge import MergeCall, merge
from gqa_cutlass.codegen import ARCHES, MergeConfig, NumberType, merges
from gqa_cutlass.codegen.schema.launch import LaunchShape
from gqa_cutlass.codegen.schema.merge import MergeParams
from gqa_cutlass.cpu.executor import cpu_executor
from gqa_cutlass.dispatch import model_device
from gqa_cutlass.errors import ConfigError, KernelMissingError
from gqa_cutlass.gpu import executor as gpu
from gqa_cutlass.merge import by_operators

pytestmark = pytest.mark.xdist_group(GROUP)

ON = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
TYPES = {
    NumberType.FLOAT32: torch.float32,
    NumberType.FLOAT16: torch.float16,
    NumberType.BFLOAT16: torch.bfloat16,
}


def wide(tensor: Tensor, dim: int) -> Tensor:
    """The same numbers in every second place of a dimension."""
    return torch.stack([tensor, torch.full_like(tensor, math.nan)], dim + 1).flatten(dim, dim + 1)[
        (slice(None),) * dim + (slice(None, None, 2),)
    ]


def shifted(tensor: Tensor, by: int) -> Tensor:
    """The same numbers, so many elements behind an address that is aligned."""
    memory = tensor.new_full((tensor.numel() + by,), math.nan)
    memory[by:] = tensor.flatten()
    return memory[by:].view(tensor.shape)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t,
    "parts apart": lambda t: wide(t, 0),
    "sequences apart": lambda t: wide(t, 1),
    "heads apart": lambda t: wide(t, t.dim() - 2),
    "heads before tokens": lambda t: t.transpose(2, -2).contiguous().transpose(2, -2),
    "parts behind": lambda t: t.movedim(0, 2).contiguous().movedim(2, 0),
    "misaligned": lambda t: shifted(t, 1),
}


@ON
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parts_may_lie_anyhow(device: str, dtype: torch.dtype, layout: str) -> None:
    odd = 5 * 16 // dtype.itemsize  # vectors of a row
    shapes = {1: (2, 3, 64), 2: (3, 5, 80), 5: (2, 3, 2, 128), 3: (1, 2, odd)}
    for num_parts, shape in shapes.items():
        outs, lses = parts(num_parts, *shape, dtype=dtype)
        lay = LAYOUTS[layout]
        given = lay(outs), lay(lses.unsqueeze(-1)).squeeze(-1)
        assert torch.equal(given[0], outs) and torch.equal(given[1], lses)
        found = merged_by_kernel(device, *given)
        assert worst_share(found, outs, lses) <= 1
        assert found[0].is_contiguous() and found[1].is_contiguous()


@ON
@pytest.mark.parametrize("count", [15, 16, 17, 32, 37])
def test_parts_may_be_many(device: str, count: int) -> None:
    """More than the argument lists: the rest of one tensor by its stride; a sequence is stacked."""
    outs, lses = parts(count, 2, 3, 64)
    right = merged_by_kernel(device, outs, lses)
    assert worst_share(right, outs, lses) <= 1
    listed = merged_by_kernel(device, list(outs), list(lses))
    assert all(map(torch.equal, listed, right))


@ON
def test_parts_of_a_sequence_may_have_strides_of_their_own(device: str) -> None:
    outs, lses = parts(3, 2, 3, 64)
    right = merged_by_kernel(device, outs, lses)
    apart = [outs[0], wide(outs[1], 1), wide(outs[2], 0)]
    assert all(map(torch.equal, merged_by_kernel(device, apart, lses), right))


# What no kernel may do, as it is given: outs and lses of 2 parts.
Given = tuple[Any, Any]
DECLINED: dict[str, Callable[[Tensor, Tensor], Given]] = {
    "an output that learns": lambda outs, lses: (outs.requires_grad_(), lses),
    "sums that learn": lambda outs, lses: (outs, lses.requires_grad_()),
    "a parameter": lambda outs, lses: (torch.nn.Parameter(outs, requires_grad=False), lses),
    "head_dim apart": lambda outs, lses: (wide(outs, 3), lses),
    "head_dim in one place": lambda outs, lses: (outs[..., :1].expand_as(outs), lses),
    "no sequence": lambda outs, lses: (outs[:, :0], lses[:, :0]),
    "no head_dim": lambda outs, lses: (outs[..., :0], lses),
}


@pytest.fixture
def no_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CPU tensors the kernel is tried, and must not come to a launch."""

    def refuse(*given: object) -> None:
        raise AssertionError("launched")

    monkeypatch.setattr(module, "_BY_KERNEL", frozenset({"cpu"}))
    monkeypatch.setattr(cpu_executor(), "merge", refuse, raising=False)


@pytest.mark.usefixtures("no_launch")
@pytest.mark.parametrize("kind", DECLINED)
def test_operators_do_what_no_kernel_may(kind: str) -> None:
    given = DECLINED[kind](*parts(2, 2, 3, 64))
    right = by_operators(*given, torch.float32)
    assert all(map(torch.equal, merge_states(*given), right))


@pytest.mark.usefixtures("no_launch")
def test_what_learns_gets_its_gradients() -> None:
    outs, lses = (t.requires_grad_() for t in parts(2, 2, 3, 64))
    out, lse = merge_states(outs, lses)
    (out.sum() + lse.sum()).backward()
    assert outs.grad is not None and lses.grad is not None


@pytest.mark.usefixtures("no_launch")
def test_operators_do_what_torch_records_or_transforms() -> None:
    outs, lses = parts(2, 2, 3, 64)
    right = by_operators(outs, lses, torch.float32)
    traced = torch.jit.trace(lambda o, s: merge_states(o, s), (outs, lses), check_trace=False)
    assert all(map(torch.equal, traced(outs + 1, lses), by_operators(outs + 1, lses, outs.dtype)))
    mapped = torch.vmap(merge_states, in_dims=1)(outs.unsqueeze(1), lses.unsqueeze(1))
    assert all(torch.equal(m[0], r) for m, r in zip(mapped, right, strict=True))
    made = make_fx(lambda o, s: merge_states(o, s))(outs, lses)
    assert all(map(torch.equal, made(outs + 1, lses), by_operators(outs + 1, lses, outs.dtype)))
    with FakeTensorMode() as mode:
        found = merge_states(mode.from_tensor(outs), mode.from_tensor(lses))
    assert [t.shape for t in found] == [t.shape for t in right]


def test_parts_on_a_gpu_that_is_not_there_can_be_made_up() -> None:
    with FakeTensorMode():
        outs = torch.empty(2, 3, 4, 64, device="cuda", dtype=torch.float16)
        out, lse = merge_states(outs, torch.empty(2, 3, 4, device="cuda"))
    assert (out.shape, out.dtype, lse.shape) == ((3, 4, 64), torch.float16, (3, 4))


@ON
def test_a_compiled_merge_is_one_operator(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BY_KERNEL", frozenset({device}))
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, example: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(merge_states, backend=backend, fullgraph=True)
    outs, lses = (t.to(device) for t in parts(3, 2, 3, 64, dtype=torch.bfloat16))
    right = merge_states(outs, lses, out_dtype=torch.float32)
    for given in ((outs, lses), (list(outs), list(lses)), (list(outs), lses)):
        assert all(map(torch.equal, compiled(*given, out_dtype=torch.float32), right))
        assert "gqa_cutlass.merge_states" in graphs[-1].code and "softmax" not in graphs[-1].code
    torch._dynamo.reset()


def test_the_operator_is_what_torch_expects() -> None:
    import gqa_cutlass.ops  # noqa: F401

    outs, lses = parts(2, 2, 3, 2, 64, dtype=torch.float16)
    operator = torch.ops.gqa_cutlass.merge_states
    torch.library.opcheck(operator, (list(outs), list(lses), torch.float32))


UNUSUAL = replace(FLOAT32, dtype=NumberType.FLOAT16, out_dtype=NumberType.BFLOAT16, vec_width=2)


@ON
def test_a_kernel_that_is_absent_is_named(
    device: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    """As for decode; on a GPU, during a capture, for that is where nothing is compiled."""
    monkeypatch.setenv("GQA_CUTLASS_CACHE_DIR", str(tmp_path))
    outs, lses = (t.to(device) for t in parts(2, 2, 3, 66, dtype=torch.float16))
    monkeypatch.setattr(module, "_BY_KERNEL", frozenset({device}))
    with pytest.raises(KernelMissingError, match=rf"warmup.*--kernels {UNUSUAL.name}"):
        if device == "cuda":
            with torch.cuda.graph(torch.cuda.CUDAGraph()):
                merge_states(outs, lses, out_dtype=torch.bfloat16)
        else:
            monkeypatch.setenv("GQA_CUTLASS_DISABLE_JIT", "1")
            merge_states(outs, lses, out_dtype=torch.bfloat16)


def test_a_gpu_launches_with_every_argument_by_what_it_prepared_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[MergeCall] = []
    monkeypatch.setattr(cpu_executor(), "merge", lambda call, stream: calls.append(call))
    for seed in range(3):
        merge(lambda device: cpu_executor(), *parts(2, 2, 3, 64, seed=seed), torch.float32)
    prepared, launched = [], []

    def prepare(shape: LaunchShape, argument: MergeParams) -> Callable[[int], None]:
        prepared.append(shape)
        return lambda stream: launched.append((bytes(argument), stream))

    monkeypatch.setattr(gpu, "describe_device", lambda index: model_device(ARCHES["sm_90a"]))
    monkeypatch.setattr(gpu, "_load", lambda config, device: SimpleNamespace(prepare=prepare))
    gpu._merging.cache_clear()
    executor: Any = SimpleNamespace(device=model_device(ARCHES["sm_90a"]))
    for call in calls:
        gpu.GpuExecutor.merge(executor, call, 7)
    gpu._merging.cache_clear()
    assert prepared == [LaunchShape(grid=(1, 1, 1), block=128, shared_bytes=0)]
    assert launched == [(bytes(call.argument), 7) for call in calls]
    assert len(set(launched)) == 3


def test_warmup_takes_kernels_that_merge(monkeypatch: pytest.MonkeyPatch) -> None:
    assert warmup([FLOAT32], device="cpu") == [FLOAT32]
    monkeypatch.setenv("GQA_CUTLASS_DISABLE_JIT", "1")
    merged_by_kernel("cpu", *parts(2, 2, 3, 64))


def test_a_launch_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "gqa_cutlass"):
        merged_by_kernel("cpu", *parts(2, 2, 3, 64))
    (line,) = (r.getMessage() for r in caplog.records if r.levelno == logging.DEBUG)
    assert line == f"merge kernel={FLOAT32.name} parts=2 shape=[2, 3, 64] device=cpu stream=0"


def test_names_are_parsed_back() -> None:
    for config in (*merges(), UNUSUAL):
        assert MergeConfig.from_name(config.name) == config
    with pytest.raises(ConfigError, match="MergeConfig: name: got 'gqa_merge_x'; allowed: names"):
        MergeConfig.from_name("gqa_merge_x")
    with pytest.raises(ConfigError, match=r"vec_width: got 8; allowed: one of \[1, 2, 4\] with"):
        replace(FLOAT32, vec_width=8)
    with pytest.raises(ConfigError, match=r"parts_at_once: got 2; allowed: one of \[4, 8\]"):
        replace(FLOAT32, parts_at_once=2)


@pytest.mark.parametrize(("arch", "config"), diagonal(["sm_90a", "sm_100f"], merges()[::5]))
def test_kernels_compile_without_spills(arch: str, config: MergeConfig) -> None:
    check_registers(compiled(config, arch), config.max_registers)


@THOROUGH
@pytest.mark.parametrize("config", by_name(merges()))
@pytest.mark.parametrize("arch", ARCHES)
def test_every_kernel_compiles_without_spills(arch: str, config: MergeConfig) -> None:
    check_registers(compiled(config, arch), config.max_registers)


@pytest.mark.sanitized
@pytest.mark.gpu
@pytest.mark.parametrize("config", by_name(merges()))
def test_a_gpu_merges_by_every_kernel(
    config: MergeConfig, record: Record, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "gqa_cutlass")
    shares = []
    shapes = (3, 5, 64), (64, 32, 128), (7, 4, 9, 80), (5, 3, 40)
    numbers = (1, 2, 3, 4) if config.parts_at_once == 4 else (5, 8, 16, 33)
    for number, shape in zip(numbers, shapes, strict=True):
        outs, lses = parts(number, *shape, dtype=TYPES[config.dtype])
        lses[0, 0] = lses[:, -1, 0] = -math.inf
        given = outs if config.vec_width > 1 else shifted(outs, 1)
        found = merged_by_kernel("cuda", given, lses, out_dtype=TYPES[config.out_dtype])
        shares.append(worst_share(found, outs, lses))
    assert max(shares) <= 1
    lines = [r.getMessage() for r in caplog.records if r.getMessage().startswith("merge ")]
    assert len(lines) == len(shapes)
    assert all(f" kernel={config.name} " in line for line in lines)
    record.add(config, len(shares), max(shares))


@pytest.mark.gpu
def test_a_captured_merge_is_replayed_on_new_parts() -> None:
    outs, lses = (t.cuda() for t in parts(2, 4, 8, 128, dtype=torch.bfloat16))
    merge_states(list(outs), list(lses))  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = merge_states(list(outs), list(lses))
    for seed in range(3):
        new_outs, new_lses = parts(2, 4, 8, 128, dtype=torch.bfloat16, seed=seed)
        outs.copy_(new_outs)
        lses.copy_(new_lses)
        graph.replay()
        assert worst_share((found[0].cpu(), found[1].cpu()), new_outs, new_lses) <= 1


@pytest.mark.gpu
def test_merges_from_threads_and_streams_do_not_mix() -> None:
    given = [tuple(t.cuda() for t in parts(3, 4, 8, 128, seed=i)) for i in range(8)]
    right = [merge_states(*each)[0] for each in given]
    torch.cuda.synchronize()

    def work(i: int) -> bool:
        with torch.cuda.stream(torch.cuda.Stream()):
            found = [merge_states(*given[i])[0] for _ in range(200)]
            torch.cuda.current_stream().synchronize()
        return all(torch.equal(each, right[i]) for each in found)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))
