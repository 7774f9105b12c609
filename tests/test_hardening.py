"""Files from elsewhere: whatever stands in an index, a manifest, a chunk or a config, the worst is a clear refusal."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tokenization.chunk_index import make_index
from tokenization.chunk_reader import read_document_offsets, read_documents
from tokenization.chunk_writer import chunk_header
from utils.chunks import Chunk, read_index
from utils.errors import UserError
from utils.manifest import damaged_files, read_manifest, safe_member, write_manifest

FUZZ = settings(max_examples=150, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])

names = st.one_of(
    st.sampled_from(
        [
            "chunk-0.bin",
            "../secret",
            "/etc/passwd",
            "0/../../x",
            "link",
            "linked_dir/x",
            "",
            ".",
            "..",
            "a\0b",
            "\\\\x",
            "c:\\x",
        ]
    ),
    st.text(max_size=40),
)
scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20), names)
anything = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=12), inner, max_size=4)),
)
chunk_entries = st.fixed_dictionaries(
    {},
    optional={"filename": st.one_of(names, anything), "chunk_size": scalars, "dim": scalars, "chunk_bytes": scalars},
)
indexes = st.one_of(
    anything,
    st.fixed_dictionaries(
        {
            "chunks": st.one_of(anything, st.lists(st.one_of(chunk_entries, anything), max_size=4)),
            "config": st.one_of(
                anything,
                st.fixed_dictionaries(
                    {},
                    optional={
                        "data_format": st.one_of(st.just(["no_header_tensor:16"]), anything),
                        "item_loader": st.one_of(st.just("TokensLoader"), anything),
                        "compression": scalars,
                        "chunk_size": scalars,
                    },
                ),
            ),
        }
    ),
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    """A dataset directory with a secret beside it, and links that lead there."""
    root = tmp_path_factory.mktemp("outside")
    (root / "secret").write_text("secret")
    directory = root / "dataset"
    directory.mkdir()
    (directory / "link").symlink_to(root / "secret")
    (directory / "linked_dir").symlink_to(root)
    (directory / "chunk-0.bin").write_bytes(chunk_header(np.array([3]), "int32").tobytes() + bytes(12))
    return directory


@FUZZ
@given(indexes)
def test_any_index_is_read_or_refused(directory, index):
    (directory / "index.json").write_text(json.dumps(index))
    with contextlib.suppress(UserError):
        for chunk in read_index(directory, "--flag").chunks:
            assert (directory / chunk.name).resolve().is_relative_to(directory)
            assert min(chunk.documents, chunk.tokens, chunk.bytes) >= 0


@FUZZ
@given(st.binary(max_size=200))
def test_any_bytes_as_index_or_manifest_are_refused(directory, raw):
    (directory / "index.json").write_bytes(raw)
    (directory / "manifest.json").write_bytes(raw)
    with pytest.raises(UserError):
        read_index(directory, "--flag")
    with pytest.raises(UserError):
        read_manifest(directory)


def test_deeply_nested_json_is_refused(directory):
    (directory / "index.json").write_text("[" * 100_000)
    (directory / "manifest.json").write_text('{"a":' * 100_000)
    with pytest.raises(UserError):
        read_index(directory, "--flag")
    with pytest.raises(UserError):
        read_manifest(directory)


@FUZZ
@given(
    st.one_of(anything, st.dictionaries(st.sampled_from(["kind", "settings", "content", "files", "inputs"]), anything))
)
def test_any_manifest_is_read_or_refused(directory, manifest):
    raw = {"schema_version": 1, **manifest} if isinstance(manifest, dict) else manifest
    (directory / "manifest.json").write_text(json.dumps(raw))
    with contextlib.suppress(UserError):
        found = read_manifest(directory)
        damaged_files(directory, found["files"])


@FUZZ
@given(names)
def test_names_stay_inside(directory, name):
    with contextlib.suppress(UserError):
        path = safe_member(directory, name)
        assert path.resolve().is_relative_to(directory)


@FUZZ
@given(st.binary(max_size=400))
def test_any_chunk_is_read_or_refused(directory, raw):
    path = directory / "fuzzed.bin"
    path.write_bytes(raw)
    with contextlib.suppress(ValueError):
        offsets = read_document_offsets(path)
        assert offsets[-1] == len(raw) and (np.diff(offsets) >= 0).all()
        with contextlib.suppress(ValueError):  # a document that is no whole number of tokens
            assert sum(len(document) for document in read_documents(path, "uint16")) * 2 == offsets[-1] - offsets[0]


@FUZZ
@given(st.lists(st.integers(0, 50), max_size=20), st.sampled_from(["uint16", "int32"]), st.data())
def test_one_flipped_byte_of_a_header_is_noticed(directory, lengths, dtype, data):
    header = chunk_header(np.array(lengths, dtype=np.int64), dtype)
    raw = bytearray(header.tobytes() + bytes(sum(lengths) * np.dtype(dtype).itemsize))
    path = directory / "whole.bin"
    path.write_bytes(raw)
    assert (np.diff(read_document_offsets(path)) == np.array(lengths) * np.dtype(dtype).itemsize).all()
    raw[data.draw(st.integers(0, 7))] ^= 1 << data.draw(st.integers(0, 7))  # the count, or where the tokens begin
    path.write_bytes(raw)
    with pytest.raises(ValueError):
        read_document_offsets(path)


@pytest.mark.parametrize("script", ["merge_files.py", "-m tools.inspect_dataset"])
@pytest.mark.parametrize(
    "index, manifest",
    [
        ('{"chunks": [{"filename": "../secret", "chunk_size": 1, "dim": 1, "chunk_bytes": 6}]', None),
        ("[[[[", "{}"),
        (None, '{"schema_version": 1, "kind": "tokens", "settings": {}, "content": {}, "files": [7], "inputs": []}'),
        (None, '{"schema_version": 99}'),
    ],
)
def test_the_commands_say_it_without_a_traceback(tmp_path, script, index, manifest):
    import subprocess
    import sys

    from conftest import ROOT

    folder = tmp_path / "OUT" / "0"
    folder.mkdir(parents=True)
    (tmp_path / "OUT" / "secret").write_text("secret")
    good = make_index([Chunk("chunk-0.bin", 1, 3, 24)], "int32", None, "0" * 12)
    (folder / "chunk-0.bin").write_bytes(chunk_header(np.array([3]), "int32").tobytes() + bytes(12))
    (folder / "index.json").write_text(index or json.dumps(good))
    write_manifest(folder, {"kind": "tokens", "settings": {}, "content": {}, "files": [], "inputs": []})
    if manifest:
        (folder / "manifest.json").write_text(manifest)
    arguments = (
        ["merge_files.py", f"--source_dir={tmp_path / 'OUT'}", f"--target_dir={tmp_path / 'DATA'}"]
        if script == "merge_files.py"
        else ["-m", "tools.inspect_dataset", str(folder)]
    )
    process = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert process.returncode == 2, process.stdout + process.stderr
    assert "Traceback" not in process.stderr and str(tmp_path) in process.stderr


@pytest.mark.parametrize("config", ["https://example.com/config.yaml", "s3://bucket/config.yaml", "/nonexistent.yaml"])
def test_configs_are_local_files(run_script, config):
    process = run_script("merge_files.py", f"--config={config}", check=False, timeout=30)
    assert process.returncode == 2 and "Traceback" not in process.stderr and config in process.stderr


def test_unknown_key_names_file_and_key(run_script, tmp_path):
    (tmp_path / "mine.yaml").write_text("source_dir: a\ntarget_dirr: b\n")
    said = run_script("merge_files.py", f"--config={tmp_path / 'mine.yaml'}", check=False).stderr
    assert "mine.yaml" in said and "target_dirr" in said


def test_class_paths_are_not_taken_from_yaml(run_script, tmp_path):
    marker = tmp_path / "executed"
    (tmp_path / "evil.yaml").write_text(
        f"source_dir:\n  class_path: os.system\n  init_args:\n    command: touch {marker}\ntarget_dir: b\n"
    )
    process = run_script("merge_files.py", f"--config={tmp_path / 'evil.yaml'}", check=False)
    assert process.returncode == 2 and not os.path.exists(marker)
