"""JSON lines as input of step 1: which lines belong to which range, which texts they hold, and what is damaged."""

from __future__ import annotations

import gzip
import json
import os
import random
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from input_kinds import compressed

from tokenization import json_text, jsonl, line_ranges
from tokenization.input_files import FileEntry
from tokenization.job import InputRange, InputStamp, Job, SplitRecord, UnitRecord
from tokenization.json_text import texts_of_lines
from tokenization.jsonl import DamagedCompression, DamagedLine, read_summary, stream_jsonl
from utils.errors import UserError


def job_of(path: Path, *, quarantine: bool = False, stamp: InputStamp | None = None) -> Job:
    return Job(
        input_dir=str(path.parent), paths=(path.name,), output_dir="", text_column="text", tokenizer_sha256="",
        dtype="uint16", chunk_tokens=1, bos_id=0, eos_id=None, val_threshold=0, parse_special_tokens=False,
        shuffle_seed=None, quarantine=quarantine, stamps=(stamp,) if stamp else (),
    )  # fmt: skip


def read(path: Path, first: int = 0, last: int | None = None, **settings) -> tuple[list[str | None], UnitRecord]:
    record = UnitRecord(0, "", SplitRecord(), SplitRecord())
    piece = InputRange(0, first, path.stat().st_size if last is None else last)
    return [
        text for texts in stream_jsonl(job_of(path, **settings), piece, record) for text in texts.to_pylist()
    ], record


# Ranges


@pytest.mark.parametrize("content", [
    b'{"text":"a"}\n{"text":"bb"}\n{"text":"c"}\n',
    b'{"text":"a"}\r\n\r\n{"text":"bb"}\n\n\n{"text":"c"}',
    b'\xef\xbb\xbf{"text":"a"}\n{"text":"bb","x":"0123456789012345678901234567890123456789"}\n{"text":"c"}',
    b'\n\n{"text":"a"}\n{"text":"bb"}\n  \n{"text":"c"}\n \n',
])  # fmt: skip
@pytest.mark.parametrize("read_bytes", [1, 3, 16, 4 << 20])
def test_cuts_anywhere_give_each_line_once(content, read_bytes, tmp_path, monkeypatch):
    monkeypatch.setattr(line_ranges, "READ_BYTES", read_bytes)
    monkeypatch.setattr(line_ranges, "SHORT_READ_BYTES", read_bytes)
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    size = len(content)
    cuts = [(cut, size) for cut in range(size + 1)]
    cuts += [(first, second) for first in range(0, size, 5) for second in range(first, size, 5)]
    for first, second in cuts:
        parts = [read(path, a, b) for a, b in ((0, first), (first, second), (second, size)) if a < b]
        assert [text for texts, _ in parts for text in texts] == ["a", "bb", "c"], (first, second)
        assert sum(record.line_bytes for _, record in parts) == size


def test_a_line_belongs_to_the_range_in_which_it_begins(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text":"a"}\n{"text":"b"}\n')
    assert [read(path, 0, last)[0] for last in (1, 13, 14)] == [["a"], ["a"], ["a", "b"]]
    assert [read(path, first)[0] for first in (0, 1, 13, 14)] == [["a", "b"], ["b"], ["b"], []]


def test_pieces_cover_a_file_and_know_their_rows_where_they_are_asked_for(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": "x" * (i % 300)}) + "\n" * (1 + i % 2) for i in range(2000)))
    summary = read_summary(str(tmp_path), FileEntry("a.jsonl", path.stat().st_size), "text")
    for max_rows in (None, 10**6):
        pieces = list(summary.pieces(40_000, max_rows))
        assert len(pieces) > 20
        assert [0, *(piece.last for piece in pieces)] == [*(piece.first for piece in pieces), path.stat().st_size]
    assert sum(piece.rows for piece in pieces) == sum(1 for line in path.read_text().split("\n") if line)


# Texts

ODD_LINES = [
    (r'{"text": "a\nb\t\"\\ \u00e9 \ud83d\ude42 \u0000"}', 'a\nb\t"\\ é 🙂 \0'),
    ('{"text": "é中🙂"}', "é中🙂"),
    ('{"id": 1}', None),
    ('{"text": null}', None),
    ('{"text": ""}', ""),
    ('{"o": 1, "text": "x"}', "x"),
    ('{"o": "s", "text": "x"}', "x"),
    ('{"o": [1, {"text": "no"}], "text": "x", "meta": {"text": "no"}}', "x"),
    ('{"text": "first", "text": "last"}', "last"),
    ('{"o": 1, "o": 2, "text": "x"}', "x"),
    (r'{"te\u0078t": "x"}', "x"),
    ('{"o": NaN, "p": -Infinity, "text": "x"}', "x"),
    ('{"o": 1e999, "text": "x"}', "x"),
    ('{"o": %s, "text": "x"}' % ("9" * 5000), "x"),
    (r'{"o": "\ud800", "text": "x"}', "x"),
    ('{"o": %s, "text": "x"}' % ("[" * 50_000 + "]" * 50_000), "x"),
    ('\t {"text" : "x" } \r', "x"),
    (b'{"o": "\xff", "text": "x"}', "x"),
]
DAMAGED_LINES = [
    (r'{"text": "\ud800"}', "half of a surrogate pair"),
    (b'{"text": "\xff"}', "not UTF-8"),
    ('{"text": 5}', "column 'text' is a number, not text"),
    ('{"text": ["a"]}', "column 'text' is a list, not text"),
    ('{"text": "a"', "not JSON (Expecting ',' delimiter: character 13)"),
    ('{"text": "a', "not JSON (Unterminated string"),
    ('{"text": "a"}]', "not JSON (Extra data: character 14)"),
    ('{"text": "a"} {"text": "b"}', "not JSON (Extra data"),
    ('{"text": "a\tb"}', "not JSON (Invalid control character"),
    ('["a"]', "not a JSON object, but a list"),
    ('"a"', "not a JSON object, but a text"),
    ("{", "not JSON"),
    ('\ufeff{"text": "x"}', "not JSON"),
]


def as_bytes(line: str | bytes) -> bytes:
    return line.encode() if isinstance(line, str) else line


@pytest.mark.parametrize("surroundings", [0, 1, 40])
def test_odd_lines_give_the_texts_that_they_hold(surroundings):
    around = [(f'{{"text": "{i}"}}', str(i)) for i in range(surroundings)]
    for line, text in ODD_LINES:
        lines = [*around, (line, text), *around]
        texts, damaged = texts_of_lines(b"\n".join(as_bytes(line) for line, _ in lines) + b"\n", "text")
        assert texts.to_pylist() == [text for _, text in lines] and not damaged, line[:80]


@pytest.mark.parametrize("surroundings", [0, 1, 40])
def test_a_damaged_line_is_named_and_costs_no_other(surroundings):
    around = [f'{{"text": "{i}"}}'.encode() for i in range(surroundings)]
    for line, reason in DAMAGED_LINES:
        texts, damaged = texts_of_lines(b"\n".join([*around, as_bytes(line), *around]), "text")
        assert texts.to_pylist() == 2 * list(map(str, range(surroundings))), line
        ((position, said),) = damaged
        assert position == surroundings and reason in said, said


@settings(deadline=None)
@given(st.lists(st.sampled_from([*ODD_LINES[:13], *ODD_LINES[-2:], *DAMAGED_LINES, ("", None)]), max_size=12))
def test_what_a_line_gives_does_not_depend_on_the_lines_around_it(lines):
    texts, damaged = texts_of_lines(b"\n".join(as_bytes(line) for line, _ in lines), "text")
    alone = [texts_of_lines(as_bytes(line), "text") for line, _ in lines]
    assert texts.to_pylist() == [text for texts, _ in alone for text in texts.to_pylist()]
    assert damaged == [(i, said) for i, (_, parts) in enumerate(alone) for _, said in parts]


def test_arrow_reads_plain_lines_and_python_the_rest(monkeypatch):
    """Else the rate would be lost without a word."""
    asked = []
    monkeypatch.setattr(json_text, "read_row", lambda line: asked.append(line) or json.loads(line))
    lines = [json.dumps({"text": f"é{i}\n", "id": i, "tags": ["a", {"b": i}]}).encode() for i in range(100)]
    for end in (b"\n", b"\r\n", b" \n", b"\n\n"):
        assert len(texts_of_lines(end.join(lines), "text")[0]) == 100 and not asked
    lines[50] = b'{"text": "a", "text": "b"}'
    assert len(texts_of_lines(b"\n".join(lines), "text")[0]) == 100 and asked == [lines[50]]


# Damage


def test_a_damaged_line_is_named_by_its_number_in_the_file(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [f'{{"text": "{i}"}}' for i in range(1000)]
    lines[700] = lines[800] = '{"text": 1}'
    lines[3] = ""
    path.write_text("\n".join(lines))
    for first in (0, 5000, sum(len(line) + 1 for line in lines[:700])):
        with pytest.raises(DamagedLine) as caught:
            read(path, first)
        assert (caught.value.line, caught.value.place) == (701, "line 701")
        texts, record = read(path, first, quarantine=True)
        assert [entry["line"] for entry in record.quarantined] == [701, 801]
        assert texts == [str(i) for i in range(1000) if i not in (3, 700, 800)][-len(texts) :] and len(texts) > 290


def test_many_damaged_lines_do_not_fill_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(jsonl, "MAX_LINES_LISTED", 10)
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x"}\n' + "{\n" * 500)
    texts, record = read(path, quarantine=True)
    assert texts == ["x"] and len(record.quarantined) == 10
    assert sum(entry["rows"] for entry in record.quarantined) == 500


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "jsonl.zst"])
def test_a_line_that_is_too_long_is_left_out_in_bounded_memory(tmp_path, monkeypatch, ending):
    monkeypatch.setattr(line_ranges, "MAX_LINE_BYTES", 2 << 20)
    monkeypatch.setattr(line_ranges, "READ_BYTES", 1 << 20)
    content = b'{"text":"a"}\n{"text":"%s"}\n{"text":"b"}\n{"text":"%s"}' % (b"x" * (64 << 20), b"y" * (3 << 20))
    path = tmp_path / f"a.{ending}"
    path.write_bytes(content if ending == "jsonl" else compressed(content, ending[-3:].strip(".")))
    with pytest.raises(DamagedLine, match=r"it is 67\.1 MB long"):
        read(path)
    tracemalloc.start()
    texts, record = read(path, quarantine=True)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert texts == ["a", "b"] and [entry["line"] for entry in record.quarantined] == [2, 4]
    assert peak < 16 << 20
    assert record.line_bytes == (len(content) if ending == "jsonl" else 0)


def test_a_document_longer_than_a_read_is_whole(tmp_path):
    path = tmp_path / "a.jsonl"
    texts = ["a", "x" * (9 << 20), "é" * (5 << 20), "b"]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    assert read(path)[0] == texts
    cut = path.stat().st_size // 2
    assert read(path, 0, cut)[0] + read(path, cut)[0] == texts


# Compressed


@pytest.mark.parametrize("ending", ["gz", "zst"])
def test_compressed_lines_are_read_whole_in_several_parts_too(tmp_path, ending):
    lines = [json.dumps({"text": f"text {i}"}) + "\n" for i in range(3000)]
    parts = [compressed("".join(lines[a : a + 1000]).encode(), ending) for a in (0, 1000, 2000)]
    path = tmp_path / f"a.jsonl.{ending}"
    path.write_bytes(b"".join(parts))
    assert read(path)[0] == [f"text {i}" for i in range(3000)]


@pytest.mark.parametrize("damage", ["truncated", "last_byte", "garbage_after", "flipped"])
@pytest.mark.parametrize("ending", ["gz", "zst"])
def test_damaged_compression_is_no_text_lost_in_silence(tmp_path, ending, damage):
    rng = random.Random(0)
    content = "".join(json.dumps({"text": str(rng.random())}) + "\n" for _ in range(20_000)).encode()
    data = compressed(content, ending)
    path = tmp_path / f"a.jsonl.{ending}"
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 0xFF
    if (ending, damage) == ("zst", "flipped"):
        pytest.skip("Arrow writes zstd without a checksum")
    path.write_bytes({
        "truncated": data[: len(data) * 3 // 4], "last_byte": data[:-1], "garbage_after": data + b"xx",
        "flipped": bytes(flipped),
    }[damage])  # fmt: skip
    for quarantine in (False, True):
        with pytest.raises(DamagedCompression):
            read(path, quarantine=quarantine)


# What planning sees


def summary_fault(tmp_path: Path, name: str, content: bytes) -> str:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as caught:
        read_summary(str(tmp_path), FileEntry(name, len(content)), "text")
    return str(caught.value)


def test_files_that_cannot_be_used_say_why(tmp_path):
    assert summary_fault(tmp_path, "a.jsonl", b'{"body":"a","id":1}\n' * 9) == "no column 'text' (it has body, id)"
    assert summary_fault(tmp_path, "a.jsonl", b'{"text":[1]}\n' * 9) == "column 'text' is a list, not text"
    assert "not JSON lines (its first line is not JSON" in summary_fault(tmp_path, "a.jsonl", b"hello\nworld\n")
    assert "not a JSON object, but a list" in summary_fault(tmp_path, "a.jsonl", b'[{"text":"a"},{"text":"b"}]')
    assert "not a readable gzip file" in summary_fault(tmp_path, "a.jsonl.gz", b'{"text":"a"}\n' * 9)
    assert "it is empty" in summary_fault(tmp_path, "a.jsonl.zst", b"")
    assert "Truncated" in summary_fault(tmp_path, "a.jsonl.gz", gzip.compress(b'{"text":"a"}\n' * 9)[:-4])


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "jsonl.zst"])
def test_the_size_of_the_text_is_estimated_from_a_sample(tmp_path, ending):
    rng = random.Random(0)
    texts = ["".join(rng.choices("abcdefgh \n", k=rng.randrange(2000))) for _ in range(5000)]
    content = "".join(json.dumps({"id": "x" * 400, "text": text}) + "\n" for text in texts).encode()
    path = tmp_path / f"a.{ending}"
    path.write_bytes(content if ending == "jsonl" else compressed(content, ending[-3:].strip(".")))
    summary = read_summary(str(tmp_path), FileEntry(path.name, path.stat().st_size), "text")
    estimated = sum(piece.text_bytes for piece in summary.pieces(100_000, None))
    assert estimated == pytest.approx(sum(map(len, texts)), rel=0.15)


@pytest.mark.parametrize("when", ["before", "during"])
@pytest.mark.parametrize("change", ["longer", "same_size_and_time", "in_place"])
def test_a_replaced_file_is_never_taken_for_the_planned_one(tmp_path, when, change):
    if (when, change) == ("during", "same_size_and_time"):
        pytest.skip("the open file is still the old one, and is read to its end")
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f'{{"text": "{i:09} {"x" * 900}"}}\n' for i in range(20_000)))
    status = path.stat()
    summary = read_summary(str(tmp_path), FileEntry("a.jsonl", status.st_size), "text")
    stamp = InputStamp(status.st_size, status.st_mtime_ns, summary.fingerprint)

    def replace():
        content = path.read_bytes()
        if change == "in_place":
            with open(path, "r+b") as file:
                file.write(b'{"text": "9')
            os.utime(path, ns=(0, status.st_mtime_ns + 1))
            return
        new = tmp_path / "new"
        new.write_bytes(content + b"\n" if change == "longer" else content[:-9] + b"y" + content[-8:])
        os.utime(new, ns=(0, status.st_mtime_ns))
        os.replace(new, path)

    if when == "before":
        replace()
    texts = stream_jsonl(
        job_of(path, stamp=stamp), InputRange(0, 0, status.st_size), UnitRecord(0, "", SplitRecord(), SplitRecord())
    )
    with pytest.raises(UserError, match=r"a\.jsonl was replaced or changed"):
        if when == "during":
            next(texts)
            replace()
        list(texts)
