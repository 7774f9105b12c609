"""A training run through a night of faults: in the end it must be, bit for bit, the run that nothing happened to.

    python benchmarks/soak.py [--minutes 30] [--seed 1] [--malloc_check] [--output soak.md]

Two processes on a CPU train a tiny model with a checkpoint every 5 steps and a validation every 20, on a Ray cluster
of their own. Meanwhile processes are killed, stopped and paused, the command itself is killed, the disk is full, bytes
of checkpoints and of the text are flipped, files are removed: at random, but the same for a seed as far as the
machine's timing allows. After each fault this does what a user would do: make room, put the chunk back, run the same
command again. It goes on with the next one when the run has made a new checkpoint.

Prints a table of what was done, how it was noticed and how long that took. Exit code 1: the run differs from the quiet
one, or something happened that no fault explains. --malloc_check lets glibc check the heap of every process (slower),
and keeps core dumps where the system does.

The full disk is a small tmpfs, for which this must be root; without it these faults are left out, and that is said.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import hashlib
import json
import os
import random
import re
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import harness

from pretraining.checkpoint import Checkpoint, list_checkpoints
from pretraining.events import read_events
from pretraining.heartbeat import Beat, Process, read_beat, start_time
from pretraining.settings import STOP_NAME
from utils import console
from utils.metrics_file import read_metrics

CONFIG = {
    "model_config": {
        "name": "soak", "block_size": 32, "vocab_size": 1024, "padded_vocab_size": 1024, "n_layer": 2, "n_embd": 64,
        "n_head": 4, "n_query_groups": 2, "intermediate_size": 128, "rotary_percentage": 1.0,
        "parallel_residual": False, "bias": False, "norm_class_name": "RMSNorm", "mlp_class_name": "LLaMAMLP",
    },
    "accelerator": "cpu", "num_devices": 2, "precision": "32-true",
    "parallel": {"cpu_threads": 1},
    # The rate is constant, so that the quiet run may end at whatever step the other one came to.
    "train": {"global_batch_size": 16, "micro_batch_size": 2, "save_interval": 5, "lr_schedule": "constant",
              "lr_warmup_steps": 10, "step_timeout": 5},
    "eval": {"interval": 20, "max_iters": 2, "final_validation": False},
    "optimizer": {"lr": 1e-3},
}  # fmt: skip
NUM_CHUNKS = 8
DISK_BYTES = 512 << 20
ENDLESS_STEPS = 10**7
RECOVERY_LIMIT_S = 300.0
MALLOC_DEBUG = "/lib/x86_64-linux-gnu/libc_malloc_debug.so.0"

# What each fault may leave in events.jsonl; anything beyond it is a finding.
FAULTS: dict[str, list[str]] = {
    "SIGKILL of a process": ["restart"],
    "SIGKILL of a process that starts": ["restart"],
    "SIGSTOP of a process": ["hang", "restart"],
    "SIGSTOP for 2 s, then SIGCONT": [],
    "SIGKILL of the command": [],
    "SIGKILL of the command while it starts": [],
    "SIGTERM to the command": [],
    "byte flipped in the newest checkpoint": ["restart", "checkpoint refused"],
    "file of the newest checkpoint removed": ["restart", "checkpoint refused"],
    "newest checkpoint removed": ["restart"],
    "byte flipped in a chunk of the text": ["restart", "damaged text"],
    "disk full": ["restart", "restart", "restart", "restart", "end"],
}


@dataclasses.dataclass
class Fault:
    kind: str
    num_events: int
    """In events.jsonl before it."""
    num_log_characters: int
    expected: str = ""
    """Pattern that what the command says must contain."""
    began: float = dataclasses.field(default_factory=time.monotonic)
    noticed_s: float | None = None
    trains_s: float | None = None
    """Until all processes had done a step again."""
    signs: list[str] = dataclasses.field(default_factory=list)
    """Events and exit codes, in their order."""
    told: bool = False
    """Whether `expected` was said."""


class Night:
    """The run, and what is done to it."""

    def __init__(self, directory: Path, out_dir: Path, address: str, seed: int, has_small_disk: bool):
        self.directory, self.out_dir, self.address = directory, out_dir, address
        self.log = directory / "night.log"
        self.random = random.Random(seed)
        self.kinds = [kind for kind in FAULTS if has_small_disk or kind != "disk full"]
        self.faults: list[Fault] = []
        self.findings: list[str] = []
        self.repairs: list[Callable[[], None]] = []
        self.process: subprocess.Popen | None = None

    # --- the command --------------------------------------------------------------------------------------------------

    def start(self, max_steps: int = ENDLESS_STEPS) -> None:
        command = [sys.executable, "distributed_pretrain.py", "--config", self.directory / "soak.yaml"]
        command += ["--dataset_path", self.directory / "data", "--out_dir", self.out_dir, "--address", self.address]
        command += [f"--train.max_steps={max_steps}"]
        with open(self.log, "a") as log:
            self.process = subprocess.Popen(
                list(map(str, command)), cwd=harness.ROOT, stdout=log, stderr=subprocess.STDOUT
            )

    def workers(self) -> dict[int, tuple[Process, Beat]]:
        """The training processes that live, by rank."""
        found = {}
        for path in Path(tempfile.gettempdir()).glob("pretraining-*/rank-*.json"):
            with contextlib.suppress(OSError, ValueError, TypeError):  # a start's directory comes or goes
                process = Process(**json.loads(path.read_text()))
                if process.out_dir == str(self.out_dir) and start_time(process.pid) == process.started:
                    found[process.rank] = (process, read_beat(path.with_suffix(".beat")))
        return found

    def trains(self, without: set[int] = frozenset()) -> bool:
        """Whether all processes, none of them one of `without`, have done a step."""
        workers = self.workers()
        fresh = all(process.pid not in without and beat.steps_done for process, beat in workers.values())
        return len(workers) == CONFIG["num_devices"] and fresh

    def step(self) -> int:
        return max((beat.step for _, beat in self.workers().values()), default=-1)

    def checkpoints(self) -> list[Checkpoint]:
        return list_checkpoints(self.out_dir)[0]

    def repair(self) -> None:
        while self.repairs:
            self.repairs.pop()()

    # --- waiting ------------------------------------------------------------------------------------------------------

    def wait_for(self, condition: Callable[[], bool], what: str) -> None:
        """Raises RuntimeError when it takes too long, or the command ends."""
        deadline = time.monotonic() + RECOVERY_LIMIT_S
        while not condition():
            if time.monotonic() > deadline or self.process.poll() is not None:
                raise RuntimeError(f"still no {what}, exit code {self.process.poll()}.\n{self.log.read_text()[-3000:]}")
            time.sleep(0.02)

    def follow(self, fault: Fault, killed: set[int]) -> None:
        """Until it trains again and has said what was wrong; when the command has ended, repair and run it again."""
        deadline = time.monotonic() + RECOVERY_LIMIT_S
        while not (self.trains(without=killed) and fault.told and not self.repairs):
            self.note(fault)
            if self.process.poll() is not None:
                fault.signs.append(f"exit {self.process.returncode}")
                fault.noticed_s = fault.noticed_s or time.monotonic() - fault.began
                self.repair()
                self.start()
            if fault.kind == "disk full" and fault.noticed_s is not None:
                self.repair()
            if time.monotonic() > deadline:
                raise RuntimeError(f"{fault.kind}: it does not train again.\n{self.log.read_text()[-3000:]}")
            time.sleep(0.02)
        fault.trains_s = time.monotonic() - fault.began
        self.note(fault)

    def note(self, fault: Fault) -> None:
        said = self.log.read_text()[fault.num_log_characters :]
        events = [event["event"] for event in read_events(self.out_dir)[fault.num_events :]]
        if fault.noticed_s is None and (events or re.search(r"^(warning: (?!.* do not end with)|error)", said, re.M)):
            fault.noticed_s = time.monotonic() - fault.began
        fault.signs = [sign for sign in fault.signs if sign.startswith("exit")] + events
        fault.told = bool(re.search(fault.expected, said, re.S))

    # --- faults -------------------------------------------------------------------------------------------------------

    def inject(self, kind: str) -> None:
        """One fault, and all that follows from it."""
        workers = killed = self.pids()
        fault = self.new_fault(kind)
        victim = self.random.choice(sorted(workers))
        if kind.startswith("SIGKILL of a process"):
            os.kill(victim, signal.SIGKILL)
            if "starts" in kind:
                self.wait_for(lambda: not workers & self.pids() and bool(self.pids()), "new start")
                time.sleep(self.random.uniform(0, 2))
                killed = workers | self.pids()
                self.faults.remove(fault)  # what the first one leads to has happened
                fault = self.new_fault(kind)
                victim = self.random.choice(sorted(killed - workers))
                os.kill(victim, signal.SIGKILL)
            fault.expected = rf"pid {victim}\) died of (SIGKILL|an unknown)"
        elif kind == "SIGSTOP of a process":
            os.kill(victim, signal.SIGSTOP)
            fault.expected = rf"pid {victim}\) is stopped by a signal"
        elif kind == "SIGSTOP for 2 s, then SIGCONT":
            step = self.step()
            os.kill(victim, signal.SIGSTOP)
            time.sleep(2)
            os.kill(victim, signal.SIGCONT)
            self.wait_for(lambda: self.step() > step + 5, "further step")
            killed = set()
        elif kind.startswith("SIGKILL of the command"):
            self.kill_command()
            if "starts" in kind:
                self.start()
                time.sleep(self.random.uniform(0, 25))
                killed |= self.pids()
                self.kill_command()
        elif kind == "SIGTERM to the command":
            self.process.terminate()
            fault.expected = "stopped early: step"
        elif kind == "disk full":
            self.fill_disk()
            fault.expected = "could not be written|No space left|no space"
        else:
            self.damage(kind, fault, workers, victim)
        self.follow(fault, killed)
        beyond = collections.Counter(fault.signs) - collections.Counter(FAULTS[kind])
        beyond = {sign: count for sign, count in beyond.items() if not sign.startswith("exit")}
        if beyond:
            self.findings.append(f"after '{kind}' at step {self.step()}: {beyond}, which it does not explain")

    def new_fault(self, kind: str) -> Fault:
        fault = Fault(kind, len(read_events(self.out_dir)), len(self.log.read_text()))
        self.faults.append(fault)
        return fault

    def pids(self) -> set[int]:
        return {process.pid for process, _ in self.workers().values()}

    def kill_command(self) -> None:
        self.process.kill()
        self.process.wait()

    def damage(self, kind: str, fault: Fault, workers: set[int], victim: int) -> None:
        """While nothing trains: after the death of a process, or the end of the command."""
        if self.random.random() < 0.5:
            os.kill(victim, signal.SIGKILL)
            self.wait_for(lambda: not workers & self.pids(), "end of the processes")
        else:
            self.process.terminate()
            self.process.wait()
        newest = self.checkpoints()[0]
        if kind == "newest checkpoint removed":
            shutil.rmtree(newest.path)
        elif "checkpoint" in kind:
            path = newest.path / self.random.choice(sorted(entry["name"] for entry in newest.manifest["files"]))
            if kind == "file of the newest checkpoint removed":
                path.unlink()
            else:
                self.flip_a_byte(path)
            fault.expected = rf"skipped checkpoint {re.escape(str(newest.path))}"
        else:
            path = self.directory / "data" / "train" / f"chunk-{self.random.randrange(NUM_CHUNKS)}.bin"
            content = path.read_bytes()
            self.flip_a_byte(path)

            def restore() -> None:
                path.write_bytes(content)
                for checkpoint in self.checkpoints():  # they may have read the damaged text
                    if checkpoint.step > newest.step:
                        shutil.rmtree(checkpoint.path)

            self.repairs.append(restore)
            fault.expected = rf"{path.name}: its checksum is"
        if self.process.poll() is not None:  # else its end would count as noticed, and the damage be repaired unseen
            self.start()

    def flip_a_byte(self, path: Path) -> None:
        place = self.random.randrange(path.stat().st_size)
        with open(path, "r+b") as file:
            file.seek(place)
            (byte,) = file.read(1)
            file.seek(place)
            file.write(bytes([byte ^ 1 << self.random.randrange(8)]))

    def fill_disk(self) -> None:
        """Up to less than one more checkpoint, so that a save fails before it begins or in the middle."""
        filler = self.out_dir.parent / "filler"
        self.repairs.append(lambda: filler.unlink(missing_ok=True))
        newest = self.checkpoints()[0]
        left = int(self.random.uniform(0, 1) * sum(entry["bytes"] for entry in newest.manifest["files"]))
        with open(filler, "wb") as file, contextlib.suppress(OSError):  # the run takes space meanwhile
            os.posix_fallocate(file.fileno(), 0, max(1, shutil.disk_usage(self.out_dir).free - left))

    # --- the night ----------------------------------------------------------------------------------------------------

    def run(self, minutes: float, max_faults: int | None) -> None:
        self.start()
        self.wait_for(self.trains, "first step")
        deadline = time.monotonic() + 60 * minutes
        while time.monotonic() < deadline and (max_faults is None or len(self.faults) < max_faults):
            # In turns, each turn in another order: every kind happens about as often as the others.
            kinds = [kind for kind in self.kinds if kind not in {fault.kind for fault in self.this_turn()}]
            self.wait_until_between()
            self.inject(self.random.choice(kinds))
            fault = self.faults[-1]
            console.say(
                f"{len(self.faults)}: {fault.kind}: {', '.join(fault.signs) or 'nothing'}; trains after "
                f"{fault.trains_s:.1f} s, step {self.step()}"
            )
        self.wait_until_between()
        (self.out_dir / STOP_NAME).touch()
        if self.process.wait(RECOVERY_LIMIT_S):
            raise RuntimeError(self.log.read_text()[-3000:])

    def this_turn(self) -> list[Fault]:
        return self.faults[len(self.faults) // len(self.kinds) * len(self.kinds) :]

    def wait_until_between(self) -> None:
        """Until there are two checkpoints, a new one among them, and some moment later."""
        events, newest = len(read_events(self.out_dir)), max((one.step for one in self.checkpoints()), default=0)
        self.wait_for(
            lambda: len(self.checkpoints()) > 1 and self.checkpoints()[0].step > newest and self.trains(),
            "new checkpoint",
        )
        later = time.monotonic() + self.random.uniform(0, 5)
        self.wait_for(lambda: time.monotonic() > later, "moment")
        for event in read_events(self.out_dir)[events:]:
            self.findings.append(f"without any fault: {event['message']}")


def hashes_of(checkpoint: Path) -> dict[str, str]:
    """Of weights and optimizer state, by name, whatever processes wrote them."""
    from lightning.fabric.utilities.load import _load_distributed_checkpoint

    def walk(value: Any, name: str) -> Iterator[tuple[str, str]]:
        if isinstance(value, dict):
            for key, item in value.items():
                yield from walk(item, f"{name}.{key}")
        elif hasattr(value, "numpy"):
            yield name, hashlib.sha256(value.contiguous().numpy().tobytes()).hexdigest()

    return dict(walk(_load_distributed_checkpoint(checkpoint / "lit_model.pth"), ""))


def differences(night: Path, quiet: Path, step: int) -> list[str]:
    """What is not the same in the two runs."""
    found = []
    a, b = hashes_of(night / f"step-{step:08d}"), hashes_of(quiet / "final")
    found += [f"{name} differs" for name in sorted(a.keys() | b.keys()) if a.get(name) != b.get(name)]
    if not a:
        found.append("no weights were compared")
    keys = ("loss", "batch_digest", "grad_norm", "lr", "val_loss", "tokens", "epoch")
    steps = [[[record.get(key) for key in ("step", *keys)] for record in read_metrics(run)] for run in (night, quiet)]
    found += [f"records differ: {a} and {b}" for a, b in zip(*steps) if repr(a) != repr(b)][:5]
    if len(steps[0]) != len(steps[1]):
        found.append(f"{len(steps[0])} records and {len(steps[1])}")
    return found


def report(night: Night, step: int) -> str:
    rows = []
    for kind in night.kinds:
        faults = [fault for fault in night.faults if fault.kind == kind]
        if not faults:
            continue
        noticed = [fault.noticed_s for fault in faults if fault.noticed_s is not None]
        trains = [fault.trains_s for fault in faults]
        signs = collections.Counter(", ".join(dict.fromkeys(fault.signs)) or "nothing said" for fault in faults)
        how = "; ".join(f"{sign} ({count})" if len(signs) > 1 else sign for sign, count in signs.most_common())
        rows.append([kind, str(len(faults)), how, _middle_and_most(noticed), _middle_and_most(trains)])
    header = ["", "times", "noticed by", "s until noticed", "s until it trained"]
    return harness.table(header, rows)


def _middle_and_most(values: list[float]) -> str:
    return f"{statistics.median(values):.1f}, {max(values):.1f}" if values else "-"


@contextlib.contextmanager
def small_disk(directory: Path) -> Iterator[bool]:
    """Mount one there; yields whether that worked."""
    directory.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs"]
    mounted = subprocess.run(["mount", *options, directory], capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", directory], check=True)


@contextlib.contextmanager
def cluster() -> Iterator[str]:
    """A Ray cluster of this machine, whose processes have this one's environment and niceness."""
    from ray.cluster_utils import Cluster

    started = Cluster(initialize_head=True, head_node_args={"num_cpus": 4, "include_dashboard": False})
    try:
        yield started.address
    finally:
        started.shutdown()


def check_the_heap() -> None:
    """Of every process that is started from here on; what glibc finds ends it by SIGABRT."""
    os.environ.update(MALLOC_CHECK_="3", MALLOC_PERTURB_="165", LD_PRELOAD=MALLOC_DEBUG)
    _, most = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (most, most))


def write_inputs(directory: Path) -> None:
    import yaml

    for split, chunks in (("train", NUM_CHUNKS), ("val", 1)):
        sizes = {f"chunk-{i}.bin": 40 for i in range(chunks)}
        harness.write_token_folder(directory / "data" / split, sizes, 330, CONFIG["model_config"]["vocab_size"])
    (directory / "soak.yaml").write_text(yaml.safe_dump(CONFIG))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30, help="of faults; the quiet run and its start come on top")
    parser.add_argument("--num_faults", type=int, help="end after so many, if that is sooner")
    parser.add_argument("--kinds", nargs="+", choices=FAULTS, metavar="KIND", help="only these: the table's first row")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--malloc_check", action="store_true", help="let glibc check every process's heap")
    parser.add_argument("--directory", help="where to work (default: a temporary directory)")
    parser.add_argument("--output", help="file for the table, besides the terminal")
    arguments = parser.parse_args()
    # Whoever ends this one, the cluster and the mount must go.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    os.environ["PYTHONFAULTHANDLER"] = "1"
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    if arguments.malloc_check:
        check_the_heap()
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="soak-", dir=arguments.directory))
        directory = Path(directory).resolve()
        write_inputs(directory)
        has_small_disk = stack.enter_context(small_disk(directory / "disk"))
        address = stack.enter_context(cluster())
        night = Night(directory, directory / "disk" / "run", address, arguments.seed, has_small_disk)
        if arguments.kinds:
            night.kinds = [kind for kind in night.kinds if kind in arguments.kinds]
        try:
            night.run(arguments.minutes, arguments.num_faults)
        finally:
            if night.process and night.process.poll() is None:
                night.kill_command()
            if arguments.directory:
                shutil.copytree(night.out_dir, Path(arguments.directory) / "night", dirs_exist_ok=True)
                shutil.copy(night.log, Path(arguments.directory) / "night.log")
        step = night.checkpoints()[0].step
        quiet = Night(directory, directory / "quiet", address, 0, False)
        console.say(f"the night ended at step {step}; the quiet run to the same step")
        quiet.start(max_steps=step)
        if quiet.process.wait(3600):
            raise RuntimeError(quiet.log.read_text()[-3000:])
        differ = differences(night.out_dir, quiet.out_dir, step)
        table = report(night, step)
    text = "\n".join(
        [
            harness.environment_line("torch", "ray", "lightning"),
            f"Seed {arguments.seed}, {len(night.faults)} faults, {step} steps, a checkpoint every "
            f"{CONFIG['train']['save_interval']}{', heap checked by glibc' if arguments.malloc_check else ''}.",
            "",
            table,
            "",
            *(["No fault of a full disk: it needs root."] if not has_small_disk else []),
            f"Weights, optimizer state, losses, norms and digests of all {step} steps: "
            + ("equal to the quiet run's, bit for bit." if not differ else "DIFFERENT from the quiet run's."),
            *(f"- {line}" for line in differ),
            *(f"- {line}" for line in night.findings),
        ]
    )
    print(text)
    if arguments.output:
        Path(arguments.output).write_text(text + "\n")
    sys.exit(1 if differ or night.findings else 0)


if __name__ == "__main__":
    main()
