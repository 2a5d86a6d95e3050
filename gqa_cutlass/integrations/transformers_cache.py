"""A cache for transformers' models whose tokens are appended by the kernel that attends.

transformers updates a cache first and attends afterwards. Here `update` only hands the new keys and
values on, as a `Pending` in place of the tensors, and the attention function does both at once.
What else the cache holds is compact: of a padded batch only the real tokens are stored, so that
what a sequence holds is always the beginning of its row. Keys carry their positions (they are
rotated before), so that where they are stored does not matter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, StaticCache

from gqa_cutlass.cache import KVCache
from gqa_cutlass.cache.ring import TOKENS
from gqa_cutlass.cache.scales import LayerScales, picked
from gqa_cutlass.call.stored import FP8
from gqa_cutlass.codegen.schema.problem import MAX_SEQ_LEN, MAX_TOKENS
from gqa_cutlass.devices import capturing
from gqa_cutlass.errors import InputError, shown
from gqa_cutlass.integrations.transformers_scales import LayersScales, Stored, multiplied
from gqa_cutlass.integrations.transformers_windows import windows_of
from gqa_cutlass.tracing import break_graph, is_traced, mark_static

NAME = "gqa_cutlass"  # of the attention implementation


class GqaCache(Cache):  # type: ignore[misc]
    """Keys and values of all layers for `model.generate(..., past_key_values=cache)`.

    Needs `attn_implementation="gqa_cutlass"`, see `register`. Every layer with full attention, or
    with a sliding window, of which it keeps no more, is a `KVCache`, which share their lengths;
    other layers (chunked, linear attention) are those of transformers' StaticCache, and attended by
    SDPA. Memory is allocated with the first prompt.

    Reading is right with any padding of a prompt, left or right; with sliding windows it must be on
    the left. It can be compiled, and CUDA graphs may hold its steps; `generate` compiles them by
    itself on a GPU. In compiled steps a mask that hides tokens which an earlier one showed gives
    NaN; elsewhere it is an error.

    Args:
        config: The model's, `model.config`.
        max_cache_len: Tokens that a sequence can hold, its prompt included; of a model with sliding
            windows rounded up to whole pages of 16 or 64.
        cache_dtype: torch.float8_e4m3fn or torch.float8_e5m2 for layers of ours in 8 bits: half the
            memory, and about half the time of long contexts. None: as the model has them.
        k_scale: With it, what stored keys are multiplied by: a number, or float32 [] or
            [num_kv_heads] on the model's device, for all such layers or a list with one for each.
            None: the first prompt's largest number, in each layer, becomes a quarter of the
            type's largest; numbers beyond that are cut off. "token", of both: a scale for every
            token and KV head, which cuts nothing off.
        v_scale: As k_scale, of values.

    Raises:
        InputError: The model has no layer with full attention or a sliding window; a length, a type
            or a scale is not allowed.
    """

    def __init__(
        self,
        config: Any,
        max_cache_len: int,
        cache_dtype: torch.dtype | None = None,
        *,
        k_scale: LayerScales = None,
        v_scale: LayerScales = None,
    ) -> None:
        if type(max_cache_len) is not int or not 1 <= max_cache_len <= MAX_SEQ_LEN:
            raise InputError(
                f"GqaCache: max_cache_len: got {shown(max_cache_len)}; allowed: an int from 1 to "
                f"{MAX_SEQ_LEN}. Nothing was allocated."
            )
        kept = Stored(dtype=cache_dtype, k_scale=k_scale, v_scale=v_scale)
        stock = StaticCache(config=config, max_cache_len=max_cache_len).layers
        ours = windows_of(config, stock)
        if not ours:
            kinds = sorted({type(layer).__name__ for layer in stock})
            raise InputError(
                f"GqaCache: config: got layers {kinds} only; allowed: a model in which at least "
                "one layer has full attention or a sliding window. Use transformers' StaticCache."
            )
        self.storage = Storage(list(ours.values()), max_cache_len, kept)
        layers = list(stock)
        for position, index in enumerate(ours):
            layers[index] = GqaLayer(self.storage, position)
        super().__init__(layers=layers)

    def check(self) -> None:
        """Wait for the device, and raise if a sequence was full: `KVCache.check`.

        Raises:
            CacheOverflowError: A sequence had no room for a token; its output was NaN.
        """
        if self.storage.caches:
            self.storage.caches[0].check()


class Storage:
    """What the layers share: their caches, and what is known of prompts and padding.

    Args:
        windows: Of each layer, None for full attention.
        max_cache_len: Tokens that a sequence can hold.

    Attributes:
        caches: One per layer, once there was a prompt. The last one moves the lengths.
        scales: Of caches of 8 bits.
        by_token: Whether every token has scales of its own.
        dtype: Of the model's keys and values.
        padded: Whether a prompt had padding, which is not stored.
        pads: Padding per sequence, int32 [batch] on the device: what transformers counts beyond the
            tokens that are stored.
        lengths: Real tokens of each sequence of the padded prompt that is being stored.
        order: Its tokens, [batch, tokens, 1, 1], the real ones first.
    """

    caches: tuple[KVCache, ...] = ()
    scales: LayersScales
    dtype: torch.dtype
    padded = False
    pads: Tensor
    lengths: list[int]
    order: Tensor
    _columns: int | None = 0

    def __init__(self, windows: list[int | None], max_cache_len: int, kept: Stored) -> None:
        self.windows = windows
        self.num_layers = len(windows)
        self.max_cache_len = max_cache_len
        self._kept = kept
        self.by_token = kept.by_token

    def allocate(self, k: Tensor, v: Tensor) -> None:
        """Make the caches, for keys and values like these, [batch, heads, tokens, head_dim].

        Raises:
            InputError: A size or a type that `KVCache` does not allow.
            CacheAllocationError: There is not enough memory.
        """
        batch, num_kv_heads, _, head_dim = k.shape
        self.dtype, dtype = k.dtype, self._kept.dtype or k.dtype
        self.scales = self._kept.scales(self.num_layers, k.device)
        scales: dict[str, Any] = {**self.scales.given}
        caches = KVCache.for_layers(
            self.num_layers, batch, self.max_cache_len, num_kv_heads, head_dim, dtype, k.device,
            v.shape[-1], window=self.windows, **scales,
        )  # fmt: skip
        with torch.inference_mode(False):
            self.pads = torch.zeros(batch, dtype=torch.int32, device=k.device)
        mark_static(self.pads)
        self.caches = tuple(caches)

    @property
    def columns(self) -> int | Tensor:
        """Tokens and padding per sequence, as transformers counts: on the device if need be."""
        if not is_traced() and self._columns is not None:  # traced code must not look at it
            return self._columns
        return (self.caches[0].seqlens[0] + self.pads[0]).long()

    def known_columns(self) -> int:
        """The same on the host, which may have to wait for the device."""
        if is_traced():
            return break_graph(self.known_columns, "GqaCache: a prompt in compiled code")()
        if self._columns is None:
            self._columns = self.caches[0].refresh()[0] + int(self.pads[0])
        return self._columns

    def count(self, tokens: int) -> None:
        """Note on the host that so many columns were added, in a step that ran just now."""
        if is_traced() or capturing(self.pads.device):
            self._columns = None  # steps of compiled code and of graphs go unseen
        elif self._columns is not None:
            self._columns += tokens

    def arrange(self, real: Tensor) -> None:
        """Note how a padded prompt is stored, for all layers: its real tokens, in their order.

        Args:
            real: Bool [batch, tokens], False for padding.

        Raises:
            InputError: Padding behind tokens, and layers with windows: in those of transformers it
                counts as tokens do.
        """
        windows = any(window and window < self.max_cache_len for window in self.windows)
        if windows and (real[:, :-1] > real[:, 1:]).any():
            allowed = "padding on the left in models with sliding windows; or use StaticCache"
            _refuse("padding", "some behind tokens", allowed)
        self.order = (~real).to(torch.uint8).argsort(dim=1, stable=True)[..., None, None]
        held = real.sum(1, dtype=torch.int32)
        self.pads.copy_(real.shape[1] - held)
        self.lengths = held.tolist()
        self.padded = min(self.lengths) < real.shape[1]

    def reset(self) -> None:
        """Empty it; the memory stays."""
        self._columns = 0
        self.padded = False
        if self.caches:
            self.caches[0].reset()
            self.pads.zero_()


class GqaLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer of a `GqaCache`.

    Args:
        storage: What it shares with the others.
        position: Which of the caches is its own.
    """

    is_compileable = True
    is_croppable = True
    is_calibrated = False  # whether the scales of a cache of 8 bits are those of its tokens

    def __init__(self, storage: Storage, position: int) -> None:
        self.storage = storage
        self.position = position

    @property
    def cache(self) -> KVCache:
        """Its keys and values; there is none before the first prompt."""
        return self.storage.caches[self.position]

    @property
    def window(self) -> int | None:
        """Tokens that a query sees, its own included; None: all."""
        return self.storage.windows[self.position]

    @property
    def is_sliding(self) -> bool:
        """Whether masks are to show a window."""
        return self.window is not None

    @property
    def most_tokens(self) -> int:
        """New tokens that the kernel takes at once."""
        return MAX_TOKENS if self.window is None else TOKENS

    @property
    def leads(self) -> bool:
        """Whether it is the last of its kind, which moves the lengths."""
        return self.position == self.storage.num_layers - 1

    @property
    def is_initialized(self) -> bool:
        """Whether memory was allocated."""
        return len(self.storage.caches) > 0

    @property
    def keys(self) -> Tensor | None:
        """Keys as transformers lays them out, [batch, heads, max_cache_len, head_dim]; a view, but
        for what is stored in 8 bits.

        With a window, the slots of its ring: `KVCache.k`.
        """
        return self.views(self.get_max_length())[0] if self.is_initialized else None

    @property
    def values(self) -> Tensor | None:
        """As `keys`."""
        return self.views(self.get_max_length())[1] if self.is_initialized else None

    def views(self, tokens: int) -> tuple[Tensor, Tensor]:
        """The first tokens' keys and values, as transformers lays them out, in the model's type."""
        return self._seen(lambda held: held[:, :tokens])

    def _seen(self, pick: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Keys and values as `views` has them, picked from [batch, slots, ...]."""
        cache = self.cache
        found = []
        for held, scale in ((cache.k, cache.k_scale), (cache.v, cache.v_scale)):
            tokens = pick(held)
            if held.dtype in FP8:
                own = pick(scale) if self.storage.by_token and isinstance(scale, Tensor) else scale
                tokens = multiplied(tokens, own, self.storage.dtype)
            found.append(tokens.transpose(1, 2))
        k, v = found
        return k, v

    @property
    def batch_size(self) -> int:
        """Sequences."""
        if not self.is_initialized:
            raise AttributeError("no memory was allocated yet")
        return self.cache.batch_size

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate the memory of all layers, unless there is some."""
        if not self.is_initialized:
            self.storage.allocate(key_states, value_states)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Pending, Pending]:
        """Hand new tokens on to the attention function, which appends them."""
        self.lazy_initialization(key_states, value_states)
        if key_states.device != self.cache.device:
            raise InputError(
                f"GqaCache: got keys on {key_states.device}, and earlier layers on "
                f"{self.cache.device}; allowed: a model on one device. Nothing was appended. Use "
                "transformers' StaticCache for models over several."
            )
        if not self.is_calibrated:
            self.storage.scales.calibrate(self.position, key_states, value_states)
            self.is_calibrated = True
        pending = Pending(self, key_states, value_states)
        return pending, pending

    def append(self, pending: Pending, padding: Tensor | None = None) -> None:
        """Append a prompt.

        Args:
            pending: Its keys and values.
            padding: Bool [batch, tokens or more], False for what is not to be stored; None: store
                all. Only into an empty cache.

        Raises:
            CacheOverflowError: It does not fit.
        """
        tokens = pending.k.shape[2]
        k, v, lengths = pending.k.transpose(1, 2), pending.v.transpose(1, 2), None
        if padding is not None:
            if self.position == 0:
                self.storage.arrange(padding[:, :tokens])
            lengths, order = self.storage.lengths, self.storage.order
            k, v = (torch.take_along_dim(t, order, dim=1) for t in (k, v))
        self.cache.prefill(k, v, lengths)
        if self.leads:
            self.storage.count(tokens)

    def append_behind(self, pending: Pending, held: int) -> tuple[Tensor, Tensor]:
        """Append tokens behind so many others; returns all that they may see, as for `views`."""
        new = pending.k, pending.v
        if self.window is None:
            self.append(pending)
            return self.views(held + pending.k.shape[2])
        seen = torch.arange(held - self.past(held), held, device=self.cache.device)
        slots = seen % self.cache.k.shape[1]
        pairs = zip(self._seen(lambda held: picked(held, 1, slots)), new, strict=True)
        k, v = (torch.cat(pair, dim=2) for pair in pairs)
        self.append(pending)
        return k, v

    def past(self, held: int) -> int:
        """Of so many tokens, those that the next one may see."""
        return held if self.window is None else min(held, self.window - 1)

    def get_seq_length(self) -> int | Tensor:
        """Tokens and padding so far."""
        return self.storage.columns if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int | Tensor]:
        """What a mask must describe: for one token nothing, which `register`'s mask understands."""
        if query_length == 1:
            return 0, self.get_seq_length()
        held = self.storage.known_columns() if self.is_initialized else 0
        past = self.past(held)
        return past + query_length, held - past

    def get_max_length(self) -> int:
        """Tokens that a sequence can hold."""
        return self.storage.max_cache_len

    def crop(self, tokens_to_remove: int) -> None:
        """Take the last tokens back; a negative number says how many.

        Raises:
            InputError: A positive number; or the cache holds a padded prompt.
        """
        if tokens_to_remove > 0:
            _refuse("crop", str(tokens_to_remove), "0 or less: minus the tokens to take back")
        if not tokens_to_remove or not self.leads or not self.is_initialized:
            return
        storage = self.storage
        if storage.padded:
            _refuse("crop", "a cache of a padded batch", "prompts of one length")
        columns = max(0, storage.known_columns() + tokens_to_remove)
        self.cache.truncate(columns)
        storage._columns = columns

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let row i hold what row beam_idx[i] held: beam search."""
        if self.is_initialized:
            order = beam_idx.to(self.cache.device)
            self.cache.reorder(order)
            if self.leads:
                self.storage.pads.copy_(self.storage.pads[order])

    def reset(self) -> None:
        """Empty the cache; the memory stays."""
        self.is_calibrated = False
        if self.leads:
            self.storage.reset()

    def offload(self) -> NoReturn:
        """Not offered."""
        _refuse("offload", "a call", "caches that stay on the device")

    def prefetch(self) -> NoReturn:
        """Not offered."""
        _refuse("prefetch", "a call", "caches that stay on the device")

    def batch_repeat_interleave(self, repeats: int) -> NoReturn:
        """Not offered: the batch does not change."""
        _refuse("batch_repeat_interleave", "a call", "transformers' DynamicCache")

    def batch_select_indices(self, indices: Tensor) -> NoReturn:
        """Not offered: the batch does not change."""
        _refuse("batch_select_indices", "a call", "transformers' DynamicCache")


class Pending:
    """New keys and values on the way from a layer's `update` to the attention function.

    It stands where transformers has the tensors of keys and values, so that an attention function
    which does not know it fails, instead of attending without the new token.

    Args:
        layer: Whose cache they belong to.
        k: Keys, [batch, heads, tokens, head_dim].
        v: As k.
    """

    def __init__(self, layer: GqaLayer, k: Tensor, v: Tensor) -> None:
        self.layer = layer
        self.k = k
        self.v = v

    def __getattr__(self, name: str) -> NoReturn:
        raise InputError(
            f"GqaCache: an attention function asked its keys for {name!r}; allowed: the attention "
            f"function of gqa_cutlass. Call model.set_attn_implementation({NAME!r}) after "
            "gqa_cutlass.integrations.transformers.register(), or use transformers' StaticCache."
        )


def _refuse(method: str, got: str, allowed: str) -> NoReturn:
    raise InputError(f"GqaCache.{method}: got {got}; allowed: {allowed}. Nothing was changed.")
