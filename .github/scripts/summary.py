"""The job's summary page, of whatever there is in $OUT: for a step that always runs, on a machine where all else failed."""

from __future__ import annotations

import sys

import house
import words
from house import Refusal, main, out_folder
from outcomes import FILE, load


def run() -> int:
    """Write it; 0 whatever it says, for the step that measured has said it already."""
    found = []
    for path in sorted(out_folder().glob(f"*/{FILE}")):
        try:
            one = load(path.parent)
        except Refusal as refusal:
            house.summary(f"not read: {words.markdown(str(refusal))}")
            continue
        found.append((one, words.runs_of(path.parent, one)))
    text = words.text(found)
    house.summary(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(run))
