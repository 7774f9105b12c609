"""Many small reads at once, in order, without reading everything ahead."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


def submit_ahead(
    work: Callable[..., Any], *arguments: Iterable, num_threads: int, num_ahead: int | None = None
) -> Iterator[Future]:
    """Like `map(work, *arguments)`, but on threads, and a few calls ahead of the consumer.

    Args:
        num_ahead: calls that run or wait while the consumer has another one's result; None: four per thread.

    It stands first in a `zip`, which exhausts it then. Where it is left unfinished, Python waits for the threads when
    it drops it, and loses a Ctrl-C or SIGTERM that comes meanwhile.

    Yields:
        Finished futures in the order of the arguments: `result()` returns or raises what the call did.
    """
    pool = ThreadPoolExecutor(num_threads)
    try:
        ahead: collections.deque[Future] = collections.deque()
        for each in zip(*arguments):
            ahead.append(pool.submit(work, *each))
            if len(ahead) > (4 * num_threads if num_ahead is None else num_ahead):
                yield ahead.popleft()
        yield from ahead
    finally:  # after an error or Ctrl-C nobody wants what was not begun
        pool.shutdown(cancel_futures=True)
