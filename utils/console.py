"""What a person reads while a step runs: plain lines, colour only on a terminal."""

from __future__ import annotations

import os
import shlex
import sys

VERBOSITY = 1  # 0: errors, warnings and results only (-q); 1: the story; 2: details too (-v)


def _paint(text: str, code: str, stream) -> str:
    return f"\033[{code}m{text}\033[0m" if stream.isatty() and "NO_COLOR" not in os.environ else text


def say(text: str = "", verbosity: int = 1) -> None:
    """A line of the step's story; of verbosity 2 if only `-v` is to show it."""
    if verbosity <= VERBOSITY:
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


def printable(path: str) -> str:
    """The path with bytes that are not UTF-8 as `\\xe9`."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def counted(number: int, noun: str) -> str:
    """1 chunk, 2,000 chunks."""
    return f"{number:,} {noun}{'s'[: number != 1]}"


def human_bytes(count: float) -> str:
    """512 B, 1.5 GB."""
    return _scaled(count, "B", 1)


def human_count(count: float) -> str:
    """512, 1.50 G."""
    return _scaled(count, "", 2).rstrip()


def _scaled(count: float, unit: str, decimals: int) -> str:
    prefix = ""
    for prefix in ("", "k", "M", "G", "T"):
        if abs(count) < 1000 or prefix == "T":
            break
        count /= 1000
    return f"{count:.{decimals if prefix else 0}f} {prefix}{unit}"


def human_seconds(seconds: float) -> str:
    """9.5 s, 1 min 3 s, 2 h 5 min, 3 d 1 h."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    parts, rest = [], round(seconds)
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        count, rest = divmod(rest, size)
        if count or parts or unit == "s":
            parts.append(f"{count} {unit}")
    return " ".join(parts[:2])
