"""What the tests share: real text, a real tokenizer, a real Ray cluster, and scripts run as their users run them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Before anything imports torch or tokenizers: processes of one test must not fight over two cores.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# What step 1 remembers of a tokenizer: never what an earlier session of tests found, nor in the user's home.
_cache = tempfile.TemporaryDirectory(prefix="cache-of-tests-")
os.environ["XDG_CACHE_HOME"] = _cache.name
# Where Ray notes which cluster runs on this machine: tests must neither join the user's cluster nor one another's when
# several pytest processes run. In /tmp, because a socket's path may have 107 bytes.
_ray = tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True)
os.environ["RAY_TMPDIR"] = _ray.name


# A shell lets what it starts in the background ignore Ctrl-C, and the scripts that tests start would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(items):
    """Every long test is a slow one. Files of minutes come first, so that several processes (`pytest -n 2
    --no-loadscope-reorder`) end together."""
    for item in items:
        if item.get_closest_marker("long"):
            item.add_marker("slow")
    folders = ("pretraining", "export", "tokenization", "tools", "utils")
    items.sort(key=lambda item: folders.index(item.path.parent.name) if item.path.parent.name in folders else -1)


def real_documents() -> list[str]:
    """The Python language reference, as every Python ships it: some hundred texts of a few kB."""
    from pydoc_data.topics import topics

    documents = []
    for name in sorted(topics):
        paragraphs = topics[name].split("\n\n")
        documents += ["\n\n".join(paragraphs[i : i + 8]) for i in range(0, len(paragraphs), 8)]
    return list(dict.fromkeys(document for document in documents if len(document) > 200))


@pytest.fixture(scope="session")
def documents() -> list[str]:
    return real_documents()


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory, documents) -> Path:
    """A byte-level BPE tokenizer of 1,024 tokens that puts BOS before a text, as Llama 3's does."""
    import json

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        documents,
        trainers.BpeTrainer(
            vocab_size=1024,
            special_tokens=["<|begin_of_text|>", "<|end_of_text|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A",
        special_tokens=[("<|begin_of_text|>", tokenizer.token_to_id("<|begin_of_text|>"))],
    )
    directory = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": "<|begin_of_text|>",
                "eos_token": "<|end_of_text|>",
                "model_max_length": 1024,
            }
        )
    )
    (directory / "generation_config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": 1}))
    return directory


@pytest.fixture(scope="session")
def dataset(tmp_path_factory, documents, tokenizer_dir) -> Path:
    """A merged dataset of forty documents; what needs another one defines its own."""
    from tiny_runs import tokenize_dataset

    return tokenize_dataset(tmp_path_factory.mktemp("data") / "merged", documents[:40], tokenizer_dir)


@pytest.fixture(scope="session")
def short_documents(tmp_path_factory, documents, tokenizer_dir) -> Path:
    """A merged dataset of documents of 8 to 40 tokens, so that most sequences hold several."""
    from tiny_runs import tokenize_dataset

    short = [document[:100] for document in documents[:300]]
    return tokenize_dataset(tmp_path_factory.mktemp("short") / "merged", short, tokenizer_dir)


def said_by(capsys, command: Callable[[], None], code: int = 0) -> str:
    """What a tool's `main` prints, once its exit code is as expected."""
    capsys.readouterr()
    found = 0
    try:
        command()
    except SystemExit as left:
        found = left.code
    said = capsys.readouterr().out
    assert found == code, said
    return said


def write_parquet(path: Path, texts: list[str | None], row_group_size: int = 20, column: str = "text") -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(
        {column: pa.array(texts, pa.string()), "id": pa.array([f"{path.stem}-{i}" for i in range(len(texts))])}
    )
    pq.write_table(table, path, row_group_size=row_group_size)


@pytest.fixture(scope="session")
def parquet_dir(tmp_path_factory, documents) -> Path:
    """Three files of different sizes with several row groups, one of them in a sub-folder."""
    directory = tmp_path_factory.mktemp("parquet")
    thirds = len(documents) // 6
    write_parquet(directory / "000_00000.parquet", documents[:thirds])
    write_parquet(directory / "000_00001.parquet", documents[thirds : 3 * thirds], row_group_size=50)
    write_parquet(directory / "sub" / "001_00000.parquet", documents[3 * thirds :], row_group_size=200)
    return directory


@pytest.fixture(scope="session")
def ray_address():
    """The address of a Ray cluster of one node with four logical CPUs, for `--address`."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 4, "include_dashboard": False})
    yield cluster.address
    cluster.shutdown()


def run_a_script(script: str, *arguments, env: dict | None = None, timeout: float = 300, check: bool = True, cwd=ROOT):
    """Run a script as a user does; stdout and stderr are captured as text."""
    process = subprocess.run(
        [sys.executable, str(ROOT / script), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=cwd,
        env={**os.environ, **(env or {})},
    )
    assert "\x1b[" not in process.stdout + process.stderr, "colours are for terminals"
    if check and process.returncode != 0:
        pytest.fail(f"{script} left with {process.returncode}\n{process.stdout}\n{process.stderr}")
    return process


@pytest.fixture
def run_script():
    return run_a_script


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 KiB; `mount -o remount,size=...` makes it larger."""
    directory = tmp_path / "small"
    directory.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", directory], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small tmpfs needs root, and a machine that lets it")
    yield directory
    subprocess.run(["umount", "-l", directory], check=True)
