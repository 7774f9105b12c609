"""model.cdx.json of an export: the model and what it was made from, as a bill of materials in CycloneDX 1.6.

It says nothing that the export's manifest does not say, in a form that other tools read:

    model  <-  checkpoint  <-  datasets  <-  tokens  <-  files of text
                                                     <-  tokenizer
    and each of these  <-  the packages that made it

"x <- y" stands in `dependencies` as {"ref": "x", "dependsOn": ["y"]}. A directory that was published is known by the
SHA-256 of its manifest, which lists its own files: a dataset's chunks, hundreds of thousands, stand only there. Hashes
for which the standard has no name (XXH3, fingerprints of footers) are properties. Equal manifests give equal bytes:
there is no time in it, and its serial number is made from the rest.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote

import xxhash

from export.model_card import CARD_NAME, CURVES_NAME
from utils.files import write_json
from utils.machine import available_cpus
from utils.manifest import MANIFEST_NAME

BILL_NAME = "model.cdx.json"
LAYOUT = "1"
"""Which parts the bill has, and how they are named; to be raised with any change of these."""

_OWN = "pretrain-toolkit:"
LAYOUT_PROPERTY = f"{_OWN}layout"
_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_DNS, "pretrain-toolkit")
_NOT_THE_MODEL = (CARD_NAME, CURVES_NAME, BILL_NAME)  # for people; and the card names the export's directory
_NAMING = ("bom-ref", "ref", "name", "alg", "aggregate", "type", "url")
_READ_BLOCK_BYTES = 8 << 20


def size_and_hashes(path: str | os.PathLike) -> dict[str, Any]:
    """`bytes`, `xxh3_128` and `sha256` (hexadecimal) of a file, which is read once."""
    size, xxh3, sha256 = 0, xxhash.xxh3_128(), hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(_READ_BLOCK_BYTES):
            size += len(block)
            xxh3.update(block)
            sha256.update(block)
    return {"bytes": size, "xxh3_128": xxh3.hexdigest(), "sha256": sha256.hexdigest()}


def describe_files(directory: Path, names: list[str]) -> list[dict[str, Any]]:
    """Entries of an export's manifest, with SHA-256 beside the usual checksum: the bill needs a hash that has a name in
    the standard, and a hub shows the same one."""
    with ThreadPoolExecutor(max_workers=available_cpus()) as pool:  # hashing releases the interpreter's lock
        found = pool.map(lambda name: size_and_hashes(directory / name), names)
        return [{"name": name, **known} for name, known in zip(names, found, strict=True)]


def write_bill(directory: Path, manifest: dict[str, Any]) -> None:
    """Write model.cdx.json.

    Args:
        manifest: of the export, complete but for this file.
    """
    write_json(directory / BILL_NAME, bill_of_materials(manifest))


def bill_of_materials(manifest: dict[str, Any]) -> dict[str, Any]:
    """The content of model.cdx.json, which depends on the export's manifest alone.

    Args:
        manifest: of the export; what it says of model.cdx.json is not looked at.
    """
    bill = _Bill()
    source = next(iter(manifest["inputs"]), {})
    content, training = manifest["content"], manifest["content"].get("training") or {}
    datasets = [
        bill.add_dataset(i, record) for i, record in enumerate((source.get("manifest") or {}).get("inputs", ()))
    ]
    checkpoint = bill.add_checkpoint(source, content.get("model"), datasets)
    bill.connect("model", [checkpoint, *bill.add_packages(manifest.get("made_by"))])
    metrics = [
        {"type": f"validation loss, {unit}", "value": _text(training[key])}
        for key, unit in (("val_loss", "nats per token"), ("val_bits_per_byte", "bits per byte of text"))
        if training.get(key) is not None
    ]
    model = {
        "type": "machine-learning-model",
        "bom-ref": "model",
        "name": content.get("model") or "model",
        **_version(training),
        "description": "A language model, exported from a checkpoint of its pretraining.",
        "components": [
            _file(entry["name"], entry.get("sha256"), bytes=entry["bytes"], xxh3_128=entry.get("xxh3_128"))
            for entry in manifest["files"]
            if entry["name"] not in _NOT_THE_MODEL
        ],
        "externalReferences": [
            {"type": "build-meta", "url": MANIFEST_NAME, "comment": "Everything that is known of it; made with it."}
        ],
        "modelCard": {
            "modelParameters": {
                "approach": {"type": "self-supervised"},
                "task": "text-generation",
                "architectureFamily": "decoder-only transformer",
                "modelArchitecture": content.get("model") or "unknown",
                "datasets": [{"ref": ref} for ref in datasets],
            },
            "quantitativeAnalysis": {"performanceMetrics": metrics},
        },
        "properties": _properties(
            parameters=content.get("parameters"),
            dtype=content.get("dtype"),
            tied_embeddings=content.get("tied_embeddings"),
            made_by=(manifest.get("made_by") or {}).get("script"),
        ),
    }
    return bill.finish(model)


def by_name(value: Any) -> Any:
    """A bill whose lists became dictionaries, by what tells their entries apart: two of them are then compared entry by
    entry."""
    if isinstance(value, dict):
        return {key: by_name(part) for key, part in value.items()}
    if not isinstance(value, list):
        return value
    found: dict[str, Any] = {}
    for i, part in enumerate(value):
        names = [part.get(key) for key in _NAMING] if isinstance(part, dict) else [part]
        name = next((name for name in names if isinstance(name, str)), str(i))
        found[f"{name} ({i})" if name in found else name] = by_name(part)
    return found


class _Bill:
    """The components by their bom-ref, what each was made from, and of which of them that is not known."""

    def __init__(self) -> None:
        self._components: dict[str, dict[str, Any]] = {}
        self._made_from: dict[str, list[str]] = {}
        self._unknown: set[str] = set()

    def _add(self, ref: str, component: dict[str, Any], made_from: Iterable[str] = (), known: bool = True) -> str:
        self._components.setdefault(ref, {"bom-ref": ref, **component})
        self.connect(ref, made_from)
        if not known:
            self._unknown.add(ref)
        return ref

    def connect(self, ref: str, made_from: Iterable[str]) -> None:
        self._made_from.setdefault(ref, list(dict.fromkeys(made_from)))

    def add_checkpoint(self, record: dict[str, Any], model: str | None, datasets: list[str]) -> str:
        """A checkpoint, by its record among the inputs of an export."""
        manifest = record.get("manifest") or {}
        content, settings = manifest.get("content") or {}, manifest.get("settings") or {}
        made_from = [*datasets, *self._add_tokenizer(manifest.get("tokenizer"))]
        if initial := settings.get("initial_checkpoint_dir"):
            weights = {"type": "machine-learning-model", "name": PurePosixPath(initial).name or "weights"}
            weights["description"] = "The weights that training began with. Nothing else was recorded of them."
            made_from.append(self._add("initial-weights", weights, known=False))
        counts = {key: content.get(key) for key in ("parameters", "step", "tokens", "epoch")}
        component = {
            "type": "machine-learning-model",
            "name": f"{model or 'model'}, checkpoint",
            **_version(content),
            "components": _manifest_file(record)
            or [_file(entry["name"], None, bytes=entry["bytes"]) for entry in record.get("files", ())],
            "properties": _properties(
                **counts,
                seed=settings.get("seed"),
                precision=settings.get("precision"),
                made_by=(manifest.get("made_by") or {}).get("script"),
            ),
        }
        made_from += self.add_packages(manifest.get("made_by"))
        return self._add("checkpoint", component, made_from, known=bool(manifest))

    def add_dataset(self, index: int, record: dict[str, Any]) -> str:
        """A merged dataset, by its record among the inputs of a checkpoint, and its tokens."""
        manifest = record.get("manifest") or {}
        content = manifest.get("content") or {}
        made_from = [self._add_tokens(manifest)] if manifest else []
        parts = [part for part in PurePosixPath(str(record.get("path"))).parts if part != "/"]
        counts = {key: content.get(key) for key in ("documents", "tokens", "text_bytes", "chunks", "dtype")}
        component = {
            "type": "data",
            "name": "/".join(parts[-2:]) or "dataset",
            "description": "Tokens as training reads them. Its manifest lists its chunks.",
            "components": _manifest_file(record),
            "data": [{"type": "dataset"}],
            "properties": _properties(
                split=manifest.get("split"),
                fingerprint=manifest.get("fingerprint"),
                pack_tokens=manifest.get("pack_tokens"),
                **counts,
                made_by=(manifest.get("made_by") or {}).get("script"),
            ),
        }
        made_from += self.add_packages(manifest.get("made_by"))
        return self._add(f"dataset/{index}", component, made_from, known=bool(manifest))

    def _add_tokens(self, dataset: dict[str, Any]) -> str:
        """What a dataset was merged from; those of training and validation are usually the same."""
        keys = ("tokenized_by", "settings", "tokenizer", "inputs")
        identity = {key: dataset.get(key) for key in keys}
        ref = f"tokens/{hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]}"
        if ref in self._components:
            return ref
        inputs = dataset.get("inputs") or []
        made_from = [self._add_text(entry) for entry in inputs] + self._add_tokenizer(dataset.get("tokenizer"))
        made_from += self.add_packages(dataset.get("tokenized_by"))
        component = {
            "type": "data",
            "name": "tokens",
            "description": "Files of text, tokenized with these settings.",
            "data": [{"type": "dataset"}],
            "properties": _properties(
                **{f"settings.{key}": value for key, value in sorted((dataset.get("settings") or {}).items())},
                made_by=(dataset.get("tokenized_by") or {}).get("script"),
            ),
        }
        return self._add(ref, component, made_from, known=bool(inputs))

    def _add_text(self, entry: dict[str, Any]) -> str:
        """A file that was tokenized. No hash of its bytes was recorded."""
        known = {key: entry.get(key) for key in ("bytes", "rows", "fingerprint")}
        ref = "/".join(["text", *(str(known[key]) for key in ("fingerprint", "bytes")), entry["path"]])
        return self._add(ref, {**_file(entry["path"], None, **known), "type": "data", "data": [{"type": "dataset"}]})

    def _add_tokenizer(self, record: dict[str, Any] | None) -> list[str]:
        if not record:
            return []
        known = {key: record.get(key) for key in ("vocab_size", "bos_id", "eos_id")}
        component = _file("tokenizer.json", record["sha256"], **known)
        return [self._add(f"tokenizer/{record['sha256']}", component)]

    def add_packages(self, made_by: dict[str, Any] | None) -> list[str]:
        """The packages whose versions a manifest records, as of the Python Package Index."""
        refs = []
        for name, version in sorted(((made_by or {}).get("versions") or {}).items()):
            purl = f"pkg:pypi/{name}@{quote(version, safe='')}"
            refs.append(self._add(purl, {"type": "library", "name": name, "version": version, "purl": purl}))
        return refs

    def finish(self, model: dict[str, Any]) -> dict[str, Any]:
        refs = sorted(self._made_from)
        # Of packages only those are recorded that shape the result, so no such list is complete.
        partly = [ref for ref in refs if self._made_from[ref] and ref not in self._unknown]
        compositions = [("incomplete", partly), ("unknown", sorted(self._unknown))]
        bill = {
            "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
            "bomFormat": "CycloneDX",
            "specVersion": "1.6",
            "version": 1,
            "metadata": {
                "tools": {"components": [{"type": "application", "name": "convert_pretrained_checkpoint.py"}]},
                "component": model,
                "properties": _properties(layout=LAYOUT),
            },
            "components": [self._components[ref] for ref in sorted(self._components)],
            "dependencies": [{"ref": ref, "dependsOn": self._made_from[ref]} for ref in refs],
            "compositions": [{"aggregate": kind, "dependencies": which} for kind, which in compositions if which],
        }
        return bill | {"serialNumber": uuid.uuid5(_NAMESPACE, json.dumps(bill, sort_keys=True)).urn}


def _file(name: str, sha256: str | None, **known: Any) -> dict[str, Any]:
    component: dict[str, Any] = {"type": "file", "name": name}
    if sha256:
        component["hashes"] = [{"alg": "SHA-256", "content": sha256}]
    return component | ({"properties": _properties(**known)} if known else {})


def _manifest_file(record: dict[str, Any]) -> list[dict[str, Any]]:
    return [_file(MANIFEST_NAME, record["sha256"])] if record.get("sha256") else []


def _version(content: dict[str, Any]) -> dict[str, str]:
    return {"version": f"step {content['step']}"} if content.get("step") is not None else {}


def _properties(**known: Any) -> list[dict[str, str]]:
    return [{"name": _OWN + key, "value": _text(value)} for key, value in known.items() if value is not None]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)
