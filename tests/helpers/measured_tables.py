"""Tables in docs that are printed from saved runs: those between `<!-- measured: FILE.json -->` and `<!-- end -->`.

python tests/helpers/measured_tables.py       rewrite them; the files are in perf/baselines/
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peers_table

from perf.analysis import ranking
from perf.analysis.paired import paired_ratio
from perf.report import text
from perf.report.results import Result, session_of

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "perf" / "baselines"
PLACE = re.compile(r"(?<=<!-- measured: )(?P<file>\S+\.json)(?P<begin> -->\n)(?P<table>.*?)(?=<!-- end -->)", re.DOTALL)
REFERENCES = ("diffusers", "original")  # of speed-ups: what a file has of these, else the first configuration
MOST_STEPS_OF_STAGES = 4  # up to which the UNet does not have nearly all of the time


def table(path: Path) -> list[str]:
    """Lines of Markdown for a saved run of `pytest perf`, of the peers or of perf.throughput."""
    document = json.loads(path.read_text(encoding="utf-8"))
    if "scaling_efficiency" in document:
        return _throughput(document)
    if "first_runs" in document:
        return _first_runs(document)
    if "perf" in document:
        # Those that were made: an interrupted session has fewer than it planned.
        launches = min(len(benchmark["extra_info"]["launches"]) for benchmark in document["benchmarks"])
        return (_session if launches > 1 else _launch)(document, path)
    return peers_table.table(document)


def _throughput(document: dict[str, Any]) -> list[str]:
    rate, efficiency = (
        "{:.3g} [{:.3g}, {:.3g}]".format(*document[key]) for key in ("images_per_second", "scaling_efficiency")
    )
    replicas = len(document["replicas"])
    row = f"| `{document['configuration']['id']}` | {replicas} | {rate} | {efficiency} |"
    return ["| configuration | replicas | images/s together | scaling efficiency |", "|---|---|---|---|", row]


def _first_runs(document: dict[str, Any]) -> list[str]:
    configurations = list(dict.fromkeys(id for run in document["first_runs"] for id in run["speedups"]))
    lines = [
        "| run | exit status | seconds | " + " | ".join(f"`{id}` [95 %]" for id in configurations) + " | session |"
    ]
    lines.append("|---" * (4 + len(configurations)) + "|")
    for number, run in enumerate(document["first_runs"], 1):
        speedups = [
            "{estimate:.2f}x [{low:.2f}, {high:.2f}]".format(**run["speedups"][id]) if id in run["speedups"] else "none"
            for id in configurations
        ]
        state = (
            "INVALID" if run["invalid"] else "drifted" if run["drifted"] else "valid" if run["stack"] else "no result"
        )
        lines.append(f"| {number} | {run['status']} | {run['seconds']:.0f} | {' | '.join(speedups)} | {state} |")
    return lines


def _session(document: dict[str, Any], path: Path) -> list[str]:
    session, results = session_of(document, path)
    assert session.saved.invalid_rounds == 0, "rounds are paired by their order"
    facts = session.facts
    clock = "CPU time" if facts.get("clock") == "cpu" else "wall time"
    # A session on a GPU has no choice of threads.
    threads = [text.counted(int(facts["threads"]), "thread")] if "threads" in facts else []
    lines = [f"{', '.join([facts['name'], f'torch {session.torch}', clock, *threads])}.", ""]
    kind = next((kind for kind in REFERENCES if any(f"-{kind}-" in result.id for result in results)), None)
    references = {}  # by work: times of different work are not comparable
    for result in results:
        work = ranking.work_of(result.benchmark.configuration)
        if kind is None or f"-{kind}-" in result.id:
            references.setdefault(work, result)
    columns: dict[str, Callable[[Result], str]] = {
        "configuration": lambda result: f"`{result.id}`",
        "time per image [95 %]": lambda result: text.interval_seconds(result.seconds_per_image, *result.interval),
        f"speed-up over {kind or 'the first'} [95 %]": lambda result: _speedup(references, result),
    }
    if results[0].steps <= MOST_STEPS_OF_STAGES:
        names = [name for name in ("text", "encode", "unet", "vae", "other") if name in results[0].stages]
        columns |= {name: lambda result, name=name: _share(result, name) for name in names if len(names) > 1}
    lines += [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    return lines + [f"| {' | '.join(column(result) for column in columns.values())} |" for result in results]


def _launch(document: dict[str, Any], path: Path) -> list[str]:
    """Of a session with one launch, which has no interval: the rounds' median with the smallest and the largest."""
    session, results = session_of(document, path)
    driver = document["machine_info"]["stack"]["driver"]
    lines = [f"{session.facts['name']}, driver {driver}, torch {session.torch}, one launch.", ""]
    lines += [
        "| configuration | rounds | time per image | images/s | J per image | of peak FLOP/s | PSNR |",
        "|---" * 7 + "|",
    ]
    for result in results:
        (rounds,) = result.benchmark.launches
        low, high = min(rounds) / result.images, max(rounds) / result.images
        seconds = text.interval_seconds(result.seconds_per_image, low, high)
        shares = f"{result.joules.value:.0f} | {result.flops_fraction:.1%} | {result.psnr_db:.0f} dB"
        lines.append(f"| `{result.id}` | {len(rounds)} | {seconds} | {1 / result.seconds_per_image:.2f} | {shares} |")
    return lines


def _speedup(references: dict[tuple, Result], result: Result) -> str:
    """By neighbouring rounds of the session, as the speed-ups of `pytest perf`; empty for a reference and without one."""
    reference = references.get(ranking.work_of(result.benchmark.configuration), result)
    if result is reference:
        return ""
    ratio = paired_ratio(reference.benchmark.launches, result.benchmark.launches)
    return f"{ratio.estimate:.2f}x [{ratio.low:.2f}, {ratio.high:.2f}]"


def _share(result: Result, name: str) -> str:
    """Of the time of a round; an engine may not tell a stage apart."""
    if name not in result.stages:
        return ""
    return f"{result.stages[name].value / sum(stage.value for stage in result.stages.values()):.0%}"


def rewritten(page: str) -> str:
    """The text of a page with its tables printed anew."""
    return PLACE.sub(
        lambda place: f"{place['file']}{place['begin']}" + "\n".join(table(FOLDER / place["file"])) + "\n", page
    )


def main() -> None:
    """Rewrite the tables of every page."""
    for path in sorted((ROOT / "docs").glob("*.md")):
        page = path.read_text(encoding="utf-8")
        if page != rewritten(page):
            path.write_text(rewritten(page), encoding="utf-8")
            print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
