"""The one place that touches pytest-benchmark's session, whose name is private though it has been the same since 3.x.

Its storage writes in place and numbers without a lock; ours (perf.runs.storage) is put in its stead. Its check of
`--benchmark-compare-fail` knows tests by name alone and ends pytest by a traceback; here it knows configurations, and a
regression is a failed test. A test pins the names.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

from perf.runs.saved_run import BaselineError, SavedRun
from perf.runs.storage import save_numbered, write_atomically

OVERHEAD = "the harness's own overhead"  # a group of benchmarks that are compared, and gate nothing


def benchmark_session(config):
    """pytest-benchmark's session, or None where the plugin is not there."""
    return getattr(config, "_benchmarksession", None)


def take_over(config) -> None:
    """From now on what is saved is on the disk whole or not at all, and a regression is told in words."""
    session = benchmark_session(config)
    if session is None:
        return
    if hasattr(session.storage, "_next_num"):  # other storages than folders are left alone
        session.storage = WholeFileStorage(session.storage, session.logger)
    session.save_json = JsonReport(session.json, session.logger)
    session.check_regressions = _told(session, session.check_regressions)
    session.handle_saving = _without_warning(session.handle_saving)


def _told(session, check):
    """pytest-benchmark's check, but that a regression is not raised: the exit code says it (see perf.plugin.hooks)."""

    def tell() -> None:
        if not session.performance_regressions:
            return check()
        found = _regressed(session)
        lines = "".join(f"\n\t{name} - {words}" for name, words in found)
        if found:
            session.logger.error(f"Performance has regressed:{lines}")

    return tell


def _regressed(session) -> list[tuple[str, str]]:
    """The regressions that pytest-benchmark found, as (test and baseline, words), but for the harness's own microseconds."""
    ours = {one.name for one in session.benchmarks if one.group == OVERHEAD}
    return [one for one in session.performance_regressions if one[0].rpartition(" (")[0] not in ours]


def has_regressed(config) -> bool:
    """Whether `--benchmark-compare-fail` found a regression in any benchmark but the harness's own."""
    session = benchmark_session(config)
    return bool(session and _regressed(session))


def _without_warning(save):
    """Where nothing could be measured that is said already; under -W error its warning would end pytest by a traceback."""

    def quietly() -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Not saving anything")
            save()

    return quietly


def save_error(config) -> str | None:
    """Why the run could not be saved, or None."""
    session = benchmark_session(config)
    if session is None:
        return None
    return getattr(session.storage, "error", None) or getattr(session.save_json, "error", None)


def regressions(config, benchmark, id: str, history: Sequence[SavedRun] = ()) -> list[str]:
    """What `--benchmark-compare-fail` has against a configuration, which is found in the baseline whatever its test's name.

    history: the stored sessions that it may be compared with, the oldest first: the newest of all may be of another set.
    """
    session, found = benchmark_session(config), []
    for stored in session.compared_mapping.values():
        same = next((one for one in stored.values() if _configuration(one) == id), None) or _newest(history, id)
        if same is None or benchmark.stats is None:
            continue
        stored[benchmark.fullname] = same  # the table and pytest-benchmark's own check look there
        found += filter(None, (check.fails(benchmark.stats, same["stats"]) for check in session.compare_fail or ()))
    return found


def _newest(history: Sequence[SavedRun], id: str) -> dict | None:
    """A configuration's benchmark in the newest of the stored sessions that has it, as pytest-benchmark wrote it."""
    for run in reversed(history):
        if any(one.id == id and one.variant is None for one in run.benchmarks):
            benchmarks = json.loads(run.path.read_text(encoding="utf-8"))["benchmarks"]
            return next((one for one in benchmarks if _configuration(one) == id), None)
    return None


def _configuration(stored: dict) -> str | None:
    return (stored.get("extra_info", {}).get("configuration") or {}).get("id")


def leave_unused(benchmark) -> None:
    """A configuration that could not be measured has no use for the fixture: no warning about it."""
    benchmark._mode = "not measured"


class JsonReport:
    """Writes the file of `--benchmark-json`. error: why it could not, or None."""

    def __init__(self, path, logger):
        self.path, self.logger, self.error = path, logger, None

    def __call__(self, output_json: dict) -> None:
        try:
            write_atomically(self.path, _native(output_json))
        except (BaselineError, ValueError) as error:
            self.error = f"{self.path} was not written: {error}"
            self.logger.error(self.error)
        else:
            self.logger.info(f"Wrote benchmark data in: {self.path}", purple=True)


def document(config) -> dict | None:
    """The run as pytest-benchmark would save it with its rounds, through the same hooks; None where nothing was measured."""
    session, hook = benchmark_session(config), config.hook
    if session is None or not session.benchmarks:
        return None
    commit_info = hook.pytest_benchmark_generate_commit_info(config=config)
    hook.pytest_benchmark_update_commit_info(config=config, commit_info=commit_info)
    made = hook.pytest_benchmark_generate_json(
        config=config,
        benchmarks=session.benchmarks,
        include_data=True,
        machine_info=session.get_machine_info(),
        commit_info=commit_info,
    )
    hook.pytest_benchmark_update_json(config=config, benchmarks=session.benchmarks, output_json=made)
    return json.loads(json.dumps(made, default=str))


class WholeFileStorage:
    """A FileStorage whose `save` is atomic. error: why the last one failed, or None; path: what it wrote."""

    def __init__(self, plain, logger):
        self.plain, self.logger = plain, logger
        self.error, self.path = None, None

    def __str__(self):
        return str(self.plain)

    @property
    def location(self) -> str:
        """Where the files are; pytest-benchmark's own fails for a folder outside of the working directory."""
        return str(self.plain.path)

    def load(self, *globs_or_files):
        """As pytest-benchmark does."""
        return self.plain.load(*globs_or_files)

    def save(self, output_json: dict, label: str) -> None:
        """Write NNNN_label.json."""
        try:
            self.path = save_numbered(Path(self.plain.get("")), label, _native(output_json))
        except (BaselineError, ValueError) as error:
            self.error = f"the run was not saved: {error}"
            self.logger.error(self.error)
        else:
            self.logger.info(f"Saved benchmark data in: {self.path}")


def _native(output_json: dict) -> dict:
    """With everything that JSON cannot hold, such as the parameter `configuration`, as the text that pytest-benchmark has."""
    from pytest_benchmark.utils import safe_dumps

    return json.loads(safe_dumps(output_json))


class ReplayClock:
    """A clock that moves by recorded durations, so that rounds measured in turns pass through `benchmark.pedantic`:

    >>> clock = ReplayClock([0.5, 0.7])
    >>> begin = clock(); clock.advance(); round(clock() - begin, 9)
    0.5
    """

    def __init__(self, durations: Iterable[float] = ()):
        self.load(durations)

    def load(self, durations: Iterable[float]) -> None:
        """Start again with other durations, in seconds."""
        self.durations = iter(list(durations))
        self.now = 0.0

    def advance(self) -> None:
        """What stands for the measured work: the clock moves on by the next duration."""
        self.now += next(self.durations)

    def __call__(self) -> float:
        return self.now
