"""What a paged cache can do to its sequences without new keys and values."""

from __future__ import annotations

from collections.abc import Sequence

from gqa_cutlass.api import check_overflow
from gqa_cutlass.cache.paged.host import on_host
from gqa_cutlass.cache.paged.inputs import counts
from gqa_cutlass.cache.paged.view import PagedView


class CountedPages(PagedView):
    """A cache's sequences, as its user may make and change them: who has which pages and tokens."""

    @on_host
    def allocate(self, tokens: int = 0) -> int:
        """Make a sequence without tokens.

        Args:
            tokens: Tokens that pages are taken for already, 0 and more.

        Returns:
            The sequence, by which the other methods know it.

        Raises:
            OutOfPagesError: There are too few. No sequence was made.
            InputError: No such number of tokens, or a step is open.
        """
        call = "PagedKVCache.allocate"
        self._storage.check_no_step(call)
        (count,) = counts(call, tokens, 1)
        return self._storage.sequences.new(call, count)

    @on_host
    def reserve(self, sequences: Sequence[int], tokens: int | Sequence[int]) -> None:
        """Take the pages for more tokens now; steps then find them.

        `truncate` gives back what is not used.

        Args:
            sequences: Each once.
            tokens: Tokens behind those that a sequence has: one int for all, or one for each.

        Raises:
            GqaError: As for `step`. Nothing was taken.
        """
        call = "PagedKVCache.reserve"
        given = self._storage.changing(call, sequences)
        self._storage.check_surroundings(call)
        self._storage.grow(call, given, counts(call, tokens, len(given)))
        for held in given:
            held.kept = len(held.pages)  # by accept()

    @on_host
    def free(self, sequences: int | Sequence[int]) -> None:
        """Forget one sequence or several; pages that nobody else holds are free.

        Args:
            sequences: One, or each once.

        Raises:
            InputError: There is no such sequence, one is named twice, a batch holds one, or a step
                is open. Nothing was freed.
        """
        call = "PagedKVCache.free"
        named = [sequences] if isinstance(sequences, int) else sequences
        self._storage.changing(call, named)
        self._storage.sequences.free(call, named)

    @on_host
    def fork(self, sequence: int, tokens: int | None = None) -> int:
        """Make a sequence that begins as another one does, in the same pages.

        Args:
            sequence: The other one.
            tokens: How many of its tokens to begin with; None: all.

        Returns:
            The new sequence.

        Raises:
            InputError: There is no such sequence, it has fewer tokens, or none of them any more, a
                batch holds it, or a step is open. No sequence was made.
        """
        call = "PagedKVCache.fork"
        self._storage.changing(call, [sequence])
        return self._storage.sequences.fork(call, sequence, tokens)

    @on_host
    def truncate(self, sequence: int, tokens: int) -> None:
        """Keep the first tokens of a sequence, and no page but theirs.

        Args:
            sequence: Which.
            tokens: How many to keep, 0 and more; all of them, where it has no more.

        Raises:
            InputError: There is no such sequence, or no such number of tokens, or all of so many
                were freed, a batch holds the sequence, or a step is open. Nothing was changed.
        """
        call = "PagedKVCache.truncate"
        self._storage.changing(call, [sequence])
        self._storage.sequences.truncate(call, sequence, tokens)

    @on_host
    def accept(self, sequences: Sequence[int], tokens: int | Sequence[int]) -> None:
        """Keep the first tokens of those that the last step decoded, if they were several.

        Pages that were taken for the others are free, and so are, by now, those before the window.
        It comes before any other call that changes the sequence; where it does not come, all stay.

        Args:
            sequences: Each once.
            tokens: How many of its new tokens each keeps: one int for all, or one for each.

        Raises:
            InputError: There is no such sequence, one is named twice, has got no several tokens by
                its last step, or not so many, or had them accepted before; a batch holds it, or a
                step is open. Nothing was changed.
        """
        call = "PagedKVCache.accept"
        given = self._storage.changing(call, sequences)
        kept = self._storage.sequences
        kept.keep(given, kept.accepted(call, given, counts(call, tokens, len(given))))

    @on_host
    def reorder(self, sequences: Sequence[int], indices: Sequence[int]) -> None:
        """Let sequences[i] have the tokens that sequences[indices[i]] had: beam search.

        Copies nothing and takes no page: they share them.

        Args:
            sequences: Each once.
            indices: One for each, of which any may be repeated; -1: no tokens.

        Raises:
            InputError: There is no such sequence, one is named twice, an index is out of range, a
                batch holds a sequence, or a step is open. Nothing was changed.
        """
        call = "PagedKVCache.reorder"
        self._storage.changing(call, sequences)
        self._storage.sequences.reorder(call, sequences, indices)

    @on_host
    def check(self) -> None:
        """Wait for the device, and report what kernels found there, as `check_overflow` does.

        Raises:
            CacheOverflowError: A length or a page on the device was not allowed.
        """
        check_overflow(self.device)
