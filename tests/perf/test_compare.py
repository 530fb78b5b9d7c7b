"""`perf compare` and `perf show`: output and exit status, on a machine without torch."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
from saved_runs import GOLDEN, IDS, RUNS, document, store

from perf.commands import compare, show
from perf.report.text import seconds

ROOT = Path(__file__).parents[2]


def invoke(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    compare.add_arguments(parser)
    return compare.run(parser.parse_args([str(argument) for argument in arguments]))


def invoke_show(*paths: object) -> int:
    parser = argparse.ArgumentParser()
    show.add_arguments(parser)
    return show.run(parser.parse_args([str(path) for path in paths]))


@pytest.fixture
def storage(tmp_path) -> Path:
    for number in range(1, 9):
        store(tmp_path, document(number, offset=1 + 0.01 * number, noise=0.002), number)
    return tmp_path


@pytest.fixture
def write(tmp_path):
    """Save a document outside any storage."""

    def write(made: dict, name: str = "new.json") -> Path:
        path = tmp_path / name
        path.write_text(json.dumps(made))
        return path

    return write


def test_two_runs_have_ratios_and_no_verdict(write, capsys):
    new = write(document(9, {IDS[1]: 1.05}, offset=1.2))
    assert invoke(GOLDEN, new) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["configuration", "A:", "0001_synthetic", "B:", "new", "verdict"]
    line = next(line for line in lines if IDS[1] in line)
    assert "300.8 ms" in line and "379 ms" in line  # raw seconds; the ratio is relative to the reference workload
    assert "INCONCLUSIVE +5.0 % [4." in line and "against 0001_synthetic (too_few_sessions)" in line
    assert "not between sessions; --storage FOLDER" in lines[-1]
    assert invoke(GOLDEN, new, "--strict") == 21


def test_slowdown_against_a_storage(storage, write, capsys):
    new = write(document(9, {IDS[1]: 1.05}, noise=0.002))
    assert invoke(storage / "0008_nightly.json", new, "--storage", storage) == 20
    out = capsys.readouterr().out
    assert f"{IDS[1]} " in out and "SLOWER +5." in out and out.count("SAME") == 2
    assert "Margin 1.0 %. Prediction intervals over 8 stored sessions" in out
    assert invoke(storage / "0008_nightly.json", new, "--storage", storage, "--margin", "6%") == 0


def test_unchanged_against_a_storage(storage, write, capsys):
    assert invoke(storage / "0008_nightly.json", write(document(9, noise=0.002)), "--storage", storage, "--strict") == 0
    assert capsys.readouterr().out.count("SAME") == 3


def test_storage_that_holds_both_runs_and_later_ones(storage, capsys):
    """The history excludes B and later sessions, and includes A even if it is stored elsewhere."""
    assert invoke(GOLDEN, storage / "0006_nightly.json", "--storage", storage) == 0
    assert "over 6 stored sessions" in capsys.readouterr().out
    assert invoke(storage / "0001_nightly.json", storage / "0006_nightly.json", "--storage", storage) == 0
    assert "5 stored sessions, 6 are needed" in capsys.readouterr().out


def test_refused_files_of_a_storage_are_listed(storage, write, capsys):
    (storage / "0009_cut.json").write_text("{")
    invoke(GOLDEN, write(document(20)), "--storage", storage)
    assert "0009_cut.json: is not JSON" in capsys.readouterr().out


def test_missing_fails_and_new_is_listed(write, capsys):
    made = document(9)
    made["benchmarks"][0]["extra_info"]["configuration"]["id"] = "tiny-renamed-b1"
    assert invoke(GOLDEN, write(made)) == 1
    out = capsys.readouterr().out
    assert f"missing in B: {IDS[0]}" in out and "new in B: tiny-renamed-b1" in out


def test_invalid_and_partial_sessions_are_marked(write, capsys):
    made = document(9)
    made["perf"].update(invalid="anchor_drift 4.1 %", partial="deselected 3 of 9")
    assert invoke(GOLDEN, write(made)) == 1
    out = capsys.readouterr().out
    assert out.count("INVALID (anchor_drift 4.1 %)") == 3 and "new is partial: deselected 3 of 9" in out


def test_other_machine_is_refused_without_foreign(write, capsys):
    made = document(9, dict.fromkeys(IDS, 3.0))
    made["machine_info"]["stack"]["uuid"] = "GPU-1"
    new = write(made)
    assert invoke(GOLDEN, new) == 4
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert "uuid GPU-00000000-0000-0000-0000-000000000000, here GPU-1; --foreign" in captured.err
    assert invoke(GOLDEN, new, "--foreign") == 0
    out = capsys.readouterr().out
    assert out.count("(foreign_machine)") == 3 and "Different machines" in out and "SLOWER" not in out


def test_plain_files(capsys):
    assert invoke(RUNS / "plain.json", RUNS / "plain.json") == 0
    assert "INCONCLUSIVE +0.0 % against plain (no_anchor)" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments", [("absent.json", GOLDEN), (GOLDEN, "absent.json"), (GOLDEN, GOLDEN, "--storage", GOLDEN)]
)
def test_unreadable_runs_are_one_line_errors(arguments, capsys):
    assert invoke(*arguments) == 4
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("text", ["0", "-1", "100", "nan", "much"])
def test_impossible_margin_is_a_usage_error(text, capsys):
    with pytest.raises(SystemExit) as caught:
        invoke(GOLDEN, GOLDEN, f"--margin={text}")
    assert caught.value.code == 2 and "--margin" in capsys.readouterr().err


def test_show(capsys):
    assert invoke_show(GOLDEN) == 0
    out = capsys.readouterr().out
    assert "0001_synthetic: name Synthetic GPU, driver 570.86, torch 2.15.0+cu132" in out
    assert "started 2026-01-01 00:00 UTC, 35 of 36 rounds valid" in out
    assert "A/A: 3 comparisons, margin 1.0 %" in out
    row = next(line for line in out.splitlines() if line.startswith("tiny-sdpa-b1"))
    assert row.split() == "tiny-sdpa-b1 6 300.8 ms [299.8 ms, 301.5 ms] 300.8 ms 360 ms 1.12 GiB 150.4 -".split()


def test_show_continues_after_unreadable_files(write, capsys):
    made = document(9)
    made["perf"]["regressed"] = [IDS[0]]
    made["benchmarks"][0]["extra_info"]["image"] = {"verdict": "INVALID", "reason": "constant colour"}
    made["benchmarks"][1]["extra_info"]["variant"] = "base"
    assert invoke_show("absent.json", write(made), RUNS / "plain.json") == 4
    captured = capsys.readouterr()
    assert "absent.json" in captured.err
    assert f"regressed: {IDS[0]}" in captured.out and "wrong image: constant colour" in captured.out
    assert f"{IDS[1]} (base)" in captured.out and "13.3 us" in captured.out


def test_show_of_another_file_does_not_advise_to_delete_it(capsys):
    """A user who names the wrong file must not lose it."""
    assert invoke_show(ROOT / "README.md", ROOT / "pyproject.toml", RUNS / ".." / "held" / "absent.json") == 4
    err = capsys.readouterr().err
    assert err.count("\n") == 3 and "delete" not in err
    assert "README.md: is not JSON" in err and "name a saved run" in err


def test_table_of_rich_on_a_terminal(monkeypatch, capsys):
    pytest.importorskip("rich")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    show.print_table(["name"], [["[red]id[/red]"]])
    assert "[red]id[/red]" in capsys.readouterr().out  # text, not markup


@pytest.mark.parametrize(
    "value, text", [(None, "-"), (24.0, "24 s"), (0.3001, "300.1 ms"), (1e-5, "10 us"), (2e-9, "2 ns")]
)
def test_seconds(value, text):
    assert seconds(value) == text


def test_no_torch_pytest_numpy_or_rich_is_needed(storage, write):
    new = write(document(9, {IDS[1]: 1.05}, noise=0.002))
    script = (
        "import argparse, sys\n"
        "for absent in ('torch', 'pytest', 'numpy', 'rich', 'scipy', 'pynvml'): sys.modules[absent] = None\n"
        "from perf.commands import compare\n"
        "parser = argparse.ArgumentParser(); compare.add_arguments(parser)\n"
        "sys.exit(compare.run(parser.parse_args(sys.argv[1:])))"
    )
    arguments = [storage / "0008_nightly.json", new, "--storage", storage]
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 20, done.stderr
    assert "SLOWER" in done.stdout
