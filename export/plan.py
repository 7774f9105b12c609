"""What an export will write, known and checked before the first byte is written."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils import console
from utils.errors import Problems, UserError
from utils.manifest import MANIFEST_NAME, damaged_files, read_manifest
from utils.tokenizer import TokenizerInfo, read_tokenizer_info

if TYPE_CHECKING:
    from litgpt import Config

    from export.hf_layout import HfLayout
    from export.stored_tensor import StoredTensor


@dataclasses.dataclass(frozen=True)
class ExportPlan:
    """A checkpoint's parts, and what becomes of them."""

    checkpoint_dir: Path
    checkpoint: dict[str, Any] | None
    """The checkpoint's manifest."""
    config: Config
    tokenizer: TokenizerInfo | None
    weights: dict[str, StoredTensor]
    """By litgpt name, in the model's order; their dtype is that of the export."""
    tied: bool
    layout: HfLayout | None
    """None without Hugging Face's format."""

    @property
    def num_parameters(self) -> int:
        """Counts a tied lm_head once."""
        return sum(
            math.prod(tensor.shape)
            for name, tensor in self.weights.items()
            if not (self.tied and name == "lm_head.weight")
        )

    @property
    def dtype_name(self) -> str:
        return str(self.weights["transformer.wte.weight"].dtype).removeprefix("torch.")


def make_plan(checkpoint_dir: Path, for_hf: bool, dtype: str) -> ExportPlan:
    """Check everything that can be checked without reading the weights; every problem is reported at once.

    Args:
        for_hf: whether Hugging Face's format is made.
        dtype: of the exported weights, as "bfloat16"; "same" keeps the checkpoint's.
    """
    if not checkpoint_dir.is_dir():
        raise UserError(
            f"checkpoint_dir={checkpoint_dir}: no such directory. Give one that distributed_pretrain.py made: OUT_DIR/final or "
            "OUT_DIR/step-.."
        )
    check_is_checkpoint(checkpoint_dir)
    problems = Problems()
    checkpoint = problems.collect(read_manifest, checkpoint_dir, kind="checkpoint")
    if checkpoint is None:
        console.warn(
            f"{checkpoint_dir} has no {MANIFEST_NAME}: what it was trained on, and whether its files are the ones that "
            "were written, cannot be checked."
        )
    for problem in changed_files(checkpoint_dir, checkpoint) if checkpoint else []:
        problems.add(f"{problem}. Copy the checkpoint again, or take an earlier one.")
    problems.raise_if_any()

    import torch

    from export.checkpoint_weights import find_weights

    config = problems.collect(read_model_config, checkpoint_dir, for_hf)
    found = problems.collect(find_weights, checkpoint_dir)
    tokenizer = problems.collect(find_tokenizer, checkpoint_dir, config)
    problems.raise_if_any()

    weights = check_weights_fit(found, config, checkpoint_dir)
    tied = is_tied(weights)
    if dtype != "same":
        rounded = getattr(torch, dtype)
        weights = {name: dataclasses.replace(tensor, rounded_dtype=rounded) for name, tensor in weights.items()}
    layout = None
    if for_hf:
        from export.hf_config import family_of
        from export.hf_layout import hf_layout

        layout = hf_layout(family_of(config), config, weights, tied)
    return ExportPlan(checkpoint_dir, checkpoint, config, tokenizer, weights, tied, layout)


def check_is_checkpoint(directory: Path) -> None:
    """Raises UserError for a directory above or below a checkpoint, whose every other fault would only follow from that."""
    from export.checkpoint_weights import LIT_MODEL, nothing_there

    nearby = (directory / ".metadata").is_file() or any(directory.glob(f"*/{LIT_MODEL}"))
    if nearby and not (directory / LIT_MODEL).exists():
        raise UserError(nothing_there(directory))


def changed_files(checkpoint_dir: Path, checkpoint: dict[str, Any]) -> list[str]:
    """Files whose size is not the manifest's; the weights' own checksums are checked while they are read."""
    entries = checkpoint["files"]
    if not (checkpoint_dir / "lit_model.pth").is_dir():  # consolidated: the shards are elsewhere now
        entries = [entry for entry in entries if not str(entry.get("name")).startswith("lit_model.pth/")]
    return damaged_files(checkpoint_dir, entries, checksums=False)


def read_model_config(checkpoint_dir: Path, for_hf: bool) -> Config:
    from litgpt import Config

    from export.hf_config import export_problems, family_of

    path = checkpoint_dir / "model_config.yaml"
    if not path.is_file():
        raise UserError(
            f"{path}: missing. It is written beside the weights by training; copy it from another checkpoint of the run."
        )
    try:
        config = Config.from_file(path)
    except Exception as error:  # whatever a damaged or foreign file makes of litgpt's dataclass
        raise UserError(f"{path}: not a model configuration of litgpt ({error}).") from error
    reasons = export_problems(config) if for_hf else []
    if reasons:
        raise UserError(
            f"{path}: '{config.name}' cannot become a Hugging Face model of type {family_of(config)}: "
            f"{'; '.join(reasons)}. For litgpt alone: --formats litgpt"
        )
    return config


def find_tokenizer(checkpoint_dir: Path, config: Config | None) -> TokenizerInfo | None:
    if not (checkpoint_dir / "tokenizer.json").is_file():
        console.warn(
            f"{checkpoint_dir} has no tokenizer.json: the export gets none, and generation does not know its end token. "
            "Copy the tokenizer's files there first, or into the export afterwards."
        )
        return None
    tokenizer = read_tokenizer_info(checkpoint_dir, flag="checkpoint_dir")
    if config is not None and tokenizer.vocab_size > config.padded_vocab_size:
        raise UserError(
            f"{checkpoint_dir}: the tokenizer has ids up to {tokenizer.vocab_size - 1}, the model's embedding "
            f"{config.padded_vocab_size} rows: it is not the tokenizer that the model was trained with."
        )
    if tokenizer.eos_id is None:
        console.warn(f"{checkpoint_dir}: the tokenizer names no eos_token: generation will only stop at its length.")
    return tokenizer


def check_weights_fit(found: dict[str, StoredTensor], config: Config, checkpoint_dir: Path) -> dict[str, StoredTensor]:
    """The weights in the model's order; raises UserError when names or shapes are not those of the configuration."""
    import torch
    from litgpt import GPT

    with torch.device("meta"):
        expected = {name: tuple(tensor.shape) for name, tensor in GPT(config).state_dict().items()}
    if "lm_head.weight" not in found:  # saved by a trainer that shares it with the embedding
        embedding = found["transformer.wte.weight"]
        found = {**found, "lm_head.weight": dataclasses.replace(embedding, name="lm_head.weight")}
    differences = [f"'{name}' missing" for name in expected if name not in found]
    differences += [f"'{name}' unknown" for name in found if name not in expected]
    differences += [
        f"'{name}' has shape {found[name].shape}, expected {shape}"
        for name, shape in expected.items()
        if name in found and found[name].shape != shape
    ]
    differences += [f"'{name}' has {t.dtype}" for name, t in found.items() if not t.dtype.is_floating_point]
    if differences:
        raise UserError(
            f"{checkpoint_dir}: the weights are not those of model_config.yaml: {'; '.join(differences[:5])}"
            f"{f' and {len(differences) - 5} more' if len(differences) > 5 else ''}. "
            "Copy model_config.yaml from the run that made the weights."
        )
    return {name: found[name] for name in expected}


def is_tied(weights: dict[str, StoredTensor]) -> bool:
    """Whether lm_head and embedding hold the same values.

    Decided from the weights: a family's default would make transformers drop a head that was trained by itself.
    """
    import torch

    head, embedding = weights["lm_head.weight"], weights["transformer.wte.weight"]
    if head.pieces == embedding.pieces:
        return True
    return head.dtype == embedding.dtype and all(
        torch.equal(block, embedding.rows(start, start + len(block))) for start, block in head.blocks()
    )
