"""What a local worker process says when its work fails; its deaths are in test_optimize_dataset_crashes.py."""

from __future__ import annotations

import contextlib
import multiprocessing
import pickle
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from conftest import ROOT

from tokenization.job import HASH_RANGE, InputRange, Job, Unit
from tokenization.local_workers import LocalWorkers
from tokenization.parquet import CorruptRowGroup
from tokenization.prepared_tokenizer import prepare_tokenizer
from tokenization.unit_server import _as_message
from tokenization.worker_process import _deaf, end_early, start_early


class TakesTwo(Exception):
    def __init__(self, one, two):
        super().__init__(one)


class Panic(BaseException):
    pass


def raised(error: BaseException) -> BaseException:
    try:
        raise error
    except BaseException as caught:
        return caught


def test_an_error_that_can_travel_travels_with_its_traceback():
    message = _as_message(raised(CorruptRowGroup(1, 2, 3, "bad page")))
    assert isinstance(message, CorruptRowGroup) and message.row_group == 2
    assert "bad page" in message.__notes__[0] and "Traceback" in message.__notes__[0]
    assert isinstance(pickle.loads(pickle.dumps(message)), CorruptRowGroup)


@pytest.mark.parametrize("error", [TakesTwo("left", "right"), Panic("of Rust"), ValueError(lambda: None)])
def test_an_error_that_cannot_arrives_as_text(error):
    message = _as_message(raised(error))
    assert type(message) is RuntimeError and type(error).__name__ in str(message)
    assert str(pickle.loads(pickle.dumps(message))) == str(message)


def test_a_fault_in_the_work_is_told_and_the_next_unit_is_done(tmp_path, parquet_dir, tokenizer_dir):
    from tokenization.encoder import PreparedTokenizer
    from tokenization.prepared_tokenizer import prepare_tokenizer

    def load() -> PreparedTokenizer:
        return prepare_tokenizer((tokenizer_dir / "tokenizer.json").read_bytes(), False, "--tokenizer_dir")

    name = "000_00000.parquet"
    rows = pq.read_metadata(parquet_dir / name).num_rows
    job = Job(
        input_dir=str(parquet_dir), paths=(name, "gone.parquet"), output_dir=str(tmp_path), text_column="text",
        tokenizer_sha256="x", dtype="uint16", chunk_tokens=10**6, bos_id=0, eos_id=None, val_threshold=0,
        parse_special_tokens=False, shuffle_seed=None, quarantine=False,
    )  # fmt: skip
    unit = {"rows": rows, "text_bytes": 1000, "max_rows": None}
    good, bad = (Unit(index=i, ranges=(InputRange(i, 0, 1),), **unit) for i in (0, 1))
    with contextlib.closing(LocalWorkers(1, load, max_retries=0)) as workers:
        workers.submit(job, bad)
        ((unit, outcome),) = workers.finished()
        assert unit is bad and isinstance(outcome, FileNotFoundError), outcome
        workers.submit(job, good)
        ((unit, outcome),) = workers.finished()
        assert unit is good and outcome.train.documents == pq.read_metadata(parquet_dir / name).row_group(0).num_rows


START_MANY = """
import multiprocessing.resource_tracker, os, resource
from tokenization.local_workers import LocalWorkers

multiprocessing.resource_tracker.ensure_running()
_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 12, hard))
LocalWorkers(8, lambda: None).close()
"""


def test_a_soft_limit_of_open_files_that_is_too_low_for_the_workers_is_raised():
    """In a process of its own: this one may have more files open than the limit is raised to."""
    started = subprocess.run([sys.executable, "-c", START_MANY], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert started.returncode == 0, started.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_a_process_starts_is_raised_after_it(number):
    """Another thread takes the signal, as Arrow's do; Python would raise in the middle of the block."""
    press, started = threading.Event(), False

    def take() -> None:
        press.wait()
        signal.pthread_kill(threading.get_ident(), number)

    def leave(number, frame) -> None:
        raise KeyboardInterrupt

    before = signal.signal(number, leave)
    thread = threading.Thread(target=take)
    thread.start()  # before the block: it would inherit what is blocked there
    try:
        with pytest.raises(KeyboardInterrupt), _deaf():
            press.set()
            thread.join()
            assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == {signal.SIGINT}  # what a child inherits
            started = True
        assert started and signal.getsignal(number) is leave
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize("early_file", ["tokenizer.json", "tokenizer_config.json", "missing"])
def test_a_process_that_was_started_early_does_the_work_and_does_not_import_pandas(
    early_file, tmp_path, parquet_dir, tokenizer_dir
):
    """Whatever it could load meanwhile. pandas would take 0.15 s and 40 MB of each process."""
    tokenizer = prepare_tokenizer((tokenizer_dir / "tokenizer.json").read_bytes(), False, "--tokenizer_dir")
    name = "000_00000.parquet"
    rows = pq.read_metadata(parquet_dir / name).row_group(0).num_rows
    job = Job(
        input_dir=str(parquet_dir), paths=(name,), output_dir=str(tmp_path), text_column="text", tokenizer_sha256="x",
        dtype="uint16", chunk_tokens=10**6, bos_id=0, eos_id=None, val_threshold=HASH_RANGE // 2,
        parse_special_tokens=False, shuffle_seed=None, quarantine=False,
    )  # fmt: skip
    others = {*multiprocessing.active_children()}
    start_early(tokenizer_dir / early_file)
    (early,) = {*multiprocessing.active_children()} - others
    with contextlib.closing(LocalWorkers(1, lambda: tokenizer)) as workers:
        workers.submit(job, Unit(0, (InputRange(0, 0, 1),), rows=rows, text_bytes=1000, max_rows=None))
        ((_, record),) = workers.finished()
        assert record.documents == rows and record.checked_documents
        assert {*multiprocessing.active_children()} - others == {early}
        loaded = Path(f"/proc/{early.pid}/maps").read_text()
        assert "pyarrow" in loaded and "pandas" not in loaded


def test_an_early_process_without_work_is_ended(tokenizer_dir):
    others = {*multiprocessing.active_children()}
    start_early(tokenizer_dir / "tokenizer.json")
    (early,) = {*multiprocessing.active_children()} - others
    end_early()
    assert early.exitcode == -signal.SIGKILL and not {*multiprocessing.active_children()} - others


def test_where_nothing_is_left_to_do_no_process_starts(parquet_dir, tokenizer_dir, tmp_path, run_script):
    import optimize_dataset

    flags = {"input_dir": str(parquet_dir), "tokenizer_dir": str(tokenizer_dir), "output_dir": str(tmp_path / "out")}
    run_script("optimize_dataset.py", *(f"--{name}={value}" for name, value in flags.items()), "--address=local")
    others = {*multiprocessing.active_children()}
    optimize_dataset.main(optimize_dataset.Settings(**flags))
    assert {*multiprocessing.active_children()} == others
