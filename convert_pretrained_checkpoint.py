"""Steps 4 to 6: turn a checkpoint of a pretraining run into a model that litgpt and transformers load.

    python convert_pretrained_checkpoint.py RUN/final EXPORT
    python convert_pretrained_checkpoint.py RUN/step-00010000 EXPORT --dtype bfloat16 --formats hf

It reads the sharded checkpoint itself: weights only, a few rows at a time, on a machine of any size. A file that was
consolidated first, and litgpt's own checkpoints, work too. EXPORT then holds

    lit_model.pth, model_config.yaml                            for `litgpt chat EXPORT`, `litgpt evaluate EXPORT`, ...
    model*.safetensors, config.json, generation_config.json     for AutoModelForCausalLM.from_pretrained("EXPORT"), ...
    tokenizer files, README.md (the model card), manifest.json  for both
    model.cdx.json                                              its inputs, as a bill of materials in CycloneDX

It appears when it is complete and proven: every weight is read again and compared, and both models give the same logits
for the same tokens. The same command again does nothing, or goes on after an interruption.
"""

from __future__ import annotations

import dataclasses
import shutil
import time
from pathlib import Path
from shlex import quote
from typing import Any, Literal

from export.checkpoint_files import MODEL_CONFIG, read_checkpoint_manifest
from export.plan import ExportPlan
from export.publishing import publishing, remove_interrupted
from export.sizes import parse_bytes
from utils import cli, console
from utils.errors import UserError
from utils.files import free_bytes, write_json
from utils.manifest import as_input, claim, damaged_files, made_by, write_manifest

SCRIPT = "convert_pretrained_checkpoint.py"
PACKAGES = ("litgpt", "torch", "transformers")


@dataclasses.dataclass
class Settings:
    """What to export, where to, and in which formats."""

    checkpoint_dir: str
    """Checkpoint to export: a run's `final` or `step-..` directory, or any directory with litgpt's lit_model.pth."""

    export_dir: str
    """Directory to make. It appears when it is complete; an existing one is never mixed into."""

    formats: Literal["all", "litgpt", "hf", "gguf"] = "all"
    """litgpt: only lit_model.pth; hf: only safetensors and config.json; all: both; gguf: only model.gguf, for llama.cpp
    and the programs built on it."""

    dtype: Literal["same", "float32", "bfloat16", "float16"] = "same"
    """Number type of the stored weights; same: as in the checkpoint."""

    max_shard_size: str = "5GB"
    """Largest safetensors file, as 5GB or 500MB (GiB and MiB too). A larger tensor gets its own file."""

    verify: Literal["logits", "weights", "off"] = "logits"
    """What must hold before anything is published. weights: every stored value equals the checkpoint's; logits: that,
    and litgpt and transformers give the same logits, layer by layer in bounded memory; off: nothing is checked."""

    pad_token: str | None = None
    """Token that fills up the shorter texts of a batch, by name; best one that no text holds. null: the tokenizer's own
    pad token, if it names one."""

    dry_run: bool = False
    """Check everything, print what would be written, and stop."""

    def max_shard_bytes(self) -> int:
        return parse_bytes(self.max_shard_size, "--max_shard_size")

    def record(self) -> dict[str, Any]:
        """What the manifest keeps: the settings that shape the result."""
        return {
            "formats": self.formats,
            "dtype": self.dtype,
            "max_shard_bytes": self.max_shard_bytes(),
            "verify": self.verify,
            "pad_token": self.pad_token,
        }


def main(settings: Settings) -> None:
    if is_finished(settings):
        console.result(f"nothing to do: {settings.export_dir} is a finished export of {settings.checkpoint_dir}")
        return
    start = time.perf_counter()
    plan = check(settings)
    console.say(
        f"{plan.checkpoint_dir}: {plan.config.name}, {console.human_count(plan.num_parameters)} parameters, "
        f"{plan.dtype_name}{', tied embeddings' if plan.tied else ''}"
    )
    if settings.dry_run:
        check_space(plan, settings)
        print_dry_run(plan, settings)
        return
    remove_interrupted(
        Path(settings.export_dir).absolute(), "export_dir"
    )  # first: it may fill the disk that is measured next
    check_space(plan, settings)
    export(plan, settings)
    console.result(f"exported to {settings.export_dir} in {console.human_seconds(time.perf_counter() - start)}")
    if plan.for_litgpt:
        console.next_command(f"litgpt chat {quote(settings.export_dir)}{litgpt_precision()}", "talk to it")
    if plan.layout:
        console.next_command(
            f"lm_eval --model hf --model_args {quote(f'pretrained={settings.export_dir}')} --tasks hellaswag",
            "evaluate it",
        )
    if plan.gguf:
        console.next_command(f"llama-cli -m {quote(f'{settings.export_dir}/model.gguf')}", "talk to it in llama.cpp")
    if plan.is_wrong_in_ctranslate2:
        console.say(
            "\nnot for ctranslate2 4.8.5, which ignores this model's scaling of positions: its logits are wrong"
        )


def litgpt_precision() -> str:
    """What litgpt needs on a machine without accelerator: its default is bfloat16, which gives other text than float32,
    and is slow on processors without instructions for it."""
    import torch

    return "" if torch.accelerator.is_available() else " --precision 32-true"


# Before the work ------------------------------------------------------------------------------------------------------


def is_finished(settings: Settings) -> bool:
    """Whether `export_dir` is what this command makes, whole.

    Raises:
        UserError: there is something else under that name.
    """
    export_dir = Path(settings.export_dir)
    if export_dir.is_mount() or export_dir.is_symlink():
        kind = "mount point" if export_dir.is_mount() else "symbolic link"
        raise UserError(
            f"export_dir={export_dir}: a {kind}, which cannot appear all at once. Give a directory inside it, as "
            f"{export_dir / 'model'}."
        )
    manifest = claim(export_dir, "export_dir", "export", {"settings": settings.record()})
    if manifest is None:
        return False
    if _identity(manifest["inputs"][0]) != _identity(input_record(Path(settings.checkpoint_dir))):
        raise UserError(f"export_dir={export_dir}: was made from another checkpoint. Give another directory.")
    damaged = damaged_files(export_dir, manifest["files"], checksums=False)
    if damaged:
        raise UserError(f"export_dir={export_dir}: damaged: {'; '.join(damaged)}. Delete it and run this again.")
    return True


def input_record(checkpoint_dir: Path) -> dict[str, Any]:
    """What the export's manifest says of the checkpoint; one without manifest is known by its files' sizes."""
    record = as_input(checkpoint_dir)
    if record["manifest"] is None:
        files = sorted(path for path in checkpoint_dir.rglob("*") if path.is_file())
        record["files"] = [{"name": str(f.relative_to(checkpoint_dir)), "bytes": f.stat().st_size} for f in files]
    return record


def _identity(record: dict[str, Any]) -> Any:
    return record.get("sha256") or record.get("files")


def check(settings: Settings) -> ExportPlan:
    """Find what is wrong before the weights are read; a wrong path before the imports that take seconds."""
    settings.max_shard_bytes()
    checkpoint_dir = Path(settings.checkpoint_dir)
    checkpoint = read_checkpoint_manifest(checkpoint_dir)

    from export.checks import make_plan

    return make_plan(
        checkpoint_dir,
        checkpoint,
        formats=settings.formats,
        dtype=settings.dtype,
        pad_token=settings.pad_token,
    )


def needed_bytes(plan: ExportPlan, settings: Settings) -> dict[str, int]:
    """Bytes of weights in each format that is made."""
    names = {"litgpt": "lit_model.pth", "hf": "model.safetensors"}
    made = {name: plan.num_bytes for kind, name in names.items() if settings.formats in ("all", kind)}
    return made or {"model.gguf": plan.num_bytes}


def check_space(plan: ExportPlan, settings: Settings) -> None:
    """Raises UserError when the disk cannot hold the export, now instead of in the middle."""
    needed, free = sum(needed_bytes(plan, settings).values()), free_bytes(Path(settings.export_dir).absolute().parent)
    if needed > free:
        raise UserError(
            f"export_dir={settings.export_dir}: needs {console.human_bytes(needed)}, {console.human_bytes(free)} are "
            "free. Make room, give another disk, or leave a format out with --formats."
        )


def print_dry_run(plan: ExportPlan, settings: Settings) -> None:
    for name, size in needed_bytes(plan, settings).items():
        pieces = -(-size // settings.max_shard_bytes()) if name.endswith("safetensors") else 1
        about = f", in about {pieces} files of at most {settings.max_shard_size}" if pieces > 1 else ""
        console.result(f"{name}: {console.human_bytes(size)}{about}")
    tokenizer = f"vocabulary of {plan.tokenizer.vocab_size:,}" if plan.tokenizer else "none beside the checkpoint"
    console.result(f"tokenizer: {tokenizer}")
    console.result(f"proof before anything is published: {settings.verify}")


# The work -------------------------------------------------------------------------------------------------------------


def export(plan: ExportPlan, settings: Settings) -> None:
    """Write, prove and publish."""
    with publishing(Path(settings.export_dir).absolute(), "export_dir") as temporary:
        write_small_files(plan, temporary)
        write_weights(plan, settings, temporary)
        proof = prove(plan, settings, temporary)
        write_card(plan, settings, temporary, proof)
        write_bill_and_manifest(plan, settings, temporary, proof)


def write_small_files(plan: ExportPlan, directory: Path) -> None:
    """Configurations and tokenizer; litgpt's evaluation and tokenizer read generation_config.json too."""
    from export.hf_config import generation_config, hf_config
    from export.tokenizer_files import write_tokenizer

    shutil.copyfile(plan.checkpoint_dir / MODEL_CONFIG, directory / MODEL_CONFIG)
    bos_id, eos_id = (plan.tokenizer.bos_id, plan.tokenizer.eos_id) if plan.tokenizer else (None, None)
    write_json(directory / "generation_config.json", generation_config(bos_id, eos_id, plan.pad_id))
    if plan.has_hf_config:
        config = hf_config(plan.config, plan.tied, plan.dtype_name, bos_id, eos_id, plan.config_pad_id)
        write_json(directory / "config.json", config)
    if plan.tokenizer:
        check = plan.has_hf_config
        write_tokenizer(plan.tokenizer, directory, plan.config.block_size, plan.pad_token, check)


def write_weights(plan: ExportPlan, settings: Settings, directory: Path) -> None:
    """One pass over the checkpoint's weights; each block of rows goes to its places in every format."""
    from export.gguf_file import preallocate_gguf
    from export.weight_files import TensorSpec, preallocate_safetensors, preallocate_torch_file

    lit, converted = None, []
    if plan.for_litgpt:
        specs = [TensorSpec(name, tensor.shape, tensor.dtype) for name, tensor in plan.weights.items()]
        lit = preallocate_torch_file(directory / "lit_model.pth", specs)
    if plan.layout:
        hf = preallocate_safetensors(directory, plan.layout.specs, settings.max_shard_bytes())
        converted.append((hf, plan.layout))
    if plan.gguf:
        name = Path(settings.export_dir).absolute().name
        converted.append((preallocate_gguf(plan, directory, name), plan.gguf))
    for name, tensor in plan.weights.items():
        for start, block in tensor.blocks():
            if lit:
                lit.write_rows(name, start, block)
            for writer, layout in converted:
                for target, target_row, rows in layout.distribute(name, start, block):
                    writer.write_rows(target, target_row, rows)
    for writer in [lit, *(writer for writer, _ in converted)]:
        if writer:
            writer.finish()


def prove(plan: ExportPlan, settings: Settings, directory: Path) -> dict[str, Any]:
    """Check the written files as `--verify` asks; returns what the manifest keeps of it.

    Raises:
        UserError: the export is not right; it will not be published.
    """
    if settings.verify == "off":
        console.warn("--verify=off: the export has not been checked.")
        return {"mode": "off"}
    from export.proof import KL_TOLERANCE, compare_logits, compare_weights, find_exported

    exported = find_exported(plan, directory)
    num_values = compare_weights(plan, exported)
    console.say(f"verified: {console.human_count(num_values)} stored values equal the checkpoint's")
    record = {"mode": settings.verify, "compared_values": num_values}
    if settings.verify == "weights" or not plan.layout:
        return record

    comparison = compare_logits(plan.config, exported.lit or plan.weights, directory, exported.hf)
    console.result(
        f"verified: litgpt and transformers on {comparison.num_tokens} random tokens: logits differ by at most "
        f"{comparison.max_abs_difference:.2g} (allowed: {comparison.tolerance:.2g}), KL divergence "
        f"{comparison.kl_divergence_nats:.2g} nats (allowed: {KL_TOLERANCE:.2g})"
    )
    if not comparison.passed:
        raise UserError(
            f"{plan.checkpoint_dir}: litgpt and transformers do not agree on the exported model: logits differ by up "
            f"to {comparison.max_abs_difference:.3g}, allowed are {comparison.tolerance:.3g}. Nothing was published. "
            "If the weights hold NaN or infinity, take an earlier checkpoint; else please report "
            "this model_config.yaml."
        )
    return record | {
        "tokens": comparison.num_tokens,
        "max_abs_logit_difference": comparison.max_abs_difference,
        "kl_divergence_nats": comparison.kl_divergence_nats,
    }


def write_card(plan: ExportPlan, settings: Settings, directory: Path, proof: dict[str, Any]) -> None:
    from export.hf_config import family_of
    from export.hf_families import FAMILIES
    from export.model_card import write_model_card
    from tokenization.input_names import describe_inputs

    model_type = family_of(plan.config) if plan.layout else None
    exported = {
        "name": Path(settings.export_dir).absolute().name,
        "config": plan.config,
        "model_type": model_type,
        "architecture": FAMILIES[model_type].architecture if model_type else None,
        "for_litgpt": plan.for_litgpt,
        "for_llama_cpp": plan.gguf is not None,
        "is_wrong_in_ctranslate2": plan.is_wrong_in_ctranslate2,
        "parameters": plan.num_parameters,
        "tied": plan.tied,
        "dtype": plan.dtype_name,
        "tokenizer": plan.tokenizer.record() if plan.tokenizer else None,
        "puts_bos": plan.tokenizer.adds_bos if plan.tokenizer else False,
        "proof": proof,
        "made_by": made_by(SCRIPT, *PACKAGES),
    }
    write_model_card(directory, exported, plan.checkpoint_dir, plan.checkpoint, describe_inputs)


def write_bill_and_manifest(plan: ExportPlan, settings: Settings, directory: Path, proof: dict[str, Any]) -> None:
    """The manifest comes last, as everywhere; model.cdx.json says the same of the files before it."""
    from export.bill_of_materials import BILL_NAME, describe_files, write_bill

    manifest = {
        "kind": "export",
        "made_by": made_by(SCRIPT, *PACKAGES),
        "settings": settings.record(),
        "tokenizer": plan.tokenizer.record() if plan.tokenizer else None,
        "content": {
            "model": plan.config.name,
            "parameters": plan.num_parameters,
            "dtype": plan.dtype_name,
            "tied_embeddings": plan.tied,
            "training": plan.checkpoint["content"] if plan.checkpoint else {},
            "verification": proof,
        },
        "files": describe_files(directory, sorted(path.name for path in directory.iterdir())),
        "inputs": [input_record(plan.checkpoint_dir)],
    }
    write_bill(directory, manifest)
    manifest["files"] += describe_files(directory, [BILL_NAME])
    write_manifest(directory, manifest)


if __name__ == "__main__":
    cli.run(main, Settings, __doc__, positional=True)
