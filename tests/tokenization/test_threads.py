"""Calls a few ahead of their consumer: nobody waits for those that are not begun when the consumer leaves."""

from __future__ import annotations

import threading

from tokenization.threads import submit_ahead


def test_what_is_queued_is_not_begun_after_the_consumer_has_left():
    begun, released = [], threading.Event()

    def work(number: int) -> int:
        begun.append(number)
        if number:
            released.wait()
        return number

    results = submit_ahead(work, range(20), num_threads=1)
    assert next(results).result() == 0
    # The pool has one call in hand, which ends only after the consumer has begun to leave.
    release = threading.Timer(0.5, released.set)
    release.start()
    results.close()
    release.join()
    assert len(begun) <= 2


def test_no_more_arguments_are_taken_than_may_be_ahead():
    taken = []
    results = submit_ahead(lambda number: number, (taken.append(n) or n for n in range(20)), num_threads=2, num_ahead=2)
    for number, future in enumerate(results):
        assert future.result() == number
        assert len(taken) == min(20, number + 3)
    assert number == 19
