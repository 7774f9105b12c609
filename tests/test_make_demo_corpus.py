"""The demo's corpus and tokenizer: the same bytes everywhere, real documentation, readable by every library."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import xxhash
from conftest import ROOT

sys.path.insert(0, str(ROOT / "examples"))

from english import PlainWords, Repetition, english_of

from utils.manifest import damaged_files, read_manifest

SCRIPT = "examples/make_demo_corpus.py"
COLUMNS = ["text", "id", "dump", "url", "date", "file_path", "language", "language_score", "token_count"]


def read_rows(directory: Path) -> list[dict]:
    return [row for path in sorted(directory.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def fingerprints(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(directory.iterdir())}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(corpus, tokenizer, what the script printed)"""
    base = tmp_path_factory.mktemp("demo")
    command = [sys.executable, SCRIPT, f"--output_dir={base / 'corpus'}", f"--tokenizer_dir={base / 'tokenizer'}"]
    process = subprocess.run([*command, "--size=1MB"], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return base / "corpus", base / "tokenizer", process.stdout


def test_corpus_has_the_columns_of_fineweb_in_files_of_unlike_size(made):
    corpus, _, _ = made
    files = sorted(corpus.glob("*.parquet"))
    assert len(files) == 4
    rows_per_file = [pq.ParquetFile(path).metadata.num_rows for path in files]
    text_bytes = [sum(len(row["text"].encode()) for row in pq.read_table(path).to_pylist()) for path in files]
    assert all(pq.read_schema(path).names == COLUMNS for path in files)
    assert all(pq.ParquetFile(path).num_row_groups >= 2 for path in files)
    assert 3 < text_bytes[3] / text_bytes[0] < 5
    assert {pq.ParquetFile(path).metadata.row_group(0).column(0).compression for path in files} == {"ZSTD", "SNAPPY"}
    content = read_manifest(corpus, "corpus")["content"]
    assert content == {"documents": sum(rows_per_file), "text_bytes": sum(text_bytes)}
    assert 1_000_000 <= content["text_bytes"] < 1_100_000
    assert damaged_files(corpus, read_manifest(corpus)["files"]) == []


def test_documents_are_unique_and_say_nothing_of_this_machine(made):
    corpus, _, _ = made
    rows = read_rows(corpus)
    assert len({" ".join(row["text"].lower().split()) for row in rows}) == len(rows)
    assert len({row["id"] for row in rows}) == len(rows)
    assert all(row["file_path"].startswith(("stdlib/", "site-packages/")) for row in rows)
    here = [sysconfig.get_path("purelib"), sysconfig.get_path("stdlib"), str(ROOT)]
    assert not [row["url"] for row in rows for path in here if path in str(row)]


def test_the_task_asks_for_the_order_of_words_in_held_out_documents(made, tmp_path):
    corpus, _, _ = made
    command = [sys.executable, "examples/make_demo_task.py", f"--corpus_dir={corpus}", f"--output_dir={tmp_path / 't'}"]
    for said in ("demo_word_order, 15 questions", "demo_word_order, 15 questions"):  # again: nothing to do
        process = subprocess.run([*command, "--num_questions=15", "--val_fraction=0.1"], capture_output=True, text=True,
                                 cwd=ROOT)  # fmt: skip
        assert process.returncode == 0 and said in process.stdout, process.stderr
    held_out = [
        " ".join(row["text"].split())
        for row in read_rows(corpus)
        if xxhash.xxh3_64_intdigest(row["text"].encode()) < round(0.1 * 2**64)
    ]
    questions = [json.loads(line) for line in (tmp_path / "t" / "demo_word_order.jsonl").read_text().splitlines()]
    for question in questions:
        assert any(f"{question['text']} {question['endings'][question['right']]}" in text for text in held_out)
        assert len({tuple(sorted(ending.split())) for ending in question["endings"]}) == 1
        assert len(set(question["endings"])) == 4
    assert {question["right"] for question in questions} == {0, 1, 2, 3}


def test_text_is_documentation_in_whole_sentences(made):
    corpus, _, _ = made
    texts = [row["text"] for row in read_rows(corpus)]
    characters = sum(map(len, texts))
    assert sum(len(re.findall(r">>> |:(?:class|func|meth|ref):`|https?://", text)) for text in texts) == 0
    words = re.findall(r"[A-Za-z]+", " ".join(texts).lower())
    assert sum(word in ("the", "of", "and", "to", "is", "a", "in") for word in words) > 0.2 * len(words)
    assert sum("permission is hereby granted" in text.lower() for text in texts) == 0
    paragraphs = [paragraph for text in texts for paragraph in text.split("\n\n")]
    assert all("\n" not in paragraph and re.search(r"[.:?!][\"')]*$", paragraph) for paragraph in paragraphs)
    assert sum(map(len, re.findall(r"[A-Za-z' ,.]", " ".join(texts)))) > 0.95 * characters
    median = sorted(map(len, texts))[len(texts) // 2]
    assert 500 < median < 10_000


def test_no_paragraph_is_found_in_nearly_the_same_words_in_another_document(made):
    """So none that is held out for validation was read in training."""

    def runs(paragraph: str) -> set[tuple[str, ...]]:
        words = re.findall(r"[a-z][a-z'-]*", paragraph.lower())
        return {tuple(words[i : i + 6]) for i in range(len(words) - 5)}

    corpus, _, _ = made
    seen = set()
    for row in read_rows(corpus):
        own = [runs(paragraph) for paragraph in row["text"].split("\n\n")]
        # A parameter's name stands before its sentences, and adds a run or two.
        assert not [found for found in own if len(found & seen) > 0.5 * len(found) + 2], row["text"]
        seen.update(*own)


def test_what_is_not_a_sentence_and_what_is_nearly_known_is_left_out():
    good = "This reader keeps the whole of a file in memory, so that it can be read\nagain without the disk."
    text = f"""{good}

Parameters
----------
path : str or bytes
    The **name** of the file that is
    to be read, as a string or as bytes.

- Each of the items in a list is a paragraph, if it is a sentence of its own.
- read_all, read_some

Args:
    size (int, optional): The number of the bytes that are to be read at a time.
    mode: One of these.

3.1.2   17   20.5   0.25   of the rows
read_all(path_name, buffer_size=None, file_mode="r") is the_same as read_some(path_name, 0, 10) if it_is_there.

we fix the bug in which the reader was not to be found on a Monday
"""
    item = "Each of the items in a list is a paragraph, if it is a sentence of its own."
    assert list(english_of(text)) == [
        good.replace("\n", " "),
        "path: The name of the file that is to be read, as a string or as bytes.",
        item,
        "size: The number of the bytes that are to be read at a time.",
    ]
    repetition = Repetition()
    nearly = good.replace("whole of a file", "entire file")
    assert repetition.is_new(good) and not repetition.is_new(good) and repetition.is_new(nearly)
    repetition.end_document(is_kept=True)
    assert not repetition.is_new(good) and not repetition.is_new(nearly.upper())
    longer = f"{item} What follows here is said by nobody else, and it has many more words than the other one has."
    assert not repetition.is_new(f"{good} {longer} {longer.upper()}")  # all of it, within something longer
    assert repetition.is_new(item)
    repetition.end_document(is_kept=False)
    assert repetition.is_new(item)


def test_a_paragraph_is_of_words_that_many_files_use():
    common = [f"word{'abcdefghij'[i % 10]}{'klmnopqrst'[i // 10 % 10]}{'uvwxyz'[i // 100 % 6]}" for i in range(600)]
    files = [[" ".join(common)], [" ".join(common)], ["eigenvalue spline"]]
    assert all(PlainWords(files).make_up(words) for words in (" ".join(common), "eigenvalue spline"))
    few = PlainWords(files, num_words=600)
    assert few.make_up(" ".join(common).upper()) and few.make_up(" ".join([*common[:40], "eigenvalue"]))
    assert not few.make_up(" ".join([*common[:10], "eigenvalue"]))


def test_same_command_again_has_nothing_to_do(made, run_script):
    corpus, tokenizer, printed = made
    assert "nothing to do" not in printed
    before = fingerprints(corpus) | fingerprints(tokenizer)
    process = run_script(SCRIPT, f"--output_dir={corpus}", f"--tokenizer_dir={tokenizer}", "--size=1MB")
    assert process.stdout.count("nothing to do") == 2
    assert fingerprints(corpus) | fingerprints(tokenizer) == before


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--size=3MB"], "settings.size_bytes: was 1000000, is 3000000"),
        (["--size=1MB", "--source=code", "--num_files=2"], "settings.source: was 'prose', is 'code'"),
        (["--size=1MB", "--vocab_size=1000"], "settings.vocab_size: was 8192, is 1000"),
    ],
)
def test_other_settings_over_an_existing_output_are_refused(made, run_script, flags, message):
    corpus, tokenizer, _ = made
    before = fingerprints(corpus) | fingerprints(tokenizer)
    process = run_script(SCRIPT, f"--output_dir={corpus}", f"--tokenizer_dir={tokenizer}", *flags, check=False)
    assert process.returncode == 2
    assert message in process.stderr and "Traceback" not in process.stderr
    assert fingerprints(corpus) | fingerprints(tokenizer) == before


def test_foreign_directory_is_refused_and_left_alone(tmp_path, run_script):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("do not touch")
    process = run_script(SCRIPT, f"--output_dir={tmp_path / 'mine'}", check=False)
    assert process.returncode == 2
    assert f"--output_dir={tmp_path / 'mine'}" in process.stderr and "new or empty" in process.stderr
    assert os.listdir(tmp_path / "mine") == ["thesis.txt"]


def test_all_wrong_settings_are_named_at_once(tmp_path, run_script):
    process = run_script(
        SCRIPT, f"--output_dir={tmp_path / 'x'}", "--size=big", "--num_files=0", "--vocab_size=5", check=False
    )
    assert process.returncode == 2
    assert all(flag in process.stderr for flag in ("--size=big", "--num_files=0", "--vocab_size=5"))
    assert not (tmp_path / "x").exists()


def test_more_text_than_there_is_is_refused(tmp_path, run_script):
    """In an environment with four small packages, so that it is told in seconds."""
    python = small_environment(tmp_path / "env", "jsonargparse")  # with it, more than 1 MB under every Python
    process = run_in(python, f"--output_dir={tmp_path / 'x'}", "--size=1GB", check=False)
    assert process.returncode == 2
    assert re.search(r"--size=1GB: this environment holds only \d+\.\d MB .* --source=code", process.stderr)
    assert os.listdir(tmp_path) == ["env"]


def small_environment(directory: Path, *more: str) -> Path:
    """A separate virtual environment with three packages and `more`; it imports everything else from this one."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(directory)], check=True)
    source = Path(sysconfig.get_path("purelib"))
    target = next(directory.glob("lib*/python*/site-packages"))
    for package in ("jinja2", "click", "networkx", *more):
        shutil.copytree(source / package, target / package)
        (info,) = source.glob(f"{package}-*.dist-info")
        shutil.copytree(info, target / info.name)
    (target / "rest.pth").write_text(str(source))
    return directory / "bin" / "python"


def run_in(python: Path, *arguments: str, check: bool = True, env: dict | None = None) -> subprocess.CompletedProcess:
    return subprocess.run(
        [str(python), SCRIPT, *arguments],
        cwd=ROOT,
        check=check,
        capture_output=True,
        text=True,
        env={**os.environ, **(env or {})},
    )


def test_same_bytes_from_an_environment_in_another_place(tmp_path):
    made = []
    for name, hash_seed in (("one", "1"), ("a/longer/path", "2")):
        base = tmp_path / name
        python = small_environment(base / "env")
        # Files of another age, and with caches beside them, are the same files.
        for path in base.glob("env/lib*/python*/site-packages/*/*.py"):
            os.utime(path, (10**9, 10**9 + len(made)))
        cache = next(base.glob("env/lib*/python*/site-packages/click")) / "cache.txt"
        cache.write_text(
            "This is the cache of a program that was run in this place, and it is not for the corpus. " * 9
        )
        flags = [f"--output_dir={base / 'corpus'}", f"--tokenizer_dir={base / 'tokenizer'}", "--vocab_size=1000"]
        run_in(python, *flags, "--size=150kB", env={"PYTHONHASHSEED": hash_seed})
        made.append(fingerprints(base / "corpus") | fingerprints(base / "tokenizer"))
    assert made[0] == made[1]
    packages = {row["dump"] for row in read_rows(tmp_path / "one" / "corpus")}
    assert packages == {"python", "jinja2", "click", "networkx"}


def test_killed_run_leaves_nothing_under_the_name_and_is_finished_by_the_same_command(tmp_path, run_script):
    arguments = [f"--output_dir={tmp_path / 'corpus'}", "--source=code", "--size=60MB"]
    process = subprocess.Popen([sys.executable, SCRIPT, *arguments], cwd=ROOT)
    while not os.listdir(tmp_path) and process.poll() is None:
        os.sched_yield()
    process.send_signal(signal.SIGKILL)
    process.wait()
    (left_over,) = os.listdir(tmp_path)
    assert left_over.startswith(".tmp-corpus-")
    run_script(SCRIPT, *arguments)
    assert os.listdir(tmp_path) == ["corpus"]


def test_tokenizer_alone_is_trained_from_the_corpus_that_exists(made, tmp_path, run_script):
    corpus, tokenizer, _ = made
    process = run_script(SCRIPT, f"--output_dir={corpus}", "--size=1MB", f"--tokenizer_dir={tmp_path / 'again'}")
    assert process.stdout.count("nothing to do") == 1
    assert fingerprints(tmp_path / "again") == fingerprints(tokenizer)


def test_tokenizer_is_read_alike_by_litgpt_transformers_tokenizers_and_gigatoken(made):
    import gigatoken
    from litgpt.tokenizer import Tokenizer as LitGPTTokenizer
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    from utils.tokenizer import read_tokenizer_info

    corpus, directory, _ = made
    info = read_tokenizer_info(directory)
    assert (info.vocab_size, info.bos_id, info.eos_id) == (8192, 8190, 8191)
    assert info.adds_bos and not info.adds_eos

    texts = [row["text"] for row in read_rows(corpus)[:50]] + ["", " ", "naïve café 北京 🙂\n\n\n1234567"]
    reference = Tokenizer.from_file(str(directory / "tokenizer.json"))
    expected = [encoding.ids for encoding in reference.encode_batch(texts)]
    assert all(ids[0] == 8190 for ids in expected)
    litgpt_tokenizer = LitGPTTokenizer(directory)
    assert [litgpt_tokenizer.encode(text).tolist() for text in texts if text] == [
        ids for ids, text in zip(expected, texts) if text
    ]
    assert (litgpt_tokenizer.bos_id, litgpt_tokenizer.eos_id) == (8190, 8191)
    transformers_tokenizer = AutoTokenizer.from_pretrained(directory)
    assert transformers_tokenizer(texts)["input_ids"] == expected
    assert transformers_tokenizer.eos_token_id == 8191 and len(transformers_tokenizer) == 8192
    fast = gigatoken.Tokenizer(str(directory / "tokenizer.json"))
    assert [[8190, *ids] for ids in fast.encode_batch(texts, parallel=False).to_list()] == expected
    assert [reference.decode(ids) for ids in expected] == texts
