"""`--perf-a OPTIONS --perf-b OPTIONS`: two configurations as the two sides of one paired comparison."""

from __future__ import annotations

import argparse
import shlex
from dataclasses import dataclass, replace
from typing import NoReturn

import pytest

from perf.configurations.configuration import Configuration, UnknownChoice, usual
from perf.configurations.project import Project
from perf.configurations.sets import cross
from perf.launch.process import Interpreter
from perf.plugin import options
from perf.session.settings import Settings


@dataclass(frozen=True)
class Side:
    """The configuration fields that one side sets, each with one value, and its interpreter by label."""

    option: str
    values: dict[str, list]
    interpreters: dict[str, Interpreter]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise pytest.UsageError(f"{self.prog}: {message}")


def read(config) -> tuple[Side, Side] | None:
    """Both sides, or None without them. Raises pytest.UsageError."""
    texts = {option: config.getoption(option[2:].replace("-", "_")) for option in ("--perf-a", "--perf-b")}
    if not any(texts.values()):
        return None
    for option, text in texts.items():
        if not text:
            raise pytest.UsageError(f"{option} is missing: --perf-a and --perf-b are the two sides of one comparison")
    project = options.project(config)
    first, second = (_side(option, text, project) for option, text in texts.items())
    return first, second


def _side(option: str, text: str, project: Project) -> Side:
    parser = _Parser(prog=option, add_help=False, allow_abbrev=False)
    for name, field, convert, _ in options.MATRIX:
        parser.add_argument(name, dest=field, action="append", type=convert)
    parser.add_argument("--perf-python", dest="interpreter", action="append")
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise pytest.UsageError(f"{option} {text!r}: {error}") from None
    given = {field: values for field, values in vars(parser.parse_args(words)).items() if values}
    repeated = [field for field, values in given.items() if len(values) > 1]
    if repeated:
        raise pytest.UsageError(f"{option} {text!r}: {repeated[0]} has several values; a side is one configuration")
    interpreters = dict(map(options.interpreter, given.get("interpreter", ())))
    return Side(
        option,
        options.require_weights(given | ({"interpreter": [*interpreters]} if interpreters else {}), project),
        interpreters,
    )


def pairs(first: Side, second: Side, values: dict[str, list], device: str) -> list[tuple[Configuration, Configuration]]:
    """The compared configurations: the options outside the two sides are common, and crossed. Raises pytest.UsageError."""
    model = next((given["model"][0] for given in (values, first.values, second.values) if "model" in given), None)
    bases = [usual(model or ("sd2" if device == "cuda" else "tiny"))]
    try:
        compared = [(cross([base], first.values)[0], cross([base], second.values)[0]) for base in cross(bases, values)]
    except UnknownChoice as error:
        raise pytest.UsageError(str(error)) from None
    compared = list(dict.fromkeys(compared))
    for one, other in compared:
        if one == other:
            raise pytest.UsageError(f"--perf-a and --perf-b are both {one.id}; --perf-aa compares it with itself")
    if len({one.id for one, _ in compared}) < len(compared):
        raise pytest.UsageError("--perf-a replaces an option that has several values outside: give it there only")
    return compared


def add_interpreters(settings: Settings, pair: tuple[Side, Side]) -> Settings:
    """The settings with the interpreters of both sides. Raises pytest.UsageError if a label has two."""
    interpreters = dict(settings.interpreters)
    for side in pair:
        for label, interpreter in side.interpreters.items():
            if interpreters.setdefault(label, interpreter) != interpreter:
                raise pytest.UsageError(
                    f"{side.option}: the label {label} of --perf-python stands for two interpreters"
                )
    if interpreters and not settings.isolated:
        raise pytest.UsageError("--perf-inprocess has one interpreter: leave out --perf-python")
    return replace(settings, interpreters=interpreters)
