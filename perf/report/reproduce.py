"""The command line that repeats a measurement."""

from __future__ import annotations

import shlex

from perf.configurations.configuration import is_own
from perf.report.results import Result, SavedSession

# field of a configuration -> option of `pytest perf`
OPTIONS = {
    "model": "--model",
    "engine": "--engine",
    "attention": "--attention",
    "sdpa_kernels": "--sdpa-kernels",
    "compile": "--compile",
    "compile_scope": "--compile-scope",
    "compile_backend": "--compile-backend",
    "precision": "--precision",
    "optimise": "--optimise",
    "lora_rank": "--lora-rank",
    "batch": "--batch",
    "steps": "--steps",
    "sampler": "--sampler",
    "timestep_spacing": "--timestep-spacing",
    "sigmas": "--sigmas",
    "scale": "--scale",
    "checkpoint": "--ckpt",
    "config": "--config",
    "device": "--device",
}
DEFAULTS = {"engine": "sd", "lora_rank": 0, "sigmas": "schedule", "scale": 7.5}  # not repeated in a command
# The other options tell the members of a set apart.
OF_THE_WORK = (
    "model",
    "batch",
    "steps",
    "sampler",
    "timestep_spacing",
    "sigmas",
    "scale",
    "checkpoint",
    "config",
    "device",
)


def _session_options(session: SavedSession) -> list[str]:
    facts = session.facts
    options = {
        "--perf-launches": session.launches,
        "--perf-rounds": session.rounds,
        "--perf-clock": facts.get("clock"),
        "--perf-threads": f"{facts['threads']:g}" if facts.get("threads") else None,
    }
    arguments = [argument for option, value in options.items() if value for argument in (option, str(value))]
    return [*arguments, "--perf-inprocess"] if facts.get("isolated") is False else arguments


def command(result: Result) -> str:
    """A shell command with every value quoted. Configurations without options (a stage, training) are selected with -k."""
    configuration = result.benchmark.configuration
    arguments, fields = ["pytest", "perf"], tuple(OPTIONS)
    if is_own(configuration.get("engine")):
        configuration = {name: value for name, value in configuration.items() if name != "model"}
    elif result.workload != "txt2img":
        name = {"inpaint": "inpaint", "train": "training"}.get(result.workload, "stages")
        arguments += ["-m", name, "-k", result.id]
        fields = OF_THE_WORK
    for field in fields:
        value = configuration.get(field)
        if value not in (None, [], (), "", DEFAULTS.get(field)):
            arguments += [OPTIONS[field], ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)]
    if any(result.size):
        arguments += ["--size", f"{result.size[0]}x{result.size[1]}"]
    if configuration.get("interpreter"):
        arguments += ["--perf-python", f"{configuration['interpreter']}=PATH"]
    line = shlex.join(arguments + _session_options(result.session))
    commit = result.session.commit
    return f"git checkout {shlex.quote(commit)} && {line}" if commit and commit != "unversioned" else line
