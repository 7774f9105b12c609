"""The layout that docs/design.md promises: imports go one way, and no file grows out of hand."""

from __future__ import annotations

import ast
import subprocess
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from conftest import ROOT

STEP_FOLDERS = ("tokenization", "pretraining", "export")
FOLDERS = ("utils", *STEP_FOLDERS, "tools")
SCRIPTS = sorted(ROOT.glob("*.py"))
MODULES = sorted(path for folder in FOLDERS for path in (ROOT / folder).glob("*.py"))

MAX_SCRIPT_LINES = 450
MAX_MODULE_LINES = 300
MAX_UTILS_MODULES = 12
MAX_UTILS_LINES = 1400


def num_lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def imports_of(path: Path) -> set[str]:
    """The project's modules that a file imports, wherever in it; for type hints too."""
    known = {name_of(module) for module in MODULES}
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & known


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_arrows_go_one_way(path):
    """Tools may use the steps' folders, these use utils, and no step's folder uses another."""
    folder = path.parent.name
    allowed = {"utils": {"utils"}, "tools": set(FOLDERS)}.get(folder, {folder, "utils"})
    wrong = {name for name in imports_of(path) if name.partition(".")[0] not in allowed}
    assert not wrong, f"{name_of(path)} imports {wrong}"


def test_no_circle():
    TopologicalSorter({name_of(path): imports_of(path) for path in MODULES}).prepare()


@pytest.mark.parametrize("folder", STEP_FOLDERS)
def test_imports_inside_a_steps_folder_stand_at_the_top(folder):
    """The scripts import a folder within `main`, so --help is quick without imports inside its modules' functions."""
    inside = {
        f"{name_of(path)}:{node.lineno}"
        for path in (ROOT / folder).glob("*.py")
        for function in ast.walk(ast.parse(path.read_text()))
        if isinstance(function, ast.FunctionDef)
        for node in ast.walk(function)
        if isinstance(node, (ast.Import, ast.ImportFrom))
    }
    assert len(inside) <= MAX_INNER_IMPORTS[folder], sorted(inside)


# What is left, each with its reason beside it: an optional package, or a library of seconds that few calls need.
MAX_INNER_IMPORTS = {
    # gigatoken with awkward, 0.4 s, which the driver does without where it remembers the encoders' comparison; and what
    # a worker process needs, 0.2 s, before which the driver starts it.
    "tokenization": 2,
    # tensorboard, wandb and torchao (twice), which are optional, and the training that the driver starts elsewhere and
    # does not import.
    "pretraining": 5,
    # matplotlib, which an export without a metrics.jsonl beside its checkpoint does without; gguf, which is optional.
    "export": 2,
}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_script_is_a_story_that_one_can_read(path):
    assert num_lines(path) <= MAX_SCRIPT_LINES


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_module_holds_one_concept(path):
    assert num_lines(path) <= MAX_MODULE_LINES


def test_utils_stays_small():
    utils = [path for path in MODULES if path.parent.name == "utils" and path.name != "__init__.py"]
    assert len(utils) <= MAX_UTILS_MODULES
    assert sum(map(num_lines, utils)) <= MAX_UTILS_LINES


def test_nothing_is_left_out_of_the_rules():
    """A new folder with Python in it is one of those above, or not part of the product."""
    tracked = subprocess.run(["git", "ls-files", "*.py"], capture_output=True, text=True, cwd=ROOT, check=True).stdout
    folders = {name.partition("/")[0] for name in tracked.split() if "/" in name}
    assert folders == {*FOLDERS, "benchmarks", "examples", "tests"}


def test_every_module_has_its_place_in_the_design():
    design = (ROOT / "docs" / "design.md").read_text()
    missing = [name_of(path) for path in MODULES if path.stem != "__init__" and f"`{path.stem}`" not in design]
    assert not [name for name in missing if not name.startswith("tools.")]
