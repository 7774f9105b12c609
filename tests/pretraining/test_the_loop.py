"""What a step must not do: wait for its device more than once, or be paused by Python's garbage collector."""

from __future__ import annotations

import gc
import os
import pickle
import subprocess
import sys

from pretrain_ranks import ROOT, free_port, settings_of
from tiny_runs import write_config

from pretraining.profiling import STEPS_PER_COLLECTION, garbage_collected

COUNT_WAITS = """
import pickle, sys
import torch
from pathlib import Path
from torch.overrides import TorchFunctionMode
from pretraining.data import prefetch, rank_micro_batches
from pretraining.trainer import Trainer

class Waits(TorchFunctionMode):
    NAMES = {"item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__float__", "__int__", "__index__"}
    def __init__(self):
        super().__init__()
        self.found = []
    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func.__name__ in self.NAMES:
            self.found.append(func.__name__)
        return func(*args, **(kwargs or {}))

settings, plan = pickle.loads(Path(sys.argv[1]).read_bytes())
trainer = Trainer(settings, plan)
trainer.resume_or_initialise()
positions = rank_micro_batches(range(0, 5), settings.train, 0, 1)
batches = list(prefetch(trainer.sequences, positions, pin_memory=False))
batches = iter(batches)
trainer._train_step(batches)  # the optimizer makes its state
with Waits() as waits:
    for _ in range(3):
        trainer._train_step(batches)
print("waits", waits.found)
"""


def test_a_step_waits_for_its_device_once(tmp_path, dataset):
    from pretraining.plan import make_plan

    config = write_config(tmp_path / "tiny.yaml", train={"spike_sigma": 6})
    settings = settings_of(config, dataset, tmp_path / "run", 1)
    (tmp_path / "run").mkdir()
    job = tmp_path / "job.pickle"
    job.write_bytes(pickle.dumps((settings, make_plan(settings))))
    sizes = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": free_port()}
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in sizes.items()}}
    command = [sys.executable, "-c", COUNT_WAITS, str(job)]
    output = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert output.returncode == 0, output.stderr[-3000:]
    assert output.stdout.splitlines()[-1] == "waits ['tolist', 'tolist', 'tolist']"


def test_garbage_is_collected_at_the_same_steps_everywhere_and_never_in_between():
    collections = []

    def note(phase: str, info: dict) -> None:
        if phase == "start":
            collections.append(info["generation"])

    with garbage_collected() as after_step:
        gc.callbacks.append(note)
        try:
            for step in range(1, 2 * STEPS_PER_COLLECTION + 1):
                circles = [[] for _ in range(5000)]  # enough to start Python's own collector many times
                for circle in circles:
                    circle.append(circle)
                after_step()
                assert len(collections) == step // STEPS_PER_COLLECTION
        finally:
            gc.callbacks.remove(note)
    assert gc.isenabled()
