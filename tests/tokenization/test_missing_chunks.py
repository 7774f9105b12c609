"""What is deleted from OUT or DATA is made again by the commands that the messages name, with the bytes of before."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT

from utils.chunks import read_index
from utils.manifest import read_manifest


class Work:
    """OUT, and what is merged from it, in a directory of the test's own."""

    def __init__(self, directory: Path, tokenizer: Path):
        self.directory, self.tokenizer, self.out = directory, tokenizer, directory / "OUT"

    def script(self, name: str, *arguments, code: int = 0) -> subprocess.CompletedProcess:
        process = subprocess.run(
            [sys.executable, str(ROOT / name), *map(str, arguments)], capture_output=True, text=True, timeout=120
        )
        assert process.returncode == code, process.stdout + process.stderr
        assert "Traceback" not in process.stderr
        return process

    def optimize(self, *more, code: int = 0) -> subprocess.CompletedProcess:
        return self.script(
            "optimize_dataset.py",
            *(f"--input_dir={self.directory / 'in'}", f"--tokenizer_dir={self.tokenizer}", f"--output_dir={self.out}"),
            *("--val_fraction=0.2", "--unit_bytes=20000", "--chunk_tokens=6000", "--address=local", "--num_workers=1"),
            *more,
            code=code,
        )

    def merge(self, split: str, *more, code: int = 0) -> subprocess.CompletedProcess:
        target = self.directory / "DATA" / split
        return self.script(
            "merge_files.py", f"--source_dir={self.out / split}", f"--target_dir={target}", *more, code=code
        )

    def advised(self, said: str) -> subprocess.CompletedProcess:
        """Runs the command that a message names, word for word."""
        command = next(line for line in said.splitlines() if line.strip().startswith("python optimize_dataset.py"))
        return self.script(*shlex.split(command)[1:], "--address=local", "--num_workers=1")

    def data(self, split: str) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (self.directory / "DATA" / split).iterdir()}

    def chunks(self) -> dict[str, bytes]:
        return {str(path.relative_to(self.out)): path.read_bytes() for path in self.out.rglob("*.bin")}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tokenizer_dir, documents) -> Work:
    """Some ten units; the text is stored plainly, so that a test can change it without touching the footer."""
    work = Work(tmp_path_factory.mktemp("finished"), tokenizer_dir)
    (work.directory / "in").mkdir()
    for part in range(2):
        table = pa.table({"text": documents[part * 60 : part * 60 + 60]})
        path = work.directory / "in" / f"{part}.parquet"
        pq.write_table(table, path, row_group_size=10, compression="none", use_dictionary=False, write_statistics=False)
    work.optimize()
    return work


@pytest.fixture
def work(finished, tmp_path) -> Work:
    """A copy of it, so that a test may break it."""
    for name in ("in", "OUT"):
        shutil.copytree(finished.directory / name, tmp_path / name)
    for path in (tmp_path / "in").iterdir():
        times = (finished.directory / "in" / path.name).stat()
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    return Work(tmp_path, finished.tokenizer)


def test_a_finished_output_is_left_alone(work):
    before = {path: path.stat().st_mtime_ns for path in work.out.rglob("*")}
    assert "finished already, nothing to do" in work.optimize().stdout
    assert {path: path.stat().st_mtime_ns for path in work.out.rglob("*")} == before


def test_chunks_deleted_from_a_finished_output_are_made_again_and_no_others(work):
    before, (train, *_) = work.chunks(), sorted((work.out / "train" / "0").glob("*.bin"))
    val = sorted((work.out / "val" / "0").glob("*.bin"))[-1]
    untouched = {p: p.stat().st_mtime_ns for p in work.out.rglob("*.*") if p not in (train, val)}
    train.unlink()
    val.write_bytes(val.read_bytes()[:-2])
    said = work.optimize().stdout
    assert f"train/0/{train.name}" in said and f"val/0/{val.name}" in said and "tokenizing 2 units again" in said
    assert "2 missing chunks made again" in said and "nothing to do" not in said
    assert work.chunks() == before
    assert {p: p.stat().st_mtime_ns for p in work.out.rglob("*.*") if p not in (train, val)} == untouched
    assert "nothing to do" in work.optimize().stdout


@pytest.mark.parametrize(
    "gone",
    [
        ["train/0/index.json"],
        ["train/0/index.json", "train/0/manifest.json", "train/manifest.json"],
        ["val"],
        ["val", "train/manifest.json", "progress.jsonl"],
    ],
)
def test_indexes_manifests_and_whole_splits_are_made_again(work, gone):
    before = {p: p.read_bytes() for p in work.out.rglob("*") if p.is_file() and p.name != "progress.jsonl"}
    for name in gone:
        path = work.out / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    work.optimize()
    assert {p: p.read_bytes() for p in work.out.rglob("*") if p.is_file() and p.name != "progress.jsonl"} == before


def test_text_that_has_changed_is_refused_and_nothing_replaced(work):
    path = work.directory / "in" / "0.parquet"
    times, raw = path.stat(), bytearray(path.read_bytes())
    at = raw.index(b"the ")
    raw[at : at + 4] = b"THE "  # the footer, the size and the time stay as they were
    path.write_bytes(raw)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    lost = [p for p in work.out.rglob("chunk-0000000-*.bin")]
    kept = {name: content for name, content in work.chunks().items() if "chunk-0000000-" not in name}
    for chunk in lost:
        chunk.unlink()
    said = work.optimize(code=2).stderr
    assert "the input files have changed" in said.lower() and "chunk-0000000-0.bin" in said
    assert work.chunks() == kept and not list(work.out.glob(".tmp-*"))


def test_input_that_is_gone_is_one_clear_error(work):
    next((work.out / "train" / "0").glob("*.bin")).unlink()
    shutil.rmtree(work.directory / "in")
    said = work.optimize(code=2).stderr
    assert said.count("error:") == 1 and f"--input_dir={work.directory / 'in'}" in said


def test_the_validation_document_of_a_small_input_is_chosen_again(work):
    """No hash is below the threshold, so the smallest one was: its unit must be done with the same choice."""
    work.out, fraction = work.directory / "few", "--val_fraction=1e-9"
    work.optimize(fraction)
    before, (val,) = work.chunks(), (work.out / "val" / "0").glob("*.bin")
    val.unlink()
    assert "1 missing chunk made again" in work.optimize(fraction).stdout
    assert work.chunks() == before


@pytest.mark.parametrize("mode", ["link", "copy"])
def test_a_chunk_deleted_from_the_dataset_is_taken_from_the_source_again(work, mode):
    for split in ("train", "val"):
        work.merge(split, f"--mode={mode}")
        before = work.data(split)
        names = [chunk.name for chunk in read_index(work.directory / "DATA" / split, "test").chunks]
        assert split == "train" or "-to-" in names[0]
        (work.directory / "DATA" / split / names[0]).unlink()
        cut = work.directory / "DATA" / split / names[-1]
        content = cut.read_bytes()
        cut.unlink()
        cut.write_bytes(content[:-2])
        said = work.merge(split, f"--mode={mode}").stdout
        assert "made again" in said and names[0] in said and "nothing to do" not in said
        assert work.data(split) == before
        assert "merged already, nothing to do" in work.merge(split, f"--mode={mode}").stdout


def test_damaged_bytes_are_found_where_the_bytes_are_read(work):
    work.merge("val", "--mode=copy")
    before = work.data("val")
    path = next((work.directory / "DATA" / "val").glob("*.bin"))
    path.write_bytes(path.read_bytes()[:-2] + b"??")
    assert "nothing to do" in work.merge("val").stdout
    assert path.name in work.merge("val", "--verify=checksums", "--mode=copy").stdout
    assert work.data("val") == before


def test_damaged_bytes_of_a_linked_file_are_damaged_at_both_ends(work):
    work.merge("train")
    before, chunk = (
        work.data("train"),
        next(path for path in work.out.glob("train/0/*.bin") if path.stat().st_nlink > 1),
    )
    with open(chunk, "r+b") as file:
        file.seek(-2, os.SEEK_END)
        file.write(b"??")
    said = work.merge("train", "--verify=checksums", code=2).stderr
    assert f"{chunk}: its content differs" in said and "Delete the damaged files" in said
    chunk.unlink()
    work.advised(said)
    assert chunk.name in work.merge("train", "--verify=checksums").stdout
    assert work.data("train") == before


def test_an_index_deleted_from_the_dataset_needs_no_source(work):
    work.merge("val", "--mode=copy")
    before = work.data("val")
    (work.directory / "DATA" / "val" / "index.json").unlink()
    shutil.rmtree(work.out)
    work.merge("val")
    assert work.data("val") == before


def test_what_the_source_lacks_too_is_named_with_the_command_that_makes_it(work):
    for split in ("train", "val"):
        work.merge(split)
        before = work.data(split)
        source = sorted((work.out / split / "0").glob("*.bin"))[0]
        chunk = read_index(work.directory / "DATA" / split, "test").chunks[0].name
        source.unlink()
        (work.directory / "DATA" / split / chunk).unlink()
        said = work.merge(split, code=2).stderr
        assert said.count("error:") == 1 and str(source) in said
        assert "1 missing chunk made again" in work.advised(said).stdout
        assert chunk in work.merge(split).stdout
        assert work.data(split) == before


def test_a_source_that_is_gone_altogether_is_made_again_too(work):
    work.merge("val")
    before = work.data("val")
    next((work.directory / "DATA" / "val").glob("*.bin")).unlink()
    shutil.rmtree(work.out)
    said = work.merge("val", code=2).stderr
    assert "--input_dir=PARQUET" in said and "--val_fraction=0.2" in said and "--chunk_tokens=6000" in said
    work.advised(said.replace("PARQUET", str(work.directory / "in")).replace("CKPT", str(work.tokenizer)))
    work.merge("val")
    assert work.data("val") == before


def test_a_chunk_missing_before_the_merge_is_named_with_the_command_that_makes_it(work):
    source = sorted((work.out / "train" / "0").glob("*.bin"))[0]
    source.unlink()
    said = work.merge("train", code=2).stderr
    assert said.count("error:") == 1 and f"{source}: missing" in said
    work.advised(said)
    work.merge("train")


def test_damaged_bytes_of_the_source_are_deleted_and_made_again_as_advised(work):
    source = sorted((work.out / "val" / "0").glob("*.bin"))[0]
    whole = source.read_bytes()
    source.write_bytes(whole[:-2] + b"??")
    said = work.merge("val", code=2).stderr
    assert f"{source}: its content differs" in said and "Delete the damaged files" in said
    source.unlink()
    work.advised(said)
    assert source.read_bytes() == whole
    work.merge("val")


@pytest.mark.parametrize("noted", [True, False])
def test_after_a_move_only_what_the_dataset_lost_is_made_again(work, noted):
    """An earlier version did not note where the chunks went."""
    for split in ("train", "val"):
        work.merge(split, "--mode=move")
        if not noted:
            (work.out / split / "moved.json").unlink()
    assert not work.chunks()
    process = work.optimize()
    assert ("nothing to do" in process.stdout) and ("--mode=move took them" in process.stderr) is not noted
    for split in ("train", "val"):
        before = work.data(split)
        entry = read_manifest(work.directory / "DATA" / split)["files"][0]
        (work.directory / "DATA" / split / entry["name"]).unlink()
        said = work.merge(split, "--mode=move", code=2).stderr
        count = len(entry.get("gathered", [entry]))
        assert f"{count} missing chunk" in work.advised(said).stdout and len(work.chunks()) == count
        work.merge(split, "--mode=move")
        assert work.data(split) == before and not work.chunks()


@pytest.mark.parametrize("noted", [True, False])
def test_a_dataset_that_was_moved_there_and_deleted_is_made_again(work, noted):
    work.merge("train", "--mode=move")
    work.merge("val", "--mode=move")
    before, train = work.data("val"), work.data("train")
    shutil.rmtree(work.directory / "DATA" / "val")
    if not noted:
        (work.out / "val" / "moved.json").unlink()
    said = work.merge("val", code=2).stderr
    assert "made again" in work.advised(said).stdout
    assert all(name.startswith("val/") for name in work.chunks())
    work.merge("val", "--mode=move")
    assert work.data("val") == before and work.data("train") == train and not work.chunks()


def test_another_source_is_not_taken_for_the_one_that_was_merged(work):
    work.merge("val")
    name = read_index(work.directory / "DATA" / "val", "test").chunks[0].name
    (work.directory / "DATA" / "val" / name).unlink()
    first = work.out
    work.out = work.directory / "other"
    work.optimize("--add_eos=true")
    assert "was made with something else" in work.merge("val", code=2).stderr
    work.out = first
    work.merge("val")


def test_chunks_indexed_in_place_are_made_again_by_step_1(work):
    arguments = (f"--source_dir={work.out / 'val'}", f"--target_dir={work.out / 'val'}", "--mode=index")
    work.script("merge_files.py", *arguments)
    before, path = work.chunks(), next((work.out / "val" / "0").glob("*.bin"))
    path.unlink()
    said = work.script("merge_files.py", *arguments, code=2).stderr
    assert path.name in said
    work.advised(said)
    assert work.chunks() == before
    assert "nothing to do" in work.script("merge_files.py", *arguments).stdout


def damage(path: Path) -> None:
    """Other bytes, as many."""
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[:-2] + b"??")


def test_rotten_bytes_of_a_moved_chunk_are_made_again_as_advised(work):
    """Step 1 compares sizes, and would find all that was moved in its place."""
    work.merge("val", "--mode=move")
    before = work.data("val")
    path = next((work.directory / "DATA" / "val").glob("*.bin"))
    damage(path)
    said = work.merge("val", "--mode=move", "--verify=checksums", code=2).stderr
    assert f"delete {path} first" in said
    path.unlink()
    assert "made again" in work.advised(said).stdout
    work.merge("val", "--mode=move")
    assert work.data("val") == before


def test_an_advised_command_has_a_seed_of_0(tmp_path):
    from tokenization.missing_chunks import optimize_command

    settings = {"shuffle_seed": 0, "parse_special_tokens": False, "limit_documents": None, "on_bad_file": "fail"}
    command = optimize_command(tmp_path / "OUT" / "train", settings)
    assert command.endswith(f"--output_dir={tmp_path / 'OUT'} --shuffle_seed=0")


def test_a_lost_index_of_one_split_says_nothing_of_the_other(work):
    """An earlier version moved train, and noted it nowhere."""
    work.merge("train", "--mode=move")
    (work.out / "train" / "moved.json").unlink()
    before = work.chunks()
    (work.out / "val" / "0" / "index.json").unlink()
    process = work.optimize()
    assert "made again: val/0/index.json" in process.stdout and "--mode=move took them" in process.stderr
    assert work.chunks() == before


def test_chunks_that_were_moved_twice_are_not_lost(work):
    work.merge("val", "--mode=move")
    first, second = work.directory / "DATA" / "val", work.directory / "DATA2" / "val"
    work.script("merge_files.py", f"--source_dir={first}", f"--target_dir={second}", "--mode=move")
    assert not list(first.glob("*.bin"))
    assert "nothing to do" in work.optimize().stdout
    shutil.rmtree(second)
    process = work.optimize()
    assert f"took them to {second}, where they are not now" in process.stderr


def test_a_lost_index_leaves_what_was_merged_in_place(work):
    split = work.out / "val"
    work.script("merge_files.py", f"--source_dir={split}", f"--target_dir={split}", "--mode=index")
    before = {name: (split / name).read_bytes() for name in ("manifest.json", "index.json", "0/index.json")}
    (split / "0" / "index.json").unlink()
    work.optimize()
    assert {name: (split / name).read_bytes() for name in before} == before


def test_what_a_killed_repair_left_is_removed_and_no_obstacle(work):
    from utils.manifest import claim

    left = work.out / ".tmp-again-0123456789ab" / "train" / "0"
    left.mkdir(parents=True)
    (left / "chunk-0000000-0.bin").write_bytes(b"half")
    assert claim(left.parents[2], "--output_dir", "dataset", {}, lambda path: not path.startswith(".tmp-")) is None
    assert "nothing to do" in work.optimize().stdout
    assert not list(work.out.glob(".tmp-*"))
