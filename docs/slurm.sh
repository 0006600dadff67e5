#!/bin/bash
# Searches prompts for a folder of images on several machines: sbatch docs/slurm.sh IMAGES RUN [settings]
# The same script goes on after its time has run out, after it was preempted and when it is submitted again.
#SBATCH --job-name=prompts
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=08:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
set -u

# Two minutes before the end: the job is queued again, and SLURM tells the processes to stop.
trap 'scontrol requeue "$SLURM_JOB_ID"' USR1

images=$1
run=$2
shift 2
srun --kill-on-bad-exit=1 python train.py fit --config configs/invert.yaml --data.images "$images" \
  --run "$run" --ckpt_path last --trainer.precision bf16-mixed "$@" &
search=$!
while kill -0 "$search" 2>/dev/null; do  # the signal ends a wait before the search has ended
  wait "$search"
  code=$?
done
exit "$code"
