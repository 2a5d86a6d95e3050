"""The benchmark grid, the ragged points and the prompts, as data; and what their names say."""

from __future__ import annotations

import re
from dataclasses import dataclass

from gqa_cutlass.errors import InputError


@dataclass(frozen=True)
class Point:
    """One problem: a model's heads, sequences, and tokens attended in each of them.

    Args:
        model: Label.
        num_q_heads: Query heads.
        num_kv_heads: KV heads.
        head_dim: Dimension per head.
        batch: Sequences.
        tokens: Tokens attended per sequence, the new one included.
    """

    model: str
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    batch: int
    tokens: int

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens cached per sequence before the step."""
        return (self.tokens - 1,) * self.batch

    @property
    def row_bytes(self) -> int:
        """Bytes of K and V of one token."""
        return 4 * self.num_kv_heads * self.head_dim

    @property
    def cache_bytes(self) -> int:
        """Bytes of the caches of K and V."""
        return self.batch * self.tokens * self.row_bytes

    @property
    def read_bytes(self) -> int:
        """Bytes of K and V, the new tokens included, read once."""
        return (sum(self.lengths) + self.batch) * self.row_bytes

    def __str__(self) -> str:
        heads = f"{self.num_q_heads}/{self.num_kv_heads}/{self.head_dim}"
        return f"{self.model} {heads} {self.batch}x{self.tokens}"


@dataclass(frozen=True, kw_only=True)
class Ragged(Point):
    """A problem whose sequences differ in length; `tokens` is what the cache has room for.

    Args:
        name: Label of the lengths.
        cached: Tokens cached per sequence before the step.
        limit: Target: what it may take, as a multiple of the roofline.
    """

    name: str
    cached: tuple[int, ...]
    limit: float

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens cached per sequence before the step."""
        return self.cached

    def __str__(self) -> str:
        return f"{super().__str__()} ragged {self.name}"


_SIZE = r"[1-9]\d{0,9}"
_NAME = re.compile(
    rf"(?P<model>\S+) (?P<num_q_heads>{_SIZE})/(?P<num_kv_heads>{_SIZE})/(?P<head_dim>{_SIZE}) "
    rf"(?P<batch>{_SIZE})x(?P<tokens>{_SIZE})(?: ragged (?P<lengths>.+))?"
)


@dataclass(frozen=True, kw_only=True)
class Label:
    """What a point's name says; records keep names, also of points that are no longer measured.

    Args:
        model: Label of the model.
        num_q_heads: Query heads.
        num_kv_heads: KV heads.
        head_dim: Dimension per head.
        batch: Sequences.
        tokens: Tokens attended per sequence, or what the cache has room for.
        lengths: Label of the lengths; None where all sequences are equally long.
    """

    model: str
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    batch: int
    tokens: int
    lengths: str | None

    @classmethod
    def of(cls, point: str) -> Label:
        """Read a point's name.

        Raises:
            InputError: It is none.
        """
        found = _NAME.fullmatch(point)
        if found is None:
            raise InputError(f"bench: point: got {point!r}; allowed: 'llama3-8b 32/8/128 1x1024'.")
        parts = found.groupdict()
        model, lengths = parts.pop("model"), parts.pop("lengths")
        return cls(model=model, lengths=lengths, **{key: int(parts[key]) for key in parts})

    @property
    def heads(self) -> str:
        """The model and its heads."""
        return f"{self.model} {self.num_q_heads}/{self.num_kv_heads}/{self.head_dim}"

    @property
    def cells(self) -> tuple[str, str]:
        """What tables of points begin with: the model and its heads, sequences and tokens."""
        return self.heads, f"{self.batch} × {self.tokens}"


_GRID: tuple[tuple[str, int, int, int, tuple[tuple[int, int], ...]], ...] = (
    ("llama3-8b", 32, 8, 128, ((1, 128), (1, 1024), (1, 4096), (1, 16384), (1, 131072), (8, 1024),
                               (8, 8192), (64, 1024), (64, 4096), (256, 1024))),
    ("llama3-70b", 64, 8, 128, ((1, 1024), (1, 16384), (8, 8192), (256, 1024))),
    ("qwen2.5-7b", 28, 4, 128, ((1, 1024), (1, 32768), (32, 4096))),
    ("mha", 32, 32, 128, ((1, 1024), (16, 2048))),
    ("mqa", 8, 1, 128, ((1, 8192), (64, 8192))),
    ("phi3-mini", 32, 32, 96, ((1, 1024), (1, 16384), (16, 4096), (64, 2048))),
    ("gemma2-9b", 16, 8, 256, ((1, 1024), (1, 16384), (16, 4096), (64, 2048))),
    ("qwen2.5-0.5b", 14, 2, 64, ((1, 1024), (1, 16384), (16, 4096), (64, 2048))),
    ("gpt-oss", 64, 8, 64, ((1, 1024), (1, 16384), (16, 4096), (64, 2048))),
)  # fmt: skip
GRID = tuple(
    Point(model, q_heads, kv_heads, head_dim, batch, tokens)
    for model, q_heads, kv_heads, head_dim, sizes in _GRID
    for batch, tokens in sizes
)

# Whose prompts are attended too, for comparison with the step; all of them in the grid.
_PROMPTS = ((1, 1024), (1, 4096), (1, 16384), (8, 1024))
PREFILL = tuple(
    point
    for point in GRID
    if point.model == "llama3-8b" and (point.batch, point.tokens) in _PROMPTS
)

# Those of the prototype, whose 32-bit product wraps.
_UNIFORM = tuple((b * 2654435761 % 2**32 >> 7) % 8192 for b in range(64))
_SHORT = tuple(b * 40503 % 97 for b in range(32))
_LONG = (16383,)
_RAGGED: tuple[tuple[str, int, tuple[int, ...], float], ...] = (
    ("uniform", 8192, _UNIFORM, 1.03),
    ("long first", 16384, _LONG + _SHORT[1:], 1.3),
    ("long last", 16384, _SHORT[:-1] + _LONG, 1.3),
)
RAGGED = tuple(
    Ragged("llama3-8b", 32, 8, 128, len(cached), room, name=name, cached=cached, limit=limit)
    for name, room, cached, limit in _RAGGED
)
