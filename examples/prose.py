"""Documentation text for people, out of Python source, package descriptions, reST and Markdown.

A regular expression finds the triple-quoted strings: `ast` would parse 25,000 files for minutes. english.py tells what
of it is English.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator

from english import Repetition, english_of

MIN_PASSAGE_CHARS = 40
MIN_DOCUMENT_CHARS = 200
MAX_DOCUMENT_CHARS = 12_000

_STRING = re.compile(r"(?P<prefix>[a-zA-Z]*)(?P<quote>\"\"\"|''')(?P<body>.*?)(?P=quote)", re.DOTALL)

_NOT_DOCUMENTATION = re.compile(
    r"(^|/)(tests?|testing|_vendor|licenses?|LICEN[CS]E[^/]*|COPYING[^/]*)(/|$)|top_level|SOURCES|entry_points"
)
_LICENCE = re.compile(
    r"permission is hereby granted|redistribution and use in source|apache license\s+version 2", re.IGNORECASE
)


def passages_of(name: str, content: str) -> Iterator[str]:
    """The documentation in one file, whatever it is made of, as plain text.

    Args:
        name: with '/'; only its ending and its folders matter.
        content: of the file.
    """
    if _NOT_DOCUMENTATION.search(name):
        return
    if name.endswith((".py", ".pyi", ".pyx")):
        yield from docstrings(content)
    else:
        if name.endswith("METADATA"):
            _, _, content = content.partition("\n\n")
        if _LICENCE.search(content[:3000]):
            return
        yield clean_markup(content)


def paragraphs_of(name: str, content: str) -> Iterator[str]:
    """The English of one file, paragraph by paragraph; the arguments are those of `passages_of`."""
    for passage in passages_of(name, content):
        yield from english_of(passage)


def docstrings(source: str) -> Iterator[str]:
    """The cleaned text of the triple-quoted strings of Python source."""
    for match in _STRING.finditer(source):
        if len(match["body"]) < MIN_PASSAGE_CHARS or set(match["prefix"].lower()) & {"f", "b"}:
            continue
        body = match["body"]
        if "r" not in match["prefix"].lower():
            body = body.replace("\\\n", "").replace("\\\\", "\\")
        yield clean_markup(inspect.cleandoc(body))


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


def join(paragraphs: Iterable[str], repetition: Repetition) -> Iterator[str]:
    """Documents of at most about MAX_DOCUMENT_CHARS characters, of a file's paragraphs that are new.

    Args:
        repetition: of the whole corpus; the order of calls decides which of two equal paragraphs stays.
    """
    parts: list[str] = []
    length = 0
    for paragraph in paragraphs:
        if not repetition.is_new(paragraph):
            continue
        parts.append(paragraph)
        length += len(paragraph)
        if length >= MAX_DOCUMENT_CHARS:
            repetition.end_document(is_kept=True)
            yield "\n\n".join(parts)
            parts, length = [], 0
    is_kept = length >= MIN_DOCUMENT_CHARS
    repetition.end_document(is_kept)
    if is_kept:
        yield "\n\n".join(parts)
