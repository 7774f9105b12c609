"""A progress bar on a terminal, a plain line now and then in a log file."""

from __future__ import annotations

import sys
import time

from utils import console

LINE_INTERVAL_S = 10.0


class Progress:
    """Counts work by its bytes, since those are known before; shows documents, tokens and rates beside them.

    Args:
        label: what is being done.
        total_bytes: of the whole work.
        done_bytes: what an earlier run had finished.
    """

    def __init__(self, label: str, total_bytes: int, done_bytes: int = 0):
        self._label, self._total, self._done = label, total_bytes, done_bytes
        self._at_start = done_bytes
        self._start = self._last_line = time.monotonic()
        self._note = ""
        self._bar = None
        if sys.stderr.isatty() and console.VERBOSITY >= 1:
            from tqdm import tqdm

            self._bar = tqdm(
                total=total_bytes, initial=done_bytes, desc=label, unit="B", unit_scale=True, dynamic_ncols=True
            )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_) -> None:
        if self._bar is not None:
            self._bar.close()

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self._start

    def advance(self, num_bytes: int, note: str = "") -> None:
        """Count `num_bytes` more as done; `note` stands beside the bar."""
        self._done += num_bytes
        self._note = note
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(num_bytes)
        elif time.monotonic() - self._last_line >= LINE_INTERVAL_S:
            self._last_line = time.monotonic()
            console.say(self._line())

    def _line(self) -> str:
        rate = (self._done - self._at_start) / max(self.elapsed_s, 1e-9)
        left = (self._total - self._done) / rate if rate else float("inf")
        eta = console.human_seconds(left) if left != float("inf") else "?"
        share = 100 * self._done / self._total if self._total else 100
        return (
            f"{self._label}: {share:.1f}% | {console.human_bytes(self._done)} of {console.human_bytes(self._total)} | "
            f"{self._note} | ETA {eta}"
        )
