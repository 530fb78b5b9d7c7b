"""Post a comment on a pull request. The text is sent as data from a file."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from workflow import Refusal, main, repository, setting


def run() -> int:
    """Post $COMMENT on $PULL_REQUEST. Raises Refusal for invalid inputs and for an error of GitHub."""
    number, text = setting("PULL_REQUEST"), Path(setting("COMMENT"))
    if not re.fullmatch(r"[1-9][0-9]{0,9}", number):
        raise Refusal(f"{number[:20]!r} is no number of a pull request")
    if not text.is_file():
        raise Refusal("there is no comment to post")
    command = ["gh", "api", "--method", "POST", f"repos/{repository()}/issues/{number}/comments", "-F", f"body=@{text}"]
    try:
        subprocess.run(command, stdout=subprocess.DEVNULL, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise Refusal(f"the comment could not be posted: {error}") from None
    return 0


if __name__ == "__main__":
    sys.exit(main(run))
