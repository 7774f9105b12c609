"""What can be checked before the first byte is written; it ends in a plan."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from litgpt import GPT, Config

from export.checkpoint_files import EMBEDDING, HEAD, MODEL_CONFIG
from export.checkpoint_weights import find_weights
from export.gguf_file import gguf_layout, gguf_problems
from export.hf_config import export_problems, family_of
from export.hf_layout import hf_layout
from export.plan import ExportPlan
from export.stored_tensor import StoredTensor
from export.tokenizer_files import id_of_token, stated_pad_token, tokenizer_of_training
from utils import console
from utils.errors import Problems, UserError
from utils.tokenizer import TokenizerInfo, read_tokenizer_info


def make_plan(
    checkpoint_dir: Path, checkpoint: dict[str, Any] | None, formats: str, dtype: str, pad_token: str | None
) -> ExportPlan:
    """Check everything that can be checked without reading all weights; every problem is reported at once.

    Args:
        checkpoint: its manifest.
        formats: as in the script's settings.
        dtype: of the exported weights, as "bfloat16"; "same" keeps the checkpoint's.
        pad_token: of the exported tokenizer; None: the one that the tokenizer names, if any.
    """
    problems = Problems()
    config = problems.collect(read_model_config, checkpoint_dir, formats)
    found = problems.collect(find_weights, checkpoint_dir)
    tokenizer = problems.collect(find_tokenizer, checkpoint_dir, config, checkpoint)
    pad = problems.collect(find_pad_token, checkpoint_dir, tokenizer, pad_token)
    problems.raise_if_any()

    weights = fit_weights(found, config, checkpoint_dir)
    tied = is_tied(weights)
    if dtype != "same":
        rounded = getattr(torch, dtype)
        weights = {name: dataclasses.replace(tensor, rounded_dtype=rounded) for name, tensor in weights.items()}
    layout = gguf = None
    if formats != "litgpt":
        layout = hf_layout(family_of(config), config, weights, tied)
    if formats == "gguf":
        layout, gguf = None, gguf_layout(family_of(config), config, layout)
    if formats == "gguf" and tokenizer is None:
        raise UserError("--formats=gguf: needs the tokenizer, which is a part of model.gguf.")
    for_litgpt = formats in ("all", "litgpt")
    return ExportPlan(
        checkpoint_dir, checkpoint, config, tokenizer, *(pad or (None, None)), pad_token is not None, weights, tied,
        for_litgpt, layout, gguf,
    )  # fmt: skip


def read_model_config(checkpoint_dir: Path, formats: str) -> Config:
    path = checkpoint_dir / MODEL_CONFIG
    if not path.is_file():
        raise UserError(
            f"{path}: missing. Training writes it beside the weights; copy it from another checkpoint of the run."
        )
    try:
        config = Config.from_file(path)
    except Exception as error:  # whatever a damaged or foreign file makes of litgpt's dataclass
        raise UserError(f"{path}: not a model configuration of litgpt ({error}).") from error
    reasons = export_problems(config) if formats != "litgpt" else []
    if reasons:
        raise UserError(
            f"{path}: '{config.name}' cannot become a Hugging Face model of type {family_of(config)}: "
            f"{'; '.join(reasons)}. For litgpt alone: --formats litgpt"
        )
    if formats == "gguf" and (reasons := gguf_problems(family_of(config), config)):
        raise UserError(f"{path}: '{config.name}' cannot become a model of llama.cpp: {'; '.join(reasons)}.")
    return config


def find_tokenizer(
    checkpoint_dir: Path, config: Config | None, checkpoint: dict[str, Any] | None
) -> TokenizerInfo | None:
    """The tokenizer beside the weights, with BOS and EOS of training; it must fit the embedding of `config`."""
    if not (checkpoint_dir / "tokenizer.json").is_file():
        console.warn(
            f"{checkpoint_dir} has no tokenizer.json: the export gets none, and generation does not know its end "
            "token. Copy the tokenizer's files there first, or into the export afterwards."
        )
        return None
    tokenizer = tokenizer_of_training(read_tokenizer_info(checkpoint_dir, flag="checkpoint_dir"), checkpoint)
    if config is not None and tokenizer.vocab_size > config.padded_vocab_size:
        raise UserError(
            f"{checkpoint_dir}: the tokenizer has ids up to {tokenizer.vocab_size - 1}, the model's embedding "
            f"{config.padded_vocab_size} rows: it is not the tokenizer that the model was trained with."
        )
    if tokenizer.eos_id is None:
        console.warn(f"{checkpoint_dir}: the tokenizer names no eos_token: generation will only stop at its length.")
    return tokenizer


def find_pad_token(
    checkpoint_dir: Path, tokenizer: TokenizerInfo | None, pad_token: str | None
) -> tuple[str, int] | None:
    """Name and id of `pad_token`, the user's choice, or else of the one that the tokenizer's files name."""
    if tokenizer is None:
        if pad_token is not None:
            raise UserError(f"--pad_token={pad_token}: {checkpoint_dir} has no tokenizer.json. Leave the flag out.")
        return None
    if pad_token is not None:
        found = pad_token, id_of_token(checkpoint_dir, pad_token, "--pad_token")
        named_by, remedy = f"--pad_token={pad_token}", ""
    elif found := stated_pad_token(checkpoint_dir):
        named_by = f"{checkpoint_dir}: the tokenizer's pad token is {found[0]}"
        remedy = ": choose one with --pad_token"
    if found and found[1] in (tokenizer.bos_id, tokenizer.eos_id):
        console.warn(
            f"{named_by}: texts begin or end with it. Trainers that leave padding out of the loss leave it out there "
            f"too, so that the model forgets where a text ends. A token that no text holds is better{remedy}."
        )
    return found


def fit_weights(found: dict[str, StoredTensor], config: Config, checkpoint_dir: Path) -> dict[str, StoredTensor]:
    """The weights in the model's order; raises UserError when names or shapes are not those of the configuration."""
    with torch.device("meta"):
        expected = {name: tuple(tensor.shape) for name, tensor in GPT(config).state_dict().items()}
    # Where lm_head is missing, a trainer has saved it as the embedding that it shares.
    found = {HEAD: dataclasses.replace(found[EMBEDDING], name=HEAD), **found}
    differences = [f"'{name}' missing" for name in expected if name not in found]
    differences += [f"'{name}' unknown" for name in found if name not in expected]
    differences += [
        f"'{name}' has shape {found[name].shape}, expected {shape}"
        for name, shape in expected.items()
        if name in found and found[name].shape != shape
    ]
    differences += [f"'{name}' has {t.dtype}" for name, t in found.items() if not t.dtype.is_floating_point]
    if differences:
        more = f" and {len(differences) - 5} more" if len(differences) > 5 else ""
        raise UserError(
            f"{checkpoint_dir}: the weights are not those of model_config.yaml: {'; '.join(differences[:5])}{more}. "
            "Copy model_config.yaml from the run that made the weights."
        )
    return {name: found[name] for name in expected}


def is_tied(weights: dict[str, StoredTensor]) -> bool:
    """Whether lm_head and embedding hold the same values.

    Decided from the weights: a family's default would make transformers drop a head that was trained by itself.
    """
    head, embedding = weights[HEAD], weights[EMBEDDING]
    if head.pieces == embedding.pieces:
        return True
    return head.dtype == embedding.dtype and all(
        torch.equal(block, embedding.rows(start, start + len(block))) for start, block in head.blocks()
    )
