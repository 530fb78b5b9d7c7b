"""The command that measures a result again."""

from __future__ import annotations

import shlex

from perf.report.results import Result, Session

# field of a configuration -> option of `pytest perf`
OPTIONS = {
    "model": "--model",
    "attention": "--attention",
    "sdpa_kernels": "--sdpa-kernels",
    "compile": "--compile",
    "compile_scope": "--compile-scope",
    "precision": "--precision",
    "optimise": "--optimise",
    "batch": "--batch",
    "steps": "--steps",
    "sampler": "--sampler",
    "checkpoint": "--ckpt",
    "config": "--config",
    "device": "--device",
}
# The rest is what tells the members of a set apart.
OF_THE_WORK = ("model", "batch", "steps", "sampler", "checkpoint", "config", "device")


def measuring(session: Session) -> list[str]:
    """The options by which a session measured."""
    facts, words = session.facts, []
    if session.launches:
        words += ["--perf-launches", str(session.launches)]
    if session.rounds:
        words += ["--perf-rounds", str(session.rounds)]
    if facts.get("clock"):
        words += ["--perf-clock", str(facts["clock"])]
    if facts.get("threads"):
        words += ["--perf-threads", f"{facts['threads']:g}"]
    if facts.get("isolated") is False:
        words.append("--perf-inprocess")
    return words


def command(result: Result) -> str:
    """A line for a shell, every value quoted. What has no option (another engine, a single stage) is asked for by its set."""
    wanted = dict(result.benchmark.configuration)
    words = ["pytest", "perf"]
    if wanted.get("engine", "sd") != "sd" or result.workload != "txt2img":
        words += ["-m", "peers" if result.workload == "txt2img" else "stages", "-k", result.id]
        options = {field: OPTIONS[field] for field in OF_THE_WORK}
    else:
        options = OPTIONS
    for field, option in options.items():
        value = wanted.get(field)
        if value in (None, [], (), ""):
            continue
        words += [option, ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)]
    if any(result.size):
        words += ["--size", f"{result.size[0]}x{result.size[1]}"]
    if wanted.get("interpreter"):
        words += ["--perf-python", f"{wanted['interpreter']}=PATH"]
    words += measuring(result.session)
    line = " ".join(map(shlex.quote, words))
    commit = result.session.commit
    return f"git checkout {shlex.quote(commit)} && {line}" if commit and commit != "unversioned" else line
