"""Resolve the event that started a workflow to a measurement: `python3 resolve.py perf` or `canary`.

Writes the outputs run, sha, labels (JSON), sets, batch, against, promote, pull_request, timeout_minutes and refusal. Foreign
text, such as a comment or the inputs of a dispatch, is split, and every part is looked up or matched as a whole; nothing is
evaluated. Only maintainers are accepted, and only commits named by all 40 hex digits.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from workflow import SHA, Refusal, fleet, main, output, read_json, repository, series, setting

from perf.configurations.sets import SETS
from perf.runs.saved_run import BaselineError, load
from perf.runs.storage import saved_runs_in

# Every set but those of the embedded model, which are too small for a GPU.
FULL = tuple(name for name, members in SETS.items() if all(member.model != "tiny" for member in members))
SCHEDULES = {"23 1 * * 1-6": ("published",), "23 1 * * 0": FULL}  # nightly and weekly, as in perf.yml
LAUNCHES, LAUNCH_SECONDS = 10, 30.0  # estimate for a series without a stored session
SPARE_MINUTES, TIMES = 20, 2  # for the installation; timeout over measured duration
PAIRED_TIMES = 5  # two commits, both repeated where the first look is undecided, and a quarter to spare
MAINTAINERS = ("OWNER", "MEMBER", "COLLABORATOR")
WRITERS = (["admin"], ["maintain"], ["write"])


@dataclass(frozen=True)
class Request:
    """A requested measurement.

    labels: empty for the whole fleet. sha: a reviewed commit, None for that of the event. skip_known: skip labels that have
    measured this commit.
    """

    sets: tuple[str, ...]
    batches: tuple[int, ...] = ()
    labels: tuple[str, ...] = ()
    sha: str | None = None
    pull_request: int | None = None
    skip_known: bool = False

    def folders(self, baselines: Path, label: str) -> dict[str, Path]:
        """Return the folder of stored sessions by set."""
        return {name: baselines / label / series(name, self.batches) for name in self.sets}


def of_event(name: str, event: dict) -> Request:
    """Return the request in an event. Raises Refusal."""
    if name == "schedule":
        cron = event.get("schedule")
        if cron not in SCHEDULES:
            raise Refusal(f"no set belongs to the schedule {cron!r}")
        return Request(SCHEDULES[cron], skip_known=True)
    if name == "push":
        return Request(("published",), (1,))
    if name == "workflow_dispatch":
        inputs = {"set": "published", **{key: value for key, value in (event.get("inputs") or {}).items() if value}}
        return request(inputs["set"], inputs.get("batch", ""), inputs.get("labels", ""), inputs.get("sha"))
    if name == "issue_comment":
        return of_comment(event)
    raise Refusal(f"the event {name!r} starts no measurement")


def request(sets: str, batch: str = "", labels: str = "", sha: str | None = None) -> Request:
    """Parse a request from lists separated by commas or blanks. Raises Refusal for any unknown part."""
    names, batches, machines = map(_parts, (sets, batch, labels))
    for what, values, known in (("set", names, SETS), ("label", machines, fleet())):
        for value in values:
            if value not in known:
                raise Refusal(f"there is no {what} {value[:60]!r}: choose from {', '.join(known)}")
    for value in batches:
        if not re.fullmatch(r"[1-9][0-9]{0,2}", value):
            raise Refusal(f"batch {value[:60]!r} is no number from 1 to 999")
    if sha is not None and not SHA.fullmatch(sha):
        raise Refusal(f"{sha[:60]!r} is no commit: give the 40 hex digits of the reviewed commit")
    return Request(names, tuple(map(int, batches)), machines, sha)


def _parts(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(re.findall(r"[^\s,]+", text)))


def of_comment(event: dict) -> Request:
    """Return the request in a maintainer's comment: `/perf SHA [set=NAME] [batch=1,2] [labels=h200]`. Raises Refusal.

    The comment names the reviewed commit, because the head of the pull request may have moved since. The commit must belong to
    this pull request, because a repository gives access to every commit of all its forks.
    """
    issue, comment = event.get("issue") or {}, event.get("comment") or {}
    if not issue.get("pull_request"):
        raise Refusal("the comment is on no pull request")
    if not _of_maintainer(comment):
        raise Refusal("only a maintainer may start a measurement")
    login = comment["user"]["login"]
    words = str(comment.get("body")).split()
    if len(words) < 2 or words[0] != "/perf":
        raise Refusal("give /perf SHA [set=NAME] [batch=1,2] [labels=LABEL]")
    options = dict(word.partition("=")[::2] for word in words[2:])
    if len(options) < len(words) - 2 or not options.keys() <= {"set", "batch", "labels"}:
        raise Refusal("after the commit only set=, batch= and labels= are allowed, each once")
    requested = request(options.get("set", "published"), options.get("batch", "1"), options.get("labels", ""), words[1])
    number = int(issue["number"])
    if _github(f"collaborators/{login}/permission", ".permission") not in WRITERS:
        raise Refusal("only a user who may write to this repository may start a measurement")
    commits = _github(f"pulls/{number}/commits?per_page=100", ".[].sha", "--paginate")  # at most 250, the oldest
    if requested.sha not in (*commits, *_github(f"pulls/{number}", ".head.sha")):
        raise Refusal(f"{requested.sha} is no commit of pull request {number}")
    return replace(requested, pull_request=number)


def _of_maintainer(comment: dict) -> bool:
    login = str((comment.get("user") or {}).get("login"))  # that of a bot has brackets
    return comment.get("author_association") in MAINTAINERS and bool(re.fullmatch(r"[A-Za-z0-9-]{1,39}", login))


def _github(path: str, query: str, *options: str) -> list[str]:
    """Return the lines of an answer of GitHub's command line. Raises Refusal where it fails."""
    command = ["gh", "api", *options, f"repos/{repository()}/{path}", "--jq", query]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise Refusal(
            f"GitHub does not answer: {(getattr(error, 'stderr', None) or str(error)).strip()[:200]}"
        ) from None
    return done.stdout.split()


def timeout_minutes(requested: Request, labels: tuple[str, ...], baselines: Path, paired: bool) -> int:
    """Return the timeout of a job, from the newest stored sessions or an estimate. paired: measured beside another commit."""
    seconds = max(
        sum(_seconds(requested, name, folder) for name, folder in requested.folders(baselines, label).items())
        for label in labels
    )
    print(f"GPU budget: about {math.ceil((2 if paired else 1) * seconds / 60)} minutes on each of {', '.join(labels)}")
    return math.ceil((PAIRED_TIMES if paired else TIMES) * seconds / 60) + SPARE_MINUTES


def _seconds(requested: Request, name: str, folder: Path) -> float:
    """Return the duration of the newest stored session of a set, or an estimate without one."""
    for path in sorted(saved_runs_in(folder), key=lambda path: path.name, reverse=True):
        try:
            return float(load(path)["perf"]["seconds"])
        except (BaselineError, KeyError, TypeError, ValueError):
            continue
    own = {member.batch for member in SETS[name]}
    return len(SETS[name]) * len(requested.batches or own) // len(own) * LAUNCHES * LAUNCH_SECONDS


def run() -> int:
    """Write the outputs."""
    event, own = read_json(Path(setting("GITHUB_EVENT_PATH"))), setting("GITHUB_SHA")
    repository()
    if not SHA.fullmatch(own):
        raise Refusal("GITHUB_SHA is no commit")
    if sys.argv[1:] == ["canary"]:
        labels = request("published", labels=str((event.get("inputs") or {}).get("labels") or "")).labels
        output("labels", json.dumps(labels or tuple(fleet())))
        return 0
    try:
        requested = of_event(setting("GITHUB_EVENT_NAME"), event)
    except Refusal as refusal:
        issue = event.get("issue") or {}
        if issue.get("pull_request") and _of_maintainer(event.get("comment") or {}):  # answer.py posts it there
            output("pull_request", str(int(issue["number"])))
            output("refusal", " ".join(str(refusal).split()))
        raise
    baselines = Path(setting("BASELINES", "baselines"))
    labels = requested.labels or tuple(fleet())
    if requested.skip_known:
        pattern = f"[0-9]*_{own[:12]}_*.json"
        folders = {label: requested.folders(baselines, label).values() for label in labels}
        labels = tuple(label for label in labels if not all(any(it.rglob(pattern)) for it in folders[label]))
        if not labels:
            print(f"main has not moved: {own} has been measured everywhere")
    main_itself = setting("GITHUB_REF") == "refs/heads/main" and requested.sha is None
    minutes = timeout_minutes(requested, labels, baselines, not main_itself) if labels else SPARE_MINUTES
    output("run", "true" if labels else "false")
    output("sha", requested.sha or own)
    output("labels", json.dumps(labels))
    output("sets", " ".join(requested.sets))
    output("batch", " ".join(map(str, requested.batches)))
    output("against", "" if main_itself else "origin/main")
    output("promote", "true" if main_itself and labels else "false")
    output("pull_request", str(requested.pull_request or ""))
    output("timeout_minutes", str(minutes))
    return 0


if __name__ == "__main__":
    sys.exit(main(run))
