"""Processes that do part of the work, and end when the process that started them does."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_in_order(
    function: Callable[[Item], Result], items: Iterable[Item], jobs: int
) -> Iterator[Result]:
    """Apply a function to items in several processes, and yield results as `map` does.

    Closed early, or ended by an error or Ctrl-C, it ends the processes at once.

    Args:
        function: Of a module, so that it can be found there.
        items: Its arguments.
        jobs: Processes.

    Raises:
        BrokenProcessPool: A process ended abruptly.
        Exception: Whatever the function raised.
    """
    waiting: deque[Future[Result]] = deque()
    with _pool(jobs) as pool, _starter() as starter:
        for item in items:
            waiting.append(starter.submit(pool.submit, function, item).result())
            if len(waiting) > 2 * jobs:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


@contextmanager
def _pool(jobs: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that end with this one, and at once if the block is left by an exception."""
    spawn = multiprocessing.get_context("spawn")
    ended, end = spawn.Pipe(duplex=False)
    with ended, end, ProcessPoolExecutor(
        jobs, mp_context=spawn, initializer=_end_with_parent, initargs=(ended, os.getpid())
    ) as pool:  # fmt: skip
        try:
            yield pool
        except BaseException:
            end.send(None)
            raise


def _end_with_parent(ended: Connection, parent: int) -> None:
    """Have this process end as soon as its parent says so, or is no more."""

    def watch() -> None:
        # The pipe is at its end when nobody can write to it. Where the parent has forked somebody
        # can, and only the process number changes.
        while not ended.poll(1.0) and os.getppid() == parent:
            pass
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _starter() -> ThreadPoolExecutor:
    """A thread that starts processes without interruption, and such as Ctrl-C does not reach.

    A terminal's Ctrl-C goes to all its processes; here it is for the main thread alone to see.
    """
    return ThreadPoolExecutor(1, initializer=_block_interrupts)


def _block_interrupts() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # what is started inherits this
