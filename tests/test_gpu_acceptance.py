"""The acceptance kit for a GPU, in small on a CPU, and without Ray, which the machine with the GPU may not have."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

KIT = ROOT / "benchmarks" / "gpu_acceptance.py"

# A row whose process dies in the middle, and one that does not end.
DYING_ROWS = """
import os, sys, tempfile, threading
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import gpu_acceptance as kit

def dies(job):
    job.report("before", 1)
    os._exit(7)

def hangs(job):
    threading.Event().wait()

kit.ROWS |= {"dies": (dies, 60), "hangs": (hangs, 3)}
kit.sys.argv = ["kit", "--device=cpu", f"--output={sys.argv[2]}", "--rows", "dies", "hangs", "software"]
kit.main()
"""


def run_kit(directory: Path, *flags: str, command: list | None = None, env: dict | None = None):
    """(exit code, the JSON, stdout and stderr)."""
    output = directory / "found.json"
    process = subprocess.run(
        [sys.executable, *(command or [KIT, "--device=cpu", f"--output={output}"]), *flags],
        capture_output=True, text=True, timeout=400, cwd=directory,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
    )  # fmt: skip
    said = process.stdout + process.stderr
    assert output.exists(), said
    return process.returncode, json.loads(output.read_text()), said


@pytest.fixture(scope="module")
def kit():
    sys.path.insert(0, str(KIT.parent))
    spec = importlib.util.spec_from_file_location("gpu_acceptance", KIT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(KIT.parent))
    del sys.modules[spec.name]


@pytest.mark.long
def test_every_row_runs_in_small_and_without_ray(tmp_path, kit):
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    (blocked / "ray.py").write_text("raise ModuleNotFoundError('no Ray on this machine', name='ray')\n")
    code, found, said = run_kit(tmp_path, env={"PYTHONPATH": str(blocked)})
    failed = [check for row in found["rows"] for check in row["checks"] if check["outcome"] == "fail"]
    assert code == 0 and not failed, (failed, said)
    assert [row["row"] for row in found["rows"]] == list(kit.ROWS)
    outcomes = {row["row"]: row["outcome"] for row in found["rows"]}
    assert outcomes.pop("software") == "report" and set(outcomes.values()) == {"pass"}
    checks = {check["check"]: check for row in found["rows"] for check in row["checks"]}
    for name in ("driver", "staging copy in GB/s", "MFU", "selective: MFU of computation alone"):
        assert checks[name]["outcome"] == "needs CUDA" and checks[name]["value"] is None
    for name in (
        "32-true, window of 32: largest difference of the loss in 3 steps",
        "stopped and resumed: weights and optimizer equal",
        "documents and window: largest difference from all scores in float32, 512 tokens",
        "selective: one compiled graph for all blocks",
    ):
        assert checks[name]["outcome"] == "pass"
    assert "| saving | stopped and resumed: weights and optimizer equal | True | - | pass |" in said
    assert found["device"] == "cpu" and found["versions"]["torch"] and " s: passed\n" in said


def test_a_figure_beyond_its_limit_fails_the_kit(tmp_path):
    """bfloat16 is never equal to float32."""
    code, found, said = run_kit(tmp_path, "--rows", "results", "software", "--max_bfloat16_difference=0")
    assert code == 1 and "FAILED: results" in said
    outcomes = {check["check"]: check["outcome"] for check in found["rows"][0]["checks"]}
    assert outcomes["bf16-mixed, plain: largest difference of the loss in 3 steps"] == "fail"
    assert outcomes["32-true, plain: largest difference of the loss in 3 steps"] == "pass"
    assert found["rows"][1]["row"] == "software"  # a failed row does not end the kit


@pytest.mark.slow
def test_a_row_that_dies_or_hangs_keeps_what_it_found_and_fails(tmp_path):
    output = tmp_path / "found.json"
    code, found, said = run_kit(tmp_path, command=["-c", DYING_ROWS, str(KIT.parent), str(output)])
    assert code == 1 and "FAILED: dies, hangs" in said
    dead, hung, software = (row["checks"] for row in found["rows"])
    assert dead == [
        {"check": "before", "outcome": "report", "value": 1},
        {"check": "the row", "outcome": "fail", "value": "its process ended with 7"},
    ]
    assert hung == [{"check": "the row", "outcome": "fail", "value": "no end within 3 s"}]
    assert software


@pytest.mark.slow
def test_rows_run_in_spawned_processes_as_on_a_gpu(tmp_path):
    code, found, said = run_kit(tmp_path, "--rows", "attention", "--start_method=spawn")
    assert code == 0 and found["rows"][0]["outcome"] == "pass", said


def test_the_share_in_which_a_gpu_is_busy(kit):
    kernels = [{"cat": "kernel", "ts": ts, "dur": dur} for ts, dur in ((100, 10), (105, 10), (120, 5), (121, 1))]
    others = [{"cat": "cpu_op", "ts": 0, "dur": 1000}, {"ts": 3, "dur": 2}]
    assert kit.busy_share([*others, *reversed(kernels)]) == pytest.approx(20 / 25)
