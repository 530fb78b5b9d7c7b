"""Which stored run a pytest run is compared with, said before anything is collected: what is wrong costs no measurement."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from perf.analysis.statistics import MARGIN_FLOOR
from perf.plugin import options
from perf.runs import baselines
from perf.session.settings import Settings


def choose(config, folder: Path | None, stack: dict, how: Settings) -> tuple[baselines.Choice, float, list[str]]:
    """(the baselines, the margin, what is to be said) for the options of `config`.

    folder: where runs are stored, None for a storage that is not a folder. Tells pytest-benchmark what it is to compare
    with. Raises pytest.UsageError for a baseline that is refused, or for options that need one.
    """
    nothing = baselines.Choice(), MARGIN_FLOOR, []
    compare = config.option.benchmark_compare
    failing, strict = config.option.benchmark_compare_fail, config.getoption("perf_strict")
    if options.disabled(config):  # every target is called once, and there is nothing to compare
        config.option.benchmark_compare = []
        return nothing
    if not compare:
        paired = config.getoption("perf_against") or config.getoption("perf_aa")
        for option, given in (("--benchmark-compare-fail", failing), ("--perf-strict", strict and not paired)):
            if given:
                raise pytest.UsageError(f"{option} needs --benchmark-compare: what should it be compared with?")
        if paired and folder is not None:  # this machine's own noise, measured by --perf-aa
            return baselines.Choice(), _stored(folder, stack, how).margin, []
        return nothing
    if folder is None:
        return nothing  # another kind of storage is pytest-benchmark's own affair
    if isinstance(compare, str) and (Path(compare).is_dir() or compare.partition("::")[0].endswith(".py")):
        raise pytest.UsageError(
            f"--benchmark-compare took {compare!r} for the name of a saved run; put it first, or write "
            f"--benchmark-compare=NAME: pytest {compare} --benchmark-compare"
        )
    choice, notices = _stored(folder, stack, how), []
    if isinstance(compare, str):
        named = _named(config, folder, stack, how, compare)
        choice = replace(choice, named=named)
        if named.why_no_candidate:
            notices.append(f"the baseline {named.path.name} is {named.why_no_candidate}")
    if choice.newest is not None:
        config.option.benchmark_compare = str(choice.newest.path)
        return choice, choice.margin, notices
    refused = "".join(f"\n  {path.name}: {reason}" for path, reason in choice.refused)
    words = f"there is no baseline in {folder} for this machine; save one with --benchmark-autosave{refused}"
    if failing or strict:
        raise pytest.UsageError(words)
    config.option.benchmark_compare = []  # pytest-benchmark would take a damaged or foreign one
    return choice, choice.margin, [*notices, words]


def _stored(folder: Path, stack: dict, how: Settings) -> baselines.Choice:
    try:
        return baselines.candidates(folder, stack, how.clock, how.threads, how.isolated)
    except baselines.BaselineError as error:
        raise pytest.UsageError(str(error)) from None


def _named(config, folder: Path, stack: dict, how: Settings, compare: str) -> baselines.SavedRun:
    """The run that the user named, which may be one that would not be chosen by itself."""
    path = Path(compare)
    if not path.is_file():
        try:
            found = sorted(folder.rglob(f"{compare.rstrip('*')}*.json"), key=lambda file: file.name)
        except (ValueError, NotImplementedError):  # a pattern that is none, or a path that is not there
            found = []
        if not found:
            raise pytest.UsageError(f"--benchmark-compare={compare}: no saved run in {folder} has that name")
        path = found[-1]
    try:
        saved = baselines.read(path)
    except baselines.BaselineError as error:
        raise pytest.UsageError(str(error)) from None
    here = {**stack, "clock": how.clock, "threads": how.threads, "isolated": how.isolated}
    foreign = baselines.why_foreign(saved.machine, here)
    if foreign and not config.getoption("perf_foreign"):
        raise pytest.UsageError(f"{path}: was measured elsewhere: {foreign}; --perf-foreign compares all the same")
    return saved
