"""Generate, compile and run decode attention for real models, and check it against PyTorch."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

import gqa_cutlass
from gqa_cutlass.codegen import KernelConfig
from gqa_cutlass.gpu.driver import describe_device
from gqa_cutlass.kernels.store import Store, StoredKernel, build_all

console = Console(width=160)


@dataclass(frozen=True)
class Run:
    """Where the demo decodes and how much: on the CPU kernels are interpreted, so less."""

    device: str
    prompt: int
    tokens: int
    max_seq_len: int


HOPPER = "sm_90a"  # whose dispatch CPU tensors follow
ON_GPU = Run("cuda", prompt=1000, tokens=32, max_seq_len=2048)
ON_CPU = Run("cpu", prompt=60, tokens=8, max_seq_len=256)


@dataclass(frozen=True)
class Model:
    name: str
    num_q_heads: int
    num_kv_heads: int
    head_dim: int

    def kernel(self, run: Run, arch: str) -> KernelConfig:
        """What the dispatcher chooses on a GPU."""
        kind = {"dtype": torch.bfloat16, "device": "meta"}
        q, k, v = (torch.empty(1, heads, self.head_dim, **kind) for heads in heads_of(self))
        cache = torch.empty(1, run.max_seq_len, self.num_kv_heads, self.head_dim, **kind)
        return gqa_cutlass.explain(q, cache, cache, k, v, arch=arch).dispatch.config


MODELS = (
    Model("Qwen2.5-0.5B", 14, 2, 64),
    Model("Qwen2.5-7B", 28, 4, 128),
    Model("Qwen3-30B-A3B", 32, 4, 128),
    Model("Phi-3-mini", 32, 32, 96),
    Model("Phi-3-medium", 40, 10, 128),
    Model("Llama-3-8B", 32, 8, 128),
    Model("Llama-3-70B", 64, 8, 128),
    Model("Gemma-2-9B", 16, 8, 256),
)


def main() -> int:
    torch.manual_seed(0)
    if torch.cuda.is_available():
        compile_kernels(ON_GPU, describe_device(0).arch.name)
        return decode_models(ON_GPU, torch.cuda.get_device_name())
    compile_kernels(ON_GPU, HOPPER)
    compile_kernels(ON_CPU, None)
    return decode_models(ON_CPU, "this CPU, in ptxsim: the same kernels, interpreted and checked")


def compile_kernels(run: Run, arch: str | None) -> None:
    """Build each model's kernel, without an architecture as PTX, and print what was made of it."""
    kernels = dict.fromkeys(model.kernel(run, arch or HOPPER) for model in MODELS)
    target = arch or "ptxsim"
    console.print(f"{len(kernels)} kernels serve {len(MODELS)} models; compiling for {target}")
    built = list(build_all(Store.default(), [(k, arch or k.ptx_arch) for k in kernels]))
    if arch:  # PTX has no registers yet
        console.print(built_table(built))


def built_table(built: list[StoredKernel]) -> Table:
    """Compiled kernels: registers, shared memory, spills, seconds, cubin size."""
    table = Table("kernel", "arch", "registers", "shared", "spills", "seconds", "cubin")
    for stored in built:
        c, config = stored.compiled, stored.config
        table.add_row(
            config.name, stored.arch, str(c.registers), str(config.shared_bytes),
            str(c.spill_bytes), f"{c.seconds:.2f}", f"{len(c.code)}",
        )  # fmt: skip
    return table


def decode_models(run: Run, where: str) -> int:
    """Decode consecutive tokens of every model, one layer each, beside PyTorch in float32."""
    unit = "µs per token" if run is ON_GPU else "s per token"
    table = Table("model", "kernel", "splits", "max error", "PyTorch's", unit, "ok")
    failures = 0
    for model in MODELS:
        plan, ours, theirs, spent = decode(model, run)
        ok = ours <= 2 * theirs + 1e-5
        failures += not ok
        table.add_row(
            model.name, plan.dispatch.config.name, str(plan.dispatch.num_splits),
            f"{ours:.2e}", f"{theirs:.2e}", f"{spent:.2f}", "yes" if ok else "NO",
        )  # fmt: skip
    console.print(
        f"{run.tokens} tokens after a prompt of {run.prompt}, bfloat16, on {where}. "
        "Errors are against float32; PyTorch's is SDPA in bfloat16."
    )
    console.print(table)
    return failures


def decode(model: Model, run: Run) -> tuple[gqa_cutlass.Plan, float, float, float]:
    """Decode tokens; returns the plan, both largest errors and the median time."""
    kind = {"dtype": torch.bfloat16, "device": run.device}
    cache = 1, run.max_seq_len, model.num_kv_heads, model.head_dim
    k_cache, v_cache = torch.randn(cache, **kind), torch.randn(cache, **kind)
    seqlens = torch.full((1,), run.prompt, dtype=torch.int32, device=run.device)
    tokens = [
        [torch.randn(1, heads, model.head_dim, **kind) for heads in heads_of(model)]
        for _ in range(run.tokens)
    ]
    q, k, v = tokens[0]
    plan = gqa_cutlass.plan(q, k_cache, v_cache, k, v, cache_seqlens=seqlens)
    ours, theirs, spent = 0.0, 0.0, []
    for i, (q, k, v) in enumerate(tokens):
        start = time.perf_counter()
        out = plan(q, k_cache, v_cache, k, v, seqlens)
        spent.append(time.perf_counter() - start)
        seqlens += 1
        keys, values = k_cache[:, : run.prompt + i + 1], v_cache[:, : run.prompt + i + 1]
        exact = attention(q.float(), keys.float(), values.float())
        ours = max(ours, (out.float() - exact).abs().max().item())
        theirs = max(theirs, (attention(q, keys, values).float() - exact).abs().max().item())
        if run is ON_GPU:
            spent[-1] = time_on_gpu(partial(plan, q, k_cache, v_cache, k, v, seqlens))
    return plan, ours, theirs, statistics.median(spent)


def heads_of(model: Model) -> tuple[int, int, int]:
    return model.num_q_heads, model.num_kv_heads, model.num_kv_heads


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    return F.scaled_dot_product_attention(q[:, :, None], k, v, enable_gqa=True)[:, :, 0]


def time_on_gpu(call: Callable[[], object], repeats: int = 20) -> float:
    """Time of one call in microseconds, replayed from a CUDA graph (the cache may be in L2)."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            call()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    graph.replay()
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3 / repeats


if __name__ == "__main__":
    sys.exit(main())
