#!/usr/bin/env bash
# One task of a fleet: the part of the matrix that its index names, measured on one GPU. For slurm.sh and kubernetes.yaml.
#
#   SD_PERF_OUT      where all tasks write, on a file system that they share (default: ./fleet)
#   SD_PERF_PYTHON   the Python of the environment (default: .venv/bin/python)
#   SD_PERF_DEVICE   cuda, or cpu to try it (default: cuda; a GPU that is not there is an error, never a CPU measured)
#   SD_PERF_DRY_RUN  not empty: print the command and end
#
# Arguments go to pytest: `bash docs/fleet/task.sh --collect-only -q` lists what a task would measure.
set -euo pipefail

# A line a task. What is to be compared belongs into one line: it is then measured in turns, on one GPU.
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
# A folder a task and machine: no two tasks write into one, and `python -m perf merge` joins them.
runs=$(realpath -m -- "${SD_PERF_OUT:-fleet}")/$HOSTNAME-$index
command=("$python" -m pytest perf "${options[@]}" --device "$device" --benchmark-storage "file://$runs" --benchmark-autosave "$@")

if [ -n "${SD_PERF_DRY_RUN:-}" ]; then
    printf '%q ' "${command[@]}"
    echo
    exit
fi
if [[ " $* " != *" --collect-only "* ]]; then
    "$python" -m perf doctor --device "$device" --no-compile # a machine that cannot measure ends here, with the reason
fi
exec "${command[@]}"
