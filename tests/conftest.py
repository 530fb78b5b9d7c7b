"""Fixtures of the tests."""

from __future__ import annotations

import pytest
from agreement import SEED


@pytest.fixture(autouse=True)
def _outside_of_xdist(monkeypatch):
    """A test that runs pytest itself runs it alone, however many tests run beside each other."""
    for name in ("PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def seed() -> int:
    """For random inputs: a new one every run, printed where a test fails, repeated by SD_PERF_SEED."""
    print(f"repeat with SD_PERF_SEED={SEED}")
    return SEED
