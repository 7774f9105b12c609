"""What the driver asks of Ray for the training processes."""

from __future__ import annotations

import pytest

from pretraining.cluster import placement_of
from pretraining.worker_environment import GPU_DEFAULTS, forwarded_environment, worker_environment


def test_settings_of_the_libraries_are_handed_on_and_secrets_are_not():
    environment = {
        "NCCL_DEBUG": "INFO",
        "FI_PROVIDER": "efa",
        "HOME": "/root",
        "TORCH_HUB_TOKEN": "x",
        "WANDB_API_KEY": "y",
    }
    assert forwarded_environment(environment) == {"NCCL_DEBUG": "INFO", "FI_PROVIDER": "efa"}


def test_the_users_own_values_win_over_defaults():
    found = worker_environment({"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, "cuda")
    assert found == {**GPU_DEFAULTS, "PYTORCH_CUDA_ALLOC_CONF": "backend:native"}
    assert worker_environment({}, "cpu") == {}


@pytest.mark.parametrize(
    "num_nodes, num_devices, room, expected",
    [
        (1, 2, [8, 8], "PACK"),
        (4, 8, [8, 8, 8, 8, 8], "PACK"),  # a spare node stays empty
        (2, 1, [4, 4], "SPREAD"),  # both would fit on one node
    ],
)
def test_whole_nodes_are_filled(num_nodes, num_devices, room, expected):
    assert placement_of(num_nodes, num_devices, room) == expected
