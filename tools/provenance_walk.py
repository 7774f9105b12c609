"""The walk of `tools.verify`: export -> checkpoint -> datasets -> tokens -> input files, as far as they are here."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from tokenization.job import SPLITS
from tokenization.missing_chunks import MADE_FROM, PLAN_NAME, recorded_chunks
from tools.provenance import ABSENT, UNKNOWN, Node, check_embedded, check_files
from tools.provenance_inputs import check_inputs, check_tokenizer
from tools.provenance_merge import check_merge
from tools.provenance_places import find_inputs, find_recorded, find_tokenizer, find_tokens, manifest_or_none
from tools.provenance_tokens import check_dataset, check_tokens
from utils.errors import UserError
from utils.manifest import MANIFEST_NAME, read_manifest
from utils.tokenizer import read_tokenizer_info


class Walk:
    """One verification; a directory to which several ways lead is checked once.

    Args:
        settings: of tools.verify.
    """

    def __init__(self, settings: Any):
        self._settings = settings
        self._done: dict[Path, Node] = {}
        self._files_of_datasets: dict[str, dict[str, Any]] = {}  # checksums of the chunks of train and val by name
        self._tokenizer_json: dict[str, Path] = {}
        """By SHA-256."""

    def verify(self) -> list[Node]:
        """Raises UserError where the directory holds nothing that a step published."""
        directory = Path(self._settings.directory)
        if not directory.is_dir():
            raise UserError(f"{directory}: no such directory. Give what a step published: EXPORT, RUN, DATA, OUT.")
        manifest = read_manifest(directory)
        if manifest is None:
            return [self._node(path, read_manifest(path)) for path in self._published_below(directory)]
        return [self._node(directory, manifest)]

    def _published_below(self, directory: Path) -> list[Path]:
        splits = [directory / split for split in SPLITS if (directory / split / MANIFEST_NAME).is_file()]
        if (directory / PLAN_NAME).is_file():
            raise UserError(f"{directory}: optimize_dataset.py has not finished. Run it again, then verify.")
        checkpoints = sorted(
            path.parent
            for path in directory.glob(f"*/{MANIFEST_NAME}")
            if (manifest_or_none(path.parent) or {}).get("kind") == "checkpoint"
        )
        if not splits and not checkpoints:
            raise UserError(
                f"{directory}: nothing with a {MANIFEST_NAME} in it. Give what a step published: an export, a run or "
                "one of its checkpoints, a merged dataset, or the output of optimize_dataset.py."
            )
        return splits or checkpoints

    def _node(self, directory: Path, manifest: dict[str, Any]) -> Node:
        kind = manifest["kind"]
        if kind == "tokens":
            return self._tokens(self._top_of(directory))
        walks = {"export": self._export, "checkpoint": self._checkpoint, "dataset": self._dataset}
        if kind in walks:
            return walks[kind](directory, manifest)
        if kind == "tokenizer":
            node = Node(f"tokenizer  {directory}")
            record = node.collect(read_tokenizer_info, directory)
            if record is not None:
                node.collect(check_tokenizer, node, directory, record.record(), _corpus_beside(directory))
            return node
        node = Node(f"{kind}  {directory}")
        node.collect(check_files, node, directory, manifest["files"])
        return node

    @staticmethod
    def _top_of(directory: Path) -> Path:
        """OUT, where one of its splits or folders was given."""
        for path in (directory, *list(directory.absolute().parents)[:2]):
            manifest = manifest_or_none(path)
            if manifest is not None and manifest["kind"] == "tokens" and "split" not in manifest:
                return path
        raise UserError(f"{directory}: the directory above its splits has no {MANIFEST_NAME}. Give it whole, as OUT.")

    def _once(self, directory: Path, what: str) -> Node | None:
        if directory.resolve() in self._done:
            return Node(f"{what}  {directory}: see above")
        return None

    def _export(self, directory: Path, manifest: dict[str, Any]) -> Node:
        from tools.provenance_models import check_conversion, check_export

        node = Node(f"export  {directory}")
        node.collect(check_export, node, directory, manifest)
        recorded = next(iter(manifest["inputs"]), {})
        given = self._settings.checkpoint_dir
        source = Path(given) if given is not None else node.collect(find_recorded, recorded, directory)
        if source is None:
            node.children.append(_absent(f"checkpoint  {recorded.get('path')}", "--checkpoint_dir"))
            return node
        made = node.collect(read_manifest, source, "checkpoint")
        if made is None:
            node.add(UNKNOWN, f"{source}: no {MANIFEST_NAME}, so what it was trained on cannot be told")
            return node
        child = self._checkpoint(source, made)
        if recorded.get("manifest") is not None:
            check_embedded(child, recorded, source, made)
        node.collect(check_conversion, node, directory, manifest, source, made)
        if self._settings.deep:
            from tools.provenance_deep import check_values

            node.collect(check_values, node, directory, manifest, source, made)
        node.children.append(child)
        return node

    def _checkpoint(self, directory: Path, manifest: dict[str, Any]) -> Node:
        from tools.provenance_models import check_checkpoint, check_training_data
        from tools.run_data import training_inputs

        if again := self._once(directory, "checkpoint"):
            return again
        node = self._done[directory.resolve()] = Node(f"checkpoint  {directory}")
        node.collect(check_checkpoint, node, directory, manifest)
        self._remember_tokenizer(directory)
        found = []
        for recorded in manifest["inputs"]:
            source = node.collect(self._dataset_of, recorded, directory)
            found.append(source)
            if source is None:
                node.children.append(_absent(f"dataset  {recorded.get('path')}", "--dataset_dir"))
                continue
            own = node.collect(read_manifest, source, "dataset")
            child = self._dataset(source, own)
            if recorded.get("manifest") is not None and own is not None:
                check_embedded(child, recorded, source, own)
            node.children.append(child)
        training = found[: len(node.collect(training_inputs, manifest) or [])]
        node.collect(check_training_data, node, manifest, training)
        if self._settings.deep and None not in training:
            from tools.provenance_deep import check_batches

            node.collect(check_batches, node, directory, training)
        return node

    def _dataset_of(self, recorded: dict[str, Any], near: Path) -> Path | None:
        if self._settings.dataset_dir is None:
            return find_recorded(recorded, near)
        path, given = Path(recorded["path"]), Path(self._settings.dataset_dir)
        places = (given / path.name, given / path.parent.name / path.name)
        return next((place for place in places if place.is_dir()), None)

    def _dataset(self, directory: Path, manifest: dict[str, Any] | None) -> Node:
        if again := self._once(directory, "dataset"):
            return again
        node = self._done[directory.resolve()] = Node(f"dataset  {directory}")
        node.collect(check_dataset, node, directory, manifest)
        if manifest is None or manifest.get("split") is None:
            node.add(UNKNOWN, "where it came from: its manifest does not say")
            return node
        split = manifest["split"]
        for neighbour in (directory, *(directory.parent / other for other in SPLITS)):
            own = manifest_or_none(neighbour)
            if own is not None and own["kind"] == "dataset":
                files = {name: chunk.xxh3_128 for name, chunk in recorded_chunks(own).items()}
                self._files_of_datasets.setdefault(own.get("split"), {}).update(files)
        given = self._settings.tokens_dir
        source = Path(given) if given is not None else find_tokens(manifest, directory)
        if source is None:
            node.children.append(_absent("tokens", "--tokens_dir"))
            stored = None if "packing" in manifest else {split: _stored(directory, manifest)}
            node.children += self._inputs(directory, manifest, stored)
            return node
        tokens = node.collect(read_manifest, source, "tokens")
        if tokens is None:
            node.add(UNKNOWN, f"{source}: optimize_dataset.py has not finished there")
            return node
        node.collect(check_merge, node, manifest, source, tokens)
        node.children.append(self._tokens(source))
        return node

    def _tokens(self, directory: Path) -> Node:
        if again := self._once(directory, "tokens"):
            return again
        manifest = read_manifest(directory, "tokens")
        node = self._done[directory.resolve()] = Node(f"tokens  {directory}")
        node.collect(check_tokens, node, directory, manifest, self._files_of_datasets)
        stored: dict[str, Any] = {split: {} for split in SPLITS}
        for split in SPLITS:
            for path in sorted((directory / split).glob(f"*/{MANIFEST_NAME}")):
                part = manifest_or_none(path.parent)
                stored[split] |= _stored(path.parent, part) if part is not None else {}
        node.children += self._inputs(directory, manifest, stored)
        return node

    def _inputs(self, near: Path, manifest: dict[str, Any], stored: dict[str, Any] | None) -> list[Node]:
        """Input files and tokenizer; with --deep the text is tokenized again, and compared with `stored`."""
        if manifest.get("tokenizer") is None or not manifest["inputs"]:
            node = Node("input files")
            node.add(UNKNOWN, "the manifest names none")
            return [node]
        nodes, source = [], None
        named = _made_from(near)
        parquet_dir = self._settings.parquet_dir or find_inputs(manifest["inputs"], near) or named.get("input_dir")
        if parquet_dir is None:
            nodes.append(_absent(f"input files  ({len(manifest['inputs']):,})", "--parquet_dir"))
        else:
            nodes.append(Node(f"input files  {parquet_dir}"))
            source = nodes[0].collect(check_inputs, nodes[0], str(parquet_dir), manifest)
        corpus = Path(parquet_dir) if parquet_dir is not None and "://" not in str(parquet_dir) else None
        recorded = manifest["tokenizer"]
        given = self._settings.tokenizer_dir
        directory = Path(given) if given is not None else find_tokenizer(recorded, near)
        if directory is None and "tokenizer_dir" in named:
            directory = Path(named["tokenizer_dir"])
        if directory is None:
            nodes.append(_absent("tokenizer", "--tokenizer_dir"))
        else:
            self._remember_tokenizer(directory)
            # The copy in a checkpoint or an export is checked there.
            if given is not None or (manifest_or_none(directory) or {"kind": "tokenizer"})["kind"] == "tokenizer":
                nodes.append(Node(f"tokenizer  {directory}"))
                nodes[-1].collect(check_tokenizer, nodes[-1], directory, recorded, corpus)
        if self._settings.deep and stored is None:
            nodes[0].add(UNKNOWN, "--deep: of a packed dataset, text is compared with the tokens, which are not here")
        elif self._settings.deep and source is not None:
            self._retokenize(nodes[0], source, recorded, stored)
        return nodes

    def _retokenize(self, node: Node, source: Any, recorded: dict[str, Any], stored: dict[str, Any]) -> None:
        from tools.provenance_deep import check_retokenized

        path = self._tokenizer_json.get(recorded["sha256"])
        if path is None:
            node.add(UNKNOWN, "--deep: the tokenizer is not here, so nothing was tokenized again (--tokenizer_dir)")
            return
        node.collect(check_retokenized, node, source, path, stored, self._settings.num_units)

    def _remember_tokenizer(self, directory: Path) -> None:
        path = directory / "tokenizer.json"
        if path.is_file():
            self._tokenizer_json.setdefault(hashlib.sha256(path.read_bytes()).hexdigest(), path)


def _stored(directory: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """Each chunk as step 1 made it: its file, its entry, and its first document in the file."""
    found = {}
    for entry in manifest["files"]:
        first = 0
        for part in entry.get("gathered", [entry]):
            found[Path(part["name"]).name] = directory / entry["name"], part, first
            first += part["documents"]
    return found


def _made_from(tokens_dir: Path) -> dict[str, str]:
    """The directories that the command of step 1 named, as far as they are there."""
    try:
        named = json.loads((tokens_dir / PLAN_NAME).read_bytes())[MADE_FROM]
        return {key: path for key, path in named.items() if Path(path).exists()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _corpus_beside(tokenizer_dir: Path) -> Path | None:
    for path in sorted(tokenizer_dir.absolute().parent.iterdir()):
        manifest = manifest_or_none(path) if path.is_dir() else None
        if manifest is not None and manifest["kind"] == "corpus":
            return path
    return None


def _absent(what: str, flag: str) -> Node:
    node = Node(what)
    node.add(ABSENT, f"not found where it was or near what was made of it; name its place with {flag}")
    return node
