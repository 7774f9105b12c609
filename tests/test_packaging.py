"""pyproject.toml, poetry.lock and requirements.txt must say the same, or a user gets another program than we tested."""

from __future__ import annotations

import hashlib
import json
import re
import tomllib

import pytest
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LOCK = tomllib.loads((ROOT / "poetry.lock").read_text())


def declared() -> list[str]:
    project = PYPROJECT["project"]
    groups = [
        project["dependencies"],
        *project["optional-dependencies"].values(),
        *PYPROJECT["dependency-groups"].values(),
    ]
    return [requirement for group in groups for requirement in group]


def required_lines() -> dict[tuple[str, str], set[str]]:
    """(name, version) -> hashes of requirements.txt."""
    lines = (ROOT / "requirements.txt").read_text().replace("\\\n", " ").splitlines()
    entries: dict[tuple[str, str], set[str]] = {}
    for line in lines:
        match = re.match(r"([A-Za-z0-9._-]+)(?:\[[^]]*\])?==(\S+)", line)
        if match:
            key = (canonicalize_name(match[1]), match[2])
            entries.setdefault(key, set()).update(re.findall(r"sha256:[0-9a-f]{64}", line))
    return entries


def test_lock_is_of_this_pyproject():
    """The content hash as Poetry computes it (poetry/packages/locker.py, Locker._get_content_hash)."""
    project_keys = ("requires-python", "dependencies", "optional-dependencies")
    relevant = {
        "project": {key: PYPROJECT["project"][key] for key in project_keys},
        "dependency-groups": PYPROJECT["dependency-groups"],
        "tool": {"poetry": {}},  # nothing of what is hashed stands in [tool.poetry]
    }
    digest = hashlib.sha256(json.dumps(relevant, sort_keys=True).encode()).hexdigest()
    assert LOCK["metadata"]["content-hash"] == digest, "run `poetry lock`"


@pytest.mark.parametrize("requirement", declared())
def test_locked_version_satisfies_what_is_declared(requirement):
    wanted = Requirement(requirement)
    versions = [p["version"] for p in LOCK["package"] if canonicalize_name(p["name"]) == canonicalize_name(wanted.name)]
    assert any(wanted.specifier.contains(version) for version in versions), f"{requirement}: locked are {versions}"


def test_requirements_are_the_lock_exported_with_all_hashes():
    locked = {
        (canonicalize_name(package["name"]), package["version"]): {file["hash"] for file in package["files"]}
        for package in LOCK["package"]
    }
    assert required_lines() == locked, "run `make requirements`"
    assert all(required_lines().values())


def test_no_index_and_no_malware():
    text = (ROOT / "requirements.txt").read_text() + (ROOT / "poetry.lock").read_text()
    assert "index-url" not in text and "find-links" not in text
    versions = {package["name"]: package["version"] for package in LOCK["package"]}
    assert versions["lightning"] not in ("2.6.2", "2.6.3")


def test_the_environment_is_what_is_locked():
    """One version of each package, the locked one, is what the tests run on."""
    from importlib.metadata import version

    for requirement in declared():
        name = canonicalize_name(Requirement(requirement).name)
        assert (name, version(name)) in required_lines()
