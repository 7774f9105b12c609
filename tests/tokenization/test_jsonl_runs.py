"""Step 1 on JSON lines, plain, compressed and beside parquet: the same documents, units, quarantine."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from conftest import said_by, write_parquet
from input_kinds import write_jsonl
from test_optimize_dataset import decoded, user_error
from test_optimize_dataset_inputs import arguments, inputs_of, num_documents, paths_in

from tokenization.input_names import describe_inputs
from utils.manifest import read_manifest


def quarantined(output_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (output_dir / "quarantine.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def odd_texts(documents) -> list[str | None]:
    return [*documents[:150], None, "", 'é中🙂 \0 \u2028 \\ " \r\n\t</s>', *documents[150:300], "x" * 50_000, None]


@pytest.fixture(scope="module")
def from_parquet(tmp_path_factory, odd_texts, tokenizer_dir) -> dict[str, list[list[int]]]:
    """The documents of each split as token ids, in order."""
    from conftest import run_a_script

    directory = tmp_path_factory.mktemp("parquet")
    write_parquet(directory / "in" / "a.parquet", odd_texts)
    run_a_script("optimize_dataset.py", *arguments(directory, tokenizer_dir))
    return {split: decoded(directory / "out", split) for split in ("train", "val")}


@pytest.mark.parametrize(
    "kinds", [["jsonl"], ["jsonl.gz"], ["jsonl.zst"], ["parquet", "jsonl", "jsonl.zst", "jsonl.gz"]]
)
def test_documents_are_those_of_parquet_token_for_token(
    kinds, odd_texts, from_parquet, tokenizer_dir, tmp_path, run_script
):
    share = -(-len(odd_texts) // len(kinds))
    for i, kind in enumerate(kinds):
        write = write_parquet if kind == "parquet" else write_jsonl
        write(tmp_path / "in" / f"{i}.{kind}", odd_texts[i * share : (i + 1) * share])
    said = run_script(
        "optimize_dataset.py", *arguments(tmp_path, tokenizer_dir, "--unit_bytes=50000", "--chunk_tokens=8000")
    ).stdout
    assert "JSON lines file" in said and ("parquet file" in said) == ("parquet" in kinds)
    for split, expected in from_parquet.items():
        assert decoded(tmp_path / "out", split) == expected and expected
    content = read_manifest(tmp_path / "out")["content"]
    assert (content["skipped_null"], content["skipped_empty"], content["quarantined"]) == (2, 1, 0)
    units = len((tmp_path / "out" / "progress.jsonl").read_text().splitlines())
    assert units > 5 if kinds == ["jsonl"] else units >= 1


def test_damaged_lines_and_files_stop_the_run_or_are_left_out_alone(documents, tokenizer_dir, tmp_path, run_script):
    write_jsonl(tmp_path / "in" / "a.jsonl", documents[:100])
    lines = (tmp_path / "in" / "a.jsonl").read_bytes().splitlines(keepends=True)
    lines[40] = lines[40][: len(lines[40]) // 2] + b"\n"
    (tmp_path / "in" / "a.jsonl").write_bytes(b"".join(lines))
    said = user_error(run_script, *arguments(tmp_path, tokenizer_dir))
    assert "a.jsonl, line 41: not JSON (Unterminated string" in said and "such lines out" in said

    write_jsonl(tmp_path / "in" / "b.jsonl.gz", documents[100:120])
    data = (tmp_path / "in" / "b.jsonl.gz").read_bytes()
    (tmp_path / "in" / "b.jsonl.gz").write_bytes(data[:-8] + bytes(8))  # checksum and length
    write_jsonl(tmp_path / "in" / "c.jsonl", documents[120:130], column="body")
    write_parquet(tmp_path / "in" / "d.parquet", documents[130:150])
    said = user_error(run_script, *arguments(tmp_path, tokenizer_dir))
    assert "b.jsonl.gz: not a readable gzip file" in said and "c.jsonl: no column 'text' (it has id, body)" in said
    shutil.rmtree(tmp_path / "out")  # begun before a.jsonl was found damaged
    process = run_script("optimize_dataset.py", *arguments(tmp_path, tokenizer_dir, "--on_bad_file=quarantine"))
    assert "3 files, row groups, record batches or lines left out" in process.stdout + process.stderr
    assert num_documents(tmp_path / "out") == 99 + 20 and inputs_of(tmp_path / "out") == ["a.jsonl", "d.parquet"]
    assert [(entry["path"], entry.get("line")) for entry in quarantined(tmp_path / "out")] == [
        ("b.jsonl.gz", None), ("c.jsonl", None), ("a.jsonl", 41),
    ]  # fmt: skip


def test_compression_damaged_late_in_a_file_leaves_it_out_as_a_whole(documents, tokenizer_dir, tmp_path, run_script):
    """Behind what the plan samples."""
    import random

    rng = random.Random(0)
    write_jsonl(
        tmp_path / "in" / "a.jsonl.gz", [str(rng.random()) * 20 + str(rng.getrandbits(900)) for _ in range(8000)]
    )
    data = (tmp_path / "in" / "a.jsonl.gz").read_bytes()
    assert len(data) > 1_000_000
    (tmp_path / "in" / "a.jsonl.gz").write_bytes(data[:-1000])
    write_jsonl(tmp_path / "in" / "b.jsonl", documents[:40])
    said = user_error(run_script, *arguments(tmp_path, tokenizer_dir))
    assert "a.jsonl.gz, the compressed data: Truncated compressed stream" in said and "such files out" in said
    shutil.rmtree(tmp_path / "out")
    run_script("optimize_dataset.py", *arguments(tmp_path, tokenizer_dir, "--on_bad_file=quarantine"))
    assert num_documents(tmp_path / "out") == 40
    (entry,) = quarantined(tmp_path / "out")
    assert entry["path"] == "a.jsonl.gz" and "Truncated" in entry["reason"]


@pytest.mark.parametrize(("kind", "limit"), [("jsonl", 30), ("jsonl", 55), ("jsonl.gz", 30), ("jsonl.gz", 40)])
def test_a_limit_takes_the_first_rows(kind, limit, documents, tokenizer_dir, tmp_path, run_script):
    write_jsonl(tmp_path / "in" / f"a.{kind}", documents[:40])
    write_jsonl(tmp_path / "in" / f"b.{kind}", documents[40:80])
    more = [f"--limit_documents={limit}", "--unit_bytes=20000"]
    run_script("optimize_dataset.py", *arguments(tmp_path, tokenizer_dir, *more))
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    expected = sorted(tokenizer.encode(text).ids for text in documents[:limit])
    assert sorted(decoded(tmp_path / "out", "train") + decoded(tmp_path / "out", "val")) == expected


def test_a_limit_is_filled_with_good_lines_where_one_is_damaged(documents, tokenizer_dir, tmp_path, run_script):
    write_jsonl(tmp_path / "in" / "a.jsonl", documents[:60])
    content = (tmp_path / "in" / "a.jsonl").read_bytes().splitlines(keepends=True)
    content[5] = b"{\n"
    (tmp_path / "in" / "a.jsonl").write_bytes(b"".join(content))
    more = ["--limit_documents=20", "--on_bad_file=quarantine"]
    run_script("optimize_dataset.py", *arguments(tmp_path, tokenizer_dir, *more))
    assert num_documents(tmp_path / "out") == 20


@pytest.mark.parametrize("kinds", [["jsonl"], ["jsonl.zst"], ["parquet", "jsonl"]])
def test_the_dry_run_estimates_the_tokens(kinds, documents, tokenizer_dir, tmp_path, run_script):
    for i, kind in enumerate(kinds):
        (write_parquet if kind == "parquet" else write_jsonl)(tmp_path / "in" / f"{i}.{kind}", documents)
    said = run_script("optimize_dataset.py", *arguments(tmp_path, tokenizer_dir, "--dry_run")).stdout
    number, unit = re.search(r"documents: ([\d.,]+) ?([kMGB]?) tokens", said).groups()
    estimated = float(number.replace(",", "")) * {"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "B": 1e9}[unit]
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    tokens = len(kinds) * sum(len(tokenizer.encode(text).ids) for text in documents)
    assert estimated == pytest.approx(tokens, rel=0.15), said


def test_files_are_found_by_their_endings(documents, tmp_path):
    names = ("a.JSONL", "sub/b.jsonl.GZ", "c.jsonl.zst", "d.parquet", "e.json", "f.jsonl.bz2", ".g.jsonl", "_h/i.jsonl")
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert paths_in(tmp_path) == ["a.JSONL", "c.jsonl.zst", "d.parquet", "sub/b.jsonl.GZ"]


@pytest.mark.parametrize(
    ("named", "expected"),
    [
        ({"a.parquet": 5, "b/c.PARQUET": 1234}, "2 parquet files, 1,239 rows"),
        ({"a.arrow": 7}, "1 Arrow file, 7 rows"),
        ({"a.jsonl": None, "b.jsonl.gz": None}, "2 JSON lines files"),
        ({"a.JSONL.zst": None, "b.parquet": 5}, "1 parquet file, 5 rows, and 1 JSON lines file"),
        ({}, "no file"),
    ],
)
def test_input_files_are_called_what_they_are(named, expected):
    inputs = [{"path": path, **({} if rows is None else {"rows": rows})} for path, rows in named.items()]
    assert describe_inputs(inputs) == expected


def test_remote_files_give_the_same_chunks(documents, tokenizer_dir, tmp_path, run_script):
    """`simplecache::file://` stands for what fsspec reads."""
    write_jsonl(tmp_path / "in" / "a.jsonl", documents[:60])
    write_jsonl(tmp_path / "in" / "b.jsonl.zst", documents[60:90])
    chunks = []
    for name, url in (("local", tmp_path / "in"), ("remote", f"simplecache::file://{tmp_path / 'in'}")):
        run_script(
            "optimize_dataset.py",
            *arguments(tmp_path, tokenizer_dir, f"--input_dir={url}", f"--output_dir={tmp_path / name}"),
            "--unit_bytes=20000",
        )
        chunks.append({path.name: path.read_bytes() for path in (tmp_path / name).rglob("*.bin")})
    assert chunks[0] == chunks[1] and len(chunks[0]) == 4
    assert read_manifest(tmp_path / "local")["inputs"] == read_manifest(tmp_path / "remote")["inputs"]


def test_what_reads_the_input_again_finds_each_documents_line(documents, tokenizer_dir, tmp_path, run_script, capsys):
    """tools.verify and tools.show_batch; with a shuffle, a damaged line, and parquet beside it."""
    from tokenizers import Tokenizer

    from tools.source_rows import Source
    from tools.verify import Settings, main

    write_jsonl(tmp_path / "in" / "a.jsonl", documents[:90])
    with open(tmp_path / "in" / "a.jsonl", "ab") as file:
        file.write(b'{"text": 1}\n\n{"text": "the last one"}\n')
    write_jsonl(tmp_path / "in" / "b.jsonl.gz", documents[90:100])
    write_parquet(tmp_path / "in" / "c.parquet", documents[100:120])
    more = ["--on_bad_file=quarantine", "--shuffle_seed=3", "--unit_bytes=30000"]
    run_script("optimize_dataset.py", *arguments(tmp_path, tokenizer_dir, *more))
    source = Source(str(tmp_path / "in"), read_manifest(tmp_path / "out"))
    records = [json.loads(line) for line in (tmp_path / "out" / "progress.jsonl").read_text().splitlines()]
    tokenizer = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    for split in ("train", "val"):
        rows = [
            row
            for record in sorted(records, key=lambda record: record["unit"])
            for row in source.rows(record["unit"], split, record[split]["documents"])
        ]
        found = [tokenizer.encode(source.text_of(row)).ids for row in rows]
        assert found == decoded(tmp_path / "out", split) and found
    said = said_by(capsys, lambda: main(Settings(str(tmp_path / "out"), deep=True, num_units=2)), 0)
    assert "CHANGED" not in said and "2 of " in said and "units tokenized again" in said
    assert "1 parquet file, 20 rows, and 2 JSON lines files: size and fingerprint" in said

    content = (tmp_path / "in" / "a.jsonl").read_bytes()
    (tmp_path / "in" / "a.jsonl").write_bytes(content.replace(b"the last one", b"the next one"))
    said = said_by(capsys, lambda: main(Settings(str(tmp_path / "out"))), 1)
    assert "a.jsonl: another file than was tokenized: fingerprint was" in said
