"""Verify a dataset and show what is in it.

    python -m tools.inspect_dataset DATA/train [--tokenizer_dir=CKPT] [--picture=lengths.png]

Checks every chunk against the index and the manifest, bytes included, prints a few documents, and draws how long the
documents are. DIR is a merged dataset, a folder of optimize_dataset.py's output, or one that litdata wrote.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np

from tokenization.chunk_reader import counted_in, read_document_offsets, read_documents, verify
from tokenization.input_names import describe_inputs
from utils import cli, console
from utils.chunks import Index, read_index
from utils.errors import Problems, UserError
from utils.files import atomic_write
from utils.manifest import damaged_files, read_manifest

PICTURE_SUFFIXES = (".png", ".svg", ".pdf")


@dataclasses.dataclass
class Settings:
    """What to verify and show."""

    dataset_dir: str
    """Directory with index.json and chunks."""
    tokenizer_dir: str | None = None
    """Directory with tokenizer.json, to show documents as text; null: as token ids."""
    num_samples: int = 3
    """Documents to show, of a packed dataset pieces; 0: none."""
    seed: int = 0
    """Which documents are shown."""
    checksums: bool = True
    """Read every byte and compare checksums; false: sizes and document offsets only."""
    picture: str | None = None
    """Picture of the document lengths to write (.png, .svg, .pdf); null: none."""


def document_lengths(index: Index) -> np.ndarray:
    """Tokens of each document of the dataset, shape (documents,), from the chunks' headers alone.

    Raises:
        UserError: naming every chunk that is not what the index says.
    """
    problems = Problems()
    lengths = []
    for chunk in index.chunks:
        path = index.directory / chunk.name
        try:
            verify(path, chunk, index.dtype)
            lengths.append(np.diff(read_document_offsets(path)) // np.dtype(index.dtype).itemsize)
        except (OSError, ValueError) as error:
            problems.add(f"{error}. Make the dataset again, or bring the file back.")
    problems.raise_if_any()
    return np.concatenate(lengths) if lengths else np.empty(0, np.int64)


def check_against_manifest(index: Index, manifest: dict[str, Any], checksums: bool) -> None:
    """Raises UserError with every difference between files, index and manifest."""
    problems = Problems()
    content = manifest["content"]
    for key, value in counted_in(index, manifest).items():
        if content.get(key) != value:
            problems.add(f"{index.directory}: {key} is {value!r} in index.json, {content.get(key)!r} in manifest.json.")
    if {chunk.name for chunk in index.chunks} != {file.get("name") for file in manifest["files"]}:
        problems.add(f"{index.directory}: index.json and manifest.json do not name the same chunks.")
    for problem in damaged_files(index.directory, manifest["files"], checksums):
        problems.add(f"{problem}.")
    problems.raise_if_any()


def show_lengths(lengths: np.ndarray, what: str) -> None:
    shares = np.percentile(lengths, [0, 5, 50, 95, 100]).astype(int)
    console.result(
        f"{what} length in tokens: mean {lengths.mean():,.0f}; "
        + ", ".join(f"{name} {value:,}" for name, value in zip(("least", "5%", "median", "95%", "most"), shares))
    )


def draw_lengths(lengths: np.ndarray, what: str, path: str) -> None:
    """A histogram over logarithmic bins: how many documents, or pieces, and how many of all tokens, have such a length.

    Args:
        what: "document" or "piece".
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    positive = np.maximum(lengths, 1)
    bins = np.geomspace(1, positive.max() + 1, 60)
    figure, (documents, tokens) = plt.subplots(2, 1, figsize=(8, 5), sharex=True, layout="constrained")
    documents.hist(positive, bins, color="#0072B2")
    documents.set(ylabel=f"{what}s", title=f"{len(lengths):,} {what}s, {int(lengths.sum()):,} tokens")
    tokens.hist(positive, bins, weights=lengths / max(lengths.sum(), 1) * 100, color="#D55E00")
    tokens.set(xscale="log", xlabel=f"{what} length, tokens", ylabel="% of all tokens")
    for axes in (documents, tokens):
        axes.spines[["top", "right"]].set_visible(False)
        middle = np.median(positive)
        label = f"median {what}: {middle:,.0f} tokens"
        axes.axvline(middle, color="#666666", linewidth=0.8, linestyle="--", label=label)
    documents.legend(frameon=False)
    with atomic_write(path) as file:
        figure.savefig(file, format=Path(path).suffix[1:], dpi=150)
    plt.close(figure)


def show_samples(index: Index, lengths: np.ndarray, what: str, settings: Settings) -> None:
    """Print some documents, or pieces, decoded if a tokenizer is given."""
    decode = None
    if settings.tokenizer_dir is not None:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(os.path.join(settings.tokenizer_dir, "tokenizer.json"))
        decode = lambda ids: tokenizer.decode(ids, skip_special_tokens=False)  # noqa: E731
    chosen = np.random.default_rng(settings.seed).choice(len(lengths), min(settings.num_samples, len(lengths)), False)
    first_of_chunk = np.cumsum([0, *(chunk.documents for chunk in index.chunks)])
    for document in sorted(chosen.tolist()):
        chunk = int(np.searchsorted(first_of_chunk, document, side="right")) - 1
        path = index.directory / index.chunks[chunk].name
        ids = read_documents(path, index.dtype)[document - int(first_of_chunk[chunk])].tolist()
        text = decode(ids[:200]) if decode else " ".join(map(str, ids[:60]))
        console.result(f"\n--- {what} {document:,} of {path.name}, {len(ids):,} tokens\n{text[:600]}")


def check_settings(settings: Settings) -> None:
    from utils.tokenizer import read_tokenizer_info

    problems = Problems()
    if settings.picture is not None and Path(settings.picture).suffix not in PICTURE_SUFFIXES:
        problems.add(f"--picture={settings.picture}: give a name that ends in {', '.join(PICTURE_SUFFIXES)}.")
    manifest = problems.collect(read_manifest, settings.dataset_dir)
    if settings.tokenizer_dir is not None:
        tokenizer = problems.collect(read_tokenizer_info, settings.tokenizer_dir)
        recorded = (manifest or {}).get("tokenizer")
        if tokenizer and recorded and recorded["sha256"] != tokenizer.sha256:
            problems.add(
                f"--tokenizer_dir={settings.tokenizer_dir}: is not the tokenizer that made the dataset (its "
                f"tokenizer.json has SHA-256 {tokenizer.sha256[:12]}..., the dataset's was "
                f"{recorded['sha256'][:12]}...). Give that one."
            )
    problems.raise_if_any()


def main(settings: Settings) -> None:
    check_settings(settings)
    index = read_index(settings.dataset_dir, "dataset_dir")
    if not index.chunks:
        raise UserError(f"{settings.dataset_dir}: no chunks in it.")
    lengths = document_lengths(index)
    manifest = read_manifest(settings.dataset_dir)
    if manifest is None:
        console.warn(f"{settings.dataset_dir}: no manifest.json; checksums and origin cannot be checked")
    else:
        check_against_manifest(index, manifest, settings.checksums)
    content = (manifest or {}).get("content", {})
    what, counted = "document", f"{index.documents:,} documents"
    if "packing" in (manifest or {}):  # its headers count pieces
        what, counted = "piece", f"{index.documents:,} pieces of {content['documents']:,} documents"
    text = f", {console.human_bytes(content['text_bytes'])} of text" if content.get("text_bytes") else ""
    console.result(
        f"{settings.dataset_dir}: {counted}, {index.tokens:,} tokens of {index.dtype}{text}, "
        f"{len(index.chunks):,} chunks"
    )
    console.result(
        "verified: chunk headers and index"
        + (", manifest" if manifest else "")
        + (", every checksum" if manifest and settings.checksums else "")
    )
    if manifest and manifest["inputs"]:
        console.result(f"made from: {describe_inputs(manifest['inputs'])}")
    show_lengths(lengths, what)
    if settings.num_samples:
        show_samples(index, lengths, what, settings)
    if settings.picture:
        draw_lengths(lengths, what, settings.picture)
        console.result(f"\npicture: {settings.picture}")


if __name__ == "__main__":
    cli.run(main, Settings, __doc__, positional=True)
