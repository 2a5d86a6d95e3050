"""A cache in pages: sequences come and go, grow, share beginnings, and are decoded in any batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, Unpack, overload

import torch
from torch import Tensor

from gqa_cutlass.cache.allocation import available_bytes
from gqa_cutlass.cache.guard import raise_no_temporaries, with_memory
from gqa_cutlass.cache.inputs import new_tokens
from gqa_cutlass.cache.paged.batch import PagedBatch
from gqa_cutlass.cache.paged.counted import CountedPages
from gqa_cutlass.cache.paged.host import on_host
from gqa_cutlass.cache.paged.inputs import check_reach, counts, packed
from gqa_cutlass.cache.paged.pools import Pools
from gqa_cutlass.cache.paged.sequences import refuse
from gqa_cutlass.cache.paged.step import Step
from gqa_cutlass.cache.paged.tables import Tables
from gqa_cutlass.cache.scales import LayerScales, allocate_scaled, by_token, bytes_with
from gqa_cutlass.cache.sizes import PoolSizes
from gqa_cutlass.call.options import Options, listed
from gqa_cutlass.call.plan import Pair, Result
from gqa_cutlass.call.stored import SCALES
from gqa_cutlass.codegen.schema.problem import MAX_BATCH, MAX_SEQ_LEN, MAX_TOKENS
from gqa_cutlass.errors import shown
from gqa_cutlass.tensors import plain_shape


class PagedKVCache(CountedPages):
    """Keys and values of sequences of a model, in pages that they take from a pool as they grow.

    A sequence is an int, given out by `allocate` and `fork` and never again after `free`. The host
    counts all tokens and pages itself: nothing but `check` waits for the GPU. All layers have the
    same pages, and a step of the model adds its tokens to all of them at once:

        with cache.step(sequences) as step:  # takes the pages, before anything is launched
            for layer in range(cache.num_layers):
                out = step.decode(layer, q, k, v)

    The tokens count when the block ends. Where it ends in an error they do not, and what it took is
    free again. `append`, `prefill` and `decode` are such steps in one call.

    `fork` copies nothing: sequences hold pages in common, and who writes into a page that others
    hold takes a copy of its own first. Pages are free when nobody holds them any more.

    What a call cannot do it does not begin: where pages are missing, OutOfPagesError says how many,
    none was taken, and nothing was written. The steps of a `batch` can be captured into CUDA
    graphs.

    Works in inference mode or outside; nothing is recorded for gradients. Not thread-safe: one
    thread and one stream at a time.

    Args:
        num_pages: Pages of the pool.
        page_size: Tokens of a page, 1 and more.
        num_kv_heads: KV heads.
        head_dim: Dimension per head, as `gqa_decode` allows it.
        dtype: torch.float16 or torch.bfloat16; or torch.float8_e4m3fn or torch.float8_e5m2, of
            which what is given in 16 bits is made.
        device: A GPU, or "cpu" (simulated, slow).
        num_layers: Layers of the model.
        head_dim_v: Dimension per head of values; None: as head_dim.
        window: Newest tokens of a sequence that a step may attend to, the new one included; pages
            wholly before them are freed when a step is over. None: all, and no page is freed.
        k_scale: Of a cache of 8 bits: what its keys are multiplied by, and new ones divided by. A
            number, or float32 [] or [num_kv_heads] on the device; or a list, with one for each
            layer; see `gqa_decode`. Or "token", of both: one for every token and KV head, which the
            cache keeps, and computes of the tokens that it is given. None: 1.
        v_scale: The same of values.

    Raises:
        InputError: A size, the type or the device is not allowed.
        CacheAllocationError: There is not enough memory. Nothing stays allocated.
        DeviceError: No usable GPU.
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype = torch.float16,
        device: torch.device | int | str = "cuda",
        *,
        num_layers: int = 1,
        head_dim_v: int | None = None,
        window: int | None = None,
        k_scale: LayerScales = None,
        v_scale: LayerScales = None,
    ) -> None:
        check_reach("PagedKVCache", window)
        sizes = PoolSizes(
            num_layers=num_layers, num_pages=num_pages, page_size=page_size,
            num_kv_heads=num_kv_heads, head_dim=head_dim, dtype=dtype, head_dim_v=head_dim_v,
            by_token=by_token("PagedKVCache", k_scale, v_scale),
        )  # fmt: skip
        memory, scales = allocate_scaled(sizes, device, k_scale, v_scale)
        self._adopt(Pools(memory.layers, scales), window)

    def _adopt(self, pools: Pools, window: int | None) -> None:
        super().__init__(pools, window)
        self._tables = Tables(self.device)

    @staticmethod
    def bytes_needed(
        num_pages: int,
        page_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype = torch.float16,
        *,
        num_layers: int = 1,
        head_dim_v: int | None = None,
        window: int | None = None,
        k_scale: LayerScales = None,
        v_scale: LayerScales = None,
    ) -> int:
        """Bytes that such a cache would take, whatever its window; allocates nothing.

        Args:
            num_pages: As for the class, as are the others.
            page_size: As for the class.
            num_kv_heads: As for the class.
            head_dim: As for the class.
            dtype: As for the class.
            num_layers: As for the class.
            head_dim_v: As for the class.
            window: As for the class; the pools are as large without.
            k_scale: As for the class; only those of tokens take memory of the cache's.
            v_scale: As k_scale.

        Returns:
            Bytes of the pools of all layers, keys and values, and of their tokens' scales.

        Raises:
            InputError: A size, the type or a scale is not allowed.
        """
        check_reach("PagedKVCache", window)
        sizes = PoolSizes(
            num_layers=num_layers, num_pages=num_pages, page_size=page_size,
            num_kv_heads=num_kv_heads, head_dim=head_dim, dtype=dtype, head_dim_v=head_dim_v,
            by_token=by_token("PagedKVCache", k_scale, v_scale),
        )  # fmt: skip
        return bytes_with(sizes, k_scale, v_scale)

    @on_host
    @contextmanager
    def step(self, sequences: Sequence[int], tokens: int | Sequence[int] = 1) -> Iterator[Step]:
        """Add tokens to sequences, layer by layer, in a `with` block.

        At its end every layer must have got them, by `decode` (as many per sequence) or `append`.
        Where it ends in an error, lengths are as they were, and the step can be repeated. Meanwhile
        sequences may be looked at, and nothing else. Of several that were decoded, such as drafts,
        `accept` keeps the first so many.

        Args:
            sequences: In the order of the batch, each once.
            tokens: How many each of them gets: one int for all, or one for each. 0 for all:
                attend only.

        Yields:
            The step, with `decode` and `append` for a layer, `gather`, and what other kernels read:
            `block_table` and `seqlens`.

        Raises:
            OutOfPagesError: There are too few pages. Nothing was taken or written.
            CacheAllocationError: There is no memory for temporaries. Nothing was taken.
            InputError: There is no such sequence, one is named twice, a batch holds one, or it
                would be too long; another step is open; or a CUDA graph is being captured. At the
                end: a layer did not get the tokens.
        """
        with self._step("PagedKVCache.step", sequences, tokens) as step:
            yield step

    @on_host
    def prefill(self, sequence: int, k: Tensor, v: Tensor) -> None:
        """Append a prompt, or a piece of one, to a sequence, in all layers.

        What is before the window when all of it is there takes no page.

        Args:
            sequence: Which.
            k: Keys, [num_layers, tokens, num_kv_heads, head_dim], or without the first dimension
                where there is one layer; of the cache's dtype (or 16 bits, where that is of 8) and
                on its device.
            v: As k.

        Raises:
            GqaError: As for `step`. The sequence is as it was.
        """
        *_, tokens, _, _ = 0, 0, 0, *plain_shape(k)  # what is no prompt, `packed` refuses
        self._append("PagedKVCache.prefill", [sequence], k, v, tokens)

    @on_host
    def append(self, sequences: Sequence[int], k: Tensor, v: Tensor) -> None:
        """Append one token to each of some sequences, in all layers, without attending.

        Args:
            sequences: Each once.
            k: Keys, [num_layers, sequences, num_kv_heads, head_dim], or without the first dimension
                where there is one layer; of the cache's dtype (or 16 bits, where that is of 8) and
                on its device.
            v: As k.

        Raises:
            GqaError: As for `step`. The sequences are as they were.
        """
        self._append("PagedKVCache.append", sequences, k, v, 1)

    @overload
    def decode(
        self, sequences: Sequence[int], q: Tensor, k: Tensor | None = None,
        v: Tensor | None = None, *, return_lse: Literal[False] = False, **options: Unpack[Options],
    ) -> Tensor: ...  # fmt: skip
    @overload
    def decode(
        self, sequences: Sequence[int], q: Tensor, k: Tensor | None = None,
        v: Tensor | None = None, *, return_lse: Literal[True], **options: Unpack[Options],
    ) -> Pair: ...  # fmt: skip
    @overload
    def decode(
        self, sequences: Sequence[int], q: Tensor, k: Tensor | None = None,
        v: Tensor | None = None, *, return_lse: bool, **options: Unpack[Options],
    ) -> Result: ...  # fmt: skip
    @on_host
    @listed(Options, without=SCALES)
    def decode(
        self,
        sequences: Sequence[int],
        q: Tensor,
        k: Tensor | None = None,
        v: Tensor | None = None,
        *,
        return_lse: bool = False,
        **options: Any,
    ) -> Result:
        """Append new tokens, if given, and attend, in a cache of one layer: `step` in one call.

        Args:
            sequences: In the order of the batch, each once.
            q: As for `gqa_decode`, a row per sequence.
            k: As for `gqa_decode`.
            v: As for `gqa_decode`.
            return_lse: As for `gqa_decode`.
            **options: `Options`.

        Returns:
            As `gqa_decode`.

        Raises:
            GqaError: As for `step` and `gqa_decode`. The sequences are as they were.
        """
        call = "PagedKVCache.decode"
        if self.num_layers != 1:
            allowed = "one layer; `with cache.step(sequences) as step:` decodes several"
            refuse(call, "num_layers", str(self.num_layers), allowed)
        with self._step(call, sequences, 0 if k is None else new_tokens(k)) as step:
            result: Result
            result = step.decode(0, q, k, v, return_lse=return_lse, **options)
        return result

    @on_host
    def batch(self, batch_size: int, max_seq_len: int, tokens: int = 1) -> PagedBatch:
        """Make a batch whose steps can be captured into CUDA graphs.

        Args:
            batch_size: Rows, 1 to 65535.
            max_seq_len: Tokens that a sequence can have there, rounded up to whole pages.
            tokens: Tokens that each step adds to every sequence, 1 to 256.

        Returns:
            The batch, without sequences: `assign` gives it some.

        Raises:
            InputError: A size is not allowed, or a CUDA graph is being captured.
            CacheAllocationError: There is no memory for its table.
        """
        call = "PagedKVCache.batch"
        self._storage.check_surroundings(call)
        for name, value, most in (
            ("batch_size", batch_size, MAX_BATCH), ("max_seq_len", max_seq_len, MAX_SEQ_LEN),
            ("tokens", tokens, MAX_TOKENS),
        ):  # fmt: skip
            if type(value) is not int or not 1 <= value <= most:
                refuse(call, name, shown(value), f"an int from 1 to {most}")
        pages = self._storage.sequences.pages_of(max_seq_len)
        needed = 2 * PagedBatch.bytes_needed(batch_size, pages)  # assign() has a copy
        if needed > available_bytes(self.device):
            raise_no_temporaries(call, self.device, f"{needed} bytes, for a table and its copy")
        made = partial(PagedBatch, self._storage, batch_size, pages, tokens)
        return with_memory(call, self.device, made)

    @contextmanager
    def _step(
        self, call: str, sequences: Sequence[int], tokens: int | Sequence[int]
    ) -> Iterator[Step]:
        storage, pools = self._storage, self._pools
        given = storage.changing(call, sequences)
        storage.check_surroundings(call)
        if not given:
            refuse(call, "sequences", "none", "at least one")
        added = counts(call, tokens, len(given))
        with storage.stepping(call, given, added) as counting:
            fill = partial(self._tables.fill, given, added, pools.page_size)
            table = with_memory(call, pools.device, fill)
            reach = storage.sequences.reach(given)
            with Step(call, pools, table, sequences, given, added, reach) as step:
                yield step
                if any(added):
                    step.check_complete()
                counting.drafts = step.drafts

    def _append(
        self, call: str, sequences: Sequence[int], k: Tensor, v: Tensor, tokens: int
    ) -> None:
        storage, pools = self._storage, self._pools
        given = storage.changing(call, sequences)
        storage.check_surroundings(call)
        added = [tokens] * len(given)
        k = packed(call, "k", k, pools.k, sum(added), pools.v)
        v = packed(call, "v", v, pools.v, sum(added), pools.k)
        skipped = [storage.sequences.skipped(held, tokens) for held in given]  # of prompts alone
        first = sum(skipped)
        with storage.stepping(call, given, added, skipped):
            slots = with_memory(call, pools.device, partial(pools.slots, given, added, skipped))
            write = partial(pools.write_all, slots, k[:, first:], v[:, first:])
            with_memory(call, pools.device, write)
