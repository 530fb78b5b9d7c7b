#!/usr/bin/env bash
# An array job, one GPU per task:  sbatch --gres=gpu:h100:1 docs/fleet/slurm.sh
# Submit from the repository, once per GPU model; options of sbatch override those here.
# The log of a task is fleet/JOB_TASK.log. The script opens it, because Slurm itself would end a job without a word where
# the folder of --output is missing.
#SBATCH --job-name=sd-perf
#SBATCH --array=0-4
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=8
#SBATCH --mem=32G
#SBATCH --time=02:00:00
#SBATCH --output=/dev/null
set -euo pipefail

# Slurm runs a copy of this file; the repository is the folder of submission.
cd "${SLURM_SUBMIT_DIR:-.}"
if [ -n "${SLURM_ARRAY_JOB_ID:-}" ]; then
    mkdir -p fleet
    exec >"fleet/${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}.log" 2>&1
fi
exec bash docs/fleet/task.sh "$@"
