"""Post the comment on the pull request. The text is a file, sent as data; the number is matched whole."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from house import NAME, Refusal, given, main


def run() -> int:
    """Post it. Raises Refusal where GitHub does not take it."""
    number, repository, text = given("PULL_REQUEST"), given("GITHUB_REPOSITORY"), Path(given("COMMENT"))
    if not re.fullmatch(r"[1-9][0-9]{0,9}", number):
        raise Refusal(f"{number[:20]!r} is no number of a pull request")
    if repository.count("/") != 1 or not all(map(NAME.fullmatch, repository.split("/"))):
        raise Refusal("GITHUB_REPOSITORY is not what Actions sets")
    if not text.is_file():
        raise Refusal("there is no comment to post")
    command = ["gh", "api", "--method", "POST", f"repos/{repository}/issues/{number}/comments", "-F", f"body=@{text}"]
    try:
        done = subprocess.run(command, stdout=subprocess.DEVNULL, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Refusal(f"the comment could not be posted: {error}") from None
    if done.returncode:
        raise Refusal("the comment could not be posted")
    return 0


if __name__ == "__main__":
    sys.exit(main(run))
