"""The whole chain, as pipeline.sh and as the README's single commands run it, from parquet text to a loaded model."""

from __future__ import annotations

import glob
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from utils.manifest import read_manifest

TINY_CONFIG = """
model_config:
  name: tiny-llama
  block_size: 64
  vocab_size: 1024
  padded_vocab_size: 1024
  n_layer: 2
  n_embd: 48
  n_head: 4
  n_query_groups: 2
  intermediate_size: 96
  rotary_percentage: 1.0
  parallel_residual: false
  bias: false
  norm_class_name: RMSNorm
  mlp_class_name: LLaMAMLP
num_devices: 2
accelerator: cpu
train:
  global_batch_size: 8
  micro_batch_size: 4
  max_steps: 12
  save_interval: 5
  lr_warmup_steps: 2
eval:
  interval: 6
  max_iters: 2
optimizer:
  lr: 3.0e-3
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    work = tmp_path_factory.mktemp("work")
    (work / "tiny.yaml").write_text(TINY_CONFIG)
    return work


@pytest.fixture(scope="module")
def settings(work, parquet_dir, tokenizer_dir, ray_address) -> dict:
    return {
        "PARQUET": parquet_dir,
        "TOKENIZER": tokenizer_dir,
        "WORK": work,
        "CONFIG": work / "tiny.yaml",
        "OPTIMIZE_FLAGS": "--val_fraction=0.1 --unit_bytes=100000",
        "RAY_ADDRESS": ray_address,
    }


@pytest.fixture(scope="module", autouse=True)
def made(work, settings) -> None:
    """What pipeline.sh makes."""
    run_pipeline(work, **settings)


def run_pipeline(cwd: Path, code: int = 0, **settings) -> subprocess.CompletedProcess:
    """pipeline.sh with these settings in its environment, on single-threaded processes."""
    settings |= {
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    process = subprocess.run(
        ["bash", ROOT / "pipeline.sh"],
        capture_output=True,
        text=True,
        timeout=500,
        cwd=cwd,
        env={**os.environ, **{name: str(value) for name, value in settings.items()}},
    )
    assert process.returncode == code, process.stdout + process.stderr
    return process


def logits_of_both(export: Path):
    """Logits of litgpt and of transformers for the same tokens, each of shape (1, 40, vocabulary)."""
    import torch
    from litgpt import GPT, Config
    from transformers import AutoModelForCausalLM

    tokens = torch.randint(0, 1024, (1, 40), generator=torch.Generator().manual_seed(0))
    model = GPT(Config.from_file(export / "model_config.yaml"))
    model.load_state_dict(torch.load(export / "lit_model.pth", weights_only=True))
    with torch.no_grad():
        return model.eval()(tokens), AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32)(tokens).logits


def test_the_model_loads_in_litgpt_and_transformers_alike_and_has_learnt(work, tokenizer_dir, documents):
    import torch
    from transformers import AutoTokenizer

    ours, theirs = logits_of_both(work / "export")
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    tokenizer = AutoTokenizer.from_pretrained(work / "export")
    assert tokenizer.decode(tokenizer(documents[0]).input_ids, skip_special_tokens=True) == documents[0]
    records = [json.loads(line) for line in (work / "run" / "metrics.jsonl").read_text().splitlines()]
    validation = [record["val_loss"] for record in records if record.get("val_loss") is not None]
    assert validation[-1] < validation[0] - 0.2


def test_the_export_leads_back_to_the_parquet_files(work, parquet_dir):
    def parquet_paths(node) -> set[str]:
        if isinstance(node, dict):
            found = {node["path"]} if str(node.get("path")).endswith(".parquet") else set()
            return found.union(*(parquet_paths(value) for value in node.values()))
        return set().union(*map(parquet_paths, node)) if isinstance(node, list) else set()

    expected = {str(path.relative_to(parquet_dir)) for path in parquet_dir.rglob("*.parquet")}
    assert parquet_paths(read_manifest(work / "export", "export")) == expected


def test_tokens_are_counted_alike_by_every_step(work):
    tokens = read_manifest(work / "tokens")["content"]["train"]["tokens"]
    assert read_manifest(work / "tokens" / "train")["content"]["tokens"] == tokens
    assert read_manifest(work / "dataset" / "train")["content"]["tokens"] == tokens


def test_the_docs_show_how_to_read_one_document(work, tokenizer_dir, documents):
    from tokenizers import Tokenizer

    page = (ROOT / "docs" / "optimize_dataset.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
    code = code.replace('"OUT/train/0"', repr(str(work / "dataset" / "train")))
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    count, _, ids = said.partition(" ")
    assert int(count) > 1
    tokenizer = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    assert tokenizer.decode(json.loads(ids)) in documents


def test_again_has_nothing_to_do(work, settings):
    before = {path: path.stat().st_mtime_ns for path in work.rglob("*") if path.is_file()}
    said = run_pipeline(work, **settings).stdout
    assert said.count("nothing to do") == 5
    assert {path: path.stat().st_mtime_ns for path in work.rglob("*") if path.is_file()} == before


def test_flags_for_the_merge_reach_both_splits(work, settings, tmp_path):
    shutil.copytree(work / "tokens", tmp_path / "tokens")
    settings = settings | {"WORK": tmp_path, "MERGE_FLAGS": "--pack_tokens=33", "CONFIG": tmp_path / "missing.yaml"}
    assert "missing.yaml" in run_pipeline(tmp_path, code=2, **settings).stderr
    for split in ("train", "val"):
        assert read_manifest(tmp_path / "dataset" / split)["pack_tokens"] == 33


@pytest.mark.skipif(bool(glob.glob("/dev/nvidia[0-9]*")), reason="a config for GPUs is suggested there")
def test_the_merge_suggests_a_training_that_fits_the_tokenizer(work, tokenizer_dir, tmp_path, run_script):
    target = work / "dataset" / "val"
    said = run_script("merge_files.py", f"--source_dir={work / 'tokens' / 'val'}", f"--target_dir={target}").stdout
    script, *flags = shlex.split(next(line for line in said.splitlines() if "distributed_pretrain.py" in line))[1:]
    # 1,024 tokens: the config's own 2,048 embeddings would do, but with a warning
    assert "--model_config.padded_vocab_size=1024" in flags
    places = {"CKPT": tokenizer_dir, "OUT_DIR": tmp_path / "run"}
    filled = [
        f"{name}{equals}{places.get(value, value)}" for name, equals, value in (flag.partition("=") for flag in flags)
    ]
    planned = run_script(script, *filled, "--dry_run")
    assert "embeddings" not in planned.stderr and not (tmp_path / "run").exists()


def test_consolidation_with_its_renames_then_conversion_gives_the_same_model(work, tmp_path, run_script):
    """Steps 4 and 5 as they stand in the README."""
    final = tmp_path / "final"
    shutil.copytree(work / "run" / "final", final)
    subprocess.run(
        [sys.executable, "-m", "lightning.pytorch.utilities.consolidate_checkpoint", f"{final}/lit_model.pth/"],
        check=True,
        timeout=120,
    )
    (final / "lit_model.pth").rename(final / "lit_model.pth.sharded")
    (final / "lit_model.pth.consolidated").rename(final / "lit_model.pth")
    run_script("convert_pretrained_checkpoint.py", final, tmp_path / "export")
    for name in ("model.safetensors", "config.json", "generation_config.json", "tokenizer.json"):
        assert (tmp_path / "export" / name).read_bytes() == (work / "export" / name).read_bytes(), name


@pytest.mark.parametrize(
    "script", ["optimize_dataset", "merge_files", "distributed_pretrain", "convert_pretrained_checkpoint"]
)
def test_help_is_quick_and_has_the_command_lines(script, run_script):
    import time

    start = time.monotonic()
    said = run_script(f"{script}.py", "--help").stdout
    assert time.monotonic() - start < 2
    assert f"python {script}.py" in said and "--config" in said


def test_nothing_of_ours_is_left_on_the_cluster(ray_address):
    import ray

    ray.init(address=ray_address, logging_level="ERROR")
    try:
        assert ray.available_resources()["CPU"] == ray.cluster_resources()["CPU"]
        # Ray Train leaves a coordinator of its own on the cluster, which holds no resources.
        named = {actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)}
        assert named <= {"AutoscalingCoordinator"}
    finally:
        ray.shutdown()
