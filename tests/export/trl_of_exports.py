"""What trl makes of exports, as JSON on stdout; run by test_clients.py in trl's own environment.

python trl_of_exports.py SCRATCH TEXTS EXPORT [EXPORT ..]

TEXTS is a JSON list of two texts, which make one batch.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import datasets
import torch
import transformers
import trl
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling

NUM_STEPS = 2


def fine_tune(directory: str, scratch: Path, texts: list[str]) -> dict:
    """Fine-tune as trl's own guide does: model and tokenizer by the directory alone."""
    settings = trl.SFTConfig(
        str(scratch / "run"), max_steps=NUM_STEPS, per_device_train_batch_size=len(texts), learning_rate=1e-2,
        use_cpu=True, bf16=False, save_strategy="no", report_to="none", disable_tqdm=True,
        model_init_kwargs={"dtype": "float32"},
    )  # fmt: skip
    dataset = datasets.Dataset.from_list([{"text": text} for text in texts])
    trainer = trl.SFTTrainer(directory, settings, train_dataset=dataset)
    batch = next(iter(trainer.get_train_dataloader()))
    loss = trainer.train().training_loss
    trainer.save_model(str(scratch / "tuned"))

    before = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).state_dict()
    tuned = trainer.model.state_dict()
    loaded = AutoModelForCausalLM.from_pretrained(scratch / "tuned", dtype=torch.float32)
    rows = zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True)
    longest = next(ids for ids, labels in rows if -100 not in labels)
    # Twice, as in packing: nothing is predicted from a last token, so that its embedding gets no gradient anyway.
    packed = torch.tensor([2 * longest])
    loaded(packed, labels=packed).loss.backward()
    rows_with_gradient = loaded.get_input_embeddings().weight.grad.abs().sum(dim=1).nonzero().flatten()
    return {
        "loss": loss,
        "input_ids": batch["input_ids"].tolist(),
        "labels": batch["labels"].tolist(),
        "unchanged": [name for name, weight in before.items() if torch.equal(weight, tuned[name])],
        "loaded_again": all(torch.equal(weight, tuned[name]) for name, weight in loaded.state_dict().items()),
        "ids_loaded_again": AutoTokenizer.from_pretrained(scratch / "tuned")(texts)["input_ids"],
        "pad_id_in_config": loaded.config.pad_token_id,
        "ids_whose_embedding_is_trained_next": rows_with_gradient.tolist(),
        "labels_by_transformers": labels_by_transformers(directory, longest),
    }


def labels_by_transformers(directory: str, ids: list[int]) -> list[int]:
    """The labels that transformers' collator makes of a text, with EOS for padding where there is no pad token."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    batch = DataCollatorForLanguageModeling(tokenizer, mlm=False)([{"input_ids": ids}])
    return batch["labels"][0].tolist()


def main(scratch: Path, texts: list[str], directories: list[str]) -> None:
    torch.set_num_threads(1)
    answers = [fine_tune(directory, scratch / str(n), texts) for n, directory in enumerate(directories)]
    version = f"trl {trl.__version__} with transformers {transformers.__version__}"
    print(json.dumps({"version": version, "answers": answers}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3:])
