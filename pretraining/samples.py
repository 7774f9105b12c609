"""What the model writes after given prompts, at each validation: samples.jsonl."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tokenizers import Tokenizer

from pretraining.data import even_batches
from pretraining.evaluation_plan import prompts_as_tokens
from pretraining.metrics_writer import SAMPLES_NAME
from pretraining.plan import Plan
from pretraining.settings import Settings
from utils.manifest import read_manifest
from utils.tokenizer import read_tokenizer_info


class Samples:
    """Every process makes one, if there are prompts, and calls `write` at the same steps.

    Args:
        batch_tokens: tokens that a process computes at a time, at most; one text in any case.
        device: where the model's inputs go.
    """

    def __init__(self, model: torch.nn.Module, settings: Settings, plan: Plan, batch_tokens: int, device: torch.device):
        self._model, self._device, self._settings = model, device, settings
        self._path = Path(settings.out_dir) / SAMPLES_NAME
        self._tokenizer = Tokenizer.from_file(str(Path(settings.tokenizer_dir) / "tokenizer.json"))
        self._eos_id = read_tokenizer_info(settings.tokenizer_dir).eos_id
        prompts = prompts_as_tokens(settings, [read_manifest(directory) for directory in plan.train_directories])
        temperatures = [0.0] + [t for t in (settings.eval.sample_temperature,) if t is not None]
        self._texts = [(number, ids, t) for t in temperatures for number, ids in enumerate(prompts)]
        self._num_new = settings.eval.sample_tokens
        self._width = max(map(len, prompts)) + self._num_new
        size = max(1, batch_tokens // self._width)
        self._batches = even_batches(len(self._texts), size, dist.get_rank(), dist.get_world_size())

    def write(self, step: int) -> None:
        """Continue each prompt and append one line per text to samples.jsonl; without gradients, in evaluation mode."""
        found = torch.zeros(len(self._texts), self._num_new, dtype=torch.int64, device=self._device)
        for numbers in self._batches:
            found[numbers] = self._continue(numbers)
        dist.all_reduce(found)
        if dist.get_rank() != 0:
            return
        with open(self._path, "a", encoding="utf-8") as file:
            for (prompt, _, temperature), tokens in zip(self._texts, found.tolist()):
                if self._eos_id in tokens:
                    tokens = tokens[: tokens.index(self._eos_id) + 1]
                record = {
                    "step": step,
                    "prompt": self._settings.eval.prompts[prompt],
                    "temperature": temperature,
                    "text": self._tokenizer.decode(tokens),
                    "tokens": tokens,
                }
                file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())  # a checkpoint must not be newer than what was written before it

    def _continue(self, numbers: np.ndarray) -> torch.Tensor:
        """The new tokens of these texts: int64, shape (len(numbers), sample_tokens); a forward pass for each token."""
        texts = [self._texts[number] for number in numbers] or self._texts[:1]  # else only to gather weights
        tokens = torch.zeros(len(texts), self._width, dtype=torch.int64)
        ends = torch.tensor([len(ids) for _, ids, _ in texts])
        # Drawn the same at each step, whatever the number of processes: the model alone makes the difference.
        draws = [torch.Generator().manual_seed(self._settings.seed + prompt) for prompt, _, _ in texts]
        for row, (_, ids, _) in zip(tokens, texts):
            row[: len(ids)] = torch.tensor(ids)
        for place in range(self._num_new):
            last = (ends + place - 1).to(self._device)
            logits = self._model(tokens.to(self._device), positions=last).float().cpu()
            chosen = [_choose(row, text[2], draw) for row, text, draw in zip(logits, texts, draws)]
            tokens[torch.arange(len(texts)), ends + place] = torch.tensor(chosen)
        new = [row[end : end + self._num_new] for row, end in zip(tokens, ends.tolist())]
        return torch.stack(new)[: len(numbers)].to(self._device)


def _choose(logits: torch.Tensor, temperature: float, draw: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    return int(torch.multinomial((logits.double() / temperature).softmax(dim=0), 1, generator=draw))
