"""Text made for benchmarks is the same for a seed, of FineWeb's shape, and grows in words as the real text does; and
commands that are killed on the way."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pydoc_data.topics import topics

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import numpy as np
import pyarrow.parquet as pq
import supervised
import web_text
import web_words
import xxhash


@pytest.fixture(scope="module")
def vocabulary():
    """Of the reference of Python, half a million bytes of English."""
    return web_words.Vocabulary(list(topics.values()))


def make(vocabulary, path, number=0, seed=0):
    settings = web_text.Settings(real_dir="", output_dir="", document_words=400, seed=seed)
    entry = web_text.make_file(vocabulary, path, number, 2500, settings)
    return {key: value for key, value in entry.items() if key not in ("seconds", "name")}


def test_a_file_is_the_same_whenever_it_is_made_and_no_other_is_like_it(vocabulary, tmp_path):
    first, again = make(vocabulary, tmp_path / "a.parquet"), make(vocabulary, tmp_path / "b.parquet")
    assert first == again and (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()
    others = {make(vocabulary, tmp_path / "c.parquet", **of)["digest"] for of in ({"number": 1}, {"seed": 1})}
    assert len(others) == 2 and first["digest"] not in others


def test_a_file_holds_what_its_line_says(vocabulary, tmp_path):
    entry = make(vocabulary, tmp_path / "a.parquet")
    file = pq.ParquetFile(tmp_path / "a.parquet")
    texts = file.read()["text"].to_pylist()
    assert [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] == [1000, 1000, 500]
    assert len(texts) == entry["documents"] == 2500
    assert sum(len(text.split()) for text in texts) == entry["words"]
    assert xxhash.xxh3_128("".join(texts).encode()).hexdigest() == entry["digest"]
    assert len("".join(texts).encode()) == entry["text_bytes"]
    assert all(text == text.strip() for text in texts) and len(set(texts)) == len(texts)
    assert len(set(file.read()["id"].to_pylist())) == len(texts)
    assert np.mean([len(text.split()) for text in texts]) == pytest.approx(400, rel=0.1)


def test_distinct_words_grow_as_in_the_real_text_and_go_on_growing(vocabulary):
    import pyarrow as pa

    words = vocabulary.num_real_words
    real = web_words.growth_of([pa.array(list(topics.values()))], web_words.marks_up_to(words))
    random = np.random.default_rng(0)
    lengths = np.full(500, 400)
    texts = (web_text.draw_documents(vocabulary, random, lengths) for _ in range(12))
    made = web_words.growth_of(texts, sorted({words, *web_words.marks_up_to(2_000_000)}))
    distinct = dict(zip(made.num_words, made.distinct))
    assert distinct[words] == pytest.approx(real.distinct[-1], rel=0.3)
    assert made.exponent == pytest.approx(real.exponent, abs=0.12)
    assert distinct[2_000_000] > 1.3 * distinct[1_000_000]  # a list of words would have come to its end


def test_words_are_drawn_as_often_as_in_the_real_text(vocabulary):
    random = np.random.default_rng(0)
    text = " ".join(web_text.draw_documents(vocabulary, random, np.full(500, 400)).to_pylist())
    made, real = text.split(), " ".join(topics.values()).split()
    for word in ("the", "of", "object", "is"):
        assert made.count(word) / len(made) == pytest.approx(real.count(word) / len(real), rel=0.15)


def test_coined_words_follow_from_their_number_and_differ(vocabulary):
    ranks = np.arange(200_000, dtype=np.uint64)
    parts = np.array(vocabulary.parts(ranks))
    assert (parts >= vocabulary.tail_piece).all() and (parts < vocabulary.num_pieces).all()
    pieces = np.array(vocabulary.pieces.to_pylist(), dtype=object)
    words = pieces[parts[0]] + pieces[parts[1]] + pieces[parts[2]]
    assert len({word.strip() for word in words}) > 0.99 * len(words)
    assert (np.array(vocabulary.parts(ranks[77:99])) == parts[:, 77:99]).all()


def test_a_command_is_killed_with_all_that_it_started_and_given_again(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import pathlib, subprocess, sys, time\n"
        "here = pathlib.Path(sys.argv[1])\n"
        "if (here / 'child').exists():\n"
        "    sys.exit(print('ended'))\n"
        "child = subprocess.Popen(['sleep', '100'], start_new_session=True)\n"
        "(here / 'child').write_text(str(child.pid))\n"
        "time.sleep(100)\n"
    )
    child = tmp_path / "child"
    kill = supervised.Kill(lambda: child.exists() and bool(child.read_text()), "with its child")
    stage = supervised.run_stage("a command", str(script), tmp_path, kills=[kill], log=tmp_path / "log")
    assert stage.killed == ["with its child"] and len(stage.tries_s) == 2 and stage.output == "ended\n"
    assert stage.seconds == pytest.approx(sum(stage.tries_s))
    deadline = time.monotonic() + 10
    while is_running(int(child.read_text())) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(int(child.read_text()))


def test_a_command_that_ends_before_its_kill_was_not_killed(tmp_path, capsys):
    """It has ended, unnoticed, when the kill is due."""
    script = tmp_path / "script.py"
    script.write_text("import pathlib, sys\npathlib.Path(sys.argv[1], 'begun').touch()")

    def begun_and_ended() -> bool:
        if not (tmp_path / "begun").exists():
            return False
        time.sleep(1)
        return True

    kill = supervised.Kill(begun_and_ended, "too late")
    stage = supervised.run_stage("a command", str(script), tmp_path, kills=[kill], log=tmp_path / "log")
    assert stage.killed == [] and len(stage.tries_s) == 1
    assert "ended before it could be killed too late" in "".join(capsys.readouterr())


def is_running(pid):
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()
    return bool(state) and not state.startswith("Z")


def test_what_the_ends_counted_is_compared():
    from ten_billion_tokens import unequal

    counts = {"made": {"documents": 3}, "step 1": {"documents": 3, "tokens": 10}, "step 2": {"tokens": 10}}
    assert unequal(counts) == []
    counts["step 2"]["tokens"] = 9
    assert unequal(counts) == ["tokens"]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_nothing_is_lost_between_text_and_training(tmp_path, run_script):
    report = tmp_path / "report.md"
    # Step 2 makes three chunks of them, so that it goes on for a tenth of a second and more after the first one.
    flags = ("--tokens=40e6", "--real_size=4MB", "--vocab_size=8000", "--steps=3", f"--output={report}")
    run_script("benchmarks/ten_billion_tokens.py", f"--work_dir={tmp_path / 'work'}", *flags, timeout=1100)
    said = report.read_text()
    stages = json.loads((tmp_path / "work" / "stages.json").read_text())
    for stage, killed in (
        (stages["step 1"], "with two fifths of the units done"),
        (stages["step 2"]["train"], "with the first chunks in the target"),
    ):
        assert stage["killed"] == [killed] and len(stage["tries_s"]) == 2 and killed in said
    assert "The first batch of training is what" in said
    assert not (tmp_path / "work" / "text").exists()
