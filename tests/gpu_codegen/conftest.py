"""Tests of generated GPU code run only where they are selected: they take minutes of CPU time."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(config, items):
    if "gpu_codegen" not in config.option.markexpr:
        for item in items:
            if item.get_closest_marker("gpu_codegen"):
                item.add_marker(pytest.mark.skip(reason="takes minutes; run with -m gpu_codegen"))
