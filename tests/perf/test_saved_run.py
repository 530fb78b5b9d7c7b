"""Reading saved runs: every damage is a one-line error that names the file."""

from __future__ import annotations

import copy
import json
import math
import os
import random
import statistics
from pathlib import Path

import pytest

pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st
from saved_runs import DOCUMENT, GOLDEN, IDS, INFO, RUNS, parsed, put

from perf.runs.baselines import Choice, judge
from perf.runs.saved_run import BaselineError, parse, read


def test_golden_run():
    run = read(GOLDEN)
    assert (run.name, run.plain, run.why_no_candidate) == ("0001_synthetic", False, None)
    assert (run.invalid_rounds, run.total_rounds, run.anchor_name, run.aa_ratios) == (
        1,
        36,
        "synthetic-1",
        (1.002, 0.996, 1.001),
    )
    assert tuple(run.by_id) == IDS
    slow = run.by_id["tiny-mha-b1"]
    assert [len(rounds) for rounds in slow.launches] == [2, 2, 2, 1, 2, 2]  # without the throttled round
    assert slow.session_median == pytest.approx(0.31, rel=0.01)
    assert statistics.median(slow.anchored_launch_medians) == pytest.approx(0.31 / 0.0125, rel=0.01)
    assert (slow.peak_bytes, slow.configuration["attention"]) == (1.2e9, "mha")
    assert str(slow.decision) == "INCONCLUSIVE +0.4 % against 0000_synthetic (too_few_sessions)"


def test_medians_are_over_launches():
    """Launches have equal weight; each round is divided by the reference workload beside it."""

    def change(made):
        benchmark = made["benchmarks"][0]
        launch = {"start_unix_seconds": 0, "load_seconds": None, "first_call_seconds": None, "invalid": {}}
        rounds = [[1.0] * 4 + [3.0] * 5, [2.0], [4.0]]
        benchmark["extra_info"]["launches"] = [{**launch, "round_seconds": seconds} for seconds in rounds]
        benchmark["extra_info"]["anchor"] = [[0.5] * 4 + [1.5] * 5, [0.5], [1.0]]
        benchmark["stats"]["data"] = [seconds for launch in rounds for seconds in launch]

    benchmark = parsed(change).by_id[IDS[0]]
    assert (benchmark.launch_medians, benchmark.session_median) == ((3.0, 2.0, 4.0), 3.0)
    assert benchmark.anchored_launch_medians == (2.0, 4.0, 4.0)


def test_plain_file_is_readable_but_no_candidate():
    run = read(RUNS / "plain.json")
    assert run.plain and run.why_no_candidate == "a plain pytest-benchmark file"
    assert run.by_id["test_a.py::test_a"].session_median == pytest.approx(1.33e-5)
    assert run.by_id["test_a.py::test_a"].anchored_launch_medians is None


def test_plain_benchmark_in_a_run_of_ours():
    def change(made):
        made["benchmarks"][0]["extra_info"] = {"ratio_to_diffusers": [1.0, 0.9, 1.1]}

    assert parsed(change).benchmarks[0].id == "perf/test_txt2img.py::test_txt2img[tiny-original-b1]"


DAMAGE = {
    "no machine_info": (lambda made: made.pop("machine_info"), "machine_info is missing"),
    "no stack": (put("machine_info", "stack", None), "stack is missing"),
    "no benchmarks": (lambda made: made.pop("benchmarks"), "benchmarks is missing"),
    "benchmarks an object": (put("benchmarks", {}), "benchmarks is not a list"),
    "perf a list": (put("perf", []), "perf is not an object"),
    "newer schema": (put("perf", "schema", 2), "schema 2, this version reads 1"),
    "schema of a benchmark": (put(*INFO, "schema", "1"), "schema '1', this version reads 1"),
    "schema true": (put("perf", "schema", True), "schema True"),
    "clock": (put("perf", "clock", "sundial"), "clock is neither wall nor cpu"),
    "isolated": (put("perf", "isolated", 1), "isolated is neither true nor false"),
    "partial": (put("perf", "partial", False), "partial is not a printable text"),
    "regressed": (put("perf", "regressed", None), "regressed is missing"),
    "more invalid rounds than rounds": (put("perf", "invalid_rounds", 37), "invalid_rounds is not a number"),
    "A/A of zero": (put("perf", "aa", "ratios", [0]), r"aa.ratios\[0\] is not a number"),
    "zero": (put("benchmarks", 0, "stats", "data", 0, 0.0), r"data\[0\] is not a number"),
    "negative": (put("benchmarks", 0, "stats", "data", 3, -0.42), r"data\[3\] is not a number"),
    "huge": (put("benchmarks", 0, "stats", "data", 0, 1e300), "is not a number from 1e-12 to 1e"),
    "huge whole number": (put("benchmarks", 0, "stats", "data", 0, 10**400), "is not a number"),
    "true for a number": (put("benchmarks", 0, "stats", "data", 0, True), "is not a number"),
    "text for a number": (put("benchmarks", 0, "stats", "data", 0, "0.42"), "is not a number"),
    "NaN in memory": (put("benchmarks", 0, "stats", "data", 0, math.nan), "is not a number"),
    "no raw rounds": (lambda made: made["benchmarks"][0]["stats"].pop("data"), "--benchmark-save-data"),
    "empty rounds": (put("benchmarks", 0, "stats", "data", []), "data is empty"),
    "a round more": (lambda made: made["benchmarks"][0]["stats"]["data"].append(0.42), "other rounds in stats.data"),
    "another round": (put("benchmarks", 0, "stats", "data", 0, 0.43), "other rounds in stats.data"),
    "launches lost": (put(*INFO, "launches", None), "launches is missing"),
    "anchor of another launch count": (put(*INFO, "anchor", [[0.01, 0.01]]), "1 launches, not 6"),
    "anchor of another round count": (put(*INFO, "anchor", 2, [0.01]), r"anchor\[2\] has 1 rounds, not 2"),
    "anchor of zero": (put(*INFO, "anchor", 0, 0, 0), "is not a number"),
    "invalid round that is not there": (
        put(*INFO, "launches", 0, "invalid", {"7": "throttled"}),
        "rounds that do not exist",
    ),
    "variant": (put(*INFO, "variant", "head"), "neither null, base nor aa"),
    "no id": (
        lambda made: made["benchmarks"][0]["extra_info"]["configuration"].pop("id"),
        "id is not a printable text",
    ),
    "escape sequence": (put(*INFO, "configuration", "id", "\x1b[2Jtiny"), "id is not a printable text"),
    "one id twice": (put(*INFO, "configuration", "id", "tiny-sdpa-b1"), "'tiny-sdpa-b1' twice"),
    "verdict": (put(*INFO, "verdict", {"verdict": "OK", "reason": "fine"}), "unknown verdict or reason"),
    "interval upside down": (
        put(
            *INFO,
            "verdict",
            {"verdict": "SAME", "reason": "within_margin", "ratio": {"estimate": 1, "low": 2, "high": 3}},
        ),
        "ratio.low is not a number",
    ),
}


@pytest.mark.parametrize("change, message", DAMAGE.values(), ids=DAMAGE)
def test_damaged_document(change, message):
    with pytest.raises(BaselineError, match=message) as caught:
        parsed(change)
    assert str(caught.value).startswith("0001_changed.json: ") and "\n" not in str(caught.value)


TEXT = GOLDEN.read_text(encoding="utf-8")
FILES = {
    "empty": (b"", "is empty"),
    "blank": (b" \n", "is empty"),
    "truncated": (TEXT[:5000].encode(), "is not JSON"),
    "list": (b"[]", "the run is not an object"),
    "null": (b"null", "the run is missing"),
    "binary": (b"\x80PK\x03\x04\xff", "is not JSON"),
    "UTF-16": (TEXT.encode("utf-16"), "is not JSON"),
    "NaN": (TEXT.replace('"seconds": 400.0', '"seconds": NaN').encode(), "NaN is no number"),
    "Infinity": (TEXT.replace('"seconds": 400.0', '"seconds": -Infinity').encode(), "-Infinity is no number"),
    "1e999": (TEXT.replace('"drift": 0.001', '"drift": 1e999').encode(), "drift is not a number"),
    "nested": (b'{"a":' * 100_000, "nested too deeply"),
    "five thousand digits": (TEXT.replace('"drift": 0.001', '"drift": ' + "9" * 5000).encode(), "is not"),
}


@pytest.mark.parametrize("content, message", FILES.values(), ids=FILES)
def test_damaged_file(tmp_path, content, message):
    path = tmp_path / "0001_a.json"
    path.write_bytes(content)
    with pytest.raises(BaselineError, match=message) as caught:
        read(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_unreadable_paths(tmp_path):
    with pytest.raises(BaselineError, match="No such file"):
        read(tmp_path / "absent.json")
    with pytest.raises(BaselineError, match="directory"):
        read(tmp_path)
    with pytest.raises(BaselineError, match="null byte"):
        read("a\0b")
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(BaselineError, match="is not a file"):
        read(tmp_path / "pipe.json")


def test_size_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr("perf.runs.saved_run.MAX_BYTES", GOLDEN.stat().st_size)
    assert read(GOLDEN).name == "0001_synthetic"
    monkeypatch.setattr("perf.runs.saved_run.MAX_BYTES", GOLDEN.stat().st_size - 1)
    with pytest.raises(BaselineError, match="larger than"):
        read(GOLDEN)


def outcome(path: Path, content: bytes) -> str:
    """Read mutated bytes: the result must be a valid run or a BaselineError."""
    path.write_bytes(content)
    try:
        run = read(path)
    except BaselineError as error:
        assert "\n" not in str(error)
        return "refused"
    assert all(0 < benchmark.session_median < math.inf for benchmark in run.benchmarks)
    judge(run, Choice((read(GOLDEN),) * 6), 0.01)
    return "read"


def test_fuzzed_bytes(tmp_path):
    draw, path, original = random.Random(1), tmp_path / "0001_a.json", GOLDEN.read_bytes()
    outcomes = []
    for trial in range(600):
        mutated = bytearray(original)
        if trial % 3 == 0:
            del mutated[draw.randrange(len(mutated)) :]
        elif trial % 3 == 1:
            for _ in range(draw.choice([1, 1, 5, 50])):
                mutated[draw.randrange(len(mutated))] = draw.randrange(256)
        else:
            start = draw.randrange(len(mutated))
            del mutated[start : start + draw.randrange(1, 200)]
        outcomes.append(outcome(path, bytes(mutated)))
    assert outcomes.count("refused") > 400
    assert outcomes.count("read") > 20  # the mutations must reach the validation


def places(value: object, path: tuple = ()) -> list[tuple]:
    """Every path to a value in a document."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, child in children for place in places(child, (*path, key)))]


@pytest.mark.slow
def test_fuzzed_values(tmp_path):
    """Replace each value of the document by another type or magnitude, or delete it."""
    odd = [None, True, 0, -1, 10**400, 1e308, 5e-324, "", "x", "\ud800", "NaN", [], {}, [[]], {"a": 1}]
    draw, path, outcomes = random.Random(2), tmp_path / "0001_a.json", []
    for place in places(DOCUMENT)[1:]:
        mutated = copy.deepcopy(DOCUMENT)
        put(*place, draw.choice(odd))(mutated)
        outcomes.append(outcome(path, json.dumps(mutated).encode()))
        if isinstance(place[-1], str):
            mutated = copy.deepcopy(DOCUMENT)
            parent = mutated
            for step in place[:-1]:
                parent = parent[step]
            del parent[place[-1]]
            outcomes.append(outcome(path, json.dumps(mutated).encode()))
    assert len(outcomes) > 300 and outcomes.count("refused") > 100 and outcomes.count("read") > 100


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["perf", "schema", "benchmarks", "machine_info", "stats", "data"]), inner, max_size=4
        )
    ),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(json_values)
def test_any_document(value):
    try:
        assert parse(value, Path("a.json")).benchmarks == ()
    except BaselineError as error:
        assert str(error).startswith("a.json: ")
