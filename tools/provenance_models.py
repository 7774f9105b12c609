"""Checks what steps 3 and 5 publish, checkpoints and exports: each by itself, and against what it was made from."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import yaml

from export.bill_of_materials import BILL_NAME, LAYOUT, LAYOUT_PROPERTY, bill_of_materials, by_name
from pretraining.checkpoint import WEIGHTS_NAME
from pretraining.left_out import LeftOut
from pretraining.plan import identity_of
from tools.provenance import AGREES, CHANGED, UNKNOWN, Node, check_files
from utils import console
from utils.chunks import read_index
from utils.manifest import MANIFEST_NAME
from utils.metrics_file import METRICS_NAME, read_metrics
from utils.tokenizer import read_tokenizer_info

# What the manifest states itself, in another form than hyperparameters.yaml.
_STATED = ("model", "context_tokens", "data", "data_weights")


def check_checkpoint(node: Node, directory: Path, manifest: dict[str, Any]) -> None:
    """A checkpoint: its files, and what its manifest says against configurations, state, tokenizer and metrics."""
    entries = manifest["files"]
    if not (directory / WEIGHTS_NAME).is_dir() and (directory / WEIGHTS_NAME).is_file():
        entries = [entry for entry in entries if not entry["name"].startswith(f"{WEIGHTS_NAME}/")]
        node.add(UNKNOWN, f"{WEIGHTS_NAME}: merged into one file, of which no checksum was recorded")
    check_files(node, directory, entries)
    _check_settings(node, directory, manifest)
    _check_state(node, directory, manifest)
    _check_tokenizer(node, directory, manifest)
    _check_metrics(node, directory, manifest)


def _check_settings(node: Node, directory: Path, manifest: dict[str, Any]) -> None:
    settings = manifest["settings"]
    sound = True
    for name in ("hyperparameters.yaml", "model_config.yaml"):
        try:
            there = yaml.safe_load((directory / name).read_text())
        except OSError:
            continue  # named among the files
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            node.add(CHANGED, f"{name}: not readable ({error})")
            continue
        if name == "model_config.yaml":
            sound &= node.expect(name, _same_keys(there, settings["model"]), settings["model"], MANIFEST_NAME)
        else:
            shaping = {key: value for key, value in settings.items() if key not in _STATED}
            sound &= node.expect(name, _same_keys(there, shaping), shaping, MANIFEST_NAME)
    if sound:
        node.add(AGREES, "settings and model: manifest, hyperparameters.yaml and model_config.yaml")


def _same_keys(values: Any, wanted: Any) -> Any:
    """`values` without the keys that `wanted` has not."""
    if isinstance(values, dict) and isinstance(wanted, dict):
        return {key: _same_keys(values[key], wanted[key]) for key in wanted if key in values}
    return list(values) if isinstance(values, tuple) else values


def _check_state(node: Node, directory: Path, manifest: dict[str, Any]) -> None:
    """Step, tokens and positions: the manifest against meta.pt, and against each other."""
    import torch

    content, settings = manifest["content"], manifest["settings"]
    sequences = content["step"] * settings["train"]["global_batch_size"]
    counted = {"position": LeftOut.of(content).end_of(sequences), "tokens": sequences * settings["context_tokens"]}
    sound = node.expect("content", {key: content.get(key) for key in counted}, counted, "step x global batch")
    path = directory / WEIGHTS_NAME / "meta.pt"
    if path.is_file():
        try:
            state = torch.load(path, weights_only=True)
        except Exception as error:  # whatever a damaged archive raises
            node.add(CHANGED, f"meta.pt: not readable ({type(error).__name__})")
            return
        keys = ("step", "tokens", "position", "val_loss", *(["left_out"] if "left_out" in content else []))
        expected = {key: content.get(key) for key in keys}
        sound &= node.expect("meta.pt", {key: state.get(key) for key in keys}, expected, MANIFEST_NAME)
        sound &= node.expect("meta.pt: seed", state.get("seed"), settings.get("seed"), MANIFEST_NAME)
    if sound:
        node.add(AGREES, f"step {content['step']:,}, {content['tokens']:,} tokens: manifest and meta.pt")


def _check_tokenizer(node: Node, directory: Path, manifest: dict[str, Any]) -> None:
    recorded = manifest.get("tokenizer")
    if not (directory / "tokenizer.json").is_file():
        if recorded is not None:
            node.add(UNKNOWN, "tokenizer.json: not beside the weights")
        return
    info = node.collect(read_tokenizer_info, directory)
    if info is None:
        return
    if recorded is None:
        node.add(UNKNOWN, "tokenizer: the manifest does not say which one it was")
    elif manifest["kind"] == "export":
        # Its SHA-256 is that of training's. The exported file may put BOS in another way; check_files read it.
        found, wanted = ({**record, "sha256": None} for record in (info.record(), recorded))
        if node.expect("tokenizer", found, wanted, MANIFEST_NAME):
            node.add(AGREES, f"tokenizer.json: {info.vocab_size:,} entries, BOS and EOS of the manifest")
    elif node.expect("tokenizer", info.record(), recorded, MANIFEST_NAME):
        node.add(AGREES, f"tokenizer.json: SHA-256 {info.sha256[:12]}..., the one of the manifest")


def _check_metrics(node: Node, directory: Path, manifest: dict[str, Any]) -> None:
    """The run's metrics up to this checkpoint's step, where they are beside it."""
    content = manifest["content"]
    records = [record for record in read_metrics(directory.parent) if record.get("step") == content["step"]]
    if not records:
        if content["step"]:
            node.add(UNKNOWN, f"{METRICS_NAME}: no record of step {content['step']} beside the checkpoint")
        return
    found = {key: records[-1].get(key) for key in ("tokens", "val_loss") if records[-1].get(key) is not None}
    if node.expect(METRICS_NAME, found, {key: content.get(key) for key in found}, MANIFEST_NAME):
        node.add(AGREES, f"{METRICS_NAME}: its record of step {content['step']:,}")


def check_training_data(node: Node, manifest: dict[str, Any], directories: list[Path | None]) -> None:
    """The hash of each training dataset that the settings have, and the sequences of an epoch.

    Args:
        directories: the training datasets in their order; None for one that is not here.
    """
    recorded = manifest["settings"]["data"]
    indexes = []
    for directory, identity in zip(directories, recorded):
        index = node.collect(read_index, directory, "dataset") if directory is not None else None
        indexes.append(index)
        if index is not None and identity_of(index) != identity:
            node.add(CHANGED, f"{directory}: its chunks are not those of the run: another dataset, or another merge")
    if all(index is not None and identity_of(index) == wanted for index, wanted in zip(indexes, recorded)):
        block = manifest["settings"]["context_tokens"] + 1
        blocks = sum(chunk.tokens // block for index in indexes for chunk in index.chunks)
        if node.expect("sequences per epoch", blocks, manifest["content"].get("sequences_per_epoch"), MANIFEST_NAME):
            node.add(
                AGREES, f"{console.counted(len(recorded), 'training dataset')}: hash of the chunks and their order"
            )


def check_export(node: Node, directory: Path, manifest: dict[str, Any]) -> None:
    """An export: its files, configuration, tokenizer and weights against its own manifest."""
    check_files(node, directory, manifest["files"])
    _check_tokenizer(node, directory, manifest)
    _check_weights(node, directory, manifest)
    _check_bill(node, directory, manifest)


def _check_weights(node: Node, directory: Path, manifest: dict[str, Any]) -> None:
    """Number and type of the values in each format, from the files' headers."""
    from export.checkpoint_files import EMBEDDING, HEAD
    from export.checkpoint_weights import find_in_safetensors, find_in_torch_file

    content = manifest["content"]
    readers = {WEIGHTS_NAME: find_in_torch_file, "model.safetensors": find_in_safetensors}
    for name, read in readers.items():
        path = directory / name if name == WEIGHTS_NAME else directory
        if not any(entry["name"].startswith(name.partition(".")[0]) and entry["name"].endswith(name.rpartition(".")[2])
                   for entry in manifest["files"]):  # fmt: skip
            continue
        try:
            tensors = read(path)
        except Exception as error:  # whatever a damaged header makes of its reader
            node.add(CHANGED, f"{name}: its header is not readable ({type(error).__name__}: {error})")
            continue
        both = content["tied_embeddings"] and {HEAD, EMBEDDING} <= tensors.keys()
        count = sum(math.prod(tensor.shape) for key, tensor in tensors.items() if not (both and key == HEAD))
        dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()})
        found = {"parameters": count, "dtype": ", ".join(dtypes)}
        if node.expect(name, found, {key: content[key] for key in found}, MANIFEST_NAME):
            node.add(AGREES, f"{name}: {count:,} parameters of {found['dtype']}")


def _check_bill(node: Node, directory: Path, manifest: dict[str, Any]) -> None:
    """model.cdx.json: it says what the manifests say that it is made from."""
    path = directory / BILL_NAME
    if not any(entry["name"] == BILL_NAME for entry in manifest["files"]):
        if not path.exists():  # one that is there and not listed, check_files names
            node.add(UNKNOWN, f"{BILL_NAME}: none, as in the exports of earlier versions")
        return
    if not path.is_file():
        return  # named among the files
    try:
        bill = json.loads(path.read_bytes())
        layout = [entry["value"] for entry in bill["metadata"]["properties"] if entry["name"] == LAYOUT_PROPERTY]
        found = by_name(bill)
    except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
        node.add(CHANGED, f"{BILL_NAME}: not a bill of materials that an export has ({type(error).__name__}: {error})")
        return
    if layout != [LAYOUT]:
        said = f"layout {layout[0]!r}" if layout else "no layout"
        node.add(UNKNOWN, f"{BILL_NAME}: {said}, this version compares {LAYOUT!r}")
        return
    expected = bill_of_materials(manifest)
    if bill == expected:
        parts = console.counted(len(bill["components"]), "component")
        node.add(AGREES, f"{BILL_NAME}: {parts}, those of the manifests")
    elif node.expect(BILL_NAME, found, by_name(expected), MANIFEST_NAME):
        node.add(CHANGED, f"{BILL_NAME}: in another order than the manifests give, or with an empty entry")


def check_conversion(node: Node, directory: Path, manifest: dict[str, Any], source: Path, made: dict[str, Any]) -> None:
    """An export against the checkpoint that it was made from.

    Args:
        source, made: the checkpoint's directory and manifest.
    """
    content = manifest["content"]
    sound = node.expect("content.training", content.get("training"), made["content"], "the checkpoint")
    sound &= node.expect("parameters", content["parameters"], made["content"].get("parameters"), "the checkpoint")
    if manifest.get("tokenizer") is not None and made.get("tokenizer") is not None:
        sound &= node.expect("tokenizer", manifest["tokenizer"], made["tokenizer"], "the checkpoint")
    copies = [directory / "model_config.yaml", source / "model_config.yaml"]
    if all(path.is_file() for path in copies) and copies[0].read_bytes() != copies[1].read_bytes():
        sound = False
        node.add(CHANGED, "model_config.yaml: not the checkpoint's")
    if sound:
        node.add(AGREES, f"step {made['content']['step']:,}, parameters, tokenizer and model: those of the checkpoint")
