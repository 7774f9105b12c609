"""The benchmarks run and say what they promise; on so little text that their figures mean nothing."""

from __future__ import annotations

import ast
import re

import pytest
from conftest import ROOT

BENCHMARKS = sorted((ROOT / "benchmarks").glob("*.py"))


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda path: path.name)
def test_a_benchmark_runs_where_the_tests_are_not(path):
    """As in the image that examples/Dockerfile makes."""
    tree = ast.parse(path.read_text())
    imported = {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    of_tests = {test.stem for test in (ROOT / "tests").rglob("*.py")}
    assert not of_tests & {part for module in imported for part in module.split(".")}


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
        "gigatoken",  # 256 documents at a time
        "gigatoken",
        "optimize_dataset.py",
    ]
    for name in sides:
        assert all(re.fullmatch(r"\d+\.\d\d M|\d+\.\d x", cell.strip()) for cell in rows[name][2:6]), rows[name]
    assert re.search(r"On the baseline's files alone \([\d,]+ tokens\), both measured: [\d.]+ s against [\d.]+ s", text)
    assert re.search(r"Largest worker: [\d.]+ MB; on 4MB of random words [\d.]+ MB\.", text)
    shares = re.findall(r"Of .* by processor time the step reaches, .*: (\d+)%\. .* would reach (\d+)%\.", text)
    assert len(shares) == 2 and all(0 < int(reached) < int(at_most) < 100 for reached, at_most in shares)
    again_s, first_s = map(float, re.search(r"Start-up.*: ([\d.]+) s \(.*; ([\d.]+) s in the first run", text).groups())
    assert 0 < again_s < first_s


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_short_night_of_faults_ends_like_a_quiet_one(run_script):
    kinds = ["SIGKILL of a process", "SIGSTOP of a process", "byte flipped in the newest checkpoint"]
    said = run_script("benchmarks/soak.py", f"--num_faults={len(kinds)}", "--kinds", *kinds, timeout=1100).stdout
    assert said.rstrip().endswith("equal to the quiet run's, bit for bit.")
    rows = {row.split("|")[1].strip(): row for row in said.splitlines() if row.startswith("|")}
    assert "| 1 | restart |" in rows[kinds[0]] and "| 1 | hang, restart |" in rows[kinds[1]]
    assert "checkpoint refused |" in rows[kinds[2]]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    "command",
    [
        ["input_kinds.py", "--size=1MB", "--vocab_size=1000", "--num_repeats=1"],
        ["data_at_scale.py", "--small_files=20", "--many_files=40", "--chunks=20"],
        ["packing.py", "--tokens=2e6"],
        ["pretrain_speed.py", "--cases", "small", "--steps", "8", "--rounds", "1"],
        ["pretrain_speed.py", "--cases", "watching", "--steps", "8"],
        ["pretrain_checkpoint.py"],
        ["pretrain_data.py", "--contexts", "1024"],
        ["attention_and_loss.py", "--parts", "attention", "--rounds", "1"],
        ["export_streaming.py", "--compare=100M", "--sizes=[100M]", "--num_repeats=1"],
    ],
    ids=lambda command: command[0],
)
def test_every_benchmark_runs(command, tmp_path, run_script):
    if command[0] == "export_streaming.py":
        command = [*command, f"--work_dir={tmp_path}"]
    report = run_script(f"benchmarks/{command[0]}", *command[1:], timeout=1100).stdout
    assert re.search(r"\d", report) and ("|---" in report or report.lstrip().startswith(("{", "| ")))
