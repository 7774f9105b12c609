"""`--help` of every tool is quick: nothing heavy is loaded for it."""

from __future__ import annotations

import subprocess
import sys

import pytest
from conftest import ROOT

TOOLS = sorted(path.stem for path in (ROOT / "tools").glob("*.py") if "cli.run(" in path.read_text())


@pytest.mark.parametrize("tool", TOOLS)
def test_help_loads_neither_torch_nor_ray(tool):
    """Under TYPE_CHECKING, too, an import would be made: the parser carries it out to resolve the settings' types."""
    command = [sys.executable, "-X", "importtime", "-m", f"tools.{tool}", "--help"]
    process = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
    loaded = {line.rpartition("|")[2].strip() for line in process.stderr.splitlines()}
    assert process.returncode == 0 and "utils.cli" in loaded and not loaded & {"torch", "ray"}
