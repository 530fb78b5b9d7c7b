#!/usr/bin/env bash
# An array job, one GPU a task:  sbatch --gres=gpu:h100:1 docs/fleet/slurm.sh
# Submit from the repository, once for each kind of GPU; the options given to sbatch win over those here.
#SBATCH --job-name=sd-perf
#SBATCH --array=0-4
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=8
#SBATCH --mem=32G
#SBATCH --time=02:00:00
#SBATCH --output=fleet/%A_%a.log
set -euo pipefail

# Slurm runs a copy of this file: the repository is where it was submitted.
cd "${SLURM_SUBMIT_DIR:-.}"
exec bash docs/fleet/task.sh "$@"
