"""A newcomer's first run, again and again beside processes that interfere: is each usable, and how wide are its intervals?

python tests/helpers/first_runs.py perf/baselines/first_runs_bursts.json    ten runs; resumed if the file exists

Each run is `pytest perf` without an option, whose compile cache starts empty. The file holds of each its exit status, seconds
and speed-ups with their intervals.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from perf.commands.interference import KINDS, interference
from perf.runs.storage import write_atomically

ROOT = Path(__file__).parents[2]


def first_run(kind: str, seed: int) -> dict:
    """Measure once beside the interference."""
    with tempfile.TemporaryDirectory() as folder, interference(kind, seed):
        saved = Path(folder) / "run.json"
        begin = time.monotonic()
        status = subprocess.run(
            [sys.executable, "-m", "pytest", "perf", f"--benchmark-json={saved}"], cwd=ROOT
        ).returncode
        seconds = time.monotonic() - begin
        run = json.loads(saved.read_text(encoding="utf-8")) if saved.exists() else None
    if run is None:
        return {"status": status, "seconds": seconds, "invalid": None, "drifted": None, "stack": None, "speedups": {}}
    results = {benchmark["params"]["configuration"]: benchmark["extra_info"] for benchmark in run["benchmarks"]}
    speedups = {id: result["speedup"] for id, result in results.items() if result["speedup"]}
    session = {key: run["perf"][key] for key in ("invalid", "drifted")}
    return {
        "status": status,
        "seconds": seconds,
        **session,
        "stack": run["machine_info"]["stack"],
        "speedups": speedups,
    }


def main() -> None:
    """Run what the file lacks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, metavar="OUTPUT.json")
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--interference", choices=KINDS, default="bursts")
    arguments = parser.parse_args()
    document = {"interference": arguments.interference, "first_runs": []}
    if arguments.output.exists():
        document = json.loads(arguments.output.read_text(encoding="utf-8"))
    if document["interference"] != arguments.interference:
        parser.error(f"{arguments.output} has runs beside {document['interference']}: name another file")
    while len(document["first_runs"]) < arguments.runs:
        document["first_runs"].append(first_run(arguments.interference, len(document["first_runs"])))
        write_atomically(arguments.output, document)


if __name__ == "__main__":
    main()
