"""Norms and rotations of a step: what a call asks for, and what must become of rows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gqa_cutlass.proof.turning import is_rounded_once, turned


@dataclass(frozen=True, kw_only=True)
class Turning:
    """Options of a call, by their names; nothing by default."""

    rotary_cos: Tensor | None = None
    rotary_sin: Tensor | None = None
    rotary_seqlens: Tensor | None = None
    rotary_interleaved: bool = False
    q_norm_weight: Tensor | None = None
    k_norm_weight: Tensor | None = None
    norm_eps: float = 1e-6
    norm_plus_one: bool = False

    def options(self) -> dict[str, Any]:
        """Those that a call is given: none unless something is normed or rotated."""
        given = {name: value for name, value in vars(self).items() if value is not None}
        if self.q_norm_weight is None and self.k_norm_weight is None:
            given = {name: value for name, value in given.items() if not name.startswith("norm")}
        return given if any(isinstance(value, Tensor) for value in given.values()) else {}

    def normed(self, q: Tensor) -> Turning:
        """With norms of rows like q's, whose weights are of two types."""
        generator = torch.Generator().manual_seed(q.shape[-1])
        weights = torch.rand(2, q.shape[-1], generator=generator).to(q.device) + 0.25
        return replace(
            self, q_norm_weight=weights[0], k_norm_weight=weights[1].to(q.dtype), norm_eps=1e-4,
            norm_plus_one=len(q) % 2 == 0,
        )  # fmt: skip

    def rotated(self, q: Tensor, positions: int, rotary_dim: int | None = None) -> Turning:
        """With rotations by the halves of one table; of fewer dims for every second batch.

        Args:
            q: Of which rows are like.
            positions: That the table has.
            rotary_dim: Dims that are turned; None: most of them, or all that can be.
        """
        most = q.shape[-1] // 16 * 16
        dims = rotary_dim or (max(16, most - 16) if len(q) % 2 else most)
        speeds = 10.0 ** -torch.linspace(0, 3, dims // 2)
        angles = torch.arange(positions).unsqueeze(1) * speeds
        table = torch.cat([angles.cos(), angles.sin()], dim=1).to(q.device)
        cos, sin = table.to((q.dtype, torch.float32)[len(q) % 2]).chunk(2, dim=1)
        return replace(
            self, rotary_cos=cos, rotary_sin=sin, rotary_interleaved=len(q) % 4 in (0, 1)
        )  # fmt: skip

    def keys(self, rows: Tensor, length: int, b: int) -> Tensor:
        """What becomes of a sequence's new keys, [tokens, heads, head_dim], in float64."""
        return self._turned(rows, length, b, self.k_norm_weight, step=1)

    def queries(self, rows: Tensor, length: int, b: int, moves: bool) -> Tensor:
        """The same of its queries, which have a position each, or all that of the first."""
        return self._turned(rows, length, b, self.q_norm_weight, step=int(moves))

    def check(self, found: Tensor, rows: Tensor, length: int, b: int) -> None:
        """Keys are what they should be, rounded once."""
        assert is_rounded_once(found, self.keys(rows, length, b)), "a new key is wrong"

    def _turned(
        self, rows: Tensor, length: int, b: int, weight: Tensor | None, step: int
    ) -> Tensor:
        first = length if self.rotary_seqlens is None else int(self.rotary_seqlens[b])
        positions = first + step * torch.arange(len(rows), device=rows.device)
        return turned(
            rows, positions, weight=weight, eps=self.norm_eps, plus_one=self.norm_plus_one,
            cos=self.rotary_cos, sin=self.rotary_sin, interleaved=self.rotary_interleaved,
        )  # fmt: skip
