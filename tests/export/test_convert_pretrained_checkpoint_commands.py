"""The very commands that people run on an export, as subprocesses without network."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from export_checkpoints import TINY, write_checkpoint_manifest, write_sharded_checkpoint

BIN = Path(sys.executable).parent
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "CUDA_VISIBLE_DEVICES": "",
}


def run(*command, cwd: Path, input: str | None = None) -> subprocess.CompletedProcess:
    # datasets caches what it reads under HF_HOME, by the relative name: a test must not find another's.
    env = {**os.environ, **OFFLINE, "HF_HOME": str(cwd / "huggingface")}
    process = subprocess.run(
        list(map(str, command)), cwd=cwd, input=input, capture_output=True, text=True, timeout=500, env=env
    )
    return process


def succeeded(process: subprocess.CompletedProcess) -> subprocess.CompletedProcess:
    assert process.returncode == 0, f"{process.stdout}\n{process.stderr}"
    return process


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory, tokenizer_dir) -> Path:
    """RUN/final, sharded; EXPORT made from it."""
    directory = tmp_path_factory.mktemp("commands")
    write_sharded_checkpoint(
        directory / "RUN" / "final", "Llama-3.2-1B", {**TINY, "n_query_groups": 2, "block_size": 512}
    )
    for path in tokenizer_dir.iterdir():
        shutil.copy(path, directory / "RUN" / "final")
    write_checkpoint_manifest(directory / "RUN" / "final")
    script = ROOT / "convert_pretrained_checkpoint.py"
    printed = succeeded(run(sys.executable, script, "RUN/final", "EXPORT", cwd=directory)).stdout
    (directory / "printed.txt").write_text(printed)
    return directory


def write_hellaswag(directory: Path) -> None:
    """A few questions of its shape, where load_dataset("Rowan/hellaswag") looks before it asks the network."""
    target = directory / "Rowan" / "hellaswag"
    target.mkdir(parents=True, exist_ok=True)
    for split in ("train", "validation", "test"):
        with open(target / f"{split}.jsonl", "w") as file:
            for i in range(8):
                question = {
                    "ind": i,
                    "activity_label": "Cooking",
                    "ctx_a": f"A cook takes {i} eggs out of a box.",
                    "ctx_b": "then he",
                    "ctx": f"A cook takes {i} eggs out of a box. then he",
                    "endings": ["breaks them.", "sings to the moon.", "paints a wall.", "sleeps for a year."],
                    "source_id": f"cook~{i}",
                    "split": split,
                    "split_type": "indomain",
                    "label": "0",
                }
                file.write(json.dumps(question) + "\n")


def test_litgpt_chat(run_dir):
    """As the export says, which on a machine without accelerator asks for float32."""
    command = next(line.split() for line in (run_dir / "printed.txt").read_text().splitlines() if "litgpt chat" in line)
    process = run(
        BIN / command[0], *command[1:], "--max_new_tokens", "8", cwd=run_dir, input="What are generators?\n!quit\n"
    )
    assert ">> Reply:" in succeeded(process).stdout
    assert "'precision': '32-true'" in process.stdout
    assert "Time for inference" in process.stderr


def test_transformers_snippet(run_dir):
    code = """
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained("EXPORT")
model = AutoModelForCausalLM.from_pretrained("EXPORT")
inputs = tokenizer("What are generators?", return_tensors="pt")
assert inputs["input_ids"][0, 0] == tokenizer.bos_token_id == 0 and tokenizer.eos_token_id == 1
print("GENERATED", tokenizer.decode(model.generate(**inputs, max_new_tokens=8)[0]))
"""
    assert "GENERATED" in succeeded(run(sys.executable, "-c", code, cwd=run_dir)).stdout


def test_litgpt_finetune_accepts_the_directory(run_dir):
    from litgpt.utils import check_valid_checkpoint_dir

    check_valid_checkpoint_dir(run_dir / "EXPORT")  # what every `litgpt finetune` begins with; exits otherwise


@pytest.mark.slow  # test_pipeline.py has the trainer's own checkpoint
def test_consolidation_and_renames_give_the_same_files(run_dir):
    """Step 4 and 5 as they are written down."""
    shutil.copytree(run_dir / "RUN", run_dir / "RUN4")
    final = run_dir / "RUN4" / "final"
    module = "lightning.pytorch.utilities.consolidate_checkpoint"
    succeeded(run(sys.executable, "-m", module, "RUN4/final/lit_model.pth/", cwd=run_dir))
    script = ROOT / "convert_pretrained_checkpoint.py"

    # Between the two renames the script says what is missing.
    os.rename(final / "lit_model.pth", final / "lit_model.pth.sharded")
    process = run(sys.executable, script, "RUN4/final", "EXPORT4", cwd=run_dir)
    assert process.returncode == 2 and "mv RUN4/final/lit_model.pth.consolidated" in process.stderr
    os.rename(final / "lit_model.pth.consolidated", final / "lit_model.pth")
    succeeded(run(sys.executable, script, "RUN4/final", "EXPORT4", cwd=run_dir))
    direct, consolidated = (
        {path.name: path.read_bytes() for path in (run_dir / name).iterdir() if path.name != "manifest.json"}
        for name in ("EXPORT", "EXPORT4")
    )
    card = "README.md"  # names the directory
    assert direct.pop(card).replace(b"EXPORT", b"EXPORT4") == consolidated.pop(card)
    assert direct == consolidated


@pytest.mark.slow
def test_litgpt_evaluate_and_lm_eval(run_dir):
    write_hellaswag(run_dir)
    succeeded(
        run(
            BIN / "litgpt", "evaluate", "EXPORT", "--batch_size", "4", "--tasks", "hellaswag", "--out_dir", "HF",
            cwd=run_dir,
        )
    )  # fmt: skip
    results = [json.loads((run_dir / "HF" / "results.json").read_text())["results"]["hellaswag"]]
    for number, directory in enumerate(("HF/", "EXPORT")):
        succeeded(
            run(
                BIN / "lm_eval", "--model", "hf", "--model_args", f"pretrained={directory}", "--tasks", "hellaswag",
                "--batch_size", "4", "--output_path", f"results-{number}", cwd=run_dir,
            )
        )  # fmt: skip
        path = next((run_dir / f"results-{number}").rglob("results*.json"))
        results.append(json.loads(path.read_text())["results"]["hellaswag"])
    assert 0 <= results[0]["acc,none"] <= 1
    assert results[0]["acc,none"] == results[1]["acc,none"] == results[2]["acc,none"]
    assert results[0]["acc_norm,none"] == results[1]["acc_norm,none"] == results[2]["acc_norm,none"]
