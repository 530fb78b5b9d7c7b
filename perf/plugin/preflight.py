"""Checks before collection of what the end of a run needs, so that no measurement is lost to a full or wrong path."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from pytest_benchmark.utils import get_commit_info, get_tag, parse_compare_fail

from perf.runs.storage import why_unwritable

# (option, its name in pytest's config, whether its value is a folder)
OUTPUTS = (
    ("--benchmark-json", "benchmark_json", False),
    ("--perf-report", "perf_report", True),
    ("--perf-trace", "perf_trace", True),
    ("--perf-compile-cache", "perf_compile_cache", True),
)


def check_outputs(config) -> None:
    """Raise pytest.UsageError for an output that cannot be written or lacks its packages."""
    for option, name, folder in OUTPUTS:
        path = config.getoption(name)
        reason = why_unwritable(path, folder) if path else None
        if reason:
            raise pytest.UsageError(f"{option}: {path} {reason}; name another {'folder' if folder else 'file'}")
    if config.getoption("perf_report"):
        from perf.report.build import missing_packages  # pytest loads this module at every start

        if missing := missing_packages():
            raise pytest.UsageError(f'--perf-report needs {" and ".join(missing)}: pip install "sd-perf[report]"')
    missing = [name for name in ("pygal", "pygaljs") if importlib.util.find_spec(name) is None]
    if config.getoption("benchmark_histogram") and missing:
        raise pytest.UsageError(f"--benchmark-histogram needs {' and '.join(missing)}: pip install pygal pygaljs")


def apply_all_compare_fail(config) -> None:
    """Apply every `--benchmark-compare-fail`, where pytest-benchmark alone applies the last."""
    if not config.option.benchmark_compare_fail:
        return
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, fromfile_prefix_chars="@")
    parser.add_argument("--benchmark-compare-fail", nargs="+", action="extend", type=parse_compare_fail)
    addopts = [*shlex.split(os.environ.get("PYTEST_ADDOPTS", "")), *config.getini("addopts")]
    known, _ = parser.parse_known_args([*addopts, *map(str, config.invocation_params.args)])
    config.option.benchmark_compare_fail = known.benchmark_compare_fail or config.option.benchmark_compare_fail


def name_autosave(config) -> None:
    """Name the file of `--benchmark-autosave` after the commit of the rootdir; pytest-benchmark asks the working folder."""
    if config.option.benchmark_autosave:
        with _working_in(config.rootpath):
            config.option.benchmark_autosave = get_tag(config.getoption("benchmark_project_name", None))


def commit_info(config) -> dict:
    """`commit_info` of a saved run, of the rootdir."""
    return commit_of(config.rootpath, config.getoption("benchmark_project_name", None))


def commit_of(folder: Path, project: str | None = None) -> dict:
    """`commit_info` of a saved run, of the repository of a folder."""
    with _working_in(folder):
        return get_commit_info(project)


@contextlib.contextmanager
def _working_in(folder: Path) -> Iterator[None]:
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
