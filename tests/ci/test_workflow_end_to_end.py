"""End-to-end test on the embedded model: measure, store, compare with an injected slowdown, publish, comment."""

from __future__ import annotations

import json
import random
import shutil

import pytest
from inner_session import another_day
from workflow_runs import MAIN, Runner

from perf.analysis.verdicts import ExitCode

WHAT = "--attention original --compile none --steps 1 --perf-launches 1 --perf-rounds 2"


@pytest.mark.nightly
@pytest.mark.report
def test_from_the_event_to_the_comment(tmp_path):
    for package in ("jinja2", "matplotlib"):
        pytest.importorskip(package, reason="the extra `report` is not installed")
    here = {"BASELINES": str(tmp_path / "baselines"), "DEVICE": "cpu", "CUDA_VISIBLE_DEVICES": "", "SHA": MAIN}
    runner = Runner(tmp_path, here)
    assert runner.on_event("push", "push").returncode == 0
    assert runner.outputs["promote"] == "true"

    # Measure the default set of a machine without a GPU.
    done = runner.run("measure.py", SETS="smoke", MORE=WHAT)
    assert done.returncode == ExitCode.OK, done.stdout + done.stderr
    assert "h200 smoke: not slower" in done.stdout
    files = {path.name for path in runner.out.iterdir()}
    assert files == {"doctor.json", "environment.txt", "smoke"}
    assert runner.run("summary.py").returncode == 0
    assert runner.summary.startswith("# perf: not slower\n")

    # The hosted job stores the session.
    shutil.copytree(runner.out.parent, tmp_path / "artifacts")  # as it is uploaded and merged
    done = runner.run("promote.py")
    assert "h200 smoke: promoted as 0001_" in done.stdout, done.stdout + done.stderr
    (first,) = (tmp_path / "baselines" / "h200" / "smoke").rglob("*.json")
    assert json.loads(first.read_text())["commit_info"]["id"]

    # Seven synthetic sessions follow, and then one with an injected slowdown, which must be SLOWER.
    draw, document = random.Random(7), json.loads(first.read_text())
    for number in range(2, 9):
        made = another_day(document, number, draw.lognormvariate(0, 0.01), draw)
        (first.parent / f"{number:04d}_{number:012x}_cpu.json").write_text(json.dumps(made))
    shutil.rmtree(runner.out)
    done = runner.run("measure.py", SETS="smoke", MORE=f"{WHAT} --perf-inject-slowdown 1")
    assert done.returncode == ExitCode.SLOWER, done.stdout + done.stderr
    assert "h200 smoke: slower" in done.stdout

    # The slower session is not promoted, and the comment has its verdict.
    shutil.rmtree(tmp_path / "artifacts")
    shutil.copytree(runner.out.parent, tmp_path / "artifacts")  # as it is uploaded and merged
    assert "not promoted: partial: slowed down on purpose" in runner.run("promote.py").stdout
    done = runner.run("publish.py", EXPECTED='["h200"]')
    assert done.returncode == 0, done.stdout + done.stderr
    assert runner.outputs["exit_code"] == "20"
    comment = tmp_path / "publish" / "comment.md"
    text = comment.read_text(encoding="utf-8")
    assert text.startswith("# perf: SLOWER\n")
    assert "| h200 | smoke | **slower** |" in text
    assert "tiny-original-plms1-b1 | **SLOWER**" in text
    assert (tmp_path / "publish" / "report" / "index.html").exists()
    assert runner.run("post.py", PULL_REQUEST="12", COMMENT=str(comment)).returncode == 0
    assert runner.log[-1].startswith("gh api --method POST repos/octo-org/sd-perf/issues/12/comments")
