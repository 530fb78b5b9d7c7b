"""Post a comment on a pull request, or replace the former one of the same key. The text is sent as data from a file."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

from workflow import NAME, Refusal, main, repository, setting


def post(number: str, key: str, text: str) -> None:
    """Post a text, or replace the comment of this key. Raises Refusal for invalid inputs and for an error of GitHub."""
    if not re.fullmatch(r"[1-9][0-9]{0,9}", number):
        raise Refusal(f"{number[:20]!r} is no number of a pull request")
    if not NAME.fullmatch(key):
        raise Refusal(f"{key[:60]!r} is no key of a comment")
    mark = f"<!-- sd-perf {key} -->"
    # Comments of bots alone: a person may quote the mark.
    query = f'.[] | select(.user.type == "Bot" and (.body | startswith("{mark}"))) | .id'
    existing = _github(
        "--paginate", f"repos/{repository()}/issues/{number}/comments?per_page=100", "--jq", query
    ).split()
    if existing and not existing[-1].isdigit():
        raise Refusal(f"GitHub gave {existing[-1][:20]!r} for the number of a comment")
    target = ["PATCH", f"repos/{repository()}/issues/comments/{existing[-1]}"] if existing else []
    target = target or ["POST", f"repos/{repository()}/issues/{number}/comments"]
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", suffix=".md") as file:
        file.write(f"{mark}\n{text}")
        file.flush()
        _github("--method", *target, "-F", f"body=@{file.name}")


def _github(*arguments: str) -> str:
    try:
        done = subprocess.run(["gh", "api", *arguments], capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip()[:200]
        raise Refusal(f"the comment could not be posted: {reason}") from None
    return done.stdout


def run() -> int:
    """Post the file $COMMENT on $PULL_REQUEST under the key $COMMENT_KEY."""
    text = Path(setting("COMMENT"))
    if not text.is_file():
        raise Refusal("there is no comment to post")
    post(setting("PULL_REQUEST"), setting("COMMENT_KEY", "results"), text.read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main(run))
