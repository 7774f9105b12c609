// What transformers.js makes of texts with the tokenizers and the models of exports, as JSON; run by test_clients.py.
//
// node transformers_js_of_exports.mjs NODE_PROJECT REQUEST ANSWER
//
// NODE_PROJECT: where npm has installed it. REQUEST: a file with {"texts": [..], "tokenizers": [directory, ..]}, or with
// {"texts": [..], "model": directory, "num_new_tokens": ..}, whose directory holds onnx/model.onnx.

import { readFileSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import { resolve } from "node:path";

const [project, requestPath, answerPath] = process.argv.slice(2);
const require = createRequire(resolve(project, "package.json"));
const { AutoModelForCausalLM, AutoTokenizer, env, pipeline } = require("@huggingface/transformers");
env.allowLocalModels = true;
env.allowRemoteModels = false;
env.localModelPath = "/";

function encodeAndDecode(tokenizer, text) {
  const ids = tokenizer.encode(text);
  return { ids, decoded: tokenizer.decode(ids), text: tokenizer.decode(ids, { skip_special_tokens: true }) };
}

async function generate(directory, text, num_new_tokens) {
  const options = { dtype: "fp32", device: "cpu" };
  const settings = { max_new_tokens: num_new_tokens, min_new_tokens: num_new_tokens, do_sample: false };
  const tokenizer = await AutoTokenizer.from_pretrained(directory);
  const model = await AutoModelForCausalLM.from_pretrained(directory, options);
  const inputs = tokenizer(text);
  const { logits } = await model(inputs);
  const ids = (await model.generate({ ...inputs, ...settings })).tolist()[0].map(Number);
  // What most people call; it asks tokenizer_config.json whether BOS belongs before the text.
  const generator = await pipeline("text-generation", directory, options);
  const [{ generated_text }] = await generator(text, settings);
  return { ids, logits: logits.tolist()[0], decoded: tokenizer.decode(ids), generated_text };
}

const request = JSON.parse(readFileSync(requestPath, "utf8"));
const answers = [];
for (const directory of request.tokenizers ?? []) {
  const tokenizer = await AutoTokenizer.from_pretrained(directory);
  answers.push(request.texts.map((text) => encodeAndDecode(tokenizer, text)));
}
if (request.model) {
  for (const text of request.texts) answers.push(await generate(request.model, text, request.num_new_tokens));
}
writeFileSync(answerPath, JSON.stringify({ version: `transformers.js ${env.version}`, answers }));
