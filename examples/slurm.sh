#!/usr/bin/env bash
#SBATCH --job-name=elo
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@600
#SBATCH --requeue
#SBATCH --output=elo-%j.log
#SBATCH --open-mode=append
# Runs one stage on several nodes of a Slurm cluster that share this directory:
#
#     sbatch examples/slurm.sh train.py --layers 1,32 --gb 9 --seq-len 4096 --save-every 30m --out runs/elo
#
# Ten minutes before the time limit the run gets SIGTERM, saves a state and ends. If a node fails, Slurm requeues the
# job. The same sbatch command resumes from the newest state, and ends at once if the run is finished:
#
#     sbatch --dependency=afterany:JOB examples/slurm.sh train.py ...
set -euo pipefail

# The seconds that torchrun gives the processes to save a state before it kills them; 30 by default.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-540}
# Not `| head -n 1`: it may close the pipe while scontrol still writes, and pipefail would end this script.
nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
# A port for each job, since two jobs may share a node.
port=${PORT:-$((20000 + SLURM_JOB_ID % 20000))}
srun torchrun --nnodes="$SLURM_JOB_NUM_NODES" --nproc_per_node="${SLURM_GPUS_ON_NODE:-8}" \
    --rdzv-id="$SLURM_JOB_ID" --rdzv-backend=c10d --rdzv-endpoint="${nodes%%$'\n'*}:$port" "$@" --resume
