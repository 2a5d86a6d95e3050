"""One step of a model: every layer gets the same sequences' new tokens, which count once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any, Literal, Self, Unpack, overload

from torch import Tensor

from gqa_cutlass.api import gqa_decode
from gqa_cutlass.cache.growth import Turned
from gqa_cutlass.cache.guard import with_memory
from gqa_cutlass.cache.inputs import new_tokens, surroundings_flaw, turned
from gqa_cutlass.cache.overflow import raise_no_positions
from gqa_cutlass.cache.paged.host import on_host
from gqa_cutlass.cache.paged.inputs import UNWRITTEN, check_seen, packed
from gqa_cutlass.cache.paged.pools import Pools, check_scaled
from gqa_cutlass.cache.paged.sequences import Held, refuse
from gqa_cutlass.cache.paged.tables import Table
from gqa_cutlass.call.asked import NO_WINDOW
from gqa_cutlass.call.options import Options, listed
from gqa_cutlass.call.plan import Pair, Result
from gqa_cutlass.call.stored import SCALES
from gqa_cutlass.errors import shown
from gqa_cutlass.tracing import is_traced


class DecodeStep:
    """New tokens of every sequence, layer by layer. Ends with its `with` block.

    Args:
        call: In whose name errors are.
        pools: Keys and values of all layers.
        table: The sequences' pages and lengths.
        tokens: How many each of them gets.
        reach: Newest tokens of every sequence that the cache has; None: all.
        longest: Tokens of the longest sequence; None where replays may have added some.

    Attributes:
        drafts: Whether it decoded several tokens of a sequence.
        widest: Tokens that the widest window had in which it attended, if there must be one.
    """

    def __init__(
        self,
        call: str,
        pools: Pools,
        table: Table,
        tokens: Sequence[int],
        reach: int | None,
        longest: int | None,
    ) -> None:
        self._call, self._pools, self._table = call, pools, table
        self._each, self._reach, self._longest = tokens, reach, longest
        self.drafts = False
        self.widest = 0
        self._written: set[int] = set()  # layers that have their tokens
        self._open = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._open = False

    @property
    def block_table(self) -> Tensor:
        """The sequences' pages, int32 [batch, max_pages]; valid until the next step."""
        return self._table.block_table

    @property
    def seqlens(self) -> Tensor:
        """Tokens before this step, int32 [batch] on the device; valid until the next step."""
        return self._table.before

    @overload
    def decode(
        self, layer: int, q: Tensor, k: Tensor | None = None, v: Tensor | None = None, *,
        return_lse: Literal[False] = False, **options: Unpack[Options],
    ) -> Tensor: ...  # fmt: skip
    @overload
    def decode(
        self, layer: int, q: Tensor, k: Tensor | None = None, v: Tensor | None = None, *,
        return_lse: Literal[True], **options: Unpack[Options],
    ) -> Pair: ...  # fmt: skip
    @overload
    def decode(
        self, layer: int, q: Tensor, k: Tensor | None = None, v: Tensor | None = None, *,
        return_lse: bool, **options: Unpack[Options],
    ) -> Result: ...  # fmt: skip
    @listed(Options, without=SCALES)
    def decode(
        self,
        layer: int,
        q: Tensor,
        k: Tensor | None = None,
        v: Tensor | None = None,
        *,
        return_lse: bool = False,
        **options: Any,
    ) -> Result:
        """Append new tokens' K and V, if given, and attend over everything held: `gqa_decode`.

        Args:
            layer: Which of the cache's, from 0.
            q: As for `gqa_decode`, a row per sequence of the step, or per row of the batch.
            k: As for `gqa_decode`, of as many tokens per sequence as the step adds. None: append
                nothing, and attend to what the layer holds, which includes this step's tokens if it
                has them.
            v: As for `gqa_decode`.
            return_lse: As for `gqa_decode`.
            **options: `Options`.

        Returns:
            As `gqa_decode`.

        Raises:
            InputError: The layer has its tokens already, the step is not of as many tokens for each
                sequence, or q has not one row for each; or `window_size` asks for more tokens than
                the cache's window keeps.
            CacheOverflowError: A sequence is longer than `rotary_cos` has positions. Nothing was
                launched.
            CacheAllocationError: There is no memory for the output.
            GqaError: As for `gqa_decode`. No length counts the tokens; call it again, or leave the
                step by an exception, which takes them back.
        """
        self._check(layer, writes=k is not None)
        if k is not None:
            self._check_tokens(new_tokens(k))
            if options and not is_traced():  # which would be compiled anew for every length
                self._check_positions(turned(q, k, options))
        if unknown := options.keys() - Options.__annotations__.keys():
            raise TypeError(f"decode() got an unexpected keyword argument {min(unknown)!r}")
        seen = self._seen(layer, q, k is not None, options.get("window_size", NO_WINDOW))
        options = self._pools.scales[layer].asked(self._call, options)
        table = self._table
        batch = table.block_table.shape[0]
        if isinstance(q, Tensor) and q.dim() > 2 and q.shape[0] != batch:
            allowed = f"{batch}, one per sequence, or per row of a batch"
            refuse(self._call, "q", f"{q.shape[0]} rows", allowed, UNWRITTEN)
        call = partial(
            self._pools.attend or gqa_decode,
            q, self._pools.k[layer], self._pools.v[layer], k, v, block_table=table.block_table,
            cache_seqlens=table.after if k is None and layer in self._written else table.before,
            return_lse=return_lse, **options,
        )  # fmt: skip
        result: Result = with_memory(self._call, self._pools.device, call)
        if k is not None:
            self._written.add(layer)
            self.drafts = self.drafts or new_tokens(k) > 1
        self.widest = max(self.widest, seen)
        return result

    def _seen(self, layer: int, q: object, appends: bool, window_size: object) -> int:
        """Tokens that a call attends to, by `check_seen`: the first of several queries looks back
        further than the last.
        """
        if self._reach is None:
            return 0
        new = min(self._each) if appends or layer in self._written else 0
        older = max(0, new_tokens(q) - max(1, new))
        return check_seen(self._call, window_size, self._reach - older) + older

    def _check(self, layer: int, *, writes: bool) -> None:
        if not self._open:
            got = "a step that is over"
            refuse(self._call, "step", got, "one whose `with` block is open", UNWRITTEN)
        most = self._pools.num_layers - 1
        if type(layer) is not int or not 0 <= layer <= most:
            refuse(self._call, "layer", shown(layer), f"an int from 0 to {most}", UNWRITTEN)
        if writes and layer in self._written:
            got = f"{layer}, which has this step's tokens"
            refuse(self._call, "layer", got, "every layer once in a step", UNWRITTEN)

    def _check_tokens(self, count: int) -> None:
        """Raise InputError unless the step adds so many tokens to every sequence."""
        for tokens in self._each:
            if tokens != count:
                got = "a token" if count == 1 else f"{count} tokens"
                got = f"{got} of each sequence in a step of {list(self._each)} tokens"
                allowed = "append() of them all; or a step of as many tokens per sequence"
                refuse(self._call, "k", got, allowed, UNWRITTEN)

    def _check_positions(self, turned: Turned | None) -> None:
        """Raise CacheOverflowError for tokens that a rotary embedding has no position for."""
        if turned is None or turned.starts is not None or self._longest is None:
            return
        if self._longest > turned.positions - turned.tokens:
            raise_no_positions(self._call, self._longest, turned.tokens, turned.positions)

    def check_complete(self) -> None:
        """Raise InputError if a layer has no tokens."""
        missing = sorted(set(range(self._pools.num_layers)) - self._written)
        if missing:
            allowed = "decode() with k and v, or append(), of every layer in the `with` block"
            after = "The lengths are as they were."
            refuse(self._call, "layers", f"no tokens for {missing}", allowed, after)


class Step(DecodeStep):
    """New tokens of every sequence, one or more, layer by layer. Ends with its `with` block.

    Args:
        call: In whose name errors are.
        pools: Keys and values of all layers.
        table: The sequences' pages and lengths.
        sequences: Their numbers.
        given: What they have.
        tokens: How many each of them gets.
        reach: As for `DecodeStep`.
    """

    def __init__(
        self,
        call: str,
        pools: Pools,
        table: Table,
        sequences: Sequence[int],
        given: Sequence[Held],
        tokens: Sequence[int],
        reach: int | None,
    ) -> None:
        longest = max(held.length for held in given)
        super().__init__(call, pools, table, tokens, reach, longest)
        self._given = dict(zip(sequences, given, strict=True))
        self._tokens = dict(zip(sequences, tokens, strict=True))

    @on_host
    def append(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Write the new tokens of all sequences, without attending: prompts, for instance.

        Args:
            layer: Which of the cache's, from 0.
            k: Keys, [tokens, num_kv_heads, head_dim], packed: those of the step's first sequence,
                then those of the second, and so on.
            v: As k.

        Raises:
            InputError: A tensor is not allowed, or the layer has its tokens already. Nothing was
                written.
            CacheAllocationError: There is no memory for temporaries. No length counts the tokens.
        """
        self._check(layer, writes=True)
        self._check_surroundings()
        count = sum(self._tokens.values())
        keys, values = [self._pools.k[layer]], [self._pools.v[layer]]
        (k,) = packed(self._call, "k", k, keys, count, values)
        (v,) = packed(self._call, "v", v, values, count, keys)
        write = partial(self._write, layer, k, v)
        with_memory(self._call, self._pools.device, write)
        self._written.add(layer)

    @on_host
    def gather(self, layer: int, sequence: int) -> tuple[Tensor, Tensor]:
        """Copies of the keys and values that a layer holds of a sequence of the step.

        Args:
            layer: Which of the cache's, from 0.
            sequence: Which of the step's.

        Returns:
            Keys, [tokens, num_kv_heads, head_dim], and values, with head_dim_v; with this step's
            tokens if the layer has them, and without the first ones that were freed before it.

        Raises:
            InputError: There is no such layer, or the step does not have the sequence.
        """
        return self._gather(self._pools.read, layer, sequence)

    @on_host
    def gather_scales(self, layer: int, sequence: int) -> tuple[Tensor, Tensor]:
        """Copies of the scales of the tokens that `gather` gives.

        Args:
            layer: Which of the cache's, from 0.
            sequence: Which of the step's.

        Returns:
            Of keys and of values, float32 [tokens, num_kv_heads].

        Raises:
            InputError: As for `gather`, or scales are not of tokens.
        """
        check_scaled(self._call, self._pools)
        return self._gather(self._pools.read_scales, layer, sequence)

    def _gather(
        self, read: Callable[..., tuple[Tensor, Tensor]], layer: int, sequence: int
    ) -> tuple[Tensor, Tensor]:
        self._check(layer, writes=False)
        self._check_surroundings()
        if type(sequence) is not int or sequence not in self._given:
            got, allowed = shown(sequence), f"those of the step, {list(self._given)}"
            refuse(self._call, "sequence", got, allowed)
        held = self._given[sequence]
        length = held.length + self._tokens[sequence] * (layer in self._written)
        return with_memory(self._call, self._pools.device, partial(read, layer, held, length))

    def _check_surroundings(self) -> None:
        if found := surroundings_flaw():
            refuse(self._call, "surroundings", *found, UNWRITTEN)

    def _write(self, layer: int, k: Tensor, v: Tensor) -> None:
        self._pools.write(layer, self._slots, k, v)

    @cached_property
    def _slots(self) -> Tensor:
        return self._pools.slots(list(self._given.values()), list(self._tokens.values()))
