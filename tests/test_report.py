"""A report of saved runs: what it reads, computes and writes. Synthetic runs, for no GPU is needed to draw."""

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

from perf.__main__ import main
from perf.report import article, bars, breakdown, commands, growth, history, roofline, summary, tables
from perf.report.palette import FIXED, MORE, Palette
from perf.report.published import GPUS, published
from perf.report.results import newest, session_of, short_device
from perf.report.text import csv_cell, file_name, markdown, span
from perf.saved_run import BaselineError

ROOT = Path(__file__).parent.parent
REAL = Path(__file__).parent / "runs" / "real_cpu.json"

pytestmark = pytest.mark.report


def results_of(*documents, name="0001_x"):
    found = []
    for number, made in enumerate(documents):
        found += session_of(made, Path(f"{number:04d}_{name}.json"))[1]
    return found


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
    """The articles computed them from unrounded runtimes, so that most differ a little; one cell by over a point."""
    far = []
    for cell in published():
        same = [one for one in published() if (one.model, one.gpu, one.batch) == (cell.model, cell.gpu, cell.batch)]
        base = next(one for one in same if one.technique == tables.USUAL_REFERENCE[cell.model])
        if cell.seconds is None or base.seconds is None or cell.improvement_percent is None:
            continue
        if abs(100 * (1 - cell.seconds / base.seconds) - cell.improvement_percent) >= 1:
            far.append((cell.technique, cell.gpu, cell.batch))
    assert far == [("mha-math", "A10", 1)]


def test_article_tables_are_the_printed_ones():
    made = {(one.model, one.batch): one for one in tables.article_tables([])}
    assert list(made) == [("sd2", 1), ("sd2", 2), ("sd2", 4), ("sd1", 2)]
    table = made["sd2", 4]
    at = table.rows.index("original"), [name for name, _ in table.columns].index("A10")
    assert table.cells[at[0]][at[1]] == tables.Cell(47.2, -101.7)
    assert "47.2 (-101.7 %)" in tables.article_markdown(list(made.values()))


def test_own_runs_stand_beside_the_published_with_their_interval(everything):
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


def test_keys_that_a_run_lacks_are_none():
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


# --- charts


def test_launch_charts_are_named_as_in_the_article(everything):
    made = synthetic_runs.published_run("A100")
    del made["synthetic"]
    charts = article.launch_charts(results_of(made))
    assert [chart.name for chart in charts] == [
        f"original_vs_optimized_A100_n_samples_{n}_n_iter_2_sd2" for n in (1, 2, 4)
    ]
    assert [len(series.points) for series in charts[0].series] == [10] * 5
    for series in charts[0].series:
        low, high = series.band
        assert low < high and all(point.low <= point.y <= point.high for point in series.points)


def test_bars_start_at_zero_and_have_intervals(everything):
    charts = article.gpu_charts(newest(everything))
    assert [chart.name for chart in charts] == ["gpus_sd2_batch_1", "gpus_sd2_batch_2", "gpus_sd2_batch_4"]
    for chart in charts:
        assert chart.zero and chart.places.index("A100 (published)") > chart.places.index("P100 (published)")
        for series in chart.series:
            for point in series.points:
                assert (point.low is None) == series.faint and point.base == 0


def test_ladder_goes_down_its_own_order():
    (chart,) = breakdown.ladder_charts(results_of(synthetic_runs.ladder_run()))
    names = [series.name for series in chart.series]
    assert names == breakdown.LADDER and names[0] == "preset-original"
    tops = [series.points[0].y for series in chart.series]
    assert [series.points[0].base for series in chart.series] == [0.0, *tops[:-1]]


def test_stages_add_up_to_the_image(everything):
    (chart,) = breakdown.stage_charts(results_of(synthetic_runs.ladder_run()))
    ones = {one.id: one for one in results_of(synthetic_runs.ladder_run())}
    for place in {point.x for series in chart.series for point in series.points}:
        whole = sum(point.y for series in chart.series for point in series.points if point.x == place)
        assert whole == pytest.approx(ones[f"sd2-{place}"].seconds_per_image)


def test_each_stage_has_the_interval_that_the_whole_has():
    (chart,) = breakdown.stage_charts(results_of(synthetic_runs.ladder_run()))
    ones = {f"sd2-{short}": one for one in results_of(synthetic_runs.ladder_run()) for short in [one.id[4:]]}
    for series in chart.series:
        share = synthetic_runs.SHARES[series.name]
        for point in series.points:
            low, high = ones[f"sd2-{point.x}"].interval
            assert [point.low, point.high] == pytest.approx([share * low, share * high])
            assert "95 % interval" in point.note


def test_few_launches_have_the_range_of_their_valid_rounds():
    made = synthetic_runs.published_run("A100")
    benchmark = made["benchmarks"][0]
    benchmark["extra_info"]["launches"] = benchmark["extra_info"]["launches"][:2]
    benchmark["extra_info"]["anchor"] = None
    first, second = benchmark["extra_info"]["launches"]
    first["stage_seconds"]["unet"], second["stage_seconds"]["unet"] = [1.0, 9.0], [3.0, 5.0]
    first["invalid"] = {"1": "throttled"}
    benchmark["stats"]["data"] = [first["round_seconds"][0], *second["round_seconds"]]
    unet = results_of(made)[0].stages["unet"]
    assert (unet.value, unet.low, unet.high) == (2.5, 1.0, 5.0) and unet.name == "range of the rounds of 2 launches"


@pytest.mark.parametrize("clock, stages", [("wall", "text unet vae other"), ("cpu", "text unet vae")])
def test_stages_of_older_runs_have_no_interval_and_say_so(clock, stages):
    """Under a clock of CPU time what the stages leave of it is no time at all: they have wall time."""
    made = synthetic_runs.published_run("A100")
    made["perf"]["clock"] = clock
    for benchmark in made["benchmarks"]:
        for launch in benchmark["extra_info"]["launches"]:
            del launch["stage_seconds"]
    (chart,) = breakdown.stage_charts(results_of(made))
    assert [series.name for series in chart.series] == stages.split()
    for series in chart.series:
        assert all(point.low is None and "no interval" in point.note for point in series.points)


def test_tables_have_the_intervals_of_stages_energy_and_fraction():
    ones = results_of(synthetic_runs.published_run("A100"))
    row = next(csv.DictReader(tables.results_csv(ones).splitlines()))
    for name in ("joules", *(f"{stage}_seconds_per_image" for stage in synthetic_runs.SHARES)):
        value = row.get(name) or row[f"{name}_per_image"]
        assert float(row[f"{name}_low"]) < float(value) < float(row[f"{name}_high"])
    cells = dict(zip(tables.COLUMNS, tables.result_rows(ones)[0]))
    assert re.fullmatch(r"[\d.]+ \[[\d.]+, [\d.]+\]", cells["J/image"])
    assert re.fullmatch(r"[\d.]+ \[[\d.]+, [\d.]+\] %", cells["of peak FLOP/s"])
    assert all(re.fullmatch(r"[\d.]+ \[[\d.]+, [\d.]+\] m?s", cell) for cell in tables.stage_rows(ones)[0][1])


def test_long_labels_lie_and_are_wrapped():
    assert not bars.lies(["original", "sdpa"]) and bars.lies(["mha-mem_efficient-compile"] * 3) and bars.lies("abcdefg")
    label = (
        "sdpa-flash-compile-max-autotune-no-cudagraphs-plms20-512x768-b16-channels_last-fused_qkv-cache_context_kv-x"
    )
    lines = bars.wrapped(label).split("\n")
    assert len(lines) == 3 and all(len(line) <= 30 for line in lines) and lines[-1].endswith("…")


def test_growth_is_found():
    charts = {
        chart.name.split("_A100")[0]: chart for chart in growth.growth_charts(results_of(synthetic_runs.growth_run()))
    }
    assert set(charts) == {"cost_steps", "cost_batch", "memory_batch", "cost_size", "memory_size"}
    assert "0.04" in charts["cost_steps"].series[1].name and "s a step" in charts["cost_steps"].series[1].name
    assert "as pixels to the 1.2" in charts["cost_size"].series[1].name


def test_fit():
    found = growth.fit([1, 2, 3, 4], [3.0, 5.0, 7.0, 9.0])
    assert (found.fixed, found.slope) == pytest.approx((1, 2)) and found.low == pytest.approx(found.high)
    noisy = growth.fit([1, 2, 3, 4], [3.1, 4.8, 7.2, 8.9])
    assert noisy.low < 2 < noisy.high
    assert growth.fit([1, 2, 2], [1, 2, 3]) is None
    power = growth.fit([1, 4, 9], [2.0, 16.0, 54.0], power=True)
    assert power.slope == pytest.approx(1.5) and power.at(4) == pytest.approx(16)


def test_roofline():
    ones = results_of(synthetic_runs.published_run("A100"))
    (chart,) = roofline.roofline_charts(ones)
    assert (chart.scale, chart.y_log) == ("log", True)
    points = next(series for series in chart.series if series.name == "original").points
    assert points[0].y == pytest.approx(84.6 / 4.0, rel=0.01)
    assert all(point.low < point.y < point.high for point in points)
    assert [point.x for point in points] == pytest.approx([84.6e12 * batch / 88e9 for batch in (1, 2, 4)])
    roof = chart.series[-1]
    assert roof.name == "measured float16, 100 TFLOP/s; copy, 1500 GB/s"
    left, ridge, right = roof.points
    assert (ridge.x, ridge.y) == pytest.approx((100e12 / 1.5e12, 100.0)) and right.y == ridge.y
    assert left.y / left.x == pytest.approx(1.5), "TFLOP/s for each FLOP a byte: what 1.5 TB/s allow"


def test_roofline_of_older_runs():
    made = synthetic_runs.published_run("A100")
    del made["machine_info"]["stack"]["copy_bytes_per_second"]
    (chart,) = roofline.roofline_charts(results_of(made))
    assert [point.y for point in chart.series[-1].points] == [100.0, 100.0], "the roof of matrix products alone"
    for benchmark in made["benchmarks"]:
        del benchmark["extra_info"]["floor_bytes"]
    assert roofline.roofline_charts(results_of(made)) == []


def test_energy_is_over_launches():
    ones = results_of(synthetic_runs.published_run("A100"))
    (energy,) = breakdown.energy_charts(ones)
    assert energy.zero
    for series in energy.series:
        (point,) = series.points
        assert point.low < point.y < point.high and "95 % interval" in point.note
    made = synthetic_runs.published_run("A100")
    for benchmark in made["benchmarks"]:
        benchmark["extra_info"]["telemetry"] = None
    (energy,) = breakdown.energy_charts(results_of(made))
    assert {series.points[0].low for series in energy.series} == {None}
    assert "no interval" in energy.series[0].points[0].note


def test_compiling_crosses_where_it_pays():
    charts = breakdown.compile_charts(results_of(synthetic_runs.published_run("A100")))
    assert len(charts) == 3 and "pays after 200 images [100, 400]" in charts[0].title
    eager, compiled = charts[0].series
    assert compiled.points[0].y > eager.points[0].y == 0 and compiled.points[-1].y < eager.points[-1].y


def test_history_marks_verdicts_and_changes():
    (chart,) = history.history_charts(results_of(*synthetic_runs.nightly_runs(12)))
    original = next(series for series in chart.series if series.name == "original")
    verdicts = [point.verdict for point in original.points]
    assert verdicts == ["INCONCLUSIVE"] * 6 + ["SAME"] * 2 + ["SLOWER"] * 4
    words = [words for _, words in chart.marks]
    assert [one.split()[0] for one in words] == ["commit", "torch", "commit"] and "torch 2.15.0+cu132" in words


def test_comparisons_have_ratio_interval_margin_and_verdict():
    runs = synthetic_runs.nightly_runs(12)
    verdict = next(one["extra_info"]["verdict"] for one in runs[-1]["benchmarks"] if one["extra_info"]["verdict"])
    (chart,) = history.comparison_charts(results_of(runs[-1]))
    (series,) = chart.series
    point = series.points[0]
    ratio = verdict["ratio"]
    expected = [100 * (ratio[key] - 1) for key in ("estimate", "low", "high")]
    assert [point.y, point.low, point.high] == pytest.approx(expected)
    assert (point.verdict, series.form) == ("SLOWER", "bar")
    assert chart.levels == (("margin +1.0 %", 1.0), ("margin -1.0 %", -1.0))
    assert "SLOWER" in point.note
    assert history.comparison_charts(results_of(runs[0])) == []  # no verdict with bounds yet


def test_wrong_pictures_have_no_time():
    made = synthetic_runs.published_run("A100")
    wrong = made["benchmarks"][4]["extra_info"]
    wrong["image"] = {**wrong["image"], "verdict": "INVALID", "reason": "wrong_image latents: far away"}
    ones = results_of(made)
    assert all(series.name != "mha-mem_efficient-compile" for series in article.launch_charts(ones)[0].series)
    assert tables.result_rows(ones)[-1][0] == wrong["configuration"]["id"]
    assert summary.fastest(ones[:5]).startswith("fastest here: sd2-mha-mem_efficient-b1")


def test_looks_are_the_same_everywhere_and_no_two_alike():
    names = [f"sdpa-{number}" for number in range(len(MORE) * 3)]
    palette = Palette([*names, *FIXED])
    looks = [(palette[name].colour, palette[name].dash) for name in [*names, *FIXED]]
    assert len(set(looks)) == len(looks)
    assert Palette(["sdpa-7"])["sdpa-7"] == Palette(["sdpa-7", "other"])["sdpa-7"]
    assert Palette([])["original"].colour == FIXED["original"]


# --- texts


def test_texts_of_others_are_no_markdown_or_formula():
    hostile = "<b>x</b> [y](http://z) | `c` @team #1 ![i](j)"
    made = markdown(hostile)
    assert "<" not in made and "\\[" in made and "@team" not in made and "http://" not in made
    assert csv_cell("=1+1") == "'=1+1" and csv_cell(-1.0) == -1.0
    assert file_name("../../a b/c") == "a-b-c" and file_name("...") == "unnamed"


def test_span():
    assert span(0.4123, 0.4091, 0.4155) == "412 [409, 416] ms"
    assert span(2.125, 2.113, 2.136) == "2.12 [2.11, 2.14] s"


def test_command_measures_the_same_configuration(everything):
    one = next(one for one in everything if one.id == "sd2-mha-mem_efficient-compile-b4")
    line = commands.command(one)
    assert line.startswith(
        f"git checkout {'0' * 40} && pytest perf --model sd2 --attention mha --sdpa-kernels mem_efficient"
    )
    assert "--compile default" in line and "--batch 4" in line and line.endswith("--perf-rounds 2 --perf-clock wall")


def test_command_quotes_what_a_file_says():
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


# --- the command


def test_report_needs_neither_torch_nor_pytest(tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("plotly")
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


@pytest.mark.slow
@pytest.mark.parametrize("which", ["synthetic", "golden", "real"])
def test_every_golden_run_renders(which, tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("plotly")
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


def test_a_plain_file_of_pytest_benchmark_has_nothing_to_show(tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("plotly")
    assert main(["report", str(GOLDEN.parent / "plain.json"), "--output", str(tmp_path / "out")]) == 0
    assert "0 configurations measured" in (tmp_path / "out" / "summary.md").read_text(encoding="utf-8")
    assert not list((tmp_path / "out" / "plots").iterdir())


@pytest.mark.slow
def test_hostile_names_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("plotly")
    from test_report_page import hostile_runs

    synthetic_runs.write(tmp_path / "runs", hostile_runs()[:1], "hostile")
    assert main(["report", str(tmp_path / "runs"), "--output", str(tmp_path / "out")]) == 0
    files = [path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(files) > 20 and all(re.fullmatch(r"(plots/)?[A-Za-z0-9._-]+", path.as_posix()) for path in files)
    for path in (tmp_path / "out" / "plots").glob("*.svg"):
        kinds = {element.tag.rpartition("}")[2] for element in ElementTree.parse(path).iter()}
        assert not kinds & {"script", "a", "image", "foreignObject"}, path


def test_damaged_runs_are_named_and_the_others_reported(tmp_path, capsys):
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


def test_synthetic_is_said_everywhere(everything):
    assert all("synthetic" in chart.title for chart in article.launch_charts(everything))
    assert all("synthetic" in one.session.machine for one in everything)
    assert "synthetic" in tables.article_markdown(tables.article_tables(newest(everything)))
