"""What docs/newcomer.md tells a newcomer to do."""

from __future__ import annotations

import json
import re
import subprocess
import sys

from conftest import ROOT
from pretrain_ranks import losses_of, metrics_of, run_ranks, settings_of
from tiny_runs import tokenize_dataset, write_config


def test_json_lines_become_parquet_by_the_lines_of_the_page(tmp_path):
    import pyarrow.parquet

    page = (ROOT / "docs" / "newcomer.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.S)
    texts = ["first", "zweiter, größer", "x" * 3_000_000]
    lines = [json.dumps({"id": number, "text": text}) for number, text in enumerate(texts)]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "texts").mkdir()
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    assert pyarrow.parquet.read_table(tmp_path / "texts" / "texts.parquet").to_pydict() == {"text": texts}


def test_a_run_goes_on_after_it_and_its_data_have_moved_without_metrics_and_an_old_checkpoint(
    tmp_path, documents, tokenizer_dir
):
    dataset = tokenize_dataset(tmp_path / "data", documents[:40], tokenizer_dir)
    config = write_config(tmp_path / "config.yaml", train={"save_interval": 2})
    whole = settings_of(config, dataset, tmp_path / "whole", 1)
    first = settings_of(config, dataset, tmp_path / "run", 1, train__max_steps=6, train__save_interval=2)
    run_ranks([whole, first], 1, tmp_path / "job-1")
    run, moved = (tmp_path / "run").rename(tmp_path / "renamed"), dataset.rename(tmp_path / "elsewhere")
    (run / "final").rename(tmp_path / "kept-final")
    (run / "metrics.jsonl").unlink()
    for file in sorted((run / "step-00000002").rglob("*"), reverse=True):
        file.rmdir() if file.is_dir() else file.unlink()
    (run / "step-00000002").rmdir()
    run_ranks([settings_of(config, moved, run, 1)], 1, tmp_path / "job-2")
    assert [record["step"] for record in metrics_of(run) if "loss" in record] == [5, 6]
    assert losses_of(run) == losses_of(tmp_path / "whole")[4:]
