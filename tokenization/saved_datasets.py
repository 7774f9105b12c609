"""Hugging Face datasets as `save_to_disk` leaves them: which Arrow files of a directory are the dataset.

    DIR/state.json   dataset_info.json   data-00000-of-00002.arrow   data-00001-of-00002.arrow   cache-4c41....arrow

Later calls of `map` and `filter` leave their results beside the data, as cache-*.arrow: most of the text once more.
"""

from __future__ import annotations

import collections
import dataclasses
import json
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

from tokenization.job import FileEntry
from utils import console
from utils.manifest import some

STATE_NAME = "state.json"


def only_datasets_own(filesystem: Any, base: str, entries: Sequence[FileEntry]) -> list[FileEntry]:
    """Leave out the Arrow files that the state.json beside them does not list, and add those that it lists in vain.

    Args:
        base: of the file system; the entries' paths are below it.
        entries: of Arrow files alone.
    """
    by_directory = collections.defaultdict(list)
    for entry in entries:
        by_directory[str(PurePosixPath(entry.path).parent)].append(entry)
    kept = []
    for directory, found in by_directory.items():
        names = _listed_names(filesystem, f"{base}/{directory}/{STATE_NAME}")
        kept += found if names is None else _of_names(base, directory, names, found)
    return kept


def _listed_names(filesystem: Any, path: str) -> list[str] | str | None:
    """Of the files that a state.json lists; None where there is none, or a text that says what is wrong with it."""
    try:
        with filesystem.open_input_stream(path) as file:
            state = json.loads(file.read())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        return f"the {STATE_NAME} beside it cannot be read ({error})"
    if not isinstance(state, dict) or "_data_files" not in state:
        return None  # something else's
    try:
        names = [entry["filename"] for entry in state["_data_files"]]
    except (KeyError, TypeError):
        return f"the {STATE_NAME} beside it does not list its files"
    if state.get("_indices_data_files") or state.get("_indices_files"):
        return "its rows are chosen by a file of indices; save the dataset again after flatten_indices()"
    return names


def _of_names(base: str, directory: str, names: list[str] | str, found: Sequence[FileEntry]) -> list[FileEntry]:
    if isinstance(names, str):
        return [dataclasses.replace(entry, fault=entry.fault or names) for entry in found]
    here = {PurePosixPath(entry.path).name: entry for entry in found}
    if unlisted := sorted(here.keys() - set(names)):
        console.warn(
            f"{base}/{directory}: {console.counted(len(unlisted), 'Arrow file')} left out, which the {STATE_NAME} "
            f"there does not list: {some(unlisted)}"
        )
    missing = FileEntry("", 0, fault=f"the {STATE_NAME} beside it lists it, and it is not there")
    return [here.get(name, dataclasses.replace(missing, path=str(PurePosixPath(directory) / name))) for name in names]
