"""`python -m perf merge`: runs of many machines in one folder, without loss, overwriting or path traversal."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
from saved_runs import DOCUMENT, GOLDEN, RUNS, STACK, document, store

from perf.__main__ import main
from perf.analysis.verdicts import ExitCode
from perf.runs.baselines import candidates
from perf.runs.saved_run import BaselineError

ROOT = Path(__file__).parents[2]
ENDS = (ExitCode.OK, ExitCode.FAILED, ExitCode.REFUSED)


def merge(output: Path, *runs) -> ExitCode:
    status = main(["merge", *map(str, runs), "--output", str(output)])
    assert status in ENDS
    return status


def of_machine(made: dict, **facts) -> dict:
    made["machine_info"]["stack"].update(facts)
    return made


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def fleet(tmp_path) -> Path:
    """Two H200 of one stack, an A100, and an older torch; each machine numbers its runs from 1."""
    machines = {
        "h200-a": {"name": "NVIDIA H200", "uuid": "GPU-a"},
        "h200-b": {"name": "NVIDIA H200", "uuid": "GPU-b"},
        "a100": {"name": "NVIDIA A100-SXM4-80GB", "uuid": "GPU-c"},
        "old": {"name": "NVIDIA A100-SXM4-80GB", "uuid": "GPU-c", "torch": "2.0.1+cu118", "cuda": "11.8"},
    }
    for place, (machine, facts) in enumerate(machines.items()):
        folder = tmp_path / "fleet" / machine / "storage"
        folder.mkdir(parents=True)
        for number in (1, 2):
            store(folder, of_machine(document(10 * place + number), **facts), number)
    return tmp_path / "fleet"


def test_runs_are_copied_byte_for_byte_by_device_and_stack(fleet, tmp_path, capsys):
    assert merge(tmp_path / "all", fleet) == ExitCode.OK
    assert "merge: 8 added, 0 already present, 0 not taken, 3 machine folders" in capsys.readouterr().out
    assert files(tmp_path / "all") == [
        *(
            f"NVIDIA-A100-SXM4-80GB_570.86_torch2.0.1+cu118/{name}"
            for name in ("0001_nightly.json", "0002_nightly.json")
        ),
        *(f"NVIDIA-A100-SXM4-80GB_570.86_torch2.15.0+cu132/{n}" for n in ("0001_nightly.json", "0002_nightly.json")),
        # The second H200 used the numbers of the first.
        *(f"NVIDIA-H200_570.86_torch2.15.0+cu132/000{number}_nightly.json" for number in (1, 2, 3, 4)),
    ]
    before = sorted(path.read_bytes() for path in fleet.rglob("*.json"))
    assert sorted(path.read_bytes() for path in (tmp_path / "all").rglob("*.json")) == before


def test_repeated_merge_adds_new_runs_only(fleet, tmp_path, capsys):
    merge(tmp_path / "all", fleet)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "all").rglob("*.json")}
    assert merge(tmp_path / "all", fleet, fleet / "a100" / "storage" / "0001_nightly.json") == ExitCode.OK
    assert "merge: 0 added, 8 already present" in capsys.readouterr().out
    store(fleet / "h200-b" / "storage", of_machine(document(40), name="NVIDIA H200", uuid="GPU-b"), 3)
    assert merge(tmp_path / "all", fleet) == ExitCode.OK
    new = set((tmp_path / "all").rglob("*.json")) - set(before)
    assert [path.name for path in new] == ["0005_nightly.json"]
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())


def test_reformatted_run_is_a_duplicate(tmp_path):
    (tmp_path / "0001_a.json").write_text(json.dumps(DOCUMENT, indent=4, sort_keys=True), encoding="utf-8")
    assert merge(tmp_path / "all", GOLDEN, tmp_path / "0001_a.json") == ExitCode.OK
    assert len(files(tmp_path / "all")) == 1


def test_existing_files_are_never_overwritten(tmp_path):
    """A file that is no saved run is kept too."""
    merge(tmp_path / "all", GOLDEN)
    (there,) = (tmp_path / "all").rglob("*.json")
    for content in ("another program's file", json.dumps(document(3))):
        there.write_text(content, encoding="utf-8")
        assert merge(tmp_path / "all", GOLDEN) == ExitCode.OK
        assert there.read_text(encoding="utf-8") == content
    assert len(files(tmp_path / "all")) == 2


def test_baselines_and_reports_read_the_folder(fleet, tmp_path):
    merge(tmp_path / "all", fleet)
    facts = {**STACK, "name": "NVIDIA H200", "uuid": "GPU-b"}
    session = DOCUMENT["perf"]
    choice = candidates(tmp_path / "all", facts, session["clock"], session["threads"], session["isolated"])
    assert len(choice.history) == 2 and len(choice.refused) == 6
    assert all(reason.startswith("foreign: ") for _, reason in choice.refused)
    summary = tmp_path / "summary.md"
    assert main(["report", str(tmp_path / "all"), "--summary", str(summary)]) == 0
    assert "7 older or other sessions stand in the report" in summary.read_text(encoding="utf-8")


DAMAGED = {
    "empty.json": b"",
    "half.json": GOLDEN.read_bytes()[:2000],
    "binary.json": b"\x80\x02}q\x00.",
    "0002_list.json": b"[]",
    "schema.json": json.dumps({**DOCUMENT, "perf": {**DOCUMENT["perf"], "schema": 99}}).encode(),
}


def test_damaged_runs_are_reported_and_left_in_place(tmp_path, capsys):
    runs = tmp_path / "runs"
    runs.mkdir()
    for name, content in DAMAGED.items():
        (runs / name).write_bytes(content)
    store(runs, document(1))
    (runs / "0001_x.trace.json").write_text("{}")  # of --perf-trace
    (runs / "state.json").write_text("{}")
    assert merge(tmp_path / "all", runs, tmp_path / "absent.json") == ExitCode.FAILED
    out, err = capsys.readouterr()
    assert "merge: 1 added, 0 already present, 6 not taken, 1 machine folder, 1 other JSON files skipped" in out
    for name in (*DAMAGED, "absent.json"):
        assert sum(name in line for line in err.splitlines()) == 1, err
    assert all((runs / name).read_bytes() == content for name, content in DAMAGED.items())
    assert len(files(tmp_path / "all")) == 1


@pytest.mark.parametrize("what", ["damaged", "absent", "empty folder", "a file as folder"])
def test_merge_without_a_readable_run_is_refused(tmp_path, what, capsys):
    source = {"damaged": tmp_path / "half.json", "empty folder": tmp_path / "runs"}.get(what, tmp_path / "absent.json")
    (tmp_path / "half.json").write_bytes(DAMAGED["half.json"])
    (tmp_path / "runs").mkdir()
    (tmp_path / "file").write_text("")
    if what == "a file as folder":
        source = GOLDEN
    output = tmp_path / ("file" if what == "a file as folder" else "all")
    assert merge(output, source) == ExitCode.REFUSED
    assert capsys.readouterr().err.strip()
    assert not (tmp_path / "all").exists()


def test_usage(capsys):
    for arguments in (["merge"], ["merge", str(GOLDEN)], ["merge", "--output", "x"]):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == ExitCode.REFUSED


@pytest.mark.parametrize(
    "name", ["../../escaped", "/etc/passwd", "..", "a/b", "x\\y", ".hidden", "~root", "-rf", "a" * 900]
)
def test_file_contents_cannot_escape_the_folder(tmp_path, name):
    made = of_machine(copy.deepcopy(DOCUMENT), name=name, driver=name, torch=name, cuda=None)
    made["perf"]["against"] = made["commit_info"]["id"] = name
    made["benchmarks"][0]["extra_info"]["configuration"].update(id=name, checkpoint=name)
    merge(tmp_path / "in" / "all", store(tmp_path, made))
    (run,) = (tmp_path / "in").rglob("*.json")
    assert run.parent.parent == tmp_path / "in" / "all" and run.name == "0001_nightly.json"
    assert run.parent.name[0] not in ".-~" and len(run.parent.name) < 200
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0001_nightly.json", "in"]


def test_plain_pytest_benchmark_file_is_copied(tmp_path):
    assert merge(tmp_path, RUNS / "plain.json") == ExitCode.OK
    (run,) = tmp_path.rglob("*.json")
    assert run.name == "0001_plain.json" and run.read_bytes() == (RUNS / "plain.json").read_bytes()


def test_full_disk_is_a_one_line_error(tmp_path, monkeypatch, capsys):
    def full(*_):
        raise BaselineError("all: cannot be written: No space left on device")

    monkeypatch.setattr("perf.commands.merge.save_numbered", full)
    assert merge(tmp_path / "all", GOLDEN) == ExitCode.REFUSED
    assert capsys.readouterr().err == "all: cannot be written: No space left on device\n"


def test_without_torch_and_pytest(tmp_path):
    code = (
        "import sys; sys.modules.update(torch=None, pytest=None, numpy=None)\n"
        "from perf.__main__ import main\nsys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "merge", str(GOLDEN), "--output", str(tmp_path / "all")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, len(files(tmp_path / "all"))) == (0, 1), done
