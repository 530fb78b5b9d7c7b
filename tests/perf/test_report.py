"""A report of saved runs: reading, tables, summary and files written, with synthetic runs."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import synthetic_runs
from saved_runs import GOLDEN
from selection import slow_or_nightly
from synthetic_runs import results_of

from perf.__main__ import main
from perf.report import article, summary, tables
from perf.report import reproduce as commands
from perf.report.published import GPUS, published
from perf.report.results import newest, session_of, short_device
from perf.report.text import csv_cell, file_name, interval_seconds, markdown, seconds
from perf.runs.saved_run import BaselineError

ROOT = Path(__file__).parents[2]
REAL = Path(__file__).parents[1] / "runs" / "real_cpu.json"

pytestmark = pytest.mark.report


@pytest.fixture(scope="module")
def everything():
    return results_of(*synthetic_runs.everything())


# --- the published figures


def test_published_cells():
    cells = published()
    assert len(cells) == 75 + 8
    best = next(one for one in cells if (one.gpu, one.batch, one.technique) == ("A100", 1, "mha-mem_efficient-compile"))
    assert (best.seconds, best.improvement_percent, best.seconds_per_image) == (4.1, 38.5, 2.05)
    assert [one.technique for one in cells if one.seconds is None] == ["mha-mem_efficient-compile"] * 3
    assert {one.gpu for one in cells} == set(GPUS)
    assert all(one.seconds_per_image is None for one in cells if one.model == "sd1"), "its iterations are not printed"


def test_printed_improvements_follow_from_printed_runtimes():
    """The articles computed them from unrounded runtimes: most differ a little, one cell by over a point."""
    far = []
    for cell in published():
        same = [one for one in published() if (one.model, one.gpu, one.batch) == (cell.model, cell.gpu, cell.batch)]
        base = next(one for one in same if one.technique == tables.USUAL_REFERENCE[cell.model])
        if cell.seconds is None or base.seconds is None or cell.improvement_percent is None:
            continue
        if abs(100 * (1 - cell.seconds / base.seconds) - cell.improvement_percent) >= 1:
            far.append((cell.technique, cell.gpu, cell.batch))
    assert far == [("mha-math", "A10", 1)]


def test_article_tables_repeat_the_printed_values():
    made = {(one.model, one.batch): one for one in tables.article_tables([])}
    assert list(made) == [("sd2", 1), ("sd2", 2), ("sd2", 4), ("sd1", 2)]
    table = made["sd2", 4]
    at = table.rows.index("original"), [name for name, _ in table.columns].index("A10")
    assert table.cells[at[0]][at[1]] == tables.Cell(47.2, -101.7)
    assert "47.2 (-101.7 %)" in tables.article_markdown(list(made.values()))


def test_own_runs_have_a_column_with_intervals(everything):
    table = tables.article_tables(newest(everything))[0]
    column = [name for name, printed in table.columns if not printed].index("P100, synthetic, torch 2.0.0+cu117")
    cell = table.cells[table.rows.index("original")][len(GPUS) + column]
    assert cell.seconds == pytest.approx(30.4, rel=0.01) and cell.low <= cell.seconds <= cell.high
    assert cell.improvement_percent == pytest.approx(-19.2, abs=1.5)


def test_another_reference_row():
    table = tables.article_tables([], "original")[0]
    cells = dict(zip(table.rows, table.cells))
    assert [cell.improvement_percent for cell in cells["original"]] == [0.0] * 5
    assert cells["mha-mem_efficient-compile"][4].improvement_percent == pytest.approx(100 * (1 - 4.1 / 8.0))
    with pytest.raises(tables.UnknownReference, match="choose from original"):
        tables.article_tables([], "nothing")


def test_article_csv(everything):
    rows = list(csv.DictReader(tables.article_csv(tables.article_tables(newest(everything))).splitlines()))
    printed = [row for row in rows if row["origin"] == "published"]
    assert len(printed) == 80 and not any(row["seconds_low"] for row in printed)
    assert all(row["seconds_low"] for row in rows if row["origin"] == "own")


# --- reading


def test_missing_keys_are_none():
    made = synthetic_runs.published_run("T4")
    del made["commit_info"], made["synthetic"]
    for benchmark in made["benchmarks"]:
        for key in "flops flops_fraction stages kernel telemetry images_to_amortise speedup joules_per_image".split():
            benchmark["extra_info"].pop(key)
    found = results_of(made)
    assert len(found) == 15 and {one.flops for one in found} == {None} and found[0].session.commit is None
    assert {name: one.low for name, one in found[0].stages.items()}.keys() == synthetic_runs.SHARES.keys()
    assert found[0].joules is None
    assert found[0].session.machine == "T4"


def test_processors_of_one_name_have_columns_of_their_own():
    found = []
    for model in (1, 17):
        made = synthetic_runs.published_run("T4")
        made["machine_info"]["stack"].update(device="cpu", name="AMD EPYC", processor=f"family 25, model {model}")
        found += newest(results_of(made))
    assert len(newest(found)) == len(found) == 2 * 15
    columns = [table.columns for table in tables.article_tables(newest(found))]
    own = {name for table in columns for name, published in table if not published}
    assert len(own) == 2 and all(
        any(f"AMD EPYC (family 25, model {model})" in name for name in own) for model in (1, 17)
    )


@pytest.mark.parametrize(
    "key, value",
    [("flops", "many"), ("stages", {"unet": -1}), ("kernel", {"unet": [1]}), ("speedup", {"estimate": "x"})],
)
def test_damaged_values_are_refused_by_name(key, value):
    made = synthetic_runs.published_run("T4")
    made["benchmarks"][0]["extra_info"][key] = value
    with pytest.raises(BaselineError, match=rf"0001_x.json: .*{key}"):
        session_of(made, Path("0001_x.json"))


@pytest.mark.parametrize(
    "name, short",
    [
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("Tesla V100-SXM2-16GB", "V100"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("Tesla T4", "T4"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("Intel(R) Xeon(R) Processor @ 2.60GHz", "Intel Xeon"),
    ],
)
def test_short_names_of_devices(name, short):
    assert short_device(name) == short


def test_newest_session_of_each_machine_and_torch():
    found = newest(results_of(*synthetic_runs.nightly_runs(12)))
    assert sorted({(one.session.name, one.torch) for one in found}) == [
        ("0005_0001_x", "2.14.0+cu130"),
        ("0011_0001_x", "2.15.0+cu132"),
    ]
    assert len(found) == 10


@pytest.mark.parametrize("damage", ["many", {"unet": 1.0}, {"unet": [1.0]}, {"unet": [1.0, "x"]}])
def test_damaged_stages_of_a_launch_are_refused_by_name(damage):
    made = synthetic_runs.published_run("T4")
    made["benchmarks"][0]["extra_info"]["launches"][3]["stage_seconds"] = damage
    with pytest.raises(BaselineError, match=r"launches\[3\].stage_seconds"):
        session_of(made, Path("0001_x.json"))


# --- texts


def test_foreign_texts_are_escaped_in_markdown_csv_and_file_names():
    hostile = "<b>x</b> [y](http://z) | `c` @team #1 ![i](j)"
    made = markdown(hostile)
    assert "<" not in made and "\\[" in made and "@team" not in made and "http://" not in made
    assert csv_cell("=1+1") == "'=1+1" and csv_cell(-1.0) == -1.0
    assert file_name("../../a b/c") == "a-b-c" and file_name("...") == "unnamed"


def test_times_have_one_unit():
    assert interval_seconds(0.4123, 0.4091, 0.4155) == "412 [409, 416] ms"
    assert interval_seconds(2.125, 2.113, 2.136) == "2.12 [2.11, 2.14] s"
    assert (interval_seconds(0.4123), seconds(0.00041234), seconds(None)) == ("412 ms", "412.3 us", "-")


def test_command_repeats_the_configuration(everything):
    one = next(one for one in everything if one.id == "sd2-mha-mem_efficient-compile-b4")
    line = commands.command(one)
    assert line.startswith(
        f"git checkout {'0' * 40} && pytest perf --model sd2 --attention mha --sdpa-kernels mem_efficient"
    )
    assert "--compile default" in line and "--batch 4" in line and line.endswith("--perf-rounds 2 --perf-clock wall")


def test_command_of_a_preset_and_of_another_engine():
    made = synthetic_runs.published_run("A100")
    for one, changes in zip(made["benchmarks"], ({"optimise": "fast,int8"}, {"engine": "diffusers"})):
        one["extra_info"]["configuration"].update(changes)
    preset, peer = map(commands.command, results_of(made)[:2])
    assert " --optimise fast,int8 " in preset
    assert " --model sd2 --engine diffusers --attention " in peer and " -m " not in peer


def test_command_quotes_foreign_values():
    made = synthetic_runs.published_run("T4")
    made["commit_info"]["id"] = "$(touch x); `y`"
    line = commands.command(results_of(made)[0])
    assert line.startswith("git checkout '$(touch x); `y`' && ")


# --- summary


def test_summary_has_the_verdict_first_and_the_table_folded():
    documents = synthetic_runs.nightly_runs(12)
    ones = results_of(*documents)
    sessions = list({id(one.session): one.session for one in ones}.values())
    lines = summary.markdown_summary(sessions, ones).splitlines()
    assert lines[0] == "## perf: 1 SLOWER of 5"
    text = "\n".join(lines)
    assert (
        text.index("**SLOWER**") < text.index("Fastest here") < text.index("<details>") < text.index("sd2-mha-math-b1")
    )
    assert "**Synthetic**" in text and text.index("**Synthetic**") < text.index("<details>")


def test_summary_of_an_invalid_session():
    made = synthetic_runs.published_run("T4")
    made["perf"]["invalid"] = "anchor_drift 4.1 %"
    ones = results_of(made)
    assert summary.headline(ones[0].session, ones) == "INVALID session: anchor_drift 4.1 %"


def test_changed_counts_stand_in_summary_and_csv():
    made = synthetic_runs.published_run("T4")
    counts = {"against": "abc1234", "changes": ["graph breaks 0 -> 1"], "not_compared": None}
    made["benchmarks"][0]["extra_info"]["counts_comparison"] = counts
    results = results_of(made)
    text = summary.markdown_summary([results[0].session], results)
    assert f"- {results[0].id}: COUNTS graph breaks 0 -&gt; 1 against abc1234".replace("_", "\\_") in text
    cells = {
        row["configuration"]: row["counts_changes"] for row in csv.DictReader(tables.results_csv(results).splitlines())
    }
    assert cells.pop(results[0].id) == "graph breaks 0 -> 1" and set(cells.values()) == {""}


# --- the command


@pytest.mark.slow
def test_report_needs_neither_torch_nor_pytest(tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("jinja2")
    synthetic_runs.write(tmp_path / "runs", [synthetic_runs.published_run("T4")], "t4")
    blocked = "import sys; sys.modules.update(dict.fromkeys(['torch', 'pytest', 'pytest_benchmark', '_pytest']))\n"
    code = blocked + "from perf.__main__ import main; raise SystemExit(main(sys.argv[1:]))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, "report", str(tmp_path / "runs"), "--output", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"index.html", "summary.md", "article.md", "article.csv", "results.csv", "plots"}
    plots = {path.name for path in (tmp_path / "out" / "plots").iterdir()}
    stem = "original_vs_optimized_T4_n_samples_4_n_iter_2_sd2_synthetic"
    assert {f"{stem}.png", f"{stem}.svg", "gpus_sd2_batch_4.png"} <= plots
    assert (tmp_path / "out" / "index.html").stat().st_size < 6_000_000


@pytest.mark.parametrize("which", slow_or_nightly(["synthetic", "golden", "real"], lambda which: which != "synthetic"))
def test_every_golden_run_renders(which, tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("jinja2")
    folder = tmp_path / "runs"
    if which == "synthetic":
        synthetic_runs.write(folder, [*synthetic_runs.everything()[4:], *synthetic_runs.nightly_runs(7)], "synthetic")
    sources = {"synthetic": folder, "golden": GOLDEN, "real": REAL}
    assert main(["report", str(sources[which]), "--output", str(tmp_path / "out")]) == 0
    plots = list((tmp_path / "out" / "plots").iterdir())
    assert len(plots) >= 4 and all(path.stat().st_size > 1000 for path in plots)
    for path in plots:
        if path.suffix == ".png":
            assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size < 300_000


def test_summary_alone_needs_no_plots(tmp_path, capsys):
    assert main(["report", str(GOLDEN), "--summary", str(tmp_path / "s.md")]) == 0
    assert (tmp_path / "s.md").read_text(encoding="utf-8").startswith("## perf: 1 INCONCLUSIVE of 3")


def test_plain_pytest_benchmark_file_gives_an_empty_report(tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("jinja2")
    assert main(["report", str(GOLDEN.parent / "plain.json"), "--output", str(tmp_path / "out")]) == 0
    assert "0 configurations measured" in (tmp_path / "out" / "summary.md").read_text(encoding="utf-8")
    assert not list((tmp_path / "out" / "plots").iterdir())


@pytest.mark.nightly
def test_hostile_names_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("jinja2")
    from test_report_page import hostile_runs

    synthetic_runs.write(tmp_path / "runs", hostile_runs()[:1], "hostile")
    assert main(["report", str(tmp_path / "runs"), "--output", str(tmp_path / "out")]) == 0
    files = [path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(files) > 20 and all(re.fullmatch(r"(plots/)?[A-Za-z0-9._-]+", path.as_posix()) for path in files)
    for path in (tmp_path / "out" / "plots").glob("*.svg"):
        kinds = {element.tag.rpartition("}")[2] for element in ElementTree.parse(path).iter()}
        assert not kinds & {"script", "a", "image", "foreignObject"}, path


def test_damaged_runs_are_listed_and_the_others_reported(tmp_path, capsys):
    bad = tmp_path / "bad.json"
    bad.write_text("{")
    assert main(["report", str(GOLDEN), str(bad), "--summary", str(tmp_path / "s.md")]) == 1
    assert "bad.json: is not JSON" in capsys.readouterr().err
    assert "not read:" in (tmp_path / "s.md").read_text(encoding="utf-8")
    assert main(["report", str(bad), "--summary", str(tmp_path / "s.md")]) == 4


def test_usage_errors(tmp_path, capsys):
    assert main(["report", str(GOLDEN)]) == 4
    assert main(["report", str(GOLDEN), "--summary", str(tmp_path / "s"), "--reference", "nothing"]) == 4
    assert "choose from" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["report", str(GOLDEN), "--output", str(tmp_path / "o"), "--repository", "javascript:alert(1)"])
    assert "is no web address, such as https://github.com/OWNER/NAME" in capsys.readouterr().err


def test_commits_link_to_the_repository_of_a_workflow():
    pytest.importorskip("jinja2")
    pytest.importorskip("matplotlib")
    from perf.report import build, page

    github = {"GITHUB_SERVER_URL": "https://github.com", "GITHUB_REPOSITORY": "owner/name"}
    site = build.workflow_repository(github)
    assert site == "https://github.com/owner/name" and build.workflow_repository({}) is None
    assert page.commit_url(site, "0123abc") == f"{site}/commit/0123abc"
    assert page.commit_url(site, "0123abc..4567def") == f"{site}/compare/0123abc...4567def"
    assert page.commit_url(site, "unknown..4567def") == page.commit_url(None, "0123abc") == ""
    assert page.commit_url(site, "'><script>") == ""


def test_synthetic_runs_are_labelled_everywhere(everything):
    assert all("synthetic" in chart.title for chart in article.launch_charts(everything))
    assert all("synthetic" in one.session.machine for one in everything)
    assert "synthetic" in tables.article_markdown(tables.article_tables(newest(everything)))
