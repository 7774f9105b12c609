"""A progress bar for steps 1 and 2, or lines where there is no terminal."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

from utils import console

LINE_INTERVAL_S = 10.0


class Progress:
    """A bar on a terminal, elsewhere a line every ten seconds.

    It counts bytes, whose total is known before the work; the caller's note gives documents, tokens and rates.

    Args:
        label: what is being done.
        total_bytes: of the whole work.
        done_bytes: what an earlier run had finished.
    """

    def __init__(self, label: str, total_bytes: int, done_bytes: int = 0):
        self._label, self._total, self._done, self._at_start = label, total_bytes, done_bytes, done_bytes
        self._start = self._last_line = time.monotonic()
        self._bar = tqdm(
            total=total_bytes, initial=done_bytes, desc=label, unit="B", unit_scale=True, dynamic_ncols=True,
            disable=not sys.stderr.isatty() or console.VERBOSITY < 1,
        )  # fmt: skip

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_) -> None:
        self._bar.close()

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self._start

    def advance(self, num_bytes: int, note: str = "") -> None:
        """Count `num_bytes` more as done; `note` is shown beside them."""
        self._done += num_bytes
        self._bar.set_postfix_str(note, refresh=False)
        self._bar.update(num_bytes)
        if self._bar.disable and time.monotonic() - self._last_line >= LINE_INTERVAL_S:
            self._last_line = time.monotonic()
            rate = (self._done - self._at_start) / self.elapsed_s
            eta = console.human_seconds((self._total - self._done) / rate) if rate else "?"
            share = self._done / self._total if self._total else 1
            progress = f"{console.human_bytes(self._done)} of {console.human_bytes(self._total)}"
            console.say(f"{self._label}: {share:.1%} | {progress} | {note} | ETA {eta}")
