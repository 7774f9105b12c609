"""Measure step 1 on the same documents as parquet, JSON lines, and Arrow files, in turns, in one run on this machine.

    python benchmarks/input_kinds.py
    python benchmarks/input_kinds.py --size=5MB --vocab_size=2000 --num_repeats=1        # to try it

Source code in FineWeb's columns, in 8 files of each kind; one worker process. A kind's rate is the median of the
repeats, in tokens per second of its processor time, without start-up. Prints a table in Markdown; every kind must give
the same number of tokens.
"""

from __future__ import annotations

import dataclasses
import gzip
import io
import json
import shutil
import statistics
import tempfile
from collections.abc import Iterable
from pathlib import Path

import harness
import pyarrow as pa
import pyarrow.parquet as pq
import tokenize_throughput

from utils import cli, console
from utils.errors import UserError

ROWS = 1000  # of a row group and a record batch, as Hugging Face's libraries write them


@dataclasses.dataclass
class Settings:
    """What is tokenized, and how often."""

    size: str = "100MB"
    """Text, as a number with kB, MB or GB (1 MB = 1,000,000 bytes)."""
    vocab_size: int = 128000
    """Tokens in the tokenizer's vocabulary; Llama 3 has 128,000."""
    num_repeats: int = 3
    """Runs of each kind, in turns; the median counts."""
    work_dir: str | None = None
    """Directory for corpus and tokenizer, kept for the next run; null: a temporary one."""


def as_json_lines(table: pa.Table) -> bytes:
    lines = (json.dumps(row, ensure_ascii=False) for row in table.to_pylist())
    return "".join(line + "\n" for line in lines).encode()


def as_arrow_stream(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=ROWS)
    return sink.getvalue()


def as_arrow_file(table: pa.Table, compression: str | None = None) -> bytes:
    sink = io.BytesIO()
    with pa.ipc.new_file(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as writer:
        writer.write_table(table, max_chunksize=ROWS)
    return sink.getvalue()


# Ending of the file names, and what makes a file's bytes of a table.
KINDS = {
    "parquet (snappy)": (".parquet", None),
    ".jsonl": (".jsonl", as_json_lines),
    ".jsonl.zst": (".jsonl.zst", lambda table: pa.compress(as_json_lines(table), "zstd", asbytes=True)),
    ".jsonl.gz": (".jsonl.gz", lambda table: gzip.compress(as_json_lines(table), 6)),
    ".arrow, a stream": (".arrow", as_arrow_stream),
    ".arrow, a file": (".arrow", as_arrow_file),
    ".arrow, a file with lz4": (".arrow", lambda table: as_arrow_file(table, "lz4")),
}


def write_kind(kind: str, corpus: Path, directory: Path) -> None:
    ending, to_bytes = KINDS[kind]
    directory.mkdir()
    for path in sorted(corpus.glob("*.parquet")):
        target = directory / (path.stem + ending)
        if to_bytes is None:
            shutil.copy(path, target)
        else:
            target.write_bytes(to_bytes(pq.read_table(path)))


def measure_all(settings: Settings, work: Path, scratch: Path) -> str:
    sizes = tokenize_throughput.Settings(size=settings.size, vocab_size=settings.vocab_size)
    corpus, tokenizer, text_bytes = tokenize_throughput.prepare_corpus(sizes, work)
    for number, kind in enumerate(KINDS):
        write_kind(kind, corpus, scratch / str(number))
    rates: dict[str, list[float]] = {kind: [] for kind in KINDS}
    tokens = set()
    for _ in range(settings.num_repeats):
        for number, kind in enumerate(KINDS):
            measured = tokenize_throughput.measure_ours(scratch / str(number), tokenizer, 1, scratch)
            console.say(f"{kind}: {measured.tokens:,} tokens, {measured.cpu_sustained:,.0f} per second")
            rates[kind].append(measured.cpu_sustained)
            tokens.add(measured.tokens)
    if len(tokens) != 1:
        raise RuntimeError(f"the kinds do not agree on the number of tokens: {tokens}")
    return "\n".join(
        [
            f"Text: {console.human_bytes(text_bytes)} of code ({tokens.pop():,} tokens), vocabulary of "
            f"{settings.vocab_size:,}; one process, the median of {settings.num_repeats}. "
            + harness.environment_line("pyarrow", "gigatoken"),
            "",
            harness.table(["input", "tokens/s of processor time", "of parquet's"], rows_of(rates)),
        ]
    )


def rows_of(rates: dict[str, list[float]]) -> Iterable[list[str]]:
    medians = {kind: statistics.median(measured) for kind, measured in rates.items()}
    parquet = next(iter(medians.values()))
    for kind, rate in medians.items():
        yield [kind, f"{rate / 1e6:.1f} M", f"{rate / parquet:.0%}"]


def main(settings: Settings) -> None:
    if settings.num_repeats < 1:
        raise UserError(f"--num_repeats={settings.num_repeats}: give at least 1.")
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(settings.work_dir or temporary)
        work.mkdir(parents=True, exist_ok=True)
        scratch = Path(temporary) / "scratch"
        scratch.mkdir()
        console.result(measure_all(settings, work, scratch))


if __name__ == "__main__":
    cli.run(main, Settings, __doc__)
