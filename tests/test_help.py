"""`--help` of every script and tool is quick: nothing heavy is loaded for it."""

from __future__ import annotations

import subprocess
import sys

import pytest
from conftest import ROOT

SCRIPTS = sorted(path.name for path in ROOT.glob("*.py"))
TOOLS = sorted(f"tools.{path.stem}" for path in (ROOT / "tools").glob("*.py") if "cli.run(" in path.read_text())


@pytest.mark.parametrize("command", [*SCRIPTS, *TOOLS])
def test_help_loads_neither_torch_nor_ray(command):
    """Under TYPE_CHECKING, too, an import would be made: the parser carries it out to resolve the settings' types."""
    program = [command] if command.endswith(".py") else ["-m", command]
    process = subprocess.run(
        [sys.executable, "-X", "importtime", *program, "--help"], capture_output=True, text=True, cwd=ROOT, timeout=60
    )
    loaded = {line.rpartition("|")[2].strip() for line in process.stderr.splitlines()}
    # Step 1 starts a process of its own before it imports what is large.
    heavy = {"torch", "ray"} | ({"numpy", "pyarrow"} if command == "optimize_dataset.py" else set())
    assert process.returncode == 0 and "utils.cli" in loaded and not loaded & heavy
