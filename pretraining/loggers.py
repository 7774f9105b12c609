"""What is made of metrics.jsonl and events.jsonl: the progress line, csv, TensorBoard, wandb.

They live in the driver, which follows the files (see follower), the process whose terminal and environment are the
user's: a wandb key never reaches Ray, its logs or its dashboard.
"""

from __future__ import annotations

import csv
import importlib.util
import os
import re
import secrets
from pathlib import Path
from typing import Any

from pretraining.settings import LogSettings
from utils import console
from utils.errors import UserError
from utils.metrics_file import read_metrics


def progress_line(record: dict[str, Any], total_steps: int) -> str:
    """One step for a person: which, how good, how fast, how long to go."""
    step = record["step"]
    parts = [f"step {step:>{len(str(total_steps))}}/{total_steps} ({100 * step / total_steps:.1f}%)"]
    if record.get("loss") is not None:
        parts.append(f"loss {record['loss']:.4f}")
    if record.get("val_loss") is not None:
        bits = record.get("val_bits_per_byte")
        parts.append(f"val {record['val_loss']:.4f}" + (f" ({bits:.3f} bits/byte)" if bits is not None else ""))
    if record.get("grad_norm") is not None:
        parts.append(f"norm {record['grad_norm']:.2f}")
    if record.get("lr") is not None:
        parts.append(f"lr {record['lr']:.2e}")
    if record.get("tokens_per_s") is not None:
        parts.append(f"{console.human_count(record['tokens_per_s'])} tok/s")
    if record.get("mfu") is not None:
        parts.append(f"mfu {100 * record['mfu']:.1f}%")
    if record.get("nonfinite_steps"):
        parts.append(f"{record['nonfinite_steps']} steps skipped")
    if record.get("eta_s") is not None:
        parts.append(f"eta {console.human_seconds(record['eta_s'])}")
    return " | ".join(parts)


# --- loggers ----------------------------------------------------------------------------------------------------------


def make_logger(
    name: str,
    out_dir: Path,
    earlier: list[dict[str, Any]],
    settings: dict[str, Any],
    log: LogSettings,
    wandb_key: str | None,
):
    """A logger: log(record), event(record), undo(step): forget the later steps, close() -> lines for the user.

    Args:
        earlier: the records from before a resume that stay.
        settings: shown beside the curves; without secrets.
        wandb_key: None: wandb writes its files without network.
    """
    if name == "csv":
        return _CsvLogger(out_dir, earlier)
    if name == "tensorboard":
        return _TensorBoardLogger(out_dir, earlier)
    return _WandbLogger(out_dir, earlier, settings, log, wandb_key)


def check_logger(name: str) -> None:
    """Raises UserError when the package behind the logger is not installed."""
    if name != "csv" and importlib.util.find_spec(name) is None:
        raise UserError(
            f"--logger_name={name}: the package {name} is not installed. Install the extra (`pip install {name}`), or "
            "use --logger_name=csv."
        )


class _CsvLogger:
    COLUMNS = (
        "step", "epoch", "tokens", "loss", "val_loss", "val_perplexity", "val_bits_per_byte", "lr", "grad_norm",
        "nonfinite_steps", "tokens_per_s", "tokens_per_s_per_device", "mfu", "step_s", "data_wait_s",
        "rank_compute_s_median", "rank_compute_s_max", "slowest_rank", "checkpoint_stall_s", "memory_peak_bytes",
        "eta_s",
    )  # fmt: skip

    def __init__(self, out_dir: Path, earlier: list[dict[str, Any]]):
        self._out_dir = out_dir
        self._write(earlier)

    def _write(self, records: list[dict[str, Any]]) -> None:
        self._file = open(self._out_dir / "metrics.csv", "w", newline="", encoding="utf-8")
        self._writer = csv.DictWriter(self._file, self.COLUMNS, extrasaction="ignore")
        self._writer.writeheader()
        self._writer.writerows(records)
        self._file.flush()

    def log(self, record: dict[str, Any]) -> None:
        self._writer.writerow(record)
        self._file.flush()

    def event(self, record: dict[str, Any]) -> None:
        """They are no rows."""

    def undo(self, step: int) -> None:
        self._file.close()
        self._write([record for record in read_metrics(self._out_dir) if record["step"] <= step])

    def close(self) -> list[str]:
        self._file.close()
        return []


def _scalars(record: dict[str, Any]) -> dict[str, float]:
    return {key: value for key, value in record.items() if isinstance(value, (int, float)) and key != "step"}


class _TensorBoardLogger:
    def __init__(self, out_dir: Path, earlier: list[dict[str, Any]]):
        self._directory = out_dir / "tensorboard"
        self._go_on_from(earlier[-1]["step"] if earlier else -1)
        self._events: Any = None  # in a directory of their own, where no step is ever dropped

    def _go_on_from(self, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # TensorBoard drops what was logged before from purge_step on.
        purge_step = step + 1 if self._directory.is_dir() else None
        self._writer = SummaryWriter(str(self._directory), purge_step=purge_step)

    def log(self, record: dict[str, Any]) -> None:
        for key, value in _scalars(record).items():
            self._writer.add_scalar(key, value, record["step"])
        self._writer.flush()

    def event(self, record: dict[str, Any]) -> None:
        if self._events is None:
            self._events = type(self._writer)(str(self._directory / "events"))
        self._events.add_text(record["event"], record["message"], record.get("step") or 0)
        self._events.flush()

    def undo(self, step: int) -> None:
        self._writer.close()
        self._go_on_from(step)

    def close(self) -> list[str]:
        for writer in filter(None, (self._writer, self._events)):
            writer.close()
        return [f"curves: tensorboard --logdir {self._directory}"]


class _WandbLogger:
    def __init__(
        self, out_dir: Path, earlier: list[dict[str, Any]], settings: dict[str, Any], log: LogSettings, key: str | None
    ):
        import wandb

        self._last_step = earlier[-1]["step"] if earlier else -1
        id_file = out_dir / "wandb_run_id"
        run_id = id_file.read_text().strip() if id_file.is_file() else secrets.token_hex(4)
        id_file.write_text(run_id + "\n")
        # WANDB_MODE wins, as everywhere in wandb.
        mode = os.environ.get("WANDB_MODE") or ("offline" if key is None else "online")
        self._offline = mode != "online"
        if self._offline:
            console.say(
                f"wandb: {'no WANDB_API_KEY, so ' if key is None else ''}offline; its files can be uploaded later"
            )
        # In this process's environment for the length of the call only: nothing that is started later inherits it.
        environment = {"WANDB_API_KEY": key} if key is not None else {}
        os.environ.update(environment)
        try:
            self._run = wandb.init(
                dir=str(out_dir),
                project=log.project or "pretrain",
                name=log.run or out_dir.name,
                group=log.group,
                id=run_id,
                resume=None if self._offline else "allow",
                config=settings,
                mode=mode,
                settings=wandb.Settings(silent=True, console="off", save_code=False, disable_git=True),
            )
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            if key is not None:
                reason = reason.replace(key, "[key]")
            # Without its cause, which may quote the key.
            raise UserError(
                f"--logger_name=wandb: wandb did not start ({reason}). Check WANDB_API_KEY and the network, or set "
                "WANDB_MODE=offline to keep its files here until `wandb sync`."
            ) from None
        finally:
            for name in environment:
                os.environ.pop(name, None)

    def log(self, record: dict[str, Any]) -> None:
        if record["step"] > self._last_step:
            self._last_step = record["step"]
            self._run.log(_scalars(record), step=record["step"])

    def event(self, record: dict[str, Any]) -> None:
        # In the row of the last step, since wandb takes nothing for an earlier one; and by mail to whoever wants it.
        self._run.log({f"events/{record['event']}": record.get("step") or 0})
        self._run.alert(title=f"{self._run.name}: {record['event']}", text=record["message"])

    def undo(self, step: int) -> None:
        """wandb cannot: the undone steps stay in its curves, and those done in their place are not logged."""
        undone = self._run.summary.get("undone_steps") or ""
        self._run.summary["undone_steps"] = f"{undone} {step + 1}-{self._last_step}".strip()

    def close(self) -> list[str]:
        directory = self._run.dir
        self._run.finish()
        run_directory = re.sub(r"/files/?$", "", directory)
        if self._offline:
            return [f"wandb ran offline. To upload, with WANDB_API_KEY set: wandb sync {run_directory}"]
        return [f"wandb: {self._run.url}"]
