"""The benchmark grid, as data."""

from __future__ import annotations

from dataclasses import dataclass


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
    def cache_bytes(self) -> int:
        """Bytes of K and V, read once."""
        return 4 * self.batch * self.tokens * self.num_kv_heads * self.head_dim

    def __str__(self) -> str:
        heads = f"{self.num_q_heads}/{self.num_kv_heads}/{self.head_dim}"
        return f"{self.model} {heads} {self.batch}x{self.tokens}"


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
