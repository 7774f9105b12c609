"""Make parquet files of made-up web text, as much as is asked for, in FineWeb's shape: its columns, its row groups of
1,000 documents, and lengths of documents that are distributed like its own (log-normal).

    python benchmarks/web_text.py --real_dir=REAL --output_dir=TEXT --num_documents=300000 --document_words=460

REAL holds parquet files of real text, for example what examples/make_demo_corpus.py makes; see web_words.py for what is
taken from it. Each file has a random generator of its own, so the same seed gives the same text whichever process
makes it. made.log has a line per file with documents, words, bytes and a digest of its text; run the same command
again to make the files that are missing.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import multiprocessing
import time
from pathlib import Path
from typing import Any

import harness
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from web_words import Vocabulary

from utils import cli, console
from utils.errors import UserError
from utils.files import atomic_write, fsync_directory

ROW_GROUP_DOCUMENTS = 1000  # FineWeb's
LENGTH_SIGMA = 1.0  # of the logarithm of a document's length
MIN_WORDS, MAX_WORDS = 20, 100_000
FILE_DOCUMENTS = 1_000_000  # about 3 GB of text
MADE_NAME = "made.log"  # JSON lines; by the name .jsonl it would be text to tokenize


@dataclasses.dataclass
class Settings:
    """How much text is made, out of what, and by how many processes."""

    real_dir: str
    """Directory with parquet files of real text, whose words are taken."""
    output_dir: str
    """Directory for the parquet files and made.log."""
    num_documents: int = 100_000
    """Documents to make."""
    document_words: float = 460.0
    """Mean number of words per document."""
    seed: int = 0
    """Decides the text, together with the real one."""
    num_workers: int = 2
    """Processes that make files."""


def read_texts(directory: str | Path) -> list[str]:
    """The texts of all parquet files of a directory, in the order of their names."""
    paths = sorted(Path(directory).glob("*.parquet"))
    return [text for path in paths for text in pq.read_table(path, columns=["text"])["text"].to_pylist()]


def files_of(num_documents: int) -> list[int]:
    """Documents per file: an even number of files of about the same size, so that two processes end together."""
    num_files = min(num_documents, 2 * max(2, -(-num_documents // (2 * FILE_DOCUMENTS))))
    bounds = np.linspace(0, num_documents, num_files + 1).astype(int)
    return np.diff(bounds).tolist()


def draw_lengths(random: np.random.Generator, count: int, mean: float) -> np.ndarray:
    """Words of each of `count` documents."""
    lengths = random.lognormal(np.log(mean) - LENGTH_SIGMA**2 / 2, LENGTH_SIGMA, count)
    return np.clip(lengths, min(MIN_WORDS, mean), MAX_WORDS).astype(np.int64)


def draw_documents(vocabulary: Vocabulary, random: np.random.Generator, lengths: np.ndarray) -> pa.StringArray:
    """Documents of `lengths` words, as slices of one buffer of bytes."""
    starts = np.cumsum(lengths) - lengths
    pieces, begins = vocabulary.draw(random, int(lengths.sum()), starts)
    text = vocabulary.pieces.take(pa.array(pieces))
    _, offsets, content = text.buffers()
    offsets = np.frombuffer(offsets, np.int32)[: len(pieces) + 1]
    ends = np.append(offsets[begins], offsets[-1])
    return pa.StringArray.from_buffers(len(lengths), pa.py_buffer(ends), content)


def row_group(texts: pa.StringArray, random: np.random.Generator, file_number: int) -> pa.RecordBatch:
    """The texts with FineWeb's other columns."""
    count = len(texts)
    digits = np.frombuffer(random.bytes(16 * count).hex().encode(), np.uint8).reshape(count, 32)

    def fixed(template: str, columns: np.ndarray) -> pa.StringArray:
        """`template` once per row, with hexadecimal digits instead of its zeros."""
        rows = np.tile(np.frombuffer(template.encode(), np.uint8), (count, 1))
        rows[:, [i for i, letter in enumerate(template) if letter == "0"]] = columns
        offsets = np.arange(count + 1, dtype=np.int32) * len(template)
        return pa.StringArray.from_buffers(count, pa.py_buffer(offsets), pa.py_buffer(rows.tobytes()))

    sizes = np.diff(np.frombuffer(texts.buffers()[1], np.int32)[: count + 1])
    columns: dict[str, Any] = {
        "text": texts,
        "id": fixed("<urn:uuid:00000000-0000-0000-0000-000000000000>", digits),
        "dump": _constant("CC-MAIN-made-up", count),
        "url": fixed("https://www.0000000.example/000/00000000", digits[:, :18]),
        "date": _constant("2000-01-01T00:00:00Z", count),
        "file_path": _constant(f"made-up/web_text/{file_number:03d}", count),
        "language": _constant("en", count),
        "language_score": pa.array(random.uniform(0.65, 1, count)),
        "token_count": pa.array(sizes.astype(np.int64) // 4),  # an estimate: nothing is tokenized yet
    }
    return pa.RecordBatch.from_pydict(columns)


def _constant(text: str, count: int) -> pa.StringArray:
    return pa.array([text] * count, pa.string())


def make_file(
    vocabulary: Vocabulary, path: Path, number: int, num_documents: int, settings: Settings
) -> dict[str, Any]:
    """Write one file; returns its line of made.log."""
    start = time.perf_counter()
    random = np.random.Generator(np.random.SFC64([settings.seed, number]))
    digest, num_words, text_bytes = xxhash.xxh3_128(), 0, 0
    with atomic_write(path) as file:
        writer = None
        for done in range(0, num_documents, ROW_GROUP_DOCUMENTS):
            count = min(ROW_GROUP_DOCUMENTS, num_documents - done)
            lengths = draw_lengths(random, count, settings.document_words)
            texts = draw_documents(vocabulary, random, lengths)
            batch = row_group(texts, random, number)
            # A dictionary of texts that come once each is built, and thrown away.
            writer = writer or pq.ParquetWriter(
                file, batch.schema, compression="zstd", compression_level=1,
                use_dictionary=["dump", "date", "file_path", "language"],
            )  # fmt: skip
            writer.write_batch(batch, row_group_size=ROW_GROUP_DOCUMENTS)
            digest.update(texts.buffers()[2])
            num_words += int(lengths.sum())
            text_bytes += texts.buffers()[2].size
        writer.close()
    return {
        "name": path.name,
        "documents": num_documents,
        "words": num_words,
        "text_bytes": text_bytes,
        "digest": digest.hexdigest(),
        "file_bytes": path.stat().st_size,
        "seconds": time.perf_counter() - start,
    }


# ---------------------------------------------------------------------------------------------------------------------
# Processes


def made_files(directory: Path) -> dict[str, dict[str, Any]]:
    """The lines of made.log, by name; those of a file that is not there, or not whole, count as unmade."""
    found = {}
    if (directory / MADE_NAME).exists():
        for line in (directory / MADE_NAME).read_text().splitlines():
            entry = json.loads(line)
            path = directory / entry["name"]
            if path.exists() and path.stat().st_size == entry["file_bytes"]:
                found[entry["name"]] = entry
    return found


_vocabulary: Vocabulary


def _start(vocabulary: Vocabulary) -> None:
    global _vocabulary
    _vocabulary = vocabulary
    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)


def _make(*arguments: Any) -> dict[str, Any]:
    return make_file(_vocabulary, *arguments)


def make_text(settings: Settings, vocabulary: Vocabulary) -> list[dict[str, Any]]:
    """Make the files that are missing; returns the lines of made.log, by name.

    Raises:
        UserError: the directory holds text of other settings.
    """
    directory = Path(settings.output_dir)
    directory.mkdir(parents=True, exist_ok=True)
    asked = {key: value for key, value in dataclasses.asdict(settings).items() if key != "num_workers"}
    asked_path = directory / "made_with.json"
    if asked_path.exists() and json.loads(asked_path.read_text()) != asked:
        raise UserError(f"--output_dir={directory}: has text made with other settings. Give another, or delete it.")
    asked_path.write_text(json.dumps(asked))

    made = made_files(directory)
    names = {f"{i:03d}_00000.parquet": (i, count) for i, count in enumerate(files_of(settings.num_documents))}
    left = [name for name in names if name not in made]
    context = multiprocessing.get_context("spawn")
    with (
        open(directory / MADE_NAME, "a") as log,
        concurrent.futures.ProcessPoolExecutor(settings.num_workers, context, _start, (vocabulary,)) as pool,
    ):
        futures = [pool.submit(_make, directory / name, *names[name], settings) for name in left]
        for future in concurrent.futures.as_completed(futures):
            entry = future.result()
            made[entry["name"]] = entry
            log.write(json.dumps(entry) + "\n")
            log.flush()
            rate = entry["text_bytes"] / entry["seconds"]
            console.say(f"{entry['name']}: {entry['documents']:,} documents, {console.human_bytes(rate)}/s")
    fsync_directory(directory)
    return [made[name] for name in names]


def main(settings: Settings) -> None:
    made = make_text(settings, Vocabulary(read_texts(settings.real_dir)))
    documents, text_bytes = (sum(entry[key] for entry in made) for key in ("documents", "text_bytes"))
    console.result(f"{documents:,} documents, {console.human_bytes(text_bytes)} of text in {settings.output_dir}")


if __name__ == "__main__":
    assert harness.ROOT  # imported for the path
    cli.run(main, Settings, __doc__)
