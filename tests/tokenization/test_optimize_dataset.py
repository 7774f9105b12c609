"""Step 1 as its users run it: what comes out, and what it says when something is wrong."""

from __future__ import annotations

import collections
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import write_parquet

from tokenization.chunk_reader import read_documents
from utils.chunks import read_index
from utils.manifest import damaged_files, read_manifest


def parquet_texts(directory: Path) -> list[str]:
    return [
        text
        for path in sorted(directory.rglob("*.parquet"))
        for text in pq.read_table(path, columns=["text"]).column(0).to_pylist()
    ]


def chunk_folders(output_dir: Path, split: str) -> list[Path]:
    return sorted(path.parent for path in (output_dir / split).glob("*/index.json"))


def decoded(output_dir: Path, split: str) -> list[list[int]]:
    """All documents of a split, as token ids, folder by folder."""
    return [
        document.tolist()
        for folder in chunk_folders(output_dir, split)
        for chunk in read_index(folder, "test").chunks
        for document in read_documents(folder / chunk.name, read_index(folder, "test").dtype)
    ]


@pytest.fixture(scope="module")
def tokens_dir(tmp_path_factory, parquet_dir, tokenizer_dir, ray_address) -> Path:
    """The output of the plain command, with small units and chunks."""
    import subprocess
    import sys

    from conftest import ROOT

    out = tmp_path_factory.mktemp("tokens") / "OUT"
    subprocess.run(
        [
            sys.executable,
            ROOT / "optimize_dataset.py",
            f"--input_dir={parquet_dir}",
            f"--tokenizer_dir={tokenizer_dir}",
            f"--output_dir={out}",
            "--val_fraction=0.1",
            "--unit_bytes=60000",
            "--chunk_tokens=8000",
            f"--address={ray_address}",
        ],
        check=True,
        timeout=300,
    )
    return out


def test_every_document_is_in_exactly_one_split_once(tokens_dir, parquet_dir, tokenizer_dir):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    texts = parquet_texts(parquet_dir)
    expected = collections.Counter(tuple(tokenizer.encode(text).ids) for text in texts)  # its template adds BOS
    train, val = decoded(tokens_dir, "train"), decoded(tokens_dir, "val")
    assert collections.Counter(map(tuple, train + val)) == expected
    assert len(train) > len(val) > 0

    content = read_manifest(tokens_dir)["content"]
    assert content["train"]["documents"] == len(train)
    assert content["train"]["tokens"] == sum(map(len, train))
    assert content["train"]["text_bytes"] + content["val"]["text_bytes"] == sum(len(t.encode()) for t in texts)
    assert content["checked_documents"] > 0


def test_folders_have_index_and_manifest_with_right_checksums(tokens_dir):
    for split in ("train", "val"):
        folders = chunk_folders(tokens_dir, split)
        assert folders and all(folder.name == "0" for folder in folders)  # one node
        for folder in folders:
            manifest = read_manifest(folder, "tokens")
            assert damaged_files(folder, manifest["files"]) == []
            assert {file["name"] for file in manifest["files"]} == {path.name for path in folder.glob("*.bin")}
    assert len(list((tokens_dir / "train" / "0").glob("*.bin"))) > 4  # units and chunks were really cut


def test_litdata_and_litgpt_read_the_folders(tokens_dir):
    from litdata import StreamingDataset, TokensLoader
    from litgpt.data import LitData

    folder = tokens_dir / "train" / "0"
    index = read_index(folder, "test")
    dataset = StreamingDataset(str(folder), item_loader=TokensLoader(block_size=129))
    tokens = [np.concatenate(read_documents(folder / chunk.name, index.dtype)) for chunk in index.chunks]
    expected = [chunk[i * 129 : (i + 1) * 129] for chunk in tokens for i in range(len(chunk) // 129)]
    assert len(dataset) == len(expected)
    for i in (0, 1, len(expected) // 2, len(expected) - 1):
        assert dataset[i].tolist() == expected[i].tolist()

    data = LitData(data_path=folder, num_workers=0)
    data.connect(batch_size=2, max_seq_length=128)
    seen = {tuple(row) for batch in data.train_dataloader() for row in batch.tolist()}
    assert seen <= {tuple(block.tolist()) for block in expected} and len(seen) >= len(set(map(bytes, expected))) - 2


def test_same_command_again_has_nothing_to_do(tokens_dir, parquet_dir, tokenizer_dir, run_script):
    before = {path: path.stat().st_mtime_ns for path in tokens_dir.rglob("*")}
    process = run_script(
        "optimize_dataset.py",
        f"--input_dir={parquet_dir}",
        f"--tokenizer_dir={tokenizer_dir}",
        f"--output_dir={tokens_dir}",
        "--val_fraction=0.1",
        "--unit_bytes=60000",
        "--chunk_tokens=8000",
        timeout=20,
    )
    assert "nothing to do" in process.stdout
    assert {path: path.stat().st_mtime_ns for path in tokens_dir.rglob("*")} == before


def test_nothing_of_ours_runs_on_the_cluster_afterwards(tokens_dir, ray_address):
    import ray

    ray.init(address=ray_address, logging_level="ERROR")
    try:
        assert ray.available_resources().get("CPU") == ray.cluster_resources().get("CPU")
    finally:
        ray.shutdown()


def test_other_settings_or_input_over_an_output_are_refused_naming_each(
    tokens_dir, parquet_dir, tokenizer_dir, run_script, tmp_path, documents
):
    before = {path: path.stat().st_mtime_ns for path in tokens_dir.rglob("*")}
    write_parquet(tmp_path / "in" / "new.parquet", documents[:30])
    process = run_script(
        "optimize_dataset.py",
        f"--input_dir={tmp_path / 'in'}",
        f"--tokenizer_dir={tokenizer_dir}",
        f"--output_dir={tokens_dir}",
        "--add_eos=true",
        check=False,
    )
    assert process.returncode == 2 and "Traceback" not in process.stderr
    for expected in (
        "val_fraction: was 0.1, is 0.005",
        "eos_id: was None, is 1",
        "new: new.parquet",
        "000_00000.parquet",
    ):
        assert expected in process.stderr
    assert {path: path.stat().st_mtime_ns for path in tokens_dir.rglob("*")} == before


def user_error(run_script, *arguments) -> str:
    process = run_script("optimize_dataset.py", *arguments, check=False, timeout=60)
    assert process.returncode == 2, process.stdout + process.stderr
    assert "Traceback" not in process.stderr
    return process.stderr


def test_all_user_errors_are_said_at_once(run_script, tmp_path):
    said = user_error(
        run_script,
        f"--input_dir={tmp_path / 'nowhere'}",
        f"--tokenizer_dir={tmp_path}",
        f"--output_dir={tmp_path / 'out'}",
        "--val_fraction=0",
        "--num_workers=0",
    )
    assert "no such directory" in said and "no tokenizer.json" in said
    assert "--val_fraction=0" in said and "--num_workers=0" in said
    assert not (tmp_path / "out").exists()


def test_wrong_flag(run_script):
    assert "--inptu_dir" in user_error(run_script, "--inptu_dir=x")


def test_bad_files_are_all_named_before_any_work(run_script, tmp_path, tokenizer_dir, documents):
    good = tmp_path / "in" / "good.parquet"
    write_parquet(good, documents[:50])
    (tmp_path / "in" / "garbage.parquet").write_bytes(b"this is no parquet file")
    (tmp_path / "in" / "truncated.parquet").write_bytes(good.read_bytes()[:-200])
    (tmp_path / "in" / "zero.parquet").write_bytes(b"")
    write_parquet(tmp_path / "in" / "other_column.parquet", documents[:50], column="content")
    import pyarrow as pa

    pq.write_table(pa.table({"text": [1, 2, 3]}), tmp_path / "in" / "numbers.parquet")
    arguments = [
        f"--input_dir={tmp_path / 'in'}",
        f"--tokenizer_dir={tokenizer_dir}",
        f"--output_dir={tmp_path / 'out'}",
    ]
    said = user_error(run_script, *arguments)
    for name in ("garbage", "truncated", "zero", "other_column", "numbers"):
        assert f"{name}.parquet" in said
    assert "no column 'text' (it has content, id)" in said and "int64, not text" in said
    assert not (tmp_path / "out").exists()

    run_script("optimize_dataset.py", *arguments, "--on_bad_file=quarantine", "--val_fraction=0.2")
    listed = [json.loads(line) for line in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()]
    assert {entry["path"].split(".")[0] for entry in listed} == {
        "garbage",
        "truncated",
        "zero",
        "other_column",
        "numbers",
    }
    assert len(decoded(tmp_path / "out", "train") + decoded(tmp_path / "out", "val")) == 50


def test_directory_with_foreign_files_is_refused_and_left_alone(run_script, tmp_path, tokenizer_dir, parquet_dir):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    arguments = [f"--input_dir={parquet_dir}", f"--tokenizer_dir={tokenizer_dir}", f"--output_dir={tmp_path / 'out'}"]
    assert "thesis.txt" in user_error(run_script, *arguments)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_neither_bos_nor_eos_is_refused(run_script, tmp_path, tokenizer_dir, parquet_dir):
    said = user_error(
        run_script,
        f"--input_dir={parquet_dir}",
        f"--tokenizer_dir={tokenizer_dir}",
        f"--output_dir={tmp_path / 'out'}",
        "--add_bos=false",
    )
    assert "neither BOS nor EOS" in said and "--add_eos=true" in said


def test_dry_run_prints_the_plan_and_writes_nothing(run_script, tmp_path, tokenizer_dir, parquet_dir):
    process = run_script(
        "optimize_dataset.py",
        f"--input_dir={parquet_dir}",
        f"--tokenizer_dir={tokenizer_dir}",
        f"--output_dir={tmp_path / 'out'}",
        "--dry_run",
    )
    for expected in ("3 parquet files", "rows", "work: 1 unit of about", "tokens,", "on disk", "free", "cores"):
        assert expected in process.stdout
    assert not (tmp_path / "out").exists()
