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
# One stage on several nodes of a Slurm cluster, all of which see this directory:
#
#     sbatch examples/slurm.sh train.py --layers 1,32 --gb 9 --seq-len 4096 --save-every 30m --out runs/elo
#
# Ten minutes before its time is up the run gets SIGTERM, saves a state and ends; a node that fails ends it too, and Slurm
# starts it again. The same sbatch goes on from the newest state, and is done at once where the run is finished:
#
#     sbatch --dependency=afterany:JOB examples/slurm.sh train.py ...
set -euo pipefail

# torchrun gives the processes this many seconds to save before it kills them; 30 if nothing says so.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-540}
# Not by `| head`: now and then that closes the pipe while scontrol still writes, which ends scontrol and this script.
nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
# A port of this job's own: two jobs may meet on a node.
port=${PORT:-$((20000 + SLURM_JOB_ID % 20000))}
srun torchrun --nnodes="$SLURM_JOB_NUM_NODES" --nproc_per_node="${SLURM_GPUS_ON_NODE:-8}" \
    --rdzv-id="$SLURM_JOB_ID" --rdzv-backend=c10d --rdzv-endpoint="${nodes%%$'\n'*}:$port" "$@" --resume
