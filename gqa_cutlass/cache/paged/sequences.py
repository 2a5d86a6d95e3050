"""Which pages hold the tokens of each sequence, and how many tokens that are. Host only.

A sequence's token t is row t modulo page_size of its page number t // page_size. Pages may be held
by several sequences, which then have these tokens in common; whoever writes into one of those takes
a page of its own first, with a copy of what it holds. That is only ever the last page, if tokens
fill a part of it: full pages are never written to, and pages behind the tokens have one holder.

Where nobody looks further back than a window, pages wholly before it are given back when a step is
over. NONE has their place, so that a token's page has the same number for good.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NoReturn

from gqa_cutlass.cache.paged.page_allocator import PageAllocator
from gqa_cutlass.codegen.schema.problem import MAX_SEQ_LEN
from gqa_cutlass.codegen.schema.rounding import ceil_div
from gqa_cutlass.errors import InputError, shown

NOTHING = "Nothing was changed."
NONE = -1  # in place of a page: there is none


class Held:
    """What a sequence has: its pages in the order of its tokens, some perhaps ahead of them.

    The first `gone` of them it has no more. The tokens behind the first `before` are drafts, if
    that is not None, and pages behind the first `kept` were taken for them.
    """

    __slots__ = ("before", "gone", "kept", "length", "pages")

    def __init__(self, pages: Iterable[int] = (), length: int = 0, gone: int = 0) -> None:
        self.pages = array("i", pages)  # a row of a block table as it is
        self.length = length
        self.gone = gone
        self.before: int | None = None
        self.kept = 0


@dataclass(frozen=True, kw_only=True)
class Growth:
    """Pages that were taken for one sequence, and are not yet its own.

    Args:
        held: The sequence.
        copied: Its last page, to be copied and given up because others hold it; None for none.
        left_out: Pages behind what it has that it does not need.
        taken: The copy, if there is one, and then the pages behind what it has.
    """

    held: Held
    copied: int | None
    left_out: int
    taken: tuple[int, ...]


class Sequences:
    """Sequences by their numbers, which are given out once and never again.

    Every method does all or nothing. An interrupt within one may lose pages for good, but gives
    none of them to two: what gives pages up forgets them first.

    Args:
        pages: The pool's pages, all of them free.
        page_size: Tokens of a page.
        window: Newest tokens of a sequence that keep their pages; None: all.
        first: The first number.
    """

    def __init__(
        self, pages: PageAllocator, page_size: int, window: int | None = None, first: int = 0
    ) -> None:
        self.pages = pages
        self.page_size = page_size
        self.window = window
        self._held: dict[int, Held] = {}
        self._first = self._next = first

    def __iter__(self) -> Iterator[int]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)

    def get(self, call: str, sequence: int) -> Held:
        """What a sequence has.

        Raises:
            InputError: There is no such sequence, or no longer.
        """
        held = self._held.get(sequence) if type(sequence) is int else None
        if held is None:
            was = type(sequence) is int and self._first <= sequence < self._next
            got = f"{shown(sequence)}, which was freed" if was else shown(sequence)
            allowed = "what allocate() or fork() of this cache returned, until it is freed"
            refuse(call, "sequence", got, allowed)
        return held

    def each(self, call: str, sequences: Sequence[int]) -> list[Held]:
        """What each of several sequences has.

        Raises:
            InputError: There is no such sequence, or one is named twice.
        """
        if not isinstance(sequences, Sequence) or isinstance(sequences, (str, bytes)):
            got = f"a {type(sequences).__name__}"
            refuse(call, "sequences", got, "a sequence of what allocate() or fork() returned")
        given = list(sequences)
        found = [self.get(call, sequence) for sequence in given]
        if len(set(given)) != len(given):
            twice = next(s for s, count in Counter(given).items() if count > 1)
            refuse(call, "sequences", f"{twice} more than once", "each sequence once")
        return found

    def new(self, call: str, ahead: int) -> int:
        """A sequence without tokens, and with the pages for so many.

        Raises:
            OutOfPagesError: There are too few.
            InputError: No sequence may be so long.
        """
        held = Held()
        self.give(self.take(call, [held], [ahead]))
        return self._add(held)

    def free(self, call: str, sequences: Sequence[int]) -> None:
        """Give the pages of sequences back, and forget them.

        Raises:
            InputError: There is no such sequence, or one is named twice.
        """
        for sequence, held in zip(list(sequences), self.each(call, sequences), strict=True):
            del self._held[sequence]
            self.pages.release(held.pages[held.gone :])

    def fork(self, call: str, sequence: int, tokens: int | None) -> int:
        """A sequence that has the first tokens of another, in the same pages.

        Raises:
            InputError: There is no such sequence, or it has fewer tokens, or none of them any more.
        """
        held = self.get(call, sequence)
        if tokens is None:
            tokens = held.length
        self._check_tokens(call, tokens, held.length)
        self._check_there(call, held, tokens)
        return self._add(self._shared(held, tokens))

    def truncate(self, call: str, sequence: int, tokens: int) -> None:
        """Keep at most so many tokens of a sequence, and only the pages for them.

        Raises:
            InputError: There is no such sequence, or no such number of tokens, or none of so many
                is there any more.
        """
        held = self.get(call, sequence)
        self._check_tokens(call, tokens, MAX_SEQ_LEN)
        self._check_there(call, held, tokens)
        held.before = None
        held.length = min(tokens, held.length)
        self.cut(held, self.pages_of(held.length))
        self._leave(held, held.length)

    def reorder(self, call: str, sequences: Sequence[int], indices: Sequence[int]) -> None:
        """Let sequence i of the list have what sequence indices[i] of it had; -1: nothing.

        Raises:
            InputError: There is no such sequence, or one is named twice, or no such index.
        """
        given = self.each(call, sequences)
        order = self._indices(call, indices, len(given))
        changed = [i for i, source in enumerate(order) if source != i]
        after = []
        for i in changed:
            held = given[order[i]] if order[i] >= 0 else Held()
            after.append(self._shared(held, held.length))
        for i, new in zip(changed, after, strict=True):
            held = given[i]
            before, held.length = held.pages[held.gone :], 0
            held.before = None
            held.pages = array("i")  # an interrupt finds none that go with another `gone`
            held.gone = new.gone
            held.pages, held.length = new.pages, new.length
            self.pages.release(before)

    def take(
        self,
        call: str,
        given: Sequence[Held],
        tokens: Sequence[int],
        skipped: Sequence[int] | None = None,
    ) -> list[Growth]:
        """Take the pages for so many more tokens of each; `give` or `give_back` follows.

        Args:
            call: In whose name errors are.
            given: The sequences.
            tokens: How many each of them gets.
            skipped: How many of them, as `skipped` says, no page need hold; None: none.

        Raises:
            OutOfPagesError: There are too few.
            InputError: A sequence would be longer than any may be.
        """
        skipped = skipped or [0] * len(given)
        wanted = self._wanted(call, given, tokens, skipped)
        taken = iter(self.pages.allocate(sum(n for _, n in wanted), call))
        return [
            Growth(
                held=held,
                copied=held.pages[held.length // self.page_size] if copies else None,
                left_out=self._left_out(held, skip),
                taken=tuple(islice(taken, count)),
            )
            for held, skip, (copies, count) in zip(given, skipped, wanted, strict=True)
            if count
        ]

    def give(self, growth: Sequence[Growth]) -> None:
        """Let sequences have what was taken for them."""
        for grown in growth:
            held, behind = grown.held, list(grown.taken)
            if grown.copied is not None:
                held.pages[held.length // self.page_size] = behind.pop(0)
                self.pages.release([grown.copied])
            held.pages.extend([NONE] * grown.left_out + behind)

    def give_back(self, growth: Sequence[Growth]) -> None:
        """Free what was taken, and not given."""
        for grown in growth:
            self.pages.release(grown.taken)

    def cut(self, held: Held, num_pages: int) -> None:
        """Give back the pages of a sequence behind so many."""
        behind = held.pages[num_pages:]
        del held.pages[num_pages:]
        held.gone = min(held.gone, num_pages)
        self._release(behind)

    def count(self, held: Held, tokens: int, kept: int | None = None) -> None:
        """Let a sequence have so many more tokens, and give back its pages before the window.

        Args:
            held: The sequence.
            tokens: How many.
            kept: Pages that it had before, if `keep` may take tokens back; then the window stays
                where it was. None: the tokens are there for good.
        """
        before = held.length
        held.before = None  # first: an interrupt finds no drafts
        held.length += tokens
        if kept is None:
            self._leave(held, held.length)
        else:
            self._leave(held, before)
            held.kept, held.before = kept, before

    def count_all(
        self, given: Sequence[Held], tokens: Sequence[int], kept: Sequence[int] | None = None
    ) -> None:
        """As `count`, of several sequences: an interrupt finds all of them counted, or none."""
        ends = [held.length + more for held, more in zip(given, tokens, strict=True)]
        try:
            for i, (held, more) in enumerate(zip(given, tokens, strict=True)):
                if more:
                    self.count(held, more, kept[i] if kept is not None else None)
        except BaseException:
            for held, end in zip(given, ends, strict=True):
                held.length = end
            raise

    def accepted(self, call: str, given: Sequence[Held], tokens: Sequence[int]) -> list[int]:
        """What sequences hold, if they keep so many of their drafts; `keep` follows.

        Raises:
            InputError: One has no drafts, or not so many.
        """
        after = []
        for held, count in zip(given, tokens, strict=True):
            if held.before is None:
                got = "a sequence without drafts to accept"
                allowed = "one accept() after each decode of several tokens, before other calls"
                refuse(call, "sequence", got, allowed)
            self._check_tokens(call, count, held.length - held.before)
            after.append(held.before + count)
        return after

    def keep(self, given: Sequence[Held], lengths: Sequence[int]) -> None:
        """Take drafts back that are behind these lengths, and give back the pages for them."""
        for held, length in zip(given, lengths, strict=True):
            held.before, held.length = None, length
            self.cut(held, max(held.kept, self.pages_of(length)))
            self._leave(held, length)

    def skipped(self, held: Held, tokens: int) -> int:
        """Of so many new tokens the first ones, whose pages would go as soon as all of them count.

        Then the pages before them go, too.
        """
        if self.window is None:
            return 0
        gone = (held.length + tokens - self.window) // self.page_size
        return max(0, gone * self.page_size - held.length)

    def freed(self, held: Held) -> int:
        """A sequence's first tokens whose pages were given back."""
        return held.gone * self.page_size

    def reach(self, given: Sequence[Held]) -> int | None:
        """The widest window in which all these sequences have their tokens; None: any."""
        found = [held.length - self.freed(held) for held in given if held.gone]
        return self.window if self.window is None else min([self.window, *found])

    def needed(self, call: str, given: Sequence[Held], tokens: Sequence[int]) -> int:
        """Free pages that so many more tokens of each would take.

        Raises:
            InputError: A sequence would be longer than any may be.
        """
        return sum(count for _, count in self._wanted(call, given, tokens, [0] * len(given)))

    def pages_of(self, tokens: int) -> int:
        """Pages that so many tokens take."""
        return ceil_div(tokens, self.page_size)

    def _wanted(
        self, call: str, given: Sequence[Held], tokens: Sequence[int], skipped: Sequence[int]
    ) -> list[tuple[bool, int]]:
        """Whether each sequence's last page is to be copied, and pages to take, that included."""
        given_up: Counter[int] = Counter()
        wanted = []
        for held, count, skip in zip(given, tokens, skipped, strict=True):
            if held.length + count > MAX_SEQ_LEN:
                got = f"{held.length} tokens and {shown(count)} more"
                refuse(call, "sequence", got, f"up to {MAX_SEQ_LEN} tokens")
            copies = False
            page, filled = divmod(held.length, self.page_size)
            if count and filled and not skip:
                last = held.pages[page]
                copies = self.pages.holders(last) - given_up[last] > 1
                given_up[last] += copies
            there = len(held.pages) + self._left_out(held, skip)
            behind = max(0, self.pages_of(held.length + count) - there)
            wanted.append((copies, copies + behind))
        return wanted

    def _add(self, held: Held) -> int:
        sequence = self._next
        self._next += 1
        self._held[sequence] = held
        return sequence

    def _left_out(self, held: Held, skipped: int) -> int:
        """Pages behind what a sequence has that only tokens would need that are skipped."""
        first = (held.length + skipped) // self.page_size if skipped else 0
        return max(0, first - len(held.pages))

    def _leave(self, held: Held, length: int) -> None:
        """Give back the pages of a sequence before the window that it has with so many tokens."""
        gone = max(held.gone, self._before_window(length))
        before = held.pages[held.gone : gone]
        for i in range(held.gone, gone):
            held.pages[i] = NONE
        held.gone = gone
        self._release(before)

    def _before_window(self, length: int) -> int:
        """Pages wholly before the window of so many tokens."""
        return 0 if self.window is None else max(0, (length - self.window) // self.page_size)

    def _release(self, pages: Sequence[int]) -> None:
        self.pages.release([page for page in pages if page != NONE])

    def _shared(self, held: Held, tokens: int) -> Held:
        """The first tokens of a sequence, in the same pages."""
        num_pages = self.pages_of(tokens)
        gone = min(max(held.gone, self._before_window(tokens)), num_pages)
        self.pages.share(held.pages[gone:num_pages])
        return Held([NONE] * gone + list(held.pages[gone:num_pages]), tokens, gone)

    def _check_there(self, call: str, held: Held, tokens: int) -> None:
        freed = self.freed(held)
        if 0 < tokens <= freed:
            got = f"{tokens} of a sequence whose first {freed} were freed, before the window"
            refuse(call, "tokens", got, f"0, or more than {freed}")

    def _check_tokens(self, call: str, tokens: int, most: int) -> None:
        if type(tokens) is not int or not 0 <= tokens <= most:
            refuse(call, "tokens", shown(tokens), f"an int from 0 to {most}")

    def _indices(self, call: str, indices: Sequence[int], count: int) -> list[int]:
        given = list(indices) if isinstance(indices, Sequence) else [indices]
        for index in given:
            if type(index) is not int or not -1 <= index < count:
                refuse(call, "indices", shown(index), f"ints from -1 to {count - 1}")
        if len(given) != count:
            refuse(call, "indices", f"{len(given)} ints", f"{count}, one per sequence")
        return given


def refuse(call: str, what: str, got: str, allowed: str, after: str = NOTHING) -> NoReturn:
    """Raise InputError in the house's words."""
    raise InputError(f"{call}: {what}: got {got}; allowed: {allowed}. {after}")
