#!/usr/bin/env bash
# An array job, one GPU per task:  sbatch --gres=gpu:h100:1 docs/fleet/slurm.sh
# Submit from the repository, once per GPU model; options of sbatch override those here.
#SBATCH --job-name=sd-perf
#SBATCH --array=0-4
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=8
#SBATCH --mem=32G
#SBATCH --time=02:00:00
#SBATCH --output=fleet/%A_%a.log
set -euo pipefail

# Slurm runs a copy of this file; the repository is the folder of submission.
cd "${SLURM_SUBMIT_DIR:-.}"
exec bash docs/fleet/task.sh "$@"
