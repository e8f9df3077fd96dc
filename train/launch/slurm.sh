#!/usr/bin/env bash
# A training job that saves and queues itself again before its time is over:
#     sbatch train/launch/slurm.sh CONFIG.yaml [section.key=value ...]
# Run it from the root of the repository. Set the numbers of nodes and GPUs below, or as options of sbatch.

#SBATCH --job-name=transfusion
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=transfusion-%j.log
# Ten minutes before the end the ranks, but not this script, are asked to stop; they save and end with code 5.
#SBATCH --signal=TERM@600

set -uo pipefail
. .venv/bin/activate

# The interface by which nodes reach each other, where host names do not lead to it:
# export GLOO_SOCKET_IFNAME=ib0 NCCL_SOCKET_IFNAME=ib0

# Only data that is read from a URL uses the cache, which each node keeps on its own disk.
cache=${TRANSFUSION_CACHE:-/tmp/$USER/transfusion_fast}

trap : TERM # this script outlives the ranks, which save
srun --wait=120 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" python train/pretrain.py "$@" "data.cache=$cache" &
ranks=$!
while
    wait "$ranks"
    code=$?
    kill -0 "$ranks" 2>/dev/null # a signal to this script ends `wait` early
do :; done

# 5: stopped before the end. 6: a rank was lost, perhaps with its node. Other errors would come again.
again=no
[ "$code" -eq 5 ] && again=yes
[ "$code" -eq 6 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt 3 ] && again=yes
# SLURM itself queues a preempted job again, and a cancelled one must stay cancelled: neither is running by now.
if [ "$again" = yes ] && [ "$(squeue --noheader --jobs "$SLURM_JOB_ID" --format %T)" = RUNNING ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
