"""Fixtures of the tests."""

from __future__ import annotations

import pytest
from agreement import SEED


@pytest.fixture
def seed() -> int:
    """For random inputs: a new one every run, printed where a test fails, repeated by SD_PERF_SEED."""
    print(f"repeat with SD_PERF_SEED={SEED}")
    return SEED
