"""What step 1 does with inputs of odd kinds: links, pipes, encrypted columns, files that change, text that inflates."""

from __future__ import annotations

import base64
import collections
import json
import os
import re
import shutil
import threading
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import write_parquet
from test_optimize_dataset import decoded, user_error

from tokenization import parquet, text_arrays
from tokenization.input_files import FileEntry, list_input_files
from tokenization.job import InputStamp
from tokenization.parquet import CorruptRowGroup, read_footer, stream_texts
from utils.errors import UserError
from utils.manifest import read_manifest


def arguments(tmp_path: Path, tokenizer_dir: Path, *more: str) -> list[str]:
    return [
        f"--input_dir={tmp_path / 'in'}",
        f"--tokenizer_dir={tokenizer_dir}",
        f"--output_dir={tmp_path / 'out'}",
        "--address=local",
        "--val_fraction=0.2",
        *more,
    ]


def inputs_of(output_dir: Path) -> list[str]:
    return [entry["path"] for entry in read_manifest(output_dir)["inputs"]]


def num_documents(output_dir: Path) -> int:
    return len(decoded(output_dir, "train") + decoded(output_dir, "val"))


def paths_in(directory: Path) -> list[str]:
    return [entry.path for entry in list_input_files(str(directory))]


# Which files


def test_a_link_to_its_own_folder_does_not_multiply_the_corpus(documents, tokenizer_dir, tmp_path, run_script):
    write_parquet(tmp_path / "in" / "a.parquet", documents[:40])
    os.symlink(".", tmp_path / "in" / "again")
    process = run_script("optimize_dataset.py", *arguments(tmp_path, tokenizer_dir))
    assert inputs_of(tmp_path / "out") == ["a.parquet"] and num_documents(tmp_path / "out") == 40
    assert "left out: again" in process.stdout + process.stderr


def test_each_file_is_listed_once_by_the_name_without_links(documents, tmp_path):
    write_parquet(tmp_path / "elsewhere" / "sub" / "c.parquet", documents[:3])
    write_parquet(tmp_path / "in" / "z" / "b.parquet", documents[:3])
    os.symlink("z", tmp_path / "in" / "a")
    os.symlink("z/b.parquet", tmp_path / "in" / "b.parquet")
    os.link(tmp_path / "in" / "z" / "b.parquet", tmp_path / "in" / "z" / "hard.parquet")
    os.symlink(tmp_path / "elsewhere", tmp_path / "in" / "linked")
    os.symlink(tmp_path / "elsewhere" / "sub", tmp_path / "in" / "linked2")
    assert paths_in(tmp_path / "in") == ["linked/sub/c.parquet", "z/b.parquet"]
    os.symlink(tmp_path / "in", tmp_path / "whole")
    assert paths_in(tmp_path / "whole") == paths_in(tmp_path / "in")
    assert paths_in(tmp_path / "in" / "b.parquet") == ["b.parquet"]


def test_hidden_files_stay_left_out_and_other_cases_of_the_ending_are_read(documents, tmp_path):
    for name in ("UP.PARQUET", ".hidden.parquet", "_temporary/x.parquet", "sub.parquet/part.Parquet", "no.parquet.crc"):
        write_parquet(tmp_path / name, documents[:3])
    assert paths_in(tmp_path) == ["UP.PARQUET", "sub.parquet/part.Parquet"]


def test_broken_links_and_pipes_are_named_as_bad_files(documents, tokenizer_dir, tmp_path, run_script):
    write_parquet(tmp_path / "in" / "a.parquet", documents[:40])
    os.symlink("gone.parquet", tmp_path / "in" / "broken.parquet")
    os.mkfifo(tmp_path / "in" / "pipe.parquet")
    (tmp_path / "in" / os.fsdecode(b"\xff.parquet")).write_bytes(b"")
    said = user_error(run_script, *arguments(tmp_path, tokenizer_dir))
    assert "broken.parquet: a broken link to gone.parquet" in said and "pipe.parquet: not an ordinary file" in said
    assert "\\xff.parquet: its name is not UTF-8" in said
    run_script("optimize_dataset.py", *arguments(tmp_path, tokenizer_dir, "--on_bad_file=quarantine"))
    listed = [json.loads(line)["path"] for line in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()]
    assert listed == ["\\xff.parquet", "broken.parquet", "pipe.parquet"] and num_documents(tmp_path / "out") == 40


# Limits, and inputs that change


def break_row_group(path: Path, group: int) -> None:
    chunk = pq.read_metadata(path).row_group(group).column(0)
    with open(path, "r+b") as file:
        file.seek(chunk.dictionary_page_offset or chunk.data_page_offset)
        file.write(b"\xff" * 64)


def test_a_limit_is_filled_with_good_rows_where_a_row_group_is_bad(documents, tokenizer_dir, tmp_path, run_script):
    write_parquet(tmp_path / "in" / "a.parquet", documents[:60], row_group_size=10)
    write_parquet(tmp_path / "in" / "b.parquet", documents[60:120], row_group_size=50)
    break_row_group(tmp_path / "in" / "a.parquet", 1)
    more = ["--on_bad_file=quarantine", "--limit_documents=70"]
    run_script("optimize_dataset.py", *arguments(tmp_path, tokenizer_dir, *more))
    assert num_documents(tmp_path / "out") == 70
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    expected = [tuple(tokenizer.encode(text).ids) for text in documents[:10] + documents[20:80]]
    found = map(tuple, decoded(tmp_path / "out", "train") + decoded(tmp_path / "out", "val"))
    assert collections.Counter(found) == collections.Counter(expected)


def stamp_of(directory: Path, name: str) -> InputStamp:
    status = os.stat(directory / name)
    footer = read_footer(str(directory), FileEntry(name, status.st_size), "text")
    return InputStamp(status.st_size, status.st_mtime_ns, footer.fingerprint)


@pytest.mark.parametrize("when", ["before", "during"])
@pytest.mark.parametrize("change", ["fewer_row_groups", "same_size_and_time", "in_place", "encrypted"])
def test_a_replaced_input_is_never_taken_for_the_planned_one(documents, tmp_path, monkeypatch, when, change):
    if (when, change) == ("during", "same_size_and_time"):
        pytest.skip("the open file is still the old one, and is read to its end")
    monkeypatch.setattr(text_arrays, "BATCH_BYTES", 1)  # so that each row group is a batch
    path = tmp_path / "a.parquet"
    write_parquet(path, documents[:60], row_group_size=20)
    stamp = stamp_of(tmp_path, "a.parquet")

    def replace():
        new = tmp_path / "new"
        if change == "encrypted":
            write_encrypted(new, documents[:60], "text")
        elif change != "in_place":
            write_parquet(new, documents[:60], row_group_size=60 if change == "fewer_row_groups" else 15)
        if change == "in_place":
            with open(path, "r+b") as file:
                file.write(b"PAR1")
            os.utime(path, ns=(0, stamp.mtime_ns + 1))
        else:
            os.replace(new, path)

    if when == "before":
        replace()
        if change == "same_size_and_time":
            os.utime(path, ns=(0, stamp.mtime_ns))
            stamp = InputStamp(path.stat().st_size, stamp.mtime_ns, stamp.fingerprint)
    texts = stream_texts(str(tmp_path), "a.parquet", 0, [0, 1, 2], "text", stamp)
    with pytest.raises(UserError, match=r"a\.parquet was replaced or changed"):
        if when == "during":
            next(texts)
            replace()
        list(texts)


def test_a_file_replaced_while_the_command_runs_is_a_user_error(documents, tokenizer_dir, tmp_path, run_script):
    """It is replaced when the plan has been printed: the workers take seconds to start."""
    import subprocess
    import sys

    from conftest import ROOT

    write_parquet(tmp_path / "in" / "a.parquet", documents[:60], row_group_size=20)
    write_parquet(tmp_path / "new", documents[:60], row_group_size=60)
    process = subprocess.Popen(
        [sys.executable, "-u", ROOT / "optimize_dataset.py", *arguments(tmp_path, tokenizer_dir)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    killer = threading.Timer(120, process.kill)
    killer.start()
    for line in process.stdout:
        if "work: " in line:
            shutil.move(tmp_path / "new", tmp_path / "in" / "a.parquet")
            break
    _, said = process.communicate()
    killer.cancel()
    assert process.returncode == 2 and "Traceback" not in said, said
    assert "a.parquet was replaced or changed" in said
    assert not list((tmp_path / "out").rglob("*.bin"))


# Text that is short in the file and long in memory


def write_repeated(path: Path, text: str, rows: int, *, arrow_dictionary: bool) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array([text]))
    pq.write_table(pa.table({"text": texts}), path, row_group_size=rows, store_schema=arrow_dictionary)


@pytest.mark.parametrize("arrow_dictionary", [False, True])
def test_memory_is_bounded_where_a_dictionary_inflates(
    documents, tokenizer_dir, tmp_path, run_script, arrow_dictionary
):
    """A file of 50 kB with 3.3 GB of text."""
    path = tmp_path / "in" / "a.parquet"
    write_repeated(path, "\n".join(documents)[:110_000], 30_000, arrow_dictionary=arrow_dictionary)
    assert path.stat().st_size < 150_000
    peaks, num_texts = [], 0
    for texts in stream_texts(str(tmp_path / "in"), "a.parquet", 0, [0], "text"):
        peaks.append(texts.nbytes)
        num_texts += len(texts)
    assert num_texts == 30_000 and max(peaks) < 32 << 20
    write_parquet(tmp_path / "in" / "0.parquet", documents[:40])
    run_script("optimize_dataset.py", *arguments(tmp_path, tokenizer_dir, "--limit_documents=2040"))
    records = (tmp_path / "out" / "progress.jsonl").read_text().splitlines()
    assert records and max(json.loads(line)["peak_bytes"] for line in records) < 1_000_000_000


def test_text_that_grows_late_in_a_row_group_is_cut_into_batches_too(tmp_path):
    texts = pa.DictionaryArray.from_arrays(pa.array([0] * 20_000 + [1] * 3_000), pa.array(["short", "x" * 100_000]))
    for store_schema in (False, True):
        pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet", store_schema=store_schema)
        sizes = []
        num_texts = 0
        for batch in stream_texts(str(tmp_path), "a.parquet", 0, [0], "text"):
            sizes.append(batch.nbytes)
            num_texts += len(batch)
        assert num_texts == 23_000 and max(sizes) < 32 << 20


@pytest.mark.parametrize(("num_rows", "row_bytes"), [(1000, 10_000), (70_000, 3)])
def test_row_groups_are_cut_into_even_batches(tmp_path, num_rows, row_bytes):
    """By their bytes, and by their rows where these are short."""
    rows = [f"{i:05d}"[:row_bytes] * (row_bytes // 5) for i in range(num_rows)]
    write_parquet(tmp_path / "a.parquet", rows, row_group_size=num_rows)
    texts = [batch.to_pylist() for batch in stream_texts(str(tmp_path), "a.parquet", 0, [0], "text")]
    assert [text for batch in texts for text in batch] == rows
    assert [len(batch) for batch in texts] == [num_rows // 2] * 2


@pytest.mark.parametrize("most_at_once", [0, 1 << 30])
def test_row_groups_read_at_once_or_through_a_buffer_give_the_same(tmp_path, monkeypatch, most_at_once):
    """The same texts, and the same error from a damaged one: those before it have been read."""
    monkeypatch.setattr(parquet, "MAX_READ_AT_ONCE_BYTES", most_at_once)
    monkeypatch.setattr(text_arrays, "BATCH_BYTES", 1)  # so that row groups are not joined
    path, rows = tmp_path / "a.parquet", [f"{i:05d}" * 500 for i in range(6000)]
    pq.write_table(pa.table({"text": rows}), path, row_group_size=2000, compression="none", use_dictionary=False,
                   write_page_checksum=True)  # fmt: skip

    def texts():
        for batch in stream_texts(str(tmp_path), "a.parquet", 0, [0, 1, 2], "text"):
            yield from batch.to_pylist()

    assert list(texts()) == rows
    content = path.read_bytes()
    path.write_bytes(content.replace(rows[3000].encode(), rows[3001].encode(), 1))
    read = []
    with pytest.raises(CorruptRowGroup) as raised:
        for text in texts():
            read.append(text)
    assert raised.value.row_group == 1 and 2000 <= len(read) <= 3000 and read == rows[: len(read)]


def test_dictionary_columns_with_nulls_give_the_same_texts(tmp_path):
    expected = (["a", None, "", "bcd"] * 50 + ["é" * 500_000, None]) * 3
    for values in (pa.string(), pa.large_string()):
        column = pa.array(expected, values).dictionary_encode()
        pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet", row_group_size=400)
        found = [
            text for batch in stream_texts(str(tmp_path), "a.parquet", 0, [0, 1], "text") for text in batch.to_pylist()
        ]
        assert found == expected


def test_the_dry_run_estimates_what_is_decoded(documents, tokenizer_dir, tmp_path, run_script):
    from tokenizers import Tokenizer

    text = "\n".join(documents)[:100_000]
    write_repeated(tmp_path / "in" / "a.parquet", text, 30_000, arrow_dictionary=False)
    said = run_script("optimize_dataset.py", *arguments(tmp_path, tokenizer_dir, "--dry_run")).stdout
    number, unit = re.search(r"documents: ([\d.,]+) ?([KMGB]?) tokens", said).groups()
    estimated = float(number.replace(",", "")) * {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "B": 1e9}[unit]
    tokenizer = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    assert estimated == pytest.approx(30_000 * len(tokenizer.encode(text).ids), rel=0.01)


def test_a_document_too_large_for_the_reference_is_refused_by_size(tokenizer_dir):
    from tokenization import encoder
    from tokenization.encoder_choice import EncoderChoice

    content = (tokenizer_dir / "tokenizer.json").read_bytes()
    slow = encoder.Encoder(content, choice=EncoderChoice("tokenizers", reason="of this test"))
    texts = pa.array(["short", "x" * (encoder.MAX_REFERENCE_BYTES + 1)])
    with pytest.raises(encoder.DocumentTooLarge, match="a document of 67 MB"):
        slow.encode(texts)
    assert len(encoder.Encoder(content).encode(texts)[1]) == 3  # gigatoken takes it


# Encrypted columns


def write_encrypted(path: Path, texts: list[str], column: str) -> None:
    """A plain footer, and one column encrypted with a key of its own."""
    import pyarrow.parquet.encryption as encryption

    class Keys(encryption.KmsClient):
        def __init__(self, configuration):
            super().__init__()

        def wrap_key(self, key_bytes, master_key_identifier):
            return base64.b64encode(key_bytes)

    factory = encryption.CryptoFactory(Keys)
    properties = factory.file_encryption_properties(
        encryption.KmsConnectionConfig(),
        encryption.EncryptionConfiguration(footer_key="f", column_keys={"k": [column]}, plaintext_footer=True),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({"text": texts, "secret": list(range(len(texts)))})
    with pq.ParquetWriter(path, table.schema, encryption_properties=properties) as writer:
        writer.write_table(table, row_group_size=20)


def test_an_encrypted_text_column_is_a_bad_file_and_another_is_not(documents, tokenizer_dir, tmp_path, run_script):
    write_parquet(tmp_path / "in" / "a.parquet", documents[:40])
    write_encrypted(tmp_path / "in" / "locked.parquet", documents[40:80], "text")
    write_encrypted(tmp_path / "in" / "open.parquet", documents[80:120], "secret")
    said = user_error(run_script, *arguments(tmp_path, tokenizer_dir))
    assert "locked.parquet: column 'text' is encrypted" in said and "open.parquet" not in said
    run_script("optimize_dataset.py", *arguments(tmp_path, tokenizer_dir, "--on_bad_file=quarantine"))
    assert inputs_of(tmp_path / "out") == ["a.parquet", "open.parquet"] and num_documents(tmp_path / "out") == 80
