"""The configurations of config_hub at their real size and number of GPUs, as one rank of a fake process group."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import yaml
from conftest import ROOT
from litgpt.config import Config

# With 18,000 matrices of experts it takes more than ten minutes, so nothing compares its plan with a peak.
LEFT_OUT = ("demo-cpu", "qwen3-30b-a3b")
ALL = sorted(path.stem for path in (ROOT / "config_hub").glob("*.yaml") if path.stem not in LEFT_OUT)
QUICK = ("llama3.2-1b",)


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in ALL])
def test_a_step_sends_what_it_should_and_fits_the_memory_that_was_planned(name):
    path = ROOT / "config_hub" / f"{name}.yaml"
    process = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "fake_ranks.py"), "--config", str(path)],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=550,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    found = json.loads(process.stdout.splitlines()[-1])
    assert found["planned_bytes"] == pytest.approx(found["peak_bytes"], rel=0.1)

    config = yaml.safe_load(path.read_text())
    parallel, tied = config["parallel"], config["train"].get("tie_embeddings", False)
    blocks, rest = found["block_parameters"], found["parameters"] - found["block_parameters"]
    groups = found["layers"] + (1 if tied else 2)  # the blocks, the output layer unless it is tied, and the rest
    gathers = 2 if parallel["reshard_after_forward"] else 1  # of a block: forward, and again backward
    reductions = found["accumulation"] if parallel.get("reduce_every_micro_batch") else 1
    calls, num_bytes = ({kind.split()[0]: value for kind, value in found[key].items()} for key in ("calls", "bytes"))
    assert calls["all_gather"] == found["accumulation"] * (gathers * found["layers"] + groups - found["layers"])
    assert calls["reduce_scatter"] == reductions * groups
    # Weights are gathered in bfloat16 and gradients reduced in float32; padding to equal shards is all that is beyond.
    assert num_bytes["all_gather"] == pytest.approx(found["accumulation"] * 2 * (gathers * blocks + rest), rel=0.01)
    assert num_bytes["reduce_scatter"] == pytest.approx(reductions * 4 * found["parameters"], rel=0.01)
    # Copies are summed after the last micro-batch only, each process its piece.
    copies = parallel["sharding"] == "hybrid"
    piece = found["parameters"] / (parallel.get("shard_size") or config["num_devices"])
    assert calls.get("all_reduce", 0) == copies * groups
    assert num_bytes.get("all_reduce", 0) == pytest.approx(copies * 4 * piece, rel=0.01)
    # Where sequences are shared: before and after attention; forward, again for recomputation, and backward.
    sharing = parallel.get("context_parallel_size", 1)
    assert calls.get("all_to_all", 0) == (sharing > 1) * found["accumulation"] * found["layers"] * 3 * 2
    if sharing > 1:
        model, train = Config.from_name(config["model_name"]), config["train"]
        heads = 2 * model.n_head + 2 * max(model.n_query_groups, sharing)  # q and the result; k and v
        exchanged = train["micro_batch_size"] * train["max_seq_length"] // sharing * heads * model.head_size * 2
        assert num_bytes["all_to_all"] == found["accumulation"] * found["layers"] * 3 * exchanged
