"""Step 2 with --pack_tokens: the blocks that packing.py plans, written, finished after a kill, made again."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from test_merge_files import merge
from test_packing import packed
from token_folders import make_folder, make_split_manifest

from tokenization.chunk_reader import read_documents
from utils.chunks import read_index
from utils.manifest import damaged_files, read_manifest, write_manifest

BLOCK, WINDOW = 64, 2048
LENGTHS = np.random.default_rng(0).integers(1, 100, 600).tolist()
PACKED = (f"--pack_tokens={BLOCK}", f"--pack_window_tokens={WINDOW}")


def make_source(source: Path, num_nodes: int = 2, seed: int = 0, chunk_tokens: int = 10) -> Path:
    """Thirty units of twenty documents each, done by several nodes."""
    units = {f"chunk-{unit:07d}-0.bin": LENGTHS[20 * unit : 20 * unit + 20] for unit in range(30)}
    for node in range(num_nodes):
        settings = {"bos_id": 0, "eos_id": None, "chunk_tokens": chunk_tokens}
        mine = list(units)[node::num_nodes]
        chunks = {name: units[name] for name in mine}
        make_folder(source / str(node), chunks, seed=seed, chunk_tokens=chunk_tokens, settings=settings)
    make_split_manifest(source)
    return source


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return make_source(tmp_path_factory.mktemp("packed") / "OUT" / "train")


@pytest.fixture(scope="module")
def dataset(source) -> Path:
    target = source.parent.parent / "DATA"
    command = [sys.executable, ROOT / "merge_files.py", f"--source_dir={source}", f"--target_dir={target}", *PACKED]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    return target


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def documents_of(source: Path) -> list[np.ndarray]:
    """In the order of the units."""
    paths = sorted(source.glob("*/*.bin"), key=lambda path: path.name)
    return [document for path in paths for document in read_documents(path, "uint16")]


def test_the_chunks_hold_the_blocks_that_were_planned(source, dataset):
    documents = documents_of(source)
    windows = packed(LENGTHS, BLOCK, WINDOW)
    index, manifest = read_index(dataset, "test"), read_manifest(dataset, "dataset")
    assert len(windows) == len(index.chunks) > 5
    for window, chunk in zip(windows, index.chunks):
        pieces = [piece for block in [*window.blocks, window.rest] for piece in block]
        found = read_documents(dataset / chunk.name, "uint16")
        for piece, tokens in zip(pieces, found, strict=True):
            np.testing.assert_array_equal(tokens, documents[piece.document][piece.first : piece.end])
        assert chunk.tokens == BLOCK * len(window.blocks) + sum(piece.tokens for piece in window.rest)
    content, counts = manifest["content"], manifest["packing"]
    assert (content["documents"], content["tokens"]) == (600, sum(LENGTHS))
    assert content["pieces"] == index.documents == counts["pieces"]
    assert counts["blocks"] == sum(LENGTHS) // BLOCK
    # Beside the plain cut of the gathered chunks, counted the slow way.
    assert counts["documents_cut"] == sum(window.documents_cut for window in windows)
    begins = {0: 0, **{20 * unit: 0 for unit in range(30)}}  # chunk_tokens of 10 gathers nothing
    at = plain = 0
    for document, length in enumerate(LENGTHS):
        at = begins.get(document, at)
        plain += at // BLOCK != (at + length - 1) // BLOCK
        at += length
    assert counts["plain_documents_cut"] == plain > counts["documents_cut"]
    assert damaged_files(dataset, manifest["files"]) == []


def test_litdata_reads_the_blocks(dataset):
    from litdata import StreamingDataset, TokensLoader

    blocks = StreamingDataset(str(dataset), item_loader=TokensLoader(block_size=BLOCK))
    assert len(blocks) == sum(LENGTHS) // BLOCK
    first = np.concatenate(read_documents(dataset / "packed-0000000.bin", "uint16"))[:BLOCK]
    np.testing.assert_array_equal(blocks[0], first)


def test_the_blocks_do_not_depend_on_the_nodes(run_script, tmp_path):
    """The same units on other nodes: random tokens differ by node, so these are made once and dealt out."""
    one, several = tmp_path / "one" / "train", tmp_path / "several" / "train"
    make_source(one, num_nodes=1)
    paths = sorted((one / "0").glob("*.bin"))
    make_source(several, num_nodes=3)
    for path in several.glob("*/*.bin"):
        assert path.stat().st_size == (one / "0" / path.name).stat().st_size
        shutil.copyfile(one / "0" / path.name, path)
    entries = {entry["name"]: entry for entry in read_manifest(one / "0")["files"]}
    for folder in several.iterdir():
        if folder.is_dir():
            manifest = read_manifest(folder)
            write_manifest(folder, {**manifest, "files": [entries[entry["name"]] for entry in manifest["files"]]})
    assert len(paths) == 30
    for name, split in (("a", one), ("b", several)):
        merge(run_script, split, tmp_path / name, *PACKED)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_killed_at_any_file_then_finished(source, dataset, run_script, tmp_path):
    """SIGKILL when so many chunks are there; the same command goes on and gives the bytes of an unbroken run."""
    expected, kills = contents(dataset), 0
    for num_files in (0, 1, 3, 6):
        target = tmp_path / str(num_files)
        command = [sys.executable, ROOT / "merge_files.py", f"--source_dir={source}", f"--target_dir={target}", *PACKED]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        while process.poll() is None and not (target.is_dir() and len(list(target.glob("packed-*"))) >= num_files):
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
        said = merge(run_script, source, target, *PACKED).stdout
        assert contents(target) == expected
        assert f"--target_dir={tmp_path / 'val'} {' '.join(PACKED)}\n" in said  # what to do next
    assert kills
    assert "nothing to do" in merge(run_script, source, target, *PACKED).stdout


def test_lost_chunks_are_made_again_and_others_left_alone(source, dataset, run_script, tmp_path):
    shutil.copytree(dataset, tmp_path / "DATA")
    (tmp_path / "DATA" / "packed-0000002.bin").unlink()
    (tmp_path / "DATA" / "index.json").unlink()
    said = merge(run_script, source, tmp_path / "DATA", *PACKED).stdout
    assert "made again" in said and contents(tmp_path / "DATA") == contents(dataset)


def test_a_move_takes_the_source_only_once_it_is_packed(dataset, run_script, tmp_path):
    source = make_source(tmp_path / "OUT" / "train")
    merge(run_script, source, tmp_path / "DATA", *PACKED, "--mode=move")
    assert not list(source.rglob("*.bin")) and (source / "moved.json").exists()
    assert contents(tmp_path / "DATA") == contents(dataset)
    assert "nothing to do" in merge(run_script, source, tmp_path / "DATA", *PACKED, "--mode=move").stdout


def test_another_packing_does_not_go_into_the_same_directory(source, dataset, run_script, tmp_path):
    shutil.copytree(dataset, tmp_path / "DATA")
    for arguments in ((), ("--pack_tokens=65",), (f"--pack_tokens={BLOCK}", "--pack_window_tokens=4096")):
        said = merge(run_script, source, tmp_path / "DATA", *arguments, code=2).stderr
        assert "pack_tokens: was 64" in said or "pack_window_tokens: was 2048" in said
    (tmp_path / "DATA" / "manifest.json").unlink()  # begun
    assert "is another file" in merge(run_script, source, tmp_path / "DATA", "--pack_tokens=65", code=2).stderr
    assert "packed dataset" in merge(run_script, dataset, tmp_path / "again", code=2).stderr


def test_what_cannot_be_packed_says_why(source, run_script, tmp_path):
    assert "--mode=index none" in merge(run_script, source, source, *PACKED, "--mode=index", code=2).stderr
    make_folder(tmp_path / "OUT" / "0", {"chunk-0000000-0.bin": [5]})
    make_split_manifest(tmp_path / "OUT")
    assert "BOS or EOS" in merge(run_script, tmp_path / "OUT", tmp_path / "t", *PACKED, code=2).stderr
    copy = make_source(tmp_path / "copy" / "train")
    raw = bytearray((copy / "0" / "chunk-0000004-0.bin").read_bytes())
    raw[-1] ^= 1
    (copy / "0" / "chunk-0000004-0.bin").write_bytes(raw)
    said = merge(run_script, copy, tmp_path / "t", *PACKED, code=2).stderr
    assert "chunk-0000004-0.bin: its content differs" in said and not (tmp_path / "t" / "manifest.json").exists()


def test_a_dry_run_counts_and_writes_nothing(source, dataset, run_script, tmp_path):
    said = merge(run_script, source, tmp_path / "t", *PACKED, "--dry_run").stdout
    lines = [line for line in said.splitlines() if line.startswith(("documents cut", "tokens that"))]
    said = merge(run_script, source, dataset, *PACKED).stdout
    assert len(lines) == 2 and all(line in said for line in lines) and not (tmp_path / "t").exists()


@pytest.mark.parametrize("gather", [True, False])
def test_cuts_padding_and_what_is_not_read_are_said_beside_those_of_the_plain_merge(gather, run_script, tmp_path):
    """Counted token by token in what the two merges write, and by litdata's own count of blocks."""
    source = make_source(tmp_path / "OUT" / "train", chunk_tokens=3000)
    flags = () if gather else ("--gather=false",)
    said = merge(run_script, source, tmp_path / "packed", *PACKED, *flags).stdout
    merge(run_script, source, tmp_path / "plain", *flags)
    documents, tokens = documents_of(source), sum(LENGTHS)
    chunks = sorted((tmp_path / "plain").glob("*.bin"), key=lambda path: path.name)
    assert (len(chunks) < 30) == gather
    plain_cut = plain_unread = 0
    for path in chunks:
        lengths = [len(document) for document in read_documents(path, "uint16")]
        numbers = np.repeat(np.arange(len(lengths)), lengths)
        num_read = len(numbers) // BLOCK * BLOCK
        plain_unread += len(numbers) - num_read
        touched = [set(numbers[begin : begin + BLOCK].tolist()) for begin in range(0, len(numbers), BLOCK)]
        plain_cut += sum(sum(number in block for block in touched) > 1 for number in range(len(lengths)))
    pieces = [each.tobytes() for path in (tmp_path / "packed").glob("*.bin") for each in read_documents(path, "uint16")]
    cut = sum((Counter(document.tobytes() for document in documents) - Counter(pieces)).values())
    unread = tokens - BLOCK * num_blocks(tmp_path / "packed")
    assert plain_unread == tokens - BLOCK * num_blocks(tmp_path / "plain")
    assert 0 < cut < plain_cut and 0 < unread < plain_unread
    line_of = {line.split(":")[0]: line for line in said.splitlines()}
    assert f": {cut / 600:.2%} ({cut} of 600" in line_of["documents cut"]
    assert f"without packing {plain_cut / 600:.2%} ({plain_cut})" in line_of["documents cut"]
    line = line_of["tokens that training does not read"]
    padding = sum(len(piece) // 2 for piece in pieces) - tokens
    assert f": {padding / tokens:.2%} padding, {unread / tokens:.2%} at the dataset's end ({unread:,}); " in line
    assert line.endswith(
        f"without packing 0.00% padding, {plain_unread / tokens:.2%} at the ends of chunks ({plain_unread:,})"
    )


def num_blocks(dataset: Path) -> int:
    from litdata import StreamingDataset, TokensLoader

    return len(StreamingDataset(str(dataset), item_loader=TokensLoader(block_size=BLOCK)))


def test_a_dataset_that_was_packed_before_this_was_counted_says_the_rest(dataset, run_script, tmp_path):
    shutil.copytree(dataset, tmp_path / "DATA")
    manifest = read_manifest(dataset)
    del manifest["packing"]["plain_unread_tokens"]
    write_manifest(tmp_path / "DATA", manifest)
    said = run_script(
        "merge_files.py", f"--source_dir={tmp_path / 'gone'}", f"--target_dir={tmp_path / 'DATA'}", *PACKED
    )
    (line,) = (line for line in said.stdout.splitlines() if line.startswith("tokens that"))
    assert line.endswith(f"at the dataset's end ({manifest['packing']['rest_tokens']:,})")


# VmHWM is the command's own peak; what wait4 says of a child counts the peak of this process too.
WITH_OWN_PEAK = (
    "import atexit, runpy, sys; sys.argv = sys.argv[1:]; "
    "atexit.register(lambda: print(open('/proc/self/status').read())); runpy.run_path(sys.argv[0], run_name='__main__')"
)


def test_memory_does_not_grow_with_the_dataset_and_little_with_short_documents(tmp_path):
    """Of documents of four tokens there are 131,072 in a window: as Python objects, 15 MB and more."""
    window, peak_mib = 1 << 19, {}
    for num_windows in (1, 4, 16):
        source, target = tmp_path / str(num_windows) / "train", tmp_path / str(num_windows) / "DATA"
        chunks = {f"chunk-{unit:07d}-0.bin": [4] * (window // 4) for unit in range(num_windows)}
        make_folder(source / "0", chunks, chunk_tokens=window, settings={"bos_id": 0, "eos_id": None})
        make_split_manifest(source)
        flags = (f"--source_dir={source}", f"--target_dir={target}", "--pack_tokens=1025")
        command = [
            sys.executable,
            "-c",
            WITH_OWN_PEAK,
            ROOT / "merge_files.py",
            *flags,
            f"--pack_window_tokens={window}",
        ]
        said = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout
        assert len(list(target.glob("packed-*.bin"))) == num_windows
        peak_mib[num_windows] = int(re.search(r"VmHWM:\s+(\d+) kB", said)[1]) / 1024
    assert peak_mib[16] < 1.15 * peak_mib[4], peak_mib
    assert peak_mib[4] - peak_mib[1] < 40, peak_mib  # for three windows more that are in memory at once
