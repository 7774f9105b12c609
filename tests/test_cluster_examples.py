"""The launchers in examples/: as much of them as can be checked without a cloud, a Kubernetes or a Slurm."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

EXAMPLES = ROOT / "examples"
KUBERAY = EXAMPLES / "kuberay"
YAML_FILES = sorted(EXAMPLES.rglob("*.yaml"))


def load(path: Path):
    return yaml.safe_load(path.read_text())


def ray_start_options() -> set[str]:
    from ray.scripts.scripts import start

    return {option for parameter in start.params for option in parameter.opts}


def check_ray_start(command: str) -> None:
    """Every flag exists in this Ray, and a head shows its dashboard to its own machine only."""
    arguments = re.split(r"&&|;|\|\||&(?!&)", command.partition("ray start")[2])[0].split()
    flags = {argument.partition("=")[0] for argument in arguments if argument.startswith("--")}
    assert flags and flags <= ray_start_options()
    if "--head" in flags:
        assert "--dashboard-host=127.0.0.1" in arguments
    else:
        assert "--address" in flags


@pytest.mark.parametrize("path", YAML_FILES, ids=lambda path: path.name)
def test_yaml_file_parses_and_says_how_to_use_it(path):
    assert isinstance(load(path), dict)
    header = path.read_text().partition("\n\n")[0]
    commands = re.findall(rf"^#   .*{re.escape(str(path.relative_to(ROOT)))}", path.read_text(), re.MULTILINE)
    assert header.startswith("# ") and commands, "the file begins with the commands that use it"


def test_aws_cluster_passes_rays_own_validation():
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = load(EXAMPLES / "ray-cluster-aws.yaml")
    validate_config(prepare_config(load(EXAMPLES / "ray-cluster-aws.yaml")))
    workers = config["available_node_types"]["h100"]
    assert workers["min_workers"] == workers["max_workers"] == config["max_workers"] == 4
    assert workers["node_config"]["InstanceType"] == "p5.48xlarge"
    assert workers["node_config"]["ImageId"] == config["available_node_types"]["head"]["node_config"]["ImageId"]


def test_aws_cluster_wants_the_token_and_mounts_the_shared_file_system():
    config = load(EXAMPLES / "ray-cluster-aws.yaml")
    assert config["file_mounts"]["/home/ubuntu/.ray/auth_token"] == "~/.ray/auth_token"
    starts = [
        command
        for key in ("head_start_ray_commands", "worker_start_ray_commands")
        for command in config[key]
        if "ray start" in command
    ]
    assert len(starts) == 2
    for command in starts:
        assert "RAY_AUTH_MODE=token ray start" in command
        check_ray_start(command)
    assert any("RAY_AUTH_MODE=token" in command for command in config["setup_commands"])
    assert any("mount -t nfs4" in command and "/shared" in command for command in config["setup_commands"])


@pytest.mark.parametrize("name", ["raycluster.yaml", "rayjob.yaml"])
def test_kuberay_manifest_is_locked_and_hangs_together(name):
    manifest = load(KUBERAY / name)
    assert manifest["apiVersion"] == "ray.io/v1"
    cluster = manifest["spec"] if manifest["kind"] == "RayCluster" else manifest["spec"]["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["rayVersion"] == importlib.metadata.version("ray")
    head, (workers,) = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    assert workers["replicas"] == workers["minReplicas"] == workers["maxReplicas"] == 4
    for group in (head, workers):
        assert {f"--{flag}" for flag in group["rayStartParams"]} <= ray_start_options()

    policy = load(KUBERAY / "network-policy.yaml")["spec"]
    labels = policy["podSelector"]["matchLabels"]
    assert policy["policyTypes"] == ["Ingress"]
    assert {"podSelector": {"matchLabels": labels}} in policy["ingress"][0]["from"]
    claim = load(KUBERAY / "storage.yaml")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    templates = [head["template"], workers["template"]]
    for template in templates:
        assert labels.items() <= template["metadata"]["labels"].items()
        volumes = {volume["name"]: volume for volume in template["spec"]["volumes"]}
        assert volumes["shared"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        (container,) = template["spec"]["containers"]
        assert {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]} == {
            "shared": "/shared",
            "shm": "/dev/shm",
        }
        assert {mount["name"] for mount in container["volumeMounts"]} == set(volumes)
    (worker,) = workers["template"]["spec"]["containers"]
    assert worker["resources"]["limits"]["nvidia.com/gpu"] == "8"
    assert "env" not in worker, "keys belong to the driver alone"


# Of the API ray.io/v1 (KubeRay 1.5.1), as far as a manifest of ours may use them.
RAY_FIELDS = {
    "job": {
        "entrypoint", "rayClusterSpec", "submitterPodTemplate", "submitterConfig", "shutdownAfterJobFinishes",
        "ttlSecondsAfterFinished", "activeDeadlineSeconds", "backoffLimit", "submissionMode", "suspend",
    },
    "cluster": {"rayVersion", "authOptions", "headGroupSpec", "workerGroupSpecs", "enableInTreeAutoscaling", "suspend"},
    "head": {"rayStartParams", "template", "serviceType", "headService", "enableIngress"},
    "workers": {
        "groupName", "replicas", "minReplicas", "maxReplicas", "numOfHosts", "rayStartParams", "template",
        "scaleStrategy",
    },
}  # fmt: skip


@pytest.mark.parametrize("name", ["raycluster.yaml", "rayjob.yaml"])
def test_kuberay_knows_every_field(name):
    spec = load(KUBERAY / name)["spec"]
    if "rayClusterSpec" in spec:
        assert set(spec) <= RAY_FIELDS["job"]
    cluster = spec.get("rayClusterSpec", spec)
    assert set(cluster) <= RAY_FIELDS["cluster"] and set(cluster["headGroupSpec"]) <= RAY_FIELDS["head"]
    for group in cluster["workerGroupSpecs"]:
        assert set(group) <= RAY_FIELDS["workers"]
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
    assert all(isinstance(value, str) for value in cluster["headGroupSpec"]["rayStartParams"].values())


@pytest.mark.parametrize("path", sorted(KUBERAY.glob("*.yaml")), ids=lambda path: path.name)
def test_kubernetes_knows_every_field(path):
    """Against Kubernetes' own schemas, without unknown fields: whole objects, and the pods inside Ray's."""
    import kubernetes_validate

    manifest = load(path)
    objects = [manifest]
    if manifest["apiVersion"] == "ray.io/v1":
        spec = manifest["spec"]
        cluster = spec.get("rayClusterSpec", spec)
        groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
        templates = [*(group["template"] for group in groups), spec.get("submitterPodTemplate")]
        objects = [
            {"apiVersion": "v1", "kind": "Pod", **template, "metadata": {"name": "x", **template.get("metadata", {})}}
            for template in templates
            if template
        ]
    for found in objects:
        kubernetes_validate.validate(found, "1.34", strict=True)


def test_kuberay_dashboard_is_on_localhost_unless_the_submitter_needs_it():
    cluster = load(KUBERAY / "raycluster.yaml")["spec"]
    assert cluster["headGroupSpec"]["rayStartParams"]["dashboard-host"] == "127.0.0.1"
    job = load(KUBERAY / "rayjob.yaml")["spec"]
    assert job["submitterPodTemplate"]["metadata"]["labels"] == {"app": "pretrain"}
    assert job["submitterPodTemplate"]["spec"]["restartPolicy"] == "Never"


def test_rayjob_runs_the_pipeline_with_settings_that_it_has():
    entrypoint = load(KUBERAY / "rayjob.yaml")["spec"]["entrypoint"].split()
    assert entrypoint[0] == "env" and entrypoint[-2] == "bash"
    settings = dict(word.split("=", 1) for word in entrypoint[1:-2])
    pipeline = (ROOT / "pipeline.sh").read_text()
    assert all(re.search(rf"^{name}=\$\{{{name}:-", pipeline, re.MULTILINE) for name in settings)
    assert all(value.startswith("/") for value in settings.values()), "a job has no working directory of its own"
    inside = Path(settings["CONFIG"]).relative_to("/opt/pretrain-toolkit")
    assert inside.parts[0] == "config_hub"


def test_sky_task_is_sound_shell_and_wants_the_token():
    task = load(EXAMPLES / "sky.yaml")
    assert task["secrets"]["RAY_AUTH_TOKEN"] is None, "given at launch, never in the file"
    pipeline = (ROOT / "pipeline.sh").read_text()
    assert all(f"{name}=${{{name}:-" in pipeline for name in task["envs"])
    assert "RAY_AUTH_MODE=token" in task["run"] and "ray stop" not in re.sub(r"#.*", "", task["run"])
    for line in task["run"].splitlines():
        if "ray start" in line and not line.lstrip().startswith("#"):
            check_ray_start(line)
    for script in (task["setup"], task["run"]):
        shellcheck(script, "-e", "SC1091")


def shellcheck(script: str, *flags: str) -> None:
    executable = Path(sys.executable).with_name("shellcheck")
    process = subprocess.run(
        [str(executable), "--shell=bash", *flags, "-"], input=script, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stdout


@pytest.mark.parametrize("path", sorted([*EXAMPLES.glob("*.sh"), ROOT / "pipeline.sh"]), ids=lambda path: path.name)
def test_shell_script_is_sound(path):
    subprocess.run(["bash", "-n", str(path)], check=True)
    shellcheck(path.read_text())


# ------------------------------------------------------------------------------------------------ Slurm

# What stands in for Slurm: it writes down what it was asked, and a step lasts until the trainer's stop file is there,
# or until the test lets it end.
SRUN = """#!/bin/bash
printf '%s\\n' "$@" > "$RECORD/srun.args"
env > "$RECORD/srun.env"
until [ -e "$WORK/run/stop" ] || [ -e "$RECORD/end" ]; do read -rt 0.05 <> <(:) || :; done
exit "$(cat "$RECORD/end" 2> /dev/null || echo 0)"
"""
SCONTROL = """#!/bin/bash
case $1 in
    show) printf 'node-a\\nnode-b\\n' ;;
    *) echo "$@" >> "$RECORD/scontrol" ;;
esac
"""


@pytest.fixture
def slurm(tmp_path):
    """(process of slurm.sh, directory in which the stand-ins write down what happens)"""
    submit, record, tools, home = (tmp_path / name for name in ("submit", "record", "tools", "home"))
    for directory in (submit / ".venv" / "bin", record, tools, home):
        directory.mkdir(parents=True)
    (submit / ".venv" / "bin" / "activate").write_text("")
    for name, content in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tools / name).write_text(content)
        (tools / name).chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{tools}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HOME": str(home),
        "RECORD": str(record),
        "WORK": str(tmp_path / "work"),
        "SLURM_SUBMIT_DIR": str(submit),
        "SLURM_JOB_NODELIST": "node-[a-b]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_CPUS_PER_TASK": "96",
        "SLURM_GPUS_PER_NODE": "8",
        "SLURM_JOB_ID": "4711",
    }
    environment.pop("RAY_AUTH_MODE", None)
    process = subprocess.Popen(["bash", str(EXAMPLES / "slurm.sh")], env=environment)
    while not (record / "srun.env").exists() and process.poll() is None:
        os.sched_yield()
    yield process, record, home
    if process.poll() is None:
        (record / "end").write_text("0")
        process.wait()


def test_slurm_job_starts_ray_on_every_node_with_a_token_of_its_own(slurm):
    from ray.scripts.symmetric_run import curate_and_validate_ray_start_args

    process, record, home = slurm
    (record / "end").write_text("0")
    assert process.wait(timeout=30) == 0
    arguments = (record / "srun.args").read_text().splitlines()
    command = arguments[arguments.index("ray") :]
    separator = command.index("--")
    assert command[:2] == ["ray", "symmetric-run"]
    assert command[2:6] == ["--address", "node-a:6379", "--min-nodes", "2"]
    assert command[separator + 1 :] == ["bash", "pipeline.sh"]
    for_ray_start = curate_and_validate_ray_start_args(command[2:separator])
    assert for_ray_start == ["--num-cpus=96", "--num-gpus=8", "--dashboard-host=127.0.0.1", "--disable-usage-stats"]
    assert {argument.partition("=")[0] for argument in for_ray_start} <= ray_start_options()

    environment = (record / "srun.env").read_text().splitlines()
    assert "RAY_AUTH_MODE=token" in environment
    token = home / ".ray" / "auth_token"
    assert len(token.read_text()) >= 32 and token.stat().st_mode & 0o077 == 0
    assert token.read_text() not in (record / "srun.env").read_text()
    assert not (record / "scontrol").exists()


def test_slurm_job_near_its_end_stops_the_trainer_and_queues_itself_again(slurm):
    process, record, _ = slurm
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 0
    assert (record / "scontrol").read_text() == "requeue 4711\n"


def test_slurm_job_fails_with_the_pipeline(slurm):
    process, record, _ = slurm
    (record / "end").write_text("3")
    assert process.wait(timeout=30) == 3
    assert not (record / "scontrol").exists()


# ------------------------------------------------------------------------------------------------ Docker


def test_dockerfile_is_sound():
    hadolint = Path(sys.executable).with_name("hadolint")
    process = subprocess.run([str(hadolint), str(EXAMPLES / "Dockerfile")], capture_output=True, text=True)
    assert process.returncode == 0, process.stdout


def test_dockerfile_installs_the_lock_and_does_not_run_as_root():
    lines = [
        line
        for line in (EXAMPLES / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
        if line and not line.startswith("#")
    ]
    instructions = [line.split(maxsplit=1) for line in lines]
    (base,) = [rest for word, rest in instructions if word == "FROM"]
    version = tuple(map(int, re.fullmatch(r"python:(\d+)\.(\d+)-slim-\w+", base).groups()))
    assert (3, 11) <= version < (3, 14), "requires-python of pyproject.toml"
    assert any("--require-hashes -r requirements.txt" in rest for word, rest in instructions if word == "RUN")
    assert [rest for word, rest in instructions if word == "USER"][-1] == "1000"
    assert not [rest for word, rest in instructions if word in ("ENV", "ARG") and re.search("TOKEN|KEY", rest)]


def test_image_has_what_the_scripts_need_and_nothing_else():
    """The build context by the rules of .dockerignore: later lines win, ! brings back."""
    rules = [
        line
        for line in (EXAMPLES / "Dockerfile.dockerignore").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    assert rules[0] == "*" and all(rule.startswith("!") for rule in rules[1:])
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
    kept = {name for name in tracked if any(matches(name, rule[1:]) for rule in rules[1:])}
    scripts = {
        name
        for name in tracked
        if re.fullmatch(
            r"[a-z_]+\.(py|sh)|(utils|tokenization|pretraining|export|tools)/[a-z_]+\.py"
            r"|export/.*\.jinja|config_hub/.*\.yaml",
            name,
        )
    }
    assert scripts | {"requirements.txt"} <= kept
    assert not {name for name in kept if name.startswith((".", "tests/", "docs/"))}


def matches(name: str, rule: str) -> bool:
    """Whether a rule of .dockerignore keeps a file: by its own name, or by that of a folder above it."""
    import fnmatch

    parts, rule_parts = name.split("/"), rule.split("/")
    above = parts[: len(rule_parts)]
    return len(above) == len(rule_parts) and all(map(fnmatch.fnmatchcase, above, rule_parts))


# ------------------------------------------------------------------------------------------------ the token


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@pytest.mark.slow
def test_cluster_with_a_token_serves_who_has_it_and_nobody_else(tmp_path, parquet_dir, tokenizer_dir, run_script):
    """`ray start` as the examples call it, on a free port, with a home of its own for the token."""
    ray = Path(sys.executable).with_name("ray")
    home = tmp_path / "home"
    home.mkdir()
    temporary = Path("/tmp") / f"ray-{os.getpid()}"  # the paths of Ray's sockets must stay short
    temporary.mkdir()
    environment = {**os.environ, "HOME": str(home), "RAY_AUTH_MODE": "token", "RAY_TMPDIR": str(temporary)}
    environment.pop("RAY_ADDRESS", None)
    subprocess.run([ray, "get-auth-token", "--generate"], env=environment, check=True, capture_output=True)
    address = f"127.0.0.1:{free_port()}"
    head = subprocess.Popen(
        [
            *(ray, "start", "--head", f"--port={address.rpartition(':')[2]}", "--include-dashboard=false"),
            *(f"--ray-client-server-port={free_port()}", "--num-cpus=2", "--block"),
        ],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        for line in head.stdout:
            if "Ray runtime started" in line:
                break
        flags = [f"--input_dir={parquet_dir}", f"--tokenizer_dir={tokenizer_dir}", f"--address={address}"]
        run_script("optimize_dataset.py", *flags, f"--output_dir={tmp_path / 'mine'}", env=environment)
        assert (tmp_path / "mine" / "manifest.json").exists()
        # Without a word about it: the cluster of this machine is found, and its token with it.
        environment_of_a_beginner = {name: value for name, value in environment.items() if name != "RAY_AUTH_MODE"}
        found = subprocess.run(
            [sys.executable, ROOT / "optimize_dataset.py", *flags[:2], f"--output_dir={tmp_path / 'found'}"],
            capture_output=True, text=True, env=environment_of_a_beginner, timeout=300,
        )  # fmt: skip
        assert found.returncode == 0 and "cluster: 1 node, 2 CPUs" in found.stdout, found.stdout + found.stderr
        for stranger in ({"RAY_AUTH_TOKEN": "guessed" * 8}, {"RAY_AUTH_MODE": "disabled"}):
            process = run_script(
                *("optimize_dataset.py", *flags, f"--output_dir={tmp_path / 'theirs'}"),
                env={**environment, **stranger},
                check=False,
            )
            assert process.returncode == 2
            assert f"--address={address}: the cluster wants a token" in process.stderr
            assert not (tmp_path / "theirs" / "train").exists()
    finally:
        head.terminate()
        head.communicate()
        shutil.rmtree(temporary, ignore_errors=True)
