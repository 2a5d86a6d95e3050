"""Models, filled caches and steps for `end_to_end`; the only part that imports transformers."""

from __future__ import annotations

import inspect
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor

from bench.e2e_points import Point, Run, Shape, Way
from gqa_cutlass.integrations.transformers import GqaCache, register
from gqa_cutlass.integrations.transformers_cache import Pending

ROOM = 64  # tokens behind the context, for the steps that are measured
WARM, BATCHES, STEPS = 4, 3, 5
_ELEMENT_BYTES = 2
_SPARE_BYTES = 3 * 2**30  # activations, logits, workspaces, the driver

Step = Callable[[], Tensor]


def build(shape: Shape, layers: int | None, device: str, dtype: torch.dtype) -> Any:
    """A model with random weights, allocated on the device."""
    register()
    config = getattr(transformers, shape.config)(
        num_hidden_layers=layers or shape.layers, max_position_embeddings=2**17, pad_token_id=0,
        bos_token_id=None, eos_token_id=None, **shape.sizes,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def too_large(model: Any, point: Point, way: Way) -> str | None:
    """Why a measurement cannot fit into the GPU's memory; None if it may."""
    if model.device.type != "cuda":
        return None
    config = model.config
    weights = sum(p.numel() for p in model.parameters()) * _ELEMENT_BYTES
    heads, head_dim = config.num_key_value_heads, _head_dim(config)
    layer = 2 * point.batch * (point.context + ROOM) * heads * head_dim * _ELEMENT_BYTES
    groups = config.num_attention_heads // heads
    # A dynamic cache is copied to grow, and eager attention repeats keys and values for all heads.
    temporary = layer * {"dynamic": 1, "static": 0, "ours": 0}[way.cache]
    temporary += layer * groups * (way.attention != "gqa_cutlass")
    needed = weights + layer * config.num_hidden_layers + temporary + _SPARE_BYTES
    total = torch.cuda.get_device_properties(model.device).total_memory
    if needed <= total:
        return None
    return f"needs {needed / 2**30:.0f} GiB of {total / 2**30:.0f}"


def make_step(model: Any, point: Point, way: Way) -> tuple[Step, Tensor]:
    """A step that decodes one more token per sequence, warm, and the logits of the first one."""
    model.set_attn_implementation(way.attention)
    cache = _filled(model, point, way.cache)
    device = model.device
    ids = torch.ones(point.batch, 1, dtype=torch.long, device=device)
    positions = torch.full((point.batch, 1), point.context, device=device)
    known = inspect.signature(model.forward).parameters
    named = {"cache" if "cache" in known else "past_key_values": cache}
    forward = model
    if way.run is Run.COMPILED:
        torch._dynamo.reset()
        how: dict[str, Any] = {"mode": "reduce-overhead"}
        if device.type == "cpu":
            how = {"backend": "eager"}
        forward = torch.compile(model, fullgraph=True, dynamic=False, **how)

    def step() -> Tensor:
        with torch.no_grad():
            torch.compiler.cudagraph_mark_step_begin()
            logits = forward(input_ids=ids, position_ids=positions, use_cache=True, **named).logits
        assert isinstance(logits, Tensor)
        return logits

    if way.run is Run.CAPTURED:
        return _captured(step)
    first = step().float().cpu()
    for _ in range(WARM):
        step()
    return step, first


def seconds_per_step(step: Step) -> float:
    """Median over a few batches of steps; the host waits once per batch."""
    times = []
    for _ in range(BATCHES):
        _wait()
        start = time.perf_counter()
        for _ in range(STEPS):
            step()
        _wait()
        times.append((time.perf_counter() - start) / STEPS)
    return statistics.median(times)


def _captured(step: Step) -> tuple[Step, Tensor]:
    """The step as a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        first = step().float().cpu()
        for _ in range(WARM):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay, first


def _filled(model: Any, point: Point, kind: str) -> Any:
    """A cache that holds random tokens, the same ones whatever its kind."""
    config, device = model.config, model.device
    layers, heads, head_dim = (
        config.num_hidden_layers, config.num_key_value_heads, _head_dim(config)
    )  # fmt: skip
    room = point.context + ROOM
    cache: Any
    if kind == "dynamic":
        cache = transformers.DynamicCache(config=config)
    else:
        make = {"static": transformers.StaticCache, "ours": GqaCache}[kind]
        cache = make(config=config, max_cache_len=room)
        cache.early_initialization(point.batch, heads, head_dim, model.dtype, device)
    generator = torch.Generator(device).manual_seed(1)
    shape = point.batch, heads, point.context, head_dim
    for index in range(layers):
        k, v = (
            torch.empty(shape, dtype=model.dtype, device=device).normal_(generator=generator)
            for _ in "kv"
        )
        if kind == "ours":
            cache.layers[index].append(Pending(cache.layers[index], k, v))
        else:
            cache.update(k, v, index)
    return cache


def _head_dim(config: Any) -> int:
    return int(
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
