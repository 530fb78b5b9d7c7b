"""Fixtures that tests/ and perf/ share. Being here, it also puts the repository root on the import path."""

pytest_plugins = ["perf.plugin", "pytester"]
