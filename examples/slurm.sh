#!/usr/bin/env bash
# The whole pipeline on four Slurm nodes of 8 GPUs each, resubmitted until it is finished.
#
#   PARQUET=/shared/fineweb TOKENIZER=/shared/Meta-Llama-3-8B WORK=/shared/llama3-8b sbatch examples/slurm.sh
#   tail -f pretrain-JOBID.log
#   ssh -L 8265:localhost:8265 FIRST_NODE               # dashboard: http://localhost:8265
#
# The checkout, its .venv (`make setup`) and WORK must be on a file system that all nodes mount. pipeline.sh explains
# the settings. We have never run it on a real Slurm; its logic is tested.
#SBATCH --job-name=pretrain
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=pretrain-%j.log
set -euo pipefail

cd "${SLURM_SUBMIT_DIR:?submit it with sbatch}"
export WORK=${WORK:-data/llama3-8b}
# shellcheck disable=SC1091
source .venv/bin/activate

# Whoever reaches Ray's ports can run code as its user, and every user of the cluster reaches its nodes: so every
# connection needs a token. It is in the home directory, which the nodes share, and only its owner can read it.
export RAY_AUTH_MODE=token
umask 077
ray get-auth-token --generate > /dev/null

nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${nodes%%$'\n'*}
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=600 # seconds; imports from a shared file system are slow
ulimit -n 65536 || true

# Starts Ray on every node and the pipeline on the first one, and stops Ray on all of them when the pipeline ends.
srun --kill-on-bad-exit=1 ray symmetric-run --address "$head:6379" --min-nodes "$SLURM_JOB_NUM_NODES" \
    "--num-cpus=$SLURM_CPUS_PER_TASK" "--num-gpus=$SLURM_GPUS_PER_NODE" \
    --dashboard-host=127.0.0.1 --disable-usage-stats \
    -- bash pipeline.sh &
pipeline=$!

# Ten minutes before the time is up (--signal), or when an administrator drains the node, Slurm sends TERM to this shell:
# the trainer then saves a checkpoint and ends, and this job goes back into the queue to continue from there.
stopped=
# shellcheck disable=SC2329 # called by the trap
stop_early() {
    stopped=yes
    mkdir -p "$WORK/run"
    touch "$WORK/run/stop"
}
trap stop_early TERM

status=0
while kill -0 "$pipeline" 2> /dev/null; do # a signal ends `wait` early
    status=0
    wait "$pipeline" || status=$?
done
if [[ -n $stopped ]]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
