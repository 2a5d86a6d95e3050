"""The exported C library on a GPU: the same kernels, launches and bits as from Python."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import cases
import numpy as np
import pytest
import torch
from c_build import compile_with, includes, sources
from c_library import NUMBERS, config_of, scales_of
from exported import Library, Shape, Step, by_python, current_stream, example_by_python, step_of
from torch import Tensor

import gqa_cutlass
from gqa_cutlass import api, gqa_decode
from gqa_cutlass.call.record import parse
from gqa_cutlass.codegen import DType, Math, Schedule, default_config
from gqa_cutlass.codegen.schema.policies import tagged
from gqa_cutlass.kernels.export import compiled, plan_export, write_bundle
from gqa_cutlass.kernels.store import Store
from gqa_cutlass.proof.reference import same_bits
from gqa_cutlass.tuning import table

pytestmark = [pytest.mark.gpu, pytest.mark.xdist_group("gpu_export")]

KERNELS = (
    "f16_f16_d128_g4_align8,bf16_bf16_d128_g4_align8,f16_f16_d64_g7,f16_f16_d96_g1_align8,"
    "f16_f16_d128_g2_align8*win_cap,bf16_bf16_d64_g8_align8*win_sink,f16_f16_d192v128_g4_align8,"
    "f16_e4m3_d128_g4_align8,bf16_e5m2_d64_g8_align8"
)
SHAPES = {
    "one tile per warp": Shape(1, 32, 8, 128, 10, 64, "f16"),
    "cluster": Shape(2, 32, 8, 128, 1000, 4096, "bf16"),
    "odd group": Shape(1, 14, 2, 64, 500, 1024, "f16"),
    "partial boxes": Shape(3, 32, 32, 96, 100, 300, "f16"),
    "splits": Shape(1, 32, 32, 96, 1900, 2000, "f16"),
    "clusters of a large cache": Shape(1, 32, 8, 128, 30000, 65536 + 32768, "f16"),
    "empty cache": Shape(2, 32, 8, 128, 0, 256, "bf16"),
    "last position": Shape(2, 32, 8, 128, 4095, 4096, "f16"),
}
# Small ones, whose data are hashed byte by byte.
EXAMPLES = (
    SHAPES["one tile per warp"],
    Shape(2, 32, 8, 128, 200, 300, "bf16"),
    SHAPES["odd group"],
    Shape(1, 32, 32, 96, 50, 80, "f16"),
)


@pytest.fixture(autouse=True)
def without_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """C has no tables of launches, and is compared with Python's model."""
    monkeypatch.setattr(table, "tables", lambda gpu: ())
    for name in ("known", "latest"):
        monkeypatch.setattr(api._PLANS, name, {})


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of a few kernels."""
    out = tmp_path_factory.mktemp("export") / "bundle"
    dependent = [
        replace(default_config(Math.TENSOROP, DType.F16, 128, 4, 8, schedule), pdl=True).name
        for schedule in Schedule
    ]
    of_tokens = [
        default_config(Math.TENSOROP, dtype, 128, 4, 8, schedule, tagged(tags)).name
        for dtype, tags in ((DType.F16, "e4m3t"), (DType.BF16, "e5m2t"))
        for schedule in Schedule
    ]
    wanted = plan_export(",".join((KERNELS, *dependent, *of_tokens)), ["sm_80", "sm_90a"])
    write_bundle(out, wanted, compiled(wanted, Store.default(), 0))
    return out


@pytest.fixture(scope="module")
def library(bundle: Path) -> Library:
    """The exported library, built for this machine."""
    out = bundle / "libgqa.so"
    flags = ("-std=c11", "-O2", "-shared", "-fPIC", "-ffp-contract=off", "-Wall", "-Werror")
    compile_with("gcc", *flags, *includes(bundle), *sources(bundle), "-o", out, "-pthread", "-ldl",
                 "-lm")  # fmt: skip
    return Library(out)


def explained(shape: Shape, step: Step, lengths: int | Tensor) -> dict[str, str]:
    """What Python's log would say of the launch, where the two are told alike."""
    plan = gqa_cutlass.plan(
        step.q, step.k_cache, step.v_cache, step.k, step.v, cache_seqlens=lengths,
        softmax_scale=shape.scale,
    )  # fmt: skip
    launched = plan.dispatch.shape
    return {
        "kernel": plan.dispatch.config.name,
        "grid": ",".join(map(str, launched.grid)),
        "cluster": f"1,{launched.cluster},1",
        "block": str(launched.block),
        "shared_bytes": str(launched.shared_bytes),
        "num_splits": str(plan.dispatch.num_splits),
        "num_stages": str(plan.dispatch.num_stages),
    }


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_c_gives_the_bits_of_python(library: Library, shape: Shape) -> None:
    ours = step_of(shape)
    theirs = ours.copy()
    by_python(ours, shape)
    library.decode(theirs, shape.config(), times=2)
    assert all(map(torch.equal, ours.bits(), theirs.bits()))
    assert not ours.out.isnan().any()
    launched = parse(library.lines[-1])
    expected = explained(shape, ours, shape.cache_len)
    assert {key: launched[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("shape", "tags", "window", "softcap"),
    [
        (Shape(2, 32, 8, 128, 5000, 8192, "f16"), "_win", 4096, 0.0),
        (Shape(2, 16, 8, 128, 5000, 8192, "f16"), "_win_cap", 4096, 50.0),
        (Shape(2, 64, 8, 64, 1000, 4096, "bf16"), "_win_sink", 128, 0.0),
    ],
    ids=["Mistral", "Gemma 2", "gpt-oss"],
)
def test_features_give_the_bits_of_python(
    library: Library, shape: Shape, tags: str, window: int, softcap: float
) -> None:
    ours = step_of(shape)
    theirs = ours.copy()
    sinks = None
    config = shape.config()
    config.window, config.softcap = window, softcap
    if "sink" in tags:
        sinks = torch.linspace(-2, 7, shape.q_heads, device="cuda", dtype=torch.bfloat16)
        config.sinks, config.sinks_type = sinks.data_ptr(), NUMBERS[sinks.dtype]
    gqa_decode(
        ours.q, ours.k_cache, ours.v_cache, ours.k, ours.v, cache_seqlens=shape.cache_len,
        softmax_scale=shape.scale, out=ours.out.unflatten(-1, (shape.q_heads, shape.head_dim)),
        window_size=(window - 1, 0), softcap=softcap, sinks=sinks,
    )  # fmt: skip
    library.decode(theirs, config)
    assert all(map(torch.equal, ours.bits(), theirs.bits()))
    assert not ours.out.isnan().any()
    assert parse(library.lines[-1])["kernel"].endswith(tags)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        (Shape(8, 32, 8, 128, 5000, 8192, "f16"), torch.float8_e4m3fn),
        (Shape(1, 32, 8, 128, 3000, 4096, "f16"), torch.float8_e4m3fn),
        (Shape(2, 64, 8, 64, 1000, 4096, "bf16"), torch.float8_e5m2),
    ],
    ids=["splits", "clusters", "half a box"],
)
def test_caches_of_8_bits_give_the_bits_of_python(
    library: Library, shape: Shape, dtype: torch.dtype
) -> None:
    """With scales of sequences and KV heads for keys, and one number for values."""
    wide = step_of(shape)
    ours = replace(wide, k_cache=wide.k_cache.to(dtype), v_cache=wide.v_cache.to(dtype))
    theirs = ours.copy()
    scales = torch.rand(shape.batch, 2 * shape.kv_heads, device="cuda")[:, ::2] + 0.5
    gqa_decode(
        ours.q, ours.k_cache, ours.v_cache, ours.k, ours.v, cache_seqlens=shape.cache_len,
        softmax_scale=shape.scale, out=ours.out.unflatten(-1, (shape.q_heads, shape.head_dim)),
        k_scale=scales, v_scale=0.375,
    )  # fmt: skip
    config = shape.config()
    for field, value in scales_of(ours.k_cache, scales, 0.375).items():
        setattr(config, field, value)
    library.decode(theirs, config)
    assert all(map(torch.equal, ours.bits(), theirs.bits()))
    assert not ours.out.isnan().any()
    assert f"_{str(dtype)[len('torch.float8_') :][:4]}_" in parse(library.lines[-1])["kernel"]


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        (Shape(8, 32, 8, 128, 5000, 8192, "f16"), torch.float8_e4m3fn),
        (Shape(1, 32, 8, 128, 3000, 4096, "bf16"), torch.float8_e5m2),
    ],
    ids=["many", "one"],
)
def test_scales_of_tokens_give_the_bits_of_python(
    library: Library, shape: Shape, dtype: torch.dtype
) -> None:
    """And are written alike; those of keys in rows that lie apart."""
    wide = step_of(shape)
    ours = replace(wide, k_cache=wide.k_cache.to(dtype), v_cache=wide.v_cache.to(dtype))
    theirs = ours.copy()
    tokens, heads = shape.max_seq_len, shape.kv_heads
    apart = torch.rand(shape.batch, tokens + 1, heads, device="cuda") + 0.5
    packed = torch.rand(shape.batch, tokens, heads, device="cuda") + 0.5
    our_scales, before = (apart[:, :tokens], packed), (apart.clone(), packed.clone())
    their_scales = apart.clone()[:, :tokens], packed.clone()
    gqa_decode(
        ours.q, ours.k_cache, ours.v_cache, ours.k, ours.v, cache_seqlens=shape.cache_len,
        softmax_scale=shape.scale, out=ours.out.unflatten(-1, (shape.q_heads, shape.head_dim)),
        k_scale=our_scales[0], v_scale=our_scales[1],
    )  # fmt: skip
    config = shape.config()
    for field, value in scales_of(ours.k_cache, *their_scales).items():
        setattr(config, field, value)
    library.decode(theirs, config)
    assert all(map(torch.equal, ours.bits(), theirs.bits()))
    assert all(map(torch.equal, our_scales, their_scales))
    for now, then in zip((apart, packed), before, strict=True):
        changed = (now != then).nonzero()[:, 1].unique().tolist()
        assert changed == [shape.cache_len]
    assert not ours.out.isnan().any()
    assert f"_{str(dtype)[len('torch.float8_') :][:4]}t_" in parse(library.lines[-1])["kernel"]


@pytest.mark.parametrize("dependent", [False, True], ids=["ordinary", "dependent"])
@pytest.mark.parametrize(
    "shape",
    [SHAPES["one tile per warp"], Shape(2, 32, 8, 128, 1000, 4096, "f16")],
    ids=["one tile per warp", "cluster"],
)
def test_strides_and_lse_give_the_bits_of_python(
    library: Library, shape: Shape, dependent: bool
) -> None:
    """Of caches with heads before tokens, in ordinary and in dependent launches."""
    packed = step_of(shape)
    heads_first = {
        name: getattr(packed, name).transpose(1, 2).contiguous().transpose(1, 2)
        for name in ("k_cache", "v_cache")
    }
    ours = replace(packed, **heads_first)
    theirs = ours.copy()
    plan = gqa_cutlass.plan(
        ours.q, ours.k_cache, ours.v_cache, ours.k, ours.v, cache_seqlens=shape.cache_len,
        softmax_scale=shape.scale, return_lse=True, dependent=dependent,
        out=ours.out.view(ours.q.shape),
    )  # fmt: skip
    _, expected = plan(
        ours.q, ours.k_cache, ours.v_cache, ours.k, ours.v, shape.cache_len,
        ours.out.view(ours.q.shape),
    )  # fmt: skip
    lse, config = torch.full_like(expected, torch.nan), shape.config()
    config.lse, config.dependent = lse.data_ptr(), int(dependent)
    for cache in ("kv_cache_k", "kv_cache_v"):
        setattr(config, f"{cache}_token_stride", shape.head_dim)
        setattr(config, f"{cache}_head_stride", shape.head_dim * shape.max_seq_len)
    library.decode(theirs, config, times=3)  # launches that may overlap
    assert all(map(torch.equal, ours.bits(), theirs.bits()))
    assert torch.equal(lse, expected) and lse.isfinite().all()
    launched = parse(library.lines[-1])
    assert (launched["dependent"], launched["return_lse"]) == (str(dependent), "True")
    assert launched["kernel"] == plan.dispatch.config.name


def test_ragged_lengths_give_the_bits_of_python_and_one_overflow_spoils_itself_alone(
    library: Library,
) -> None:
    shape = Shape(4, 32, 8, 128, 0, 8192, "f16")
    lengths = torch.tensor([8000, 3, 8192, 0], dtype=torch.int32, device="cuda")
    ours = step_of(shape, filled=8192)
    theirs = ours.copy()
    gqa_decode(
        ours.q, ours.k_cache, ours.v_cache, ours.k, ours.v, cache_seqlens=lengths,
        softmax_scale=shape.scale, out=ours.out.unflatten(-1, (32, 128)),
    )  # fmt: skip
    with pytest.raises(gqa_cutlass.CacheOverflowError):
        gqa_cutlass.check_overflow()
    overflow = torch.zeros(1, dtype=torch.int32, device="cuda")
    workspace = library.workspace(shape.config())
    status = library.call(
        "gqa_attention_decode_ragged", *theirs.addresses(), lengths.data_ptr(),
        overflow.data_ptr(), shape.config(workspace), current_stream(),
    )  # fmt: skip
    assert status == 0, library.lines[-1]
    assert all(map(torch.equal, ours.bits(), theirs.bits()))
    assert overflow.item() == 3 and theirs.out[2].isnan().all()
    assert not theirs.out[[0, 1, 3]].isnan().any()
    launched = parse(library.lines[-1])
    expected = explained(shape, ours, lengths)
    assert {key: launched[key] for key in expected} == expected


@dataclass(frozen=True, kw_only=True)
class Row:
    """What a step asks for."""

    page_size: int = 0
    float32: bool = False
    value_dim: int | None = None
    lengths: tuple[int, ...] = (1000, 3, 0)

    def step(self) -> cases.Step:
        """Random tensors."""
        step = cases.make_step(
            lengths=[*self.lengths], max_seq_len=max(self.lengths) + 40, num_kv_heads=4,
            head_dim=128 if self.value_dim is None else 192, head_dim_v=self.value_dim,
        )  # fmt: skip
        step.scale = float(np.float32(step.scale))
        if self.page_size:
            step.into_pages(self.page_size)
        if self.float32:
            step.in_float32()
        return step


@pytest.mark.parametrize(
    "row",
    [
        Row(page_size=16), Row(page_size=3), Row(page_size=64, lengths=(30000, 17)),
        Row(float32=True), Row(value_dim=128), Row(value_dim=128, lengths=(9000,)),
    ],
    ids=["pages of 16", "pages of 3", "long ones in pages of 64", "float32", "values of 128 dims",
         "long ones with values of 128 dims"],
)  # fmt: skip
def test_rows_of_features_give_the_bits_of_python(library: Library, row: Row) -> None:
    """And the log-sum-exp, with lengths on the device."""
    step = row.step()
    _, expected = gqa_decode(
        *step.tensors(), cache_seqlens=step.seqlens, softmax_scale=step.scale, out=step.out,
        return_lse=True, **step.features(),
    )  # fmt: skip
    step.check_memory()
    assert step.errors(step.out).share <= 1
    written = [t.clone() for t in (step.out, step.k_cache, step.v_cache)]
    step.out.fill_(float("nan"))
    for name in ("k_cache", "v_cache"):
        getattr(step, name).copy_(step.before[name])
    lse, overflow = torch.full_like(expected, torch.nan), torch.zeros(1, dtype=torch.int32).cuda()
    workspace = library.workspace(config_of(step, lse=lse))
    q, k_cache, v_cache, k, v = step.tensors()
    assert k is not None and v is not None
    status = library.call(
        "gqa_attention_decode_ragged",
        *(t.data_ptr() for t in (step.out, q, k, v, k_cache, v_cache, step.seqlens, overflow)),
        config_of(step, workspace, lse), current_stream(),
    )  # fmt: skip
    assert status == 0, library.lines[-1]
    for found, right in zip((step.out, step.k_cache, step.v_cache), written, strict=True):
        assert same_bits(found, right)
    assert torch.equal(lse, expected) and overflow.item() == 0


def test_a_launch_from_c_can_be_captured(library: Library) -> None:
    shape = SHAPES["cluster"]
    ours = step_of(shape)
    theirs = ours.copy()
    by_python(ours, shape)
    workspace = library.workspace(shape.config())
    config = shape.config(workspace)
    assert library.call("gqa_prepare", config) == 0, library.lines[-1]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        status = library.call("gqa_attention_decode", *theirs.addresses(), config, current_stream())
    assert status == 0, library.lines[-1]
    assert not theirs.out.any()
    graph.replay()
    assert all(map(torch.equal, ours.bits(), theirs.bits()))


def test_an_overflow_is_refused_and_nothing_written(library: Library) -> None:
    shape = replace(SHAPES["cluster"], cache_len=4096)
    step = step_of(shape)
    before = step.copy()
    config = shape.config(library.workspace(shape.config()))
    status = library.call("gqa_attention_decode", *step.addresses(), config, current_stream())
    torch.cuda.synchronize()
    assert status == 3 and "cache overflow" in library.lines[-1]
    assert all(map(torch.equal, step.bits(), before.bits()))


def c_example(bundle: Path) -> list[str]:
    """The command of the C example, built."""
    out = bundle / "decode"
    compile_with("gcc", "-std=c11", "-O2", "-ffp-contract=off", *includes(bundle),
                 *sources(bundle), bundle / "examples" / "decode.c", "-o", out, "-pthread", "-ldl",
                 "-lm")  # fmt: skip
    return [str(out)]


def rust_example(bundle: Path) -> list[str]:
    """The command of the Rust example."""
    if shutil.which("cargo") is None:
        pytest.skip("needs cargo")
    return ["cargo", "run", "-q", "--offline", "--manifest-path", str(bundle / "Cargo.toml"),
            "--example", "decode", "--"]  # fmt: skip


@pytest.mark.parametrize("example", [c_example, rust_example], ids=["C", "Rust"])
def test_the_examples_decode_and_give_the_bits_of_python(
    bundle: Path, example: Callable[[Path], list[str]]
) -> None:
    command = example(bundle)
    for shape in EXAMPLES:
        done = subprocess.run([*command, *shape.words()], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        printed = dict(line.split(" ", 1) for line in done.stdout.splitlines())
        output, cache = example_by_python(shape)
        assert (printed["output"], printed["cache"]) == (output, cache)
