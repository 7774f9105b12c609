"""Meta's tokenizers by Meta's code; run by published_tokenizers.py with llama-models and tiktoken on the path.

python tokenizer_of_meta.py encode llama3|llama4 <TEXTS >IDS        both JSON lists
python tokenizer_of_meta.py write llama3|llama4 DIRECTORY
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

# By the names that they have in the tokenizer.json of Meta-Llama-3-8B; llama-models has those of Llama 3.2.
LLAMA_3_SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", *(f"<|reserved_special_token_{i}|>" for i in range(4))]
LLAMA_3_SPECIAL += ["<|start_header_id|>", "<|end_header_id|>", "<|reserved_special_token_4|>", "<|eot_id|>"]
LLAMA_3_SPECIAL += [f"<|reserved_special_token_{i}|>" for i in range(5, 251)]


def write(name: str, directory: Path) -> None:
    """As transformers' convert_llama_weights_to_hf.py does, of which the installed package has all but Llama's part."""
    from tokenizers import processors
    from transformers.convert_slow_tokenizer import TikTokenConverter

    module = importlib.import_module(f"llama_models.{name}.tokenizer")
    meta = module.Tokenizer.get_instance()
    special = LLAMA_3_SPECIAL if name == "llama3" else list(meta.special_tokens)
    ranks = Path(module.__file__).parent / "tokenizer.model"
    tokenizer = TikTokenConverter(str(ranks), meta.model._pat_str, extra_special_tokens=special).converted()
    before = processors.TemplateProcessing(
        single="<|begin_of_text|> $A",
        pair="<|begin_of_text|>:0 $A:0 <|begin_of_text|>:1 $B:1",
        special_tokens=[("<|begin_of_text|>", meta.bos_id)],
    )
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), before])
    assert tokenizer.get_vocab_size() == meta.n_words
    assert tokenizer.token_to_id("<|end_of_text|>") == meta.eos_id
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|end_of_text|>",
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": 8192 if name == "llama3" else 262144,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


def encode(name: str, texts: list[str]) -> list[list[int]]:
    meta = importlib.import_module(f"llama_models.{name}.tokenizer").Tokenizer.get_instance()
    return [meta.encode(text, bos=False, eos=False) for text in texts]


if __name__ == "__main__":
    if sys.argv[1] == "write":
        write(sys.argv[2], Path(sys.argv[3]))
    else:
        print(json.dumps(encode(sys.argv[2], json.load(sys.stdin))))
