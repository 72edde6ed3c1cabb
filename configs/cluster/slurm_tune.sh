#!/usr/bin/env bash
# What: a search on several Slurm nodes; Ray is started on all of them, ddray on the first, both end with the job.
# Run:  sbatch configs/cluster/slurm_tune.sh        (again after a time limit: --resume continues the same run)
# Edit: the #SBATCH lines, SHARED (a folder that all nodes see), the search at the end. Submit from the checkout.
#SBATCH --job-name=ddray-tune
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --gpus-per-node=4
#SBATCH --mem=64G
#SBATCH --time=12:00:00
#SBATCH --output=ddray-%j.log
set -euo pipefail

SHARED="${SHARED:-$SLURM_SUBMIT_DIR}"
export DDRAY_HOME="$SHARED/ddray-home"
export DDRAY_DATA="${DDRAY_DATA:-$SHARED/datasets}"
export RAY_USAGE_STATS_ENABLED=0
# Other users share these nodes: without a token any of them could run code as you (docs/cluster.md).
RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
export RAY_AUTH_TOKEN RAY_AUTH_MODE=token
# Seconds that the nodes wait for each other.
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=120
cd "$SLURM_SUBMIT_DIR"
source .venv/bin/activate

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# A port of this job's own, so that two jobs on one node do not meet.
port=$((20000 + SLURM_JOB_ID % 20000))

srun ray symmetric-run --address "$head:$port" --min-nodes "$SLURM_JOB_NUM_NODES" \
    --num-cpus="$SLURM_CPUS_PER_TASK" --num-gpus="${SLURM_GPUS_ON_NODE:-0}" -- \
    ddray tune --method datadam --dataset cifar10 --ipc 1 --num-samples 64 \
    --gpus-per-trial 0.5 --cpus-per-trial 2 --address "$head:$port" \
    --run-dir "$SHARED/runs/datadam-cifar10-ipc1" --resume
