"""A copy of the model that lost a bit is found and named."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys

import pytest
import torch
from pretrain_ranks import ROOT, free_port, settings_of
from tiny_runs import write_config

from pretraining.plan import make_plan
from pretraining.replicas import fingerprint

FLIP_A_BIT = """
import os, pickle, sys
from pathlib import Path
import pytest
import torch
from pretraining.parallelism import local_shard
from pretraining.trainer import Trainer

settings, plan = pickle.loads(Path(sys.argv[1]).read_bytes())
trainer = Trainer(settings, plan)
trainer.resume_or_initialise()
step, update = [0], trainer._update

def flipping(*arguments):
    result = update(*arguments)
    step[0] += 1
    if step[0] == 3 and os.environ["RANK"] == "1":
        local_shard(trainer.parameters[-1]).view(torch.int32)[0] ^= 1
    return result

trainer._update = flipping
trainer.run()
"""


def test_any_one_bit_and_the_places_of_tensors_show():
    tensors = [torch.randn(40, 3), torch.randn(7).bfloat16(), torch.tensor(3.0)]
    before = fingerprint(tensors).item()
    assert fingerprint([tensors[0], tensors[2], tensors[1]]).item() != before
    for tensor, kind in zip(tensors, (torch.int32, torch.int16, torch.int32)):
        bits = tensor.view(kind).view(-1)
        for bit in range(8 * tensor.element_size() - 1):
            bits[-1] ^= 1 << bit
            assert fingerprint(tensors).item() != before
            bits[-1] ^= 1 << bit
    assert fingerprint(tensors).item() == before


@pytest.mark.slow
def test_a_bit_that_flips_in_one_copy_ends_the_run_on_all_processes(tmp_path, dataset):
    config = write_config(tmp_path / "tiny.yaml", train={"max_steps": 9}, eval={"interval": None})
    settings = settings_of(
        config, dataset, tmp_path / "run", 2, parallel__sharding="replicate", parallel__compare_copies_every=2
    )
    (tmp_path / "run").mkdir()
    job = tmp_path / "job.pickle"
    job.write_bytes(pickle.dumps((settings, make_plan(settings))))
    port, processes = str(free_port()), []
    for rank in ("0", "1"):
        sizes = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_PORT": port}
        environment = {**os.environ, **sizes, "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", FLIP_A_BIT, str(job)],
                cwd=ROOT,
                env=environment,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    for process in processes:
        _, said = process.communicate(timeout=240)
        assert process.returncode == 1
        assert "at step 4 copies of the model are no longer equal: processes 0, 1 hold" in said
