"""Fixtures of the tests."""

from __future__ import annotations

import sys

import pytest
from agreement import SEED


def pytest_collection_modifyitems(config, items):
    """Leave out slow tests, unless -m or the name of a test selects them."""
    if config.option.markexpr or any("::" in argument for argument in config.args):
        return
    left_out = {item for name in ("slow", "nightly") for item in items if item.get_closest_marker(name)}
    if left_out:
        config.hook.pytest_deselected(items=[*left_out])
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture(autouse=True)
def _outside_of_xdist(monkeypatch, tmp_path_factory):
    """A test that runs pytest itself runs it alone, however many tests run beside each other.

    The locks of devices are in the folder for temporary files, which differs between the processes of pytest-xdist.
    """
    monkeypatch.setenv("TMPDIR", str(tmp_path_factory.getbasetemp()))
    for name in ("PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(autouse=True)
def _threads_of_torch():
    """Restore the number of threads, which command lines choose for their process.

    Two threads for each of two tests at a time, on two cores, wait for each other many times longer than they compute.
    """
    torch = sys.modules.get("torch")  # imported when the tests were collected, if at all
    before = torch.get_num_threads() if torch else None
    yield
    if torch and torch.get_num_threads() != before:
        torch.set_num_threads(before)


@pytest.fixture
def seed() -> int:
    """For random inputs: a new one every run, printed where a test fails, repeated by SD_PERF_SEED."""
    print(f"repeat with SD_PERF_SEED={SEED}")
    return SEED
