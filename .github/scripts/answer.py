"""Answer the comment `/perf` on its pull request: what will be measured where, or why it is refused."""

from __future__ import annotations

import json
import os
import sys

from post import post
from workflow import NAME, SHA, Refusal, main, setting

from perf.report.text import markdown


def answer() -> str:
    """The answer from the outputs of resolve.py. Raises Refusal for outputs that it does not write."""
    if refusal := os.environ.get("REFUSAL", "").strip():
        return f"`/perf` is refused: {markdown(refusal[:300])}.\n"
    if setting("RESULT") != "success":
        return "`/perf` could not be resolved: see the log of the run.\n"
    sha, labels, sets = setting("SHA"), json.loads(setting("LABELS")), setting("SETS").split()
    if not SHA.fullmatch(sha) or not all(NAME.fullmatch(name) for name in (*labels, *sets)):
        raise Refusal("SHA, LABELS or SETS is not as resolve.py writes it")
    machines = ", ".join(f"`{label}`" for label in labels)
    return (
        f"Measuring {sha[:12]} against main on {machines}: {', '.join(sets)}. The verdict comes as another comment.\n"
    )


def run() -> int:
    """Post the answer, with a link to the run."""
    url = f"{setting('GITHUB_SERVER_URL')}/{setting('GITHUB_REPOSITORY')}/actions/runs/{setting('GITHUB_RUN_ID')}"
    post(setting("PULL_REQUEST"), "answer", f"{answer()}\n[Log]({url})\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(run))
