#!/bin/bash
# A Slurm array of eight jobs that build one dataset: sbatch docker/slurm-array.sh SRC OUT [OPTION...]
# Each job builds every eighth shard, and the job that ends last completes the dataset. A job that is preempted, loses
# its node or reaches its time limit is requeued and resumes: shards that are committed are not built again.
#SBATCH --job-name=gpu-npz
#SBATCH --array=1-8
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@120
#SBATCH --gpus=1
#SBATCH --cpus-per-task=16
#SBATCH --mem=32G
#SBATCH --time=04:00:00
#SBATCH --output=gpu-npz-%A-%a.log

# Slurm sends SIGTERM to this script two minutes before the time limit. The build gets it, too, and stops between two
# batches.
stopped=
trap 'stopped=yes; kill -TERM "$build"' TERM
gpu-npz build "$@" --part auto &
build=$!
while wait "$build"; status=$?; kill -0 "$build" 2>/dev/null; do :; done
[ -z "$stopped" ] || [ "$status" = 0 ] || scontrol requeue "$SLURM_JOB_ID"
exit "$status"
