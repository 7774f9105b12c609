"""Muon shared out among processes: the updates are those of one process, and those of torch's Muon."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch.distributed.fsdp import fully_shard

from pretraining.muon import SharedMuon, orthogonalize

SHAPES = [(24, 10), (7, 16), (24, 10), (24, 10), (7, 16), (1, 5)]  # 24 and 7 rows: uneven pieces, and tall and wide
OPTIONS = {"lr": 0.1, "weight_decay": 0.2, "momentum": 0.9}


class Matrices(torch.nn.Module):
    def __init__(self):
        super().__init__()
        random = torch.Generator().manual_seed(0)
        self.weights = torch.nn.ParameterList(torch.randn(shape, generator=random) for shape in SHAPES)

    def forward(self, step: int) -> torch.Tensor:
        random = torch.Generator().manual_seed(step)
        return sum((w * torch.randn(w.shape, generator=random)).sum() for w in self.weights)


def train(model: Matrices, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    for step in range(3):
        model(step).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [getattr(w, "full_tensor", lambda w=w: w)().detach() for w in model.weights]


def train_one_rank(rank: int, world_size: int, directory: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", f"file://{directory}/store", rank=rank, world_size=world_size)
    model = Matrices()
    fully_shard(model)
    weights = train(model, SharedMuon(model.parameters(), **OPTIONS))
    if rank == 0:
        torch.save(weights, f"{directory}/weights.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("world_size", [2, 3])
def test_updates_do_not_depend_on_the_number_of_processes(tmp_path, world_size):
    torch.multiprocessing.spawn(train_one_rank, (world_size, str(tmp_path)), nprocs=world_size)
    model = Matrices()
    alone = train(model, SharedMuon(model.parameters(), **OPTIONS))
    for shared, one, start in zip(torch.load(tmp_path / "weights.pt"), alone, Matrices().weights, strict=True):
        torch.testing.assert_close(shared, one, rtol=1e-5, atol=1e-5)
        assert (one - start).abs().max() > 0.05


def test_updates_are_those_of_torchs_muon_apart_from_its_rounding():
    ours, theirs = Matrices(), Matrices()
    after = train(ours, SharedMuon(ours.parameters(), **OPTIONS))
    wanted = train(theirs, torch.optim.Muon(theirs.parameters(), adjust_lr_fn="match_rms_adamw", **OPTIONS))
    for a, b, start in zip(after, wanted, Matrices().weights, strict=True):
        assert (a - b).norm() < 0.02 * (b - start).norm()  # theirs is in bfloat16


def test_rows_or_columns_become_nearly_orthonormal():
    matrices = torch.randn(3, 40, 12, generator=torch.Generator().manual_seed(1))
    result = orthogonalize(matrices, (3.4445, -4.775, 2.0315), 5, 1e-7)
    values = torch.linalg.svdvals(result)
    assert values.min() > 0.6 and values.max() < 1.25
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    cosine = torch.nn.functional.cosine_similarity(result.flatten(1), (left @ right).flatten(1))
    assert cosine.min() > 0.97
