"""What an export will write, known before the first byte is written; `checks.make_plan` makes it."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.checkpoint_files import EMBEDDING, HEAD
from utils.tokenizer import TokenizerInfo

# Without torch and litgpt, which take seconds: the script names the plan in its type hints.
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
    """With BOS and EOS as training had them."""
    pad_token: str | None
    """The user's choice, or else the one that the tokenizer names; None: none."""
    pad_id: int | None
    is_pad_chosen: bool
    """Whether the user named it."""
    weights: dict[str, StoredTensor]
    """By litgpt name, in the model's order; their dtype is that of the export."""
    tied: bool
    for_litgpt: bool
    layout: HfLayout | None
    """None without Hugging Face's format."""
    gguf: HfLayout | None
    """None without model.gguf."""

    @property
    def has_hf_config(self) -> bool:
        """Whether config.json is made, which transformers loads the tokenizer by."""
        return self.layout is not None or self.gguf is not None

    @property
    def config_pad_id(self) -> int | None:
        """The pad token for config.json, by which transformers keeps its embedding from being trained: not BOS or EOS,
        unless the user chose it."""
        is_trained = self.tokenizer is not None and self.pad_id in (self.tokenizer.bos_id, self.tokenizer.eos_id)
        return None if is_trained and not self.is_pad_chosen else self.pad_id

    @property
    def is_wrong_in_ctranslate2(self) -> bool:
        """Whether it scales positions as Llama 3.1 does, which ctranslate2 4.8.5 ignores without a word."""
        return self.layout is not None and "low_freq_factor" in (self.config.rope_adjustments or {})

    @property
    def num_parameters(self) -> int:
        """Counts a tied lm_head once."""
        return sum(math.prod(t.shape) for name, t in self.weights.items() if not (self.tied and name == HEAD))

    @property
    def num_bytes(self) -> int:
        """Of the weights in each format: safetensors holds tied embeddings once, as litgpt's file does."""
        return self.num_parameters * self.weights[EMBEDDING].dtype.itemsize

    @property
    def dtype_name(self) -> str:
        return str(self.weights[EMBEDDING].dtype).removeprefix("torch.")
