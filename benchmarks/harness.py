"""What the benchmarks share: commands with their time and memory, processes of one training run, made-up tokens, and
how the machine and the figures are printed.

Import it before the toolkit's own modules: it makes them importable wherever the benchmark is started.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.errors import UserError

ROOT = Path(__file__).resolve().parent.parent


@dataclasses.dataclass
class Usage:
    """What a command took."""

    seconds: float
    processor_s: float
    """Of all its threads and processes, user and system: what other programs on the machine hardly disturb."""
    peak_bytes: int
    """Largest resident set among its processes, as the kernel counts it: mapped files count too."""
    output: str = ""


def run(*command: Any, env: Mapping[str, str] | None = None, cwd: Path = ROOT) -> Usage:
    """Run a command to its end; raises UserError with the end of its output when it fails."""
    words = [str(word) for word in command]
    start = time.perf_counter()
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=cwd, env={**os.environ, **(env or {})}
    )
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise UserError(f"{' '.join(words)} left with {process.returncode}:\n{output[-5000:]}")
    return Usage(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, output)


def run_script(script: str, *arguments: Any, env: Mapping[str, str] | None = None) -> Usage:
    """Run a script of this checkout, named from its root."""
    return run(sys.executable, ROOT / script, *arguments, env=env)


def directory_bytes(directory: str | os.PathLike) -> int:
    return sum(os.lstat(os.path.join(root, name)).st_size for root, _, names in os.walk(directory) for name in names)


# ---------------------------------------------------------------------------------------------------------------------
# Processes of one training run


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def rank_environment(rank: int, num_processes: int, port: int) -> dict[str, str]:
    """What torchrun would set for a process of a run on this machine alone."""
    sizes = {"WORLD_SIZE": num_processes, "LOCAL_WORLD_SIZE": num_processes, "MASTER_PORT": port}
    numbers = {"RANK": rank, "LOCAL_RANK": rank, **sizes}
    return {"MASTER_ADDR": "127.0.0.1", **{name: str(number) for name, number in numbers.items()}}


def run_ranks(script: str, job: dict[str, Any], num_processes: int, num_threads: int = 1) -> dict[str, Any]:
    """Run `script --worker JOB` as all processes of a training run.

    Returns:
        the JSON object that rank 0 printed last, and `memory_bytes`, the peak of the largest process.
    """
    command = [sys.executable, script, "--worker", json.dumps(job)]
    port = free_port()
    started = [
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **rank_environment(rank, num_processes, port), "OMP_NUM_THREADS": str(num_threads)},
        )
        for rank in range(num_processes)
    ]
    output = started[0].stdout.read()
    ends = [os.wait4(process.pid, 0) for process in started]
    if any(status for _, status, _ in ends):
        raise RuntimeError(f"{' '.join(command)} failed")
    result = json.loads(output.strip().splitlines()[-1])
    return {**result, "memory_bytes": max(usage.ru_maxrss for _, _, usage in ends) * 1024}


def make_parser(description: str) -> argparse.ArgumentParser:
    """A parser for a benchmark that starts itself again with `run_ranks`."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    return parser


# ---------------------------------------------------------------------------------------------------------------------
# Made-up tokens


def write_token_folder(
    folder: Path, chunk_documents: dict[str, Any], document_tokens: int | None, vocab_size: int, **manifest: Any
) -> dict[str, Any]:
    """A directory of token chunks with index and manifest; small ids are frequent, as in text.

    Args:
        chunk_documents: file name -> how many documents the chunk holds, all of `document_tokens` tokens; or, where
            that is None, the tokens of each of its documents, an array of shape (n,).
        manifest: keys that differ from the manifest of a merged dataset.

    Returns:
        the manifest.
    """
    import numpy as np

    from tokenization.chunk_index import make_index
    from tokenization.chunk_writer import chunk_header, dtype_for_vocabulary
    from utils.chunks import Chunk
    from utils.files import write_json
    from utils.manifest import file_entry, write_manifest

    folder.mkdir(parents=True)
    random = np.random.Generator(np.random.PCG64(0))
    dtype = dtype_for_vocabulary(vocab_size)
    chunks = []
    for name, documents in chunk_documents.items():
        lengths = documents if document_tokens is None else np.full(documents, document_tokens)
        ids = (vocab_size * random.random(int(lengths.sum())) ** 4).astype(dtype)
        with open(folder / name, "wb") as file:
            file.write(chunk_header(lengths, dtype).tobytes())
            file.write(ids.tobytes())
        chunks.append(Chunk(name, len(lengths), len(ids), (folder / name).stat().st_size))
    write_json(folder / "index.json", make_index(chunks, dtype, None, "0" * 12))
    tokens = sum(chunk.tokens for chunk in chunks)
    whole = {
        "kind": "dataset",
        "made_by": {"script": "benchmarks/harness.py", "versions": {}},
        "settings": {},
        "tokenizer": None,
        "content": {
            "documents": sum(chunk.documents for chunk in chunks),
            "tokens": tokens,
            "text_bytes": 4 * tokens,
            "chunks": len(chunks),
            "dtype": dtype,
        },
        "files": [
            {**file_entry(folder, chunk.name), "documents": chunk.documents, "tokens": chunk.tokens} for chunk in chunks
        ],
        "inputs": [],
        **manifest,
    }
    write_manifest(folder, whole)
    return whole


def write_dataset(directory: Path, num_tokens: int, vocab_size: int) -> None:
    """directory/train and directory/val (a tenth of the size), as step 3 reads them."""
    document_tokens = 1000
    for split, tokens in (("train", num_tokens), ("val", max(num_tokens // 10, 20 * document_tokens))):
        chunk = {"chunk-0.bin": tokens // document_tokens}
        write_token_folder(directory / split, chunk, document_tokens, vocab_size)


# ---------------------------------------------------------------------------------------------------------------------
# The report


def environment(*packages: str) -> dict[str, Any]:
    """Date, machine and versions, which every figure needs beside it."""
    return {
        "date": datetime.date.today().isoformat(),
        "machine": {
            "processor": _processor(),
            "cores": os.cpu_count(),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        },
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in packages},
        },
    }


def environment_line(*packages: str) -> str:
    found = environment(*packages)
    machine = found["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    memory = f"{machine['memory_bytes'] / 2**30:.0f} GiB of memory"
    return f"{found['date']}, {machine['cores']} cores of {machine['processor']}, {memory}; {versions}."


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def table_row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def table(header: list[str], rows: Iterable[Iterable[str]]) -> str:
    """In Markdown; the first column holds names, the others figures."""
    rule = f"|---|{'---:|' * (len(header) - 1)}"
    return "\n".join([table_row(*header), rule, *(table_row(*row) for row in rows)])
