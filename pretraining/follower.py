"""The driver's end of metrics.jsonl and events.jsonl: what the training processes append, for terminal and loggers.

Rank 0 of the training processes appends one JSON object per logged step. The driver, which started them, follows.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pretraining.events import EVENTS_NAME
from utils import console
from utils.metrics_file import METRICS_NAME, whole_records


class Follower:
    """The reading end: passes on what is appended to metrics.jsonl and events.jsonl after its start, in a thread.

    When metrics.jsonl becomes shorter (the workers were started again and have cut it back) it is read from its
    beginning again. Steps that were passed on before are done again bit for bit then, and not repeated; unless the run
    went back to do them on other text: the event, which is written before the file is cut, says to which step.

    Args:
        last_step: records up to it are not passed on.
        consume: is called with each record.
        logger: see make_logger; its `log` is not called.
    """

    def __init__(self, out_dir: Path, last_step: int, consume: Callable[[dict[str, Any]], None], logger: Any = None):
        self._metrics, self._events = Tail(out_dir / METRICS_NAME), Tail(out_dir / EVENTS_NAME)
        for file in (self._metrics, self._events):  # what is there is of earlier starts
            file.read()
        self._last_step = last_step
        self._consume, self._logger = consume, logger
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)

    def __enter__(self) -> Follower:
        self._thread.start()
        return self

    def __exit__(self, *exception) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(0.2):
            self._read_new()
        self._read_new()

    def _read_new(self) -> None:
        records, is_another = self._metrics.read()
        events, _ = self._events.read()
        if is_another:  # the events say why
            self._pass_on_events(events)
            self._pass_on(records)
        else:
            self._pass_on(records)
            self._pass_on_events(events)

    def _pass_on(self, records: list[dict[str, Any]]) -> None:
        for record in records:
            if record.get("step", 0) > self._last_step:
                self._last_step = record["step"]
                self._call(self._consume, record)

    def _pass_on_events(self, events: list[dict[str, Any]]) -> None:
        if self._logger is None:
            return
        for event in events:
            if event["event"] == "went back" and event["to_step"] < self._last_step:
                self._last_step = event["to_step"]
                self._call(self._logger.undo, event["to_step"])
            self._call(self._logger.event, event)

    def _call(self, function: Callable[[Any], None], argument: Any) -> None:
        try:
            function(argument)
        except Exception as error:  # a logger must not end a training run
            console.warn(f"logger: {type(error).__name__}: {error}")


class Tail:
    """What is new in a file of records; from its beginning, if it was replaced by a shorter one."""

    def __init__(self, path: Path):
        self._path = path
        self._offset = 0
        self._inode: int | None = None

    def read(self) -> tuple[list[dict[str, Any]], bool]:
        """New records, and whether they are of another file than those before."""
        is_another = False
        try:
            with open(self._path, "rb") as file:
                status = os.fstat(file.fileno())
                if status.st_ino != self._inode or status.st_size < self._offset:
                    is_another = True
                    self._inode, self._offset = status.st_ino, 0
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return [], False
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        return whole_records(whole), is_another
