"""Decode attention for the models of transformers (5.17 and newer).

    from gqa_cutlass.integrations.transformers import GqaCache, register
    model.set_attn_implementation(register())
    model.generate(**inputs, past_key_values=GqaCache(model.config, max_cache_len=4096))

One token per sequence runs as one kernel, which appends it if the cache is a `GqaCache`; a soft cap
(Gemma 2), sinks (gpt-oss) and sliding windows included. So do up to 256 tokens (32 in layers with a
window) behind others in a `GqaCache` without padding: the drafts of assisted generation, for
instance. Prompts, and whatever the kernel does not do, go to transformers' SDPA, or with a soft cap
or sinks, which SDPA lacks, through plain operators of torch; the log says once why. What SDPA would
ignore, or what does not fit a `GqaCache`, is an `InputError`.

Batches of requests that come and go are transformers' own, with our attention:

    model.generate_batch(prompts, continuous_batching_config=continuous_batching(model))
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, ContinuousBatchingConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from gqa_cutlass.api import gqa_decode
from gqa_cutlass.call.layout import DTYPES
from gqa_cutlass.codegen.config import HEAD_DIMS, MAX_GROUP_SIZE
from gqa_cutlass.devices import capturing
from gqa_cutlass.errors import InputError
from gqa_cutlass.integrations.continuous import FLASH, PREFIXED, adopt, attend_packed, is_packed
from gqa_cutlass.integrations.eager import attend_eagerly
from gqa_cutlass.integrations.transformers_cache import NAME, GqaCache, GqaLayer, Pending
from gqa_cutlass.integrations.transformers_windows import is_known
from gqa_cutlass.tracing import break_graph, is_traced

__all__ = ["NAME", "GqaCache", "attention", "continuous_batching", "mask", "register"]

LOG = logging.getLogger("gqa_cutlass")

# What a model asks its attention for, beyond the ordinary, by the name of the argument. A feature
# that the kernels learn moves to `FEATURES`, which has its name in `gqa_decode`; windows, to
# `_features`.
FEATURES = {"softcap": "softcap", "s_aux": "sinks"}
SDPA_IGNORES = {"head_mask": "a mask of heads"}
SDPA_TAKES = {
    "position_bias": "a bias by position",
    "output_attentions": "the attention weights as a result",
}
# Attributes of masks: the 2-D mask that they were made from, and whether they are causal otherwise.
PADDING, CAUSAL = "gqa_cutlass_padding", "gqa_cutlass_causal"


def register() -> str:
    """Make `attn_implementation="gqa_cutlass"` known to transformers.

    Returns:
        The name, for `model.set_attn_implementation`.
    """
    for name in (NAME, PREFIXED, FLASH):
        AttentionInterface.register(name, attention)
        AttentionMaskInterface.register(name, mask)
    return NAME


def continuous_batching(model: Any, **options: Any) -> ContinuousBatchingConfig:
    """Have transformers' continuous batching of a model attend with our kernels.

    Requests that come and go get the tokens that they get alone. transformers gathers their keys
    and values from its pages before every call; block tables it passes to kernels alone that it
    loads by itself, see `gqa_cutlass.integrations.flash_kernel`.

    Args:
        model: Of transformers, with weights of float16 or bfloat16. It attends like this until
            `model.set_attn_implementation` is called.
        options: Of transformers' `ContinuousBatchingConfig`.

    Returns:
        For `model.generate_batch(..., continuous_batching_config=)` and its like.

    Raises:
        InputError: `options` ask for block tables.
    """
    if options.setdefault("max_blocks_per_request", 0) != 0:
        raise InputError(
            "continuous_batching: max_blocks_per_request: got "
            f"{options['max_blocks_per_request']!r}; allowed: 0, for transformers passes block "
            "tables to kernels alone that it loads by itself. Leave it away."
        )
    register()
    adopt(model)
    return ContinuousBatchingConfig(**options)


def mask(
    *,
    q_length: int,
    kv_length: int,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    **options: Any,
) -> Tensor | None:
    """The mask function: what `attention` gets as its mask.

    Args:
        q_length: Tokens per sequence in this call.
        kv_length: Keys that a mask has to describe; 0 for a token on its way to a `GqaCache`, which
            sees all that there is.
        mask_function: Which key a query may see, apart from padding.
        attention_mask: Bool [batch, tokens so far], False for padding; None where there is none.
        options: The rest of what transformers passes, for SDPA's mask.

    Returns:
        For a token on its way to a `GqaCache` None, or how many tokens each sequence may see, int32
        [batch, 1, 1, 1]. For anything else SDPA's mask.

    Raises:
        InputError: A mask that is not causal, for a `GqaCache`.
    """
    if kv_length:
        made: Tensor | None = sdpa_mask(
            q_length=q_length, kv_length=kv_length, mask_function=mask_function,
            attention_mask=attention_mask, **options,
        )  # fmt: skip
        if made is not None and not is_traced():
            made = made.contiguous()
            setattr(made, PADDING, attention_mask)
            setattr(made, CAUSAL, is_known(mask_function, options))
        return made
    if not is_known(mask_function, options):
        _refuse("a mask of its own", "a causal mask, or that of a sliding window")
    if attention_mask is None:
        return None
    return attention_mask.sum(-1, dtype=torch.int32)[:, None, None, None]


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor | Pending,
    value: Tensor | Pending,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """The attention function.

    Args:
        module: The layer of the model that asks.
        query: [batch, num_q_heads, tokens, head_dim].
        key: [batch, num_kv_heads, keys, head_dim], or what `GqaCache.update` returned.
        value: As key, with a head_dim of its own.
        attention_mask: What `mask` returned, or a mask of the caller's as SDPA takes it.
        dropout: Of attention weights, in training.
        scaling: Factor on the scores; head_dim ** -0.5 by default.
        options: What else the model asks for.

    Returns:
        [batch, tokens, num_q_heads, head_dim of value], and no weights.

    Raises:
        InputError: The model asks for what SDPA ignores; or for what a `GqaCache` does not offer.
        CacheOverflowError: The cache is full.
    """
    for name, what in SDPA_IGNORES.items():
        if options.get(name) is not None:
            _refuse(what, "models without; use attn_implementation='eager' and another cache")
    if isinstance(key, Pending):
        return _with_our_cache(
            module, query, key, attention_mask, dropout=dropout, scaling=scaling, **options
        )
    assert not isinstance(value, Pending)  # either both are, or neither is
    if is_packed(options):
        return attend_packed(module, query, key, value, scaling=scaling, **options), None
    why = _why_not(module, query, key, value, attention_mask, dropout, options)
    if why is None:
        q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        asked = _features(options)
        return gqa_decode(q, k, v, cache_seqlens=k.shape[1], softmax_scale=scaling, **asked), None
    return _in_torch(
        why, module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
    )


def _why_not(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float,
    options: Mapping[str, Any],
) -> str | None:
    """Why the kernel cannot attend to these keys; None if it can."""
    group, rest = divmod(query.shape[1], key.shape[1])
    learn = [t for t in (query, options.get("s_aux")) if t is not None and t.requires_grad]
    for wrong, why in (
        (query.shape[2] != 1, "a prompt"),
        (attention_mask is not None, "a mask; of padded or static caches, GqaCache needs none"),
        (dropout > 0, "dropout"),
        (query.dtype not in DTYPES, f"tensors of {query.dtype}"),
        (query.device.type not in ("cuda", "cpu"), f"tensors on {query.device.type}"),
        (query.shape[-1] not in HEAD_DIMS, f"head_dim {query.shape[-1]}"),
        (value.shape[-1] not in HEAD_DIMS, f"values of head_dim {value.shape[-1]}"),
        (rest > 0 or group > MAX_GROUP_SIZE, f"{query.shape[1]} heads on {key.shape[1]}"),
        (torch.is_grad_enabled() and len(learn) > 0, "gradients"),
        *((_is_asked(options.get(name)), what) for name, what in SDPA_TAKES.items()),
    ):
        if wrong:
            return why
    return None


def _is_asked(option: object) -> bool:
    """Whether an option is on; a tensor is, whatever it holds."""
    return option is not None and option is not False


def _with_our_cache(
    module: torch.nn.Module,
    query: Tensor,
    pending: Pending,
    attention_mask: Tensor | None,
    *,
    dropout: float,
    scaling: float | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Append what is pending, and attend."""
    if options.get("position_bias") is not None:
        allowed = "models without; use transformers' StaticCache"
        _refuse(SDPA_TAKES["position_bias"], allowed)
    window, kept = options.pop("sliding_window", None), pending.layer.window
    if window is not None and (kept is None or kept < min(window, pending.layer.get_max_length())):
        allowed = f"{kept or 'none'} in this layer, as the model's configuration says"
        _refuse(f"a sliding window of {window}", allowed)
    seen = None  # tokens that each sequence may see
    if attention_mask is not None and attention_mask.dtype == torch.int32:
        seen, attention_mask = attention_mask.flatten(), None
    if query.shape[2] == 1 and attention_mask is None and dropout == 0:
        return _decode(query, pending, seen, scaling, _features(options)), None
    append_and_attend = _prompt
    if is_traced():
        append_and_attend = break_graph(append_and_attend, "gqa_cutlass: a prompt into a GqaCache")
    out = append_and_attend(
        module, query, pending, attention_mask, dropout=dropout, scaling=scaling, **options
    )
    return out, None


def _features(options: Mapping[str, Any]) -> dict[str, Any]:
    """What the model asks for that kernels can do, as options of `gqa_decode`."""
    asked = {
        ours: options[name] for name, ours in FEATURES.items() if options.get(name) is not None
    }
    if options.get("sliding_window") is not None:  # which counts the query's own token
        asked["window_size"] = options["sliding_window"] - 1, 0
    return asked


def _decode(
    query: Tensor, pending: Pending, seen: Tensor | None, scaling: float | None,
    asked: dict[str, Any],
) -> Tensor:  # fmt: skip
    """One token per sequence, or several, in one kernel: appended and attended."""
    layer = pending.layer
    wrong = _disagreement(layer, seen)
    q, k, v = (t.transpose(1, 2) for t in (query, pending.k, pending.v))
    out: Tensor = layer.cache.decode(q, k, v, softmax_scale=scaling, **asked)
    if layer.leads:
        layer.storage.count(query.shape[2])
    return out if wrong is None else out.masked_fill(wrong[:, None, None, None], float("nan"))


def _disagreement(layer: GqaLayer, seen: Tensor | None) -> Tensor | None:
    """Sequences whose mask does not show just what the cache holds, where the host cannot look.

    Raises:
        InputError: There are such sequences, or there is no mask where one is needed.
    """
    if seen is None:
        if layer.storage.padded:
            _refuse("no mask for a padded batch", "the 2-D attention_mask with every token")
        return None
    if layer.position:  # the first layer has looked
        return None
    wrong = seen != layer.cache.seqlens + 1
    if is_traced() or capturing(layer.cache.device):
        return wrong
    if wrong.any():
        _refuse(
            "an attention_mask that does not show all that was appended, and only that",
            "a mask that grows by a 1 per token",
        )
    return None


def _prompt(
    module: torch.nn.Module,
    query: Tensor,
    pending: Pending,
    attention_mask: Tensor | None,
    *,
    dropout: float,
    scaling: float | None,
    **options: Any,
) -> Tensor:
    """Append a prompt, and let torch attend, or the kernel to some tokens behind others."""
    layer = pending.layer
    held = layer.storage.known_columns()
    padding = None if attention_mask is None else getattr(attention_mask, PADDING, None)
    if held and (layer.storage.padded or (padding is not None and not padding.all())):
        _refuse("a padded batch that goes on with several tokens", "prompts in one piece")
    causal = getattr(attention_mask, CAUSAL, False)
    if held and causal and query.shape[2] <= layer.most_tokens and dropout == 0:
        return _decode(query, pending, None, scaling, _features(options))
    options |= {"dropout": dropout, "scaling": scaling}
    keys, values = pending.k, pending.v
    if held:
        seen = layer.past(held) + query.shape[2]
        if attention_mask is not None and attention_mask.shape[-1] != seen:
            got = f"a mask of {attention_mask.shape[-1]} keys"
            _refuse(got, f"{seen}, all that is held, or what a layer's window has")
        keys, values = layer.append_behind(pending, held)
    out, _ = _in_torch("a prompt", module, query, keys, values, attention_mask, **options)
    if not held:
        layer.append(pending, padding)
    return out


def _in_torch(
    why: str,
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """What the kernel does not do, and why not: SDPA, unless it would ignore a feature."""
    attend, name = sdpa_attention_forward, "SDPA"
    if any(options.get(name) is not None for name in FEATURES):  # a window is in the mask
        attend, name = attend_eagerly, "plain torch"
    _note(f"attention goes through {name}: {why}")
    out: tuple[Tensor, None] = attend(module, query, key, value, attention_mask, **options)
    return out


_noted: set[str] = set()


def _note(what: str) -> None:
    """Log, once, what does not go through the kernel."""
    if what not in _noted:
        _noted.add(what)
        LOG.info("transformers: %s", what)


torch.compiler.assume_constant_result(_note)  # so that code is heard as well that is only traced


def _refuse(got: str, allowed: str) -> NoReturn:
    raise InputError(f"attention: got {got}; allowed: {allowed}. Nothing was appended.")
