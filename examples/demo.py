"""Generate, compile and run decode attention for real models, and check it against PyTorch."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

import gqa_cutlass
from gqa_cutlass.cli import built_table
from gqa_cutlass.codegen import DType, KernelConfig, Math, default_config
from gqa_cutlass.launcher import describe_device
from gqa_cutlass.store import Store, build_all

PROMPT, TOKENS, MAX_SEQ_LEN = 1000, 32, 2048
console = Console(width=160)


@dataclass(frozen=True)
class Model:
    name: str
    num_q_heads: int
    num_kv_heads: int
    head_dim: int

    @property
    def kernel(self) -> KernelConfig:
        group_size = self.num_q_heads // self.num_kv_heads
        return default_config(Math.TENSOROP, DType.BF16, self.head_dim, group_size, 8)


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
    gpu = torch.cuda.is_available()
    arch = describe_device(0).arch.name if gpu else "sm_90a"
    compile_kernels(arch)
    if not gpu:
        console.print("No GPU here: the kernels were generated and compiled, not run.")
        return 0
    return decode_models()


def compile_kernels(arch: str) -> None:
    """Build each model's kernel and print what the compiler made of it."""
    kernels = dict.fromkeys(model.kernel for model in MODELS)
    console.print(f"{len(kernels)} kernels serve {len(MODELS)} models; compiling for {arch}")
    store = Store.default()
    console.print(built_table(list(build_all(store, [(kernel, arch) for kernel in kernels]))))


def decode_models() -> int:
    """Decode consecutive tokens of every model, one layer each, beside PyTorch in float32."""
    table = Table("model", "kernel", "splits", "max error", "PyTorch's", "µs per token", "ok")
    failures = 0
    for model in MODELS:
        plan, ours, theirs, micros = decode(model)
        ok = ours <= 2 * theirs + 1e-5
        failures += not ok
        table.add_row(
            model.name, plan.dispatch.config.name, str(plan.dispatch.num_splits),
            f"{ours:.2e}", f"{theirs:.2e}", f"{micros:.1f}", "yes" if ok else "NO",
        )  # fmt: skip
    console.print(
        f"{TOKENS} tokens after a prompt of {PROMPT}, bfloat16, on {torch.cuda.get_device_name()}. "
        "Errors are against float32; PyTorch's is SDPA in bfloat16."
    )
    console.print(table)
    return failures


def decode(model: Model) -> tuple[gqa_cutlass.Plan, float, float, float]:
    """Decode TOKENS tokens; returns the plan, both largest errors and the median time."""
    kind = {"dtype": torch.bfloat16, "device": "cuda"}
    cache = 1, MAX_SEQ_LEN, model.num_kv_heads, model.head_dim
    k_cache, v_cache = torch.randn(cache, **kind), torch.randn(cache, **kind)
    seqlens = torch.full((1,), PROMPT, dtype=torch.int32, device="cuda")
    tokens = [
        [torch.randn(1, heads, model.head_dim, **kind) for heads in heads_of(model)]
        for _ in range(TOKENS)
    ]
    q, k, v = tokens[0]
    plan = gqa_cutlass.plan(q, k_cache, v_cache, k, v, cache_seqlens=seqlens)
    ours, theirs, micros = 0.0, 0.0, []
    for i, (q, k, v) in enumerate(tokens):
        out = plan(q, k_cache, v_cache, k, v, seqlens)
        seqlens += 1
        keys, values = k_cache[:, : PROMPT + i + 1], v_cache[:, : PROMPT + i + 1]
        exact = attention(q.float(), keys.float(), values.float())
        ours = max(ours, (out.float() - exact).abs().max().item())
        theirs = max(theirs, (attention(q, keys, values).float() - exact).abs().max().item())
        micros.append(time_call(partial(plan, q, k_cache, v_cache, k, v, seqlens)))
    return plan, ours, theirs, statistics.median(micros)


def heads_of(model: Model) -> tuple[int, int, int]:
    return model.num_q_heads, model.num_kv_heads, model.num_kv_heads


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    return F.scaled_dot_product_attention(q[:, :, None], k, v, enable_gqa=True)[:, :, 0]


def time_call(call: Callable[[], object], repeats: int = 20) -> float:
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
