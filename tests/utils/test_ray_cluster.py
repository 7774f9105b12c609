"""Which cluster a script takes: the one that it is told, the one that runs here, or none."""

from __future__ import annotations

import socket

import pytest

from utils import ray_cluster
from utils.errors import UserError


@pytest.fixture(params=["RAY_TMPDIR", "TMPDIR"])
def note(request, tmp_path, monkeypatch):
    """Where `ray start` leaves its address, in a temporary directory of the test's own."""
    from ray._private.utils import get_ray_address_file

    monkeypatch.setenv(request.param, str(tmp_path))
    for name in {"RAY_TMPDIR", "TMPDIR", "RAY_ADDRESS"} - {request.param}:
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "ray").mkdir()
    path = tmp_path / "ray" / "ray_current_cluster"
    assert get_ray_address_file(None) == str(path), "Ray keeps its note elsewhere"
    return path


@pytest.fixture
def listening():
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def silent():
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    return address


def test_none_runs(note):
    assert ray_cluster.find_cluster(None) is None
    assert ray_cluster.find_cluster("auto") == "auto"  # Ray looks for one elsewhere, and says if there is none


def test_the_running_one_is_found(note, listening):
    note.write_text(listening)
    assert ray_cluster.find_cluster(None) == ray_cluster.find_cluster("auto") == "auto"
    assert ray_cluster.find_cluster("local") is None


def test_one_that_died_is_passed_over_with_a_word(note, silent, capsys):
    note.write_text(silent)
    assert ray_cluster.find_cluster(None) is None
    assert f"started here at {silent} is gone" in capsys.readouterr().err
    with pytest.raises(UserError, match=f"--address=auto: the Ray cluster that was started here at {silent} is gone"):
        ray_cluster.find_cluster("auto")


def test_an_address_that_was_given_must_answer(note, listening, silent, monkeypatch):
    assert ray_cluster.find_cluster(listening) == listening
    with pytest.raises(UserError, match=f"--address={silent}: no Ray cluster answers"):
        ray_cluster.find_cluster(silent)
    monkeypatch.setenv("RAY_ADDRESS", silent)
    with pytest.raises(UserError, match=f"RAY_ADDRESS={silent}: no Ray cluster answers"):
        ray_cluster.find_cluster(None)
    with pytest.raises(UserError, match="no Ray cluster answers"):
        ray_cluster.find_cluster("no-port")
    with pytest.raises(UserError, match="--address=ray://x:1: Ray's client"):
        ray_cluster.find_cluster("ray://x:1")


def test_an_address_where_nobody_is_is_the_users_error(run_script, tmp_path, parquet_dir, tokenizer_dir):
    flags = [f"--input_dir={parquet_dir}", f"--tokenizer_dir={tokenizer_dir}", f"--output_dir={tmp_path / 'out'}"]
    process = run_script("optimize_dataset.py", *flags, "--address=127.0.0.1:1", check=False)
    assert process.returncode == 2 and "no Ray cluster answers at 127.0.0.1:1" in process.stderr
