"""Random operations on a paged cache, each compared with a dictionary of what it should hold.

CI takes a few hundred. More by hand, without a kernel, or with it on a GPU:

    python tests/paged_walk.py --operations 100000
    python tests/paged_walk.py --operations 10000 --device cuda
"""

from __future__ import annotations

import argparse
import random
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from unittest import mock

import pytest
from paged_model import GROUP, State, Told, appending, new_cache

from gqa_cutlass import InputError, OutOfPagesError, gqa_decode
from gqa_cutlass.cache.paged import step as step_module

ROWS, ROOM = 3, 40  # of the batch


class Broken(Exception):
    """An error of the program that uses the cache."""


class Walk(Told):
    """Does anything, at random, with sequences that a batch holds and with others.

    Args:
        seed: Of what is done, and of the cache's sizes; odd: it has a window.
        device: Of the cache.
        by_token: Whether it is of 8 bits, with scales of tokens; then no step has drafts.
    """

    def __init__(self, seed: int, device: str = "cpu", by_token: bool = False) -> None:
        self.random = random.Random(seed)
        page_size, layers = self.random.choice([1, 3, 4, 16]), self.random.choice([1, 2])
        most, window = self.random.randint(8, 40), None
        if seed % 2:  # so that there is less to hold
            most, window = max(8, most // 2), self.random.choice([1, 3, page_size + 1])
        super().__init__(new_cache(most, page_size, layers, device, window, by_token))
        self.batch = self.cache.batch(ROWS, ROOM, 1 if by_token else self.random.choice([1, 1, 3]))
        self.done: Counter[str] = Counter()
        names = [name for name in dir(self) if name.startswith("do_")]
        self._operations = [name for name in names if name != "do_draft" or not by_token]

    def seen(self, sequences: Sequence[int]) -> dict[str, tuple[int, int]]:
        """A window that sequences have all tokens of; one that is wider is refused."""
        if self.cache.window is None:
            return {}
        return {"window_size": (self.random.randint(1, self.reach(sequences)) - 1, 0)}

    def step(self) -> None:
        """Do something, and look at what it concerned."""
        name = self.random.choice(self._operations)
        self.done[name] += 1
        self.check(*getattr(self, name)())
        self.done["steps with pages freed"] += any(self.cache.freed(s) for s in self.held)

    def close(self) -> None:
        """All sequences hold what they should; without them, all pages are free."""
        self.check()
        self.batch.check()
        self.batch.assign([])
        self.cache.free(self.cache.sequences)
        assert self.cache.free_pages == self.cache.num_pages

    def some(self) -> list[int]:
        """A few sequences that may be changed, in any order."""
        there = [s for s in self.held if s not in self.batch.sequences]
        return self.random.sample(there, min(len(there), self.random.randint(0, 4)))

    def one(self) -> list[int]:
        """A sequence that may be changed, if there is one."""
        return self.some()[:1]

    def succeeds(
        self,
        sequences: Sequence[int],
        tokens: Sequence[int],
        call: Callable[[], object],
        prompt: bool = False,
    ) -> bool:
        """Whether there were the pages for a call; if not, it must say so and change nothing."""
        wanted, free = self.wanted(sequences, tokens), self.cache.free_pages
        assert self.cache.pages_needed(sequences, tokens) == wanted
        if prompt:
            wanted = self.wanted(sequences, tokens, prompt)
        if wanted <= free:
            call()
            return True
        before = State(self.cache, bits=False)
        with pytest.raises(OutOfPagesError) as raised:
            call()
        error = raised.value
        assert (error.asked, error.free, error.missing) == (wanted, free, wanted - free)
        assert State(self.cache, bits=False) == before
        self.done["out of pages"] += 1
        return False

    def do_allocate(self) -> list[int]:
        if len(self.held) > 12:
            return []
        sequence = self.allocate()
        return [sequence]

    def do_prompt(self) -> list[int]:
        sequences = self.one()
        tokens = self.new(self.random.randint(0, 3 * self.cache.page_size))
        for sequence in sequences:
            call = partial(self.cache.prefill, sequence, *self.all_rows(tokens))
            if self.succeeds([sequence], [len(tokens)], call, prompt=True):
                self.add([sequence] * len(tokens), tokens)
        return sequences

    def do_append(self) -> list[int]:
        sequences = self.some()
        tokens = self.new(len(sequences))
        call = partial(self.cache.append, sequences, *self.all_rows(tokens))
        if self.succeeds(sequences, [1] * len(sequences), call):
            self.add(sequences, tokens)
        return sequences

    def do_prompts(self) -> list[int]:
        """Several at once, layer by layer."""
        sequences = self.some() or [self.allocate()]
        counts = [self.random.randint(0, 2 * self.cache.page_size) for _ in sequences]
        tokens = self.new(sum(counts))

        def call() -> None:
            with self.cache.step(sequences, counts) as step:
                for layer in self.layers:
                    step.append(layer, *self.rows(tokens, layer))

        if self.succeeds(sequences, counts, call):
            for sequence, count in zip(sequences, counts, strict=True):
                self.add([sequence] * count, tokens[:count])
                del tokens[:count]
        return sequences

    def do_decode(self) -> list[int]:
        """A step that is finished, or left by an error, or lacks a layer."""
        sequences = self.some() or [self.allocate()]
        tokens = self.new(len(sequences))
        end = self.random.choice(["finished", "finished", "error", "layer"])
        layers = [*self.layers][: len(self.layers) - (end == "layer")]
        seen = self.seen(sequences)

        def call() -> None:
            with self.cache.step(sequences) as step:
                for layer in layers:
                    k, v = self.rows(tokens, layer)
                    q = k.expand(-1, GROUP, -1)
                    if seen:
                        with pytest.raises(InputError, match="window_size: got"):
                            step.decode(layer, q, k, v, window_size=(self.reach(sequences), 0))
                    step.decode(layer, q, k, v, **seen)
                if end == "error":
                    raise Broken

        if end == "finished":
            if self.succeeds(sequences, [1] * len(sequences), call):
                self.add(sequences, tokens)
        else:
            lengths = {s: self.cache.length(s) for s in self.held}
            with pytest.raises((Broken, InputError)):  # OutOfPagesError is one of them
                call()
            assert {s: self.cache.length(s) for s in self.held} == lengths
        return sequences

    def do_draft(self) -> list[int]:
        """Several tokens of each, of which some are kept, or all for want of a word."""
        sequences = self.some() or [self.allocate()]
        count = self.random.randint(2, 2 * self.cache.page_size + 1)
        tokens, seen = self.new(count * len(sequences)), self.seen(sequences)
        before = {s: len(self.cache.pages(s)) for s in sequences}

        def call() -> None:
            with self.cache.step(sequences, count) as step:
                for layer in self.layers:
                    k, v = (t.unflatten(0, (-1, count)) for t in self.rows(tokens, layer))
                    step.decode(layer, k.expand(-1, -1, GROUP, -1), k, v, **seen)

        if not self.succeeds(sequences, [count] * len(sequences), call):
            return sequences
        self.draft(sequences, tokens)
        self.check(*sequences)
        if self.random.random() < 0.7:
            self.accept(sequences, self.cache.accept)
            for sequence in sequences:
                needed = -(-len(self.held[sequence]) // self.cache.page_size)
                assert len(self.cache.pages(sequence)) == max(before[sequence], needed)
        return sequences

    def accept(self, sequences: Sequence[int], call: Callable[..., None]) -> None:
        """Once; a number that there is not is refused."""
        given = [sequences] if call == self.cache.accept else []
        counts = [self.random.randint(0, self.drafts[s]) for s in sequences]
        with pytest.raises(InputError, match="tokens: got"):
            call(*given, [self.drafts[s] + 1 for s in sequences])
        call(*given, counts)
        self.keep(sequences, counts)
        with pytest.raises(InputError, match="got a sequence without drafts"):
            call(*given, 0)
        self.done["accepted"] += 1

    def do_fork(self) -> list[int]:
        parents = self.one() if len(self.held) < 12 else []
        children = []
        for parent in parents:
            most = len(self.held[parent])
            tokens = self.random.choice([None, self.random.randint(0, most)])
            if not self.are_gone(parent, tokens, self.cache.fork):
                children.append(self.fork(parent, tokens))
        return parents + children

    def are_gone(self, sequence: int, tokens: int | None, call: Callable[..., object]) -> bool:
        """Whether none of its first tokens is there any more; then the call must say so."""
        if not 0 < (len(self.held[sequence]) if tokens is None else tokens) <= self.first(sequence):
            return False
        with pytest.raises(InputError, match=f"whose first {self.first(sequence)} were freed"):
            call(sequence, tokens)
        self.done["gone"] += 1
        return True

    def do_truncate(self) -> list[int]:
        sequences = self.one()
        for sequence in sequences:
            most = self.random.randint(0, len(self.held[sequence]) + 2)
            if self.are_gone(sequence, most, self.cache.truncate):
                continue
            self.cache.truncate(sequence, most)
            del self.held[sequence][most:]
            self.drafts[sequence] = 0
            size = self.cache.page_size
            assert len(self.cache.pages(sequence)) == -(-len(self.held[sequence]) // size)
        return sequences

    def do_reorder(self) -> list[int]:
        sequences, free = self.some(), self.cache.free_pages
        indices = [self.random.randint(-1, len(sequences) - 1) for _ in sequences]
        self.cache.reorder(sequences, indices)
        after = [list(self.held[sequences[i]]) if i >= 0 else [] for i in indices]
        gone = [self.gone[sequences[i]] if i >= 0 else 0 for i in indices]
        self.held.update(zip(sequences, after, strict=True))
        for sequence, i in zip(sequences, indices, strict=True):
            if i < 0 or sequences[i] != sequence:
                self.drafts[sequence] = 0
        self.gone.update({s: n - self.gone[s] for s, n in zip(sequences, gone, strict=True)})
        assert self.cache.free_pages >= free
        return sequences

    def do_reserve(self) -> list[int]:
        sequences = self.some()
        tokens = [self.random.randint(0, 2 * self.cache.page_size) for _ in sequences]
        if self.succeeds(sequences, tokens, partial(self.cache.reserve, sequences, tokens)):
            assert not self.cache.pages_needed(sequences, tokens)
        return sequences

    def do_free(self) -> list[int]:
        sequences = self.some()
        self.cache.free(sequences)
        for sequence in sequences:
            del self.held[sequence]
            with pytest.raises(InputError, match=f"got {sequence}, which was freed"):
                self.cache.free(sequence)
        return []

    def do_assign(self) -> list[int]:
        sequences = [s for s in (*self.some(), *self.batch.sequences) if self.random.random() < 0.7]
        steps = self.random.randint(0, 4)
        tokens = steps * self.batch.tokens
        if len(sequences) <= ROWS and all(len(self.held[s]) + tokens <= ROOM for s in sequences):
            call = partial(self.batch.assign, sequences, steps)
            self.succeeds(sequences, [tokens] * len(sequences), call)
        return list(self.batch.sequences)

    def do_run(self) -> list[int]:
        """As many steps as there are pages for, by replays or not; and no more."""
        sequences, rows = self.batch.sequences, ROWS
        if not sequences:
            return []
        count = self.batch.tokens
        tokens = self.new(rows * count)
        seen = {"window_size": (0, 0)} if self.cache.window else {}  # any sequence has so many

        def forward() -> None:
            with self.batch.step() as step:
                for layer in self.layers:
                    k, v = self.rows(tokens, layer)
                    if count > 1:
                        k, v = k.unflatten(0, (-1, count)), v.unflatten(0, (-1, count))
                    q = k.expand(*k.shape[:-2], GROUP, -1)
                    step.decode(layer, q, k, v, **seen)

        way = self.random.choice([forward, lambda: self.batch.run(forward)])
        if self.batch.steps_left:
            way()
            if count == 1:
                self.add(sequences, tokens[: len(sequences)])
            else:
                self.draft(sequences, tokens[: len(sequences) * count])
                self.batch.check()
                if self.random.random() < 0.7:
                    left = self.batch.steps_left
                    self.accept(sequences, self.batch.accept)
                    assert self.batch.steps_left >= left
        else:
            before = State(self.cache)
            with pytest.raises(InputError, match="1 with pages for 0 more"):
                way()
            assert State(self.cache) == before
        self.batch.check()
        return list(sequences)

    def do_change_what_the_batch_holds(self) -> list[int]:
        for sequence in self.batch.sequences[:1]:
            append = partial(self.cache.append, [sequence], *self.all_rows(self.new(1)))
            free, fork = (partial(c, sequence) for c in (self.cache.free, self.cache.fork))
            for call in (append, free, fork):
                with pytest.raises(InputError, match=f"got {sequence}, which a batch holds"):
                    call()
        return list(self.batch.sequences)


def walk(seed: int, operations: int, device: str = "cpu", by_token: bool = False) -> Counter[str]:
    """Do so many, on several caches one after the other; returns how many of which.

    On the CPU without a kernel, on a GPU with it.
    """
    done: Counter[str] = Counter()
    decode = appending if device == "cpu" else gqa_decode
    with mock.patch.object(step_module, "gqa_decode", decode):
        for start in range(0, operations, 1000):
            one = Walk(seed + start // 1000, device, by_token)
            for _ in range(min(1000, operations - start)):
                one.step()
            one.close()
            done += one.done
    return done


def main() -> int:
    """Walk, and print what was done."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--operations", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="cuda: with the kernel")
    parser.add_argument("--by-token", action="store_true", help="8 bits, with scales of tokens")
    given = parser.parse_args()
    done = walk(given.seed, given.operations, given.device, given.by_token)
    print(f"{given.operations} operations, nothing lost: {dict(done)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
