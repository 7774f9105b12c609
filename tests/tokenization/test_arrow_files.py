"""Arrow files as input of step 1: files and streams, saved Hugging Face datasets, what is damaged, and what changes."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from conftest import said_by, write_parquet
from input_kinds import FORMATS, TYPES, write_arrow
from test_jsonl_runs import quarantined
from test_optimize_dataset import decoded, user_error
from test_optimize_dataset_inputs import arguments, inputs_of, num_documents, paths_in

from tokenization.arrow_files import CorruptRecordBatch, read_batches_summary, stream_batches
from tokenization.input_files import FileEntry, list_input_files
from tokenization.job import InputStamp
from tokenization.text_arrays import MAX_BATCH_BYTES
from utils.errors import UserError
from utils.manifest import read_manifest


def entry_of(path: Path) -> FileEntry:
    return FileEntry(path.name, path.stat().st_size)


def read(path: Path, numbers: list[int] | None = None, stamp: InputStamp | None = None) -> list[str | None]:
    numbers = numbers or list(range(len(read_batches_summary(str(path.parent), entry_of(path), "text").rows)))
    arrays = stream_batches(str(path.parent), path.name, 0, numbers, "text", stamp)
    return [text for array in arrays for text in array.to_pylist()]


# Texts


@pytest.mark.parametrize("codec", [None, "zstd", "lz4"])
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("form", FORMATS)
def test_every_type_of_text_and_every_record_batch(tmp_path, form, kind, codec):
    texts = [None if i % 17 == 0 else "" if i % 13 == 0 else f"é中🙂 text {i % 50} \0" * (i % 5) for i in range(230)]
    write_arrow(tmp_path / "a.arrow", texts, form, kind, rows=50, codec=codec)
    summary = read_batches_summary(str(tmp_path), entry_of(tmp_path / "a.arrow"), "text")
    assert summary.rows == (50, 50, 50, 50, 30) and all(summary.text_bytes)
    assert read(tmp_path / "a.arrow") == texts
    assert read(tmp_path / "a.arrow", [1, 2]) == texts[50:150]
    assert read(tmp_path / "a.arrow", [0, 3]) == [*texts[:50], *texts[150:200]]


@pytest.mark.parametrize("form", FORMATS)
def test_a_record_batch_of_any_size_is_read_in_bounded_pieces(tmp_path, form):
    texts = ["x" * 100_000] * 400 + ["y" * (MAX_BATCH_BYTES + 1)]
    write_arrow(tmp_path / "a.arrow", texts, form, rows=10**6)
    sizes = [array.nbytes for array in stream_batches(str(tmp_path), "a.arrow", 0, [0], "text")]
    assert len(sizes) > 4 and max(sizes[:-1]) < 1.01 * MAX_BATCH_BYTES
    write_arrow(tmp_path / "b.arrow", texts[:400], form, rows=1)
    assert len(list(stream_batches(str(tmp_path), "b.arrow", 0, range(400), "text"))) < 15


# Damage


def fault_of(path: Path, column: str = "text") -> str:
    with pytest.raises(ValueError) as caught:
        read_batches_summary(str(path.parent), entry_of(path), column)
    return str(caught.value)


@pytest.mark.parametrize("form", FORMATS)
def test_files_that_cannot_be_used_say_why(tmp_path, form):
    path = tmp_path / "a.arrow"
    write_arrow(path, [f"text {i}" for i in range(200)], form)
    assert fault_of(path, "body") == "no column 'body' (it has meta, text, id)"
    assert fault_of(path, "id") == "column 'id' is int64, not text"
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:-4], b"", b"hello", b"PAR1" * 9, whole[:40] + whole[44:]):
        path.write_bytes(content)
        assert "not a readable Arrow file" in fault_of(path)


def test_a_stream_that_ends_between_two_record_batches_is_not_taken_for_a_shorter_one(tmp_path):
    path = tmp_path / "a.arrow"
    write_arrow(path, ["text"] * 100)
    whole = path.read_bytes()
    path.write_bytes(whole[:-8])
    assert "it was cut off" in fault_of(path)
    path.write_bytes(whole + whole)
    assert f"{len(whole):,} bytes follow the end of its stream" in fault_of(path)


@pytest.mark.parametrize("form", FORMATS)
def test_damaged_text_is_named_by_its_record_batch(tmp_path, form):
    path = tmp_path / "a.arrow"
    write_arrow(path, [f"text number {i:03}" for i in range(100)], form)
    path.write_bytes(path.read_bytes().replace(b"number 045", b"number \xff\xfe5"))
    with pytest.raises(CorruptRecordBatch) as caught:
        read(path)
    assert (caught.value.place, caught.value.rows, caught.value.key) == ("record batch 2", 20, (0, 2))
    assert len(read(path, [0, 1, 3, 4])) == 80


@pytest.mark.parametrize("when", ["before", "during"])
@pytest.mark.parametrize("change", ["longer", "same_size_and_time", "in_place"])
def test_a_replaced_file_is_never_taken_for_the_planned_one(tmp_path, when, change):
    if (when, change) == ("during", "same_size_and_time"):
        pytest.skip("the mapped file is still the old one, and is read to its end")
    path = tmp_path / "a.arrow"
    texts = [f"{i:09} {'x' * 900}" for i in range(20_000)]
    write_arrow(path, texts, rows=1000)
    status = path.stat()
    summary = read_batches_summary(str(tmp_path), entry_of(path), "text")
    stamp = InputStamp(status.st_size, status.st_mtime_ns, summary.fingerprint)

    def replace():
        if change == "in_place":
            with open(path, "r+b") as file:
                file.seek(5000)
                file.write(b"9")
            os.utime(path, ns=(0, status.st_mtime_ns + 1))
            return
        write_arrow(
            tmp_path / "new", [*texts, "more"] if change == "longer" else ["y" + texts[0][1:], *texts[1:]], rows=1000
        )
        os.utime(tmp_path / "new", ns=(0, status.st_mtime_ns))
        os.replace(tmp_path / "new", path)

    if when == "before":
        replace()
    arrays = stream_batches(str(tmp_path), "a.arrow", 0, range(20), "text", stamp)
    with pytest.raises(UserError, match=r"a\.arrow was replaced or changed"):
        if when == "during":
            next(arrays)
            replace()
        list(arrays)


# Saved datasets


@pytest.fixture(scope="module")
def saved(tmp_path_factory, documents) -> Path:
    """As Hugging Face datasets writes it, and as it is after a `map`, whose cache lies beside the data."""
    datasets = pytest.importorskip("datasets")
    directory = tmp_path_factory.mktemp("saved") / "in" / "corpus"
    datasets.Dataset.from_dict({"id": list(range(90)), "text": documents[:90]}).save_to_disk(directory, num_shards=3)
    loaded = datasets.load_from_disk(directory)
    loaded.map(lambda row: {"text": row["text"].upper()}, load_from_cache_file=True)
    assert list(directory.glob("cache-*.arrow"))
    return directory.parent


def test_a_saved_dataset_is_its_own_files_alone(saved, capsys):
    assert paths_in(saved) == [f"corpus/data-0000{i}-of-00003.arrow" for i in range(3)]
    assert "1 Arrow file left out, which the state.json there does not list: cache-" in capsys.readouterr().err


def test_a_saved_dataset_that_is_not_whole_says_so(saved, tmp_path):
    copy = Path(shutil.copytree(saved, tmp_path / "in"))
    (copy / "corpus" / "data-00001-of-00003.arrow").unlink()
    faults = {entry.path: entry.fault for entry in list_input_files(str(copy))}
    assert "lists it, and it is not there" in faults["corpus/data-00001-of-00003.arrow"] and len(faults) == 3
    state = json.loads((copy / "corpus" / "state.json").read_text())
    (copy / "corpus" / "state.json").write_text(json.dumps({**state, "_indices_data_files": [{"filename": "i.arrow"}]}))
    assert all("flatten_indices" in entry.fault for entry in list_input_files(str(copy)) if entry.bytes)
    (copy / "corpus" / "state.json").write_text("{")
    assert all("cannot be read" in entry.fault for entry in list_input_files(str(copy)))


def test_documents_of_arrow_files_and_a_saved_dataset_are_those_of_parquet(
    saved, documents, tokenizer_dir, tmp_path, run_script, capsys
):
    """Token for token; then the tools find each document's row again."""
    from tokenizers import Tokenizer

    from tools import inspect_dataset
    from tools.source_rows import Source
    from tools.verify import Settings, main

    odd = [*documents[90:120], None, "", 'é中🙂 \0 \u2028 \\ " \r\n\t</s>', *documents[120:150]]
    shutil.copytree(saved, tmp_path / "in")
    write_arrow(tmp_path / "in" / "d" / "a.ARROW", odd, "file", "large_string", rows=7)
    write_arrow(tmp_path / "in" / "d" / "b.arrow", documents[150:160], "stream", "dictionary", rows=4)
    write_parquet(tmp_path / "in" / "e.parquet", documents[160:180])
    texts = [*documents[:90], *odd, *documents[150:180]]
    write_parquet(tmp_path / "parquet" / "in" / "a.parquet", texts)
    more = ["--unit_bytes=20000", "--chunk_tokens=8000"]
    said = run_script("optimize_dataset.py", *arguments(tmp_path, tokenizer_dir, *more)).stdout
    assert "1 parquet file, 20 rows, and 5 Arrow files, 163 rows" in said
    run_script("optimize_dataset.py", *arguments(tmp_path / "parquet", tokenizer_dir, *more))
    for split in ("train", "val"):
        expected = decoded(tmp_path / "parquet" / "out", split)
        assert decoded(tmp_path / "out", split) == expected and expected
    manifest = read_manifest(tmp_path / "out")
    assert (manifest["content"]["skipped_null"], manifest["content"]["skipped_empty"]) == (1, 1)
    assert len((tmp_path / "out" / "progress.jsonl").read_text().splitlines()) > 5

    source = Source(str(tmp_path / "in"), manifest)
    records = [json.loads(line) for line in (tmp_path / "out" / "progress.jsonl").read_text().splitlines()]
    tokenizer, named = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json")), []
    for split in ("train", "val"):
        rows = [
            row
            for record in sorted(records, key=lambda record: record["unit"])
            for row in source.rows(record["unit"], split, record[split]["documents"])
        ]
        assert [tokenizer.encode(source.text_of(row)).ids for row in rows] == decoded(tmp_path / "out", split)
        named += map(str, rows)
    assert "d/a.ARROW, record batch 2, row 3" in named and "e.parquet, row group 0, row 0" in named
    said = said_by(capsys, lambda: main(Settings(str(tmp_path / "out"), deep=True, num_units=2)), 0)
    files = "1 parquet file, 20 rows, and 5 Arrow files, 163 rows"
    assert "CHANGED" not in said and f"{files}: size, rows and fingerprint" in said and "units tokenized again" in said
    assert f"input files  {tmp_path / 'in'}" in said and "parquet files" not in said
    run_script("merge_files.py", f"--source_dir={tmp_path / 'out' / 'val'}", f"--target_dir={tmp_path / 'DATA'}")
    said = said_by(capsys, lambda: inspect_dataset.main(inspect_dataset.Settings(str(tmp_path / "DATA"))))
    assert f"made from: {files}\n" in said


# Runs


def test_damage_stops_the_run_or_is_left_out_alone(documents, tokenizer_dir, tmp_path, run_script):
    write_arrow(tmp_path / "in" / "a.arrow", [f"{i:03}: {text}" for i, text in enumerate(documents[:100])])
    path = tmp_path / "in" / "a.arrow"
    path.write_bytes(path.read_bytes().replace(b"045: ", b"\xff\xfe5: "))
    write_parquet(tmp_path / "in" / "b.parquet", documents[100:110])
    said = user_error(run_script, *arguments(tmp_path, tokenizer_dir))
    assert "a.arrow, record batch 2: ArrowInvalid: Invalid UTF8" in said and "such record batches out" in said
    write_arrow(tmp_path / "in" / "c.arrow", documents[110:120])
    (tmp_path / "in" / "c.arrow").write_bytes((tmp_path / "in" / "c.arrow").read_bytes()[:-9])
    shutil.rmtree(tmp_path / "out")
    assert "c.arrow: not a readable Arrow file" in user_error(run_script, *arguments(tmp_path, tokenizer_dir))
    run_script("optimize_dataset.py", *arguments(tmp_path, tokenizer_dir, "--on_bad_file=quarantine"))
    assert num_documents(tmp_path / "out") == 80 + 10 and inputs_of(tmp_path / "out") == ["a.arrow", "b.parquet"]
    bad = quarantined(tmp_path / "out")
    assert [(entry["path"], entry.get("record_batch")) for entry in bad] == [("c.arrow", None), ("a.arrow", 2)]


def test_a_limit_takes_the_first_rows(documents, tokenizer_dir, tmp_path, run_script):
    write_arrow(tmp_path / "in" / "a.arrow", documents[:40], rows=7)
    write_arrow(tmp_path / "in" / "b.arrow", documents[40:80], "file", rows=7)
    run_script("optimize_dataset.py", *arguments(tmp_path, tokenizer_dir, "--limit_documents=55"))
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    expected = sorted(tokenizer.encode(text).ids for text in documents[:55])
    assert sorted(decoded(tmp_path / "out", "train") + decoded(tmp_path / "out", "val")) == expected


def test_remote_files_give_the_same_chunks(saved, tokenizer_dir, tmp_path, run_script):
    """`simplecache::file://` stands for what fsspec reads."""
    chunks = []
    for name, url in (("local", saved), ("remote", f"simplecache::file://{saved}")):
        places = [f"--input_dir={url}", f"--output_dir={tmp_path / name}", "--unit_bytes=20000"]
        run_script("optimize_dataset.py", *arguments(tmp_path, tokenizer_dir, *places))
        chunks.append({path.name: path.read_bytes() for path in (tmp_path / name).rglob("*.bin")})
    assert chunks[0] == chunks[1] and len(chunks[0]) == 3
    assert read_manifest(tmp_path / "local")["inputs"] == read_manifest(tmp_path / "remote")["inputs"]
