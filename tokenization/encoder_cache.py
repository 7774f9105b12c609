"""What the comparison of the encoders found, remembered: it takes seconds, and gives the same every time.

A file for each tokenizer, $XDG_CACHE_HOME/pretrain-toolkit/encoder-KEY.json (below ~/.cache where that is not set).
KEY is a hash of all that the result depends on. A file that is damaged, or belongs to somebody else, counts as none.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
import unicodedata
from pathlib import Path
from typing import Any, NamedTuple

from tokenization.encoder_choice import EncoderChoice
from tokenization.line_cuts import LINE_ENDS
from utils.files import atomic_write

# The comparison's own code: what another version of it found is not this one's.
SOURCES = (
    *("encoder.py", "encoder_battery.py", "encoder_cache.py", "encoder_check.py", "encoder_choice.py"),
    *("line_cuts.py", "prepared_tokenizer.py"),
)


class Findings(NamedTuple):
    """What is known of a tokenizer after the comparison."""

    choice: EncoderChoice
    rates: tuple[float, float]
    renumbered: tuple[tuple[int, int], ...]


def key_of(tokenizer_json: bytes, parse_special_tokens: bool) -> str:
    """The identity of a comparison, as 64 hexadecimal digits."""
    folder = Path(__file__).parent
    depends_on = {
        "tokenizer": hashlib.sha256(tokenizer_json).hexdigest(),
        "parse_special_tokens": parse_special_tokens,
        "versions": {name: importlib.metadata.version(name) for name in ("gigatoken", "tokenizers")},
        "python": (platform.python_version(), platform.machine(), unicodedata.unidata_version),
        "sources": [hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in SOURCES],
    }
    return hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()


def path_of(key: str) -> Path:
    home = Path(os.environ.get("XDG_CACHE_HOME", ""))  # a relative one does not count, says its specification
    home = home if home.is_absolute() else Path(os.path.expanduser("~/.cache"))
    return home / "pretrain-toolkit" / f"encoder-{key}.json"


def recall(key: str) -> Findings | None:
    """What an earlier run found; None where there is nothing that can be trusted."""
    try:
        with open(path_of(key), "rb") as file:
            if os.fstat(file.fileno()).st_uid != os.geteuid():
                return None
            entry = json.loads(file.read())
        if entry["checksum"] != _checksum(key, entry["findings"]):
            return None
        return _parsed(entry["findings"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def remember(key: str, findings: Findings) -> None:
    """Keep it for the next run, if there is a place for it."""
    value = {
        "choice": dataclasses.asdict(dataclasses.replace(findings.choice, warnings=())),
        "rates": findings.rates,
        "renumbered": findings.renumbered,
    }
    value = json.loads(json.dumps(value))
    path = path_of(key)
    with contextlib.suppress(OSError):
        if path.is_absolute():  # "~" stays where nobody knows the home
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with atomic_write(path) as file:
                file.write(json.dumps({"checksum": _checksum(key, value), "findings": value}).encode())


def _checksum(key: str, value: Any) -> str:
    return hashlib.sha256(key.encode() + json.dumps(value, sort_keys=True).encode()).hexdigest()


def _parsed(value: dict[str, Any]) -> Findings:
    """Raises ValueError, KeyError or TypeError where it is not what `remember` writes."""
    choice = value["choice"]
    ranges = _pairs(choice["code_points"])
    choice = EncoderChoice(**{**choice, "code_points": ranges, "literals": tuple(choice["literals"]), "warnings": ()})
    fast, reference = map(float, value["rates"])
    points = [point for pair in ranges for point in pair]
    is_sound = (
        choice.backend in ("gigatoken", "tokenizers")
        and isinstance(choice.reason, str)
        and isinstance(choice.num_compared, int)
        and choice.line_end in ("", *(line_end for line_end, _ in LINE_ENDS))
        and all(isinstance(literal, str) and literal for literal in choice.literals)
        and points == sorted(points)
        and (not points or 0x80 <= points[0] <= points[-1] < 0x110000)
    )
    if not is_sound:
        raise ValueError("not a decision")
    return Findings(choice, (fast, reference), _pairs(value["renumbered"]))


def _pairs(value: list[list[int]]) -> tuple[tuple[int, int], ...]:
    pairs = tuple((first, second) for first, second in value)
    if not all(isinstance(number, int) for pair in pairs for number in pair):
        raise ValueError("not pairs of numbers")
    return pairs
