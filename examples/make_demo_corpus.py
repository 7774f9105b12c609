"""Make a small corpus, and a tokenizer for it, out of text that every machine with Python has.

    python examples/make_demo_corpus.py --output_dir=demo/parquet --tokenizer_dir=demo/tokenizer
    python examples/make_demo_corpus.py --output_dir=/data/code --source=code --size=300MB

Nothing is downloaded: the text is the documentation in the standard library and in the installed packages
(docstrings, package descriptions, .rst, .md and .txt files), or, with `--source=code`, their source files. Of the
documentation, unless `--source=documentation` asks for all, whole English sentences are kept, and no paragraph that
nearly stands in another document: what is held out for validation is not what was learnt. The parquet files have the
columns of FineWeb. The tokenizer is a byte-level BPE with the pre-tokenizer of Llama 3.

The same environment gives the same bytes, wherever it is installed; another set of packages gives another corpus.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import sys
import time
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from shlex import quote
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import english
import prose
from source_files import SourceFile, list_source_files, machine_paths, read_source_file

from export.publishing import publishing
from export.sizes import parse_bytes
from utils import cli, console
from utils.errors import Problems, UserError
from utils.files import write_json
from utils.manifest import claim, damaged_files, file_entry, made_by, read_manifest, write_manifest

SCRIPT = "make_demo_corpus.py"
BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"

# Llama 3's, from its tokenizer.json.
PRETOKENIZER_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
# 40 MB hold enough words for 128,000 tokens; more text costs time and memory and changes few merges.
TOKENIZER_SAMPLE_BYTES = 40_000_000

PROSE_SUFFIXES = {".py", ".pyi", ".pyx", ".md", ".rst", ".txt", "METADATA"}
CODE_SUFFIXES = {".py", ".pyi", ".pyx", ".pxd", ".pxi", ".c", ".cc", ".cpp", ".cu", ".cuh", ".h", ".hpp", ".js", ".ts"}
MIN_DOCUMENT_BYTES = 200
# Which words are plain is counted in the first so many files, in seconds; in all of them it would take minutes.
PLAIN_WORDS_FILES = 4000

MIN_ROW_GROUPS_PER_FILE = 4
MAX_ROW_GROUP_ROWS = 1000  # FineWeb's
# The dates of the texts are not known, and a clock would make equal corpora differ.
DATE = "2000-01-01T00:00:00Z"


@dataclasses.dataclass
class Settings:
    """How much of which text, and where corpus and tokenizer go."""

    output_dir: str
    """Directory to make, for the parquet files."""

    size: str = "4MB"
    """Bytes of UTF-8 text to collect, as a number with kB, MB or GB (1 MB = 1,000,000 bytes)."""

    source: Literal["prose", "documentation", "code"] = "prose"
    """prose: documentation in plain words and whole sentences; up to about 4 MB. documentation: all of it, lists and
    names included; up to about 50 MB. code: whole source files; up to about 400 MB."""

    num_files: int = 4
    """Number of parquet files. The second is twice as large as the first, the third three times, and so on."""

    tokenizer_dir: str | None = None
    """Directory to make, for a tokenizer trained on the corpus. Default: train none."""

    vocab_size: int = 8192
    """Tokens in the tokenizer's vocabulary, the two special tokens included."""


@dataclasses.dataclass(frozen=True)
class Document:
    text: str
    source: SourceFile
    part: int
    """A long file gives several documents; counted from 0."""


# ---------------------------------------------------------------------------- documents


def collect_documents(settings: Settings, size_bytes: int) -> list[Document]:
    """Documents of `size_bytes` of text in all, no two the same.

    Raises:
        UserError: the environment does not hold as much.
    """
    here = machine_paths()
    documents: list[Document] = []
    seen: set[bytes] = set()
    total = 0
    sources = {"prose": prose_texts, "documentation": documentation_texts, "code": code_texts}
    for file, texts in sources[settings.source]():
        for part, text in enumerate(texts):
            if (settings.source != "prose" and len(text) < MIN_DOCUMENT_BYTES) or "\0" in text:
                continue
            if any(path in text for path in here):
                continue
            digest = hashlib.blake2b(" ".join(text.lower().split()).encode(), digest_size=12).digest()
            if digest in seen:
                continue
            seen.add(digest)
            documents.append(Document(text, file, part))
            total += len(text.encode())
            if total >= size_bytes:
                return documents
    other = ""
    if settings.source == "prose":
        other = " Or take more kinds of text: --source=documentation (about 50 MB) or --source=code."
    raise UserError(
        f"--size={settings.size}: this environment holds only {console.human_bytes(total)} of such text. Ask for less."
        + other
    )


def code_texts() -> Iterator[tuple[SourceFile, Iterable[str]]]:
    """Each file with its whole text."""
    for file in list_source_files(CODE_SUFFIXES):
        if (content := read_source_file(file)) is not None:
            yield file, [content]


def documentation_texts() -> Iterator[tuple[SourceFile, Iterable[str]]]:
    """Each file with all of its documentation."""
    for file in list_source_files(PROSE_SUFFIXES):
        if (content := read_source_file(file)) is not None:
            yield file, ["\n\n".join(prose.passages_of(file.name, content))]


def prose_texts() -> Iterator[tuple[SourceFile, Iterable[str]]]:
    """Each file with the documents that are made of its paragraphs in plain words."""
    files = list_source_files(PROSE_SUFFIXES)
    sample = [list(prose_paragraphs(file)) for file in files[:PLAIN_WORDS_FILES]]
    plain, repetition = english.PlainWords(sample), english.Repetition()
    paragraphs = itertools.chain(sample, map(prose_paragraphs, files[PLAIN_WORDS_FILES:]))
    for file, found in zip(files, paragraphs, strict=True):
        yield file, prose.join(filter(plain.make_up, found), repetition)


def prose_paragraphs(file: SourceFile) -> Iterator[str]:
    if (content := read_source_file(file)) is not None:
        yield from prose.paragraphs_of(file.name, content)


# ---------------------------------------------------------------------------- parquet


def split_by_weight(documents: list[Document], num_files: int) -> Iterator[list[Document]]:
    """Consecutive runs of documents of which the i-th (from 1) holds about i parts of the text."""
    lengths = [len(document.text) for document in documents]
    total, parts = sum(lengths), num_files * (num_files + 1) // 2
    start = done = 0
    for i in range(1, num_files + 1):
        end = start
        goal = total * (i * (i + 1) // 2) / parts
        while end < len(documents) and (i == num_files or done < goal or end == start):
            done += lengths[end]
            end += 1
        yield documents[start:end]
        start = end


def write_parquet(path: Path, documents: list[Document], compression: str) -> None:
    """One file with FineWeb's columns, in several row groups."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = [document.text for document in documents]
    table = pa.table(
        {
            "text": texts,
            "id": [f"<urn:uuid:{uuid.uuid5(uuid.NAMESPACE_OID, text)}>" for text in texts],
            "dump": [document.source.package.partition("@")[0] for document in documents],
            "url": [
                # Package URL, https://github.com/package-url/purl-spec
                f"pkg:pypi/{document.source.package}#{document.source.name.partition('/')[2]}?part={document.part}"
                for document in documents
            ],
            "date": pa.array([DATE] * len(texts), pa.string()),
            "file_path": [document.source.name for document in documents],
            "language": pa.array(["en"] * len(texts), pa.string()),
            "language_score": pa.array([1.0] * len(texts), pa.float64()),
            # An estimate, as nothing has been tokenized yet: four bytes per token.
            "token_count": pa.array([len(text.encode()) // 4 for text in texts], pa.int64()),
        }
    )
    row_group_size = min(MAX_ROW_GROUP_ROWS, max(1, -(-len(texts) // MIN_ROW_GROUPS_PER_FILE)))
    pq.write_table(table, path, row_group_size=row_group_size, compression=compression)


def make_corpus(settings: Settings, size_bytes: int) -> None:
    final = Path(settings.output_dir)
    final.parent.mkdir(parents=True, exist_ok=True)
    documents = collect_documents(settings, size_bytes)
    names = []
    with publishing(final, "--output_dir") as temporary:
        for i, group in enumerate(split_by_weight(documents, settings.num_files)):
            names.append(f"{i:03d}_00000.parquet")
            # The two compressions that one meets in the wild.
            write_parquet(temporary / names[-1], group, compression="zstd" if i % 2 == 0 else "snappy")
        write_manifest(
            temporary,
            {
                "kind": "corpus",
                "made_by": made_by(SCRIPT, "pyarrow"),
                "settings": corpus_settings(settings, size_bytes),
                "content": {
                    "documents": len(documents),
                    "text_bytes": sum(len(document.text.encode()) for document in documents),
                },
                "files": [file_entry(temporary, name) for name in names],
                "inputs": [],
            },
        )


# ---------------------------------------------------------------------------- tokenizer


def read_texts(corpus_dir: Path, limit_bytes: int) -> Iterator[str]:
    import pyarrow.parquet as pq

    total = 0
    for path in sorted(corpus_dir.glob("*.parquet")):
        for batch in pq.ParquetFile(path).iter_batches(batch_size=256, columns=["text"]):
            for text in batch.column("text").to_pylist():
                yield text
                total += len(text.encode())
                if total >= limit_bytes:
                    return


def train_tokenizer(texts: Iterable[str], vocab_size: int):
    """Byte-level BPE of `vocab_size` tokens; BOS and EOS have the last two ids, as in Llama 3."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZER_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        # Without a limit, rulers such as "-----" of every length become tokens.
        max_token_length=24,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (BOS, EOS)])
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B:1", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
            ),
        ]
    )
    return tokenizer


def make_tokenizer(settings: Settings) -> None:
    corpus, final = Path(settings.output_dir), Path(settings.tokenizer_dir)
    final.parent.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(read_texts(corpus, TOKENIZER_SAMPLE_BYTES), settings.vocab_size)
    if tokenizer.get_vocab_size() != settings.vocab_size:
        raise UserError(
            f"--vocab_size={settings.vocab_size}: the corpus has words for {tokenizer.get_vocab_size()} tokens only. "
            "Ask for fewer, or raise --size."
        )
    with publishing(final, "--tokenizer_dir") as temporary:
        tokenizer.save(str(temporary / "tokenizer.json"))
        write_json(
            temporary / "tokenizer_config.json",
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": BOS,
                "eos_token": EOS,
                "add_bos_token": True,
                "add_eos_token": False,
                "clean_up_tokenization_spaces": False,
                "model_input_names": ["input_ids", "attention_mask"],
            },
        )
        write_json(
            temporary / "generation_config.json",
            {"bos_token_id": tokenizer.token_to_id(BOS), "eos_token_id": tokenizer.token_to_id(EOS)},
        )
        write_manifest(
            temporary,
            {
                "kind": "tokenizer",
                "made_by": made_by(SCRIPT, "tokenizers"),
                "settings": tokenizer_settings(settings),
                "content": {"vocab_size": tokenizer.get_vocab_size()},
                "files": [
                    file_entry(temporary, name)
                    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json")
                ],
                "inputs": [],
            },
        )


# ---------------------------------------------------------------------------- the step


def corpus_settings(settings: Settings, size_bytes: int) -> dict[str, Any]:
    return {"size_bytes": size_bytes, "source": settings.source, "num_files": settings.num_files}


def tokenizer_settings(settings: Settings) -> dict[str, Any]:
    corpus = read_manifest(settings.output_dir)
    content = json.dumps(corpus["files"], sort_keys=True).encode()
    return {"vocab_size": settings.vocab_size, "corpus": hashlib.sha256(content).hexdigest()}


def is_made(directory: Path, flag: str, kind: str, wanted: dict[str, Any]) -> bool:
    """Whether `directory` already is what is asked for; raises UserError if it is something else, or damaged."""
    manifest = claim(directory, flag, kind, {"settings": wanted})
    damaged = damaged_files(directory, manifest["files"], checksums=False) if manifest else []
    if damaged:
        raise UserError(f"{flag}={directory}: is damaged ({'; '.join(damaged)}). Delete it and run again.")
    return manifest is not None


def report_corpus(directory: Path, seconds: float | None) -> None:
    content = read_manifest(directory)["content"]
    how = "nothing to do" if seconds is None else f"made in {console.human_seconds(seconds)}"
    console.say(
        f"corpus {directory}: {content['documents']:,} documents, {console.human_bytes(content['text_bytes'])} of "
        f"text, {len(read_manifest(directory)['files'])} parquet files; {how}"
    )


def report_tokenizer(directory: Path, seconds: float | None) -> None:
    how = "nothing to do" if seconds is None else f"trained in {console.human_seconds(seconds)}"
    console.say(f"tokenizer {directory}: {read_manifest(directory)['content']['vocab_size']:,} tokens; {how}")


def main(settings: Settings) -> None:
    problems = Problems()
    size_bytes = problems.collect(parse_bytes, settings.size, "--size")
    if not 1 <= settings.num_files <= 1000:
        problems.add(f"--num_files={settings.num_files}: give 1 to 1000.")
    if not 260 <= settings.vocab_size <= 2**20:
        problems.add(f"--vocab_size={settings.vocab_size}: give at least 260: 256 bytes, BOS, EOS and some merges.")
    problems.raise_if_any()

    corpus = Path(settings.output_dir)
    corpus_is_made = is_made(corpus, "--output_dir", "corpus", corpus_settings(settings, size_bytes))
    tokenizer = Path(settings.tokenizer_dir) if settings.tokenizer_dir else None
    if tokenizer and not corpus_is_made and tokenizer.exists() and any(tokenizer.iterdir()):
        raise UserError(f"--tokenizer_dir={tokenizer}: exists, but the corpus it was trained on does not. Delete it.")
    tokenizer_is_made = (
        tokenizer is not None
        and corpus_is_made
        and is_made(tokenizer, "--tokenizer_dir", "tokenizer", tokenizer_settings(settings))
    )

    start = time.monotonic()
    if not corpus_is_made:
        make_corpus(settings, size_bytes)
    report_corpus(corpus, None if corpus_is_made else time.monotonic() - start)

    if tokenizer:
        start = time.monotonic()
        if not tokenizer_is_made:
            make_tokenizer(settings)
        report_tokenizer(tokenizer, None if tokenizer_is_made else time.monotonic() - start)
        console.next_command(
            f"python optimize_dataset.py --input_dir={quote(str(corpus))} --tokenizer_dir={quote(str(tokenizer))} "
            f"--output_dir={quote(str(corpus.parent / 'tokens'))} --val_fraction=0.02 --add_eos=true"
        )


if __name__ == "__main__":
    cli.run(main, Settings, __doc__)
