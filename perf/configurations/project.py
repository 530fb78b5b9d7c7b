"""The configuration file of a user's project: `perf.toml`, or `[tool.sd-perf]` in `pyproject.toml`.

    margin = 0.02  # the smallest change that counts

    [engines]
    mine = "engines.py:Engine"  # a name for `--engine`

    [sets.nightly]
    summary = "our pipeline in both precisions"
    configurations = [{ engine = "mine", precision = "full" }, { engine = "mine", precision = "bf16" }]
    batch = [1, 4]  # crossed with each of them

Unknown keys are errors.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

from perf.configurations.configuration import ENGINES, Configuration, UnknownChoice, from_dict, is_own, usual
from perf.configurations.sets import SETS, cross

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # a dependency of pytest there

FILE, TABLE = "perf.toml", "sd-perf"
SMALLEST_MARGIN = 0.01  # perf.analysis.statistics.MARGIN_FLOOR


class ProjectError(ValueError):
    """An invalid configuration file; the message names the file and the key."""


@dataclass(frozen=True)
class Project:
    """Sets, engines and margin of the user's own. summaries: a sentence per set. margin: a fraction, None for ours."""

    sets: dict[str, list[Configuration]] = field(default_factory=dict)
    summaries: dict[str, str] = field(default_factory=dict)
    engines: dict[str, str] = field(default_factory=dict)
    margin: float | None = None


def read_project(root: Path) -> Project:
    """The project of a folder; an empty one without a file. Raises ProjectError."""
    tables = dict(_tables(root))
    if len(tables) > 1:
        raise ProjectError(f"{' and '.join(map(str, tables))} both configure sd-perf: keep one")
    for path, table in tables.items():
        return _Reader(path, root).project(table)
    return Project()


def find_root(folder: Path) -> Path:
    """The folder or its nearest parent with a configuration file, within its git repository. Raises ProjectError."""
    for each in (folder, *folder.parents):
        if _tables(each):
            return each
        if (each / ".git").exists():
            break
    return folder


def _tables(root: Path) -> list[tuple[Path, Any]]:
    tables = []
    for path, keys in ((root / FILE, ()), (root / "pyproject.toml", ("tool", TABLE))):
        if not path.is_file():
            continue
        try:
            table: Any = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            if keys:  # another tool reports it
                continue
            raise ProjectError(f"{path}: {error}") from None
        for key in keys:
            table = table.get(key) if isinstance(table, dict) else None
        if table is not None:
            tables.append((path, table))
    return tables


@dataclass(frozen=True)
class _Reader:
    path: Path
    root: Path

    def project(self, table: Any) -> Project:
        """The project of a table."""
        table = self._table(table, "", ("margin", "engines", "sets"))
        margin = table.get("margin")
        if margin is not None and not (type(margin) is float and SMALLEST_MARGIN <= margin < 1):
            self._fail("margin", f"{margin!r} is no fraction of at least {SMALLEST_MARGIN}")
        engines = {}
        for name, target in self._table(table.get("engines", {}), "engines").items():
            if name in ENGINES or not name.isidentifier():
                self._fail(f"engines.{name}", "choose another name")
            if not is_own(target):
                self._fail(f"engines.{name}", f"{target!r} is not FILE.py:NAME or MODULE:NAME")
            path, colon, attribute = target.partition(":")
            if path.endswith(".py"):  # of the file's folder; the engine runs in the working directory
                path = Path(os.path.relpath(self.root / path)).as_posix()
            engines[name] = path + colon + attribute
        sets, summaries = {}, {}
        for name, content in self._table(table.get("sets", {}), "sets").items():
            if name in SETS or not name.isidentifier():
                self._fail(
                    f"sets.{name}", "is the name of a set of sd-perf" if name in SETS else "is no name of a marker"
                )
            summaries[name], sets[name] = self._set(f"sets.{name}", content, engines)
        return Project(sets, summaries, engines, margin)

    def _set(self, key: str, content: Any, engines: Mapping[str, str]) -> tuple[str, list[Configuration]]:
        names = [field.name for field in fields(Configuration)]
        content = self._table(content, key, ("summary", "configurations", *names))
        listed = content.get("configurations", [{}])
        if not isinstance(listed, list) or not listed:
            self._fail(f"{key}.configurations", "is no list of tables")
        summary = content.get("summary", f"{len(listed)} configurations of {self.path.name}")
        if not isinstance(summary, str):
            self._fail(f"{key}.summary", "is no text")
        crossed = {name: values for name, values in content.items() if name in names}
        for name, values in crossed.items():
            if not isinstance(values, list) or not values:
                self._fail(f"{key}.{name}", "is no list of values")
            for value in values:
                self._require_value(f"{key}.{name}", name, value)
        crossed |= {"engine": [engines.get(name, name) for name in crossed["engine"]]} if "engine" in crossed else {}
        try:
            members = [self._configuration(f"{key}.configurations", values, names, engines) for values in listed]
            return summary, cross(members, crossed)
        except (UnknownChoice, TypeError) as error:
            self._fail(key, str(error))

    def _configuration(self, key: str, values: Any, names: list[str], engines: Mapping[str, str]) -> Configuration:
        values = self._table(values, key, names)
        for name, value in values.items():
            self._require_value(f"{key}.{name}", name, value)
        if "engine" in values:
            values = {**values, "engine": engines.get(values["engine"], values["engine"])}
        base = usual(values.get("model", Configuration.model))
        if is_own(values.get("engine")):
            base = Configuration(engine=values["engine"])
        return from_dict({**base.as_dict(), **values})

    def _require_value(self, key: str, name: str, value: Any) -> None:
        """Fail unless the value has the type of the field and its sign: TOML's `20` and `"20"` differ."""
        default = getattr(Configuration(), name)
        expected = type("" if default is None else default)  # the optional fields are texts
        accepted = {float: (float, int), tuple: (list,)}.get(expected, (expected,))
        if type(value) not in accepted:
            nouns = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", tuple: "a list"}
            self._fail(key, f"{value!r} is not {nouns[expected]}")
        if expected in (int, float) and value < (least := int(name in ("batch", "steps"))):
            self._fail(key, f"{value!r} is below {least}")

    def _table(self, value: Any, key: str, known: Any = None) -> dict[str, Any]:
        if not isinstance(value, dict):
            self._fail(key or "the file", "is no table")
        unknown = sorted(set(value) - set(known)) if known is not None else []
        if unknown:
            self._fail(".".join(filter(None, (key, unknown[0]))), f"is unknown; choose from {', '.join(known)}")
        return value

    def _fail(self, key: str, reason: str) -> NoReturn:
        raise ProjectError(f"{self.path}: {key}: {reason}")
