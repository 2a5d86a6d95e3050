"""What is measured end to end: models by their shapes, batches and contexts, and ways to decode."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from itertools import product
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A model of transformers, with random weights.

    Args:
        name: Label.
        config: Name of its class of configurations in transformers.
        layers: How many it has.
        sizes: The rest of the configuration.
        no_sdpa: Why SDPA cannot run it; then eager attention stands in SDPA's place.
    """

    name: str
    config: str
    layers: int
    sizes: dict[str, Any]
    no_sdpa: str = ""

    @property
    def reference(self) -> str:
        """The attention with which the others are compared."""
        return "eager" if self.no_sdpa else "sdpa"


class Run(StrEnum):
    """How steps are started."""

    CALLED = "called"  # the model is called for every token
    CAPTURED = "captured"  # one call is captured into a CUDA graph by hand, and replayed
    COMPILED = "compiled"  # torch.compile, mode="reduce-overhead"


@dataclass(frozen=True, kw_only=True)
class Way:
    """A way to decode.

    Args:
        name: Label.
        attention: Attention implementation.
        cache: "dynamic" or "static" of transformers, or "ours".
        run: How steps are started.
    """

    name: str
    attention: str
    cache: str
    run: Run


@dataclass(frozen=True, order=True)
class Point:
    """A batch of sequences and the tokens that each holds."""

    batch: int
    context: int


@dataclass(frozen=True, kw_only=True)
class Job:
    """One measurement."""

    shape: Shape
    point: Point
    way: Way


SHAPES = (
    Shape(
        name="llama3-8b", config="LlamaConfig", layers=32,
        sizes={"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
               "num_key_value_heads": 8, "vocab_size": 128256},
    ),
    Shape(
        name="qwen2.5-7b", config="Qwen2Config", layers=28,
        sizes={"hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28,
               "num_key_value_heads": 4, "vocab_size": 152064},
    ),
    Shape(
        name="qwen3-8b", config="Qwen3Config", layers=36,
        sizes={"hidden_size": 4096, "intermediate_size": 12288, "num_attention_heads": 32,
               "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936},
    ),
    Shape(
        name="phi3-mini", config="Phi3Config", layers=32,
        sizes={"hidden_size": 3072, "intermediate_size": 8192, "num_attention_heads": 32,
               "num_key_value_heads": 32, "vocab_size": 32064, "sliding_window": None},
    ),
    Shape(
        name="gpt-oss-20b", config="GptOssConfig", layers=24, no_sdpa="SDPA has no sinks",
        sizes={"hidden_size": 2880, "intermediate_size": 2880, "num_attention_heads": 64,
               "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 201088,
               "sliding_window": 128, "num_local_experts": 32, "num_experts_per_tok": 4},
    ),
    Shape(
        name="gemma2-9b", config="Gemma2Config", layers=42, no_sdpa="SDPA has no softcap",
        sizes={"hidden_size": 3584, "intermediate_size": 14336, "num_attention_heads": 16,
               "num_key_value_heads": 8, "head_dim": 256, "vocab_size": 256000,
               "sliding_window": 4096, "query_pre_attn_scalar": 256,
               "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    ),
)  # fmt: skip
OURS = "gqa_cutlass"
WAYS = (  # SDPA and eager first: the logits of the others are compared with theirs
    Way(name="sdpa", attention="sdpa", cache="dynamic", run=Run.CALLED),
    Way(name="eager", attention="eager", cache="dynamic", run=Run.CALLED),
    Way(name="ours", attention=OURS, cache="ours", run=Run.CALLED),
    Way(name="sdpa-graph", attention="sdpa", cache="static", run=Run.CAPTURED),
    Way(name="eager-graph", attention="eager", cache="static", run=Run.CAPTURED),
    Way(name="ours-graph", attention=OURS, cache="ours", run=Run.CAPTURED),
    Way(name="sdpa-compiled", attention="sdpa", cache="static", run=Run.COMPILED),
    Way(name="eager-compiled", attention="eager", cache="static", run=Run.COMPILED),
    Way(name="ours-compiled", attention=OURS, cache="ours", run=Run.COMPILED),
)
BATCHES, CONTEXTS = (1, 8, 32), (1024, 8192, 32768)
# Compiling takes half a minute, so that only some points may be reached: these first.
COMPILED_FIRST = (Point(8, 8192), Point(1, 8192), Point(32, 1024), Point(8, 32768))


def jobs(
    shapes: tuple[Shape, ...], points: tuple[Point, ...], ways: tuple[Way, ...]
) -> Iterator[Job]:
    """All measurements, in the order in which they are worth having.

    First what needs no compiler, of all models; then the compiled points, one for every model in
    turn.
    """
    plain = tuple(way for way in ways if way.run is not Run.COMPILED)
    compiled = tuple(way for way in ways if way.run is Run.COMPILED)
    for shape, point in product(shapes, points):
        yield from _jobs(shape, point, plain)
    for point, shape in product(sorted(points, key=lambda p: (_rank(p), p)), shapes):
        yield from _jobs(shape, point, compiled)


def _jobs(shape: Shape, point: Point, ways: tuple[Way, ...]) -> Iterator[Job]:
    """Of one point; eager attention is captured and compiled only where there is no SDPA."""
    for way in ways:
        if way.attention != "eager" or way.run is Run.CALLED or shape.no_sdpa:
            yield Job(shape=shape, point=point, way=way)


def _rank(point: Point) -> int:
    return COMPILED_FIRST.index(point) if point in COMPILED_FIRST else len(COMPILED_FIRST)
