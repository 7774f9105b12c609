"""Measure step 1 beside what people run instead, on the same files, in one run on this machine.

    python benchmarks/tokenize_throughput.py --size=450MB --vocab_size=128000
    python benchmarks/tokenize_throughput.py --size=20MB --vocab_size=8192 --num_repeats=1        # a minute

a) litdata.optimize with litgpt's Tokenizer (benchmarks/litdata_baseline.py), the same number of processes
b) tokenizers.encode_batch_fast alone, text in memory
c) gigatoken alone, text in memory: in batches of 256 documents, and in batches as large as d's, which are faster: its
   limit
d) python optimize_dataset.py
e) what no such step is without: pyarrow decodes the text and sees that it is UTF-8; as many bytes as d's are written

Prints a table in Markdown. Sustained rates are tokens per second and core, without start-up: by the clock, and by
processor time, which other programs on the machine disturb less. Each figure of the table is the best of the repeats,
for all sides alike; what e leaves of the limit, and what d reaches, is said round by round.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Literal

import harness

from export.sizes import parse_bytes
from tokenization.text_arrays import BATCH_BYTES, gathered
from utils import cli, console
from utils.errors import UserError
from utils.manifest import read_manifest

NUM_FILES = 8  # of equal size, so that the baseline, which gives a worker whole files, is as well balanced as we are


@dataclasses.dataclass
class Settings:
    """What is tokenized, and by how many processes."""

    size: str = "450MB"
    """Text to tokenize, as a number with kB, MB or GB (1 MB = 1,000,000 bytes)."""
    source: Literal["documentation", "code"] = "code"
    """Kind of text; see examples/make_demo_corpus.py. There are about 50 MB of documentation."""
    vocab_size: int = 128000
    """Tokens in the tokenizer's vocabulary; Llama 3 has 128,000."""
    baseline_share: float = 0.25
    """Share of the files that the baseline gets, being slow: 1/8 to 1. Below 1, ours is run on the same files as well,
    and what the baseline's whole command would take on all files is worked out from its start-up and its rate."""
    num_workers: int = 2
    """Processes that tokenize, for all sides."""
    num_repeats: int = 2
    """Runs of everything; the best counts."""
    random_words_size: str = "200MB"
    """Text of random words, on which a worker's memory is measured; 0MB: no such measurement."""
    work_dir: str | None = None
    """Directory for corpus, tokenizer and results, kept for the next run; null: a temporary one."""
    output: str | None = None
    """File that the table is written to as well; null: none."""


@dataclasses.dataclass
class Measured:
    """One side of the comparison."""

    tokens: int
    sustained: float
    """Tokens per second and process, by the clock, without start-up."""
    cpu_sustained: float
    """Tokens per second of processor time, without start-up."""
    whole_s: float | None = None
    """Seconds of the whole command, from the shell's view."""
    phases: dict[str, float] = dataclasses.field(default_factory=dict)
    """Share of a core's time that each phase takes."""
    worker_peak_bytes: int = 0


# ---------------------------------------------------------------------------------------------------------------------
# What is tokenized


def prepare_corpus(settings: Settings, work: Path) -> tuple[Path, Path, int]:
    """(directory of NUM_FILES equal parquet files, tokenizer directory, bytes of text)"""
    name = f"{settings.source}-{settings.size}"
    made, tokenizer = work / f"made-{name}", work / f"tokenizer-{name}-{settings.vocab_size}"
    harness.run_script(
        "examples/make_demo_corpus.py", f"--output_dir={made}", f"--tokenizer_dir={tokenizer}",
        f"--size={settings.size}", f"--source={settings.source}", f"--vocab_size={settings.vocab_size}",
    )  # fmt: skip
    corpus = work / f"corpus-{name}"
    if not corpus.exists():
        write_equal_files(made, corpus)
    return corpus, tokenizer, read_manifest(made)["content"]["text_bytes"]


def write_equal_files(made: Path, corpus: Path) -> None:
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    table = pa.concat_tables(pq.read_table(path) for path in sorted(made.glob("*.parquet")))
    position = pc.cumulative_sum(pc.cast(pc.binary_length(table["text"]), pa.int64())).to_numpy()
    temporary = corpus.with_name(corpus.name + ".part")
    temporary.mkdir(exist_ok=True)
    file_of_row = (position - 1) * NUM_FILES // position[-1]
    for i in range(NUM_FILES):
        part = table.filter(pa.array(file_of_row == i))
        pq.write_table(part, temporary / f"{i:03d}_00000.parquet", row_group_size=1000, compression="snappy")
    temporary.rename(corpus)


def write_random_words(directory: Path, size_bytes: int) -> None:
    """Text in which hardly a word comes twice: the worst case of a cache of words."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    directory.mkdir(parents=True)
    rng = np.random.default_rng(0)
    schema = pa.schema([("text", pa.string())])
    with pq.ParquetWriter(directory / "000_00000.parquet", schema) as writer:
        written = 0
        while written < size_bytes:
            letters = rng.integers(97, 123, 4_000_000, dtype=np.uint8)
            letters[np.cumsum(rng.integers(4, 12, 500_000))[:400_000] % 4_000_000] = 32
            texts = [letters[i : i + 4000].tobytes().decode() for i in range(0, 4_000_000, 4000)]
            writer.write_table(pa.table({"text": texts}, schema))
            written += 4_000_000


# ---------------------------------------------------------------------------------------------------------------------
# The four sides


def measure_baseline(corpus: Path, tokenizer: Path, num_workers: int, work: Path) -> Measured:
    out, times = work / "baseline", work / "times.jsonl"
    shutil.rmtree(out, ignore_errors=True)
    times.unlink(missing_ok=True)
    # litdata keeps temporary chunks in a cache of the machine; one of our own leaves other runs alone.
    env = {"DATA_OPTIMIZER_CACHE_FOLDER": str(work / "litdata-cache"), "TOKENIZERS_PARALLELISM": "false"}
    script = "benchmarks/litdata_baseline.py"
    usage = harness.run_script(script, corpus, tokenizer, out, num_workers, times, env=env)
    lines = [json.loads(line) for line in times.read_text().splitlines()]
    tokens = sum(line["tokens"] for line in lines)
    seconds, cpu_seconds = (sum(line[key] for line in lines) for key in ("seconds", "cpu_seconds"))
    return Measured(tokens, tokens / seconds, tokens / cpu_seconds, usage.seconds)


def measure_ours(corpus: Path, tokenizer: Path, num_workers: int, work: Path) -> Measured:
    out = work / "ours"
    shutil.rmtree(out, ignore_errors=True)
    usage = harness.run_script(
        "optimize_dataset.py", f"--input_dir={corpus}", f"--tokenizer_dir={tokenizer}", f"--output_dir={out}",
        f"--num_workers={num_workers}", "--address=local",
    )  # fmt: skip
    lines = map(json.loads, (out / "progress.jsonl").read_text().splitlines())
    records = {record["unit"]: record for record in lines}.values()  # the last one, of a unit that was done again
    tokens = sum(record[split]["tokens"] for record in records for split in ("train", "val"))
    content = read_manifest(out, "tokens")["content"]
    if content["train"]["tokens"] + content["val"]["tokens"] != tokens:
        raise RuntimeError(f"{out}: the manifest and the records disagree on the number of tokens")
    seconds = sum((collections.Counter(record["seconds"]) for record in records), collections.Counter())
    busy_s, cpu_s = seconds.total(), sum(record["cpu_seconds"] for record in records)
    phases = {phase: phase_s / busy_s for phase, phase_s in seconds.most_common()}
    peak_bytes = max(record["peak_bytes"] for record in records)
    return Measured(tokens, tokens / busy_s, tokens / cpu_s, usage.seconds, phases, peak_bytes)


def measure_start_up(tokenizer: Path, work: Path) -> tuple[float, float]:
    """Seconds of the whole command on two short documents: the median of nine, and, where nothing is remembered of the
    tokenizer, the best of three."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    words, out = work / "two-documents", work / "two-tokenized"
    words.mkdir(exist_ok=True)
    pq.write_table(pa.table({"text": ["Two short documents.", "This is the second."]}), words / "000_00000.parquet")

    def run(cache: Path) -> float:
        shutil.rmtree(out, ignore_errors=True)
        flags = (f"--input_dir={words}", f"--tokenizer_dir={tokenizer}", f"--output_dir={out}", "--address=local")
        return harness.run_script("optimize_dataset.py", *flags, env={"XDG_CACHE_HOME": str(cache)}).seconds

    with tempfile.TemporaryDirectory() as caches:
        first = [run(Path(caches) / str(number)) for number in range(3)]
        again = [run(Path(caches) / "0") for _ in range(9)]
    return statistics.median(again), min(first)


def measure_in_memory(library: str, corpus: Path, tokenizer: Path, num_workers: int, gather: bool = True) -> Measured:
    """Encode in `num_workers` processes at a time, each on its share of the files, one core each."""
    files = sorted(corpus.glob("*.parquet"))
    shares = [(library, files[i::num_workers], tokenizer / "tokenizer.json", gather) for i in range(num_workers)]
    with multiprocessing.get_context("spawn").Pool(num_workers) as pool:
        results = pool.starmap(encode_in_memory, shares, chunksize=1)
    tokens, seconds, cpu_seconds = (sum(column) for column in zip(*results))
    return Measured(tokens, tokens / seconds, tokens / cpu_seconds)


def encode_in_memory(library: str, files: list[Path], tokenizer_json: Path, gather: bool) -> tuple[int, float, float]:
    """(tokens, seconds, seconds of processor time) of encoding all texts of the files, which are read before.

    Args:
        gather: in batches as large as optimize_dataset.py's, and not of 256 documents.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import awkward as ak
    import gigatoken
    import pyarrow.parquet as pq
    import tokenizers

    batches = (batch for path in files for batch in pq.ParquetFile(path).iter_batches(batch_size=256, columns=["text"]))
    small = (batch.column(0) for batch in batches)
    arrays = list(gathered(small) if gather else small)
    if library == "tokenizers":
        tokenizer = tokenizers.Tokenizer.from_file(str(tokenizer_json))
        batches = [array.to_pylist() for array in arrays]

        def num_tokens(texts: list[str]) -> int:
            return sum(len(encoding.ids) for encoding in tokenizer.encode_batch_fast(texts))
    else:
        tokenizer = gigatoken.Tokenizer(str(tokenizer_json))
        batches = [ak.drop_none(ak.from_arrow(array.cast("large_string"))) for array in arrays]

        def num_tokens(texts: ak.Array) -> int:  # with one BOS per document, as the other sides count
            return int(ak.count(tokenizer.encode_batch(texts, parallel=False), axis=None)) + len(texts)

    begin, cpu_begin = time.perf_counter(), time.process_time()
    tokens = sum(map(num_tokens, batches))
    return tokens, time.perf_counter() - begin, time.process_time() - cpu_begin


def measure_moving(corpus: Path, num_workers: int, work: Path) -> float:
    """Seconds of processor time that it takes to read the text and to write what `measure_ours` has just written,
    without a line of ours."""
    files, sizes = sorted(corpus.glob("*.parquet")), [path.stat().st_size for path in (work / "ours").rglob("*.bin")]
    with tempfile.TemporaryDirectory(dir=work) as scratch:
        shares = [(files[i::num_workers], sizes[i::num_workers], Path(scratch) / str(i)) for i in range(num_workers)]
        with multiprocessing.get_context("spawn").Pool(num_workers) as pool:
            return sum(pool.starmap(decode_and_write, shares, chunksize=1))


def decode_and_write(files: list[Path], sizes: list[int], target: Path) -> float:
    import pyarrow.parquet as pq

    begin = time.process_time()
    for path in files:
        with pq.ParquetFile(path, pre_buffer=False) as parquet:
            for batch in parquet.iter_batches(512, columns=["text"], use_threads=False):
                batch.column(0).validate(full=True)
    zeros = bytes(BATCH_BYTES)
    for size in sizes:
        with target.open("wb", buffering=0) as file:
            for written in range(0, size, BATCH_BYTES):
                file.write(memoryview(zeros)[: size - written])
            os.fsync(file.fileno())
    return time.process_time() - begin


# ---------------------------------------------------------------------------------------------------------------------
# The run


def best(measured: list[Measured]) -> Measured:
    chosen = max(measured, key=lambda m: m.cpu_sustained)
    whole = [m.whole_s for m in measured if m.whole_s is not None]
    sustained = max(m.sustained for m in measured)
    return dataclasses.replace(chosen, sustained=sustained, whole_s=min(whole, default=None))


def share_of(corpus: Path, share: float, work: Path) -> Path:
    """A directory with the first files of `corpus`."""
    if share >= 1:
        return corpus
    part = work / f"{corpus.name}-{share:g}"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    for path in sorted(corpus.glob("*.parquet"))[: max(1, round(share * NUM_FILES))]:
        os.link(path, part / path.name)
    return part


def measure_all(settings: Settings, work: Path) -> str:
    corpus, tokenizer, text_bytes = prepare_corpus(settings, work)
    small = share_of(corpus, settings.baseline_share, work)
    sides: dict[str, list[Measured]] = {}

    def note(name: str, measured: Measured) -> None:
        sides.setdefault(name, []).append(measured)
        whole = f", whole command {measured.whole_s:.1f} s" if measured.whole_s else ""
        console.say(
            f"{name}: {measured.tokens:,} tokens, {measured.sustained:,.0f} tokens/s per core, "
            f"{measured.cpu_sustained:,.0f} by processor time{whole}"
        )

    n, moving_s = settings.num_workers, []
    for _ in range(settings.num_repeats):
        note("ours", measure_ours(corpus, tokenizer, n, work))
        moving_s.append(measure_moving(corpus, n, work))
        console.say(f"decoding and writing alone: {moving_s[-1]:.2f} s of processor time")
        if n > 1:
            note("ours, one worker", measure_ours(corpus, tokenizer, 1, work))
            note("ours, one worker, its share", measure_ours(share_of(corpus, 1 / n, work), tokenizer, 1, work))
        note("gigatoken", measure_in_memory("gigatoken", corpus, tokenizer, n))
        note("gigatoken, small batches", measure_in_memory("gigatoken", corpus, tokenizer, n, gather=False))
        note("tokenizers", measure_in_memory("tokenizers", small, tokenizer, n))
        if small != corpus:
            note("ours, baseline's files", measure_ours(small, tokenizer, n, work))
        note("baseline", measure_baseline(small, tokenizer, n, work))
    result = {name: best(measured) for name, measured in sides.items()}
    same_files = result.get("ours, baseline's files", result["ours"])
    # Source code spells a special token here and there: text to us by default, one id to the others.
    pairs = ((same_files.tokens, result["baseline"].tokens), (result["ours"].tokens, result["gigatoken"].tokens))
    if any(abs(a - b) > 1e-5 * b for a, b in pairs):
        raise RuntimeError(f"the sides do not agree on the number of tokens: {result}")

    random_peak = None
    if not settings.random_words_size.startswith("0"):
        words = work / f"random-{settings.random_words_size}"
        if not words.exists():
            write_random_words(words, parse_bytes(settings.random_words_size, "--random_words_size"))
        random_peak = measure_ours(words, tokenizer, n, work).worker_peak_bytes
    by_round = ""
    for what, name in (
        ("the limit", "gigatoken"),
        ("its rate with 256 documents at a time", "gigatoken, small batches"),
    ):
        encoding_s = [side.tokens / side.cpu_sustained for side in sides[name]]
        ours_s = [side.tokens / side.cpu_sustained for side in sides["ours"]]
        reached, at_most = (
            ", ".join(f"{a / b:.0%}" for a, b in zip(encoding_s, whole))
            for whole in (ours_s, [sum(both) for both in zip(encoding_s, moving_s)])
        )
        by_round += (
            f"\n- Of {what} by processor time the step reaches, round by round: {reached}. Encoding, decoding and "
            f"writing with nothing between them would reach {at_most}."
        )
    return table(settings, result, same_files, text_bytes, random_peak) + by_round + start_up_note(tokenizer, work)


def start_up_note(tokenizer: Path, work: Path) -> str:
    again_s, first_s = measure_start_up(tokenizer, work)
    return (
        f"\n- Start-up, the whole command on two short documents: {again_s:.2f} s (median of nine); "
        f"{first_s:.1f} s in the first run with the tokenizer (best of three)."
    )


def table(
    settings: Settings, result: dict[str, Measured], same_files: Measured, text_bytes: int, random_peak: int | None
) -> str:
    ours, baseline, gigatoken = result["ours"], result["baseline"], result["gigatoken"]
    small_batches = result["gigatoken, small batches"]
    one = result.get("ours, one worker")
    n = settings.num_workers
    is_part = settings.baseline_share < 1
    part = f", on {settings.baseline_share:g} of the text" if is_part else ""
    # What the baseline would take on all files: its start-up as measured, its rate as measured.
    baseline_whole_s = baseline.whole_s + (ours.tokens - baseline.tokens) / (baseline.sustained * n)

    def row(name: str, measured: Measured, whole_s: float | None = None, about: str = "") -> list[str]:
        whole = ["-", "-"] if whole_s is None else [f"{about}{whole_s:.1f} s", f"{baseline_whole_s / whole_s:.1f} x"]
        rates = [(getattr(measured, kind), getattr(baseline, kind)) for kind in ("cpu_sustained", "sustained")]
        return [name, *(cell for a, b in rates for cell in (f"{a / 1e6:.2f} M", f"{a / b:.1f} x")), *whole]

    rows = [
        row(f"litdata.optimize + litgpt's Tokenizer{part}", baseline, baseline_whole_s, "about " if is_part else ""),
        row(f"tokenizers.encode_batch_fast alone, text in memory{part}", result["tokenizers"]),
        row("gigatoken alone, text in memory, 256 documents at a time", small_batches),
        row("gigatoken alone, text in memory, batches as large as ours: the limit", gigatoken),
        row("**optimize_dataset.py**", ours, ours.whole_s),
    ]
    phases = ", ".join(f"{phase} {share:.0%}" for phase, share in ours.phases.items())
    random = ""
    if random_peak:
        random = f"; on {settings.random_words_size} of random words {console.human_bytes(random_peak)}"
    notes = [
        f"- The whole step reaches {ours.cpu_sustained / gigatoken.cpu_sustained:.0%} of the limit by processor time "
        f"({ours.sustained / gigatoken.sustained:.0%} by the clock), and "
        f"{ours.cpu_sustained / small_batches.cpu_sustained:.0%} of what gigatoken does with 256 documents at a time. "
        f"A core's time: {phases}.",
        f"- Largest worker: {console.human_bytes(ours.worker_peak_bytes)}{random}.",
    ]
    if is_part:
        notes.insert(
            0,
            f"- On the baseline's files alone ({baseline.tokens:,} tokens), both measured: {baseline.whole_s:.1f} s "
            f"against {same_files.whole_s:.1f} s, start-up included.",
        )
    if one:
        rows.append(row("optimize_dataset.py, one worker", one, one.whole_s))
        alike = result["ours, one worker, its share"]
        notes.append(
            f"- {n} workers give {n * ours.sustained / alike.sustained:.2f} times one that has as much text as each of "
            f"them, and {n * ours.sustained / one.sustained:.2f} times one that has all of it: every worker learns the "
            f"text's words for itself (whole command on all: {one.whole_s / ours.whole_s:.2f} times)."
        )
    versions = harness.environment_line("litdata", "litgpt", "tokenizers", "gigatoken", "ray", "pyarrow")
    header = ["", "tokens/s per core, processor time", "ratio", "by the clock", "ratio", "whole command", "ratio"]
    return "\n".join(
        [
            f"Text: {console.human_bytes(text_bytes)} of {settings.source} ({ours.tokens:,} tokens), vocabulary of "
            f"{settings.vocab_size:,}; {n} processes for every side; best of {settings.num_repeats}. {versions}",
            "",
            harness.table(header, rows),
            "",
            *notes,
        ]
    )


def main(settings: Settings) -> None:
    if not 1 / NUM_FILES <= settings.baseline_share <= 1:
        raise UserError(f"--baseline_share={settings.baseline_share}: give a share from {1 / NUM_FILES} to 1.")
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(settings.work_dir or temporary)
        work.mkdir(parents=True, exist_ok=True)
        text = measure_all(settings, work)
    console.result(text)
    if settings.output:
        Path(settings.output).write_text(text + "\n")


if __name__ == "__main__":
    cli.run(main, Settings, __doc__)
