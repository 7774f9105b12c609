"""What packing documents into blocks costs at the merge, and what it saves: `--pack_tokens` beside the plain merge.

    python benchmarks/packing.py [--work_dir=DIR] [--tokens=200e6] [--mean_tokens=670]

Made-up tokens in documents whose lengths are log-normal, as FineWeb's are, in full chunks of one node. The real
command merges them plainly, by hard links, and with each --pack_tokens. A plain merge is the same for every context,
so that it is run once, and only its cuts differ. All checksums are compared; the files are in the page cache. Peak
memory is that of the command, with the pages of the files that it has mapped. Prints a Markdown table.
"""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import harness

from utils import cli, console
from utils.errors import Problems
from utils.manifest import read_manifest, write_manifest

CHUNK_TOKENS = 1 << 25
VOCAB_SIZE = 65_000


@dataclasses.dataclass
class Settings:
    """How many tokens are merged, and how they are packed."""

    work_dir: str | None = None
    """Directory for the files that are made; null: a temporary one. Removed at the end."""
    tokens: float = 200e6
    """Tokens to merge, about; twice as many bytes, and as many again in each packed dataset."""
    mean_tokens: int = 670
    """Tokens of a document on average; 670 are FineWeb's."""
    pack_tokens: list[int] = dataclasses.field(default_factory=lambda: [2049, 8193])
    """Blocks to pack into, in tokens."""
    seed: int = 0
    """Decides the lengths."""


def make_split(directory: Path, settings: Settings) -> None:
    """OUT/train as one node leaves it."""
    import numpy as np
    import web_text

    random = np.random.default_rng(settings.seed)
    num_documents = max(1, round(settings.tokens / settings.mean_tokens))
    lengths = web_text.draw_lengths(random, num_documents, settings.mean_tokens)
    cuts = np.searchsorted(np.cumsum(lengths), np.arange(CHUNK_TOKENS, lengths.sum(), CHUNK_TOKENS))
    chunks = {f"chunk-{i:07d}-0.bin": part for i, part in enumerate(np.split(lengths, cuts))}
    common = {"kind": "tokens", "split": "train", "fingerprint": "0", "tokenizer": {"sha256": "0"}}
    common["settings"] = {"bos_id": 0, "eos_id": None, "chunk_tokens": CHUNK_TOKENS}
    folder = harness.write_token_folder(directory / "0", chunks, None, VOCAB_SIZE, **common)
    write_manifest(directory, {**folder, "files": [], "folders": ["0"]})


def row(name: str, usage: harness.Usage, content: dict[str, Any], cut: int, unread: int) -> list[str]:
    tokens = content["tokens"]
    rate, memory = f"{tokens / usage.seconds / 1e6:.1f} M", console.human_bytes(usage.peak_bytes)
    shares = f"{cut / content['documents']:.2%}", "0.00%", f"{unread / tokens:.3%}"
    return [name, f"{usage.seconds:.1f}", rate, memory, *shares]


def measure(work: Path, settings: Settings) -> str:
    source = work / "OUT" / "train"
    # Not in this process: the kernel counts the peak of a parent as its children's too.
    with ProcessPoolExecutor(1) as pool:
        pool.submit(make_split, source, settings).result()

    def merge(*flags: str) -> tuple[harness.Usage, dict[str, Any]]:
        target = work / "DATA"
        usage = harness.run_script("merge_files.py", f"--source_dir={source}", f"--target_dir={target}", *flags)
        manifest = read_manifest(target)
        shutil.rmtree(target)
        return usage, manifest

    plain, manifest = merge()
    content, rows = manifest["content"], []
    for block in settings.pack_tokens:
        usage, packed = merge(f"--pack_tokens={block}")
        counts = packed["packing"]
        cut = counts["plain_documents_cut"], counts["plain_unread_tokens"]
        rows.append(row(f"plain, cut into blocks of {block:,}", plain, content, *cut))
        rows.append(row(f"`--pack_tokens={block}`", usage, content, counts["documents_cut"], counts["rest_tokens"]))
    header = ["merge", "seconds", "tokens/s", "peak memory", "documents cut", "padding", "tokens that fill no block"]
    about = f"{content['tokens']:,} tokens in {content['documents']:,} documents. "
    return f"{about}{harness.environment_line('litdata', 'numpy')}\n\n{harness.table(header, rows)}"


def main(settings: Settings) -> None:
    problems = Problems()
    for flag, least in (("tokens", 1), ("mean_tokens", 2)):
        if getattr(settings, flag) < least:
            problems.add(f"--{flag}={getattr(settings, flag)}: give at least {least}.")
    problems.raise_if_any()
    with tempfile.TemporaryDirectory(dir=settings.work_dir, prefix="packing-") as work:
        console.result(measure(Path(work), settings))


if __name__ == "__main__":
    cli.run(main, Settings, __doc__)
