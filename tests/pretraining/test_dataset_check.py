"""Text that changed on disk after it was merged is found, before the run or while it trains."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from tiny_runs import write_dataset

from pretraining.data import Sequences
from pretraining.dataset_check import Reading
from pretraining.dataset_index import check_index_agrees
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


@pytest.mark.parametrize(
    ("change", "word"), [(cut, "lists 2 chunks"), (reverse, "chunk 0 is chunk-5.bin"), (count, "1319 tokens")]
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
