"""What llama.cpp makes of a model.gguf, as JSON; run by test_gguf.py in an environment that has it.

python llama_cpp_of_an_export.py MODEL NUM_NEW_TOKENS TEXT [TEXT ..]
"""

from __future__ import annotations

import json
import sys
import urllib.request

import xllamacpp


def main(path: str, num_new: int, texts: list[str]) -> None:
    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_ctx, params.n_parallel, params.warmup = 512, 1, False
    params.cpuparams.n_threads = 1
    # Its flash attention, and its cache of keys and values, are float16 otherwise.
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    server = xllamacpp.Server(params)

    def ask(what: str, question: dict) -> dict:
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{server.listening_address}/{what}", json.dumps(question).encode(), headers)
        return json.load(urllib.request.urlopen(request))

    answers = []
    for text in texts:
        ids = ask("tokenize", {"content": text, "add_special": True, "parse_special": True})["tokens"]
        greedy = {"temperature": 0, "n_predict": num_new, "ignore_eos": True, "cache_prompt": False}
        answer = ask("completion", {"prompt": text, "n_probs": 100_000, "return_tokens": True, **greedy})
        first = {each["id"]: each["logprob"] for each in answer["completion_probabilities"][0]["top_logprobs"]}
        answers.append(
            {
                "ids": ids,
                "continuation": answer["tokens"],
                "log_probabilities": [first[number] for number in range(len(first))],
            }
        )
    print(json.dumps(answers))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3:])
