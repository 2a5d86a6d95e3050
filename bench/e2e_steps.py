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
from gqa_cutlass.integrations.transformers_cache import GqaLayer, Pending

ROOM = 64  # tokens behind the context, for the steps that are measured
WARM, WARM_COMPILED = 1, 3  # Inductor's graphs are recorded in the second step
BATCHES, STEPS, SECONDS = 3, 5, 0.6  # steps are fewer where they are slow
_ELEMENT_BYTES = 2
_SLIDING = "sliding_attention"
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
    room = point.context + ROOM
    token = 2 * point.batch * heads * head_dim * _ELEMENT_BYTES
    layer = token * room
    kinds = _kinds(config)
    sliding = kinds.count(_SLIDING)
    held = layer * (len(kinds) - sliding)
    if sliding:  # a dynamic cache has all of the prompt until the first step
        window = room if way.cache == "dynamic" else min(room, config.sliding_window + 128)
        held += token * window * sliding
    groups = config.num_attention_heads // heads
    # A dynamic cache is copied to grow, and eager attention repeats keys and values for all heads.
    temporary = layer * {"dynamic": 1, "static": 0, "ours": 0}[way.cache]
    temporary += layer * groups * (way.attention != "gqa_cutlass")
    needed = weights + held + max(layer, temporary) + _SPARE_BYTES  # caches are filled from a layer
    total = torch.cuda.get_device_properties(model.device).total_memory
    if needed <= total:
        return None
    return f"needs {needed / 2**30:.0f} GiB of {total / 2**30:.0f}"


def no_capture(model: Any, point: Point, way: Way) -> str | None:
    """Why a step cannot be captured by hand; None if it can.

    It is not tried: a capture that fails leaves torch's random numbers behind in its state.
    """
    windows = _SLIDING in _kinds(model.config) and way.cache == "static"
    if way.run is Run.CAPTURED and windows and point.context >= model.config.sliding_window:
        return "transformers copies from the host where a static cache's window is full"
    return None


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
        forward = torch.compile(model, fullgraph=True, **how)

    def step() -> Tensor:
        with torch.no_grad():
            torch.compiler.cudagraph_mark_step_begin()
            logits = forward(input_ids=ids, position_ids=positions, use_cache=True, **named).logits
        assert isinstance(logits, Tensor)
        return logits

    if way.run is Run.CAPTURED:
        return _captured(step)
    first = step().float().cpu()
    for _ in range(WARM_COMPILED if way.run is Run.COMPILED else WARM):
        step()
    return step, first


def seconds_per_step(step: Step) -> float:
    """Median over a few batches of steps; the host waits once per batch."""
    steps = max(1, min(STEPS, round(SECONDS / BATCHES / _seconds(step, 1))))
    return statistics.median(_seconds(step, steps) for _ in range(BATCHES))


def _seconds(step: Step, steps: int) -> float:
    """Of each of so many steps."""
    _wait()
    start = time.perf_counter()
    for _ in range(steps):
        step()
    _wait()
    return (time.perf_counter() - start) / steps


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
    """A cache that holds random tokens, the same ones in every layer and whatever its kind."""
    config, device = model.config, model.device
    heads, head_dim = config.num_key_value_heads, _head_dim(config)
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
    k, v = (
        torch.empty(shape, dtype=model.dtype, device=device).normal_(generator=generator)
        for _ in "kv"
    )
    for index in range(config.num_hidden_layers):
        layer = cache.layers[index] if kind == "ours" else None
        if isinstance(layer, GqaLayer):
            layer.append(Pending(layer, k, v))
        else:
            cache.update(k, v, index)
    return cache


def _kinds(config: Any) -> list[str]:
    """The attention of each layer."""
    return getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers


def _head_dim(config: Any) -> int:
    return int(
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
