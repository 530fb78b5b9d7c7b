"""The report's page as a reader uses it, in a headless Chromium: cards, tables, filters, comparisons, downloads, print."""

from __future__ import annotations

import csv
import json

import chromium
import pytest
import synthetic_runs

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")
from perf.analysis import ranking
from perf.report import build
from perf.report.results import entry_of

pytestmark = [pytest.mark.slow, pytest.mark.report]
needs_browser = pytest.mark.skipif(chromium.find() is None, reason="no Chromium: apt-get install chromium")


def compared() -> list[dict]:
    """A session with every verdict, and one of other work in which configurations are not comparable with it."""
    first, second = synthetic_runs.published_run("A100", 8), synthetic_runs.published_run("A100", 7)
    verdicts = ("SLOWER", "FASTER", "SAME", "INCONCLUSIVE", "INVALID")
    codes = ("beyond_margin", "beyond_margin", "within_margin", "straddles_margin", "invalid_rounds 30 %")
    for number, benchmark in enumerate(first["benchmarks"]):
        estimate = (1.06, 0.94, 1.0, 1.01, 1.2)[number % 5]
        verdict = {"verdict": verdicts[number % 5], "reason": codes[number % 5], "against": "abc1234", "margin": 0.01}
        ratio = {"estimate": estimate, "low": 0.99 * estimate, "high": 1.01 * estimate}
        benchmark["extra_info"]["verdict"] = {**verdict, "ratio": ratio}
        benchmark["extra_info"]["speedup"] = {"against": "sd2-original-b1", **ratio} if number % 5 else None
    for benchmark in second["benchmarks"]:
        configuration = benchmark["extra_info"]["configuration"]
        configuration.update(steps=25, id=configuration["id"].replace("sd2", "sd2-short"))
    second["perf"]["drifted"] = "anchor_drift 4.1 %"
    counts = {"against": "abc1234", "changes": ["operators 4310 -> 4330 (addmm +20)"], "not_compared": None}
    first["benchmarks"][2]["extra_info"]["counts_comparison"] = counts
    first["commit_info"]["id"] = "0123456789" * 4
    return [second, first]


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    folder = tmp_path_factory.mktemp("judged")
    paths = synthetic_runs.write(folder / "runs", compared(), "synthetic")
    report = build.gather(paths, repository="https://example.org/owner/name")
    return build.write(report, folder / "out")[0]


@needs_browser
def test_cards_count_every_verdict_and_link_to_its_rows(judged):
    with chromium.Page(width=1400) as browser:
        browser.open(judged)
        count = "card.querySelector('.count').textContent"
        cards = f"[...document.querySelectorAll('.card')].map((card) => [card.classList[1], {count}])"
        expected = [[name, "3"] for name in ("SLOWER", "FASTER", "SAME", "INCONCLUSIVE", "INVALID")]
        assert browser.run(cards) == [*expected, ["COUNTS", "1"]]
        assert "addmm +20" in browser.run("document.querySelector('.card.COUNTS').textContent")
        invalid = browser.run("document.querySelector('.card.INVALID').textContent")
        assert "invalid_rounds 30 %" in invalid and "+20.0" not in invalid, "no ratio where it is no evidence"
        chip = "document.querySelector('#row-sd2-mha-math-b1 .COUNTS')"
        assert browser.run(f"{chip}.title") == "COUNTS operators 4310 -> 4330 (addmm +20) against abc1234"
        assert (
            browser.run("document.querySelector('h1').textContent")
            == "3 INVALID, 3 SLOWER, 3 INCONCLUSIVE, 3 FASTER, 3 SAME of 15"
        )
        box = browser.run("document.querySelector('#verdicts').getBoundingClientRect().bottom")
        assert box < 900, "the answer is on the first screen"
        for card in expected:
            link = f"document.querySelector('.card.{card[0]} a')"
            browser.run(f"{link}.click()")
            row = browser.run("document.querySelector('tr.at td.verdict .chip').textContent")
            assert row == card[0] and browser.run("location.hash").endswith(browser.run(f"{link}.hash.slice(1)"))
        assert browser.errors == []


@needs_browser
def test_columns_that_decide_fit_into_1400_pixels(judged):
    with chromium.Page(width=1400) as browser:
        browser.open(judged)
        assert browser.run("document.documentElement.scrollWidth") == 1400
        for name in ("th.id", "td.time", "td.axis .strip", "td[data-label=speed-up]", "td.verdict .chip"):
            boxes = f"[...document.querySelectorAll('table.results {name}')].map((one) => one.getBoundingClientRect())"
            assert browser.run(f"{boxes}.length") >= 12, name
            assert browser.run(f"{boxes}.every((box) => box.width > 20 && box.left >= 0 && box.right <= 1400)"), name
        cells = "[...document.querySelectorAll('table.results :is(th, td)')]"
        clipped = f"{cells}.filter((one) => one.scrollWidth > one.clientWidth + 1)"
        assert browser.run(f"{clipped}.map((one) => one.textContent)") == []
        assert browser.run("document.querySelectorAll('table.results').length") == 2, "a table for each work"
        assert browser.run("document.querySelector('table.results th.number').textContent") == "s per imagewall time"
        dots = browser.run("document.querySelector('.strip .r').getAttribute('d')").count("M")
        assert (
            dots + browser.run("document.querySelector('tr[data-row] .strip .o')?.getAttribute('d') ?? ''").count("M")
            == 20
        )


@needs_browser
def test_rows_are_cards_on_a_phone(judged):
    with chromium.Page(width=390, height=844) as browser:
        browser.open(judged)
        assert browser.run("document.documentElement.scrollWidth") <= 390
        row = "document.querySelector('tr[data-row]')"
        assert browser.run(f"getComputedStyle({row}).display") == "block"
        labels = (
            f"[...{row}.querySelectorAll('[data-label]')].map((cell) => getComputedStyle(cell, '::before').content)"
        )
        assert browser.run(labels) == ['"s per image"', '"speed-up"', '"verdict"', '"image, dB"', '"peak memory"']
        browser.run(chromium.UNFOLD)
        assert browser.run("document.documentElement.scrollWidth") <= 390, "with every section open"
        assert browser.run("getComputedStyle(document.querySelector('.plain tbody tr')).display") == "block"


@needs_browser
def test_rows_are_sorted_and_searched(judged):
    ids = "[...document.querySelector('table.results').querySelectorAll('tr[data-row]:not([hidden]) th.id')]"
    ids += ".map((head) => head.dataset.v)"
    with chromium.Page(width=1400) as browser:
        browser.open(judged)
        original = browser.run(ids)
        head = "document.querySelector('th[data-sort={}] button').click()"
        browser.run(head.format("id"))
        assert browser.run(ids) != original and sorted(browser.run(ids)) == sorted(original)
        values = ids.replace("th.id", "td.time").replace(
            ".map((head) => head.dataset.v)", ".map((cell) => Number(cell.dataset.v))"
        )
        browser.run(head.format("time"))
        assert browser.run(values) == sorted(browser.run(values))
        browser.run(head.format("time"))
        assert browser.run(values) == sorted(browser.run(values), reverse=True)
        assert browser.run("document.querySelector('th[data-sort=time]').getAttribute('aria-sort')") == "descending"
        browser.run(head.format("speedup"))
        speedups = values.replace("td.time", "td[data-label=speed-up]").replace(
            "Number(cell.dataset.v)", "cell.dataset.v"
        )
        assert browser.run(speedups)[-3:] == [""] * 3, "unknown values come last"
        browser.run(head.format("verdict"))
        assert "INVALID" in browser.run("document.querySelector('tr[data-row] td.verdict').textContent")
        search = "(() => {{ const box = document.getElementById('search'); box.value = {!r}; "
        search += "box.dispatchEvent(new Event('input')); }})()"
        browser.run(search.format("xformers slower"))
        assert browser.run(ids) == [] and not browser.run("document.querySelector('.nothing').hidden")
        browser.run(search.format("xformers faster"))
        assert sorted(browser.run(ids)) == [f"sd2-original-xformers-b{batch}" for batch in (1, 2, 4)]
        assert browser.errors == []


@needs_browser
def test_the_address_restores_filters_search_order_and_picks(judged):
    state = (
        "[document.getElementById('search').value, document.querySelectorAll('#filters input:not(:checked)').length, "
    )
    state += "document.querySelectorAll('tr[data-row]:not([hidden])').length, document.querySelector('.answer')?.textContent, "
    state += "document.querySelector('th[aria-sort=descending]')?.dataset.sort]"
    with chromium.Page(width=1400) as browser:
        browser.open(judged)
        browser.run("document.querySelector('#filters input[name=batch][value=\"4\"]').click()")
        browser.run(
            "(() => { const box = document.getElementById('search'); box.value = 'mha'; box.dispatchEvent(new Event('input')); })()"
        )
        browser.run("document.querySelector('th[data-sort=time] button').click()")
        browser.run("document.querySelector('th[data-sort=time] button').click()")
        browser.run(
            "[...document.querySelectorAll('tr[data-row]:not([hidden]) .pick input')].slice(0, 2).forEach((box) => box.click())"
        )
        browser.run("report.more()")
        left, fragment = browser.run(state), browser.run("location.hash")
        assert left[:3] == ["mha", 1, 12] and left[3] and left[4] == "time" and "not-batch=4" in fragment
    with chromium.Page(width=1400) as browser:
        browser.open(judged, fragment)
        browser.run("report.ready")
        assert browser.run(state) == left
        assert browser.errors == []


@needs_browser
def test_two_rows_are_compared_by_their_paired_ratio(judged):
    report = build.gather(sorted((judged.parent.parent / "runs").iterdir()))
    entries = {result.id: entry_of(result) for result in report.current}
    ours, theirs = "sd2-mha-mem_efficient-b1", "sd2-original-xformers-b1"
    ratio = ranking.paired(entries[ours], entries[theirs])
    assert ratio.high < 1
    pick = "document.querySelector('#row-{} .pick input').click()"
    with chromium.Page(width=1400) as browser:
        browser.open(judged)
        browser.run(pick.format(ours))
        assert browser.run("document.getElementById('compare').hidden")
        browser.run(f"{pick.format(theirs)}; report.more()")
        text = browser.run("document.querySelector('.answer').textContent")
        low, high = 100 * (1 - ratio.high), 100 * (1 - ratio.low)
        assert text.startswith(f"{ours} takes {100 * (1 - ratio.estimate):.1f} % less time than {theirs}")
        assert f"95 % interval {low:.1f} % to {high:.1f} %" in text
        assert "--sdpa-kernels mem_efficient" in browser.run("document.getElementById('compare').innerText")
        other = ours.replace("sd2", "sd2-short")
        browser.run(f"{pick.format(other)}; report.more()")
        assert "did different work" in browser.run("document.querySelector('.answer').textContent")
        invalid = "sd2-mha-mem_efficient-compile-b1"
        browser.run(f"{pick.format(invalid)}; report.more()")
        assert "INVALID, so its time is no evidence" in browser.run("document.querySelector('.answer').textContent")
        assert browser.run("document.querySelectorAll('.pick input:checked').length") == 2
        assert browser.errors == []


@needs_browser
def test_tables_are_downloaded_as_csv_and_json(judged):
    press = "(() => {{ const buttons = [...document.querySelectorAll('[data-save={}]')]; return report.exported(buttons[{}]); }})()"
    with chromium.Page(width=1400) as browser:
        browser.open(judged)
        browser.run("document.querySelector('#filters input[name=batch][value=\"4\"]').click()")
        rows = list(csv.DictReader(browser.run(press.format("csv", 0)).splitlines()))
        records = json.loads(browser.run(press.format("json", 0)))
        assert len(rows) == len(records) == 10, "the rows that the filters leave"
        assert [float(row["seconds_per_image"]) for row in rows] == [record["seconds_per_image"] for record in records]
        assert {record["verdict"] for record in records} == {"SLOWER", "FASTER", "SAME", "INCONCLUSIVE", "INVALID"}
        drifted = json.loads(browser.run(press.format("json", 1)))
        assert {record["marks"] for record in drifted} == {"drifted"}
        published = list(csv.DictReader(browser.run(press.format("csv", 3)).splitlines()))
        assert published[0]["configuration"] and any("(published)" in name for name in published[0])
        assert browser.errors == []


@needs_browser
def test_details_of_a_row_with_its_command_and_linked_commit(judged):
    with chromium.Page(width=1400) as browser:
        browser.open(judged)
        browser.run("document.querySelector('#row-sd2-mha-math-b1 .open').click(); report.more()")
        text = browser.run("document.querySelector('tr.detail').innerText")
        assert "pytest perf --model sd2 --attention mha" in text and "J per image" in text and "against abc1234" in text
        link = f"https://example.org/owner/name/commit/{'0123456789' * 4}"
        assert browser.run("document.querySelector('tr.detail a').href") == link
        assert browser.run("document.querySelector('.asked a').href") == link


@needs_browser
def test_print_has_every_chart(judged):
    with chromium.Page(width=1400, dark=True) as browser:
        browser.open(judged)
        assert browser.run("document.querySelectorAll('details.section:not([open])').length") > 5
        browser.ask("Page.printToPDF")
        browser.ask("Emulation.setEmulatedMedia", media="print")
        heights = (
            "[...document.querySelectorAll('[data-chart] svg')].map((plot) => plot.getBoundingClientRect().height)"
        )
        assert len(browser.run(heights)) > 10 and min(browser.run(heights)) > 50
        assert browser.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"


@needs_browser
def test_terms_are_explained_on_hover(judged):
    with chromium.Page(width=1400) as browser:
        browser.open(judged)
        terms = "[...document.querySelectorAll('abbr, .chip')].filter((term) => !term.title)"
        assert browser.run(f"{terms}.length") == 0
        assert browser.run("document.querySelectorAll('header abbr, main abbr').length") > 8
    with chromium.Page(width=390, height=844) as browser:
        browser.open(judged)
        browser.ask("Emulation.setTouchEmulationEnabled", enabled=True)
        browser.run("document.querySelector('abbr').click()")
        assert browser.run("document.getElementById('hint').textContent").endswith("a regression.")
        browser.run("document.querySelector('h1').click()")
        assert browser.run("document.getElementById('hint').hidden")
