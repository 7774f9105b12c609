"""Tokenization on a Ray cluster: units are tasks on all nodes, which Ray tries again when a process or node dies."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ray

from tokenization.encoder import PreparedTokenizer
from tokenization.job import Job, Unit, UnitRecord
from tokenization.tokenize_unit import process_encoder, tokenize_unit
from tokenization.workers import MAX_RETRIES, WorkerDied, Workers
from utils.node_check import check_nodes, probe_in

CHECKED_PACKAGES = ("ray", "pyarrow", "gigatoken", "tokenizers", "awkward", "numpy", "xxhash")


class RayWorkers(Workers):
    """Tasks on the cluster that this process is connected to.

    Args:
        num_workers: tasks at a time; None: two per CPU, so that the next task is ready when one ends.
        job: its directories must be seen by every node.
        load_tokenizer: prepares the tokenizer; called once, in a thread.
        max_retries: how often a unit is tried again when its process died.

    Raises:
        UserError: a node has other packages, or does not see the input or the output.
    """

    def __init__(
        self,
        num_workers: int | None,
        job: Job,
        load_tokenizer: Callable[[], PreparedTokenizer],
        max_retries: int = MAX_RETRIES,
    ):
        with ThreadPoolExecutor(1) as thread:
            tokenizer = thread.submit(load_tokenizer)
            self.nodes = _check_nodes(job)
            self._tokenizer = ray.put(tokenizer.result())
        self._folders = {node["id"]: str(i) for i, node in enumerate(self.nodes)}
        self._num_workers = num_workers
        self._task = ray.remote(num_cpus=1, max_retries=max_retries, scheduling_strategy="SPREAD")(tokenize_on_node)
        self._running: dict[Any, Unit] = {}
        self._jobs: dict[int, tuple[Job, Any]] = {}

    def num_cpus(self) -> int:
        return int(ray.cluster_resources().get("CPU", 1)) or 1

    def num_free(self) -> int:
        return (self._num_workers or 2 * self.num_cpus()) - len(self._running)

    def submit(self, job: Job, unit: Unit) -> None:
        if id(job) not in self._jobs:
            self._jobs[id(job)] = (job, ray.put(job))
        reference = self._task.remote(self._jobs[id(job)][1], unit, self._folders, [self._tokenizer])
        self._running[reference] = unit

    def finished(self) -> list[tuple[Unit, UnitRecord | Exception]]:
        done: list[tuple[Unit, UnitRecord | Exception]] = []
        # Not for ever: nodes that have joined meanwhile should get units.
        for reference in ray.wait(list(self._running), num_returns=1, timeout=10)[0]:
            unit = self._running.pop(reference)
            try:
                done.append((unit, ray.get(reference)))
            except ray.exceptions.RayTaskError as error:
                done.append((unit, error.cause if isinstance(error.cause, Exception) else error))
            except ray.exceptions.RayError as error:  # a process or node died too often: out of memory, or taken away
                done.append((unit, WorkerDied(f"{type(error).__name__}: {str(error).splitlines()[0]}")))
        return done


def _check_nodes(job: Job) -> list[dict[str, str]]:
    seen_by_all = {} if "://" in job.input_dir else {"--input_dir": [job.input_dir]}
    with probe_in(job.output_dir) as probe:
        return check_nodes({"--output_dir": [probe], **seen_by_all}, CHECKED_PACKAGES)


def tokenize_on_node(job: Job, unit: Unit, folders: dict[str, str], tokenizer: list) -> UnitRecord:
    """The Ray task. `tokenizer` holds a reference, so that only a process that needs the files' content fetches it."""
    node_id = ray.get_runtime_context().get_node_id()
    folder = folders.get(node_id, f"node-{node_id[:12]}")  # a node that joined after the start
    encoder = process_encoder(job, lambda: ray.get(tokenizer[0]))
    return tokenize_unit(job, unit, folder, encoder)
