"""What planning, scheduling, merging and opening cost where the data is large: all of FineWeb, on this machine.

    python benchmarks/data_at_scale.py [--work_dir=DIR]

Real small files and links where they can be made here; made-up footers, records and indexes where they cannot (27,000
files of 1,000 row groups, 15 trillion tokens). Prints the rows of a Markdown table. Every measurement runs in
its own process, so that its peak memory is its own too.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import re
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import harness

from utils import cli, console

FINEWEB_FILES = 27_000
FINEWEB_ROW_GROUPS = 1_000
FINEWEB_FILE_BYTES = 2_100_000_000
FINEWEB_TEXT_BYTES_PER_FILE = 2_600_000_000
FINEWEB_TOKENS = 15_000_000_000_000

# Runs a script and prints its own peak memory at the end; what the parent sees counts the script's workers too.
WITH_OWN_PEAK = (
    "import atexit, runpy, sys; sys.argv = sys.argv[1:]; "
    "atexit.register(lambda: print(open('/proc/self/status').read())); runpy.run_path(sys.argv[0], run_name='__main__')"
)


@dataclasses.dataclass
class Settings:
    """How much of what can be made here is made."""

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
    from tokenization.input_files import list_input_files
    from tokenization.input_formats import read_summaries
    from tokenization.units import UnitPacker, default_unit_bytes

    entries = list_input_files(directory)
    packer = UnitPacker(default_unit_bytes(sum(entry.bytes for entry in entries)))
    for i, (_, footer, _) in enumerate(read_summaries(directory, entries, "text")):
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


def tokenize_files(directory: Path, tokenizer: Path, out: Path) -> tuple[float, int, str]:
    """The whole command on real files; (seconds, the driver's own peak memory, what it said of its workers)."""
    flags = (f"--input_dir={directory}", f"--tokenizer_dir={tokenizer}", f"--output_dir={out}", "--address=local")
    usage = harness.run(sys.executable, "-c", WITH_OWN_PEAK, "optimize_dataset.py", *flags)
    tokens = re.search(r"train: .*? ([\d,]+) tokens", usage.output)[1]
    peak_kib = int(re.search(r"VmHWM:\s+(\d+)", usage.output)[1])
    return usage.seconds, peak_kib * 1024, f"{tokens} tokens; the driver alone"


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


def read_large_footer(path: Path) -> str:
    from tokenization.input_files import FileEntry
    from tokenization.parquet import read_footer

    footer = read_footer(str(path.parent), FileEntry(path.name, 0), "text")
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
    chunk = {"documents": 30_000, "tokens": 64_000_000, "bytes": 256_000_000}
    split = {"chunks": [], "documents": 1, "tokens": 1, "text_bytes": 1}
    record = {
        "folder": "0", "skipped_null": 0, "skipped_empty": 0, "min_hash": 1, "checked_documents": 8, "quarantined": [],
        "encoder": "gigatoken", "seconds": {"read": 1.0, "encode": 2.0}, "peak_bytes": 1, "val": split,
    }  # fmt: skip
    with open(path, "w") as file:
        for unit in range(units):
            names = [f"chunk-{unit:07d}-{i}.bin" for i in range(chunks_per_unit)]
            chunks = [{**chunk, "name": name, "xxh3_128": f"{unit:032x}"} for name in names]
            file.write(json.dumps({**record, "unit": unit, "train": {**split, "chunks": chunks}}) + "\n")


def schedule(num_tasks: int) -> str:
    """Empty Ray tasks through the same loop as the real ones: one wait per result."""
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
    from tokenization.chunk_index import make_index
    from utils.chunks import Chunk

    directory.mkdir(parents=True)
    tokens = FINEWEB_TOKENS // num_chunks
    chunks = [Chunk(f"chunk-{i:07d}-0.bin", 60_000, tokens, 260_000_000) for i in range(num_chunks)]
    (directory / "index.json").write_text(json.dumps(make_index(chunks, "int32", tokens, "0" * 32)))


def open_with_litdata(directory: str) -> str:
    from litdata import StreamingDataset, TokensLoader

    return f"{len(StreamingDataset(directory, item_loader=TokensLoader(block_size=8193))):,} blocks of 8,193"


def make_split(directory: Path, num_chunks: int, chunk_tokens: int) -> None:
    """OUT/train as two nodes leave it, with documents as large as chunks."""
    from utils.manifest import write_manifest

    common = {"kind": "tokens", "split": "train", "fingerprint": "0", "tokenizer": {"sha256": "0"}}
    folders = [
        harness.write_token_folder(
            directory / str(node),
            {f"chunk-{i:07d}-0.bin": 1 for i in range(node, num_chunks, 2)},
            document_tokens=chunk_tokens,
            vocab_size=1000,
            **common,
        )
        for node in range(2)
    ]
    keys = ("documents", "tokens", "text_bytes", "chunks")
    content = {key: sum(folder["content"][key] for folder in folders) for key in keys}
    write_manifest(directory, {**folders[0], "content": content, "files": [], "folders": ["0", "1"]})


def main(settings: Settings) -> None:
    with tempfile.TemporaryDirectory(dir=settings.work_dir) as work:
        measure_tokenization(settings, Path(work))
        measure_merge(settings, Path(work))


def report(what: str, result: tuple[float, int, str]) -> None:
    """Print one line of the table: what, seconds, what was said of it with the peak memory if that is known."""
    seconds, peak_bytes, said = result
    peak = f"; peak {console.human_bytes(peak_bytes)}" if peak_bytes else ""
    print(harness.table_row(what, console.human_seconds(seconds), said + peak), flush=True)


def measure_tokenization(settings: Settings, work: Path) -> None:
    from tokenization.units import default_chunk_tokens, default_unit_bytes

    make_small_files(work / "small", settings.small_files)
    report(f"plan {settings.small_files:,} small parquet files (real)", measured(plan_files, str(work / "small")))
    make_small_files(work / "many", settings.many_files, document_bytes=200)
    make_tokenizer(work / "tokenizer")
    report(
        f"tokenize {settings.many_files:,} small parquet files, the whole command (real)",
        tokenize_files(work / "many", work / "tokenizer", work / "tokens"),
    )
    for done in ("small", "many", "tokens"):
        shutil.rmtree(work / done)
    make_large_footer(work / "large.parquet")
    report(
        "read one footer of 1,000 row groups, 9 columns (real)",
        measured(read_large_footer, work / "large.parquet"),
    )
    report(f"plan FineWeb: {FINEWEB_FILES:,} files (made-up footers)", measured(plan_fineweb, FINEWEB_FILES))
    report("plan 100,000 files of that kind (made-up footers)", measured(plan_fineweb, 100_000))
    report("schedule 5,000 empty tasks, two workers (real)", measured(schedule, 5_000))

    fineweb_bytes = FINEWEB_FILES * FINEWEB_FILE_BYTES
    units = FINEWEB_FILES * FINEWEB_TEXT_BYTES_PER_FILE // default_unit_bytes(fineweb_bytes)
    num_chunks = FINEWEB_TOKENS // default_chunk_tokens(fineweb_bytes)
    progress = work / "progress.jsonl"
    make_progress(progress, units, -(-num_chunks // units))
    size = console.human_bytes(progress.stat().st_size)
    report(
        f"resume and publish: records of all units ({size}), manifests of all chunks",
        measured(publish_fineweb, str(progress), FINEWEB_FILES),
    )
    make_index_file(work / "index", num_chunks)
    size = console.human_bytes(harness.directory_bytes(work / "index"))
    report(f"open FineWeb's index of {num_chunks:,} chunks ({size})", measured(open_with_litdata, str(work / "index")))


def measure_merge(settings: Settings, work: Path) -> None:
    out, linked, copied = work / "OUT", work / "linked", work / "copied"
    make_split(out, settings.chunks, 2_000)
    seconds = harness.run_script("merge_files.py", f"--source_dir={out}", f"--target_dir={linked}").seconds
    copied_bytes = sum(path.stat().st_size for path in linked.glob("*.bin") if path.stat().st_nlink == 1)
    what = f"merge {settings.chunks:,} chunks by hard link, checksums compared"
    report(what, (seconds, 0, f"{copied_bytes} bytes copied"))
    shutil.rmtree(out)
    make_split(out, 16, 32_000_000)
    size = harness.directory_bytes(out)
    cp = harness.run("cp", "-r", out, work / "cp")
    merge = harness.run_script("merge_files.py", f"--source_dir={out}", f"--target_dir={copied}", "--mode=copy")
    rate = console.human_bytes(size / merge.seconds)
    what = f"merge {console.human_bytes(size)} by verified copy"
    report(what, (merge.seconds, 0, f"{rate}/s; `cp -r` took {cp.seconds:.1f} s"))


if __name__ == "__main__":
    cli.run(main, Settings, __doc__)
