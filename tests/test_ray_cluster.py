"""Which cluster a script takes: the one that it is told, the one that runs here, or none."""

from __future__ import annotations

import socket

import pytest

from utils import ray_cluster
from utils.errors import UserError


@pytest.fixture
def note(tmp_path, monkeypatch):
    """Where `ray start` leaves its address, in a temporary directory of the test's own."""
    from ray._private.utils import get_ray_address_file

    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
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
    with pytest.raises(UserError, match="--address=auto: no Ray cluster runs on this machine"):
        ray_cluster.find_cluster("auto")


def test_the_running_one_is_found(note, listening):
    note.write_text(listening)
    assert ray_cluster.find_cluster(None) == ray_cluster.find_cluster("auto") == listening
    assert ray_cluster.find_cluster("local") is None


def test_one_that_died_is_passed_over_with_a_word(note, silent, capsys):
    note.write_text(silent)
    assert ray_cluster.find_cluster(None) is None
    assert f"started here at {silent} is gone" in capsys.readouterr().err


def test_an_address_that_was_given_must_answer(note, listening, silent, monkeypatch):
    assert ray_cluster.find_cluster(listening) == listening
    with pytest.raises(UserError, match=f"--address={silent}: no Ray cluster answers"):
        ray_cluster.find_cluster(silent)
    monkeypatch.setenv("RAY_ADDRESS", silent)
    with pytest.raises(UserError, match=f"RAY_ADDRESS={silent}: no Ray cluster answers"):
        ray_cluster.find_cluster(None)
    with pytest.raises(UserError, match="no Ray cluster answers"):
        ray_cluster.find_cluster("no-port")
