"""Step 1 under SIGKILL, Ctrl-C, lost nodes, full disks and rotten files: the same bytes in the end, or a clear word."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, write_parquet
from input_kinds import write_several

from tokenization.chunk_reader import read_document_offsets
from utils.files import held_lock

WAIT_S = 120


# Of the files, in the order of their paths: every kind is there.
ENDINGS = (".parquet", ".jsonl", ".arrow", ".jsonl.gz", ".file.arrow", ".jsonl.zst", ".jsonl", ".parquet")


@pytest.fixture(scope="module")
def many_inputs(tmp_path_factory, documents) -> Path:
    """Eight times the documents, each made unlike the others; some 40 units of 100 kB."""
    directory = tmp_path_factory.mktemp("many")
    for part, ending in enumerate(ENDINGS):
        texts = [f"Part {part}, section {i}.\n\n{text}" for i, text in enumerate(documents)]
        write_several(directory, f"{part:03}", ending, texts)
    return directory


def command(inputs: Path, tokenizer: Path, output: Path, *more: str) -> list[str]:
    return [
        sys.executable,
        str(ROOT / "optimize_dataset.py"),
        f"--input_dir={inputs}",
        f"--tokenizer_dir={tokenizer}",
        f"--output_dir={output}",
        "--val_fraction=0.05",
        "--unit_bytes=100000",
        "--chunk_tokens=20000",
        "--num_workers=2",  # so that the work lasts, on whatever machine
        *more,
    ]


def merged(run_script, output: Path) -> dict[str, bytes]:
    """Every byte of the merged dataset."""
    found = {}
    for split in ("train", "val"):
        target = output.with_name(output.name + "-merged") / split
        run_script("merge_files.py", f"--source_dir={output / split}", f"--target_dir={target}")
        found |= {f"{split}/{path.name}": path.read_bytes() for path in target.iterdir()}
    return found


def assert_tidy(output: Path) -> None:
    assert not [path for path in output.rglob("*") if path.name.startswith(".tmp-")]
    for split in ("train", "val"):
        for folder in (output / split).iterdir():
            if folder.is_dir():
                listed = {entry["filename"] for entry in json.loads((folder / "index.json").read_text())["chunks"]}
                assert listed == {path.name for path in folder.glob("*.bin")}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, many_inputs, tokenizer_dir, ray_address) -> dict[str, bytes]:
    """The merged dataset of one worker on one node that nothing happened to."""
    from conftest import run_a_script

    output = tmp_path_factory.mktemp("undisturbed") / "OUT"
    subprocess.run(
        command(many_inputs, tokenizer_dir, output, "--num_workers=1", f"--address={ray_address}"),
        check=True,
        timeout=300,
    )
    return merged(run_a_script, output)


@contextlib.contextmanager
def ray_nodes(num_nodes: int) -> Iterator:
    """A cluster of its own; every node is a raylet with one CPU."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        for _ in range(num_nodes - 1):
            cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        yield cluster
    finally:
        cluster.shutdown()


def wait_for(condition: Callable, process: subprocess.Popen):
    """Poll until `condition` gives something, while the script lives."""
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        found = condition()
        if found:
            return found
        assert process.poll() is None, "the script ended before it could be disturbed"
        time.sleep(0.005)
    raise AssertionError("what was waited for did not happen")


def busy_workers() -> list[psutil.Process]:
    """Ray names a worker process after the task that it runs."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if (process.info["cmdline"] or [""])[0].startswith("ray::tokenize_on_node"):
            found.append(process)
    return found


def local_workers(process: subprocess.Popen) -> list[psutil.Process]:
    """The worker processes of a run without a cluster."""
    with contextlib.suppress(psutil.NoSuchProcess):
        children = psutil.Process(process.pid).children()
        return [child for child in children if "spawn_main" in " ".join(child.cmdline())]
    return []


def blocks_ctrl_c(process: psutil.Process) -> bool:
    status = Path(f"/proc/{process.pid}/status").read_text()
    blocked = int(re.search(r"SigBlk:\s+(\w+)", status)[1], 16)
    return bool(blocked >> (signal.SIGINT - 1) & 1)


@pytest.fixture(params=["cluster", "machine"])
def where(request) -> str:
    """The flag that runs the units as tasks of a Ray cluster, or in processes of this machine."""
    return f"--address={request.getfixturevalue('ray_address') if request.param == 'cluster' else 'local'}"


def ended(processes: list[psutil.Process]) -> bool:
    """Whether they end by themselves; one that nobody buries has ended too."""

    def runs(process: psutil.Process) -> bool:
        try:
            return process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    deadline = time.monotonic() + WAIT_S
    while any(map(runs, processes)) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not any(map(runs, processes))


def finished_units(output: Path) -> int:
    path = output / "progress.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def kill_after(num_units: int, arguments: list[str], output: Path) -> None:
    """Start the script, and kill it once so many units are finished."""
    process = subprocess.Popen(arguments, start_new_session=True)
    wait_for(lambda: finished_units(output) >= num_units, process)
    process.kill()
    process.wait(WAIT_S)


def test_two_workers_and_three_nodes_give_the_same_bytes(run_script, many_inputs, tokenizer_dir, undisturbed, tmp_path):
    with ray_nodes(3) as cluster:
        subprocess.run(
            command(many_inputs, tokenizer_dir, tmp_path / "three", f"--address={cluster.address}"),
            check=True,
            timeout=300,
        )
    folders = {path.name for path in (tmp_path / "three" / "train").iterdir() if path.is_dir()}
    assert len(folders) >= 2  # the work was really spread
    assert merged(run_script, tmp_path / "three") == undisturbed
    subprocess.run(
        command(many_inputs, tokenizer_dir, tmp_path / "two", "--address=local"),
        check=True,
        timeout=300,
    )
    assert merged(run_script, tmp_path / "two") == undisturbed


def test_killed_worker_is_retried(run_script, many_inputs, tokenizer_dir, undisturbed, tmp_path):
    with ray_nodes(1) as cluster:
        process = subprocess.Popen(
            command(many_inputs, tokenizer_dir, tmp_path / "out", f"--address={cluster.address}")
        )
        for _ in range(2):
            victim = wait_for(busy_workers, process)[0]
            victim.kill()
            victim.wait(WAIT_S)
        assert process.wait(WAIT_S) == 0
    assert merged(run_script, tmp_path / "out") == undisturbed
    assert_tidy(tmp_path / "out")


def test_killed_local_worker_is_retried(run_script, many_inputs, tokenizer_dir, undisturbed, tmp_path):
    output = tmp_path / "out"
    process = subprocess.Popen(command(many_inputs, tokenizer_dir, output, "--address=local"))
    for units in (0, 3):  # while it loads the tokenizer, and at work
        wait_for(lambda units=units: finished_units(output) >= units, process)
        wait_for(lambda: local_workers(process), process)[0].kill()
    assert process.wait(WAIT_S) == 0
    assert merged(run_script, output) == undisturbed
    assert_tidy(output)


def test_worker_that_always_dies_ends_the_run_with_a_word(many_inputs, tokenizer_dir, tmp_path):
    arguments = command(many_inputs, tokenizer_dir, tmp_path / "out", "--address=local", "--num_workers=1")
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True)
    killed = set()
    while process.poll() is None:
        for victim in local_workers(process):
            with contextlib.suppress(psutil.NoSuchProcess):
                victim.kill()
                killed.add(victim.pid)
    said = process.stderr.read()
    assert process.returncode == 2 and "Traceback" not in said
    assert len(killed) == 4 and "died 4 times" in said and "--num_workers" in said


@pytest.mark.parametrize(
    "after_units", [pytest.param(0, marks=pytest.mark.slow), 5, pytest.param(20, marks=pytest.mark.slow)]
)
def test_killed_driver_is_resumed_by_the_same_command(
    run_script, many_inputs, tokenizer_dir, undisturbed, tmp_path, where, after_units
):
    output = tmp_path / "out"
    arguments = command(many_inputs, tokenizer_dir, output, where)
    process = subprocess.Popen(arguments)
    wait_for(lambda: (output / "plan.json").exists() and finished_units(output) >= after_units, process)
    orphans = local_workers(process)
    process.kill()
    process.wait(WAIT_S)
    assert ended(orphans)
    before = finished_units(output)
    (output / "progress.jsonl").open("ab").write(b'{"unit": 3, "fol')  # a line that a crash cut off
    (output / "train" / "0").mkdir(parents=True, exist_ok=True)
    (output / "train" / "0" / ".tmp-chunk-0000001-0.bin-0123456789ab").write_bytes(b"half a chunk")

    again = subprocess.run(arguments, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stdout + again.stderr
    if after_units:
        assert f"resume: {before} of" in again.stdout
    assert merged(run_script, output) == undisturbed
    assert_tidy(output)


def test_lost_chunk_of_a_finished_unit_is_made_again(
    run_script, many_inputs, tokenizer_dir, undisturbed, tmp_path, ray_address
):
    output = tmp_path / "out"
    arguments = command(many_inputs, tokenizer_dir, output, f"--address={ray_address}")
    kill_after(5, arguments, output)
    sorted((output / "train").rglob("*.bin"))[0].unlink()
    subprocess.run(arguments, check=True, timeout=300)
    assert merged(run_script, output) == undisturbed


@pytest.mark.slow
def test_lost_node_is_survived(run_script, many_inputs, tokenizer_dir, undisturbed, tmp_path):
    with ray_nodes(2) as cluster:
        output = tmp_path / "out"
        process = subprocess.Popen(command(many_inputs, tokenizer_dir, output, f"--address={cluster.address}"))
        wait_for(lambda: finished_units(output) >= 3, process)
        cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)
        assert process.wait(WAIT_S) == 0
    assert merged(run_script, output) == undisturbed
    assert_tidy(output)


def test_ctrl_c_stops_within_seconds_and_says_how_to_go_on(
    run_script, many_inputs, tokenizer_dir, undisturbed, tmp_path, where
):
    output = tmp_path / "out"
    arguments = command(many_inputs, tokenizer_dir, output, where)
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, start_new_session=True)
    wait_for(lambda: finished_units(output) >= 2, process)
    workers = local_workers(process)
    assert all(map(blocks_ctrl_c, workers))  # the parent ends them
    pressed = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, said = process.communicate(timeout=WAIT_S)
    assert time.monotonic() - pressed < 10 and ended(workers)
    assert process.returncode == 130 and "Traceback" not in said
    assert "The same command goes on" in said and f"--output_dir={output}" in said
    subprocess.run(arguments, check=True, timeout=300)
    assert merged(run_script, output) == undisturbed


def test_ctrl_c_while_the_workers_start_is_quiet(many_inputs, tokenizer_dir, tmp_path):
    arguments = command(many_inputs, tokenizer_dir, tmp_path / "out", "--address=local")
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, start_new_session=True)
    workers = wait_for(lambda: local_workers(process), process)
    for _ in range(5):  # an impatient one, while the work is being put away
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=WAIT_S)
    assert process.returncode == 130 and "Traceback" not in said and said.count("The same command goes on") == 1
    assert ended(workers)


def test_two_runs_on_one_output_do_not_meet(many_inputs, tokenizer_dir, tmp_path, ray_address):
    output = tmp_path / "out"
    arguments = command(many_inputs, tokenizer_dir, output, f"--address={ray_address}")
    first = subprocess.Popen(arguments)
    wait_for(lambda: finished_units(output) >= 1, first)
    second = subprocess.run(arguments, capture_output=True, text=True, timeout=60)
    assert second.returncode == 2 and "another optimize_dataset.py" in second.stderr
    assert first.wait(WAIT_S) == 0


def test_full_disk(run_script, many_inputs, tokenizer_dir, undisturbed, small_disk, where):
    subprocess.run(["mount", "-o", "remount,size=1m", small_disk], check=True)
    output = small_disk / "out"
    arguments = command(many_inputs, tokenizer_dir, output, where)
    full = subprocess.run(arguments, capture_output=True, text=True, timeout=300)
    assert full.returncode == 2 and "Traceback" not in full.stderr, full.stderr
    assert "the disk is full" in full.stderr or "needs more than" in full.stderr
    assert not list(output.rglob(".tmp-*"))
    for path in output.rglob("*.bin"):
        assert read_document_offsets(path)[-1] == path.stat().st_size  # whole, or not there
    subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
    subprocess.run(arguments, check=True, timeout=300)
    assert_tidy(output)
    assert merged(run_script, output) == undisturbed


def rotten_file(path: Path, documents: list[str]) -> None:
    """A good footer, and a page in the middle whose bytes are not what they were."""
    table = pa.table({"text": documents[:40]})
    pq.write_table(table, path, row_group_size=10, compression="none", use_dictionary=False, write_page_checksum=True)
    column = pq.read_metadata(path).row_group(2).column(0)
    raw = bytearray(path.read_bytes())
    middle = column.data_page_offset + column.total_compressed_size // 2
    raw[middle : middle + 8] = b"\xff" * 8
    path.write_bytes(raw)


def test_rotten_page_is_caught_when_read_with_file_and_row_group(
    run_script, tokenizer_dir, documents, tmp_path, ray_address
):
    (tmp_path / "in").mkdir()
    rotten_file(tmp_path / "in" / "rotten.parquet", documents)
    write_parquet(tmp_path / "in" / "good.parquet", documents[40:60])
    arguments = command(tmp_path / "in", tokenizer_dir, tmp_path / "out", f"--address={ray_address}")
    failed = subprocess.run(arguments, capture_output=True, text=True, timeout=120)
    assert failed.returncode == 2 and "Traceback" not in failed.stderr
    assert "rotten.parquet, row group 2" in failed.stderr and "--on_bad_file=quarantine" in failed.stderr

    arguments = command(
        tmp_path / "in", tokenizer_dir, tmp_path / "kept", "--on_bad_file=quarantine", f"--address={ray_address}"
    )
    kept = subprocess.run(arguments, capture_output=True, text=True, timeout=120)
    assert kept.returncode == 0, kept.stderr
    entry = json.loads((tmp_path / "kept" / "quarantine.jsonl").read_text())
    assert (entry["path"], entry["row_group"]) == ("rotten.parquet", 2) and entry["reason"]
    content = json.loads((tmp_path / "kept" / "manifest.json").read_text())["content"]
    assert content["train"]["documents"] + content["val"]["documents"] == 50


def test_text_that_is_not_utf8_is_caught(tokenizer_dir, documents, tmp_path, ray_address):
    bad = pa.array([b"good enough", b"bad \xff\xfe"]).view(pa.binary())
    text = pa.StringArray.from_buffers(2, bad.buffers()[1], bad.buffers()[2])
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"text": text}), tmp_path / "in" / "latin.parquet")
    arguments = command(tmp_path / "in", tokenizer_dir, tmp_path / "out", f"--address={ray_address}")
    failed = subprocess.run(arguments, capture_output=True, text=True, timeout=120)
    assert failed.returncode == 2 and "latin.parquet, row group 0" in failed.stderr and "UTF" in failed.stderr.upper()


@pytest.mark.slow
def test_extreme_shapes_stay_below_a_gigabyte(tokenizer_dir, documents, tmp_path, ray_address):
    """One document of 100 MB, a row group of a million rows, 3,000 one-row row groups."""
    (tmp_path / "in").mkdir()
    long = "\n\n".join(f"{i}: {documents[i % len(documents)]}" for i in range(80_000))[:100_000_000]
    pq.write_table(pa.table({"text": [long, documents[0]]}), tmp_path / "in" / "long.parquet")
    rows = pa.array([f"{i} {documents[i % 50][:200]}" for i in range(1_000_000)])
    pq.write_table(pa.table({"text": rows}), tmp_path / "in" / "million.parquet", row_group_size=1_000_000)
    write_parquet(
        tmp_path / "in" / "tiny.parquet", [f"{i} {documents[i % 50][:99]}" for i in range(3000)], row_group_size=1
    )
    arguments = command(tmp_path / "in", tokenizer_dir, tmp_path / "out", f"--address={ray_address}")
    arguments = [part for part in arguments if not part.startswith(("--unit_bytes", "--chunk_tokens"))]
    subprocess.run(arguments, check=True, timeout=500)
    records = [json.loads(line) for line in (tmp_path / "out" / "progress.jsonl").read_text().splitlines()]
    assert sum(record["train"]["documents"] + record["val"]["documents"] for record in records) == 1_003_002
    assert max(record["peak_bytes"] for record in records) < 1_000_000_000


def test_a_second_run_is_refused_before_it_writes_its_plan(run_script, tmp_path, parquet_dir, tokenizer_dir):
    (output := tmp_path / "OUT").mkdir()
    with held_lock(output) as mine:
        assert mine
        second = run_script(
            "optimize_dataset.py",
            *(f"--input_dir={parquet_dir}", f"--tokenizer_dir={tokenizer_dir}", f"--output_dir={output}"),
            "--address=local",
            check=False,
        )
    assert second.returncode == 2 and "another optimize_dataset.py writes there" in second.stderr
    assert not list(output.iterdir())
