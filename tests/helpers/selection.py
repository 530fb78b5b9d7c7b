"""Which parameters of a slow test run at every change, and which only at night."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def slow_or_nightly(values: Iterable[Any], at_every_change: Callable[[Any], bool]) -> list[Any]:
    """`values` as parameters: those of `at_every_change` are marked slow, the others nightly."""
    return [
        pytest.param(value, marks=pytest.mark.slow if at_every_change(value) else pytest.mark.nightly)
        for value in values
    ]
