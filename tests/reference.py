"""The one reference: attention over a cache in high precision, and the rule for errors."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_RATIO, MEAN_RATIO, SLACK = 2.0, 1.5, 1e-5


def attend(
    q: Tensor, k: Tensor, v: Tensor, lengths: list[int], scale: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Textbook attention, every step in `dtype`: softmax(scale q k^T) v and its log-sum-exp.

    Args:
        q: [batch, num_q_heads, head_dim].
        k: [batch, tokens, num_kv_heads, head_dim]; sequence b attends to its first lengths[b].
        v: As k.
    """
    batch, num_q_heads, head_dim = q.shape
    num_kv_heads = k.shape[2]
    outs, lses = [], []
    for b in range(batch):
        grouped = q[b].to(dtype).view(num_kv_heads, -1, head_dim)
        keys = k[b, : lengths[b]].to(dtype).permute(1, 2, 0)
        values = v[b, : lengths[b]].to(dtype).permute(1, 0, 2)
        scores = (grouped @ keys) * scale
        outs.append((torch.softmax(scores, dim=-1) @ values).view(num_q_heads, head_dim))
        lses.append(torch.logsumexp(scores, dim=-1).view(num_q_heads))
    return torch.stack(outs), torch.stack(lses)


@dataclass(frozen=True)
class Errors:
    """Errors of a result and of PyTorch in the input type, against the reference."""

    max: float
    mean: float
    max_torch: float
    mean_torch: float

    @property
    def share(self) -> float:
        """The larger of the two errors, as a share of what the rule allows.

        Infinite where either result is not a number, or PyTorch's is no measure.
        """
        share = max(
            self.max / (MAX_RATIO * self.max_torch + SLACK),
            self.mean / (MEAN_RATIO * self.mean_torch + SLACK),
        )
        meaningful = math.isfinite(self.max_torch) and not math.isnan(share)
        return share if meaningful else float("inf")


def errors(out: Tensor, expected: Tensor, torch_out: Tensor) -> Errors:
    """Compare a result with the reference, beside PyTorch's."""
    ours = (out.double() - expected.double()).abs()
    theirs = (torch_out.double() - expected.double()).abs()
    return Errors(ours.max().item(), ours.mean().item(), theirs.max().item(), theirs.mean().item())
