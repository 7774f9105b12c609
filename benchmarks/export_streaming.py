"""Measure the export beside Lightning's consolidation and litgpt's conversions, on the same checkpoint, in one run.

    python benchmarks/export_streaming.py --work_dir /scratch/export
    python benchmarks/export_streaming.py --work_dir /scratch/export --compare 100M --sizes '[100M]'   # a few minutes

1. `compare`: a model with AdamW state, sharded over two processes. Theirs, to the same outputs as ours:
       python -m lightning.fabric.utilities.consolidate_checkpoint   (keeps the key `model`, as litgpt wants it)
       litgpt convert_pretrained_checkpoint                          -> lit_model.pth
       litgpt convert_from_litgpt, then safetensors' save_file       -> model.safetensors
   Ours: python convert_pretrained_checkpoint.py, proof included.
2. `sizes`: ours alone on models of several sizes (weights only), at the same --max_shard_size.

Time is the wall clock of the commands. Memory is the peak resident set of the largest process. Each command is its own
process; inputs are in the page cache for both sides. Before each side, what the other has left to be written to the
disk is written (sync), untimed: ours waits for the disk (fsync), theirs does not.
Prints Markdown. Run it on a machine that does nothing else, with 30 GB of disk and 12 GB of memory.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import harness
from harness import Usage

from utils import cli, console
from utils.errors import UserError

MODELS = {  # Llamas with an untied head; changes of litgpt's tiny-llama-1.1b
    "100M": {"n_layer": 10, "n_embd": 768, "n_head": 12, "n_query_groups": 12, "intermediate_size": 2048},
    "400M": {"n_layer": 27, "n_embd": 1024, "n_head": 16, "n_query_groups": 16, "intermediate_size": 2816},
    "1.4B": {"n_layer": 25, "n_embd": 2048, "n_head": 16, "n_query_groups": 16, "intermediate_size": 5504},
}
SAVE_SAFETENSORS = (
    "import sys, torch; from safetensors.torch import save_file; "
    "state = torch.load(sys.argv[1], mmap=True, weights_only=False); "
    "save_file({k: v.contiguous() for k, v in state.items()}, sys.argv[2], metadata={'format': 'pt'})"
)


@dataclasses.dataclass
class Settings:
    """Which models are exported, where, and how often."""

    work_dir: str
    """Directory for checkpoints and exports; checkpoints are kept for the next run."""
    compare: str = "400M"
    """Model for the comparison: 100M, 400M or 1.4B; none: no comparison."""
    sizes: list[str] = dataclasses.field(default_factory=lambda: ["100M", "400M", "1.4B"])
    """Models on which ours runs alone."""
    max_shard_size: str = "500MB"
    """Passed to convert_pretrained_checkpoint.py."""
    num_repeats: int = 2
    """Runs of everything; the best time and the smallest memory count, for both sides alike."""
    output: str | None = None
    """File that the tables are written to as well; null: none."""


def make_checkpoint(directory: Path, size: str, with_optimizer: bool) -> None:
    """Two processes over gloo, FSDP2, one AdamW step, saved by Lightning Fabric."""
    import torch.multiprocessing

    if (directory / "model_config.yaml").is_file():
        return
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    torch.multiprocessing.spawn(_train, (harness.free_port(), directory, MODELS[size], with_optimizer), nprocs=2)


def _train(rank: int, port: int, directory: Path, sizes: dict[str, int], with_optimizer: bool) -> None:
    import lightning
    import torch
    from lightning.fabric.strategies import ModelParallelStrategy
    from litgpt import GPT, Config
    from litgpt.utils import save_config
    from torch.distributed.fsdp import fully_shard

    os.environ.update(harness.rank_environment(rank, 2, port), GROUP_RANK="0", TORCHELASTIC_RUN_ID="export")
    torch.set_num_threads(1)

    def shard(model, mesh):
        for block in model.transformer.h:
            fully_shard(block, mesh=mesh["data_parallel"])
        fully_shard(model, mesh=mesh["data_parallel"])
        model.to_empty(device="cpu")
        model.reset_parameters()
        for parameter in model.parameters():
            parameter.to_local().normal_(std=0.02) if parameter.ndim > 1 else parameter.to_local().fill_(1.0)
        return model

    strategy = ModelParallelStrategy(
        shard,
        data_parallel_size=2,
        tensor_parallel_size=1,
        process_group_backend="gloo",
        timeout=datetime.timedelta(hours=1),
    )
    fabric = lightning.Fabric(accelerator="cpu", devices=2, strategy=strategy)
    fabric.launch()
    torch.manual_seed(rank)
    config = Config.from_name("tiny-llama-1.1b", **sizes)
    with torch.device("meta"):
        model = GPT(config)
    with torch.no_grad():
        model = fabric.setup(model)
    state: dict[str, Any] = {"model": model, "step": 1}
    if with_optimizer:
        state["optimizer"] = fabric.setup_optimizers(torch.optim.AdamW(model.parameters(), lr=1e-4))
        tokens = torch.randint(0, config.vocab_size, (1, 9))
        fabric.backward(torch.nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()))
        state["optimizer"].step()
    fabric.save(directory / "lit_model.pth", state)
    if rank == 0:
        save_config(config, directory)


def theirs(checkpoint: Path, work: Path) -> list[tuple[str, Usage]]:
    litgpt = Path(sys.executable).parent / "litgpt"
    shutil.rmtree(work, ignore_errors=True)
    (consolidated := work / "consolidated").mkdir(parents=True)
    shutil.copy(checkpoint / "model_config.yaml", consolidated)
    python = sys.executable
    module = "lightning.fabric.utilities.consolidate_checkpoint"
    file = consolidated / "lit_model.pth"
    steps = [
        ("consolidate", (python, "-m", module, checkpoint / "lit_model.pth", "--output_file", file)),
        ("litgpt convert_pretrained_checkpoint", (litgpt, "convert_pretrained_checkpoint", consolidated, work / "lit")),
        ("litgpt convert_from_litgpt", (litgpt, "convert_from_litgpt", work / "lit", work / "hf")),
        ("save_file", (python, "-c", SAVE_SAFETENSORS, work / "hf" / "model.pth", work / "hf" / "model.safetensors")),
    ]
    return [(name, harness.run(*command)) for name, command in steps]


def ours(checkpoint: Path, work: Path, settings: Settings, *flags: str) -> Usage:
    shutil.rmtree(work, ignore_errors=True)
    shard_size = f"--max_shard_size={settings.max_shard_size}"
    return harness.run_script("convert_pretrained_checkpoint.py", checkpoint, work, shard_size, *flags)


def check_equal(their_work: Path, our_export: Path) -> None:
    """Both sides must have made the same tensors, or the comparison is void."""
    import torch
    from safetensors.torch import load_file

    def of_litgpt(directory: Path) -> dict[str, torch.Tensor]:
        return torch.load(directory / "lit_model.pth", mmap=True, weights_only=True)

    def of_hugging_face(directory: Path) -> dict[str, torch.Tensor]:
        return {k: v for file in directory.glob("*.safetensors") for k, v in load_file(file).items()}

    for their_tensors, our_tensors in (
        (of_litgpt(their_work / "lit"), of_litgpt(our_export)),
        (of_hugging_face(their_work / "hf"), of_hugging_face(our_export)),
    ):
        if set(their_tensors) != set(our_tensors):
            raise UserError("the two sides made different tensors")
        for name, tensor in their_tensors.items():
            if not torch.equal(tensor, our_tensors[name]):
                raise UserError(f"the two sides made different values of {name}")


def best(runs: list[Usage]) -> Usage:
    fields = ("seconds", "processor_s", "peak_bytes")
    return Usage(*(min(getattr(run, field) for run in runs) for field in fields))


def row(name: str, usage: Usage) -> list[str]:
    return [
        name,
        f"{usage.seconds:.1f} s",
        f"{usage.processor_s:.1f} s",
        console.human_bytes(usage.peak_bytes),
    ]


def compare(settings: Settings, work: Path) -> list[str]:
    checkpoint = work / f"checkpoint-{settings.compare}-adamw"
    make_checkpoint(checkpoint, settings.compare, with_optimizer=True)
    size = harness.directory_bytes(checkpoint)
    their_runs, our_runs = [], []
    for _ in range(settings.num_repeats):
        os.sync()
        their_runs.append(theirs(checkpoint, work / "theirs"))
        os.sync()
        our_runs.append(ours(checkpoint, work / "ours", settings))
    check_equal(work / "theirs", work / "ours")
    shutil.rmtree(work / "theirs")
    steps = [(runs[0][0], best([usage for _, usage in runs])) for runs in zip(*their_runs)]
    their_sum = Usage(
        min(sum(usage.seconds for _, usage in run) for run in their_runs),
        min(sum(usage.processor_s for _, usage in run) for run in their_runs),
        max(usage.peak_bytes for _, usage in steps),
    )
    our_best = best(our_runs)
    rows = [*steps, ("**theirs in all**", their_sum), ("**ours**, proof included", our_best)]
    return [
        f"{settings.compare} with AdamW state, two shards, {console.human_bytes(size)}; both sides made equal tensors.",
        "",
        harness.table(["", "time", "processor time", "peak memory"], [row(*measured) for measured in rows]),
        "",
        f"Ours takes {our_best.seconds / their_sum.seconds:.0%} of the time, "
        f"{our_best.processor_s / their_sum.processor_s:.0%} of the processor time and "
        f"{our_best.peak_bytes / their_sum.peak_bytes:.0%} of the memory.",
        "",
    ]


def by_size(settings: Settings, work: Path) -> list[str]:
    rows = []
    for size in settings.sizes:
        checkpoint = work / f"checkpoint-{size}"
        make_checkpoint(checkpoint, size, with_optimizer=False)
        cells = []
        for verify in ("--verify=logits", "--verify=off"):
            usage = best([ours(checkpoint, work / "ours", settings, verify) for _ in range(settings.num_repeats)])
            cells += [f"{usage.seconds:.1f} s", console.human_bytes(usage.peak_bytes)]
        parameters = json.loads((work / "ours" / "manifest.json").read_text())["content"]["parameters"]
        rows.append([f"{size} ({parameters:,})", console.human_bytes(harness.directory_bytes(checkpoint)), *cells])
    header = ["model", "checkpoint", "time, proof included", "peak memory", "--verify=off", "peak memory"]
    return ["Ours by size of the model, weights only, float32:", "", harness.table(header, rows), ""]


def main(settings: Settings) -> None:
    unknown = {settings.compare, *settings.sizes} - {"none", *MODELS}
    if unknown:
        raise UserError(f"{', '.join(unknown)}: no such model. Give {', '.join(MODELS)}.")
    work = Path(settings.work_dir)
    work.mkdir(parents=True, exist_ok=True)
    lines = [harness.environment_line("torch", "lightning", "litgpt", "transformers"), ""]
    if settings.compare != "none":
        lines += compare(settings, work)
    if settings.sizes:
        lines += by_size(settings, work)
    shutil.rmtree(work / "ours", ignore_errors=True)
    console.result("\n".join(lines))
    if settings.output:
        Path(settings.output).write_text("\n".join(lines))


if __name__ == "__main__":
    cli.run(main, Settings, __doc__)
