"""The content of a saved run: exactly the keys of docs/saved-run.md, with numbers that agree with the rounds."""

from __future__ import annotations

import json
import re
import statistics

import pytest
from inner_session import ORIGINAL, SDPA, inner_fixture, machine_fixture, watched_by  # noqa: F401

from perf.configurations.configuration import Configuration
from perf.launch.process import ROOT
from perf.machine.telemetry import RoundTelemetry
from perf.runs import saved_run
from perf.runs.storage import storage_name

DOCUMENT = (ROOT / "docs" / "saved-run.md").read_text(encoding="utf-8")
COMPILED = "tiny-sdpa-compile-plms2-b1"
EVERYTHING = ("--attention=original", "--attention=sdpa", "--compile=none", "--compile=default", "--steps=2")


def table(after: str) -> dict[str, str]:
    """The first table after a text: the description of each key."""
    lines = DOCUMENT.partition(after)[2].splitlines()
    rows = {}
    for line in lines:
        if line.startswith("| `"):
            names, content = (cell.strip() for cell in line.strip("|").split("|", 1))
            rows.update(dict.fromkeys(re.findall(r"`(\w+)`", names), content))
        elif rows:
            break
    return rows


def keys_of_object(content: str) -> set[str] | None:
    """The keys of the object that a cell describes, as in `{"cold", "warm": [...]}`; None where it describes none."""
    found = re.search(r"\{.*\}", content)
    if not found:
        return None
    flat, depth = "", 0
    for character in found[0]:
        depth += (character in "{[") - (character in "]}")
        flat += character if depth == 1 else ""
    return set(re.findall(r'"(\w+)"(?=[,:}]|$)', flat))


def objects(value) -> list[dict]:
    return [value] if isinstance(value, dict) else value


@pytest.fixture(scope="module")
def cache():
    return {}


@pytest.fixture
def document(inner, monkeypatch, cache):
    """A saved run with as few nulls as possible."""
    if not cache:
        telemetry = RoundTelemetry(1.0, 1980.0, 2619.0, 650.0, 60, 120.0, "energy_counter", (), {"power": 0}, ())
        watched_by(monkeypatch, lambda attempt: None, telemetry.as_dict())
        inner.machine.slow[COMPILED] = 0.5
        inner.run("--perf-aa", launches=6, what=EVERYTHING)
        cache["document"], cache["path"] = inner.last(), inner.saved()[-1]
    return cache["document"]


@pytest.fixture
def info(document) -> dict:
    """`extra_info` of a compiled configuration."""
    (found,) = (one["extra_info"] for one in document["benchmarks"] if COMPILED in one["name"])
    return found


def test_top_level(document):
    assert table("## Top level").keys() <= document.keys()
    assert document.keys() - table("## Top level").keys() == {"datetime", "version"}, "pytest-benchmark's own"


def test_keys_of_the_session(document):
    rows = table("`perf`:")
    assert document["perf"].keys() == rows.keys()
    for key, content in rows.items():
        if keys_of_object(content) and key != "control":  # --perf-aa needs none: see test_plugin_pairs
            assert document["perf"][key].keys() == keys_of_object(content), key


def test_keys_of_the_stack(document):
    (paragraph,) = re.findall(r"^`machine_info.stack`: (.*?) On a CPU", DOCUMENT, re.DOTALL | re.MULTILINE)
    while "(" in paragraph:
        paragraph = re.sub(r"\([^()]*\)", "", paragraph)
    assert document["machine_info"]["stack"].keys() == set(re.findall(r"`(\w+)`", paragraph))


def test_keys_of_a_benchmark(document, info):
    rows = table("`extra_info`:")
    for benchmark in document["benchmarks"]:
        assert benchmark["extra_info"].keys() == rows.keys()
    described = {key: keys_of_object(content) for key, content in rows.items() if keys_of_object(content)}
    assert described.pop("trace"), "of --perf-trace alone: see test_trace"
    assert len(described) >= 12
    for key, names in described.items():
        assert info[key], f"{key} is empty here: nothing is tested"
        for one in objects(info[key]):
            assert one.keys() == names, key


def test_only_values_unavailable_here_are_null(info):
    assert {key for key, value in info.items() if value is None} == {"variant", "device_seconds", "trace"}


def test_configuration_is_whole(info):
    one = Configuration(compile="default", steps=2)
    assert info["configuration"] == json.loads(json.dumps(one.as_dict()))
    assert one.id == COMPILED


def test_numbers_agree_with_the_rounds(document, info):
    (benchmark,) = (one for one in document["benchmarks"] if one["extra_info"] is info)
    rounds = [launch["round_seconds"] for launch in info["launches"]]
    assert benchmark["stats"]["data"] == pytest.approx([seconds for launch in rounds for seconds in launch])
    seconds = statistics.median(map(statistics.median, rounds))
    assert info["seconds_per_image"] == pytest.approx(seconds)
    assert info["images_per_second"] == pytest.approx(1 / seconds)
    assert info["iterations_per_second"] == pytest.approx(3 / info["stages"]["unet"])
    assert info["flops_fraction"] == pytest.approx(info["flops"] / seconds / 1e11)
    assert info["joules_per_image"] == 120.0
    assert [len(launch) for launch in info["anchor"]] == [len(launch) for launch in rounds] == [2] * 6
    assert len(info["telemetry"]) == 12
    for launch, seconds in zip(info["launches"], rounds):
        assert {name: len(found) for name, found in launch["stage_seconds"].items()} == dict.fromkeys(
            ("text", "unet", "vae", "other"), len(seconds)
        )
    for name, seconds in info["stages"].items():
        medians = [statistics.median(launch["stage_seconds"][name]) for launch in info["launches"]]
        assert seconds == pytest.approx(statistics.median(medians))
    assert benchmark["params"] == {"configuration": COMPILED}
    assert document["perf"]["order"][:2] == [ORIGINAL, f"{ORIGINAL}@aa"]


def test_break_even_against_the_uncompiled_configuration(info):
    """2 s of compiling, and 0.1 s instead of 0.2 s an image."""
    pays, first = info["images_to_amortise"], info["first_call_seconds"]
    assert pays["estimate"] == pytest.approx(20, abs=1)
    assert pays["low"] <= pays["estimate"] <= pays["high"]
    assert (first["cold"], first["warm"]) == (pytest.approx(2.1, rel=0.01), pytest.approx(0.1, rel=0.01))
    assert info["compile"] == {"graphs": 1, "graph_breaks": 0, "recompiles": 0}
    picture, before = info["first_picture_seconds"], 1.0 + info["load_seconds"]  # importing takes the fake machine 1 s
    assert (picture["cold"], picture["warm"]) == (first["cold"] + before, first["warm"] + before)


def test_nothing_is_called_cold_with_a_shared_compile_cache(inner, tmp_path):
    """An earlier session, or another configuration of this one, may have filled it."""
    inner.run("--benchmark-save=a", f"--perf-compile-cache={tmp_path / 'cache'}", launches=2, rounds=1)
    info = inner.last()["benchmarks"][0]["extra_info"]
    for key in ("first_call_seconds", "first_picture_seconds"):
        assert info[key]["cold"] is None and info[key]["warm"] > 0


def test_break_even_is_never_without_saving(document):
    (info,) = (one["extra_info"] for one in document["benchmarks"] if "tiny-original-compile-" in one["name"])
    assert info["images_to_amortise"]["high"] is None


def test_speedup_is_against_the_original_attention(document):
    speedups = {
        one["extra_info"]["configuration"]["id"]: one["extra_info"]["speedup"] for one in document["benchmarks"]
    }
    assert speedups[ORIGINAL] is None
    assert {one["against"] for one in speedups.values() if one} == {ORIGINAL}
    assert speedups[COMPILED]["estimate"] == pytest.approx(2.0, rel=0.01)
    assert speedups[SDPA]["low"] <= speedups[SDPA]["estimate"] <= speedups[SDPA]["high"]


def test_read_back(document, cache, tmp_path):
    path = tmp_path / "0001_x.json"
    path.write_text(json.dumps(document))
    run = saved_run.read(path)
    assert run.by_id.keys() == {one["extra_info"]["configuration"]["id"] for one in document["benchmarks"]}
    assert run.why_no_candidate is None and not run.plain
    assert run.aa_ratios == tuple(document["perf"]["aa"]["ratios"])
    assert run.by_id[COMPILED].decision.verdict.value == "SAME"
    assert storage_name(document["machine_info"]["stack"]) == cache["path"].parent.parent.name


def test_no_launch_and_no_compile_of_a_single_uncompiled_launch(inner):
    """Without a warm first call, interval, speed-up and drift: null, never 0."""
    inner.run("--benchmark-save=a", launches=1, rounds=1)
    info, perf = inner.last()["benchmarks"][0]["extra_info"], inner.last()["perf"]
    assert info["first_picture_seconds"]["warm"] is None and info["first_picture_seconds"]["cold"] > 0
    assert info["first_call_seconds"]["warm"] is None and info["first_call_seconds"]["cold"] > 0
    for key in ("compile", "images_to_amortise", "speedup", "paired", "joules_per_image", "verdict"):
        assert info[key] is None, key
    assert (perf["anchor"]["drift"], perf["aa"], perf["against"], perf["injected_slowdown"]) == (None,) * 4
    assert info["telemetry"] == [None]


def test_flops_are_counted_from_the_networks_of_a_yaml_file_too(inner):
    """The worker counts them from the loaded model, so the file need not have a preset's shapes."""
    for name in ("mine.ckpt", "mine.yaml"):
        (inner.path / name).write_text("")
    weights = ("--model=tiny", "--ckpt=mine.ckpt", "--config=mine.yaml", "--steps=2")
    inner.run("--benchmark-save=a", what=weights)
    info = inner.last()["benchmarks"][0]["extra_info"]
    assert (info["flops"], info["floor_bytes"]) == (3 * 10**9, 10**8) and info["flops_fraction"] > 0
    assert info["weights"]["kind"] == "file" and len(info["weights"]["sha256"]) == 64


def test_momentary_frequency_is_left_out(document):
    assert document["machine_info"]["cpu"] == {"brand_raw": "Synthetic CPU"}
