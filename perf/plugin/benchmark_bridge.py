"""Bridge to pytest-benchmark's session, whose name is private but unchanged since version 3.

pytest-benchmark's storage writes in place and numbers files without a lock, so perf.runs.storage replaces it. Its
`--benchmark-compare-fail` matches tests by name and raises an error; here it matches configurations, and a regression is a
failed test. This is the only module that uses private names, and a test pins them.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from perf.runs.saved_run import BaselineError, SavedRun
from perf.runs.storage import save_numbered, write_atomically

OVERHEAD = "the harness's own overhead"  # a group of benchmarks that are compared but never fail a run


def benchmark_session(config):
    """pytest-benchmark's session, or None without the plugin."""
    return getattr(config, "_benchmarksession", None)


def folder(config) -> Path | None:
    """The folder in which pytest-benchmark saves runs of this machine; None for a storage that is no folder."""
    session = benchmark_session(config)
    return Path(session.storage.get("")) if hasattr(session.storage, "_next_num") else None


def save_rounds(config) -> None:
    """Save all rounds, after pytest-benchmark has read its options."""
    benchmark_session(config).save_data = True


def set_clock(benchmark, clock: ReplayClock) -> None:
    """Let a benchmark read recorded durations."""
    benchmark._timer = clock


def take_over(config) -> None:
    """Replace the session's storage by atomic writes, and its errors about regressions by log lines."""
    session = benchmark_session(config)
    if session is None:
        return
    if hasattr(session.storage, "_next_num"):  # storages that are no folders are left unchanged
        session.storage = AtomicStorage(session.storage, session.logger)
    session.save_json = JsonReport(session.json, session.logger)
    check, save = session.check_regressions, session.handle_saving

    def log_regressions() -> None:
        if not session.performance_regressions:
            return check()
        lines = "".join(f"\n\t{name} - {reason}" for name, reason in _regressed(session))
        if lines:
            session.logger.error(f"Performance has regressed:{lines}")

    def save_without_warning() -> None:
        # Each rerun of a test (--reruns) adds an entry.
        session.benchmarks[:] = {benchmark.fullname: benchmark for benchmark in session.benchmarks}.values()
        with warnings.catch_warnings():  # under -W error, the warning of an empty run would be an internal error
            warnings.filterwarnings("ignore", "Not saving anything")
            save()

    session.check_regressions, session.handle_saving = log_regressions, save_without_warning


def _regressed(session) -> list[tuple[str, str]]:
    """pytest-benchmark's regressions as (test and baseline, reason), without those of the group OVERHEAD."""
    overhead = {benchmark.name for benchmark in session.benchmarks if benchmark.group == OVERHEAD}
    return [
        (name, reason) for name, reason in session.performance_regressions if name.rpartition(" (")[0] not in overhead
    ]


def compare_plain(config, runs: Sequence[SavedRun]) -> None:
    """Let pytest-benchmark compare each benchmark without a configuration with the newest of these runs that has it."""
    session = benchmark_session(config)
    if session is None or not runs:
        return
    for stored in session.compared_mapping.values():
        for name in [name for name, saved in stored.items() if _id(saved) is None]:
            del stored[name]
    known: set[str] = set()
    for run in sorted(runs, key=lambda run: run.path.name, reverse=True):
        for path, loaded in session.storage.load(str(run.path)):
            plain = {saved["fullname"]: saved for saved in loaded["benchmarks"] if _id(saved) is None}
            added = {name: saved for name, saved in plain.items() if name not in known}
            session.compared_mapping.setdefault(path, {}).update(added)
            known |= added.keys()


def leave_out(config, paths: Collection[Path]) -> None:
    """Let pytest-benchmark compare nothing with these saved runs."""
    session, names = benchmark_session(config), {path.name for path in paths}
    for path, stored in session.compared_mapping.items() if session else ():
        if Path(path).name in names:
            stored.clear()


def has_regressed(config) -> bool:
    """Whether `--benchmark-compare-fail` found a regression outside the group OVERHEAD."""
    session = benchmark_session(config)
    return bool(session and _regressed(session))


def save_error(config) -> str | None:
    """The reason why the run could not be saved, or None."""
    session = benchmark_session(config)
    if session is None:
        return None
    return getattr(session.storage, "error", None) or getattr(session.save_json, "error", None)


def regressions(config, benchmark, id: str, history: Sequence[SavedRun] = ()) -> list[str]:
    """Violations of `--benchmark-compare-fail` by a configuration, whatever its test is called in the baseline.

    history: the comparable stored sessions, oldest first; the newest may be of another set and lack the configuration.
    """
    session, violations = benchmark_session(config), []
    for stored in [*session.compared_mapping.values()][:1]:  # further ones are of plain benchmarks
        baseline = next((saved for saved in stored.values() if _id(saved) == id), None) or _newest(history, id)
        if baseline is None or benchmark.stats is None:
            continue
        stored[benchmark.fullname] = baseline  # read by the table and the check of pytest-benchmark
        checks = (check.fails(benchmark.stats, baseline["stats"]) for check in session.compare_fail or ())
        violations += filter(None, checks)
    return violations


def _newest(history: Sequence[SavedRun], id: str) -> dict | None:
    """A configuration's entry in the newest stored session that has it, in pytest-benchmark's format."""
    for run in reversed(history):
        if id in run.by_id:
            benchmarks = json.loads(run.path.read_text(encoding="utf-8"))["benchmarks"]
            return next((saved for saved in benchmarks if _id(saved) == id), None)
    return None


def _id(saved: dict) -> str | None:
    return (saved.get("extra_info", {}).get("configuration") or {}).get("id")


def leave_unused(benchmark) -> None:
    """Mark the fixture as used, so that pytest-benchmark does not warn about a configuration without rounds."""
    benchmark._mode = "not measured"


class JsonReport:
    """Writer of `--benchmark-json`. error: the reason why the file was not written, or None."""

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
    """The run as pytest-benchmark saves it, with rounds; None if nothing was measured."""
    session, hook = benchmark_session(config), config.hook
    if session is None or not session.benchmarks:
        return None
    commit_info = hook.pytest_benchmark_generate_commit_info(config=config)
    hook.pytest_benchmark_update_commit_info(config=config, commit_info=commit_info)
    output_json = hook.pytest_benchmark_generate_json(
        config=config,
        benchmarks=session.benchmarks,
        include_data=True,
        machine_info=session.get_machine_info(),
        commit_info=commit_info,
    )
    hook.pytest_benchmark_update_json(config=config, benchmarks=session.benchmarks, output_json=output_json)
    return json.loads(json.dumps(output_json, default=str))


class AtomicStorage:
    """A FileStorage with an atomic `save`. error: the reason why the run was not saved, or None."""

    def __init__(self, storage, logger):
        self.storage, self.logger, self.error = storage, logger, None

    def __str__(self):
        return str(self.storage)

    @property
    def location(self) -> str:
        """The folder; pytest-benchmark's property fails for a folder outside the working directory."""
        return str(self.storage.path)

    def load(self, *globs_or_files):
        """As FileStorage.load."""
        return self.storage.load(*globs_or_files)

    def save(self, output_json: dict, label: str) -> None:
        """Write NNNN_label.json."""
        try:
            path = save_numbered(Path(self.storage.get("")), label, _native(output_json))
        except (BaselineError, ValueError) as error:
            self.error = f"the run was not saved: {error}"
            self.logger.error(self.error)
        else:
            self.logger.info(f"Saved benchmark data in: {path}")


def _native(output_json: dict) -> dict:
    """The document with values that JSON lacks, such as the parameter `configuration`, as pytest-benchmark's texts."""
    from pytest_benchmark.utils import safe_dumps

    return json.loads(safe_dumps(output_json))


class ReplayClock:
    """A clock that advances by recorded durations, to pass rounds that were measured in turns to `benchmark.pedantic`.

    >>> clock = ReplayClock([0.5, 0.7])
    >>> begin = clock(); clock.advance(); round(clock() - begin, 9)
    0.5
    """

    def __init__(self, durations: Iterable[float] = ()):
        self.load(durations)

    def load(self, durations: Iterable[float]) -> None:
        """Restart with these durations, in seconds."""
        self.durations = iter(list(durations))
        self.now = 0.0

    def advance(self) -> None:
        """Advance by the next duration; stands for the measured call."""
        self.now += next(self.durations)

    def __call__(self) -> float:
        return self.now
