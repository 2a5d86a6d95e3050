"""Sliding windows of transformers' models: which layers have one, and which masks say no more."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from transformers.cache_utils import (
    StaticLayer,
    StaticSlidingWindowLayer,
    get_layer_types_and_kwargs,
)
from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function

from gqa_cutlass.tracing import is_traced

# What a configuration calls the shapes of layers that differ from the others'.
_OTHER_SHAPES = "global_head_dim", "num_global_key_value_heads", "swa_head_dim"


def windows_of(config: Any, stock: list[Any]) -> dict[int, int | None]:
    """The layers that are ours, and the window of each, if it has one.

    Args:
        config: The model's.
        stock: Its layers in a StaticCache.
    """
    text = config.get_text_config(decoder=True)
    kinds, _ = get_layer_types_and_kwargs(text)
    alike = all(getattr(text, name, None) is None for name in _OTHER_SHAPES)
    found: dict[int, int | None] = {}
    for index, (layer, kind) in enumerate(zip(stock, kinds, strict=True)):
        if type(layer) is StaticLayer:
            found[index] = None
        elif type(layer) is StaticSlidingWindowLayer and kind == "sliding_attention" and alike:
            found[index] = layer.max_cache_len  # of the window, or of all
    return found


def is_known(function: Callable[..., Any], options: Mapping[str, Any]) -> bool:
    """Whether a mask is causal, or that of a sliding window, and nothing else.

    Args:
        function: Which key a query may see.
        options: What transformers says of it.
    """
    if function is causal_mask_function:
        return True
    size = options.get("local_size")
    if size is None or options.get("use_vmap"):  # as where a model adds something of its own
        return False
    if is_traced():  # which cannot look into functions
        return True
    return _parts(function) == _parts(sliding_window_causal_mask_function(size))


def _parts(function: Callable[..., Any]) -> list[object]:
    """What a mask function does, and with which numbers and other functions."""
    found: list[object] = [getattr(function, "__code__", function)]
    for cell in getattr(function, "__closure__", None) or ():
        held = cell.cell_contents
        for part in held if isinstance(held, tuple) else (held,):
            found += _parts(part) if callable(part) else [part]
    return found
