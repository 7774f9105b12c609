"""Documentation text for people, out of Python source, package descriptions, reST and Markdown.

A regular expression finds the triple-quoted strings: `ast` would parse 25,000 files for minutes. What is not
prose (templates, tables of numbers, code in strings) is told apart by the words: English has "the" and "of" in it.
"""

from __future__ import annotations

import hashlib
import inspect
import re
from collections.abc import Iterator

MIN_PASSAGE_CHARS = 120
MIN_DOCUMENT_CHARS = 300
MAX_DOCUMENT_CHARS = 12_000

_STRING = re.compile(r"(?P<prefix>[a-zA-Z]*)(?P<quote>\"\"\"|''')(?P<body>.*?)(?P=quote)", re.DOTALL)
_DEFINITION = re.compile(r"^[ \t]*(?:async[ ]+def|def|class)[ ]+(\w+)", re.MULTILINE)

# In documentation about a tenth of the words are these; in code and tables hardly any.
_COMMON_WORDS = frozenset(
    "the of and to is in for that be with this are it as by if on or not an from can which when will you "
    "has may should have was used at".split()
)
_WORD = re.compile(r"[A-Za-z][A-Za-z'-]*")

_NOT_DOCUMENTATION = re.compile(
    r"(^|/)(tests?|testing|_vendor|licenses?|LICEN[CS]E[^/]*|COPYING[^/]*)(/|$)|top_level|SOURCES|entry_points"
)
_LICENCE = re.compile(
    r"permission is hereby granted|redistribution and use in source|apache license\s+version 2", re.IGNORECASE
)
_CODE_LINE_STARTS = (">>>", "...  ", "In [", "$ ", "Traceback (", "% ", "+--", "|")


class Repetition:
    """Remembers paragraphs, so that text repeated from class to class and from file to file is told."""

    def __init__(self):
        self._seen: set[bytes] = set()

    def is_new(self, paragraph: str) -> bool:
        """Whether no paragraph with these letters was seen before; remembers it."""
        letters = re.sub(r"[\W\d_]+", "", paragraph.lower())
        if len(letters) < 30:  # headings and short lines are allowed to recur
            return True
        digest = hashlib.blake2b(letters.encode(), digest_size=10).digest()
        if digest in self._seen:
            return False
        self._seen.add(digest)
        return True


def documents_of(name: str, content: str, repetition: Repetition) -> Iterator[str]:
    """The prose of one file, as documents of at most about MAX_DOCUMENT_CHARS characters.

    Args:
        name: with '/', only its ending and its folders count.
        content: of the file.
        repetition: of the whole corpus; the order of calls decides which of two equal paragraphs stays.
    """
    if _NOT_DOCUMENTATION.search(name):
        return
    if name.endswith((".py", ".pyi", ".pyx")):
        passages = docstrings(content)
    else:
        if name.endswith("METADATA"):
            _, _, content = content.partition("\n\n")
        if _LICENCE.search(content[:3000]):
            return
        passages = iter([("", clean_markup(content))])
    yield from _join(passages, repetition)


def docstrings(source: str) -> Iterator[tuple[str, str]]:
    """(name of what is documented or "", cleaned text) of the triple-quoted strings of Python source."""
    end = 0
    for match in _STRING.finditer(source):
        between, end = source[end : match.start()], match.end()
        if len(match["body"]) < MIN_PASSAGE_CHARS or set(match["prefix"].lower()) & {"f", "b"}:
            continue
        body = match["body"]
        if "r" not in match["prefix"].lower():
            body = body.replace("\\\n", "").replace("\\\\", "\\")
        names = _DEFINITION.findall(between)
        name = names[-1] if names and between.rstrip().endswith(":") else ""
        yield "" if name.startswith("_") else name, clean_markup(inspect.cleandoc(body))


# ---------------------------------------------------------------------------- cleaning

_DROPPED_DIRECTIVE = re.compile(
    r"^(?P<indent>[ \t]*)\.\. +(?:versionadded|versionchanged|deprecated|index|(?:current)?module|auto\w+|toctree|plot|"
    r"test\w+|image|figure|highlight|contents|raw|include|math|_[^\n]*|\|[^\n]*|\[\w+\]|rubric|tabularcolumns|only|ipython|meta)\b[^\n]*\n"
    r"(?:[ \t]*\n|(?P=indent)[ \t]+[^\n]*\n)*",
    re.MULTILINE,
)
_ROLE = re.compile(r":(?:[a-zA-Z]+:){0,2}[a-zA-Z]+:`~?!?([^`<]*?)(?: *<[^`]*>)?`")
_BADGE_OR_HTML = re.compile(r"!?\[!\[[^\n]*|!\[[^\]]*\]\([^)]*\)|<!--.*?-->|</?[a-zA-Z][^<>\n]{0,300}>", re.DOTALL)
_LINK = re.compile(r"\[([^\][]+)\]\([^)\s]*\)")
_RST_LINK = re.compile(r"`([^`<]+?) *<[^`>]+>`_{1,2}")
_UNDERLINE = re.compile(r"^[ \t]*([=\-~^\"'*#+`.:_])\1{2,}[ \t]*\n", re.MULTILINE)
_FENCE = re.compile(r"^[ \t]*(```|~~~)[^\n]*\n.*?(?:^[ \t]*\1[ \t]*$|\Z)", re.DOTALL | re.MULTILINE)
_BLANK_LINES = re.compile(r"\n[ \t]*\n(?:[ \t]*\n)+")


def clean_markup(text: str) -> str:
    """Plain text: no doctests, code blocks, badges, directives; roles and links become their words."""
    text = text.expandtabs(4) + "\n"
    text = _FENCE.sub("", text)
    text = _BADGE_OR_HTML.sub("", text)
    text = _DROPPED_DIRECTIVE.sub("", text)
    text = _ROLE.sub(r"\1", text)
    text = _RST_LINK.sub(r"\1", _LINK.sub(r"\1", text))
    text = text.replace("``", "`")
    text = _UNDERLINE.sub("", text)
    return _BLANK_LINES.sub("\n\n", "\n".join(line.rstrip() for line in text.split("\n"))).strip()


def is_prose(text: str) -> bool:
    """Whether the text reads like English: common words, mostly letters, words of ordinary length."""
    words = _WORD.findall(text)
    if len(words) < 8:
        return False
    common = sum(word.lower() in _COMMON_WORDS for word in words)
    letters = sum(map(len, words))
    dense = sum(1 for character in text if not character.isspace())
    return common >= 0.12 * len(words) and letters >= 0.72 * dense and letters <= 9 * len(words)


def _is_code(paragraph: str) -> bool:
    return any(line.lstrip().startswith(_CODE_LINE_STARTS) for line in paragraph.split("\n"))


def _paragraphs(text: str, repetition: Repetition) -> str:
    """The paragraphs that are neither code nor known already; "" when most of them are known."""
    kept, old_chars, new_chars = [], 0, 0
    for paragraph in text.split("\n\n"):
        if _is_code(paragraph):
            continue
        if repetition.is_new(paragraph):
            new_chars += len(paragraph)
            kept.append(paragraph)
        else:
            old_chars += len(paragraph)
    if old_chars > new_chars:
        return ""
    # A heading with nothing under it is left over where its examples were dropped.
    while kept and len(kept[-1]) < 30 and not kept[-1].rstrip().endswith("."):
        kept.pop()
    return "\n\n".join(kept)


def _join(passages: Iterator[tuple[str, str]], repetition: Repetition) -> Iterator[str]:
    parts: list[str] = []
    length = 0
    for name, text in passages:
        text = _paragraphs(text, repetition)
        if len(text) < MIN_PASSAGE_CHARS or not is_prose(text):
            continue
        parts.append(f"{name}\n\n{text}" if name else text)
        length += len(parts[-1])
        if length >= MAX_DOCUMENT_CHARS:
            yield "\n\n".join(parts)
            parts, length = [], 0
    if length >= MIN_DOCUMENT_CHARS:
        yield "\n\n".join(parts)
