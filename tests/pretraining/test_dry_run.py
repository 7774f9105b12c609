"""What a dry run says without data, tokenizer or GPU; and what is warned of before a run."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
from conftest import ROOT
from tiny_runs import tokenize_dataset, write_config

SCRIPT = "distributed_pretrain.py"
CONFIG = ROOT / "config_hub" / "llama3.2-1b.yaml"


def test_it_needs_neither_data_nor_a_tokenizer_and_says_how_long_a_run_takes(tmp_path, run_script):
    """10 billion tokens of a model of 1.24 billion parameters at half of an H100's 989 TFLOP/s."""
    from pretraining.plan import make_plan
    from pretraining.settings import Settings
    from utils.cli import parse_settings

    arguments = [f"--config={CONFIG}", "--dry_run", "--tokens=10e9", f"--out_dir={tmp_path}"]
    flops = 10e9 * (6 * 1_235_814_400 + 12 * 16 * 2048 * 4096)
    hours = flops / (8 * 0.5 * 989e12) / 3600
    settings = parse_settings(Settings, "", arguments)
    plan = make_plan(settings)
    settled = dataclasses.replace(settings, precision="bf16-mixed")
    row = {
        "outcome": "ok",
        "tokens_per_s_per_device": 50_000.0,
        "settings": {"model": plan.model_config, "context_tokens": plan.context_tokens,
                     **dataclasses.asdict(settled)},
    }  # fmt: skip
    other = {**row, "tokens_per_s_per_device": 1.0}
    other["settings"] = {**row["settings"], "num_nodes": 2}
    (tmp_path / "find_fastest.jsonl").write_text(f"{json.dumps(row)}\n{json.dumps(other)}\n" + '{"outcome": "o')

    said = run_script(SCRIPT, *arguments, check=False)
    assert "no dataset was read" in said.stdout and "1.00 epochs" in said.stdout
    assert f"H100, 50% MFU      {hours:.1f} h, {8 * hours:.0f} GPU-hours" in said.stdout
    assert f"as measured        {10e9 / (8 * 50_000) / 3600:.1f} h, " in said.stdout
    assert "warning" not in said.stderr


def test_tokens_without_dry_run_is_refused(run_script):
    refused = run_script(SCRIPT, f"--config={CONFIG}", "--tokens=10e9", check=False)
    assert refused.returncode == 2 and "--tokens: " in refused.stderr


@pytest.mark.parametrize(
    "separators, warns", [({"bos_id": 1, "eos_id": None}, True), ({"bos_id": 1, "eos_id": 2}, False)]
)
def test_many_epochs_and_documents_without_an_end_are_warned_of(
    tmp_path, documents, tokenizer_dir, capsys, separators, warns
):
    from pretrain_ranks import settings_of

    from pretraining.plan import make_plan

    dataset = tokenize_dataset(tmp_path / "data", documents[:20], tokenizer_dir)
    path = dataset / "train" / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "settings": separators}))
    config = write_config(tmp_path / "config.yaml")
    plan = make_plan(settings_of(config, dataset, tmp_path / "out", 2))
    said = capsys.readouterr().err
    assert ("--add_eos=true" in said) is warns and "2305.16264" not in said
    make_plan(settings_of(config, dataset, tmp_path / "out", 2, train__max_steps=plan.train_blocks))
    said = capsys.readouterr().err
    assert f"--train.max_steps={plan.train_blocks:,}: that is 8 epochs" in said and "2305.16264" in said


def test_an_export_is_taken_for_the_tokenizer_of_its_training(tmp_path, dataset, tokenizer_dir):
    """Its tokenizer.json may have been rewritten, to put BOS as training did."""
    from pretrain_ranks import settings_of

    from pretraining.plan import make_plan
    from utils.errors import UserError
    from utils.manifest import write_manifest
    from utils.tokenizer import read_tokenizer_info

    export = shutil.copytree(tokenizer_dir, tmp_path / "export")
    content = json.loads((export / "tokenizer.json").read_bytes())
    (export / "tokenizer.json").write_text(json.dumps({**content, "post_processor": None}))
    config = write_config(tmp_path / "config.yaml", tokenizer_dir=str(export))
    settings = settings_of(config, dataset, tmp_path / "out", 1)
    manifest = {"kind": "export", "settings": {}, "content": {}, "files": [], "inputs": []}
    recorded = read_tokenizer_info(tokenizer_dir).record()
    for tokenizer in (None, {**recorded, "sha256": "0" * 64}):
        write_manifest(export, {**manifest, "tokenizer": tokenizer})
        with pytest.raises(UserError, match="not the tokenizer that made the dataset"):
            make_plan(settings)
    write_manifest(export, {**manifest, "tokenizer": recorded})
    make_plan(settings)
