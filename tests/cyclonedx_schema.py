"""Whether a bill of materials is what CycloneDX 1.6 allows: its official schema, and references that no schema sees."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jsonschema import Draft7Validator
from referencing import Registry, Resource

SCHEMAS = Path(__file__).parent / "export" / "cyclonedx"


@functools.cache
def _validator() -> Draft7Validator:
    schemas = [json.loads(path.read_bytes()) for path in SCHEMAS.glob("*.json")]
    registry = Registry().with_resources([(schema["$id"], Resource.from_contents(schema)) for schema in schemas])
    (bom,) = (schema for schema in schemas if schema["$id"].endswith("/bom-1.6.schema.json"))
    return Draft7Validator(bom, registry=registry)


def problems_of(bill: dict[str, Any]) -> list[str]:
    """What the schema does not allow, references that lead nowhere, and names that two components have."""
    problems = [f"{list(error.absolute_path)}: {error.message}" for error in _validator().iter_errors(bill)]
    refs = [value for key, value in _entries(bill) if key == "bom-ref"]
    problems += [f"{ref}: the name of two" for ref in {ref for ref in refs if refs.count(ref) > 1}]
    named = [value for key, value in _entries(bill) if key == "ref"]
    for part in [*bill["dependencies"], *bill["compositions"]]:
        named += part.get("dependsOn", []) + part.get("dependencies", [])
    problems += [f"{ref}: no component has this name" for ref in sorted({*named} - {*refs})]
    unreached = {*refs} - {*reached_from(bill, "model")}
    return problems + [f"{ref}: nothing is made from it" for ref in sorted(unreached)]


def _entries(value: Any) -> Iterator[tuple[str, Any]]:
    """(key, value) of all dictionaries in `value`."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield key, part
            yield from _entries(part)
    elif isinstance(value, list):
        for part in value:
            yield from _entries(part)


def reached_from(bill: dict[str, Any], ref: str) -> list[str]:
    """`ref` and what it was made from, nearest first."""
    made_from = {entry["ref"]: entry["dependsOn"] for entry in bill["dependencies"]}
    reached = [ref]
    for at in reached:  # grows while it is read
        reached += [source for source in made_from[at] if source not in reached]
    return reached


def components(bill: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    """Those whose bom-ref begins with `kind`."""
    return [component for component in bill["components"] if component["bom-ref"].startswith(kind)]


def properties(component: dict[str, Any]) -> dict[str, str]:
    return {entry["name"].removeprefix("pretrain-toolkit:"): entry["value"] for entry in component["properties"]}
