"""`--benchmark-compare`: choose and validate the baseline before collection, so that no error costs a measurement."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from perf.analysis.statistics import MARGIN_FLOOR
from perf.plugin.options import PAIRED, disabled
from perf.runs import baselines
from perf.runs.saved_run import BaselineError, SavedRun, read
from perf.session.settings import Settings


@dataclass(frozen=True)
class Comparison:
    """The baselines of a run, the margin (a fraction) and notices for the terminal.

    plain: runs whose benchmarks without a configuration pytest-benchmark compares itself. missing: the reason why no
    configuration can be compared although `plain` can. gate: whether that is an error.
    """

    choice: baselines.Choice = field(default_factory=baselines.Choice)
    margin: float = MARGIN_FLOOR
    notices: tuple[str, ...] = ()
    plain: tuple[SavedRun, ...] = ()
    missing: str | None = None
    gate: bool = False


def choose(config, folder: Path | None, stack: dict, settings: Settings) -> Comparison:
    """Choose the baselines by the options of `config`, and set pytest-benchmark's own option to the newest.

    folder: the storage, None if it is no folder. Raises pytest.UsageError for a refused baseline, or for options that need
    one.
    """
    option = config.option
    if isinstance(option.benchmark_compare, str) and not option.benchmark_compare.strip():
        raise pytest.UsageError("--benchmark-compare: the value is empty; is a variable unset?")
    compare, paired = option.benchmark_compare, any(map(config.getoption, PAIRED))
    strict, failing = config.getoption("perf_strict"), option.benchmark_compare_fail
    fail_on_counts = config.getoption("perf_fail_on_counts")
    if disabled(config):
        option.benchmark_compare = []
        return Comparison()
    if not compare:
        for name, value in (
            ("--benchmark-compare-fail", failing),
            ("--perf-strict", strict and not paired),
            ("--perf-fail-on-counts", fail_on_counts and not paired),
        ):
            if value:
                raise pytest.UsageError(f"{name} needs --benchmark-compare: there is nothing to compare with")
        if paired and folder is not None:  # the margin still comes from stored A/A comparisons
            return Comparison(margin=_stored(folder, stack, settings).margin)
        return Comparison()
    if paired:
        names = [f"--{name.replace('_', '-')}" for name in PAIRED if config.getoption(name)]
        raise pytest.UsageError(
            f"--benchmark-compare and {names[0]}: a session has one verdict for each configuration; leave out one of them"
        )
    if folder is None:
        if strict or fail_on_counts:
            raise pytest.UsageError(
                f"{'--perf-strict' if strict else '--perf-fail-on-counts'}: --benchmark-storage is no folder, from which "
                "sd-perf reads baselines; name a folder"
            )
        return Comparison()  # pytest-benchmark handles other storages itself
    if isinstance(compare, str) and (Path(compare).is_dir() or compare.partition("::")[0].endswith(".py")):
        raise pytest.UsageError(
            f"--benchmark-compare took {compare!r} for the name of a saved run; put it first, or write "
            f"--benchmark-compare=NAME: pytest {compare} --benchmark-compare"
        )
    choice, notices = _stored(folder, stack, settings), []
    if isinstance(compare, str):
        named = _named(config, folder, stack, settings, compare)
        choice = replace(choice, plain=(named,)) if named.plain else replace(choice, named=named, plain=())
        if named.why_no_candidate:
            notices.append(f"the baseline {named.path.name} is {named.why_no_candidate}")
    if fail_on_counts and not (choice.named or choice.counted):
        raise pytest.UsageError(f"--perf-fail-on-counts: {folder} has no session with counts of this software")
    plain = choice.plain if isinstance(compare, str) else (*choice.history, *choice.plain)
    if choice.newest is not None:
        option.benchmark_compare = str(choice.newest.path)
        return Comparison(choice, choice.margin, tuple(notices), plain)
    refused = "".join(f"\n  {path.name}: {reason}" for path, reason in choice.refused)
    message = f"there is no baseline in {folder} for this machine; save one with --benchmark-autosave{refused}"
    gate = bool(failing or strict)
    if choice.counted:
        notices.append(f"counts are compared with sessions up to {choice.counted[-1].name}")
    if plain:
        option.benchmark_compare = str(plain[-1].path)
        return Comparison(choice, choice.margin, tuple(notices), plain, missing=message, gate=gate)
    if gate:
        raise pytest.UsageError(message)
    option.benchmark_compare = []  # else pytest-benchmark would load a damaged or foreign file
    return Comparison(choice, choice.margin, (*notices, message))


def _stored(folder: Path, stack: dict, settings: Settings) -> baselines.Choice:
    try:
        return baselines.candidates(folder, stack, settings.clock, settings.threads, settings.isolated)
    except BaselineError as error:
        raise pytest.UsageError(str(error)) from None


def _named(config, folder: Path, stack: dict, settings: Settings, compare: str) -> SavedRun:
    """The run that the user named, whether or not it would be chosen automatically."""
    path = Path(compare)
    if not path.is_file():
        paths = _files_named(folder, compare.rstrip("*"))
        if not paths:
            raise pytest.UsageError(f"--benchmark-compare={compare}: no saved run in {folder} has that name")
        path = paths[-1]
    try:
        saved = read(path)
    except BaselineError as error:
        raise pytest.UsageError(str(error)) from None
    here = {**stack, "clock": settings.clock, "threads": settings.threads, "isolated": settings.isolated}
    foreign = (baselines.why_plain_foreign if saved.plain else baselines.why_foreign)(saved.machine, here)
    if foreign and not config.getoption("perf_foreign"):
        raise pytest.UsageError(f"{path}: was measured elsewhere: {foreign}; --perf-foreign compares anyway")
    return saved


def _files_named(folder: Path, name: str) -> list[Path]:
    """The saved runs whose file name begins with `name`, else those whose label after the number does, by number."""
    patterns = [f"{name}*.json", f"[0-9][0-9][0-9][0-9]*_{name}*.json"]
    for pattern in patterns[: 1 if name.isdigit() else 2]:
        try:
            paths = sorted(folder.rglob(pattern), key=lambda file: file.name)
        except (ValueError, NotImplementedError):  # an invalid or absolute pattern
            paths = []
        if paths:
            return paths
    return []
