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
    """

    name: str
    config: str
    layers: int
    sizes: dict[str, Any]


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
)  # fmt: skip
OURS = "gqa_cutlass"
WAYS = (  # SDPA first: the logits of the others are compared with its
    Way(name="sdpa", attention="sdpa", cache="dynamic", run=Run.CALLED),
    Way(name="eager", attention="eager", cache="dynamic", run=Run.CALLED),
    Way(name="ours", attention=OURS, cache="ours", run=Run.CALLED),
    Way(name="sdpa-graph", attention="sdpa", cache="static", run=Run.CAPTURED),
    Way(name="ours-graph", attention=OURS, cache="ours", run=Run.CAPTURED),
    Way(name="sdpa-compiled", attention="sdpa", cache="static", run=Run.COMPILED),
    Way(name="ours-compiled", attention=OURS, cache="ours", run=Run.COMPILED),
)
BATCHES, CONTEXTS = (1, 8, 32), (1024, 8192, 32768)
# Compiling takes half a minute, so that only some points may be reached: these first.
COMPILED_FIRST = (Point(8, 8192), Point(1, 8192), Point(32, 1024), Point(8, 32768))


def jobs(
    shapes: tuple[Shape, ...], points: tuple[Point, ...], ways: tuple[Way, ...]
) -> Iterator[Job]:
    """All measurements, in the order in which they are worth having.

    What needs no compiler comes first, together with the first compiled point; the other compiled
    points follow, one for every model in turn.
    """
    plain = tuple(way for way in ways if way.run is not Run.COMPILED)
    compiled = tuple(way for way in ways if way.run is Run.COMPILED)
    ordered = sorted(points, key=lambda p: (_rank(p), p))
    for shape in shapes:
        yield from _jobs(shape, points, plain)
        yield from _jobs(shape, ordered[:1], compiled)
    for point, shape in product(ordered[1:], shapes):
        yield from _jobs(shape, (point,), compiled)


def _jobs(
    shape: Shape, points: tuple[Point, ...] | list[Point], ways: tuple[Way, ...]
) -> Iterator[Job]:
    for point, way in product(points, ways):
        yield Job(shape=shape, point=point, way=way)


def _rank(point: Point) -> int:
    return COMPILED_FIRST.index(point) if point in COMPILED_FIRST else len(COMPILED_FIRST)
