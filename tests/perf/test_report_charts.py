"""Contents of the charts: values, intervals, looks, with synthetic runs."""

from __future__ import annotations

import csv
import re

import pytest
import synthetic_runs
from synthetic_runs import results_of

pytest.importorskip("matplotlib")

from perf.configurations.configuration import usual_precision
from perf.report import article, bars, breakdown, build, growth, history, roofline, summary, tables
from perf.report.palette import FIXED, MORE, Palette
from perf.report.results import newest

pytestmark = pytest.mark.report


@pytest.fixture(scope="module")
def everything():
    return results_of(*synthetic_runs.everything())


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


def test_ladder_only_for_cumulative_sets():
    assert breakdown.ladder_charts(results_of(synthetic_runs.published_run("A100"))) == []
    added = synthetic_runs.ladder_run()
    added["benchmarks"][2]["extra_info"]["configuration"]["attention"] = "mha"
    assert breakdown.ladder_charts(results_of(added)) == []


def test_speedups_of_the_embedded_model_stand_beside_the_published_ones():
    made = synthetic_runs.published_run("A100")
    del made["synthetic"]
    for benchmark in made["benchmarks"]:
        configuration = benchmark["extra_info"]["configuration"]
        configuration["id"] = configuration["id"].replace("sd2", "tiny")
        configuration.update(model="tiny", steps=20, precision=usual_precision("tiny"))
        if configuration["attention"] == "mha" and configuration["batch"] == 1:
            speedup = {"against": "tiny-original-b1", "estimate": 1.5, "low": 1.4, "high": 1.6}
            benchmark["extra_info"]["speedup"] = speedup
    results = results_of(made)
    (table,) = tables.ratio_tables(results)
    own = table.header.index("A100, tiny, plms 20 steps, torch 2.0.0+cu117") - 1
    cells = dict(zip(table.rows, table.cells))
    assert cells["mha-mem_efficient"][own] == "1.50x [1.40, 1.60]"
    printed = table.header.index("A100 (published)") - 1
    assert cells["mha-mem_efficient-compile"][printed] == f"{8.0 / 4.1:.2f}x"
    assert cells["mha-mem_efficient-compile"][table.header.index("P100 (published)") - 1] == "not run"
    (chart,) = article.ratio_charts(results)
    (bar,) = (p for series in chart.series if not series.faint for p in series.points if series.look == "mha-math")
    assert (bar.y, bar.low, bar.high) == (1.5, 1.4, 1.6)
    assert "1.50x [1.40, 1.60]" in tables.article_markdown([table])
    assert article.article_name(results[0]) == "original_vs_optimized_A100_n_samples_1_n_iter_2_tiny_plms_20_steps"


@pytest.mark.parametrize("key", ["invalid", "drifted"])
def test_invalid_and_drifted_sessions_are_stamped_wherever_their_numbers_stand(key):
    made = synthetic_runs.published_run("A100")
    made["perf"][key] = "control_arm SLOWER +4.1 %" if key == "invalid" else "anchor_drift 4.1 %"
    mark = {"invalid": "INVALID"}.get(key, key)
    results = results_of(made)
    titles = [chart.title for chart in build.all_charts(results, results, []) if "published" not in chart.title]
    assert len(titles) > 10 and all(f"({mark})" in title for title in titles), titles
    for row in csv.DictReader(tables.results_csv(results).splitlines()):
        assert row["marks"] == mark and row[key] == made["perf"][key]
    text = summary.markdown_summary([results[0].session], results)
    assert text.count(f"| {mark} |") == 15, "a row of the Markdown each"
    assert (summary.fastest(results) is None) == (key == "invalid")


def test_ladder_is_a_waterfall_in_its_own_order():
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


def test_each_stage_has_the_relative_interval_of_the_image():
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
def test_stages_of_older_runs_are_labelled_without_interval(clock, stages):
    """Stages have wall time: with a clock of CPU time there is no stage `other`."""
    made = synthetic_runs.published_run("A100")
    made["perf"]["clock"] = clock
    for benchmark in made["benchmarks"]:
        for launch in benchmark["extra_info"]["launches"]:
            del launch["stage_seconds"]
    (chart,) = breakdown.stage_charts(results_of(made))
    assert [series.name for series in chart.series] == stages.split()
    for series in chart.series:
        assert all(point.low is None and "no interval" in point.note for point in series.points)


def test_tables_have_intervals_of_stages_energy_and_peak_fraction():
    ones = results_of(synthetic_runs.published_run("A100"))
    row = next(csv.DictReader(tables.results_csv(ones).splitlines()))
    for name in ("joules", *(f"{stage}_seconds_per_image" for stage in synthetic_runs.SHARES)):
        value = row.get(name) or row[f"{name}_per_image"]
        assert float(row[f"{name}_low"]) < float(value) < float(row[f"{name}_high"])
    cells = dict(zip(tables.COLUMNS, tables.result_rows(ones)[0]))
    assert re.fullmatch(r"[\d.]+ \[[\d.]+, [\d.]+\]", cells["J/image"])
    assert re.fullmatch(r"[\d.]+ \[[\d.]+, [\d.]+\] %", cells["of peak FLOP/s"])
    names, rows = tables.stage_table(ones)
    assert names == ("text", "unet", "vae", "other")  # the other stages are of inpainting and training
    assert all(re.fullmatch(r"[\d.]+ \[[\d.]+, [\d.]+\] m?s", cell) for cell in rows[0][1])


def test_long_labels_are_wrapped():
    label = (
        "sdpa-flash-compile-max-autotune-no-cudagraphs-plms20-512x768-b16-channels_last-fused_qkv-cache_context_kv-x"
    )
    lines = bars.wrapped(label).split("\n")
    assert len(lines) == 3 and all(len(line) <= 30 for line in lines) and lines[-1].endswith("…")


def test_growth_charts_have_fits():
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
    assert left.y / left.x == pytest.approx(1.5), "TFLOP/s per FLOP/byte at 1.5 TB/s"


def test_roofline_of_older_runs():
    made = synthetic_runs.published_run("A100")
    del made["machine_info"]["stack"]["copy_bytes_per_second"]
    (chart,) = roofline.roofline_charts(results_of(made))
    assert [point.y for point in chart.series[-1].points] == [100.0, 100.0], "only the roof of matrix products"
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


def test_compile_lines_cross_at_the_break_even():
    charts = breakdown.compile_charts(results_of(synthetic_runs.published_run("A100")))
    assert len(charts) == 3 and "pays after 200 images [100, 400]" in charts[0].title
    eager, compiled = charts[0].series
    assert compiled.points[0].y > eager.points[0].y == 0 and compiled.points[-1].y < eager.points[-1].y


def test_history_has_a_line_for_each_stack_with_verdicts_and_change_points():
    results = results_of(*synthetic_runs.nightly_runs(12))
    charts = history.history_charts(results, history.change_points(results))
    assert len(charts) == 5 and charts[0].title == "sd2-original-b1 on A100, synthetic, 12 sessions"
    assert [series.name.split(",")[0] for series in charts[0].series] == ["torch 2.14.0+cu130", "torch 2.15.0+cu132"]
    verdicts = [point.verdict for point in charts[0].points]
    assert verdicts == ["INCONCLUSIVE"] * 6 + [None] * 2 + ["SLOWER"] * 4, "SAME has no ring"
    assert all(point.low < point.y < point.high for point in charts[0].points)


def test_change_points_are_marked_on_the_chart_of_their_configuration():
    pytest.importorskip("ruptures")
    results = results_of(*synthetic_runs.nightly_runs(12))
    (change,) = history.change_points(results)
    slowed, *others = history.history_charts(results, [change])
    (mark,) = slowed.marks
    assert mark[1] == f"{100 * (change.ratio - 1):+.1f} %" and change.series.id == "sd2-original-b1"
    assert slowed.points[7].x < mark[0] < slowed.points[8].x
    assert all(chart.marks == () for chart in others)


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


def test_failed_image_checks_have_no_time():
    made = synthetic_runs.published_run("A100")
    wrong = made["benchmarks"][4]["extra_info"]
    wrong["image"] = {**wrong["image"], "verdict": "INVALID", "reason": "wrong_image latents: far away"}
    ones = results_of(made)
    assert all(series.name != "mha-mem_efficient-compile" for series in article.launch_charts(ones)[0].series)
    assert tables.result_rows(ones)[-1][0] == wrong["configuration"]["id"]
    assert summary.fastest(ones[:5]).startswith("fastest here: sd2-mha-mem_efficient-b1")


def test_approximate_images_are_never_the_fastest():
    made = synthetic_runs.published_run("A100")
    made["benchmarks"][4]["extra_info"]["configuration"]["optimise"] = "fast,feature_caching"
    ones = results_of(made)
    best = min(ones[:5], key=lambda one: one.seconds_per_image)
    assert best.approximate and "feature_caching" in best.technique
    cells = dict(zip(tables.COLUMNS, tables.result_rows([best])[0]))
    assert (cells["PSNR, dB"], cells["marks"]) == ("52.0", "approximate")
    assert summary.fastest(ones[:5]).startswith("fastest here: sd2-mha-mem_efficient-b1")


def test_looks_are_stable_and_distinct():
    names = [f"sdpa-{number}" for number in range(len(MORE) * 3)]
    palette = Palette([*names, *FIXED])
    looks = [(palette[name].colour, palette[name].dash) for name in [*names, *FIXED]]
    assert len(set(looks)) == len(looks)
    assert Palette(["sdpa-7"])["sdpa-7"] == Palette(["sdpa-7", "other"])["sdpa-7"]
    assert Palette([])["original"].colour == FIXED["original"]
