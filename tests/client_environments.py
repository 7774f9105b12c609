"""Environments for the programs that people load an export into; each test makes what it needs and throws it away."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest


def environment_with(packages: list[str], directory: Path) -> Path:
    """The Python of a new environment; torch, which alone takes gigabytes, comes from the one that runs the tests.

    Args:
        packages: arguments of `pip install`; with --no-deps among them, packages that need torch do not bring it.
    """
    subprocess.run([sys.executable, "-m", "venv", directory], check=True)
    python = directory / "bin" / "python"
    install([python, "-m", "pip", "install", "--quiet", *packages], directory, "package index")
    own = next((directory / "lib").glob("python*/site-packages"))
    # At the end of the path: its own packages are found first.
    (own / "torch_of_the_tests.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return python


def node_project_with(packages: list[str], directory: Path) -> Path:
    """A directory whose node_modules holds packages of npm; their install scripts, which download more, do not run."""
    for program in ("node", "npm"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    (directory / "package.json").write_text(json.dumps({"private": True}))
    install(["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", *packages], directory, "npm registry")
    return directory


def install(command: list[Any], directory: Path, source: str) -> None:
    """Run the command in the directory; the test is skipped where it cannot get what it asks the `source` for."""
    installed = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=600)
    if installed.returncode:
        reason = (installed.stderr.strip().splitlines() or ["no message"])[-1]
        pytest.skip(f"{' '.join(map(str, command))} failed; is there a {source}? {reason}")


def answer_of(command: list[Any], timeout_s: float, question: str = "", **environment: str) -> str:
    """What a client's script, asked on stdin, prints last, once it has left with 0."""
    process = subprocess.run(
        list(map(str, command)), input=question, capture_output=True, text=True, timeout=timeout_s,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    return (process.stdout.strip().splitlines() or [""])[-1]
