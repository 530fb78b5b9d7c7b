"""Selection of stored sessions, and verdicts against them with and without an injected slowdown."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from saved_runs import DOCUMENT, GOLDEN, IDS, INFO, RUNS, STACK, document, parsed, put, store

from perf.analysis.verdicts import Verdict
from perf.runs.baselines import Choice, candidates, judge, judge_foreign, why_foreign
from perf.runs.saved_run import BaselineError, SavedRun, parse, read


@pytest.fixture
def storage(tmp_path) -> Path:
    """Eight unchanged sessions on a machine whose speed, the reference workload's too, varies by up to 8 %."""
    for number in range(1, 9):
        store(tmp_path, document(number, offset=1 + 0.01 * (number * 5 % 8), noise=0.002), number)
    return tmp_path


def chosen(folder: Path) -> Choice:
    return candidates(folder, STACK, "wall", None)


def current(slow: dict[str, float] | None = None, offset: float = 1.1) -> SavedRun:
    return parse(document(20, slow, offset, noise=0.002), Path("current.json"))


@pytest.mark.parametrize(
    "fact, value, message",
    [
        ("name", "NVIDIA H200", "name Synthetic GPU, here NVIDIA H200"),
        ("uuid", "GPU-1", "uuid GPU-0"),
        ("processor", "family 25, model 1", "processor unknown, here family 25, model 1"),
        ("driver", "580.1", "driver 570.86, here 580.1"),
        ("torch", "2.14.0", "torch 2.15.0+cu132, here 2.14.0"),
        ("cuda", None, "cuda 13.2, here unknown"),
        ("xformers", "0.0.31", "xformers unknown, here 0.0.31"),
        ("python", "3.12.1", "python 3.11, here 3.12"),
        ("power_limit_watts", 350.0, "power_limit_watts 700, here 350"),
        ("clock", "cpu", "clock wall, here cpu"),
        ("threads", 2, "threads unknown, here 2"),
        ("isolated", False, "isolated True, here False"),
    ],
)
def test_foreign(tmp_path, fact, value, message):
    here = {**STACK, "clock": "wall", "threads": None, "isolated": True}
    assert why_foreign(read(GOLDEN).machine, here) is None
    here[fact] = value
    assert why_foreign(read(GOLDEN).machine, here).startswith(message)
    store(tmp_path, DOCUMENT)
    choice = candidates(tmp_path, here, here["clock"], here["threads"], here["isolated"])
    assert choice.newest is None
    assert choice.refused[0][1].startswith(f"foreign: {message}")


@pytest.mark.parametrize(
    "cpu, wanted",
    [({"family": 25, "model": 17}, "family 25, model 17, stepping 0"), ({}, None), ({"family": "?", "model": 1}, None)],
)
def test_the_processor_of_a_run_stored_without_one(cpu, wanted):
    """pytest-benchmark's facts of the CPU have it, without zeros."""
    earlier = document(3)
    info = earlier["machine_info"]
    info["stack"]["device"], info["cpu"] = "cpu", cpu
    assert parse(earlier, Path("earlier.json")).machine["processor"] == wanted
    info["stack"]["processor"] = "family 6, model 1, stepping 2"
    assert parse(earlier, Path("stored.json")).machine["processor"] == "family 6, model 1, stepping 2"
    del earlier["perf"], info["stack"]["processor"]
    assert parse(earlier, Path("plain, beside our plugin.json")).machine["processor"] == wanted
    del info["stack"]
    assert parse(earlier, Path("plain.json")).machine["processor"] == wanted


def test_irrelevant_facts_are_not_foreign():
    here = {**STACK, "clock": "wall", "threads": None, "isolated": True}
    assert why_foreign(read(GOLDEN).machine, {**here, "python": "3.11.9", "matmul_flops_per_second": None}) is None


def test_candidates(storage):
    nested = storage / "Linux-CPython-3.11-64bit"
    nested.mkdir()
    store(nested, document(9), 9)
    store(storage, document(10), 10000, "past-four-digits")
    (storage / "notes.json").write_text("not numbered: not looked at")
    (storage / "0011_cut.json").write_text('{"machine_info":')
    (storage / "0012_empty.json").write_text("")
    for number, key, value in [
        (13, "partial", "interrupted"),
        (14, "invalid", "anchor_drift 4.1 %"),
        (15, "regressed", IDS[:1]),
    ]:
        made = document(number)
        made["perf"][key] = value
        store(storage, made, number)
    store(storage, json.loads((RUNS / "plain.json").read_text()), 16)
    choice = chosen(storage)
    assert [run.name for run in choice.history] == [f"{n:04d}_nightly" for n in range(1, 10)] + [
        "10000_past-four-digits"
    ]
    assert choice.newest.name == "10000_past-four-digits"
    reasons = {path.name[:4]: reason for path, reason in choice.refused}
    assert reasons.keys() == {"0011", "0012", "0013", "0014", "0015", "0016"}
    assert reasons["0011"].startswith("is not JSON") and reasons["0012"].startswith("is empty")
    assert reasons["0013"] == "partial: interrupted"
    assert reasons["0014"] == "invalid: anchor_drift 4.1 %"
    assert reasons["0015"] == "regressed: tiny-original-b1"
    assert reasons["0016"] == "a plain pytest-benchmark file"


def test_sessions_are_ordered_by_start_time(tmp_path):
    store(tmp_path, document(5), 1)
    store(tmp_path, document(4), 2)
    assert chosen(tmp_path).newest.name == "0001_nightly"


def test_duplicate_session_counts_once(tmp_path):
    for number, day in enumerate((1, 1, 2, 2, 2), 1):
        store(tmp_path, document(day), number)
    choice = chosen(tmp_path)
    assert [run.name for run in choice.history] == ["0002_nightly", "0005_nightly"]
    assert {reason for _, reason in choice.refused} == {
        *("the same session as 0002_nightly.json", "the same session as 0004_nightly.json"),
        "the same session as 0005_nightly.json",
    }


def test_no_storage_and_a_storage_that_is_a_file(tmp_path):
    assert chosen(tmp_path / "absent") == Choice()
    assert chosen(tmp_path / "absent").newest is None
    (tmp_path / "file").write_text("")
    with pytest.raises(BaselineError, match="cannot be listed"):
        chosen(tmp_path / "file")


def test_margin_of_a_storage_comes_from_its_aa_ratios(storage):
    assert chosen(storage).margin == 0.01
    noisy = document(9)
    noisy["perf"]["aa"]["ratios"] = [1.03] * 9
    store(storage, noisy, 9)
    assert chosen(storage).margin == pytest.approx(0.03)


def test_unchanged_session_is_the_same_on_a_slower_machine(storage):
    judgement = judge(current(offset=1.15), chosen(storage), 0.01)
    assert {decision.verdict for decision in judgement.decisions.values()} == {Verdict.SAME}
    assert (tuple(judgement.decisions), judgement.missing, judgement.new) == (IDS, (), ())


def test_injected_slowdown_is_detected_only_there(storage):
    decisions = judge(current({IDS[1]: 1.05, IDS[2]: 0.95}), chosen(storage), 0.01).decisions
    assert [decisions[id].verdict for id in IDS] == [Verdict.SAME, Verdict.SLOWER, Verdict.FASTER]
    assert decisions[IDS[1]].ratio.estimate == pytest.approx(1.05, abs=0.006)
    assert decisions[IDS[1]].against == "8 sessions up to 0008_nightly"  # whose mean the ratio refers to


def test_regressed_run_does_not_become_the_baseline(storage):
    """A regression stays SLOWER when it is measured and saved again."""
    for number in range(9, 12):
        slow = document(number, {IDS[1]: 1.05})
        slow["perf"]["regressed"] = [IDS[1]]
        store(storage, slow, number)
    assert judge(current({IDS[1]: 1.05}), chosen(storage), 0.01).decisions[IDS[1]].verdict is Verdict.SLOWER


def test_few_sessions_warn_only(storage):
    for path in sorted(storage.iterdir())[:3]:
        path.unlink()
    decision = judge(current({IDS[0]: 1.5}), chosen(storage), 0.01).decisions[IDS[0]]
    assert (decision.verdict, decision.reason) == (Verdict.INCONCLUSIVE, "too_few_sessions")
    assert decision.ratio.low < 1.5 < decision.ratio.high or decision.ratio.estimate == pytest.approx(1.5, abs=0.02)
    assert decision.ratio.bounded


def test_sessions_are_counted_per_configuration(storage):
    for path in sorted(storage.iterdir())[:3]:
        made = json.loads(path.read_text())
        del made["benchmarks"][0]
        path.write_text(json.dumps(made))
    decisions = judge(current(dict.fromkeys(IDS, 1.05)), chosen(storage), 0.01).decisions
    assert [decisions[id].reason for id in IDS] == ["too_few_sessions", "beyond_margin", "beyond_margin"]


def test_missing_and_new(storage):
    made = document(20)
    made["benchmarks"][0]["extra_info"]["configuration"]["id"] = "tiny-renamed-b1"
    judgement = judge(parse(made, Path("c.json")), chosen(storage), 0.01)
    assert (judgement.missing, judgement.new) == ((IDS[0],), ("tiny-renamed-b1",))
    assert judgement.decisions["tiny-renamed-b1"].reason == "no_baseline"


def test_nothing_stored():
    judgement = judge(current(), Choice(), 0.01)
    assert {decision.reason for decision in judgement.decisions.values()} == {"no_baseline"}
    assert (judgement.missing, judgement.new) == ((), IDS)


@pytest.mark.parametrize(
    "invalid, reason", [("anchor_drift 4.1 %", "anchor_drift 4.1 %"), ("meteorite", "invalid_session meteorite")]
)
def test_invalid_session_has_no_verdicts(storage, invalid, reason):
    made = document(20, dict.fromkeys(IDS, 2.0))
    made["perf"]["invalid"] = invalid
    decisions = judge(parse(made, Path("c.json")), chosen(storage), 0.01).decisions
    assert {(decision.verdict, decision.reason) for decision in decisions.values()} == {(Verdict.INVALID, reason)}


def test_wrong_image_invalidates_the_timing_of_a_session(storage):
    made = document(20, dict.fromkeys(IDS, 1.05))
    made["benchmarks"][0]["extra_info"]["image"] = {"verdict": "INVALID", "reason": "psnr 12 dB"}
    decisions = judge(parse(made, Path("c.json")), chosen(storage), 0.01).decisions
    assert str(decisions[IDS[0]]) == "INVALID (wrong_image psnr 12 dB)"
    assert decisions[IDS[1]].verdict is Verdict.SLOWER


def test_stored_wrong_image_is_excluded(storage):
    for path in storage.iterdir():
        made = json.loads(path.read_text())
        made["benchmarks"][0]["extra_info"]["image"] = {"verdict": "INVALID", "reason": None}
        path.write_text(json.dumps(made))
    assert judge(current(), chosen(storage), 0.01).decisions[IDS[0]].reason == "no_baseline"


def test_other_work_under_the_same_id(storage):
    made = document(20)
    made["benchmarks"][0]["extra_info"]["configuration"]["scale"] = 1.0  # less work, and not part of the id
    made["benchmarks"][1]["extra_info"]["configuration"]["added_since"] = True
    decisions = judge(parse(made, Path("c.json")), chosen(storage), 0.01).decisions
    assert [decisions[id].reason for id in IDS] == ["other_configuration", "within_margin", "within_margin"]


def test_another_precision_under_the_same_id(storage):
    for path in storage.iterdir():
        made = json.loads(path.read_text())
        made["benchmarks"][0]["extra_info"]["precision"] = "full"
        path.write_text(json.dumps(made))
    made = document(20)
    made["benchmarks"][0]["extra_info"]["precision"] = "bf16"  # in effect: `fast` chooses it by the processor
    decisions = judge(parse(made, Path("c.json")), chosen(storage), 0.01).decisions
    assert [decisions[id].reason for id in IDS] == ["other_precision", "within_margin", "within_margin"]


@pytest.mark.parametrize("change", [put("perf", "anchor", "name", "another-2"), put(*INFO, "anchor", None)])
def test_sessions_without_a_common_reference_workload(storage, change):
    made = document(20, {IDS[0]: 2.0})
    change(made)
    decision = judge(parse(made, Path("c.json")), chosen(storage), 0.01).decisions[IDS[0]]
    assert (decision.verdict, decision.reason) == (Verdict.INCONCLUSIVE, "no_anchor")
    assert decision.ratio.estimate == pytest.approx(2.0, rel=0.1)


def test_one_run_as_the_baseline():
    decisions = judge(current({IDS[0]: 1.2}), read(GOLDEN), 0.01).decisions
    assert decisions[IDS[0]].reason == "too_few_sessions"
    assert decisions[IDS[0]].ratio.low > 1.18
    spoiled = parsed(put("perf", "invalid", "invalid_rounds 25 %"))
    decision = judge(current(), spoiled, 0.01).decisions[IDS[0]]
    assert str(decision) == "INVALID against 0001_changed (invalid_baseline invalid_rounds 25 %)"


def test_other_side_of_a_session_is_not_judged():
    made = document(20)
    made["benchmarks"][0]["extra_info"]["variant"] = "base"
    assert IDS[0] not in judge(parse(made, Path("c.json")), read(GOLDEN), 0.01).decisions


def test_swapping_the_sides_reverses_the_verdict(tmp_path):
    def verdict(before: float, after: float) -> Verdict:
        folder = tmp_path / f"{before}"
        folder.mkdir()
        for number in range(1, 9):
            store(folder, document(number, {IDS[0]: before}, noise=0.002), number)
        return judge(current({IDS[0]: after}), chosen(folder), 0.01).decisions[IDS[0]].verdict

    assert (verdict(1.0, 1.05), verdict(1.05, 1.0)) == (Verdict.SLOWER, Verdict.FASTER)


def test_foreign_machines_get_ratios_only():
    judgement = judge_foreign(current({IDS[0]: 2.0}, offset=1.0), read(GOLDEN))
    assert {decision.reason for decision in judgement.decisions.values()} == {"foreign_machine"}
    assert judgement.decisions[IDS[0]].ratio.estimate == pytest.approx(2.0, abs=0.02)
