#!/usr/bin/env bash
# `make demo`: every step, on text that comes with every Python installation, in two CPU processes.
set -euo pipefail

demo=${DEMO_DIR:-demo}
cd "$(dirname "${BASH_SOURCE[0]}")/.."

printf '$ python examples/make_demo_corpus.py --output_dir=%s --tokenizer_dir=%s --vocab_size=2048\n' "$demo/parquet" "$demo/tokenizer"
python examples/make_demo_corpus.py "--output_dir=$demo/parquet" "--tokenizer_dir=$demo/tokenizer" "--size=${DEMO_SIZE:-4MB}" \
    --vocab_size=2048

printf '\n$ python examples/make_demo_task.py --corpus_dir=%s --output_dir=%s\n' "$demo/parquet" "$demo/task"
python examples/make_demo_task.py "--corpus_dir=$demo/parquet" "--output_dir=$demo/task" --val_fraction=0.04

PARQUET=$demo/parquet TOKENIZER=$demo/tokenizer WORK=$demo CONFIG=config_hub/demo-cpu.yaml \
    TASKS=demo_word_order TASK_FLAGS="--include_path=$demo/task --context_tokens=256" \
    OPTIMIZE_FLAGS="--val_fraction=0.04" TRAIN_FLAGS=${DEMO_TRAIN_FLAGS:-} bash pipeline.sh

printf '\n$ python examples/show_demo.py %s\n' "$demo"
python examples/show_demo.py "$demo"
