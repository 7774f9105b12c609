"""What a person reads while a step runs: plain lines, colour only on a terminal."""

from __future__ import annotations

import os
import shlex
import sys
import time

VERBOSITY = 1  # 0: errors, warnings and results only (-q); 1: the story; 2: details too (-v)


def _paint(text: str, code: str, stream) -> str:
    if stream.isatty() and "NO_COLOR" not in os.environ:
        return f"\033[{code}m{text}\033[0m"
    return text


def say(text: str = "") -> None:
    """A line of the step's story."""
    if VERBOSITY >= 1:
        print(text, flush=True)


def detail(text: str) -> None:
    """A line that only `-v` shows."""
    if VERBOSITY >= 2:
        print(text, flush=True)


def result(text: str) -> None:
    """A line that is shown even under `-q`."""
    print(text, flush=True)


def warn(text: str) -> None:
    print(_paint("warning: ", "33", sys.stderr) + text, file=sys.stderr, flush=True)


def error(text: str) -> None:
    print(_paint("error: ", "31;1", sys.stderr) + text, file=sys.stderr, flush=True)


def next_command(command: str, what: str = "next") -> None:
    """The command to paste now."""
    say(f"\n{what}:\n  {_paint(command, '1', sys.stdout)}")


def this_command() -> str:
    """The command line that runs now, as one can paste it into a shell again."""
    return shlex.join(["python", *sys.orig_argv[1:]])


def counted(number: int, noun: str) -> str:
    """1 chunk, 2,000 chunks."""
    return f"{number:,} {noun}{'s'[: number != 1]}"


def human_bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(count) < 1000 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError("unreachable")


def human_count(count: float) -> str:
    for unit in ("", " k", " M", " G"):
        if abs(count) < 1000:
            return f"{count:.0f}" if unit == "" else f"{count:.2f}{unit}"
        count /= 1000
    return f"{count:.2f} T"


def human_seconds(seconds: float) -> str:
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


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
        if sys.stderr.isatty() and VERBOSITY >= 1:
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
            say(self._line())

    def _line(self) -> str:
        rate = (self._done - self._at_start) / max(self.elapsed_s, 1e-9)
        left = (self._total - self._done) / rate if rate else float("inf")
        eta = human_seconds(left) if left != float("inf") else "?"
        share = 100 * self._done / self._total if self._total else 100
        return (
            f"{self._label}: {share:.1f}% | {human_bytes(self._done)} of {human_bytes(self._total)} | "
            f"{self._note} | ETA {eta}"
        )
