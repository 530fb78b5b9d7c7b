"""Comparison of exact counts: operators, bytes, generated kernels, graph breaks, recompiles, host waits. Pure.

Counts have no noise: one round gives them, any difference is real, and they compare across machines with equal software.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

TOTALS = ("host_waits", "generated_kernels", "graphs", "graph_breaks", "recompiles")  # beside operators and bytes
MOST_NAMED = 6  # operators whose difference is shown
# What decides which code runs, and the phrase of a message; files of earlier versions have only torch. The code for a
# GPU depends on its model, and that for a CPU on the number of threads.
MADE_WITH = {
    "torch": "of torch {}",
    "triton": "of Triton {}",
    "xformers": "of xFormers {}",
    "diffusers": "of diffusers {}",
    "device": "of a {} device",
    "name": "of a {}",
    "threads": "with {} threads",
    "precision": "in precision {}",
}


@dataclass(frozen=True)
class CountsComparison:
    """Counts of a configuration compared with those of `against`.

    changes: each quantity that differs, for example `operators 4310 -> 4330 (addmm +16, mul +4)`. not_compared: why the
    counts of both sides cannot be compared, or None.
    """

    against: str
    changes: tuple[str, ...] = ()
    not_compared: str | None = None

    @property
    def same(self) -> bool:
        """Whether the counts were compared and are equal."""
        return not self.changes and self.not_compared is None

    def as_dict(self) -> dict[str, object]:
        """The comparison as JSON types, stored under `counts_comparison` in a saved run."""
        return {"against": self.against, "changes": list(self.changes), "not_compared": self.not_compared}

    def __str__(self) -> str:
        """For example `COUNTS operators 4310 -> 4330 (addmm +16, mul +4) against 0007_nightly`."""
        if self.not_compared:
            return f"counts are not compared with {self.against}: {self.not_compared}"
        return f"COUNTS {', '.join(self.changes) or 'unchanged'} against {self.against}"


def compare(new: Mapping[str, Any] | None, old: Mapping[str, Any] | None, against: str) -> CountsComparison:
    """Compare two `counts` of saved runs. A quantity that either side lacks is left out."""
    if new is None or old is None:
        side = "this session" if new is None else against
        return CountsComparison(against, not_compared=f"{side} has none")
    for key, phrase in MADE_WITH.items():
        if None not in (new.get(key), old.get(key)) and new[key] != old[key]:
            return CountsComparison(against, not_compared=f"they are {phrase.format(old[key])}, here {new[key]}")
    for side, counts in (("this session", new), (against, old)):
        if counts.get("error"):
            return CountsComparison(against, not_compared=f"{side} has none ({counts['error']})")
        if not counts["operators"] and not counts["generated_kernels"]:
            reason = f"{side} counted no operators (torch 1.x, or an engine that works in another process)"
            return CountsComparison(against, not_compared=reason)
    changes = _operators(new["operators"], old["operators"])
    if None not in (new["bytes"], old["bytes"]) and new["bytes"] != old["bytes"]:
        changes.append(f"bytes {_bytes(old['bytes'])} -> {_bytes(new['bytes'])} ({new['bytes'] - old['bytes']:+d})")
    for key in TOTALS:
        if None not in (new[key], old[key]) and new[key] != old[key]:
            changes.append(f"{key.replace('_', ' ')} {old[key]} -> {new[key]}")
    return CountsComparison(against, tuple(changes))


def _operators(new: Mapping[str, int] | None, old: Mapping[str, int] | None) -> list[str]:
    if new is None or old is None or new == old:
        return []
    differences = Counter(new)
    differences.subtract(old)
    largest = sorted(differences.items(), key=lambda item: (-abs(item[1]), item[0]))
    named = [f"{name} {count:+d}" for name, count in largest if count]
    more = [f"{len(named) - MOST_NAMED} more"] if len(named) > MOST_NAMED else []
    return [f"operators {sum(old.values())} -> {sum(new.values())} ({', '.join(named[:MOST_NAMED] + more)})"]


def _bytes(count: int) -> str:
    return f"{count / 1e9:.4g} GB"
