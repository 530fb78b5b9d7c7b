"""The one place that touches pytest-benchmark's session, whose name is private though it has been the same since 3.x.

Its storage writes in place and numbers without a lock; ours (perf.storage) is put in its stead. A test pins the names.
"""

from __future__ import annotations

import json
from pathlib import Path

from perf.baselines import BaselineError
from perf.storage import save_numbered


def benchmark_session(config):
    """pytest-benchmark's session, or None where the plugin is not there."""
    return getattr(config, "_benchmarksession", None)


def write_whole_files(config) -> None:
    """From now on a saved run is on the disk whole or not at all. Other storages than folders are left alone."""
    session = benchmark_session(config)
    if session is not None and hasattr(session.storage, "_next_num"):
        session.storage = WholeFileStorage(session.storage, session.logger)


def save_error(config) -> str | None:
    """Why the run could not be saved, or None."""
    session = benchmark_session(config)
    return getattr(session.storage, "error", None) if session is not None else None


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
            self.path = save_numbered(Path(self.plain.get("")), label, output_json)
        except (BaselineError, ValueError) as error:
            self.error = f"the run was not saved: {error}"
            self.logger.error(self.error)
        else:
            self.logger.info(f"Saved benchmark data in: {self.path}")
