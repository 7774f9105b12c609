"""Documentation text for people, out of Python source, package descriptions, reST and Markdown.

A regular expression finds the triple-quoted strings: `ast` would parse 25,000 files for minutes. What is not
prose (templates, tables of numbers, code in strings) is recognised by its words: English has "the" and "of" in it.
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
# fmt: off
_COMMON_WORDS = frozenset((
    "the", "of", "and", "to", "is", "in", "for", "that", "be", "with", "this", "are", "it", "as", "by", "if", "on",
    "or", "not", "an", "from", "can", "which", "when", "will", "you", "has", "may", "should", "have", "was", "used",
    "at",
))
_WORD = re.compile(r"[A-Za-z][A-Za-z'-]*")

_NOT_DOCUMENTATION = re.compile(
    r"(^|/)(tests?|testing|_vendor|licenses?|LICEN[CS]E[^/]*|COPYING[^/]*)(/|$)|top_level|SOURCES|entry_points"
)
_LICENCE = re.compile(
    r"permission is hereby granted|redistribution and use in source|apache license\s+version 2", re.IGNORECASE
)
_CODE_LINE_STARTS = (">>>", "...  ", "In [", "$ ", "Traceback (", "% ", "+--", "|")


class Repetition:
    """Remembers paragraphs, so that text repeated from class to class and from file to file is recognised."""

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
        name: with '/'; only its ending and its folders matter.
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
    r"test\w+|image|figure|highlight|contents|raw|include|math|_[^\n]*|\|[^\n]*|rubric|tabularcolumns|only|ipython|meta)\b[^\n]*\n"
    r"(?:[ \t]*\n|(?P=indent)[ \t]+[^\n]*\n)*",
    re.MULTILINE,
)
_ROLE = re.compile(r":(?:[a-zA-Z]+:){0,2}[a-zA-Z]+:`~?!?([^`<]*?)(?: *<[^`]*>)?`")
_BADGE = re.compile(r"\[!\[[^\]]*\]\([^)]*\)\]\([^)]*\)|!\[[^\]]*\]\([^)]*\)")
_HTML = re.compile(r"<!--.*?-->|</?[a-zA-Z][^<>\n]{0,300}>", re.DOTALL)
_LINK = re.compile(r"\[([^\][]+)\]\([^)\s]*\)")
_RST_LINK = re.compile(r"`([^`<]+?)\s*<[^`>]+>`_{1,2}")
_ADMONITION = re.compile(r"^([ \t]*)(?:\.\. +(\w+) ?::|!!! +(\w+))(?: +\"([^\"\n]*)\")?[ \t]*", re.MULTILINE)
_LITERAL_BLOCK_MARK = re.compile(r"(?<=\w)::[ \t]*$|^[ \t]*::[ \t]*\n", re.MULTILINE)
# Code blocks keep their code: only the line that announces it goes. A footnote keeps its number.
_MARKER_LINE = re.compile(
    r"^[ \t]*(?:\.\. +(?:code|code-block|sourcecode|parsed-literal) *::|\[[^\]\n]+\]: +)[^\n]*\n", re.MULTILINE
)
_FOOTNOTE = re.compile(r"^([ \t]*)\.\. (?=\[)", re.MULTILINE)
_LINTER_MARK = re.compile(r"[ \t]*# (?:noqa|type: ignore|pylint:|fmt:)[^\n]*")
_UNDERLINE = re.compile(r"^[ \t]*([=\-~^\"'*#+`.:_])\1{2,}[ \t]*\n", re.MULTILINE)
_FENCE = re.compile(r"^[ \t]*(```|~~~)[^\n]*\n.*?(?:^[ \t]*\1[ \t]*$|\Z)", re.DOTALL | re.MULTILINE)
_BLANK_LINES = re.compile(r"\n[ \t]*\n(?:[ \t]*\n)+")

_ADMONITION_TITLES = {
    "note": "Note:",
    "tip": "Tip:",
    "hint": "Hint:",
    "warning": "Warning:",
    "caution": "Warning:",
    "important": "Important:",
    "seealso": "See also:",
    "todo": "To do:",
}


def clean_markup(text: str) -> str:
    """Plain text: no doctests, code blocks, badges, directives; roles and links become their words."""
    text = text.expandtabs(4) + "\n"
    text = _FENCE.sub("", text)
    text = _DROPPED_DIRECTIVE.sub("", text)
    text = _BADGE.sub("", text)
    text = _ROLE.sub(r"\1", text)
    text = _RST_LINK.sub(r"\1", _LINK.sub(r"\1", text))
    text = _HTML.sub("", text)
    text = _FOOTNOTE.sub(r"\1", _MARKER_LINE.sub("", text))
    text = _ADMONITION.sub(lambda m: f"{m[1]}{m[4] or _ADMONITION_TITLES.get(m[2] or m[3], '')} ", text)
    text = _LITERAL_BLOCK_MARK.sub(lambda m: ":" if m[0].startswith("::") else "", text)
    text = _LINTER_MARK.sub("", text)
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


def _without_code(text: str) -> str:
    """The paragraphs that are not doctests, without headings that are left with nothing under them."""
    kept: list[str] = []
    after_code = False
    for paragraph in text.split("\n\n"):
        # The output of an example is often a separate paragraph, indented or with no sentence in it.
        is_code = _is_code(paragraph) or (after_code and not is_prose(paragraph) and not paragraph[:1].isupper())
        if not is_code:
            if after_code and _is_heading(paragraph):
                _drop_headings(kept)
            kept.append(paragraph)
        after_code = is_code
    _drop_headings(kept)
    return "\n\n".join(kept)


def _is_heading(paragraph: str) -> bool:
    one_line = len(paragraph) < 40 and "\n" not in paragraph
    return one_line and (paragraph[:1] in "#_" or (paragraph[:1].isupper() and paragraph[-1].isalnum()))


def _drop_headings(paragraphs: list[str]) -> None:
    while paragraphs and _is_heading(paragraphs[-1]):
        paragraphs.pop()


def _is_mostly_known(text: str, repetition: Repetition) -> bool:
    """Whether over 40% of the text is in paragraphs that came before."""
    known = sum(len(paragraph) for paragraph in text.split("\n\n") if not repetition.is_new(paragraph))
    return known > 0.4 * len(text)


def _join(passages: Iterator[tuple[str, str]], repetition: Repetition) -> Iterator[str]:
    parts: list[str] = []
    length = 0
    for name, text in passages:
        text = _without_code(text)
        if len(text) < MIN_PASSAGE_CHARS or not is_prose(text) or _is_mostly_known(text, repetition):
            continue
        parts.append(f"{name}\n\n{text}" if name else text)
        length += len(parts[-1])
        if length >= MAX_DOCUMENT_CHARS:
            yield "\n\n".join(parts)
            parts, length = [], 0
    if length >= MIN_DOCUMENT_CHARS:
        yield "\n\n".join(parts)
