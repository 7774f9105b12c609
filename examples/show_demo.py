"""Show what the demo made: losses, a picture of them, text that the model wrote at first and writes now, files, and
what to try next.

python examples/show_demo.py demo
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import statistics
import sys
import textwrap
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils import cli, console
from utils.errors import UserError
from utils.metrics_file import read_records

PROMPTS = ("This function returns", "If the file does not exist,")
NEW_TOKENS = 60
LINE_CHARS, COLUMN_CHARS = 100, 46
TASK = "demo_word_order"  # make_demo_task.py's


@dataclasses.dataclass
class Settings:
    """Where the demo is."""

    demo_dir: str
    """Directory that `make demo` wrote."""


def show_training(run_dir: Path) -> None:
    from export.curves import draw_curves
    from export.run_metrics import read_steps

    records = read_steps(run_dir)
    losses = [(record["step"], record["loss"]) for record in records if record.get("loss") is not None]
    validations = [(record["step"], record["val_loss"]) for record in records if record.get("val_loss") is not None]
    if not losses or not validations:
        raise UserError(f"{run_dir}: no losses in metrics.jsonl. Run `make demo` to its end.")
    speeds = [record["tokens_per_s"] for record in records if record.get("tokens_per_s")]
    console.result("loss (nats per token)      first        last")
    for name, values in (("  training", losses), ("  validation", validations)):
        first, last = values[0], values[-1]
        change = 100 * (last[1] / first[1] - 1)
        console.result(f"{name:22} {first[1]:9.3f} -> {last[1]:9.3f}   {change:+.0f}% in {last[0]} steps")
    bits = [record["val_bits_per_byte"] for record in records if record.get("val_bits_per_byte") is not None]
    if bits:
        console.result(f"validation, bits per byte of text: {bits[0]:.2f} -> {bits[-1]:.2f}")
    answered = [record for record in records if f"task_{TASK}_acc" in record]
    if answered:
        first, last = (answered[i][f"task_{TASK}_acc"] for i in (0, -1))
        console.result(f"task {TASK}: {first:.1%} -> {last:.1%} right, of four answers")
    if speeds:
        console.result(f"speed: {statistics.median(speeds):,.0f} tokens/s (median over the steps)")
    picture = run_dir / "curves.png"
    draw_curves({"demo": records}, picture)
    console.result(f"picture: {picture}")


def show_samples(run_dir: Path) -> None:
    """What the model wrote after each prompt at the first validation and at the last, side by side."""
    samples = read_records(run_dir / "samples.jsonl")
    drawn = [sample for sample in samples if sample["temperature"]] or samples  # the likeliest words soon go in circles
    if not drawn:
        return
    steps = drawn[0]["step"], drawn[-1]["step"]
    console.result(f"\n  {f'the model wrote at step {steps[0]}':{COLUMN_CHARS}} | and at step {steps[1]}")
    first, last = ({s["prompt"]: s["text"] for s in drawn if s["step"] == step} for step in steps)
    for prompt in [prompt for prompt in first if prompt in last]:  # the prompts may change when a run goes on
        console.result(f"  {'-' * COLUMN_CHARS}-+-{'-' * COLUMN_CHARS}")
        columns = [textwrap.wrap(printable(prompt + texts[prompt]), COLUMN_CHARS) for texts in (first, last)]
        for left, right in itertools.zip_longest(*columns, fillvalue=""):
            console.result(f"  {left:{COLUMN_CHARS}} | {right}".rstrip())


def printable(text: str) -> str:
    """On one line; a model that was not trained writes bytes that are no characters."""
    return "".join(character if character.isprintable() else "?" for character in " ".join(text.split()))


def show_generation(export_dir: Path) -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from export.quiet_libraries import quiet_torchao

    quiet_torchao()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(export_dir)
    model = AutoModelForCausalLM.from_pretrained(export_dir)
    console.result(f"\nthe model writes (transformers, {sum(p.numel() for p in model.parameters()):,} parameters):")
    for prompt in PROMPTS:
        torch.manual_seed(0)
        inputs = tokenizer(prompt, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=True, temperature=0.7, top_k=40)
        text = tokenizer.decode(output[0], skip_special_tokens=True)
        console.result(textwrap.fill(printable(text), LINE_CHARS, initial_indent="  > ", subsequent_indent="    "))


def size_bytes(path: Path) -> int:
    """Of a file, or of all files below a directory."""
    return sum(file.lstat().st_size for file in [path, *path.rglob("*")] if file.is_symlink() or not file.is_dir())


def show_tree(directory: Path, depth: int = 2, indent: str = "") -> None:
    if not indent:
        console.result(f"\n{directory}/ ({console.human_bytes(size_bytes(directory))})")
    for path in sorted(directory.iterdir()):
        name = path.name + ("/" if path.is_dir() else "")
        console.result(f"  {indent}{name:<{38 - len(indent)}} {console.human_bytes(size_bytes(path)):>10}")
        if path.is_dir() and depth > 1:
            show_tree(path, depth - 1, indent + "  ")


def main(settings: Settings) -> None:
    demo = Path(settings.demo_dir)
    if not (demo / "export").is_dir():
        raise UserError(f"{demo}: no export/ in it. Run `make demo` to its end.")
    show_training(demo / "run")
    show_samples(demo / "run")
    show_generation(demo / "export")
    show_tree(demo)
    console.next_command(
        f"source .venv/bin/activate\n"
        f"  litgpt chat {demo}/export --precision 32-true\n"
        f"  litgpt generate {demo}/export --prompt 'This function returns' --precision 32-true\n"
        f"  lm_eval --model hf --model_args pretrained={demo}/export --tasks hellaswag --limit 20  # needs the network",
        what="try",
    )


if __name__ == "__main__":
    cli.run(main, Settings, __doc__, positional=True)
