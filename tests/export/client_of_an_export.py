"""What one client makes of an export, as JSON on stdout; run by test_clients.py in the client's own environment.

python client_of_an_export.py CLIENT EXPORT SCRATCH TEXT NUM_NEW_TOKENS
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def load(directory: str) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def logits_of(model: torch.nn.Module, ids: list[int]) -> np.ndarray:
    """Shape (tokens, vocabulary)."""
    with torch.no_grad():
        return model(torch.tensor([ids]), use_cache=False).logits[0].float().numpy()


def continue_with(model: torch.nn.Module, ids: list[int], num_new: int) -> list[int]:
    prompt = torch.tensor([ids])
    generated = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=num_new, min_new_tokens=num_new, do_sample=False
    )
    return generated[0, len(ids) :].tolist()


def of_transformers(directory: str, scratch: Path, ids: list[int], num_new: int):
    import transformers

    model = load(directory)
    return f"transformers {transformers.__version__}", logits_of(model, ids), continue_with(model, ids, num_new)


def of_peft(directory: str, scratch: Path, ids: list[int], num_new: int):
    """An adapter that was trained one step and merged, against the same adapter loaded onto the export again."""
    import peft

    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(load(directory), config).eval()
    untrained = logits_of(adapted, ids), continue_with(adapted, ids, num_new)
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=1.0)
    adapted(torch.tensor([ids]), labels=torch.tensor([ids])).loss.backward()
    optimizer.step()
    adapted.save_pretrained(scratch / "adapter")
    trained = logits_of(adapted, ids)
    assert np.abs(trained - untrained[0]).max() > 1e-4, "the adapter has learnt nothing"
    merged = adapted.merge_and_unload()
    loaded = peft.PeftModel.from_pretrained(load(directory), scratch / "adapter").eval()
    for other in (merged, loaded):
        np.testing.assert_allclose(logits_of(other, ids), trained, atol=1e-4, rtol=0)
    return f"peft {peft.__version__}", *untrained


def of_ctranslate2(directory: str, scratch: Path, ids: list[int], num_new: int):
    import ctranslate2

    ctranslate2.converters.TransformersConverter(directory).convert(str(scratch / "ctranslate2"))
    generator = ctranslate2.Generator(str(scratch / "ctranslate2"), device="cpu", compute_type="float32")
    tokens = AutoTokenizer.from_pretrained(directory).convert_ids_to_tokens(ids)
    result = generator.generate_batch(
        [tokens], max_length=num_new, min_length=num_new, sampling_topk=1, include_prompt_in_result=False
    )
    logits = np.array(generator.forward_batch([ids]))[0]
    return f"ctranslate2 {ctranslate2.__version__}", logits, result[0].sequences_ids[0]


def of_onnxruntime(directory: str, scratch: Path, ids: list[int], num_new: int):
    import onnxruntime

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = load(directory)

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return self.model(input_ids, use_cache=False).logits

    path = scratch / "model.onnx"
    length = torch.export.Dim("length", max=512)
    program = torch.onnx.export(
        Logits().eval(), (torch.tensor([ids]),), dynamo=True, dynamic_shapes={"input_ids": {1: length}}, verbose=False
    )
    program.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def run(tokens: list[int]) -> np.ndarray:
        return session.run(None, {name: np.array([tokens])})[0][0]

    tokens = list(ids)
    for _ in range(num_new):
        tokens.append(int(run(tokens)[-1].argmax()))
    return f"onnxruntime {onnxruntime.__version__}", run(ids), tokens[len(ids) :]


def of_transformers_js(directory: str, scratch: Path, ids: list[int], num_new: int):
    """Through Optimum's ONNX file; ids and text are transformers.js' own and must be transformers'."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    text = tokenizer.decode(ids, skip_special_tokens=True)
    command = [sys.executable, "-m", "optimum.exporters.onnx", "--task", "text-generation-with-past"]
    subprocess.run([*command, "--model", directory, scratch / "model"], check=True)
    (scratch / "model" / "onnx").mkdir()
    (scratch / "model" / "model.onnx").rename(scratch / "model" / "onnx" / "model.onnx")
    request = {"texts": [text], "model": str(scratch / "model"), "num_new_tokens": num_new}
    (scratch / "request.json").write_text(json.dumps(request))
    script = Path(__file__).parent / "transformers_js_of_exports.mjs"
    files = (scratch / "request.json", scratch / "answer.json")
    subprocess.run(["node", script, os.environ["NODE_PROJECT"], *files], check=True)
    answer = json.loads((scratch / "answer.json").read_bytes())
    (found,) = answer["answers"]
    assert found["ids"][: len(ids)] == ids
    assert found["decoded"] == tokenizer.decode(found["ids"])
    assert found["generated_text"] == tokenizer.decode(found["ids"], skip_special_tokens=True)
    return answer["version"], np.array(found["logits"], dtype=np.float32), found["ids"][len(ids) :]


def main(client: str, scratch: Path, text: str, num_new: int, directories: list[str]) -> None:
    torch.set_num_threads(1)
    answers = []
    for number, directory in enumerate(directories):
        own = scratch / str(number)
        own.mkdir()
        tokenizer = AutoTokenizer.from_pretrained(directory)
        ids = tokenizer(text)["input_ids"]
        version, logits, continuation = globals()[f"of_{client}"](directory, own, ids, num_new)
        np.save(own / "logits.npy", logits)
        decoded = tokenizer.decode(continuation)
        answers.append({"version": version, "ids": ids, "continuation": continuation, "text": decoded})
    (scratch / "answers.json").write_text(json.dumps(answers))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]), sys.argv[5:])
