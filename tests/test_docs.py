"""What the documentation shows must exist: every script, module, flag, file and link."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from conftest import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
OTHERS = [
    *ROOT.glob("*.py"),
    *ROOT.glob("*.sh"),
    *(ROOT / "config_hub").glob("*.yaml"),
    *(ROOT / "examples").rglob("*.*"),
]
# Of other programs, or generic.
COMMAND = re.compile(
    r"python (?:-m )?((?:examples/|benchmarks/)?[a-z_]+\.py(?!\w)|utils\.[a-z_]+)((?: [^\n`|]*)?(?:\\\n[^\n`]*)*)"
)


def commands(path: Path) -> list[tuple[str, list[str]]]:
    """(script, flags) of each command of ours in a file."""
    text = re.sub(r"\n#\s*", "\n", path.read_text()) if path.suffix in (".yaml", ".sh") else path.read_text()
    text = re.sub(r"\\\n\s*", " ", text)
    found = []
    for script, arguments in COMMAND.findall(text):
        flags = re.findall(r"(?<![\w-])--([a-zA-Z_.]+)", arguments.split("#")[0].split(", then")[0])
        found.append((script, flags))
    return found


@cache
def known_flags(script: str) -> set[str]:
    """From --help."""
    command = ["-m", script] if script.startswith("utils.") else [script]
    process = subprocess.run([sys.executable, *command, "--help"], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert process.returncode == 0, process.stderr
    return set(re.findall(r"--([a-zA-Z_.]+)", process.stdout))


@pytest.mark.parametrize("path", [*PAGES, *OTHERS], ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_have_scripts_and_flags_that_exist(path):
    for script, flags in commands(path):
        unknown = set(flags) - known_flags(script) - {"help", "config"}
        assert not unknown, f"{path.name}: {script} has no {unknown}"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_to_files_and_headings(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if target.startswith(("http://", "https://", "#")):
            continue
        name, _, heading = target.partition("#")
        linked = path.parent / name
        assert linked.exists(), f"{path.name}: {target}"
        if heading:
            slugs = [
                re.sub(r"[^\w\- ]", "", line.lstrip("# ")).lower().replace(" ", "-")
                for line in linked.read_text().splitlines()
                if line.startswith("#")
            ]
            assert heading in slugs, f"{path.name}: {target}"


def test_every_page_is_reached_from_the_readme():
    reached, todo = set(), [ROOT / "README.md"]
    while todo:
        page = todo.pop()
        reached.add(page.resolve())
        for target in re.findall(r"\]\(([^)#\s]+\.md)", page.read_text()):
            linked = (page.parent / target).resolve()
            if linked not in reached:
                todo.append(linked)
    assert {page.resolve() for page in PAGES} <= reached


def test_make_targets_that_are_named_exist():
    targets = set(re.findall(r"^([a-z.-]+):", (ROOT / "Makefile").read_text(), re.M))
    for page in PAGES:
        for target in re.findall(r"^ {4}make ([a-z.-]+)", page.read_text(), re.M):
            assert target in targets, f"{page.name}: make {target}"


def test_shell_words_are_balanced():
    for page in PAGES:
        for line in re.findall(r"^ {4}(python [^\n\\]*)$", page.read_text(), re.M):
            shlex.split(line)


def test_the_project_speaks_of_itself_alone():
    files = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT, check=True).stdout.split()
    machine = re.compile(r"(?<![\w.])/(?:work|farm)/|py" + r"pi\.org|python" + "hosted")
    for name in files:
        path = ROOT / name
        if path.is_file() and path.suffix not in (".png", ".lock"):
            assert not machine.search(path.read_text(errors="replace")), name
