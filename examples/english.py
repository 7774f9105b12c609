"""Well-formed English out of plain text: paragraphs of whole sentences, each on one line, none known from elsewhere.

What is left out: tables, lists of names, signatures, the types of parameters, changelogs, text full of symbols, and
paragraphs of which most stood in another document already.
"""

from __future__ import annotations

import collections
import itertools
import re
import zlib
from collections.abc import Iterable, Iterator

NUM_PLAIN_WORDS = 6000
MAX_OTHER_WORDS = 0.04

RUN_WORDS = 6
MAX_KNOWN = 0.5

MIN_PARAGRAPH_WORDS = 8
MIN_COMMON_WORDS = 0.28
MIN_LETTERS = 0.86
MAX_IDENTIFIERS = 0.05

# In documentation about a third of the words are these; in code and tables hardly any.
# fmt: off
COMMON_WORDS = frozenset((
    "the", "of", "and", "to", "is", "in", "for", "that", "be", "with", "this", "are", "it", "as", "by", "if", "on",
    "or", "not", "an", "from", "can", "which", "when", "will", "you", "has", "may", "should", "have", "was", "used",
    "at", "a", "we", "its", "their", "these", "they", "then", "than", "but", "each", "one", "all", "any", "other",
    "into", "only", "so", "such", "there", "where", "more", "use", "does", "do", "no", "also", "must", "been", "same",
))
# fmt: on
WORD = re.compile(r"[A-Za-z][A-Za-z'-]*")
_ITEM = re.compile(r"^[ \t]*(?:[-*+•]|\(?(?:\d{1,2}|[a-z])[.)])[ \t]+")
_SENTENCES = re.compile(r"[(\"']?[A-Z].*[.:?!][\"')]*", re.DOTALL)
_IDENTIFIER = re.compile(r"(?<!\S)\S*(?:\w_|_\w|\w\.\w|\w/\w|[a-z][A-Z]|\d|[=<>{}\[\]|\\])\S*")
_PARAMETER = re.compile(
    r"[ \t]*(?::param (?:\w+ )?)?[*`]*(?P<name>[a-z]\w*)[*`]*"
    r"(?: ?\([^)\n]*\): | ?: +(?=[A-Z][a-z]+ |An? )|: +(?=[a-z]+ \w+ \w+ )| : [^\n]*$)(?P<words>.*)"
)
_SIGNATURE = re.compile(
    r"(?:Args?|Arguments?|Param(?:eter)?s?|Keyword Args|Attributes|Returns|Yields|Type): *\S+:|Raises:"
)
_CODE_LINE_STARTS = (">>>", "... ", "In [", "$ ", "Traceback (", "% ", "+--", "|")
_MARKS = re.compile(r"\*\*|(?<!\w)[*_](?=\w)|(?<=\w)[*_](?!\w)|`+_*|(?<=:):")
_LICENCE = re.compile(
    r"permission is hereby granted|redistribution and use|warrant(?:y|ies)\b|copyright|licen[cs]ed? under"
    r"|rights reserved",
    re.IGNORECASE,
)
_SPACES = re.compile(r"\s+")
_FOREIGN = re.compile(r"https?://|www\.|\S@\S|doi:|\.\. |[\\{}|<>=_]{2}|\\")


class PlainWords:
    """The words that many files use. A small model learns these; names and terms of one field it can only guess."""

    def __init__(self, files: Iterable[list[str]], num_words: int = NUM_PLAIN_WORDS):
        """
        Args:
            files: the paragraphs of each.
            num_words: the words that most files use, so many of them.
        """
        counts = collections.Counter(word for file in files for word in {*_words(" ".join(file))})
        ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        self._plain = {word for word, _ in ranked[:num_words]}

    def make_up(self, paragraph: str) -> bool:
        """Whether all of its words are such, but for MAX_OTHER_WORDS of them."""
        words = _words(paragraph)
        return sum(word not in self._plain for word in words) <= MAX_OTHER_WORDS * len(words)


def _words(text: str) -> list[str]:
    return [word.strip("'-") for word in WORD.findall(text.lower())]


class Repetition:
    """Remembers runs of words, so that what stood in another document is recognised, in the same words or nearly so."""

    def __init__(self):
        self._holders: dict[int, list[int]] = {}
        """By a run's hash, the paragraphs of earlier documents that have it."""
        self._num_runs: list[int] = []
        """Of each of these paragraphs."""
        self._own: dict[str, set[int]] = {}
        """This document's paragraphs and their runs."""

    def is_new(self, paragraph: str) -> bool:
        """Whether this document does not have it yet, other documents have at most MAX_KNOWN of its runs of words, and
        it has at most MAX_KNOWN of those of any of their paragraphs.

        Within a document, what resembles what came before may stay.
        """
        words = WORD.findall(paragraph.lower())
        runs = {
            zlib.crc32(" ".join(words[i : i + RUN_WORDS]).encode()) for i in range(max(1, len(words) - RUN_WORDS + 1))
        }
        if paragraph in self._own or self._is_known(runs):
            return False
        self._own[paragraph] = runs
        return True

    def _is_known(self, runs: set[int]) -> bool:
        known = [self._holders[run] for run in runs if run in self._holders]
        shared = collections.Counter(itertools.chain.from_iterable(known))
        return len(known) > MAX_KNOWN * len(runs) or any(
            count > MAX_KNOWN * self._num_runs[holder] for holder, count in shared.items()
        )

    def end_document(self, is_kept: bool) -> None:
        """Go on with the next one; what a document said that is not kept may be said again."""
        for runs in self._own.values() if is_kept else ():
            for run in runs:
                self._holders.setdefault(run, []).append(len(self._num_runs))
            self._num_runs.append(len(runs))
        self._own = {}


def english_of(text: str) -> Iterator[str]:
    """The paragraphs of whole sentences in a text, each on one line, without marks of emphasis and code.

    A parameter is a paragraph with its name and without its type: "path: The file that is read."
    """
    for block in text.split("\n\n"):
        lines = block.split("\n")
        if any(line.lstrip().startswith(_CODE_LINE_STARTS) for line in lines):
            continue
        for name, words in [*_parameters(lines)] or _items(lines):
            sentences = _SPACES.sub(" ", _MARKS.sub("", words)).strip()
            if is_english(sentences):
                yield f"{name}: {sentences}" if name else sentences


def _parameters(lines: list[str]) -> Iterator[tuple[str, str]]:
    """(name, description) of each parameter that is described here, as Google, NumPy and Sphinx have them."""
    name, indentation, words = "", 0, []
    for line in lines:
        depth = len(line) - len(line.lstrip())
        if found := _PARAMETER.match(line):
            if name:
                yield name, " ".join(words)
            name, indentation, words = found["name"], depth, [found["words"] or ""]
        elif depth > indentation:
            words.append(line)
        elif name:
            yield name, " ".join(words)
            name = ""
    if name:
        yield name, " ".join(words)


def _items(lines: list[str]) -> Iterator[tuple[str, str]]:
    """("", text) of each item of a list, or of a block that is none; nothing of what is indented to and fro."""
    item: list[str] = []
    for line in [*lines, None]:
        if item and (line is None or _ITEM.match(line)):
            if len({len(line) - len(line.lstrip()) for line in item[1:]}) <= 1:
                yield "", _ITEM.sub("", " ".join(item))
            item = []
        item.append(line)


def is_english(paragraph: str) -> bool:
    """Whether it is made of whole sentences: common words, mostly letters, words of ordinary length, a full stop."""
    words = WORD.findall(paragraph)
    if len(words) < MIN_PARAGRAPH_WORDS or not _SENTENCES.fullmatch(paragraph):
        return False
    if _FOREIGN.search(paragraph) or _LICENCE.search(paragraph) or _SIGNATURE.match(paragraph):
        return False
    common = sum(word.lower() in COMMON_WORDS for word in words)
    letters = sum(map(len, words))
    dense = sum(1 for character in paragraph if not character.isspace())
    return (
        paragraph.isascii()
        and common >= MIN_COMMON_WORDS * len(words)
        and letters >= MIN_LETTERS * dense
        and letters <= 8 * len(words)
        and len(_IDENTIFIER.findall(paragraph)) <= MAX_IDENTIFIERS * len(words)
    )
