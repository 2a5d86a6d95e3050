"""What servers run, as data: lengths that differ, and caches with room for more than they hold."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from random import Random

from bench.points import Ragged
from gqa_cutlass.tuning.candidates import lognormal

_SMALL_BYTES = 64 << 20
_MODELS = {
    "llama3-8b": (32, 8, 128),
    "llama3-70b": (64, 8, 128),
    "qwen2.5-7b": (28, 4, 128),
    "mqa": (8, 1, 128),
}
LENGTHS, SET, ROOM = "lengths", "HPC-Ops set", "room"  # kinds of points


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """What others took over lengths of the same distribution, recorded elsewhere on an H200.

    Args:
        floor: Microseconds that reading the bytes took there.
        micros: Theirs, by baseline: XQA in pages of 64, FlashInfer in pages of 16 with a plan that
            the host made for these lengths, and FlashAttention-3.
    """

    floor: float
    micros: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Serving(Ragged):
    """A point of the serving part; the target is in microseconds, and `limit` has no meaning.

    Args:
        kind: Which part of it.
        held: Tokens attended in the caches of `ROOM`, all equal.
        factor: Of them there is room for so many times more.
        page_size: Tokens of a page; None: dense.
        recorded: What others took, where it is recorded.
    """

    kind: str
    held: int = 0
    factor: int = 1
    page_size: int | None = None
    recorded: Recorded | None = None

    def target(self, floor: float) -> float:
        """Microseconds that a step over unlike lengths may take.

        Args:
            floor: What reading its bytes takes.
        """
        return floor + 2.5 if self.read_bytes < _SMALL_BYTES else 1.1 * floor


# Mean and sigma of lognormal lengths, model, batch, room, MiB read; and what is recorded: floor,
# FA3, XQA, FlashInfer. Seeds are counted up until the draw has as many bytes as the recorded one.
_LOGNORMAL: tuple[tuple[int, float, str, int, int, float, tuple[float, ...]], ...] = (
    (500, 1.0, "llama3-8b", 4, 8192, 11.7, (4.7, 12.7, 13.9, 13.9)),
    (2000, 1.0, "llama3-8b", 4, 8192, 20.2, (7.0, 14.1, 13.5, 16.8)),
    (2000, 0.3, "llama3-8b", 4, 8192, 32.7, (10.1, 17.2, 17.4, 21.0)),
    (500, 1.0, "llama3-8b", 16, 8192, 35.5, (11.0, 20.9, 27.2, 21.1)),
    (2000, 1.0, "llama3-8b", 16, 8192, 92.7, (25.3, 40.2, 75.2, 35.7)),
    (2000, 0.3, "llama3-8b", 16, 8192, 123.0, (33.7, 52.0, 43.1, 45.4)),
    (500, 1.0, "llama3-8b", 64, 8192, 100.5, (28.4, 43.1, 44.2, 50.3)),
    (2000, 1.0, "llama3-8b", 64, 8192, 399.0, (96.7, 126.5, 122.9, 161.9)),
    (2000, 0.3, "llama3-8b", 64, 8192, 504.0, (121.7, 142.4, 140.1, 159.9)),
    (500, 1.0, "llama3-8b", 256, 8192, 458.3, (111.1, 157.5, 175.5, 155.1)),
    (2000, 1.0, "llama3-8b", 256, 8192, 1794.6, (419.6, 484.8, 478.7, 491.3)),
    (2000, 0.3, "llama3-8b", 256, 8192, 2002.1, (468.6, 500.9, 493.6, 501.8)),
    (2000, 1.2, "llama3-8b", 16, 32768, 116.8, (35.8, 47.5, 63.2, 42.9)),
    (2000, 1.2, "llama3-8b", 64, 32768, 402.0, (97.4, 153.6, 159.8, 212.5)),
    (1500, 1.0, "qwen2.5-7b", 64, 8192, 149.6, (43.6, 61.6, 94.1, 78.3)),
    (3000, 1.0, "llama3-70b", 32, 16384, 284.0, (70.7, 92.0, 113.3, 110.7)),
)
_BASELINES = "FA3", "XQA", "FlashInfer"
_ONE_LONG = (32767, *[175] * 31)
_LONG: tuple[tuple[str, tuple[int, ...], tuple[float, ...]], ...] = (
    ("one long", _ONE_LONG, (44.0, 55.3, 290.5, 248.9)),
    ("long last", _ONE_LONG[::-1], (39.3, 55.8, 306.3, 233.5)),
)
# Sequences and their tokens, in an order that a seed gives.
_SETS: tuple[tuple[tuple[int, int], ...], ...] = (
    ((64, 512),), ((64, 4096),), ((32, 128), (32, 4096)), ((1, 16384), (15, 64)),
    ((1, 65536), (7, 4096)), ((1, 65536), (15, 4096)), ((1, 65536), (31, 4096)),
    ((1, 131072), (31, 4096)), ((2, 32768), (30, 4096)),
)  # fmt: skip
# Tokens attended, by batch, and the room for more.
_HELD = {1: (16, 128, 1024, 8192, 131072), 8: (128, 1024, 8192), 64: (64, 512, 2048)}
_FACTORS = 1, 8, 128
_PAGE = 64
_NEAR = 0.02  # of the recorded bytes
_MOST_BYTES = 72 << 30  # of a room


def _serving(model: str, name: str, cached: tuple[int, ...], room: int, **other: object) -> Serving:
    return Serving(
        model, *_MODELS[model], len(cached), room, name=name, cached=cached, limit=1.0,
        **other,  # type: ignore[arg-type]
    )  # fmt: skip


def _lengths() -> Iterator[Serving]:
    for mean, sigma, model, batch, room, mib, (floor, *micros) in _LOGNORMAL:
        row = 4 * _MODELS[model][1] * _MODELS[model][2]
        draws = (lognormal(batch, mean, sigma, room - 1, seed) for seed in count())
        cached = next(c for c in draws if abs(sum(c) * row / 2**20 / mib - 1) < _NEAR)
        recorded = Recorded(floor=floor, micros=dict(zip(_BASELINES, micros, strict=True)))
        name = f"lognormal {mean}/{sigma}"
        yield _serving(model, name, cached, room, kind=LENGTHS, recorded=recorded)
    for name, cached, (floor, *micros) in _LONG:
        recorded = Recorded(floor=floor, micros=dict(zip(_BASELINES, micros, strict=True)))
        yield _serving("llama3-8b", name, cached, 32768, kind=LENGTHS, recorded=recorded)


def _sets() -> Iterator[Serving]:
    for parts in _SETS:
        cached = [tokens - 1 for number, tokens in parts for _ in range(number)]
        Random(len(cached)).shuffle(cached)
        name = " + ".join(f"{number}x{tokens}" for number, tokens in parts)
        yield _serving("mqa", name, tuple(cached), max(cached) + 1, kind=SET)


def _rooms() -> Iterator[Serving]:
    for page_size in (None, _PAGE):
        for batch, helds in _HELD.items():
            for held in helds:
                for factor in _FACTORS:
                    pages = f", pages of {page_size}" if page_size else ""
                    point = _serving(
                        "llama3-8b", f"{held} held{pages}", (held - 1,) * batch, held * factor,
                        kind=ROOM, held=held, factor=factor, page_size=page_size,
                    )  # fmt: skip
                    if held % (page_size or 1) == 0 and (
                        page_size or point.cache_bytes <= _MOST_BYTES
                    ):
                        yield point


SERVING = (*_lengths(), *_sets(), *_rooms())
