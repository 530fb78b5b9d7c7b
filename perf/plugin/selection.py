"""Selection of configurations: named sets as markers, options crossed into them, and the default set of a machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from perf.configurations.configuration import Configuration, UnknownChoice, usual
from perf.configurations.project import Project
from perf.configurations.sets import SETS, SUMMARIES, cross, suiting
from perf.plugin.options import disabled

MATRIX = "matrix"  # the marker of the configurations that options alone describe


def markers(project: Project = Project()) -> list[str]:
    """Lines for pytest's list of markers."""
    lines = [f"{name}: {summary}" for name, summary in {**SUMMARIES, **project.summaries}.items()]
    lines.append("overhead: measures the harness itself; runs only if its file is named")
    return [*lines, f"{MATRIX}: the configurations that --model, --attention and the other matrix options describe"]


def parameters(values: dict[str, list], device: str, project: Project = Project()) -> list:
    """Every configuration of every set as a pytest.param, with its sets as marks.

    Options replace the fields that they name in every set: `-m published --model tiny` is the article's five on the
    embedded model. Raises pytest.UsageError for contradictory values.
    """
    sets = {**SETS, **project.sets}
    if values:
        model = values.get("model", ["sd2" if device == "cuda" else "tiny"])[0]
        sets[MATRIX] = [usual(model)]
    sets_of: dict[Configuration, list[str]] = {}
    by_id: dict[str, Configuration] = {}
    for name, configurations in sets.items():
        try:
            for configuration in cross(configurations, values):
                sets_of.setdefault(configuration, []).append(name)
        except UnknownChoice as error:
            raise pytest.UsageError(str(error)) from None
    for configuration in sets_of:
        other = by_id.setdefault(configuration.id, configuration)
        if other != configuration:
            raise pytest.UsageError(
                f"two configurations are both called {configuration.id}: {other!r} and {configuration!r}"
            )
    return [
        pytest.param(configuration, id=configuration.id, marks=[getattr(pytest.mark, name) for name in names])
        for configuration, names in sets_of.items()
    ]


def with_interpreters(values: dict[str, list], labels: list[str]) -> dict[str, list]:
    """The values with the interpreters of --perf-python crossed in, this process's own first."""
    return {**values, "interpreter": [None, *labels]} if labels else values


def select(config, items: list, values: dict[str, list], device: str) -> list:
    """The items to run: those of the options, else of the machine's default set; all if a marker expression is given.

    A test id with a configuration in it adds that configuration. Other benchmarks marked `slow` or `overhead` run only if
    their file is named, or with --benchmark-disable.
    """
    if config.option.markexpr:
        return items
    ours = config.pluginmanager.hasplugin("perf.plugin")  # not a suite that has its own meaning of `slow`
    marker, named = MATRIX if values else suiting(device), named_tests(config)
    files = {Path(argument.partition("::")[0]).name for argument in config.args}

    def selected(item) -> bool:
        if configuration_of(item) is None:
            marks = ("slow", "overhead")
            aside = any(map(item.get_closest_marker, marks)) and "benchmark" in getattr(item, "fixturenames", ())
            return not (aside and ours) or disabled(config) or item.path.name in files
        return item.get_closest_marker(marker) is not None or item.nodeid.partition("::")[2] in named

    return [item for item in items if selected(item)]


def described(config, values: dict[str, list]) -> str:
    """The options that select configurations, as text for a saved run: two complete sessions of equal text are alike.

    Of a suite that is not this one also the paths, since its tests are what is measured.
    """
    named = {"-m": config.option.markexpr, **{f"--perf-{side}": config.getoption(f"perf_{side}") for side in "ab"}}
    options = [f"{option} {value}" for option, value in named.items() if value]
    options += [f"{field} {', '.join(map(str, given))}" for field, given in sorted(values.items())]
    if not config.pluginmanager.hasplugin("perf.plugin"):
        options += [str(argument) for argument in config.args if Path(argument) != config.rootpath]
    return ascii("; ".join(options))[1:-1][:1000] or "default"


def named_tests(config) -> set[str]:
    """The tests named by id on the command line (`FILE::test_txt2img[ID]`), without the file."""
    return {argument.partition("::")[2] for argument in config.args if "::" in argument and "[" in argument}


def narrowed(config) -> bool:
    """Whether options other than -m leave out some of the tests."""
    return any(config.getoption(name, None) for name in ("keyword", "deselect", "lf", "stepwise"))


def test_of(item) -> Configuration | None:
    """The configuration of a test of the user's own suite that requests `measured`, or None for any other test."""
    return Configuration(engine=item.nodeid) if "measured" in getattr(item, "fixturenames", ()) else None


def configuration_of(item) -> Configuration | None:
    """The configuration that a test measures, or None for any other test."""
    if "perf_session" not in getattr(item, "fixturenames", ()):
        return None
    return getattr(item, "callspec", None) and item.callspec.params.get("configuration")
