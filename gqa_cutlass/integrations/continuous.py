"""transformers' continuous batching: requests that come and go, packed into one row of tokens."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface

from gqa_cutlass.integrations.flash_kernel import flash_attn_varlen_func

# Names that the manager of continuous batching takes without knowing more of them: up to some
# version for this prefix, and for "flash" in newer ones.
PREFIXED, FLASH = "paged|gqa_cutlass", "gqa_cutlass_flash"
HAS_PREFIX = "paged|sdpa" in AttentionInterface().valid_keys()


def adopt(model: Any) -> None:
    """Let a model attend with ours in continuous batching; the names are registered."""
    if HAS_PREFIX:
        model.set_attn_implementation(PREFIXED)
    else:  # its setter would look for a kernel of that name, to load it
        model.config._attn_implementation = FLASH


def is_packed(options: dict[str, Any]) -> bool:
    """Whether a call has tokens of several requests, by what transformers passes then."""
    return options.get("cu_seq_lens_q") is not None and options.get("read_index") is not None


def attend_packed(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *, scaling: float | None,
    **options: Any,
) -> Tensor:  # fmt: skip
    """Attend to each request's own tokens, those in transformers' pages included.

    Args:
        module: The layer of the model that asks.
        query: [1, num_q_heads, all query tokens, head_dim].
        key: [1, num_kv_heads, all keys, head_dim]; new ones alone if `options` has the cache.
        value: As key.
        scaling: Factor on the scores.
        options: What else transformers and the model ask for.

    Returns:
        [1, all query tokens, num_q_heads, head_dim of value].
    """
    window = options.get("sliding_window", getattr(module, "sliding_window", None))
    kind = "sliding_attention" if window else "full_attention"
    if (cache := options.get("cache")) is not None:
        k, v = cache.update(
            key_states=key, value_states=value, layer_idx=module.layer_idx,
            read_index=options["read_index"], write_index=options["write_index"],
        )  # fmt: skip
    else:
        k, v = (t.squeeze(0).transpose(0, 1) for t in (key, value))
    out = flash_attn_varlen_func(
        query.squeeze(0).transpose(0, 1), k, v,
        options["cu_seq_lens_q"], _of(kind, options["cu_seq_lens_k"]),
        _longest(options, "q"), _of(kind, _longest(options, "k")),
        softmax_scale=scaling, causal=True, window_size=(window - 1, 0) if window else (-1, -1),
        softcap=options.get("softcap"), s_aux=options.get("s_aux"),
    )  # fmt: skip
    return out.unsqueeze(0)


def _of(kind: str, value: Any) -> Any:
    """What concerns layers of a kind, where transformers has not picked it."""
    return value[kind] if isinstance(value, dict) else value


def _longest(options: dict[str, Any], of: str) -> Any:
    """Tokens of a request at most, by the name that this version has for it."""
    return options[f"max_length_{of}" if f"max_length_{of}" in options else f"max_seqlen_{of}"]
