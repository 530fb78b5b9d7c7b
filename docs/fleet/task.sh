#!/usr/bin/env bash
# Measure one line of the matrix, selected by the task index, on one GPU. For slurm.sh and kubernetes.yaml.
#
#   SD_PERF_OUT      output folder of all tasks, on a shared file system (default: ./fleet)
#   SD_PERF_PYTHON   the Python of the environment (default: .venv/bin/python)
#   SD_PERF_DEVICE   cuda, or cpu to try it (default: cuda; a missing GPU is an error)
#   SD_PERF_DRY_RUN  not empty: print the command and exit
#
# Arguments go to pytest: `bash docs/fleet/task.sh --collect-only -q` lists the configurations of a task.
set -euo pipefail

# One line per task. Configurations in one line take turns on one GPU, so put those that you compare in one line.
matrix=(
    "-m published --batch 1"
    "-m published --batch 2"
    "-m published --batch 4"
    "-m ladder"
    "-m compile_modes"
)

index=${SLURM_ARRAY_TASK_ID:-${JOB_COMPLETION_INDEX:-}}
if ! [[ "$index" =~ ^[0-9]+$ ]] || [ "$index" -ge "${#matrix[@]}" ]; then
    echo "task.sh: no index from 0 to $((${#matrix[@]} - 1)) in SLURM_ARRAY_TASK_ID or JOB_COMPLETION_INDEX" >&2
    exit 4
fi
read -ra options <<<"${matrix[$index]}"
python=${SD_PERF_PYTHON:-.venv/bin/python}
device=${SD_PERF_DEVICE:-cuda}
# Each task and machine has its own folder; `python -m perf merge` joins them.
runs=$(realpath -m -- "${SD_PERF_OUT:-fleet}")/$HOSTNAME-$index
command=("$python" -m pytest perf "${options[@]}" --device "$device" --benchmark-storage "file://$runs" --benchmark-autosave "$@")

if [ -n "${SD_PERF_DRY_RUN:-}" ]; then
    printf '%q ' "${command[@]}"
    echo
    exit
fi
if [[ " $* " != *" --collect-only "* ]]; then
    "$python" -m perf doctor --device "$device" --no-compile # ends here on an unfit machine
fi
exec "${command[@]}"
