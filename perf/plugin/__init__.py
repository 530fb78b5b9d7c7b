"""The pytest plugin of the suite.

An installed sd-perf loads perf.plugin.hooks by its entry point: inert until a test requests `measured` or an option --perf-* is
given. This module, which a clone's conftest.py and `-p perf.plugin` load, adds the short names of the matrix options.
"""

from __future__ import annotations

NAME = "sd_perf"  # of the entry point


def pytest_addoption(parser, pluginmanager):
    """Add the short names of the options, and the hooks unless the entry point has."""
    from perf.plugin import hooks, options

    options.add_short_options(parser)
    if not pluginmanager.is_registered(hooks):
        pluginmanager.register(hooks, NAME)
