"""The benchmarks run and say what they promise; on so little text that their figures mean nothing."""

from __future__ import annotations

import re

import pytest


@pytest.mark.slow
def test_tokenization_is_measured_beside_what_people_use_now(tmp_path, run_script):
    report = tmp_path / "table.md"
    run_script(
        "benchmarks/tokenize_throughput.py",
        *("--size=1MB", "--vocab_size=1000", "--num_repeats=1", "--num_workers=1", "--baseline_share=0.5"),
        *("--random_words_size=4MB", f"--work_dir={tmp_path / 'work'}", f"--output={report}"),
        timeout=550,
    )
    text = report.read_text()
    rows = {row.split("|")[1].strip(" *"): row.split("|") for row in text.splitlines() if row.startswith("|")}
    sides = [name for name in rows if not set(name) <= {"-", " "}]
    assert [name.split(",")[0].split(" ")[0] for name in sides] == [
        "litdata.optimize",
        "tokenizers.encode_batch_fast",
        "gigatoken",
        "optimize_dataset.py",
    ]
    for name in sides:
        assert all(re.fullmatch(r"\d+\.\d\d M|\d+\.\d x", cell.strip()) for cell in rows[name][2:6]), rows[name]
    assert re.search(r"On the baseline's files alone \([\d,]+ tokens\), both measured: [\d.]+ s against [\d.]+ s", text)
    assert re.search(r"Largest worker: [\d.]+ MB; on 4MB of random words [\d.]+ MB\.", text)
