"""Well-formed English out of plain text: paragraphs of whole sentences, each on one line, none of them said before.

What is left out: tables, lists of names, signatures, parameters and their types, changelogs, text full of symbols, and
paragraphs of which most stood in the corpus already, in this document or in any other.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator

SHINGLE_WORDS = 6
MAX_KNOWN_SHINGLES = 0.5

MIN_PARAGRAPH_WORDS = 10
MIN_COMMON_WORDS = 0.25
MIN_LETTERS = 0.86
MAX_IDENTIFIERS = 0.08

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
_SIGNATURE = re.compile(
    r"(?:Args?|Arguments?|Param(?:eter)?s?|Keyword Args|Attributes|Returns|Yields|Type): *\S+:|Raises:"
)
_CODE_LINE_STARTS = (">>>", "... ", "In [", "$ ", "Traceback (", "% ", "+--", "|")
_MARKS = re.compile(r"\*\*|(?<!\w)[*_](?=\w)|(?<=\w)[*_](?!\w)|`+_*|(?<=:):")
_SPACES = re.compile(r"\s+")
_LINK = re.compile(r"https?://|www\.|\S@\S|doi:|\.\. ")


class Repetition:
    """Remembers runs of words, so that what was said before is recognised, in the same words or in nearly the same."""

    def __init__(self):
        self._seen: set[int] = set()

    def is_new(self, paragraph: str) -> bool:
        """Whether at most MAX_KNOWN_SHINGLES of its runs of SHINGLE_WORDS words came before; remembers all of them."""
        words = WORD.findall(paragraph.lower())
        runs = {
            zlib.crc32(" ".join(words[i : i + SHINGLE_WORDS]).encode())
            for i in range(max(1, len(words) - SHINGLE_WORDS + 1))
        }
        known = len(runs & self._seen)
        self._seen |= runs
        return known <= MAX_KNOWN_SHINGLES * len(runs)


def english_of(text: str) -> Iterator[str]:
    """The paragraphs of whole sentences in a text, each on one line, without marks of emphasis and code."""
    for block in text.split("\n\n"):
        if any(line.lstrip().startswith(_CODE_LINE_STARTS) for line in block.split("\n")):
            continue
        for lines in _items(block.split("\n")):
            if len({len(line) - len(line.lstrip()) for line in lines[1:]}) > 1:
                continue  # names with indented descriptions, tables
            paragraph = _SPACES.sub(" ", _MARKS.sub("", _ITEM.sub("", " ".join(lines)))).strip()
            if is_english(paragraph):
                yield paragraph


def _items(lines: list[str]) -> Iterator[list[str]]:
    """The lines of each item of a list, or all lines of a block that is none."""
    item: list[str] = []
    for line in lines:
        if _ITEM.match(line) and item:
            yield item
            item = []
        item.append(line)
    yield item


def is_english(paragraph: str) -> bool:
    """Whether it is made of whole sentences: common words, mostly letters, words of ordinary length, a full stop."""
    words = WORD.findall(paragraph)
    if len(words) < MIN_PARAGRAPH_WORDS or not _SENTENCES.fullmatch(paragraph):
        return False
    if _LINK.search(paragraph) or _SIGNATURE.match(paragraph):
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
