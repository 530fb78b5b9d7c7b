"""Which tests a run has: the named sets as markers, options that cross into them, and what is left out when nothing is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from perf.configurations.configuration import Configuration, UnknownChoice, usual
from perf.configurations.sets import SETS, SUMMARIES, cross, suiting
from perf.plugin.options import disabled

MATRIX = "matrix"  # the marker of what options alone describe


def markers() -> list[str]:
    """Lines for pytest's list of markers."""
    lines = [f"{name}: {SUMMARIES[name]}" for name in SETS]
    return [*lines, f"{MATRIX}: what --model, --attention and their sisters describe, crossed"]


def parameters(values: dict[str, list], device: str) -> list:
    """Every configuration of every set, with the sets it belongs to as marks.

    Options change the fields that they name in every set: `-m published --model tiny` is the article's five on the
    embedded model. Raises pytest.UsageError for values that contradict each other.
    """
    sets = dict(SETS)
    if values:
        first = values.get("model", ["sd2" if device == "cuda" else "tiny"])[0]
        sets[MATRIX] = [usual(first)]
    belongs: dict[Configuration, list[str]] = {}
    for name, configurations in sets.items():
        try:
            for configuration in cross(configurations, values):
                belongs.setdefault(configuration, []).append(name)
        except UnknownChoice as error:
            raise pytest.UsageError(str(error)) from None
    return [
        pytest.param(one, id=one.id, marks=[getattr(pytest.mark, name) for name in names])
        for one, names in _distinct(belongs)
    ]


def _distinct(belongs: dict[Configuration, list[str]]):
    seen: dict[str, Configuration] = {}
    for configuration, names in belongs.items():
        other = seen.setdefault(configuration.id, configuration)
        if other != configuration:
            raise pytest.UsageError(
                f"two configurations are both called {configuration.id}: {other!r} and {configuration!r}"
            )
        yield configuration, names


def with_interpreters(values: dict[str, list], labels) -> dict[str, list]:
    """The values with every other Python crossed in, this one first."""
    return {**values, "interpreter": [None, *labels]} if labels else values


def leave_out(config, items: list, values: dict[str, list], device: str) -> list:
    """The items that stay when no set is named: what options describe, else the set that suits the machine.

    A marker expression, or an id with the configuration in it, names what is wanted. Benchmarks of another kind that
    are `slow` are for who names their file, and for a run that measures nothing.
    """
    if config.option.markexpr:
        return items
    wanted, named = MATRIX if values else suiting(device), named_tests(config)
    files = {Path(argument.partition("::")[0]).name for argument in config.args}

    def stays(item) -> bool:
        if configuration_of(item) is None:
            slow = item.get_closest_marker("slow") and "benchmark" in getattr(item, "fixturenames", ())
            return not slow or disabled(config) or item.path.name in files
        return item.get_closest_marker(wanted) is not None or item.nodeid.partition("::")[2] in named

    return [item for item in items if stays(item)]


def named_tests(config) -> set[str]:
    """The tests that the command line names one by one: `FILE::test_txt2img[ID]`, without the file."""
    return {argument.partition("::")[2] for argument in config.args if "::" in argument and "[" in argument}


def configuration_of(item) -> Configuration | None:
    """The configuration that a test measures, or None for any other test."""
    if "perf_session" not in getattr(item, "fixturenames", ()):
        return None
    return getattr(item, "callspec", None) and item.callspec.params.get("configuration")
