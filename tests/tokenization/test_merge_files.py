"""Step 2 as its users run it: one dataset from the nodes' folders, no bytes moved, nothing believed unchecked."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from token_folders import make_folder, make_split_manifest

from tokenization.chunk_reader import read_documents
from utils.chunks import read_index
from utils.files import held_lock
from utils.manifest import damaged_files, read_manifest


@pytest.fixture
def source(tmp_path) -> Path:
    """Two nodes; node 1 did the first unit, and units 9 and 10 show whether the order is numeric."""
    source = tmp_path / "OUT" / "train"
    make_folder(source / "0", {"chunk-0000001-0.bin": [300, 40], "chunk-0000010-0.bin": [5]}, seed=1)
    make_folder(source / "1", {"chunk-0000000-0.bin": [7, 0, 3], "chunk-0000009-0.bin": [50]}, seed=2)
    make_split_manifest(source)
    return source


def merge(run_script, source, target, *arguments, code: int = 0) -> subprocess.CompletedProcess:
    process = run_script(
        "merge_files.py", f"--source_dir={source}", f"--target_dir={target}", *arguments, check=False, timeout=60
    )
    assert process.returncode == code, process.stdout + process.stderr
    assert "Traceback" not in process.stderr
    return process


ORDER = ["chunk-0000000-0.bin", "chunk-0000001-0.bin", "chunk-0000009-0.bin", "chunk-0000010-0.bin"]


def test_links_in_unit_order_with_index_and_manifest(run_script, source, tmp_path):
    target = tmp_path / "DATA" / "train"
    process = merge(run_script, source, target)
    assert "7 documents, 405 tokens in 4 chunks" in process.stdout
    index = read_index(target, "test")
    assert [chunk.name for chunk in index.chunks] == ORDER
    assert (index.documents, index.tokens, index.dtype) == (7, 405, "uint16")
    assert (target / ORDER[0]).samefile(source / "1" / ORDER[0])
    manifest = read_manifest(target, "dataset")
    assert damaged_files(target, manifest["files"]) == []
    assert manifest["content"]["text_bytes"] == 4 * 405
    assert manifest["inputs"] == [{"path": "a.parquet", "bytes": 1, "rows": 2, "fingerprint": "x"}]
    assert [len(document) for name in ORDER for document in read_documents(target / name, "uint16")] == [
        7, 0, 3, 300, 40, 50, 5,
    ]  # fmt: skip


def test_litdata_reads_the_merged_dataset(run_script, source, tmp_path):
    from litdata import StreamingDataset, TokensLoader

    merge(run_script, source, tmp_path / "DATA")
    dataset = StreamingDataset(str(tmp_path / "DATA"), item_loader=TokensLoader(block_size=10))
    assert len(dataset) == 1 + 34 + 5 + 0
    assert dataset[0].tolist() == np.concatenate(read_documents(source / "1" / ORDER[0], "uint16")).tolist()


def test_again_has_nothing_to_do_and_an_interrupted_merge_is_finished(run_script, source, tmp_path):
    target = tmp_path / "DATA"
    merge(run_script, source, target)
    whole = {path.name: path.read_bytes() for path in target.iterdir()}
    assert "nothing to do" in merge(run_script, source, target).stdout
    for gone in (
        ["manifest.json"],
        ["manifest.json", "index.json"],
        ["manifest.json", "index.json", ORDER[1], ORDER[3]],
    ):
        for name in gone:
            (target / name).unlink()
        (target / ".tmp-chunk-0000001-0.bin-0123456789ab").write_bytes(b"half")
        merge(run_script, source, target)
        assert {path.name: path.read_bytes() for path in target.iterdir()} == whole


def test_killed_at_any_moment_then_finished(source, tmp_path, run_script):
    """SIGKILL at a dozen moments between the start and the end of a merge that copies."""
    import signal
    import sys
    import time

    from conftest import ROOT

    reference = tmp_path / "reference"
    merge(run_script, source, reference)
    expected = {path.name: path.read_bytes() for path in reference.iterdir()}
    target = tmp_path / "DATA"
    command = [
        sys.executable,
        ROOT / "merge_files.py",
        f"--source_dir={source}",
        f"--target_dir={target}",
        "--mode=copy",
    ]
    kills = 0
    for delay_s in np.linspace(0.15, 0.45, 12):
        shutil.rmtree(target, ignore_errors=True)
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        time.sleep(delay_s)  # the moment is what varies here
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
        if (target / "manifest.json").exists():
            assert (target / "index.json").exists()
        merge(run_script, source, target, "--mode=copy")
        assert {path.name: path.read_bytes() for path in target.iterdir()} == expected
    assert kills


def test_copy_and_move_and_index_modes(run_script, source, tmp_path):
    merge(run_script, source, tmp_path / "copy", "--mode=copy")
    assert not (tmp_path / "copy" / ORDER[0]).samefile(source / "1" / ORDER[0])
    merge(run_script, source, source, "--mode=index")
    index = read_index(source, "test")
    assert [chunk.name for chunk in index.chunks] == [
        "1/" + ORDER[0],
        "0/" + ORDER[1],
        "1/" + ORDER[2],
        "0/" + ORDER[3],
    ]
    from litdata import StreamingDataset, TokensLoader

    assert len(StreamingDataset(str(source), item_loader=TokensLoader(block_size=10))) == 40


def test_move_leaves_no_names_behind(run_script, source, tmp_path):
    merge(run_script, source, tmp_path / "move", "--mode=move")
    assert not list(source.rglob("*.bin"))
    assert damaged_files(tmp_path / "move", read_manifest(tmp_path / "move")["files"]) == []
    assert "nothing to do" in merge(run_script, source, tmp_path / "move", "--mode=move").stdout


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="needs a second file system")
def test_other_file_system_is_copied_and_verified(run_script, source, tmp_path):
    import tempfile

    with tempfile.TemporaryDirectory(dir="/dev/shm") as other:
        if os.stat(other).st_dev == os.stat(tmp_path).st_dev:
            pytest.skip("needs a second file system")
        process = merge(run_script, source, Path(other) / "DATA")
        assert "different file systems: copying" in process.stdout
        assert damaged_files(Path(other) / "DATA", read_manifest(Path(other) / "DATA")["files"]) == []


def test_missing_source_and_source_without_index(run_script, tmp_path):
    assert "--source_dir" in merge(run_script, tmp_path / "nowhere", tmp_path / "t", code=2).stderr
    (tmp_path / "empty").mkdir()
    assert "no sub-folder with an index.json" in merge(run_script, tmp_path / "empty", tmp_path / "t", code=2).stderr
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize(
    "index, expected",
    [
        ('{"hello": 1}', "is not litdata's"),
        ("[1, 2", "is not litdata's"),
        (
            '{"chunks": [], "config": {"data_format": ["jpeg"], "item_loader": "PyTreeLoader"}}',
            "is not a dataset of tokens",
        ),
    ],
)
def test_index_that_is_not_of_tokens(run_script, tmp_path, index, expected):
    (tmp_path / "in" / "0").mkdir(parents=True)
    (tmp_path / "in" / "0" / "index.json").write_text(index)
    assert expected in merge(run_script, tmp_path / "in", tmp_path / "t", code=2).stderr


def test_tokenizers_and_dtypes_must_agree_naming_both_folders(run_script, source, tmp_path):
    make_folder(
        source / "2",
        {"chunk-0000011-0.bin": [9]},
        tokenizer={"sha256": "u" * 64, "vocab_size": 1000, "bos_id": 0, "eos_id": 1},
    )
    said = merge(run_script, source, tmp_path / "t", code=2).stderr
    assert "tokenizer" in said and f"{source}/0" in said and f"{source}/2" in said
    shutil.rmtree(source / "2")
    make_folder(source / "2", {"chunk-0000011-0.bin": [9]}, dtype="int32")
    said = merge(run_script, source, tmp_path / "t", code=2).stderr
    assert "dtype" in said and f"{source}/0" in said and f"{source}/2" in said


def test_missing_folder_is_noticed(run_script, source, tmp_path):
    shutil.rmtree(source / "1")
    said = merge(run_script, source, tmp_path / "t", code=2).stderr
    assert "its manifest says 405" in said and "missing: 1" in said


@pytest.mark.parametrize("damage", ["content", "truncated", "missing", "header", "index"])
def test_damage_is_noticed(run_script, source, tmp_path, damage):
    path = source / "0" / ORDER[1]
    raw = bytearray(path.read_bytes())
    if damage == "content":
        raw[-3] ^= 1
        path.write_bytes(raw)
    elif damage == "truncated":
        path.write_bytes(raw[:-2])
    elif damage == "missing":
        path.unlink()
    elif damage == "header":
        raw[4] ^= 4
        path.write_bytes(raw)
    else:
        index = json.loads((source / "0" / "index.json").read_text())
        index["chunks"][0]["dim"] += 1
        (source / "0" / "index.json").write_text(json.dumps(index))
    for mode in ("link", "copy"):
        said = merge(run_script, source, tmp_path / mode, f"--mode={mode}", code=2).stderr
        assert ORDER[1] in said or "do not name the same chunks" in said
        assert not (tmp_path / mode / "index.json").exists()


@pytest.mark.parametrize("name", ["../../secret.bin", "/etc/passwd", "link.bin", "a\0b", ""])
def test_names_that_escape_are_refused(run_script, source, tmp_path, name):
    (tmp_path / "OUT" / "secret.bin").write_bytes(b"secret")
    (source / "0" / "link.bin").symlink_to(tmp_path / "OUT" / "secret.bin")
    index = json.loads((source / "0" / "index.json").read_text())
    index["chunks"][0]["filename"] = name
    (source / "0" / "index.json").write_text(json.dumps(index))
    said = merge(run_script, source, tmp_path / "t", code=2).stderr
    assert "leads out of the directory" in said or "is not a file name" in said


def test_target_with_foreign_files_is_left_alone(run_script, source, tmp_path):
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / ORDER[0]).write_bytes(b"another chunk")
    (tmp_path / "t" / "notes.txt").write_text("mine")
    assert "notes.txt" in merge(run_script, source, tmp_path / "t", code=2).stderr
    (tmp_path / "t" / "notes.txt").unlink()
    assert "is another file" in merge(run_script, source, tmp_path / "t", code=2).stderr
    assert (tmp_path / "t" / ORDER[0]).read_bytes() == b"another chunk"


def test_plain_litdata_folders_are_merged_with_a_warning(run_script, tmp_path):
    import torch
    from litdata import StreamingDataset, TokensLoader
    from litdata.streaming.writer import BinaryWriter

    for node in range(2):
        writer = BinaryWriter(str(tmp_path / "in" / str(node)), chunk_size=1000, item_loader=TokensLoader())
        for i in range(5):
            writer[i] = torch.full((300,), 10 * node + i, dtype=torch.int32)
        writer.done()
        writer.merge()
    process = merge(run_script, tmp_path / "in", tmp_path / "t")
    assert "no manifest.json" in process.stderr
    dataset = StreamingDataset(str(tmp_path / "t"), item_loader=TokensLoader(block_size=300))
    assert [int(dataset[i][0]) for i in range(len(dataset))] == [0, 1, 2, 3, 4, 10, 11, 12, 13, 14]


def test_the_other_split_is_not_taken_for_merged_already(run_script, source, tmp_path):
    merge(run_script, source, tmp_path / "DATA")
    other = tmp_path / "OUT" / "val"
    make_folder(other / "0", {"chunk-0000000-0.bin": [4]}, split="val")
    make_split_manifest(other)
    assert "split: was 'train', is 'val'" in merge(run_script, other, tmp_path / "DATA", code=2).stderr


def test_tokens_are_compared_with_the_file_where_index_and_manifest_agree(run_script, tmp_path):
    source = tmp_path / "OUT" / "train"
    make_folder(source / "0", {"chunk-0000000-0.bin": [300, 40]})
    for name, key in (("index.json", "dim"), ("manifest.json", "tokens")):
        text = (source / "0" / name).read_text().replace(f'"{key}": 340', f'"{key}": 341')
        (source / "0" / name).write_text(text)
    make_split_manifest(source)
    assert "340 tokens, the index says 2 and 341" in merge(run_script, source, tmp_path / "t", code=2).stderr


def test_temporaries_of_others_are_left_alone(run_script, source, tmp_path):
    (tmp_path / "t" / ".tmp-upload").mkdir(parents=True)
    assert ".tmp-upload" in merge(run_script, source, tmp_path / "t", code=2).stderr
    assert (tmp_path / "t" / ".tmp-upload").is_dir()


def test_what_is_not_merged_yet_is_told_how(tmp_path):
    from utils.chunks import read_index
    from utils.errors import UserError

    make_folder(tmp_path / "train" / "0", {"chunk-0000000-0.bin": [5, 6]})
    with pytest.raises(UserError, match=r"not merged yet: .*\(0\)\. Merge them: python merge_files.py --source_dir="):
        read_index(tmp_path / "train", "--dataset_path")


def test_a_second_merge_into_the_same_target_is_refused_before_it_looks(run_script, source, tmp_path):
    (target := tmp_path / "target").mkdir()
    with held_lock(target) as mine:
        assert mine
        process = merge(run_script, source, target, code=2)
    assert "another merge_files.py writes there" in process.stderr and not list(target.iterdir())
    merge(run_script, source, target)


def test_what_is_refused_leaves_no_directory(run_script, source, tmp_path):
    (source / "0" / "chunk-0000010-0.bin").unlink()
    merge(run_script, source, tmp_path / "deep" / "target", code=2)
    assert not (tmp_path / "deep" / "target").exists()


@pytest.mark.parametrize("named", ["itself", "by a link", "from above"])
def test_a_finished_dataset_is_not_its_own_source(run_script, source, tmp_path, named):
    """A move removes from the source what the target has: here it would be all of the dataset."""
    target = tmp_path / "DATA" / "train"
    merge(run_script, source, target)
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    (tmp_path / "link").symlink_to(target)
    own = {"itself": target, "by a link": tmp_path / "link", "from above": target.parent}[named]
    assert "--target_dir" in merge(run_script, own, target, "--mode=move", code=2).stderr
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before


def test_a_move_leaves_a_dataset_that_its_source_leads_to(run_script, source, tmp_path):
    target = tmp_path / "DATA"
    merge(run_script, source, target)
    (source / "2").symlink_to(target)
    merge(run_script, source, target, "--mode=move")
    assert damaged_files(target, read_manifest(target)["files"]) == []
    assert not [path for folder in "01" for path in (source / folder).glob("*.bin")]


def test_what_was_merged_in_place_is_merged_elsewhere_as_before(run_script, source, tmp_path):
    merge(run_script, source, tmp_path / "before")
    merge(run_script, source, source, "--mode=index")
    merge(run_script, source, tmp_path / "after")
    assert (tmp_path / "after" / "manifest.json").read_bytes() == (tmp_path / "before" / "manifest.json").read_bytes()


def test_chunks_without_a_recorded_checksum_are_not_damaged(run_script, tmp_path):
    make_folder(tmp_path / "in" / "0", {"chunk-0-0.bin": [5, 6]})
    (tmp_path / "in" / "0" / "manifest.json").unlink()
    merge(run_script, tmp_path / "in", tmp_path / "t", "--verify=headers")
    assert read_manifest(tmp_path / "t")["files"][0]["xxh3_128"] is None
    assert "nothing to do" in merge(run_script, tmp_path / "in", tmp_path / "t", "--verify=checksums").stdout
