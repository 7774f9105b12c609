"""Curves from real metrics.jsonl files, as runs, crashes and restarts leave them."""

from __future__ import annotations

import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from conftest import ROOT

from export.curves import series, smoothed
from export.run_metrics import read_steps
from tools.plot_curves import read_run
from utils.errors import UserError


def write_run(directory: Path, num_steps: int = 200, **constant) -> Path:
    directory.mkdir(parents=True)
    with open(directory / "metrics.jsonl", "w") as file:
        for step in range(1, num_steps + 1):
            record = {
                "step": step,
                "tokens": step * 4096,
                "loss": 2 + 6 / step,
                "lr": 1e-3 * min(step / 20, 1),
                "grad_norm": 1 + 1 / step,
                "tokens_per_s": 50_000,
                **constant,
            }
            if step % 50 == 0:
                record["val_loss"] = 2.1 + 6 / step
            file.write(json.dumps(record) + "\n")
    return directory


def plot(*arguments, check: bool = True) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "tools.plot_curves", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=check)


def size_of_png(path: Path) -> tuple[int, int]:
    header = path.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(header[16:20], "big"), int.from_bytes(header[20:24], "big")


def texts_of_svg(path: Path) -> set[str]:
    """What the picture says; matplotlib puts each piece of text into a comment beside its outlines."""
    parser = ElementTree.XMLParser(target=ElementTree.TreeBuilder(insert_comments=True))
    root = ElementTree.parse(path, parser).getroot()
    return {element.text.strip() for element in root.iter() if element.tag is ElementTree.Comment}


def test_events_are_marked_and_counted(tmp_path):
    run, quiet = write_run(tmp_path / "run", 100), write_run(tmp_path / "quiet", 100)
    events = [("restart", 20), ("restart", 60), ("hang", 60), ("checkpoint refused", None)]
    lines = [json.dumps({"event": event, "step": step, "message": "so it was"}) + "\n" for event, step in events]
    (run / "events.jsonl").write_text("".join(lines))
    plot(run, f"--output={tmp_path / 'one.svg'}")
    assert "restart (2), hang" in texts_of_svg(tmp_path / "one.svg")
    plot(run, quiet, f"--output={tmp_path / 'two.svg'}", "--x=step")
    assert "run: restart (2), hang" in texts_of_svg(tmp_path / "two.svg")
    plot(quiet, f"--output={tmp_path / 'none.svg'}")
    marks = [(tmp_path / name).read_text().count("stroke-dasharray: 1,1.65") for name in ("one.svg", "none.svg")]
    assert marks == [2 * 4 + 1, 0]  # two steps in four panels, and the legend


def test_last_of_repeated_steps_wins_and_a_cut_line_is_skipped(tmp_path):
    run = write_run(tmp_path / "run", 100)
    with open(run / "metrics.jsonl", "a") as file:
        for step in range(91, 96):  # restarted from step 90
            file.write(json.dumps({"step": step, "tokens": step * 4096, "loss": -1.0}) + "\n")
        file.write(json.dumps({"step": 95, "val_loss": 7.0}) + "\n")  # a validation, logged by itself
        file.write('{"step": 96, "loss": 3.')
    records = read_steps(run)
    assert [record["step"] for record in records] == list(range(1, 101))
    assert [record["step"] for record in records if record["loss"] == -1.0] == [91, 92, 93, 94, 95]
    assert (records[94]["val_loss"], records[94]["loss"]) == (7.0, -1.0)
    assert records[95]["loss"] == 2 + 6 / 96


def test_series_leaves_out_what_is_missing_or_not_finite():
    records = [
        {"step": 1, "loss": 5.0},
        {"step": 2},
        {"step": 3, "loss": float("nan")},
        {"step": 4, "loss": None},
        {"step": 5, "loss": float("inf")},
        {"step": 6, "loss": 4},
    ]
    assert series(records, "step", "loss") == ([1, 6], [5.0, 4])


def test_smoothed_curve_has_no_lag_and_no_spike():
    values = [1000.0 - i for i in range(1000)]
    values[500] = 1e6
    at, middle = smoothed(range(1000), values)
    assert middle[0] == 1000 and middle[-1] == 1
    assert max(abs(value - (1000 - i)) for i, value in zip(at, middle)) <= 1
    assert len(smoothed(range(10**5), [1.0] * 10**5)[0]) <= 2001
    assert smoothed([1], [3.0]) == ([1, 1], [3.0, 3.0])


def test_one_picture_of_one_and_of_several_runs(tmp_path):
    one, two = write_run(tmp_path / "a" / "run"), write_run(tmp_path / "b" / "run", 150, tokens_per_s=40_000)
    plot(one, f"--output={tmp_path / 'one.png'}")
    width, height = size_of_png(tmp_path / "one.png")
    assert width > 1200 and height > 600
    plot(one, two / "metrics.jsonl", f"--output={tmp_path / 'two.svg'}", "--title=Two runs")
    shown = texts_of_svg(tmp_path / "two.svg")
    assert {"Two runs", "learning rate", "gradient norm", "tokens/s", "tokens"} <= shown
    # named apart by as much of their paths as it takes
    assert {"a/run: training, 8.000 to 2.030 (last steps)", "b/run: validation, 2.220 to 2.140"} <= shown


def test_equal_runs_give_equal_files(tmp_path):
    run = write_run(tmp_path / "run")
    for name in ("one.svg", "two.svg"):
        plot(run, f"--output={tmp_path / name}")
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()


def test_runs_with_little_in_them_are_drawn(tmp_path):
    first = write_run(tmp_path / "one-step", 1)
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "metrics.jsonl").write_text('{"step": 3}\nnot json\n[1, 2]\n{"step": "four"}\n')
    plot(first, bare, f"--output={tmp_path / 'x.svg'}")
    assert "step" in texts_of_svg(tmp_path / "x.svg")  # the axis: not every run knows its tokens
    plot(bare, f"--output={tmp_path / 'y.svg'}")
    assert {"no loss was logged", "not logged"} <= texts_of_svg(tmp_path / "y.svg")


def test_everything_wrong_is_named_at_once(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "young").mkdir()
    (tmp_path / "young" / "metrics.jsonl").write_text("")
    process = plot(tmp_path / "empty", tmp_path / "young", "--output=curves.gif", "--x=time", check=False)
    assert process.returncode == 2
    for message in ("empty: no metrics.jsonl", "no step was logged yet", "--output=curves.gif", "--x=time"):
        assert message in process.stderr
    assert "Traceback" not in process.stderr


def test_log_of_nan_and_infinity_is_drawn(tmp_path):
    run = write_run(tmp_path / "run", 30)
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 31, "tokens": 1, "loss": NaN, "grad_norm": Infinity}\n')
    plot(run, f"--output={tmp_path / 'x.png'}")
    assert size_of_png(tmp_path / "x.png")[0] > 1200


def test_directory_without_metrics_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match=r"no metrics\.jsonl"):
        read_run(tmp_path / "nothing")
