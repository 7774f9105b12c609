"""What docs/newcomer.md tells a newcomer to do."""

from __future__ import annotations

from pretrain_ranks import losses_of, metrics_of, run_ranks, settings_of
from tiny_runs import tokenize_dataset, write_config


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
