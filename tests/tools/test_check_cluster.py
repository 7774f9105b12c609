"""The check before training, on a real Ray cluster of two nodes whose processes meet over gloo."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from pretrain_ranks import free_port

from pretraining.hardware_check import HardwareReport, ProcessFigures, count_wrong_rows
from pretraining.node_facts import NodeFacts, cautions_of, differences_of, problems_of

# The command, with a matrix product of the test's own in its processes.
PROGRAM = """
import functools, os, sys
import torch
import torch.distributed as dist
from tools.check_cluster import Settings, main
from utils import cli

def slow_and_wrong(a, b, out):
    for _ in range(12 if dist.get_rank() == 1 else 1):
        torch.mm(a, b, out=out)
    if dist.get_rank() == 0:
        out[3, 5] += 1

def deadly(a, b, out):
    if dist.get_rank() == 1:
        os._exit(7)
    torch.mm(a, b, out=out)

cli.run(functools.partial(main, multiply=globals()[sys.argv.pop(1)]), Settings, "")
"""


# Two ranks, as training has them, in the short form.
RANK_PROGRAM = """
import os
import torch
import torch.distributed as dist
from pretraining.hardware_check import check_hardware
from utils.errors import UserError

def wrong_on_rank_1(a, b, out):
    torch.mm(a, b, out=out)
    if dist.get_rank() == 1:
        out[-1] = 0

torch.set_num_threads(1)
dist.init_process_group("gloo")
before = torch.get_rng_state()
check_hardware("here", os.environ["RANK"], 2, torch.device("cpu"))
assert torch.equal(torch.get_rng_state(), before)
try:
    check_hardware("here", os.environ["RANK"], 2, torch.device("cpu"), wrong_on_rank_1)
except UserError as error:
    print(error.problems)
"""


@pytest.fixture(scope="module")
def cluster():
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    cluster.add_node(num_cpus=2)
    cluster.wait_for_nodes()
    yield cluster
    cluster.shutdown()


def check(cluster, *arguments: str, multiply: str | None = None, code: int = 0) -> str:
    """What the command says, both streams together."""
    command = ["-m", "tools.check_cluster"] if multiply is None else ["-c", PROGRAM, multiply]
    process = subprocess.run(
        [sys.executable, *command, f"--address={cluster.address}", "--seconds=0.1", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=240,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    said = process.stdout + process.stderr
    assert process.returncode == code, said
    assert "Traceback" not in process.stderr, said
    return said


def test_a_sound_cluster_shows_a_table_and_a_report(cluster, tmp_path):
    out_dir = tmp_path / "out"
    out_dir.mkdir()
    said = check(
        cluster,
        "--accelerator=cpu",
        "--num_devices=2",
        "--compile",
        f"--out_dir={out_dir}",
        f"--output={tmp_path / 'report.json'}",
    )
    report = json.loads((tmp_path / "report.json").read_text())
    names = [node["node"] for node in report["nodes"]]
    assert len(set(names)) == 2 and all(said.count(name) >= 3 for name in names)  # a node, and its two processes
    assert [(process["node"], process["index"]) for process in report["processes"]] == [
        (name, index) for name in names for index in ("0", "1")
    ]
    for process in report["processes"]:
        assert process["tflop_s"] > 0 and process["memory_gb_s"] > 0 and process["all_reduce_gb_s"] > 0
        assert process["wrong"] == []
    assert report["all_reduce_gb_s"] > 0 and "all-reduce over all nodes: " in said
    for node in report["nodes"]:
        assert node["compiler"] and node["python_h"] and node["write_bytes_s"] > 0 and node["free_memory_bytes"] > 0
        assert node["cudnn_shadowed"] is None
    assert "checked 4 devices of 2 nodes" in said
    assert os.listdir(out_dir) == []


@pytest.mark.long
def test_a_slow_process_is_named_and_a_wrong_one_refused(cluster, tmp_path):
    output = tmp_path / "report.json"
    said = check(
        cluster,
        "--accelerator=cpu",
        "--slow_percent=30",
        f"--output={output}",
        multiply="slow_and_wrong",
        code=2,
    )
    report = json.loads(output.read_text())
    wrong, slow = (f"node {process['node']}, index 0 (CPU): " for process in report["processes"])
    assert f"warning: {slow}matrix product " in said and f"{wrong}matrix product " not in said
    assert f"error: {wrong}its matrix product is wrong in 1 row." in said and f"error: {slow}" not in said
    assert [process["wrong"] != [] for process in report["processes"]] == [True, False]


def test_a_cluster_that_is_too_small_is_said(cluster):
    said = check(cluster, "--accelerator=cpu", "--num_nodes=3", code=2)
    assert (
        "error: --num_nodes=3 with --num_devices=1: 2 nodes of the cluster have so many CPUs (per node: [2, 2])" in said
    )


@pytest.mark.slow
def test_a_process_that_dies_is_named(cluster):
    said = check(cluster, "--accelerator=cpu", multiply="deadly", code=2)
    assert said.count("error: ") == 1 and ", process 0: the process died while the devices were measured" in said


@pytest.mark.skipif(torch.cuda.is_available(), reason="shows what a machine says that has no working driver")
def test_a_driver_that_is_too_old_is_named_where_torch_itself_cannot_start(cluster, tmp_path):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 550.54.15\n")
    tool.chmod(0o755)
    node = cluster.add_node(num_cpus=1, num_gpus=1, env_vars={"PATH": f"{tmp_path}:{os.environ['PATH']}"})
    try:
        cluster.wait_for_nodes()
        said = check(cluster, code=2)
    finally:
        cluster.remove_node(node)
    assert said.count("error: ") == 1
    assert ": driver 550.54.15, torch's CUDA 13 needs 580 or newer. Install a newer driver on the node" in said


def test_the_short_form_lets_sound_processes_train_and_refuses_a_wrong_one_on_every_rank():
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK_PROGRAM],
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, **common, "RANK": str(rank)},
        )
        for rank in range(2)
    ]
    # Before the last line each rank says what it measured, rounded.
    said = [rank.communicate(timeout=120)[0].splitlines()[-1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    assert said[0] == said[1] and "node here, index 1 (CPU): its matrix product is wrong in 1 row." in said[0]


def test_settings_that_cannot_be_are_all_named(tmp_path):
    process = subprocess.run(
        [sys.executable, "-m", "tools.check_cluster", "--num_nodes=0", "--seconds=0", f"--out_dir={tmp_path / 'no'}"],
        capture_output=True, text=True, cwd=ROOT, timeout=60,
    )  # fmt: skip
    assert process.returncode == 2 and process.stderr.count("error: ") == 3
    for flag in ("--num_nodes=0", "--seconds=0", "--out_dir="):
        assert flag in process.stderr


# --- what the findings become, without a cluster ----------------------------------------------------------------------


def facts_of(**changes) -> NodeFacts:
    sound = {
        "node": "10.0.0.1 (aaaaaaaa)", "driver": "580.82.07", "cuda": "13.0", "cudnn": "9.24.0", "cudnn_shadowed": None,
        "nccl": "2.30.7", "num_gpus": 8, "gpu_error": None, "compiler": "/usr/bin/gcc", "python_h": True,
        "free_memory_bytes": 10**12, "write_bytes_s": 2e9, "write_error": None,
    }  # fmt: skip
    return NodeFacts(**{**sound, **changes})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, None),
        # A driver that serves is not refused for its number: NVIDIA's compatibility packages let older ones serve.
        ({"driver": "570.10"}, None),
        ({"driver": "570.10", "gpu_error": "too old."}, "driver 570.10, torch's CUDA 13 needs 580 or newer"),
        ({"driver": "520.1", "cuda": "12.8", "gpu_error": "too old."}, "torch's CUDA 12 needs 525 or newer"),
        ({"driver": None, "gpu_error": "No driver."}, "no NVIDIA driver answers"),
        ({"driver": "590.1", "gpu_error": "Error 802."}, "torch cannot use a GPU under driver 590.1: Error 802."),
        ({"cuda": None}, "its torch has no CUDA"),
        ({"num_gpus": 7}, "7 GPUs there, and 8 are wanted"),
        ({"compiler": None}, "no compiler, which torch.compile needs"),
        ({"python_h": False}, "no Python.h, which torch.compile needs"),
        ({"write_error": "Read-only file system"}, "cannot write to --out_dir=OUT (Read-only file system)"),
    ],
)
def test_what_a_node_lacks_is_said_with_a_remedy(changes, said):
    problems = problems_of(facts_of(**changes), "cuda", 8, "OUT", compiles=True)
    if said is None:
        assert problems == []
    else:
        assert len(problems) == 1 and problems[0].startswith("node 10.0.0.1 (aaaaaaaa): ") and said in problems[0]


def test_only_training_that_compiles_needs_a_compiler_and_only_cuda_a_driver():
    bare = facts_of(compiler=None, python_h=False, driver=None, gpu_error=None, cuda=None, num_gpus=0)
    assert problems_of(bare, "cpu", 8, None, compiles=False) == []


def test_a_shadowed_cudnn_a_slow_disk_and_versions_that_differ_are_warned_of():
    nodes = [
        facts_of(),
        facts_of(node="b", cudnn="9.10.2", cudnn_shadowed="9.24.0"),
        facts_of(node="c", write_bytes_s=0.9e9),
    ]
    shadowed, slow = cautions_of(nodes)
    assert (
        shadowed.startswith("node b: torch found cuDNN 9.10.2, not its wheel's 9.24.0")
        and "LD_LIBRARY_PATH" in shadowed
    )
    assert slow.startswith("node c: writes 900.0 MB/s to out_dir, the median is 2.0 GB/s.")
    assert differences_of(nodes) == ["cudnn differs between the nodes: 9.10.2 on b; 9.24.0 on the others."]


def report_of(*tflop_s: float, all_reduce: tuple = (), **changes) -> HardwareReport:
    processes = [
        ProcessFigures(
            f"node-{rank // 2}", str(rank % 2), "H100", rate, 3000.0, all_reduce[rank] if all_reduce else None, 80.0, []
        )
        for rank, rate in enumerate(tflop_s)
    ]
    return HardwareReport(processes, None, 1.0)


def test_more_than_a_tenth_below_the_median_is_slow():
    assert report_of(700, 690, 710, 631).slow() == []
    assert report_of(700, 690, 710, 620).slow() == [
        "node node-1, index 1 (H100): matrix product 620 TFLOP/s, 11% below the median of 695."
    ]
    assert report_of(700).slow() == []


def test_a_node_whose_links_are_slow_is_named_once():
    assert report_of(700, 700, 700, 700, 700, 700, all_reduce=(400, 400, 400, 400, 200, 201)).slow() == [
        "node node-2: all-reduce in the node 200 GB/s, 50% below the median of 400."
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_wrong_row_of_a_product_is_counted(dtype):
    generator = torch.Generator().manual_seed(3)
    a = torch.randint(-1, 2, (300, 200), generator=generator).to(dtype)
    b = torch.randint(-1, 2, (200, 100), generator=generator).to(dtype)
    product = (a.double() @ b.double()).to(dtype)
    assert count_wrong_rows(a, b, product) == 0
    product[7, 99] += 1
    product[7, 3] -= 1
    product[299, 0] = float("nan")
    product[0] = float("inf")
    assert count_wrong_rows(a, b, product) == 3
