"""What the driver asks of Ray for the training processes."""

from __future__ import annotations

import os

import pytest
import ray

from pretraining.cluster import placement_of
from pretraining.worker_environment import (
    GPU_DEFAULTS,
    ChooseInterface,
    forwarded_environment,
    interface_of,
    worker_environment,
)


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


def test_gloo_gets_the_interface_of_the_nodes_address_unless_the_user_says_another(monkeypatch):
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    ChooseInterface().after_init_train_context()
    assert os.environ["GLOO_SOCKET_IFNAME"] == interface_of(ray.util.get_node_ip_address())
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "mine0")
    ChooseInterface().after_init_train_context()
    assert os.environ["GLOO_SOCKET_IFNAME"] == "mine0"


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
