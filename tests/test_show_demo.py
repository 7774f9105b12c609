"""What the demo shows at its end: the model's texts of the first and the last validation, side by side."""

from __future__ import annotations

import json
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "examples"))

from show_demo import show_samples


def write_samples(directory, *samples: tuple) -> None:
    keys = ("step", "prompt", "temperature", "text")
    lines = "".join(json.dumps(dict(zip(keys, sample, strict=True))) + "\n" for sample in samples)
    (directory / "samples.jsonl").write_text(lines, encoding="utf-8")


def test_first_and_last_drawn_texts_stand_side_by_side(tmp_path, capsys):
    write_samples(
        tmp_path,
        (0, "The file", 0.0, " the the"), (0, "The file", 0.8, " qu\ufffd\x1b[2Jux" + " ab" * 40),
        (5, "The file", 0.0, " the the"), (5, "The file", 0.8, " is half read"),
        (9, "The file", 0.0, " is"), (9, "The file", 0.8, " is read\nand closed." + " It is." * 20),
    )  # fmt: skip
    show_samples(tmp_path)
    lines = capsys.readouterr().out.splitlines()
    (title,) = [line for line in lines if "step" in line]
    assert "at step 0" in title.split("|")[0] and "at step 9" in title.split("|")[1]
    left, right = zip(*[line.split(" | ") for line in lines if " | " in line][1:], strict=True)
    assert " ".join(" ".join(left).split()) == "The file qu\ufffd?[2Jux" + " ab" * 40
    assert " ".join(" ".join(right).split()) == "The file is read and closed." + " It is." * 20
    assert max(map(len, lines)) <= 100


@pytest.mark.parametrize("text", [None, ""])
def test_without_samples_nothing_is_shown(tmp_path, capsys, text):
    if text is not None:
        (tmp_path / "samples.jsonl").write_text(text)
    show_samples(tmp_path)
    assert capsys.readouterr().out == ""
