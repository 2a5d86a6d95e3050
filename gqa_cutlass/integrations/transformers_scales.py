"""What a `GqaCache` stores in 8 bits, and by which scales: given ones, or its first prompt's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gqa_cutlass.cache.scales import LayerScales, Scale, by_token
from gqa_cutlass.call.stored import FP8, FP8_NAMES, SCALES
from gqa_cutlass.errors import InputError, shown
from gqa_cutlass.tracing import mark_static

# The largest number of the first prompt becomes the type's largest over this: later ones may be
# larger, and what a floating-point type rounds off is the same share of smaller numbers.
HEADROOM = 4.0


@dataclass(frozen=True, kw_only=True)
class Stored:
    """How keys and values are stored.

    Args:
        dtype: torch.float8_e4m3fn or torch.float8_e5m2; None: as the model has them.
        k_scale: Of keys: for all layers, or a list with one for each; None: what the first prompt
            says; "token", of both: what each token says, per KV head.
        v_scale: Of values, likewise.

    Raises:
        InputError: Another type, or scales without one; or a scale is not allowed.
    """

    dtype: torch.dtype | None = None
    k_scale: LayerScales = None
    v_scale: LayerScales = None

    def __post_init__(self) -> None:
        known = isinstance(self.dtype, torch.dtype) and self.dtype in FP8
        if self.dtype is not None and not known:
            _refuse("cache_dtype", shown(self.dtype), f"None, for the model's, or {FP8_NAMES}")
        for name in SCALES:
            if self.dtype is None and getattr(self, name) is not None:
                _refuse(name, "one without cache_dtype", f"None, or a cache_dtype of {FP8_NAMES}")
        by_token("GqaCache", self.k_scale, self.v_scale)

    @property
    def by_token(self) -> bool:
        """Whether every token has scales of its own."""
        return by_token("GqaCache", self.k_scale, self.v_scale)

    def scales(self, num_layers: int, device: torch.device) -> LayersScales:
        """Those of all layers; 1 until there was a prompt, where it is to say them."""
        found = {}
        for name in SCALES if self.dtype is not None else ():
            given = getattr(self, name)
            if given is None:
                with torch.inference_mode(False):
                    given = [torch.ones((), device=device) for _ in range(num_layers)]
                mark_static(*given)
            found[name] = given
        by_prompt = tuple(name for name in found if getattr(self, name) is None)
        return LayersScales(found, by_prompt, self.dtype)


class LayersScales:
    """The scales of a model's layers.

    Args:
        given: By name, for all layers or a list with one for each; none for caches of 16 bits.
        by_prompt: The names of those that a prompt says.
        dtype: Of the caches, if of 8 bits.
    """

    def __init__(
        self, given: dict[str, LayerScales], by_prompt: tuple[str, ...], dtype: torch.dtype | None
    ) -> None:
        self.given = given
        self._by_prompt = by_prompt
        self._dtype = dtype

    def calibrate(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Set what a prompt says, where the scales are: nothing waits for the device.

        Args:
            layer: Whose.
            k: Its keys, of any shape. Padding counts too, but what is no number does not.
            v: Its values.
        """
        for name, tokens in zip(SCALES, (k, v), strict=True):
            if name in self._by_prompt:
                assert self._dtype is not None
                largest = tokens.detach().float().nan_to_num(0, 0, 0).abs().amax()
                scale = largest * (HEADROOM / torch.finfo(self._dtype).max)
                own = self._of(name, layer)
                assert isinstance(own, Tensor)
                own.copy_(torch.where(largest > 0, scale, 1.0))

    def _of(self, name: str, layer: int) -> Scale:
        given = self.given[name]
        return given[layer] if isinstance(given, (list, tuple)) else given  # type: ignore[return-value]


def multiplied(stored: Tensor, scale: Scale, dtype: torch.dtype) -> Tensor:
    """What is stored, as it counts.

    Args:
        stored: [batch, tokens, heads, head_dim], in 8 bits.
        scale: For all, [heads], or [batch, tokens, heads]; None: 1.
        dtype: Of the model.
    """
    if isinstance(scale, Tensor) and scale.dim():
        scale = scale.unsqueeze(-1)
    return (stored.float() * (1.0 if scale is None else scale)).to(dtype)


def _refuse(name: str, got: str, allowed: str) -> None:
    raise InputError(f"GqaCache: {name}: got {got}; allowed: {allowed}. Nothing was allocated.")
