"""Crashes and lost chunks with inputs of one kind alone, and the order of all kinds together.

test_optimize_dataset_crashes.py has all kinds in one directory, where a crash meets now one and now another.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from input_kinds import write_several, write_texts
from test_optimize_dataset import decoded
from test_optimize_dataset_crashes import (
    WAIT_S,
    assert_tidy,
    command,
    finished_units,
    kill_after,
    local_workers,
    wait_for,
)
from test_optimize_dataset_inputs import arguments

from tools.source_rows import Source, unit_of
from utils.manifest import read_manifest

KINDS = {
    "jsonl": (".jsonl",) * 4,
    "compressed": (".jsonl.zst", ".jsonl.gz") * 2,
    "arrow": (".arrow", ".file.arrow") * 2,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Whole:
    """What a run gave that nothing happened to."""

    inputs: Path
    output: Path
    num_units: int


def published(output: Path) -> dict[str, bytes]:
    """All chunks, indexes and manifests: a run on one machine has a single folder in each split."""
    paths = [path for split in ("train", "val") for path in (output / split).rglob("*") if path.is_file()]
    return {str(path.relative_to(output)): path.read_bytes() for path in paths}


@pytest.fixture(scope="module", params=KINDS)
def whole(request, tmp_path_factory, documents, tokenizer_dir) -> Whole:
    directory = tmp_path_factory.mktemp(request.param)
    for part, ending in enumerate(KINDS[request.param]):
        texts = [f"Part {part}, section {i}.\n\n{text}" for i, text in enumerate(documents)]
        write_several(directory / "in", str(part), ending, texts)
    arguments = command(directory / "in", tokenizer_dir, directory / "OUT", "--address=local")
    subprocess.run(arguments, check=True, timeout=300)
    return Whole(directory / "in", directory / "OUT", finished_units(directory / "OUT"))


def test_a_killed_worker_is_replaced_and_its_unit_done_again(whole, tokenizer_dir, tmp_path):
    output = tmp_path / "OUT"
    process = subprocess.Popen(command(whole.inputs, tokenizer_dir, output, "--address=local"))
    wait_for(lambda: finished_units(output) >= 2, process)
    before = {worker.pid for worker in local_workers(process)}
    local_workers(process)[0].kill()
    # Another one starts for the sake of a unit that was lost.
    wait_for(lambda: {worker.pid for worker in local_workers(process)} - before, process)
    assert process.wait(WAIT_S) == 0
    assert published(output) == published(whole.output)
    assert_tidy(output)


def test_a_killed_run_goes_on_to_the_same_bytes(whole, tokenizer_dir, tmp_path):
    output = tmp_path / "OUT"
    arguments = command(whole.inputs, tokenizer_dir, output, "--address=local")
    kill_after(3, arguments, output)
    finished = finished_units(output)
    assert finished < whole.num_units
    said = subprocess.run(arguments, check=True, timeout=300, capture_output=True, text=True).stdout
    assert re.search(r"resume: [1-9]\d* of \d+ units were finished", said)
    assert published(output) == published(whole.output)
    assert_tidy(output)


def test_deleted_chunks_are_made_again_with_the_checksums_of_before(whole, tokenizer_dir, tmp_path):
    output = Path(shutil.copytree(whole.output, tmp_path / "OUT"))
    source = Source(str(whole.inputs), read_manifest(output))
    inside = [unit.index for unit in source.units if unit.ranges[0].first > 0 and len(unit.ranges) == 1]
    assert bool(inside) is not whole.inputs.parent.name.startswith("compressed")  # which is never cut
    unit = inside[0] if inside else len(source.units) // 2
    lost = [path for path in output.rglob("*.bin") if unit_of(path.name) == unit]
    assert len(lost) >= 2
    for path in lost:
        path.unlink()
    arguments = command(whole.inputs, tokenizer_dir, output, "--address=local")
    said = subprocess.run(arguments, check=True, timeout=300, capture_output=True, text=True).stdout
    assert "tokenizing 1 unit again" in said and f"{len(lost)} missing chunks made again" in said
    assert published(output) == published(whole.output)


def test_files_of_all_kinds_are_tokenized_in_the_order_of_their_paths(documents, tokenizer_dir, tmp_path, run_script):
    from tokenizers import Tokenizer

    names = ("10.jsonl.zst", "9.arrow", "a.parquet", "a/1.file.arrow", "a/2.jsonl", "a/3.parquet", "b.jsonl.gz")
    assert list(names) == sorted(names)
    for i in reversed(range(len(names))):  # nor is it the order in which they came
        write_texts(tmp_path / "in" / names[i], documents[i * 12 : i * 12 + 12])
    run_script("optimize_dataset.py", *arguments(tmp_path, tokenizer_dir, "--unit_bytes=20000"))
    assert [entry["path"] for entry in read_manifest(tmp_path / "out")["inputs"]] == list(names)
    assert finished_units(tmp_path / "out") > 3
    tokenizer = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    number = {tuple(tokenizer.encode(text).ids): i for i, text in enumerate(documents[: 12 * len(names)])}
    found = {split: [number[tuple(ids)] for ids in decoded(tmp_path / "out", split)] for split in ("train", "val")}
    assert all(numbers == sorted(numbers) for numbers in found.values())
    assert sorted(found["train"] + found["val"]) == list(range(12 * len(names)))
