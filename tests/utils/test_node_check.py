"""Before the work, nodes that differ are named: a real cluster of two, one of which has another package version."""

from __future__ import annotations

import subprocess
import sys

from conftest import ROOT

PROGRAM = """
import sys
import ray
from utils.errors import UserError
from utils.node_check import check_nodes

ray.init(address=sys.argv[1], logging_level="ERROR")
try:
    print(len(check_nodes({"--output_dir": [sys.argv[2]]}, ("xxhash", "numpy"))), "nodes agree")
except UserError as error:
    print("\\n".join(error.problems))
"""


def check(address: str, path) -> str:
    process = subprocess.run(
        [sys.executable, "-c", PROGRAM, address, str(path)], capture_output=True, text=True, cwd=ROOT, timeout=180
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_nodes_that_differ_are_named(tmp_path):
    from ray.cluster_utils import Cluster

    other = tmp_path / "xxhash-0.0.1.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: xxhash\nVersion: 0.0.1\n")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        # A node with this one's software agrees; what does not exist is missed on both.
        cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        assert "2 nodes agree" in check(cluster.address, tmp_path)
        said = check(cluster.address, tmp_path / "nowhere")
        assert said.count(f"does not see --output_dir={tmp_path / 'nowhere'}") == 2

        odd = cluster.add_node(num_cpus=1, env_vars={"PYTHONPATH": str(tmp_path)})
        cluster.wait_for_nodes()
        said = check(cluster.address, tmp_path)
        assert said.count("xxhash 0.0.1, here ") == 1 and "numpy" not in said
        assert odd.unique_id[:8] in said or odd.node_id[:8] in said
    finally:
        cluster.shutdown()
