"""What a cache can do to its lengths alone: take tokens back, and learn what the device knows."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from gqa_cutlass.api import check_overflow
from gqa_cutlass.cache.guard import guarded
from gqa_cutlass.cache.overflow import overflow_message
from gqa_cutlass.cache.view import CacheView
from gqa_cutlass.errors import CacheOverflowError
from gqa_cutlass.tracing import break_graph, is_traced


class CountedCache(CacheView):
    """A cache's lengths, as its user may change them; what it holds stays where it is."""

    def accept(self, lengths: int | Sequence[int] | Tensor) -> None:
        """Keep the first tokens of those that the last `decode` of several appended.

        For speculative decoding: decode the drafts, see which of them hold, and keep so many. It
        concerns all layers at once, like `truncate`, and comes once after each such `decode` (of
        the last layer), before any other call that changes lengths.

        CUDA graphs and compiled code may hold it, with or without the `decode`. The host, which
        does not see them run, then no longer refuses a second call; the device takes nothing back
        at that.

        Args:
            lengths: How many of its new tokens each sequence keeps: one int for all, ints, or int32
                [batch] on the device, which the host never reads; there a negative number counts as
                0, and one larger than the tokens as all. A sequence that got none, because it had
                no room or was not among the `rows`, stays as it is.

        Raises:
            InputError: Not of these types, or out of 0 to the number of tokens; or there was no
                such `decode`, or its tokens were accepted before. Nothing was changed.
            CacheAllocationError: There is no memory for temporaries. Nothing was changed.
        """
        if not is_traced():
            self._accept(lengths)
        elif self._lengths.may_trace(lengths):
            self._lengths.accept_unseen(lengths)
        else:
            why = "KVCache.accept: lengths: one int, or int32 [batch] on the device"
            break_graph(self._accept, why)(lengths)

    @guarded
    def truncate(self, lengths: int | Sequence[int] | Tensor) -> None:
        """Keep at most so many tokens of every sequence: take speculation back.

        Args:
            lengths: One int for all, ints, or int32 [batch] on the device, which the host never
                reads; there a negative number counts as 0.

        Raises:
            InputError: Not of these types, or out of 0 to max_seq_len; or, with a window, tokens of
                what would be left are gone, or may be. Nothing was changed.
            CacheAllocationError: There is no memory for temporaries. Nothing was changed.
        """
        self._lengths.truncate(lengths)

    @guarded
    def reset(self, sequences: Sequence[int] | None = None) -> None:
        """Empty all sequences, or some.

        Raises:
            InputError: Not a sequence of ints from 0 to batch_size - 1. Nothing was changed.
            CacheAllocationError: There is no memory for temporaries. Nothing was changed.
        """
        self._lengths.reset(sequences)

    @guarded
    def refresh(self) -> list[int]:
        """Wait for the device's lengths, and know them exactly, unless some are negative.

        Raises:
            InputError: `seqlens` has what no cache of this size holds, written by somebody else; or
                a CUDA graph is being captured.
        """
        return self._lengths.refresh()

    def forget(self) -> None:
        """Know no lengths any more, without waiting: somebody else has written `seqlens`.

        Negative ones are of inactive rows: nothing is appended to them, and `decode` gives zeros,
        until they get another length.
        """
        self._lengths.disown()

    @guarded
    def check(self) -> None:
        """Wait for the device, and report what did not fit since the last report.

        `decode` keeps its findings per GPU, so those of other caches are reported as well.

        Raises:
            CacheOverflowError: There was a sequence without room; its rows and its length are as
                they were.
            InputError: A CUDA graph is being captured.
        """
        found = self._lengths.overflowed("check")
        messages = []
        if found:
            messages.append(overflow_message(found, self.max_seq_len))
        try:
            check_overflow(self.device)
        except CacheOverflowError as error:
            messages.append(str(error))
        if found:  # not before: had the other check failed, nobody would have been told
            self._lengths.drop_overflow()
        if messages:
            raise CacheOverflowError(" ".join(messages))

    @guarded
    def _accept(self, lengths: int | Sequence[int] | Tensor) -> None:
        self._lengths.accept(lengths)
