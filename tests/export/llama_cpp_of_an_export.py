"""What llama.cpp makes of a model.gguf, as JSON; run by test_gguf.py in an environment that has it.

python llama_cpp_of_an_export.py MODEL NUM_NEW_TOKENS <QUESTIONS

QUESTIONS: {"continue": texts to tokenize and to continue, "tokenize": texts of which only the ids are wanted}
"""

from __future__ import annotations

import json
import sys
import urllib.request

import xllamacpp


def main(path: str, num_new: int, questions: dict[str, list[str]]) -> None:
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

    def ids_of(text: str) -> list[int]:
        return ask("tokenize", {"content": text, "add_special": True, "parse_special": True})["tokens"]

    answers = []
    for text in questions["continue"]:
        greedy = {"prompt": text, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
        # Only of one token: with 128,256 of them, the probabilities of each of many would be hundreds of MB.
        probabilities = ask("completion", {**greedy, "n_predict": 1, "n_probs": 200_000})["completion_probabilities"]
        first = {each["id"]: each["logprob"] for each in probabilities[0]["top_logprobs"]}
        answers.append(
            {
                "ids": ids_of(text),
                "continuation": ask("completion", {**greedy, "n_predict": num_new, "return_tokens": True})["tokens"],
                "log_probabilities": [first[number] for number in range(len(first))],
            }
        )
    print(json.dumps({"continue": answers, "tokenize": [ids_of(text) for text in questions["tokenize"]]}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), json.load(sys.stdin))
