"""Small chunks become few at the merge, so that training reads their tokens; nothing else about the dataset changes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from test_merge_files import merge
from token_folders import make_folder, make_split_manifest

from tokenization.chunk_reader import read_documents
from utils.chunks import read_index
from utils.manifest import damaged_files, read_manifest

CHUNK_TOKENS = 1000
CONTEXT_TOKENS = 128
# One small chunk per unit, as a validation split has them, and in the middle a unit that fills one chunk and more.
LENGTHS = {f"chunk-{unit:07d}-0.bin": [60 + 7 * unit, 0, 31, 100] for unit in range(12)}
LENGTHS["chunk-0000006-0.bin"] = [700, 330]
LENGTHS["chunk-0000006-1.bin"] = [90]
GATHERED = [
    "chunk-0000000-0-to-0000003-0.bin",
    "chunk-0000004-0-to-0000005-0.bin",
    "chunk-0000006-0.bin",
    "chunk-0000006-1-to-0000009-0.bin",
    "chunk-0000010-0-to-0000011-0.bin",
]


def make_source(source: Path, num_nodes: int) -> Path:
    """OUT/val as nodes leave it; the same chunks whichever node made them."""
    for node in range(num_nodes):
        names = sorted(LENGTHS)[node::num_nodes]
        make_folder(source / str(node), {name: LENGTHS[name] for name in names}, chunk_tokens=CHUNK_TOKENS)
        for name in names:  # content by name, not by node
            rewrite(source / str(node), name)
    make_split_manifest(source)
    return source


def rewrite(folder: Path, name: str) -> None:
    from utils.files import checksum
    from utils.manifest import write_manifest

    path = folder / name
    raw = path.read_bytes()
    tokens = np.random.default_rng(list(name.encode())).integers(0, 1000, sum(LENGTHS[name])).astype("uint16").tobytes()
    path.write_bytes(raw[: len(raw) - len(tokens)] + tokens)
    manifest = read_manifest(folder)
    for entry in manifest["files"]:
        if entry["name"] == name:
            entry["xxh3_128"] = checksum(path)
    write_manifest(folder, manifest)


@pytest.fixture
def source(tmp_path) -> Path:
    return make_source(tmp_path / "OUT" / "val", num_nodes=3)


def documents_of(directory: Path) -> list[list[int]]:
    index = read_index(directory, "test")
    return [d.tolist() for chunk in index.chunks for d in read_documents(directory / chunk.name, index.dtype)]


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_small_neighbours_become_one_chunk_of_the_same_documents(run_script, source, tmp_path):
    target, kept = tmp_path / "DATA", tmp_path / "kept"
    process = merge(run_script, source, target)
    assert "gather: 12 small chunks become 4" in process.stdout
    merge(run_script, source, kept, "--gather=false")
    assert [chunk.name for chunk in read_index(target, "test").chunks] == GATHERED
    assert len(read_index(kept, "test").chunks) == len(LENGTHS)
    assert documents_of(target) == documents_of(kept)
    assert damaged_files(target, read_manifest(target)["files"]) == []
    assert all(chunk.tokens <= CHUNK_TOKENS for chunk in read_index(target, "test").chunks if "-to-" in chunk.name)
    # What is at least half full is linked and not copied.
    assert (target / "chunk-0000006-0.bin").samefile(next(source.glob("*/chunk-0000006-0.bin")))


def test_the_cluster_does_not_show(run_script, source, tmp_path):
    merge(run_script, source, tmp_path / "three")
    merge(run_script, make_source(tmp_path / "other" / "val", num_nodes=1), tmp_path / "one", "--mode=copy")
    assert contents(tmp_path / "three") == contents(tmp_path / "one")


def test_litdata_and_litgpt_read_the_tokens_that_small_chunks_lost(run_script, source, tmp_path):
    from litdata import StreamingDataset, TokensLoader
    from litgpt.data import LitData

    said = merge(run_script, source, tmp_path / "DATA").stdout
    merge(run_script, source, tmp_path / "kept", "--gather=false")
    block = CONTEXT_TOKENS + 1
    found, before = (
        StreamingDataset(str(tmp_path / name), item_loader=TokensLoader(block_size=block)) for name in ("DATA", "kept")
    )
    assert len(found) > len(before)
    tokens = [np.concatenate(read_documents(tmp_path / "DATA" / name, "uint16")) for name in GATHERED]
    blocks = [chunk[i : i + block] for chunk in tokens for i in range(0, len(chunk) - block + 1, block)]
    assert [found[i].tolist() for i in range(len(found))] == [b.tolist() for b in blocks]
    data = LitData(data_path=tmp_path / "DATA", num_workers=0)
    data.connect(batch_size=1, max_seq_length=CONTEXT_TOKENS)
    assert {tuple(row) for batch in data.train_dataloader() for row in batch.tolist()} <= {tuple(b) for b in blocks}
    assert "which training does not read: 100.00% at a context of 2,048" in said


def test_an_interrupted_merge_is_finished(run_script, source, tmp_path):
    target = tmp_path / "DATA"
    merge(run_script, source, target)
    whole = contents(target)
    assert "nothing to do" in merge(run_script, source, target).stdout
    for name in ("manifest.json", "index.json", GATHERED[1], GATHERED[2]):
        (target / name).unlink()
    (target / f".tmp-{GATHERED[1]}-0123456789ab").write_bytes(b"half")
    merge(run_script, source, target)
    assert contents(target) == whole
    (target / "manifest.json").unlink()
    raw = bytearray(whole[GATHERED[0]])
    raw[-1] ^= 1
    (target / GATHERED[0]).write_bytes(raw)
    assert "is another file" in merge(run_script, source, target, code=2).stderr


def test_damage_is_noticed_while_gathering(run_script, source, tmp_path):
    path = next(source.glob("*/chunk-0000002-0.bin"))
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    said = merge(run_script, source, tmp_path / "DATA", code=2).stderr
    assert f"{path}: its content differs" in said and "python optimize_dataset.py" in said
    assert not (tmp_path / "DATA" / GATHERED[0]).exists() and not list((tmp_path / "DATA").glob(".tmp-*"))


def test_a_merge_that_was_begun_otherwise_is_finished_as_it_was_begun(run_script, source, tmp_path):
    """An earlier version gathered nothing."""
    target = tmp_path / "DATA"
    merge(run_script, source, target, "--gather=false")
    whole = contents(target)
    assert "nothing to do" in merge(run_script, source, target).stdout
    for name in ("manifest.json", "index.json", "chunk-0000000-0.bin"):
        (target / name).unlink()
    merge(run_script, source, target)
    assert contents(target) == whole
    (target / "chunk-0000004-0.bin").unlink()
    merge(run_script, source, target)
    assert contents(target) == whole
    merge(run_script, source, tmp_path / "gathered")
    (tmp_path / "gathered" / "manifest.json").unlink()
    said = merge(run_script, source, tmp_path / "gathered", "--gather=false", code=2).stderr
    assert "begun with small chunks gathered" in said


def test_move_takes_what_is_gathered_too_and_notes_where_it_went(run_script, source, tmp_path):
    target = tmp_path / "DATA"
    merge(run_script, source, target, "--mode=move")
    assert not list(source.rglob("*.bin")) and damaged_files(target, read_manifest(target)["files"]) == []
    assert json.loads((source / "moved.json").read_text()) == {"target_dir": str(target)}
    assert "nothing to do" in merge(run_script, source, target, "--mode=move").stdout
    said = merge(run_script, source, tmp_path / "other", code=2).stderr
    assert f"--mode=move took chunks from there to {target}" in said and "Traceback" not in said
    assert "python optimize_dataset.py" not in said  # it would find nothing to do


def test_mode_index_makes_no_files(run_script, source):
    before = set(source.rglob("*.bin"))
    merge(run_script, source, source, "--mode=index")
    assert set(source.rglob("*.bin")) == before and len(read_index(source, "test").chunks) == len(LENGTHS)


def test_a_dataset_that_is_merged_again_keeps_what_it_was_made_of(run_script, source, tmp_path):
    merge(run_script, source, tmp_path / "DATA")
    merge(run_script, tmp_path / "DATA", tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "DATA")


def test_what_is_gathered_twice_names_the_chunks_of_step_1(run_script, source, tmp_path):
    merge(run_script, source, tmp_path / "DATA")
    index = json.loads((tmp_path / "DATA" / "index.json").read_text())
    index["config"]["chunk_size"] *= 100  # tokens, at which chunks are cut
    (tmp_path / "DATA" / "index.json").write_text(json.dumps(index))
    merge(run_script, tmp_path / "DATA", tmp_path / "again")
    (entry,) = read_manifest(tmp_path / "again")["files"]
    assert [part["name"] for part in entry["gathered"]] == sorted(LENGTHS)
