"""What is to be measured, from the event that started the workflow: `python3 resolve.py perf` or `canary`.

Writes the step's outputs: run, sha, labels (JSON), sets, batch, against, promote, pull_request, timeout_minutes. Texts of
others - a comment, the inputs of a dispatch - are taken apart and every part is looked up or matched whole; nothing is
evaluated. Whoever is no maintainer, and whatever names a commit by anything but its 40 hex digits, is refused.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from house import NAME, SHA, Refusal, fleet, given, main, output, read_json, series

from perf.configurations.sets import SETS
from perf.runs.saved_run import BaselineError, load

# The whole matrix: every set but those of the embedded model, which say little about a GPU.
FULL = tuple(name for name, configurations in SETS.items() if all(one.model != "tiny" for one in configurations))
SCHEDULES = {"23 1 * * 1-6": ("published",), "23 1 * * 0": FULL}  # as perf.yml has them: nightly, weekly
ON_PUSH = (("published",), (1,))
LAUNCHES, LAUNCH_SECONDS = 10, 30.0  # until a session has been stored: a launch loads and warms up for about so long
SPARE_MINUTES, TIMES = 20, 2  # for installing; and how much longer than measured a job may take
PAIRED_TIMES = 5  # two commits beside each other, both once more where that is undecided, and a quarter to spare
MAINTAINERS = ("OWNER", "MEMBER", "COLLABORATOR")
MAY_WRITE = ("admin", "maintain", "write")


@dataclass(frozen=True)
class Request:
    """What is asked for. labels: empty for the whole fleet. sha: a reviewed commit, None for the event's own."""

    sets: tuple[str, ...]
    batches: tuple[int, ...] = ()
    labels: tuple[str, ...] = ()
    sha: str | None = None
    pull_request: int | None = None
    skip_known: bool = False  # whether a commit that has its sessions is left alone


def of_event(name: str, event: dict, repository: str) -> Request:
    """The request in an event. Raises Refusal."""
    if name == "schedule":
        cron = event.get("schedule")
        if cron not in SCHEDULES:
            raise Refusal(f"no set belongs to the schedule {cron!r}")
        return Request(SCHEDULES[cron], skip_known=True)
    if name == "push":
        return Request(*ON_PUSH)
    if name == "workflow_dispatch":
        inputs = event.get("inputs") or {}
        words = {key: inputs.get(key) or "" for key in ("set", "batch", "labels", "sha")}
        return request(words["set"] or "published", words["batch"], words["labels"], words["sha"] or None)
    if name == "issue_comment":
        return of_comment(event, repository)
    raise Refusal(f"the event {name!r} starts no measurement")


def request(sets: str, batch: str = "", labels: str = "", sha: str | None = None) -> Request:
    """A request from texts with commas or blanks between their parts. Raises Refusal for any part that is not known."""
    names = _parts(sets)
    for name in names:
        if name not in SETS:
            raise Refusal(f"there is no set {name[:60]!r}: choose from {', '.join(SETS)}")
    batches = _parts(batch)
    for one in batches:
        if not re.fullmatch(r"[1-9][0-9]{0,2}", one):
            raise Refusal(f"batch {one[:60]!r} is no number from 1 to 999")
    known = fleet()
    for label in _parts(labels):
        if label not in known:
            raise Refusal(f"there is no label {label[:60]!r}: choose from {', '.join(known)}")
    if sha is not None and not SHA.fullmatch(sha):
        raise Refusal(f"{sha[:60]!r} is no commit: give the 40 hex digits of the one that was reviewed")
    return Request(names, tuple(map(int, batches)), _parts(labels), sha)


def _parts(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(re.findall(r"[^\s,]+", text)))


def of_comment(event: dict, repository: str) -> Request:
    """The request in a maintainer's comment: `/perf SHA [set=NAME] [batch=1,2] [labels=h200]`. Raises Refusal.

    The commit stands in the comment, so that what runs is what its writer has looked at: the pull request's head may have
    moved since. It must be of this pull request, for through a repository every commit of all its forks can be reached.
    """
    issue, comment = event.get("issue") or {}, event.get("comment") or {}
    if not issue.get("pull_request"):
        raise Refusal("the comment is on no pull request")
    login = str((comment.get("user") or {}).get("login"))
    if comment.get("author_association") not in MAINTAINERS or not re.fullmatch(r"[A-Za-z0-9-]{1,39}", login):
        raise Refusal("only a maintainer may start a measurement")
    words = str(comment.get("body")).split()
    if len(words) < 2 or words[0] != "/perf":
        raise Refusal("give /perf SHA [set=NAME] [batch=1,2] [labels=LABEL]")
    options = dict(word.partition("=")[::2] for word in words[2:])
    if len(options) < len(words) - 2 or not options.keys() <= {"set", "batch", "labels"}:
        raise Refusal("after the commit only set=, batch= and labels= may stand, each once")
    asked = request(options.get("set", "published"), options.get("batch", "1"), options.get("labels", ""), words[1])
    number = int(issue["number"])
    allowed = _github(f"repos/{repository}/collaborators/{login}/permission", ".permission")
    if allowed not in [[right] for right in MAY_WRITE]:
        raise Refusal("only somebody who may write to this repository may start a measurement")
    if asked.sha not in _github(f"repos/{repository}/pulls/{number}/commits?per_page=100", ".[].sha", "--paginate"):
        raise Refusal(f"{asked.sha} is no commit of pull request {number}")
    return replace(asked, pull_request=number)


def _github(path: str, query: str, *options: str) -> list[str]:
    """Lines of an answer of GitHub, by its own command line. Raises Refusal where it says no."""
    try:
        done = subprocess.run(
            ["gh", "api", *options, path, "--jq", query], capture_output=True, text=True, timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Refusal(f"GitHub could not be asked: {error}") from None
    if done.returncode:
        raise Refusal(f"GitHub could not be asked: {done.stderr.strip()[:200]}")
    return done.stdout.split()


def unknown_labels(asked: Request, labels: tuple[str, ...], sha: str, baselines: Path) -> tuple[str, ...]:
    """The labels that lack a session of this commit in any of the sets."""

    def known(label: str, name: str) -> bool:
        folder = baselines / label / series(name, asked.batches)
        return any(folder.rglob(f"[0-9]*_{sha[:12]}_*.json"))

    return tuple(label for label in labels if not all(known(label, name) for name in asked.sets))


def minutes(asked: Request, labels: tuple[str, ...], baselines: Path, paired: bool) -> int:
    """How long a job may take: twice what the newest stored session took, or the estimate of one where there is none.

    paired: whether another commit is measured beside this one.
    """
    most = 0.0
    for label in labels:
        spent = 0.0
        for name in asked.sets:
            measured = _newest_seconds(baselines / label / series(name, asked.batches))
            spent += estimate(asked, name) if measured is None else measured
        most = max(most, spent)
    print(f"GPU budget: about {math.ceil((2 if paired else 1) * most / 60)} minutes on each of {', '.join(labels)}")
    return math.ceil((PAIRED_TIMES if paired else TIMES) * most / 60) + SPARE_MINUTES


def estimate(asked: Request, name: str) -> float:
    """Seconds that a set takes by itself."""
    own = {one.batch for one in SETS[name]}
    configurations = len(SETS[name]) * len(asked.batches or own) // len(own)
    return configurations * LAUNCHES * LAUNCH_SECONDS


def _newest_seconds(folder: Path) -> float | None:
    for path in sorted(folder.rglob("[0-9]*_*.json"), key=lambda one: one.name, reverse=True):
        try:
            return float(load(path)["perf"]["seconds"])
        except (BaselineError, KeyError, TypeError, ValueError):
            continue
    return None


def run() -> int:
    """Write the outputs."""
    event, own = read_json(Path(given("GITHUB_EVENT_PATH"))), given("GITHUB_SHA")
    repository = given("GITHUB_REPOSITORY")
    if not SHA.fullmatch(own) or not all(map(NAME.fullmatch, repository.split("/"))) or repository.count("/") != 1:
        raise Refusal("GITHUB_SHA or GITHUB_REPOSITORY is not what Actions sets")
    if sys.argv[1:] == ["canary"]:
        labels = _parts(str((event.get("inputs") or {}).get("labels") or "")) or tuple(fleet())
        output("labels", json.dumps(request("published", labels=",".join(labels)).labels))
        return 0
    asked = of_event(given("GITHUB_EVENT_NAME"), event, repository)
    baselines = Path(given("BASELINES", "baselines"))
    labels = asked.labels or tuple(fleet())
    if asked.skip_known:
        labels = unknown_labels(asked, labels, own, baselines)
        if not labels:
            print(f"main has not moved: {own} has been measured everywhere")
    main_itself = given("GITHUB_REF") == "refs/heads/main" and asked.sha is None
    output("run", "true" if labels else "false")
    output("sha", asked.sha or own)
    output("labels", json.dumps(labels))
    output("sets", " ".join(asked.sets))
    output("batch", " ".join(map(str, asked.batches)))
    output("against", "origin/main" if not main_itself else "")
    output("promote", "true" if main_itself and labels else "false")
    output("pull_request", str(asked.pull_request or ""))
    output("timeout_minutes", str(minutes(asked, labels, baselines, not main_itself) if labels else SPARE_MINUTES))
    return 0


if __name__ == "__main__":
    sys.exit(main(run))
