"""What planning, scheduling, merging and opening cost when the data is large: all of FineWeb, on this machine.

    python benchmarks/data_at_scale.py [--work_dir=DIR]

Real small files and links where they can be made here; made-up footers, records and indexes where they cannot (27,000
files of 1,000 row groups, 15 trillion tokens). Prints a markdown table. Every measurement is a process of its own, so
its peak memory is its own too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import multiprocessing
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from utils import cli, console

FINEWEB_FILES = 27_000
FINEWEB_ROW_GROUPS = 1_000
FINEWEB_FILE_BYTES = 2_100_000_000
FINEWEB_TEXT_BYTES_PER_FILE = 2_600_000_000
FINEWEB_TOKENS = 15_000_000_000_000


@dataclasses.dataclass
class Settings:
    """Settings."""

    work_dir: str | None = None
    """Directory for the files that are made; null: a temporary one. Removed at the end."""
    small_files: int = 10_000
    """Small parquet files to plan."""
    many_files: int = 100_000
    """Parquet files of 20 documents of 200 bytes, tokenized by the whole command."""
    chunks: int = 10_000
    """Chunk files to merge."""


def measured(work: Callable, *arguments) -> tuple[float, int, str]:
    """Run `work` in a fresh process: (seconds, peak memory in bytes, what it returned)."""

    def child(connection) -> None:
        start = time.perf_counter()
        said = work(*arguments)
        connection.send((time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, said))

    receiver, sender = multiprocessing.Pipe(False)
    process = multiprocessing.get_context("fork").Process(target=child, args=(sender,))
    process.start()
    result = receiver.recv()
    process.join()
    return result


def make_small_files(directory: Path, count: int, document_bytes: int = 2_000) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    directory.mkdir(parents=True)
    text = "A text of a hundred bytes, more or less, as one finds it in a file that somebody wrote too small. " * (
        document_bytes // 100
    )
    pq.write_table(pa.table({"text": [f"{i}: {text}" for i in range(20)]}), directory / "0.parquet")
    raw = (directory / "0.parquet").read_bytes()
    for i in range(1, count):
        (directory / f"{i}.parquet").write_bytes(raw)


def plan_files(directory: str) -> str:
    from tokenization.parquet import list_parquet_files, read_footers
    from tokenization.units import UnitPacker, default_unit_bytes

    entries = list_parquet_files(directory)
    packer = UnitPacker(default_unit_bytes(sum(entry.bytes for entry in entries)))
    for i, (_, footer, _) in enumerate(read_footers(directory, entries, "text")):
        packer.add(i, footer)
    return f"{len(packer.finish())} units"


def plan_fineweb(files: int) -> str:
    """Planning from made-up footers; keeps what optimize_dataset.py keeps of each file."""
    from tokenization.parquet import Footer
    from tokenization.units import UnitPacker, default_unit_bytes

    footer = Footer(
        (1000,) * FINEWEB_ROW_GROUPS,
        (FINEWEB_TEXT_BYTES_PER_FILE // FINEWEB_ROW_GROUPS,) * FINEWEB_ROW_GROUPS,
        "0" * 16,
    )
    inputs, packer = [], UnitPacker(default_unit_bytes(files * FINEWEB_FILE_BYTES))
    for i in range(files):
        rows = sum(footer.rows)
        inputs.append({"path": f"CC-MAIN-{i:06}.parquet", "bytes": i, "rows": rows, "fingerprint": f"{i:016x}"})
        packer.add(i, footer)
    return f"{len(packer.finish()):,} units"


def tokenize_files(directory: str, tokenizer: str, out: str) -> tuple[float, int, str]:
    """The whole command on real files; (seconds, the driver's own peak memory, what it said of its workers)."""
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "optimize_dataset.py"), f"--input_dir={directory}", f"--tokenizer_dir={tokenizer}",
         f"--output_dir={out}", "--address=local"],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    peak_kib = 0
    reader = threading.Thread(target=lambda: said.append(process.stdout.read()))
    said: list[str] = []
    reader.start()
    while process.poll() is None:  # the kernel keeps the peak, but only as long as the process lives
        with contextlib.suppress(OSError):
            status = Path(f"/proc/{process.pid}/status").read_text()
            if found := re.search(r"VmHWM:\s+(\d+)", status):  # not of a zombie
                peak_kib = int(found[1])
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.02)
    reader.join()
    if process.returncode:
        raise RuntimeError(f"optimize_dataset.py left with {process.returncode}: {said[0]}")
    tokens = re.search(r"train: .*? ([\d,]+) tokens", said[0])[1]
    return time.perf_counter() - start, peak_kib * 1024, f"{tokens} tokens; the driver alone"


def publish_fineweb(progress: str, files: int) -> str:
    """What the driver holds at the end: plan, records of all units, and the manifests that it writes."""
    import types

    from tokenization.job import UnitRecord
    from tokenization.output import _with_shared_keys, publish

    with open(progress, "rb") as file:
        lines = (json.loads(line, object_pairs_hook=_with_shared_keys) for line in file)
        records = {i: UnitRecord.from_json(line) for i, line in enumerate(lines)}
    inputs = [
        {"path": f"CC-MAIN-{i:06}.parquet", "bytes": i, "rows": 1_000_000, "fingerprint": f"{i:016x}"}
        for i in range(files)
    ]
    job = types.SimpleNamespace(dtype="int32", chunk_tokens=64_000_000)
    plan = types.SimpleNamespace(tokenizer={}, settings={}, fingerprint="0", job=job, inputs=inputs, quarantined=[])
    output = Path(progress).parent / "published"
    for split in ("train", "val"):
        (output / split / "0").mkdir(parents=True)
    manifest = publish(plan, records, output)
    return f"{len(records):,} records, {manifest['content']['train']['chunks']:,} chunks"


def read_large_footer(path: str) -> str:
    from tokenization.parquet import FileEntry, read_footer

    footer = read_footer(os.path.dirname(path), FileEntry(os.path.basename(path), 0), "text")
    return f"{len(footer.rows):,} row groups"


def make_tokenizer(directory: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    vocabulary = {token: i for i, token in enumerate([*sorted(alphabet), "<|end_of_text|>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(["<|end_of_text|>"])
    directory.mkdir()
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end_of_text|>", "add_eos_token": True}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def make_large_footer(path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = ("text", "id", "dump", "url", "date", "file_path", "language", "language_score", "token_count")
    table = pa.table({name: [f"{name} {i}" for i in range(FINEWEB_ROW_GROUPS)] for name in columns})
    pq.write_table(table, path, row_group_size=1)


def make_progress(path: Path, units: int, chunks_per_unit: int) -> None:
    chunk = {
        "name": "chunk-0000000-0.bin",
        "documents": 30_000,
        "tokens": 64_000_000,
        "bytes": 256_000_000,
        "xxh3_128": "0" * 32,
    }
    split = {"chunks": [], "documents": 1, "tokens": 1, "text_bytes": 1}
    record = {
        "unit": 0, "folder": "0", "skipped_null": 0, "skipped_empty": 0, "min_hash": 1, "checked_documents": 8,
        "quarantined": [], "encoder": "gigatoken", "seconds": {"read": 1.0, "encode": 2.0}, "peak_bytes": 1,
        "val": split,
    }  # fmt: skip
    with open(path, "w") as file:
        for unit in range(units):
            chunks = [
                {**chunk, "name": f"chunk-{unit:07d}-{i}.bin", "xxh3_128": f"{unit:032x}"}
                for i in range(chunks_per_unit)
            ]
            file.write(json.dumps({**record, "unit": unit, "train": {**split, "chunks": chunks}}) + "\n")


def schedule(num_tasks: int) -> str:
    """Empty Ray tasks through the same loop as the real ones: one wait a result."""
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    task = ray.remote(num_cpus=1)(lambda: {"unit": 0, "chunks": [{"name": "x" * 20}] * 4})
    ray.get([task.remote() for _ in range(4)])
    running, left, start = [], num_tasks, time.perf_counter()
    while left or running:
        while left and len(running) < 4:
            running.append(task.remote())
            left -= 1
        done, running = ray.wait(running, num_returns=1)
        ray.get(done[0])
    rate = num_tasks / (time.perf_counter() - start)
    ray.shutdown()
    return f"{rate:,.0f} tasks/s"


def make_index_file(directory: Path, num_chunks: int) -> None:
    from tokenization.chunk_writer import make_index
    from utils.chunks import Chunk

    directory.mkdir(parents=True)
    chunks = [
        Chunk(f"chunk-{i:07d}-0.bin", 60_000, FINEWEB_TOKENS // num_chunks, 260_000_000) for i in range(num_chunks)
    ]
    (directory / "index.json").write_text(
        json.dumps(make_index(chunks, "int32", FINEWEB_TOKENS // num_chunks, "0" * 32))
    )


def open_with_litdata(directory: str) -> str:
    from litdata import StreamingDataset, TokensLoader

    return f"{len(StreamingDataset(directory, item_loader=TokensLoader(block_size=8193))):,} blocks of 8,193"


def make_chunks(directory: Path, count: int, tokens: int) -> None:
    """A finished OUT/train of two nodes, as small chunks."""
    import numpy as np

    sys.path.insert(0, str(ROOT / "tests"))
    from test_merge_files import make_folder, make_split_manifest

    for node in range(2):
        names = [f"chunk-{i:07d}-0.bin" for i in range(node, count, 2)]
        make_folder(directory / str(node), {name: [tokens] for name in names}, seed=int(np.uint8(node)))
    make_split_manifest(directory)


def run_command(*command: str) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main(settings: Settings) -> None:
    from tokenization.units import default_chunk_tokens, default_unit_bytes

    work = Path(tempfile.mkdtemp(dir=settings.work_dir))
    rows: list[tuple[str, str, str]] = []

    def add(what: str, result: tuple[float, int, str]) -> None:
        seconds, peak_bytes, said = result
        peak = f"; peak {console.human_bytes(peak_bytes)}" if peak_bytes else ""
        rows.append((what, console.human_seconds(seconds), said + peak))
        print("| " + " | ".join(rows[-1]) + " |", flush=True)

    try:
        make_small_files(work / "small", settings.small_files)
        add(f"plan {settings.small_files:,} small parquet files (real)", measured(plan_files, str(work / "small")))
        shutil.rmtree(work / "small")
        make_small_files(work / "many", settings.many_files, document_bytes=200)
        make_tokenizer(work / "tokenizer")
        add(
            f"tokenize {settings.many_files:,} small parquet files, the whole command (real)",
            tokenize_files(str(work / "many"), str(work / "tokenizer"), str(work / "tokens")),
        )
        shutil.rmtree(work / "many")
        shutil.rmtree(work / "tokens")
        make_large_footer(work / "large.parquet")
        add(
            "read one footer of 1,000 row groups, 9 columns (real)",
            measured(read_large_footer, str(work / "large.parquet")),
        )
        add(f"plan FineWeb: {FINEWEB_FILES:,} files (made-up footers)", measured(plan_fineweb, FINEWEB_FILES))
        add("plan 100,000 files of that kind (made-up footers)", measured(plan_fineweb, 100_000))
        add("schedule 5,000 empty tasks, two workers (real)", measured(schedule, 5_000))

        units = FINEWEB_FILES * FINEWEB_TEXT_BYTES_PER_FILE // default_unit_bytes(FINEWEB_FILES * FINEWEB_FILE_BYTES)
        num_chunks = FINEWEB_TOKENS // default_chunk_tokens(FINEWEB_FILES * FINEWEB_FILE_BYTES)
        make_progress(work / "progress.jsonl", units, -(-num_chunks // units))
        size = console.human_bytes((work / "progress.jsonl").stat().st_size)
        add(
            f"resume and publish: records of all units ({size}), manifests of all chunks",
            measured(publish_fineweb, str(work / "progress.jsonl"), FINEWEB_FILES),
        )
        make_index_file(work / "index", num_chunks)
        size = console.human_bytes((work / "index" / "index.json").stat().st_size)
        add(f"open FineWeb's index of {num_chunks:,} chunks ({size})", measured(open_with_litdata, str(work / "index")))

        make_chunks(work / "OUT", settings.chunks, 2_000)
        merge = [sys.executable, str(ROOT / "merge_files.py"), f"--source_dir={work / 'OUT'}"]
        seconds = run_command(*merge, f"--target_dir={work / 'linked'}")
        copied_bytes = sum(p.stat().st_size for p in (work / "linked").glob("*.bin") if p.stat().st_nlink == 1)
        add(
            f"merge {settings.chunks:,} chunks by hard link, checksums compared",
            (seconds, 0, f"{copied_bytes} bytes copied"),
        )
        shutil.rmtree(work / "OUT")
        make_chunks(work / "OUT", 16, 32_000_000)
        size = sum(path.stat().st_size for path in (work / "OUT").rglob("*.bin"))
        copied = run_command("cp", "-r", str(work / "OUT"), str(work / "cp"))
        seconds = run_command(*merge, f"--target_dir={work / 'copied'}", "--mode=copy")
        rate = console.human_bytes(size / seconds)
        add(
            f"merge {console.human_bytes(size)} by verified copy",
            (seconds, 0, f"{rate}/s; `cp -r` took {copied:.1f} s"),
        )
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    cli.run(main, Settings, __doc__)
