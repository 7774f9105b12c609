"""A sweep of learning rates: the runs' settings, and (slow) real runs with their picture."""

from __future__ import annotations

import math

import pytest
import yaml
from conftest import run_a_script, said_by
from tiny_runs import write_config

from pretraining.settings import Settings as Training
from tools.sweep_learning_rate import Settings, config_at, final_loss, main, print_table, smaller
from utils import cli
from utils.errors import UserError


@pytest.fixture
def config(tmp_path):
    return write_config(tmp_path / "tiny.yaml", num_devices=1, parallel={"compare_copies_every": None})


def test_a_run_has_the_settings_of_the_config_but_for_the_rate(config, tmp_path):
    settings = Settings(str(config), str(tmp_path / "data"), str(tmp_path / "sweep"), [3e-2], max_steps=4)
    made = config_at(3e-2, settings, tmp_path / "sweep" / "lr-0.03")
    assert made["optimizer"]["lr"] == 3e-2 and made["train"]["min_lr"] == pytest.approx(1e-3)
    assert made["train"]["max_steps"] == 4 and made["train"]["max_tokens"] is None
    assert made["model_config"] == yaml.safe_load(config.read_text())["model_config"]
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(made))
    assert cli.parse_settings(Training, "", [f"--config={path}"]).optimizer.lr == 3e-2


def test_a_smaller_model_is_of_the_same_family():
    large = Training(model_name="Llama-3-8B")
    made = smaller(large, Settings("-", "-", "-", n_layer=4, n_embd=1024))
    assert made == {"n_layer": 4, "n_embd": 1024, "n_head": 8, "n_query_groups": 2, "head_size": 128,
                    "intermediate_size": 3584}  # fmt: skip
    odd = smaller(large, Settings("-", "-", "-", n_embd=640))
    assert odd["n_head"] == 5 and odd["n_query_groups"] == 1 and odd["n_layer"] == 32
    with pytest.raises(UserError, match=r"--n_embd=1000: give a multiple of 128"):
        smaller(large, Settings("-", "-", "-", n_embd=1000))


def test_a_run_that_failed_has_no_loss_and_an_edge_is_warned_of(capsys):
    falling = [{"step": step, "loss": 5.0 - step} for step in (1, 2)]
    validated = [*falling, {"step": 2, "val_loss": 3.5}]
    assert final_loss(falling, None) == 3.0 and final_loss(validated, None) == 3.5
    assert final_loss(falling, "too many spikes") is None
    assert final_loss([{"step": 1, "loss": math.nan}], None) is None
    print_table([(1e-3, falling, None), (3e-3, validated, None), (1e-2, falling, "not finite")])
    said = capsys.readouterr()
    assert "| 0.001 | 3.0000 (best) | 2 |" in said.out and "| 0.01 | failed: not finite | 2 |" in said.out
    assert "the lowest rate was best: try lower ones" in said.err


def test_wrong_settings_are_all_named(tmp_path):
    settings = Settings(str(tmp_path / "no.yaml"), "data", str(tmp_path / "sweep"), [1e-3, 1e-3, -1], n_layer=0)
    with pytest.raises(UserError) as caught:
        main(settings)
    assert len(caught.value.problems) == 4 and not (tmp_path / "sweep").exists()


@pytest.mark.slow
def test_each_rate_is_a_run_and_a_finished_one_is_not_trained_again(config, dataset, tmp_path, capfd):
    out_dir = tmp_path / "sweep"
    settings = Settings(str(config), str(dataset), str(out_dir), [1e-3, 1e-2], n_layer=1)
    said = said_by(capfd, lambda: main(settings))
    assert said.count("(best)") == 1 and (out_dir / "sweep.png").read_bytes()[:4] == b"\x89PNG"
    again = said_by(capfd, lambda: main(settings))
    assert again.count("nothing to do") == 2 and again.splitlines()[-5:] == said.splitlines()[-5:]
    run_a_script("distributed_pretrain.py", f"--config={out_dir / 'lr-0.01.yaml'}")  # as it says
