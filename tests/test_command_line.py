"""What every script does with its command line, its terminal and its exit code."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
import termios

import pytest
import yaml
from conftest import ROOT

SCRIPTS = {
    "optimize_dataset.py": ["--input_dir={}", "--tokenizer_dir={}", "--output_dir={}/out"],
    "merge_files.py": ["--source_dir={}", "--target_dir={}/out"],
    "distributed_pretrain.py": ["--dataset_path={}", "--out_dir={}/out", "--model_name=pythia-14m"],
    "convert_pretrained_checkpoint.py": ["{}", "{}/out"],
}
ESCAPE = "\x1b["


def on_a_terminal(command: list, **variables: str) -> tuple[int, str]:
    """(exit code, all that appears) of a command whose output is a terminal."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (40, 200))
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "200", **variables}
    environment.pop("NO_COLOR", None) if "NO_COLOR" not in variables else None
    process = subprocess.Popen(list(map(str, command)), stdout=theirs, stderr=theirs, cwd=ROOT, env=environment)
    os.close(theirs)
    shown = b""
    while True:
        try:
            data = os.read(ours, 65536)
        except OSError:  # Linux's way to say that the other end is closed
            data = b""
        if not data:
            break
        shown += data
    os.close(ours)
    return process.wait(timeout=60), shown.decode(errors="replace")


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_empty_directory_is_the_users_error_coloured_on_a_terminal_only(script, tmp_path, run_script):
    arguments = [argument.format(tmp_path) for argument in SCRIPTS[script]]
    piped = run_script(script, *arguments, check=False)
    assert piped.returncode == 2
    assert "\nerror: " in f"\n{piped.stderr}" and "Traceback" not in piped.stderr
    assert ESCAPE not in piped.stdout + piped.stderr and "\r" not in piped.stdout + piped.stderr
    code, shown = on_a_terminal([sys.executable, script, *arguments])
    assert code == 2 and f"{ESCAPE}31;1merror: {ESCAPE}0m" in shown
    code, shown = on_a_terminal([sys.executable, script, *arguments], NO_COLOR="1")
    assert code == 2 and "error: " in shown and ESCAPE not in shown
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_unknown_flag_is_the_users_error(script, run_script):
    process = run_script(script, "--no_such_flag=1", check=False)
    assert process.returncode == 2 and "no_such_flag" in process.stderr and "Traceback" not in process.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_printed_settings_are_a_config_that_gives_the_same_settings(script, tmp_path, run_script):
    arguments = [argument.format(tmp_path) for argument in SCRIPTS[script]]
    printed = run_script(script, *arguments, "--print_config").stdout
    assert isinstance(yaml.safe_load(printed), dict)
    (tmp_path / "c.yaml").write_text(printed)
    assert run_script(script, f"--config={tmp_path / 'c.yaml'}", "--print_config").stdout == printed


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_names_defaults_and_every_script_that_works_long_has_a_dry_run(script, run_script):
    shown = run_script(script, "--help").stdout
    assert "--dry_run" in shown and "default: " in shown and "-q, --quiet" in shown


def test_bars_and_quiet(tmp_path, parquet_dir, tokenizer_dir):
    def command(name: str, *more: str) -> list:
        directories = [
            f"--input_dir={parquet_dir}",
            f"--tokenizer_dir={tokenizer_dir}",
            f"--output_dir={tmp_path / name}",
        ]
        return [sys.executable, "optimize_dataset.py", *directories, "--address=local", *more]

    code, shown = on_a_terminal(command("a"))
    assert code == 0 and re.search(r"\rtokenize: +\d+%\|.*tokens/s per core", shown), shown
    code, shown = on_a_terminal(command("b", "-q"))
    assert code == 0 and "\rtokenize" not in shown
    assert [line.partition(":")[0] for line in shown.splitlines()] == ["train", "val"]


def test_our_own_error_leaves_with_1_a_traceback_and_the_command_that_goes_on(tmp_path):
    (tmp_path / "broken.py").write_text(
        "import dataclasses\nfrom utils import cli\n"
        "@dataclasses.dataclass\nclass Settings:\n    'Settings.'\n    size: int = 1\n    'A size.'\n"
        "def main(settings):\n    raise ZeroDivisionError('by mistake')\n"
        "cli.run(main, Settings, 'Broken.')\n"
    )
    process = subprocess.run(
        [sys.executable, tmp_path / "broken.py", "--size=3"],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=60,
    )  # fmt: skip
    assert process.returncode == 1
    assert "Traceback" in process.stderr and "ZeroDivisionError: by mistake" in process.stderr
    assert "The same command goes on" in process.stderr and "broken.py --size=3" in process.stderr
