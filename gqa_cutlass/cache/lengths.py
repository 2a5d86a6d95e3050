"""How many tokens each sequence of a cache holds: counted on the device, followed on the host.

The device has the truth: kernels read it there, and CUDA graphs advance it unseen. The host follows
what it can compute itself, without ever waiting, and so knows the lengths exactly, or only a bound.
What moves data asks for `settled` and `reach`, which claim nothing about lengths that a graph may
have advanced since.

A call may end anywhere: memory runs out, a kernel faults, somebody interrupts it. So whatever it
allocates it allocates first, and while the device's lengths change the host knows nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeGuard

import torch
from torch import Tensor

from gqa_cutlass.cache.growth import Drafts, Growth, Turned
from gqa_cutlass.cache.inputs import ints, per_sequence, refuse
from gqa_cutlass.cache.overflow import raise_no_positions, raise_overflow
from gqa_cutlass.codegen.schema.problem import MAX_TOKENS
from gqa_cutlass.devices import capturing
from gqa_cutlass.errors import InputError, shown
from gqa_cutlass.tensors import is_tensor
from gqa_cutlass.tracing import mark_static


class Lengths:
    """The lengths of a batch of sequences, each from 0 to `limit`.

    Args:
        state: Int32 [3, batch_size] on a GPU or the CPU, zeros: all sequences are empty at first.
        limit: Tokens that a sequence can hold.

    Attributes:
        owner: In whose name errors are.
    """

    owner = "KVCache"

    def __init__(self, state: Tensor, limit: int) -> None:
        # The second is sticky, 1 for no room; the third are the lengths before drafts.
        self.seqlens, self._overflowed, self._before = state.unbind()
        mark_static(self.seqlens, self._before)
        self.batch_size = len(self.seqlens)
        self.limit = limit
        self._known: list[int] | None = [0] * self.batch_size
        self._bound = 0
        self._captured = False  # a graph changes the lengths, whenever it is replayed
        self._drafts: Drafts | None = None
        self._unseen_drafts = False  # graphs or compiled code append some, whenever they run
        self._foreign = False  # somebody else wrote them: some may be negative, of inactive rows

    @property
    def device(self) -> torch.device:
        """Where they are: of a copy that `torch.load` was told a place for, another one."""
        return self.seqlens.device

    @property
    def known(self) -> list[int] | None:
        """The lengths, if the host knows them exactly; later replays of graphs not counted."""
        return None if self._known is None else list(self._known)

    @property
    def bound(self) -> int:
        """What no length exceeds; later replays of graphs not counted."""
        return self._bound

    @property
    def settled(self) -> list[int] | None:
        """The lengths, if no graph can have advanced them."""
        return None if self._captured or capturing(self.device) else self._known

    @property
    def reach(self) -> int:
        """What no length exceeds, whatever graphs have been replayed."""
        return self.limit if self._captured or capturing(self.device) else self._bound

    def growth(self, tokens: int, lengths: Sequence[int] | Tensor | None) -> Growth:
        """What `prefill` adds: all of the tokens given, or some of each sequence's.

        Raises:
            InputError: The lengths are not allowed; their values are unknown if on the device.
        """
        if lengths is None:
            return Growth.of(tokens)
        if is_tensor(lengths):
            counts = per_sequence("prefill", "lengths", lengths, self.seqlens, torch.int32)
            return Growth(most=tokens, host=None, device=counts)
        host = ints("prefill", "lengths", lengths, 0, tokens, self.batch_size)
        same = len(set(host)) == 1
        device = host[0] if same else self.upload("prefill", host, torch.int32)
        return Growth(most=max(host), host=host, device=device)

    def check_room(self, method: str, growth: Growth) -> None:
        """Refuse what is certain not to fit; during a capture, whatever the lengths at replays.

        Raises:
            CacheOverflowError: A sequence is too long.
        """
        host = growth.host
        if host is None or self._bound + growth.most <= self.limit:
            return
        exact = self._known is not None and not capturing(self.device)
        if not exact and growth.most <= self.limit:
            return
        held = self._known if exact and self._known else [0] * self.batch_size
        pairs = enumerate(zip(held, self._each(host), strict=True))
        over = [(b, n, count) for b, (n, count) in pairs if n + count > self.limit]
        if over:
            raise_overflow(f"{self.owner}.{method}", over, exact, self.limit)

    def check_room_of(self, method: str, rows: list[int], tokens: int) -> None:
        """Refuse so many more tokens for rows that are certain to have no room.

        Raises:
            CacheOverflowError: One has none.
        """
        known = (None if capturing(self.device) else self._known) or []
        over = [(b, known[b], tokens) for b in rows if known and known[b] + tokens > self.limit]
        if over:
            raise_overflow(f"{self.owner}.{method}", over, True, self.limit)

    def check_positions(self, turned: Turned, rows: list[int] | None = None) -> None:
        """Refuse tokens that are certain to have no position in the tables of a rotary embedding.

        Raises:
            CacheOverflowError: There are some.
        """
        known = None if capturing(self.device) else self._known
        if known is None or turned.starts is not None:
            return
        longest = max(known if rows is None else [known[b] for b in rows], default=0)
        if longest > turned.positions - turned.tokens:
            raise_no_positions("KVCache.decode", longest, turned.tokens, turned.positions)

    def room(self, growth: Growth, turned: Turned | None = None) -> Tensor | None:
        """Where the tokens fit, bool [batch]; None where the checks before saw that all do."""
        if growth.host is not None and (turned is None or turned.starts is None):
            most = self.limit - growth.most
            if turned is not None:
                most = min(most, turned.positions - turned.tokens)
            certain = self._bound <= most or self._known is not None
            theirs = self._captured or self._foreign or capturing(self.device)
            if certain and not theirs:
                return None
        tokens = growth.device
        fits = self.fits(tokens, self.seqlens, turned)
        if isinstance(tokens, Tensor):
            fits &= (tokens >= 0) & (tokens <= growth.most)
        return fits

    def fits(self, tokens: int | Tensor, lengths: Tensor, turned: Turned | None = None) -> Tensor:
        """Where so many more tokens fit behind these lengths."""
        fits = (lengths >= 0) & (lengths <= self.limit - tokens)
        return fits if turned is None else fits & turned.has(lengths)

    def advance(
        self, growth: Growth, room: Tensor | None, *, drafts: bool = False, sure: bool = True
    ) -> None:
        """Add the tokens, where there is room for them.

        Args:
            growth: How many.
            room: What `room` said.
            drafts: Whether some may be taken back.
            sure: Whether the host, where it knows the lengths, knows that all fit.
        """
        added = growth.device if room is None else room * growth.device
        known = None
        if self._known is not None and growth.host is not None and sure:
            known = [n + c for n, c in zip(self._known, self._each(growth.host), strict=True)]
        self._grow(partial(self.seqlens.add_, added), known, growth.most, drafts)

    def advance_to(self, lengths: Tensor, rows: list[int] | None, tokens: int) -> None:
        """Take lengths that are so many tokens more in some rows, drafts if they are several.

        Args:
            lengths: All of them, on the device.
            rows: Which, if the host knows, and none that had no room.
            tokens: How many.
        """
        known = None
        if self._known is not None and rows is not None:
            known = [n + tokens * (b in rows) for b, n in enumerate(self._known)]
        self._grow(partial(self.seqlens.copy_, lengths), known, tokens, tokens > 1)

    def advance_unseen(
        self, tokens: int, turned: Turned | None = None, lengths: Tensor | None = None
    ) -> None:
        """Add tokens, where there is room, in code that torch traces; the host cannot follow.

        The graph that comes of it adds; the host forgets with every call of the compiled code.

        Args:
            tokens: How many; drafts if they are several.
            turned: What must have positions.
            lengths: What all lengths are then, if not all get them.
        """
        if tokens > 1:
            self._before.copy_(self.seqlens)
            self._unseen_drafts = True
        if lengths is None:
            self.seqlens.add_(self.fits(tokens, self.seqlens, turned) * tokens)
        else:
            self.seqlens.copy_(lengths)
        self.forget()

    def accept(self, lengths: int | Sequence[int] | Tensor) -> None:
        """Keep so many of the tokens of the last decode of several.

        Raises:
            InputError: The lengths are not allowed, or there are no such tokens.
        """
        drafts = self._drafts
        if drafts is None and not self._unseen_drafts:
            got = "no decode of several tokens whose drafts are still to be accepted"
            allowed = "one accept() after each, before any other call that changes lengths"
            refuse("accept", "call", got, allowed)
        most = drafts.tokens if drafts and not self._unseen_drafts else MAX_TOKENS
        known, bound = None, self._bound
        if is_tensor(lengths):
            counts = per_sequence("accept", "lengths", lengths, self.seqlens, torch.int32)
            after = self._accepted(counts)
        else:
            host, device = self._counts("accept", lengths, most)
            after = self._accepted(device)
            if drafts and not self._unseen_drafts:
                bound = min(bound, drafts.bound + max(host))
                if self._known is not None and drafts.known is not None:
                    sums = [n + c for n, c in zip(drafts.known, host, strict=True)]
                    known = list(map(min, self._known, sums))
        self._change(partial(self.seqlens.copy_, after), known, bound)
        self._before.copy_(after)  # so that a second call, unseen, takes nothing back

    def may_trace(self, lengths: object) -> TypeGuard[int | Tensor]:
        """Whether `accept_unseen` can take this; what it cannot the host refuses."""
        if isinstance(lengths, Tensor):
            where = lengths.dtype, lengths.device, lengths.shape
            return where == (torch.int32, self.device, self.seqlens.shape)
        return type(lengths) is int and 0 <= lengths <= MAX_TOKENS

    def accept_unseen(self, lengths: int | Tensor) -> None:
        """`accept` in code that torch traces, where the device alone knows what is there."""
        after = self._accepted(lengths)
        self.seqlens.copy_(after)
        self._before.copy_(after)
        self._drafts = None
        self.forget()

    def note_overflow(self, room: Tensor) -> None:
        """Remember, until `drop_overflow`, which sequences had no room; inactive ones need none."""
        self._overflowed.logical_or_(~room & (self.seqlens >= 0))

    def overflowed(self, method: str) -> list[int]:
        """Wait for the sequences that `note_overflow` has noted."""
        self._check_may_wait(method)
        return [b for b, flag in enumerate(self._overflowed.tolist()) if flag]

    def drop_overflow(self) -> None:
        """Forget what `note_overflow` has noted."""
        self._overflowed.zero_()

    def truncate(self, lengths: int | Sequence[int] | Tensor) -> None:
        """Keep at most so many tokens.

        Raises:
            InputError: The lengths are not allowed.
        """
        most: int | Tensor
        if is_tensor(lengths):
            given = per_sequence("truncate", "lengths", lengths, self.seqlens, torch.int32)
            most, known, bound = given.clamp(min=0), None, self._bound
        else:
            counts, most = self._counts("truncate", lengths, self.limit)
            known = None if self._known is None else list(map(min, self._known, counts))
            bound = min(self._bound, max(counts))
        self._change(partial(self.seqlens.clamp_, max=most), known, bound)

    def order(self, indices: Tensor) -> Tensor:
        """Indices on the device as int64, -1 for all that name no row.

        Raises:
            InputError: Of another type or shape, or elsewhere.
        """
        types = torch.int32, torch.int64
        order = per_sequence("reorder", "indices", indices, self.seqlens, *types).long()
        return order.masked_fill((order < 0) | (order >= self.batch_size), -1)

    def moves(self, host: list[int]) -> tuple[list[int], list[int]]:
        """Rows to move something from, and those that it goes to."""
        settled = self.settled
        targets = [
            target
            for target, source in enumerate(host)
            if source not in (target, -1) and (settled is None or settled[source])
        ]
        return [host[target] for target in targets], targets

    @contextmanager
    def reordering(self, order: Tensor, host: list[int] | None, leads: bool) -> Iterator[None]:
        """Let every row take the length of another, when the caller has moved what it holds.

        Meanwhile the rows that change are empty: where the caller fails, every sequence is as it
        was, or empty.

        Args:
            order: Int64 [batch] on the device, the rows to take from, and -1 for empty.
            host: The same, or None when only the device knows.
            leads: Whether the lengths go with the rows, or stay, for other caches to follow.
        """
        known, bound = self._known, self._bound
        kept = after = None
        if known is not None and host is not None:
            kept = [known[b] if row == b else 0 for b, row in enumerate(host)]
            after = [known[row] if row >= 0 else 0 for row in host]
        if leads:
            lengths = self.seqlens.index_select(0, order.clamp(min=0))
            lengths.masked_fill_(order < 0, 0)
        else:
            lengths, after = self.seqlens.clone(), known
        changes = order != torch.arange(self.batch_size, device=self.device)
        self._change(partial(self.seqlens.masked_fill_, changes, 0), kept, bound)
        yield
        self._change(partial(self.seqlens.copy_, lengths), after, bound)

    def reset(self, sequences: Sequence[int] | None) -> None:
        """Empty all sequences, or some.

        Raises:
            InputError: A sequence that there is not.
        """
        emptied = set(range(self.batch_size))
        if sequences is not None:
            emptied = set(ints("reset", "sequences", sequences, 0, self.batch_size - 1))
        if len(emptied) == self.batch_size:
            self._foreign = False
            self._change(self.seqlens.zero_, [0] * self.batch_size, 0)
        elif emptied:
            rows = self.upload("reset", sorted(emptied), torch.int64)
            known = self._known
            if known is not None:
                known = [0 if b in emptied else n for b, n in enumerate(known)]
            self._change(partial(self.seqlens.index_fill_, 0, rows, 0), known, self._bound)

    def refresh(self) -> list[int]:
        """Wait for the lengths, and know them.

        Raises:
            InputError: Somebody wrote lengths that no cache of this size has.
        """
        self._check_may_wait("refresh")
        self.forget()
        lengths: list[int] = self.seqlens.tolist()
        for b, length in enumerate(lengths):
            if length > self.limit:
                raise InputError(
                    f"KVCache.refresh: seqlens[{b}]: got {length}; allowed: up to {self.limit}. "
                    "It was not this cache that wrote it. Write a right one, or reset()."
                )
        self._foreign = min(lengths) < 0
        if not self._foreign:
            self._know(lengths, self.limit)
        return list(lengths)

    def disown(self) -> None:
        """Know no more than that somebody else has written the lengths."""
        self._foreign = True
        self._drafts = None
        self.forget()

    def forget(self) -> None:
        """Know no more than that no length exceeds the limit."""
        self._known = None  # first, so that both are true in between
        self._bound = self.limit

    def upload(self, method: str, values: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Values on the device, without waiting for it.

        Raises:
            InputError: During a capture, whose replays could not repeat the copy.
        """
        if capturing(self.device):
            allowed = "tensors on the device, or one int; or make the call before the capture"
            refuse(method, "in a CUDA-graph capture", "a sequence of ints", allowed)
        # Pinned: from other memory the driver may wait until it has a buffer of its own to copy to.
        pinned = self.device.type == "cuda" and len(values) > 0
        host = torch.tensor(values, dtype=dtype, device="cpu", pin_memory=pinned)
        return host.to(self.device, non_blocking=True)

    def _accepted(self, lengths: int | Tensor) -> Tensor:
        """All lengths, if so many of the drafts stay: those before, where nothing was added."""
        added = self.seqlens - self._before
        if isinstance(lengths, Tensor):
            return self._before + torch.minimum(added, lengths.clamp(min=0))
        return self._before + added.clamp(max=lengths)

    def _counts(self, method: str, lengths: Any, most: int) -> tuple[list[int], int | Tensor]:
        """Numbers from 0 to `most`, on the host and for the device; one int stands for all."""
        if isinstance(lengths, int):
            if type(lengths) is not int or not 0 <= lengths <= most:
                refuse(method, "lengths", shown(lengths), f"an int from 0 to {most}")
            return [lengths] * self.batch_size, lengths
        host = ints(method, "lengths", lengths, 0, most, self.batch_size)
        return host, self.upload(method, host, torch.int32)

    def _each(self, counts: int | list[int]) -> list[int]:
        return [counts] * self.batch_size if isinstance(counts, int) else counts

    def _grow(
        self, change: Callable[[], object], known: list[int] | None, most: int, drafts: bool
    ) -> None:
        """`_change` to lengths that are up to `most` more, of which drafts may be taken back."""
        bound, begun = self._bound + most, None
        if drafts:
            begun = Drafts(tokens=most, known=self._known, bound=self._bound)
            self._drafts = None  # first, for what it says of the device is about to be untrue
            self._before.copy_(self.seqlens)
            self._unseen_drafts |= capturing(self.device)
        self._change(change, known, bound)
        self._drafts = begun

    def _change(self, change: Callable[[], object], known: list[int] | None, bound: int) -> None:
        """Change the device's lengths, and then know them; in between, and if it fails, nothing.

        Args:
            change: One operation in place, which allocates nothing.
            known: The lengths after it, if the host knows them.
            bound: What none of them exceeds then.
        """
        captured = capturing(self.device)
        self._captured |= captured
        self._drafts = None
        self.forget()
        change()
        if not captured:  # or else it only happens at replays
            self._know(known, bound)

    def _know(self, known: list[int] | None, bound: int) -> None:
        self._bound = min(bound, self.limit) if known is None else max(known)
        self._known = known if self._bound else [0] * self.batch_size

    def _check_may_wait(self, method: str) -> None:
        if capturing(self.device):
            allowed = "calls that do not; make it after the capture, and after every replay"
            refuse(method, "in a CUDA-graph capture", "a call that waits for the GPU", allowed)
