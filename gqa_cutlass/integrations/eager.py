"""Attention in plain operators of torch, with the features that its SDPA lacks."""

from __future__ import annotations

import torch
from torch import Tensor


def attend_eagerly(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    is_causal: bool | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Attend as transformers' eager attention of the models that have these features.

    Args:
        module: The layer of the model that asks.
        query: [batch, num_q_heads, tokens, head_dim].
        key: [batch, num_kv_heads, keys, head_dim].
        value: As key, with a head_dim of its own.
        attention_mask: Bool, True for what counts, or floats to be added to the scores; fits
            [batch, num_q_heads, tokens, keys]. None: what `is_causal` says.
        dropout: Of attention weights.
        scaling: Factor on the scores; head_dim ** -0.5 by default.
        softcap: Bound of the scaled scores.
        s_aux: One more logit per head, [num_q_heads].
        position_bias: Added to the capped scores.
        is_causal: Whether token i sees no key behind key i, where several tokens come without a
            mask; by default what the module says, or else True.

    Returns:
        [batch, tokens, num_q_heads, head_dim of value], contiguous, and no weights.
    """
    batch, heads, tokens, head_dim = query.shape
    kv_heads, keys = key.shape[1:3]
    rows = query.reshape(batch, kv_heads, -1, head_dim)  # the heads of a group are alike
    scores = (rows @ key.transpose(2, 3)).float().view(batch, heads, tokens, keys)
    scores = scores * (head_dim**-0.5 if scaling is None else scaling)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if position_bias is not None:
        scores = scores + position_bias
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    if attention_mask is None and is_causal and tokens > 1:
        attention_mask = torch.ones(tokens, keys, dtype=torch.bool, device=query.device).tril()
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        # Not infinite: rows of padding see nothing, and would be NaN.
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    elif attention_mask is not None:
        scores = scores + attention_mask
    if s_aux is not None:
        sinks = s_aux.to(scores.dtype)[:, None, None].expand(batch, heads, tokens, 1)
        scores = torch.cat([scores, sinks], dim=-1)
    weights = scores.softmax(-1)[..., :keys].to(query.dtype)
    weights = torch.nn.functional.dropout(weights, p=dropout)
    out = weights.view(batch, kv_heads, -1, keys) @ value
    return out.view(batch, heads, tokens, -1).transpose(1, 2).contiguous(), None
