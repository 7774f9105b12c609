"""Proof that an export is right: every byte compared with the checkpoint, and both models run on the same tokens.

The models are built without weights. Each layer reads the rows that it needs from the exported files when it is called,
and forgets them, so a model larger than memory runs too. All arithmetic is in float32, whatever the stored dtype.
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from pathlib import Path

import torch
import transformers
from litgpt import GPT, Config
from transformers import AutoConfig, AutoModelForCausalLM

from export.checkpoint_weights import find_in_safetensors, find_in_torch_file
from export.experts import join_experts
from export.gguf_file import find_in_gguf
from export.plan import ExportPlan
from export.quiet_libraries import quiet_torchao
from export.stored_tensor import StoredTensor
from utils.errors import UserError

NUM_TOKENS = 64
"""Length of the random sequence that both models read."""
LOGITS_TOLERANCE = 1e-4
"""Largest allowed difference of logits, as a part of the largest logit (or absolute, where that is below 1)."""
KL_TOLERANCE = 1e-6
"""Largest allowed mean KL divergence of the predicted distributions, in nats per token."""
_ROPE_TOLERANCE = 1e-2  # position * frequency has few digits left at position 30,000 in float32
_MAX_ROPE_POSITION = 32_768


# Weights --------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ExportedWeights:
    """What the written files hold, by the names of each format; None for a format that was not made."""

    lit: dict[str, StoredTensor] | None
    hf: dict[str, StoredTensor] | None
    gguf: dict[str, StoredTensor] | None


def find_exported(plan: ExportPlan, directory: Path) -> ExportedWeights:
    lit = find_in_torch_file(directory / "lit_model.pth") if plan.for_litgpt else None
    hf = find_in_safetensors(directory) if plan.layout else None
    return ExportedWeights(lit, hf, find_in_gguf(directory) if plan.gguf else None)


def compare_weights(plan: ExportPlan, exported: ExportedWeights) -> int:
    """Compare every row of the exported files with the checkpoint, in the exported dtype.

    Returns:
        The number of values compared.

    Raises:
        UserError: a value differs, or names or shapes do.
    """
    lit = exported.lit
    converted = [(exported.hf, plan.layout), (exported.gguf, plan.gguf)]
    converted = [(files, layout) for files, layout in converted if files is not None]
    shapes = [(files, {spec.name: spec.shape for spec in layout.specs}) for files, layout in converted]
    if lit is not None:
        shapes.append((lit, {name: tensor.shape for name, tensor in plan.weights.items()}))
    for files, planned in shapes:
        if {name: tensor.shape for name, tensor in files.items()} != planned:
            raise UserError(f"exported files hold other tensors than planned: {sorted(set(files) ^ set(planned))[:5]}")

    num_values = 0
    for name, tensor in plan.weights.items():
        for start, block in tensor.blocks():
            copies = [(lit[name], start, block)] if lit is not None else []
            for files, layout in converted:
                copies += [(files[target], row, rows) for target, row, rows in layout.distribute(name, start, block)]
            for found, row, expected in copies:
                rows = found.rows(row, row + len(expected))
                if rows.dtype != expected.dtype or not torch.equal(_bits(rows), _bits(expected)):
                    file = found.pieces[0].path
                    raise UserError(f"{file}: '{found.name}' differs from the checkpoint. Is the disk damaged or full?")
                num_values += expected.numel()
    return num_values


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """The same bytes as integers: NaN equals NaN then, and 0 differs from -0."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(integers[tensor.dtype.itemsize])


# Logits ---------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class LogitsComparison:
    """How far litgpt and transformers are apart on the same tokens."""

    num_tokens: int
    max_abs_difference: float
    max_abs_logit: float
    kl_divergence_nats: float
    """Mean over positions of KL(litgpt || transformers)."""

    @property
    def tolerance(self) -> float:
        return LOGITS_TOLERANCE * max(1.0, self.max_abs_logit)

    @property
    def passed(self) -> bool:  # false for NaN too
        return self.max_abs_difference <= self.tolerance and abs(self.kl_divergence_nats) <= KL_TOLERANCE


def compare_logits(
    config: Config, lit_tensors: dict[str, StoredTensor], hf_directory: Path, hf_tensors: dict[str, StoredTensor]
) -> LogitsComparison:
    """Run litgpt's model and transformers' on the same random tokens, each on its own exported weights.

    Raises:
        UserError: a model cannot be made from the export, or the two turn positions into different angles.
    """
    length = min(NUM_TOKENS, config.block_size)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, config.padded_vocab_size, (1, length), generator=generator)
    with torch.inference_mode():
        lit_model = _litgpt_model(config, lit_tensors)
        hf_model = _transformers_model(hf_directory, hf_tensors)
        _compare_rope(lit_model, hf_model)
        lit_logits = lit_model(tokens).flatten(0, 1)
        hf_logits = hf_model(tokens, use_cache=False).logits.flatten(0, 1)
    max_difference = max_logit = kl_sum = 0.0
    for lit_row, hf_row in zip(
        lit_logits, hf_logits
    ):  # one position at a time: double precision takes twice the memory
        lit_row, hf_row = lit_row.double(), hf_row.double()
        difference = float((lit_row - hf_row).abs().max())
        if math.isnan(difference):
            max_difference = kl_sum = math.nan
            break
        max_difference = max(max_difference, difference)
        max_logit = max(max_logit, float(lit_row.abs().max()))
        lit_log, hf_log = lit_row.log_softmax(-1), hf_row.log_softmax(-1)
        kl_sum += float((lit_log.exp() * (lit_log - hf_log)).sum())
    return LogitsComparison(length, max_difference, max_logit, kl_sum / length)


def _litgpt_model(config: Config, tensors: dict[str, StoredTensor]) -> GPT:
    with torch.device("meta"):
        model = GPT(config)
        model.max_seq_length = min(config.block_size, _MAX_ROPE_POSITION)
    model.cos, model.sin = model.rope_cache(device=torch.device("cpu"))
    stream_weights(model, tensors)
    return model.eval()


def _transformers_model(directory: Path, tensors: dict[str, StoredTensor]) -> transformers.PreTrainedModel:
    quiet_torchao()
    transformers.logging.set_verbosity_error()  # it warns of sizes that are unusual, and right in small models
    config = AutoConfig.from_pretrained(directory)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for module in model.modules():
        if any(True for _ in module.buffers(recurse=False)):
            module.to_empty(device="cpu", recurse=False)
            model._init_weights(module)  # transformers' own way to fill in RoPE frequencies that are not stored
    if config.tie_word_embeddings:
        names = {module: name for name, module in model.named_modules()}
        head, embedding = names[model.get_output_embeddings()], names[model.get_input_embeddings()]
        tensors = {**tensors, f"{head}.weight": tensors[f"{embedding}.weight"]}
    tensors = join_experts(tensors)
    expected = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    if expected != set(tensors):
        raise UserError(
            f"{type(model).__name__} expects other weights than were exported: {sorted(expected ^ set(tensors))[:5]}. "
            "Please report this model_config.yaml."
        )
    stream_weights(model, tensors)
    return model.eval()


def stream_weights(model: torch.nn.Module, tensors: dict[str, StoredTensor]) -> None:
    """Let every layer of a model on the meta device read its weights from files while it is called.

    Linear layers read blocks of rows, embeddings the rows that are used, other layers (norms) their few weights whole.
    """
    for prefix, module in model.named_modules():
        stored = {name: tensors[f"{prefix}.{name}"] for name, _ in module.named_parameters(recurse=False)}
        for name, tensor in stored.items():
            shape = tuple(getattr(module, name).shape)
            if shape != tensor.shape:
                raise UserError(
                    f"'{prefix}.{name}' is stored with shape {tensor.shape}, {type(model).__name__} made from the "
                    f"exported configuration has {shape}. Please report this model_config.yaml."
                )
        if isinstance(module, torch.nn.Linear):
            module.forward = partial(_linear, stored["weight"], stored.get("bias"))
        elif isinstance(module, torch.nn.Embedding):
            module.padding_idx = None
            module.register_forward_pre_hook(partial(_read_used_rows, stored["weight"]))
        elif stored:
            module.register_forward_pre_hook(partial(_read_whole, stored))


def _linear(weight: StoredTensor, stored_bias: StoredTensor | None, x: torch.Tensor) -> torch.Tensor:
    bias = stored_bias.rows(0, stored_bias.num_rows).float() if stored_bias else None
    out = x.new_empty((*x.shape[:-1], weight.num_rows))
    for start, block in weight.blocks():
        stop = start + len(block)
        part = bias[start:stop] if bias is not None else None
        out[..., start:stop] = torch.nn.functional.linear(x, block.float(), part)
    return out


def _read_used_rows(weight: StoredTensor, embedding: torch.nn.Embedding, args: tuple) -> tuple:
    ids, places = args[0].unique(return_inverse=True)
    rows = torch.cat([weight.rows(i, i + 1) for i in ids.tolist()]).float()
    embedding.weight = torch.nn.Parameter(rows, requires_grad=False)
    return (places,)


def _read_whole(stored: dict[str, StoredTensor], module: torch.nn.Module, _) -> None:
    for name, tensor in stored.items():
        setattr(module, name, torch.nn.Parameter(tensor.rows(0, tensor.num_rows).float(), requires_grad=False))


def _compare_rope(lit_model: GPT, hf_model: transformers.PreTrainedModel) -> None:
    """Compare the angles of positions far apart, which 64 tokens alone would not tell from wrong ones.

    litgpt's cos is (positions, elements), with a last dimension of 2 for global and local layers of Gemma 3.
    """
    positions = torch.linspace(0, lit_model.max_seq_length - 1, 64).long()
    rotary = next(module for module in hf_model.modules() if "RotaryEmbedding" in type(module).__name__)
    kinds, lit_angles = [()], [lit_model.cos]
    if lit_model.cos.dim() == 3:
        kinds, lit_angles = [("full_attention",), ("sliding_attention",)], lit_model.cos.unbind(-1)
    for kind, lit_cos in zip(kinds, lit_angles):
        hf_cos = rotary(torch.zeros(1, len(positions), 1), positions[None], *kind)[0][0]
        difference = float((lit_cos[positions] - hf_cos).abs().max())
        if not difference <= _ROPE_TOLERANCE:
            raise UserError(
                f"positions become different angles in litgpt and transformers (cosines differ by {difference:.2g}). "
                "Please report this model_config.yaml."
            )
