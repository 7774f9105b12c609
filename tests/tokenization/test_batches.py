"""The batches that a worker takes its text in, and what it does without."""

from __future__ import annotations

import os
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT

from tokenization.parquet import stream_texts
from tokenization.text_arrays import BATCH_BYTES, gathered


@pytest.mark.parametrize("type_", [pa.string(), pa.large_string()])
def test_small_arrays_are_joined_as_far_as_a_batch(type_):
    small = pa.array(["a", None, "é" * 1000, ""] * 100, type_)
    large = pa.array(["x" * (BATCH_BYTES + 1), "y"], type_)
    arrays = [small, large, small, *[small.slice(i, 7) for i in range(0, 400, 7)]]
    found = list(gathered(iter(arrays)))
    assert pa.chunked_array(found).to_pylist() == pa.chunked_array(arrays).to_pylist()
    assert [len(array) for array in found] == [400, 2, 800]
    assert list(gathered(iter([]))) == []
    many = list(gathered(small for _ in range(100)))
    assert all(BATCH_BYTES / 2 < array.nbytes <= BATCH_BYTES for array in many[:-1]) and len(many) > 2


@pytest.mark.parametrize("rows", [1, 40])
def test_small_row_groups_make_few_batches(tmp_path, rows):
    texts = [f"{i} é" * 1000 for i in range(400)]
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet", row_group_size=rows)
    found = list(stream_texts(str(tmp_path), "a.parquet", 0, range(400 // rows), "text"))
    assert pa.chunked_array(found).to_pylist() == texts
    assert len(found) == 1


def test_a_worker_has_no_threads_for_products_of_matrices():
    code = "import os, tokenization, numpy; print(len(os.listdir('/proc/self/task')))"
    command = [sys.executable, "-c", code]
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    found = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, timeout=60, env=environment)
    assert int(found.stdout) == 1
