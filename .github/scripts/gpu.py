"""Check the machine against its label, and lock its clock: `python3 gpu.py check`, `lock` or `unlock`, with the label in $LABEL.

`check` fails within seconds on a mislabelled or busy machine. `unlock` belongs in a step that always runs.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

from workflow import Machine, Refusal, machine, main, out_folder, read_json, setting

QUERY = ("name", "uuid", "driver_version", "persistence_mode", "temperature.gpu", "clocks.sm", "power.limit")
CONTAINER_MARKS = (".dockerenv", "run/.containerenv")


def smi(*arguments: str) -> list[str]:
    """Return the output lines of nvidia-smi for the GPU of this runner. Raises Refusal where it is absent or fails."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    command = ["nvidia-smi", *(["-i", visible] if visible else []), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Refusal(f"nvidia-smi does not answer: {error}") from None
    if done.returncode:
        raise Refusal(f"nvidia-smi {' '.join(arguments)}: {(done.stderr or done.stdout).strip()[:300]}")
    return [line.strip() for line in done.stdout.splitlines() if line.strip()]


def facts() -> dict:
    """Return the properties of the one GPU of this runner. Raises Refusal where several or none are visible."""
    lines = smi(f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader,nounits")
    if len(lines) != 1:
        raise Refusal(f"{len(lines)} GPUs are visible: set CUDA_VISIBLE_DEVICES to the one of this runner")
    values = [part.strip() for part in lines[0].split(",")]
    if len(values) != len(QUERY):
        raise Refusal(f"invalid response of nvidia-smi: {lines[0][:200]!r}")
    processes = smi("--query-compute-apps=pid,process_name", "--format=csv,noheader")
    return {**dict(zip(QUERY, values)), "processes": processes}


def problems(gpu: dict, promised: Machine) -> list[str]:
    """List the properties of the GPU that differ from the label, and what disturbs a measurement."""
    limit = promised.temperature_below_celsius
    try:
        degrees = float(gpu["temperature.gpu"])
    except ValueError:
        degrees = math.nan
    driver, uuid, celsius = gpu["driver_version"], gpu["uuid"], gpu["temperature.gpu"]
    temperature = f"the GPU has {degrees:.0f} degrees, it must have less than {limit:g}"
    if math.isnan(degrees):
        temperature = f"the temperature cannot be read ({celsius})"
    series = f"the driver is {driver}, the label promises {promised.driver}*: a new series?"
    persistence = "persistence mode is off: every launch loads the driver (nvidia-smi -pm 1)"
    checks = [
        (gpu["name"] == promised.gpu, f"the GPU is {gpu['name']}, the label promises {promised.gpu}"),
        (driver.startswith(promised.driver), series),
        (not promised.uuids or uuid in promised.uuids, f"{uuid} is none of this label's GPUs"),
        (gpu["persistence_mode"] == "Enabled", persistence),
        (degrees < limit, temperature),
    ]
    return [message for ok, message in checks if not ok] + [f"foreign process: {row}" for row in gpu["processes"]]


def runner_problems(root: Path, user: int) -> list[str]:
    """List what makes a runner unfit to execute other people's code, even reviewed code."""
    contained = any((root / mark).exists() for mark in CONTAINER_MARKS)
    socket, models = root / "var/run/docker.sock", os.environ.get("SD_PERF_MODELS", "")
    checks = [
        (user != 0 or contained, "the runner is root outside a container: give it a user of its own"),
        (not os.access(socket, os.W_OK), "the runner can write to docker's socket, and so become root on the host"),
        (
            not os.access(models, os.W_OK),
            f"{models} is writable: mount the models read-only, jobs must not change them",
        ),
    ]
    return [message for ok, message in checks if not ok]


def check(root: Path) -> None:
    """Record the machine in gpu.json. Raises Refusal with every problem."""
    label, gpu = setting("LABEL"), facts()
    promised = machine(label)
    reasons = problems(gpu, promised) + runner_problems(root, os.getuid())
    (out_folder() / "gpu.json").write_text(json.dumps({"label": label, **gpu, "problems": reasons}, indent=1))
    if reasons:
        raise Refusal(f"{label} is not fit to measure: {'; '.join(reasons)}")
    print(f"{label}: {gpu['name']}, {gpu['uuid']}, driver {gpu['driver_version']}, {gpu['temperature.gpu']} C")
    if not promised.uuids:
        print(f"no UUID is pinned for {label}: add {gpu['uuid']} to the fleet")


def lock() -> None:
    """Lock the SM clock where the fleet requests it and the driver permits it. clocks.json records the result."""
    mhz, reason = machine(setting("LABEL")).lock_mhz, "not requested"
    if mhz is not None:
        try:
            smi("-lgc", f"{mhz},{mhz}")
            reason = None
        except Refusal as refusal:  # the runner's user need not have the right
            mhz, reason = None, str(refusal)
    (out_folder() / "clocks.json").write_text(json.dumps({"locked_mhz": mhz, "reason": reason}))
    print(f"no lock: {reason}" if reason else f"clocks locked at {mhz} MHz")


def unlock() -> None:
    """Undo `lock`. Raises Refusal where the clock stays locked."""
    record = out_folder() / "clocks.json"
    if record.exists() and read_json(record).get("locked_mhz"):
        print("\n".join(smi("-rgc")))


def run() -> int:
    """Run the command of the first argument. The second argument is the root of the file system, for tests."""
    root = Path(sys.argv[2] if len(sys.argv) > 2 else "/")
    {"check": lambda: check(root), "lock": lock, "unlock": unlock}[sys.argv[1]]()
    return 0


if __name__ == "__main__":
    sys.exit(main(run))
