"""Saved-run format: read untrusted JSON into validated dataclasses (docs/saved-run.md), without torch or pytest."""

from __future__ import annotations

import functools
import json
import math
import os
import re
import stat
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from perf.analysis.counts import MADE_WITH, TOTALS
from perf.analysis.statistics import Interval
from perf.analysis.verdicts import REASONS, Decision, Verdict

SCHEMA = 1
MAX_BYTES = 200_000_000
NUMBERED = re.compile(r"(\d{4,})_.*\.json")  # file names of a storage
SECONDS = (1e-12, 1e7)  # bounds of a plausible duration: below any clock's resolution, and four months
READ_ADVICE = "name a saved run, or measure this one again"
# The facts that two machines must share for their seconds to be comparable. GPUs of one model differ by 8 % on average
# (arXiv 2208.11035), hence the UUID. `identity` reduces the Python version to its minor version.
IDENTITY = (
    *("device", "name", "processor", "uuid", "driver", "torch", "cuda", "cudnn", "triton", "xformers", "python"),
    *("power_limit_watts", "sm_clock_max_mhz", "memory_clock_max_mhz", "clock", "threads", "isolated"),
)


class BaselineError(ValueError):
    """A saved run that cannot be read, validated or written: one line with the file, the reason and a remedy."""


@dataclass(frozen=True)
class SavedBenchmark:
    """One configuration of a saved run.

    cycles: seconds of each round by launch, None for an invalid one, so that equal indices of two benchmarks are of the same
    cycle. A plain pytest-benchmark entry (without `schema`) has its full test name as id, one launch, no configuration and no
    reference workload.
    """

    id: str
    variant: str | None
    configuration: Mapping[str, object] | None
    cycles: tuple[tuple[float | None, ...], ...]
    anchored_launch_medians: tuple[float, ...] | None  # of round seconds / reference workload seconds
    image_failure: str | None = None
    seconds_per_image: float | None = None
    first_call_seconds: float | None = None
    peak_bytes: float | None = None
    joules_per_image: float | None = None
    decision: Decision | None = None
    counts: Mapping[str, object] | None = None
    precision: str | None = None  # in effect; None in a plain benchmark

    @functools.cached_property
    def launches(self) -> tuple[tuple[float, ...], ...]:
        """Seconds of the valid rounds by launch."""
        return tuple(tuple(seconds for seconds in launch if seconds is not None) for launch in self.cycles)

    @property
    def launch_medians(self) -> tuple[float, ...]:
        """Median seconds of each launch that has valid rounds."""
        return tuple(statistics.median(rounds) for rounds in self.launches if rounds)

    @property
    def session_median(self) -> float:
        """Median seconds over launches; each launch has equal weight, whatever its number of rounds."""
        return statistics.median(self.launch_medians)


@dataclass(frozen=True)
class SavedRun:
    """One session. `plain` marks a file of pytest-benchmark alone, which can be shown but is never a baseline."""

    path: Path
    plain: bool
    machine: Mapping[str, object]  # the keys of IDENTITY, and `hosted`
    benchmarks: tuple[SavedBenchmark, ...]
    invalid_rounds: int = 0
    total_rounds: int = 0
    started_unix_seconds: float | None = None
    partial: str | None = None
    invalid: str | None = None
    regressed: tuple[str, ...] = ()
    anchor_name: str | None = None
    anchor_drift: float | None = None
    drifted: str | None = None
    aa_ratios: tuple[float, ...] = ()
    commit: str | None = None
    selection: str | None = None  # the options that chose the configurations; None in files of earlier versions

    @property
    def name(self) -> str:
        """The file name without extension, such as `0007_nightly`."""
        return shown(Path(self.path.stem))

    @property
    def by_id(self) -> dict[str, SavedBenchmark]:
        """The benchmarks of the working tree, without those of `--perf-against` and `--perf-aa`."""
        return {benchmark.id: benchmark for benchmark in self.benchmarks if benchmark.variant is None}

    @property
    def why_no_candidate(self) -> str | None:
        """The reason why this run is never chosen as a baseline automatically, or None."""
        if self.plain:
            return "a plain pytest-benchmark file"
        if self.partial or self.invalid:
            return f"partial: {self.partial}" if self.partial else f"invalid: {self.invalid}"
        if self.drifted:
            return f"drifted: {self.drifted}"
        return f"regressed: {', '.join(self.regressed)}" if self.regressed else None


@dataclass(frozen=True)
class _Node:
    """A value of a parsed document with its file and location, which every error message names."""

    path: Path
    place: str
    value: object

    def fail(self, problem: str) -> NoReturn:
        raise BaselineError(f"{shown(self.path)}: {self.place} {problem}; {READ_ADVICE}")

    def __getitem__(self, key: str) -> _Node:
        return _Node(self.path, f"{self.place}.{key}", self.object().get(key))

    def object(self) -> dict[str, object]:
        if not isinstance(self.value, dict):
            self.fail("is missing" if self.value is None else "is not an object")
        return self.value

    def items(self) -> list[_Node]:
        if not isinstance(self.value, list):
            self.fail("is missing" if self.value is None else "is not a list")
        return [_Node(self.path, f"{self.place}[{index}]", value) for index, value in enumerate(self.value)]

    def text(self) -> str:
        # The text is printed to terminals: escape sequences, line ends and lone surrogates are rejected.
        if not isinstance(self.value, str) or not self.value.isprintable() or not 0 < len(self.value) <= 1000:
            self.fail("is not a printable text")
        return self.value

    def number(self, low: float, high: float) -> float:
        if isinstance(self.value, bool) or not isinstance(self.value, (int, float)) or not low <= self.value <= high:
            self.fail(f"is not a number from {low:g} to {high:g}")
        return float(self.value)

    def flag(self) -> bool:
        if not isinstance(self.value, bool):
            self.fail("is neither true nor false")
        return self.value

    def seconds(self) -> float:
        return self.number(*SECONDS)

    def optional_text(self) -> str | None:
        return None if self.value is None else self.text()

    def optional_count(self) -> int | None:
        return None if self.value is None else int(self.number(0, 1e18))

    def optional_number(self, low: float = 0.0, high: float = 1e18) -> float | None:
        return None if self.value is None else self.number(low, high)


def shown(path: Path) -> str:
    """A path for a one-line message, with unprintable characters escaped."""
    return str(path).encode("unicode_escape").decode("ascii")


def _reject_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number of JSON")


def read(path: str | os.PathLike[str]) -> SavedRun:
    """Read and validate a saved run. Raises BaselineError (absent, damaged, too large, another schema)."""
    return parse(load(path), Path(path))


def load(path: str | os.PathLike[str]) -> object:
    """Parse a JSON file without validating its keys. Raises BaselineError."""
    return document_in(content_of(path), Path(path))


def content_of(path: str | os.PathLike[str]) -> bytes:
    """Read the bytes of a saved run's file. Raises BaselineError if it is unreadable, empty or too large."""
    path = Path(path)
    try:
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0))) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):  # reading from a pipe would block
                raise BaselineError(f"{shown(path)}: is not a file; name a saved run")
            content = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        if isinstance(error, BaselineError):
            raise
        reason = getattr(error, "strerror", None) or str(error)
        raise BaselineError(f"{shown(path)}: cannot be read: {reason}; check the path and its permissions") from None
    if len(content) > MAX_BYTES:
        raise BaselineError(f"{shown(path)}: is larger than {MAX_BYTES // 2**20} MiB, the limit of saved runs")
    if not content.strip():
        raise BaselineError(f"{shown(path)}: is empty; {READ_ADVICE}")
    return content


def document_in(content: bytes, path: Path) -> object:
    """Parse the JSON content of the file `path`. Raises BaselineError."""
    try:
        return json.loads(content.decode("utf-8"), parse_constant=_reject_constant)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise BaselineError(f"{shown(path)}: is not JSON: {reason}; {READ_ADVICE}") from None


def root_of(document: object, path: Path) -> _Node:
    """The root node of a document, for reading further keys with the same validation."""
    return _Node(path, "the run", document)


def parse(document: object, path: Path) -> SavedRun:
    """Validate a parsed JSON document read from `path`. Raises BaselineError where it violates docs/saved-run.md."""
    root = root_of(document, path)
    machine_info, benchmarks = root["machine_info"], root["benchmarks"].items()
    machine_info.object()
    if root["perf"].value is None:
        plain = tuple(_plain_benchmark(node) for node in benchmarks)
        return _without_duplicates(root, SavedRun(path, True, _plain_machine(machine_info), plain))
    perf = root["perf"]
    _require_schema(perf)
    if perf["clock"].value not in ("wall", "cpu"):
        perf["clock"].fail("is neither wall nor cpu")
    session: dict[str, object] = {
        "clock": perf["clock"].value,
        "threads": perf["threads"].optional_number(1, 1e6),
        "isolated": perf["isolated"].flag(),
    }
    anchored = perf["anchor"].value is not None
    ratios = perf["aa"]["ratios"].items() if perf["aa"].value is not None else []
    total = perf["total_rounds"].number(0, 1e9)
    run = SavedRun(
        path=path,
        selection=perf["selection"].optional_text(),
        plain=False,
        machine=identity({**_stack(machine_info), **session}),
        benchmarks=tuple(
            _benchmark(node) if node["extra_info"].object().get("schema") is not None else _plain_benchmark(node)
            for node in benchmarks
        ),
        invalid_rounds=int(perf["invalid_rounds"].number(0, total)),
        total_rounds=int(total),
        started_unix_seconds=perf["started_unix_seconds"].number(0, 1e11),
        partial=perf["partial"].optional_text(),
        invalid=perf["invalid"].optional_text(),
        drifted=perf["drifted"].optional_text(),
        regressed=tuple(node.text() for node in perf["regressed"].items()),
        anchor_name=perf["anchor"]["name"].text() if anchored else None,
        anchor_drift=perf["anchor"]["drift"].optional_number(0, 1e9) if anchored else None,
        aa_ratios=tuple(node.number(1e-6, 1e6) for node in ratios),
        commit=root["commit_info"]["id"].optional_text() if isinstance(root["commit_info"].value, dict) else None,
    )
    return _without_duplicates(root, run)


def _without_duplicates(root: _Node, run: SavedRun) -> SavedRun:
    seen = set()
    for benchmark in run.benchmarks:
        key = (benchmark.id, benchmark.variant)
        if key in seen:
            root["benchmarks"].fail(f"has {benchmark.id!r} twice")
        seen.add(key)
    return run


def _require_schema(node: _Node) -> None:
    schema = node["schema"].value
    if schema != SCHEMA or isinstance(schema, bool):
        raise BaselineError(
            f"{shown(node.path)}: {node.place} has schema {schema!r:.40}, this version reads {SCHEMA}; use that version"
        )


def _scalar(node: _Node) -> object:
    if isinstance(node.value, str):
        return node.text()
    if isinstance(node.value, (bool, int, float)):
        return node.value if isinstance(node.value, bool) else node.number(-1e18, 1e18)
    return None  # such as the object of measured peak rates, which is no identity


def identity(facts: Mapping[str, object]) -> dict[str, object]:
    """The facts of IDENTITY, with Python reduced to its minor version, and `hosted`; absent facts are None.

    hosted: True on a hosted CI runner, where each job may run on another machine of the same name.
    """
    known = {key: facts.get(key) for key in IDENTITY}
    known["hosted"] = facts.get("hosted") is True or None
    if isinstance(known["python"], str):
        known["python"] = ".".join(known["python"].split(".")[:2])
    return known


def _processor(machine_info: _Node) -> str | None:
    """As perf.machine.facts.CpuFacts.processor, of an x86 processor by pytest-benchmark's facts, which leave out zeros."""
    cpu = machine_info["cpu"]
    if machine_info["system"].value != "Linux" or not isinstance(cpu.value, dict):
        return None
    numbers = {key: cpu.value.get(key, 0) for key in ("family", "model", "stepping")}
    if not numbers["family"] or not all(isinstance(number, int) for number in numbers.values()):
        return None
    return ", ".join(f"{key} {number}" for key, number in numbers.items())


def _stack(machine_info: _Node) -> dict[str, object]:
    stack = machine_info["stack"]
    facts = {key: _scalar(stack[key]) for key in stack.object()}
    if facts.get("device") == "cpu":  # files of earlier versions have no processor there
        facts.setdefault("processor", _processor(machine_info))
    return facts


def _plain_machine(info: _Node) -> dict[str, object]:
    if isinstance(info["stack"].value, dict):  # saved beside our plugin, without a measured configuration
        return identity(_stack(info))
    facts = {key: _scalar(info[key]) for key in ("torch", "cuda", "threads")}
    gpu = _scalar(info["gpu"])
    cpu = _scalar(info["cpu"]["brand_raw"]) if isinstance(info["cpu"].value, dict) else None
    processor = None if gpu else _processor(info)
    return identity({**facts, "name": gpu or cpu, "processor": processor, "python": _scalar(info["python_version"])})


def _data(node: _Node) -> tuple[float, ...]:
    data = node["stats"]["data"]
    if data.value is None:
        fix = "save with raw rounds (--benchmark-save-data)"
        raise BaselineError(f"{shown(node.path)}: {node.place} has no rounds, only summary statistics; {fix}")
    rounds = tuple(value.seconds() for value in data.items())
    return rounds or data.fail("is empty")


def _plain_benchmark(node: _Node) -> SavedBenchmark:
    return SavedBenchmark(node["fullname"].text(), None, None, (_data(node),), None)


def _benchmark(node: _Node) -> SavedBenchmark:
    info = node["extra_info"]
    _require_schema(info)
    node["fullname"].text()  # pytest-benchmark's table reads it
    if info["variant"].value not in (None, "base", "aa"):
        info["variant"].fail("is neither null, base nor aa")
    cycles, anchored = _launches(info)
    valid = [seconds for launch in cycles for seconds in launch if seconds is not None]
    data = _data(node)
    if len(data) != len(valid) or not all(math.isclose(a, b, rel_tol=1e-6) for a, b in zip(data, valid)):
        node.fail("has other rounds in stats.data than in its launches")
    peaks = info["peak_bytes"]
    peak_bytes = None if peaks.value is None else [peaks[key].optional_number() for key in ("allocated", "rss")]
    cold = None if info["first_call_seconds"].value is None else info["first_call_seconds"]["cold"].optional_number()
    return SavedBenchmark(
        id=info["configuration"]["id"].text(),
        variant=info["variant"].optional_text(),
        configuration=info["configuration"].object(),
        cycles=cycles,
        anchored_launch_medians=anchored,
        image_failure=_image_failure(info["image"]),
        seconds_per_image=info["seconds_per_image"].optional_number(),
        first_call_seconds=cold,
        peak_bytes=next((peak for peak in peak_bytes or () if peak is not None), None),
        joules_per_image=info["joules_per_image"].optional_number(),
        decision=_decision(info["verdict"]),
        counts=_counts(info["counts"]),
        precision=info["precision"].optional_text(),
    )


def _launches(info: _Node) -> tuple[tuple[tuple[float | None, ...], ...], tuple[float, ...] | None]:
    """(round seconds of each launch, None for invalid ones, median ratio to the reference workload of each launch)."""
    nodes = info["launches"].items()
    anchors = info["anchor"].items() if info["anchor"].value else None
    if anchors is not None and len(anchors) != len(nodes):
        info["anchor"].fail(f"has {len(anchors)} launches, not {len(nodes)}")
    launches: list[tuple[float | None, ...]] = []
    anchored = []
    for launch, node in enumerate(nodes):
        seconds = [value.seconds() for value in node["round_seconds"].items()]
        invalid = node["invalid"].object()
        if not invalid.keys() <= {str(index) for index in range(len(seconds))}:
            node["invalid"].fail("names rounds that do not exist")
        valid = [index for index in range(len(seconds)) if str(index) not in invalid]
        launches.append(tuple(None if str(index) in invalid else value for index, value in enumerate(seconds)))
        if anchors is not None:
            reference = [value.seconds() for value in anchors[launch].items()]
            if len(reference) != len(seconds):
                anchors[launch].fail(f"has {len(reference)} rounds, not {len(seconds)}")
            if valid:
                anchored.append(statistics.median(seconds[index] / reference[index] for index in valid))
    return tuple(launches), None if anchors is None else tuple(anchored)


def _counts(node: _Node) -> dict[str, object] | None:
    """The exact counts of a round; None in a file of an earlier version."""
    if node.value is None:
        return None
    operators = node["operators"]
    return {
        "torch": node["torch"].text(),
        **{key: _scalar(node[key]) for key in MADE_WITH if key != "torch"},
        "operators": None
        if operators.value is None
        else {
            _Node(operators.path, operators.place, name).text(): int(operators[name].number(0, 1e12))
            for name in operators.object()
        },
        **{key: node[key].optional_count() for key in ("bytes", *TOTALS)},
        "error": node["error"].optional_text(),
    }


def _image_failure(image: _Node) -> str | None:
    if image.value is None or image["verdict"].value != Verdict.INVALID.value:
        return None
    return image["reason"].optional_text() or "no reason given"


def _decision(node: _Node) -> Decision | None:
    if node.value is None:
        return None
    verdict, reason = node["verdict"].value, node["reason"].text()
    if verdict not in [known.value for known in Verdict] or reason.partition(" ")[0] not in REASONS:
        node.fail("has an unknown verdict or reason")
    return Decision(
        Verdict(verdict),
        reason,
        _interval(node["ratio"]),
        node["margin"].optional_number(),
        node["against"].optional_text(),
        node["raw_ratio"].optional_number(0, 1e30),
        None if node["launches"].value is None else int(node["launches"].number(0, 1e9)),
    )


def _interval(node: _Node) -> Interval | None:
    if node.value is None:
        return None
    estimate, low, high = node["estimate"].number(0, 1e30), node["low"], node["high"]
    if low.value is None and high.value is None:
        return Interval.point(estimate)
    return Interval(estimate, low.number(0, estimate), high.number(estimate, 1e30))
