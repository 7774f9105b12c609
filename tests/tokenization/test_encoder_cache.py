"""What the comparison of the encoders found is remembered, and nothing else is taken for it."""

from __future__ import annotations

import json
import os

import pytest
import tokenizer_kinds as kinds

from tokenization import encoder_cache
from tokenization.encoder_cache import Findings, key_of, path_of, recall, remember
from tokenization.encoder_choice import EncoderChoice
from tokenization.prepared_tokenizer import prepare_tokenizer

FINDINGS = Findings(
    EncoderChoice("gigatoken", "", ((0x301, 0x301), (0x1FAE8, 0x10FFFF)), ("<x>", "\ud7ff é"), num_compared=31196),
    (90e6, 1.25e6),
    ((1570, 1500),),
)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "pretrain-toolkit"


def test_what_was_found_comes_back_as_it_was():
    assert recall("0" * 64) is None
    remember("0" * 64, FINDINGS)
    assert recall("0" * 64) == FINDINGS
    assert recall("1" * 64) is None


def test_the_second_time_nothing_is_compared(cache):
    content = json.dumps(kinds.KINDS["a word as token"]()).encode()
    first = prepare_tokenizer(content, False, "--tokenizer_dir=TOK")
    (path,) = cache.iterdir()
    written = path.stat().st_mtime_ns
    second = prepare_tokenizer(content, False, "--tokenizer_dir=TOK")
    assert (first.remembered, second.remembered) == (False, True)
    assert second == first._replace(remembered=True)
    assert second.choice.literals == ("the", "is")
    assert [path.stat().st_mtime_ns for path in cache.iterdir()] == [written]


def test_the_dropout_is_said_each_time():
    content = json.dumps(kinds.KINDS["dropout"]()).encode()
    for remembered in (False, True):
        prepared = prepare_tokenizer(content, False, "--tokenizer_dir=TOK")
        assert prepared.remembered == remembered
        assert "dropout of 0.5" in prepared.choice.warnings[0]


def test_all_that_the_result_depends_on_has_its_own_entry(monkeypatch):
    content = json.dumps(kinds.byte_level()).encode()
    keys = [key_of(content, False), key_of(content, True), key_of(content + b" ", False)]
    monkeypatch.setattr(encoder_cache.unicodedata, "unidata_version", "99.0.0")
    keys.append(key_of(content, False))
    monkeypatch.setattr(encoder_cache.importlib.metadata, "version", lambda name: "99.0")
    keys.append(key_of(content, False))
    monkeypatch.setattr(encoder_cache, "SOURCES", ("encoder.py",))
    keys.append(key_of(content, False))
    assert len(set(keys)) == len(keys)


def test_every_source_of_the_comparison_counts():
    """What decide() and what it calls are made of; a module that is split off must be added."""
    folder = encoder_cache.Path(encoder_cache.__file__).parent
    names = {path.name for path in folder.glob("encoder*.py")} | {"line_cuts.py", "prepared_tokenizer.py"}
    assert names == set(encoder_cache.SOURCES)


def damaged(content: bytes, how: str) -> bytes:
    entry = json.loads(content)
    if how == "cut":
        return content[: len(content) // 2]
    if how == "a bit":
        return content.replace(b"1500", b"1501")
    if how == "empty":
        return b""
    if how == "another kind of file":
        return json.dumps([1, 2, 3]).encode()
    if how == "not text":
        return b"\x80\x81" + content
    if how == "a backend of somebody else":
        entry["findings"]["choice"]["backend"] = "sentencepiece"
    elif how == "a range that ends before it begins":
        entry["findings"]["choice"]["code_points"] = [[0x400, 0x300]]
    elif how == "ASCII":
        entry["findings"]["choice"]["code_points"] = [[0x41, 0x300]]
    elif how == "a field too many":
        entry["findings"]["choice"]["fast"] = True
    elif how == "a field too few":
        del entry["findings"]["choice"]["literals"]
    elif how == "a literal that is none":
        entry["findings"]["choice"]["literals"] = [""]
    elif how == "an id that is none":
        entry["findings"]["renumbered"] = [["1", 2]]
    elif how == "a line end that is none":
        entry["findings"]["choice"]["line_end"] = "\n"
    entry["checksum"] = encoder_cache._checksum("0" * 64, entry["findings"])
    return json.dumps(entry).encode()


@pytest.mark.parametrize(
    "how",
    [
        *("cut", "a bit", "empty", "another kind of file", "not text", "a backend of somebody else"),
        *("a range that ends before it begins", "ASCII", "a field too many", "a field too few"),
        *("a literal that is none", "an id that is none", "a line end that is none"),
    ],
)
def test_a_damaged_entry_is_not_trusted(how):
    remember("0" * 64, FINDINGS)
    path = path_of("0" * 64)
    path.write_bytes(damaged(path.read_bytes(), how))
    assert recall("0" * 64) is None
    remember("0" * 64, FINDINGS)
    assert recall("0" * 64) == FINDINGS


def test_an_entry_under_another_name_or_of_another_user_is_not_trusted():
    remember("0" * 64, FINDINGS)
    path_of("1" * 64).write_bytes(path_of("0" * 64).read_bytes())
    assert recall("1" * 64) is None
    if os.geteuid() == 0:
        os.chown(path_of("0" * 64), 12345, -1)
        assert recall("0" * 64) is None


def test_without_a_place_for_it_the_work_goes_on(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    content = json.dumps(kinds.byte_level()).encode()
    assert not prepare_tokenizer(content, False, "--tokenizer_dir=TOK").remembered
    assert not prepare_tokenizer(content, False, "--tokenizer_dir=TOK").remembered


def test_a_relative_place_does_not_count(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert path_of("0") == tmp_path / "home" / ".cache" / "pretrain-toolkit" / "encoder-0.json"


def test_the_run_says_that_it_remembers(parquet_dir, tokenizer_dir, tmp_path, run_script):
    arguments = [f"--input_dir={parquet_dir}", f"--tokenizer_dir={tokenizer_dir}", f"--output_dir={tmp_path / 'out'}"]
    said = [run_script("optimize_dataset.py", *arguments, "--dry_run").stdout for _ in range(2)]
    assert " test texts; a line" in said[0]
    assert " test texts, remembered; a line" in said[1]


def test_why_gigatoken_could_not_load_is_asked_again_each_time(cache):
    """It may have been this run's trouble alone."""
    content = json.dumps(kinds.KINDS["lowercase"]()).encode()
    for _ in range(2):
        prepared = prepare_tokenizer(content, False, "--tokenizer_dir=TOK")
        assert "cannot load" in prepared.choice.reason and not prepared.remembered
    assert not cache.exists()
