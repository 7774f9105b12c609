#!/usr/bin/env bash
# From text to a model that litgpt, transformers and lm-eval load. Copy this file, edit the settings, run it.
#
# Every step can be killed at any moment: run this file again and it goes on from what is finished.
set -euo pipefail

# ---- settings: edit here, or give them in the environment -----------------------------------------------------------
PARQUET=${PARQUET:-data/fineweb-10bt/sample/10BT}     # files of text: a directory, or s3://, gs://, hf://datasets/..
TOKENIZER=${TOKENIZER:-checkpoints/meta-llama/Meta-Llama-3-8B}   # directory with tokenizer.json
WORK=${WORK:-data/llama3-8b}                          # everything is made below this; all nodes must see it
CONFIG=${CONFIG:-config_hub/llama3-8b.yaml}           # model, batch, learning rate, number of nodes
TASKS=${TASKS:-}                                      # lm_eval's tasks to answer while it trains: "hellaswag arc_easy"
TASK_FLAGS=${TASK_FLAGS:-}                            # for these, flags of tools.prepare_task: --context_tokens=8192
OPTIMIZE_FLAGS=${OPTIMIZE_FLAGS:-}                    # more flags for optimize_dataset.py
MERGE_FLAGS=${MERGE_FLAGS:-}                          # more flags for merge_files.py, both splits: --pack_tokens=8193
TRAIN_FLAGS=${TRAIN_FLAGS:-}                          # more flags for distributed_pretrain.py
EXPORT_FLAGS=${EXPORT_FLAGS:-}                        # more flags for convert_pretrained_checkpoint.py
# ---------------------------------------------------------------------------------------------------------------------

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

run() {
    printf '\n$ python %s\n' "$*"
    python "$here/$1" "${@:2}"
}

# The flags are words for the shell to split.
# shellcheck disable=SC2086
{
    run optimize_dataset.py "--input_dir=$PARQUET" "--tokenizer_dir=$TOKENIZER" "--output_dir=$WORK/tokens" $OPTIMIZE_FLAGS
    run merge_files.py "--source_dir=$WORK/tokens/train" "--target_dir=$WORK/dataset/train" $MERGE_FLAGS
    run merge_files.py "--source_dir=$WORK/tokens/val" "--target_dir=$WORK/dataset/val" $MERGE_FLAGS
    for task in $TASKS; do
        printf '\n$ python -m tools.prepare_task --task=%s %s\n' "$task" "$TASK_FLAGS"
        PYTHONPATH=$here python -m tools.prepare_task "--task=$task" "--output_dir=$WORK/tasks/$task" \
            "--dataset_path=$WORK/dataset" "--tokenizer_dir=$TOKENIZER" $TASK_FLAGS
        TRAIN_FLAGS+=" --eval.tasks.$task=$WORK/tasks/$task"
    done
    run distributed_pretrain.py --config "$CONFIG" "--dataset_path=$WORK/dataset" "--tokenizer_dir=$TOKENIZER" \
        "--out_dir=$WORK/run" $TRAIN_FLAGS
    if [ ! -e "$WORK/run/final" ]; then
        echo "training was stopped early; run this file again and it goes on"
        exit 0
    fi
    run convert_pretrained_checkpoint.py "$WORK/run/final" "$WORK/export" $EXPORT_FLAGS
}
