"""Is this the machine that its label promises, and is it quiet? `python3 gpu.py check`, `lock` or `unlock`, label in $LABEL.

`check` refuses, it does not warn: a mislabelled or busy machine fails in seconds rather than after an hour of numbers about
something else. What it read is left beside the results. `unlock` belongs in a step that always runs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from house import Machine, Refusal, given, machine, main, out_folder, read_json

QUERY = ("name", "uuid", "driver_version", "persistence_mode", "temperature.gpu", "clocks.sm", "power.limit")
CONTAINER_MARKS = (".dockerenv", "run/.containerenv")


def smi(*arguments: str) -> str:
    """What nvidia-smi answers. Raises Refusal where it is not there or fails."""
    try:
        done = subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Refusal(f"nvidia-smi does not answer: {error}") from None
    if done.returncode:
        raise Refusal(f"nvidia-smi {' '.join(arguments)}: {(done.stderr or done.stdout).strip()[:300]}")
    return done.stdout


def chosen() -> list[str]:
    """Arguments that name this runner's GPU where the machine has several; a runner has one."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return ["-i", visible] if visible else []


def facts() -> dict:
    """The one GPU of this runner. Raises Refusal where there are several or none."""
    lines = smi(*chosen(), f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader,nounits").strip().splitlines()
    if len(lines) != 1:
        raise Refusal(f"{len(lines)} GPUs are visible: set CUDA_VISIBLE_DEVICES to the one of this runner")
    values = [part.strip() for part in lines[0].split(",")]
    if len(values) != len(QUERY):
        raise Refusal(f"nvidia-smi answered {lines[0][:200]!r}")
    found: dict = dict(zip(QUERY, values))
    rows = smi(*chosen(), "--query-compute-apps=pid,process_name", "--format=csv,noheader").strip().splitlines()
    found["processes"] = [row.strip() for row in rows if row.strip()]
    return found


def problems(found: dict, promised: Machine) -> list[str]:
    """What is other than promised, or not quiet."""
    said = []
    if found["name"] != promised.gpu:
        said.append(f"the GPU is {found['name']}, the label promises {promised.gpu}")
    if not found["driver_version"].startswith(promised.driver):
        said.append(f"the driver is {found['driver_version']}, the label promises {promised.driver}*: a new series?")
    if promised.uuids and found["uuid"] not in promised.uuids:
        said.append(f"{found['uuid']} is none of this label's GPUs")
    if found["persistence_mode"] != "Enabled":
        said.append("persistence mode is off: each launch would load the driver anew (nvidia-smi -pm 1)")
    try:
        temperature = float(found["temperature.gpu"])
    except ValueError:
        said.append(f"the temperature cannot be read ({found['temperature.gpu']})")
    else:
        if not temperature < promised.temperature_below_celsius:
            limit = promised.temperature_below_celsius
            said.append(f"the GPU has {temperature:.0f} degrees, it must have less than {limit:g} to start")
    said += [f"a stranger computes on the GPU: {row}" for row in found["processes"]]
    return said


def runner_problems(root: Path, user: int) -> list[str]:
    """What makes a runner unfit to run code that others wrote, however well reviewed."""
    said = []
    contained = any((root / mark).exists() for mark in CONTAINER_MARKS)
    if user == 0 and not contained:
        said.append("the runner is root outside a container: give it a user of its own")
    socket = root / "var/run/docker.sock"
    if socket.exists() and os.access(socket, os.W_OK):
        said.append("the runner can write to docker's socket, and so become root on the host")
    models = os.environ.get("SD_PERF_MODELS")
    if models and os.access(models, os.W_OK):
        said.append(f"{models} can be written to: mount the models read-only, one job must not change the next one's")
    return said


def check(root: Path) -> int:
    """Refuse, with every reason, whatever is not as promised."""
    label, found = given("LABEL"), facts()
    promised = machine(label)
    said = problems(found, promised) + runner_problems(root, os.getuid())
    (out_folder() / "gpu.json").write_text(json.dumps({"label": label, **found, "problems": said}, indent=1))
    if said:
        raise Refusal(f"{label} is not fit to measure: {'; '.join(said)}")
    print(f"{label}: {found['name']}, {found['uuid']}, driver {found['driver_version']}, {found['temperature.gpu']} C")
    if not promised.uuids:
        print(f"no UUID is pinned for {label}: add {found['uuid']} to the fleet")
    return 0


def lock() -> int:
    """Lock the SM clock where the fleet asks for it and the driver permits it; what happened is recorded either way."""
    wanted, state = machine(given("LABEL")).lock_mhz, {"locked_mhz": None, "reason": "not asked for"}
    if wanted is not None:
        try:
            smi(*chosen(), "-lgc", f"{wanted},{wanted}")
            state = {"locked_mhz": wanted, "reason": None}
        except Refusal as refusal:  # needs a right that a runner's user need not have
            state = {"locked_mhz": None, "reason": str(refusal)}
    (out_folder() / "clocks.json").write_text(json.dumps(state))
    print(f"clocks locked at {state['locked_mhz']} MHz" if state["locked_mhz"] else f"no lock: {state['reason']}")
    return 0


def unlock() -> int:
    """Undo `lock`. A machine that stays changed is an error."""
    record = out_folder() / "clocks.json"
    if record.exists() and read_json(record).get("locked_mhz"):
        print(smi(*chosen(), "-rgc").strip())
    return 0


def run() -> int:
    """The command that is named. A second argument stands for the root of the file system, for tests."""
    command, root = sys.argv[1], Path(sys.argv[2] if len(sys.argv) > 2 else "/")
    return {"check": lambda: check(root), "lock": lock, "unlock": unlock}[command]()


if __name__ == "__main__":
    sys.exit(main(run))
