"""Text that changed on disk after it was merged is found, before the run or while it trains."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from pretrain_ranks import digests_of, run_ranks, settings_of
from tiny_runs import write_config, write_dataset

from pretraining.data import Sequences
from pretraining.dataset_check import Reading
from pretraining.dataset_index import check_index_agrees
from pretraining.events import read_events
from pretraining.left_out import LeftOut
from utils.chunks import read_index
from utils.errors import UserError
from utils.manifest import read_manifest


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("data") / "merged"
    documents = [np.full(330, i) for i in range(24)]
    write_dataset(directory / "train", documents, 1000, chunk_documents=4)
    write_dataset(directory / "val", documents[:8], 1000, chunk_documents=4)
    return directory


def cut(index: dict) -> None:
    del index["chunks"][2:]


def reverse(index: dict) -> None:
    index["chunks"].reverse()


def count(index: dict) -> None:
    index["chunks"][3]["dim"] -= 1


def take_for_int32(index: dict) -> None:
    index["config"]["data_format"] = ["no_header_tensor:16"]


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (take_for_int32, "int32, manifest.json uint16"),
        (cut, "lists 2 chunks"),
        (reverse, "chunk 0 is chunk-5.bin"),
        (count, "1319 tokens"),
    ],
)
def test_an_index_that_is_not_its_manifests_is_refused(tmp_path, dataset, change, word):
    shutil.copytree(dataset / "train", tmp_path / "train")
    manifest = read_manifest(tmp_path / "train")
    check_index_agrees(read_index(tmp_path / "train", "--dataset_path"), manifest)
    raw = json.loads((tmp_path / "train" / "index.json").read_text())
    change(raw)
    (tmp_path / "train" / "index.json").write_text(json.dumps(raw))
    for entry in manifest["files"]:  # what merge_files.py records besides
        entry.setdefault("tokens", 1320)
    with pytest.raises(UserError, match=word):
        check_index_agrees(read_index(tmp_path / "train", "--dataset_path"), manifest)


def test_the_steps_that_read_a_chunk_are_those_whose_tokens_are_in_it(dataset):
    sequences = Sequences([dataset / "train"], None, 33, seed=1)
    left_out = LeftOut(((3, 9), (30, 41)))
    reading = Reading(sequences.order, left_out.positions, 33, 4, 40)
    for chunk in (0, 5):
        held = [sequences.read(left_out.positions(np.arange(4 * step, 4 * step + 4))) for step in range(40)]
        expected = [step + 1 for step in range(40) if any(row[0] // 4 == chunk for row in held[step])]
        assert reading.steps_with(dataset / "train", 0, f"chunk-{chunk}.bin") == expected
        assert 0 < len(expected) < 40


def flip_a_byte(dataset: Path, copy: Path, chunk: str, place: int = -40) -> Path:
    shutil.copytree(dataset, copy)
    path = copy / chunk
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    return copy


def test_a_byte_that_flipped_after_the_merge_ends_the_run_and_names_file_and_steps(tmp_path, dataset):
    damaged = flip_a_byte(dataset, tmp_path / "merged", "train/chunk-2.bin")
    config = write_config(tmp_path / "tiny.yaml", train={"max_steps": 20, "save_interval": 2}, eval={"interval": None})
    checked = settings_of(config, damaged, tmp_path / "run", 2)
    unchecked = settings_of(config, damaged, tmp_path / "unchecked", 2, data__verify="sizes")
    codes = run_ranks([unchecked, checked], 2, tmp_path / "job", check=False)
    assert all(codes)
    assert len(digests_of(tmp_path / "unchecked")) == 20
    for rank in range(2):
        log = (tmp_path / "job" / f"rank-{rank}.log").read_text()
        assert "chunk-2.bin: its checksum is" in log
        assert "steps have read from it" in log or "No step has read from it yet" in log
    (event,) = read_events(tmp_path / "run")
    assert event["event"] == "damaged text" and event["chunk"] == str(damaged / "train" / "chunk-2.bin")
    assert (event["first_step"] is None) == (event["steps"] == 0) and event["steps"] <= event["step"]


def test_damaged_validation_text_is_named_as_such(tmp_path, dataset):
    damaged = flip_a_byte(dataset, tmp_path / "merged", "val/chunk-1.bin")
    config = write_config(tmp_path / "tiny.yaml", train={"max_steps": 2})
    assert run_ranks([settings_of(config, damaged, tmp_path / "run", 1)], 1, tmp_path / "job", check=False) == [1]
    assert "It holds validation text" in (tmp_path / "job" / "rank-0.log").read_text()


def test_a_token_that_has_no_embedding_is_named_with_its_place(dataset):
    sequences = Sequences([dataset / "train"], None, 33, 1, vocab_size=12)
    with pytest.raises(UserError, match=r"token id \d+ at token \d+ of .*chunk-[345]\.bin; the model has 12"):
        sequences.read(np.arange(60))
    assert Sequences([dataset / "train"], None, 33, 1, vocab_size=24).read(np.arange(60)).max() == 23
