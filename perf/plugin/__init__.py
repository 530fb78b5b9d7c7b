"""The pytest plugin: `-p perf.plugin` where perf is installed; the conftest.py of a clone loads it."""

pytest_plugins = ["perf.plugin.hooks"]
