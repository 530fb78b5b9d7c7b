"""Format numbers, units and names for readers; escape foreign texts for Markdown, CSV and file names."""

from __future__ import annotations

import re
from collections.abc import Iterable

UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"), (1e-9, "ns"))


def seconds(value: float | None) -> str:
    """Four digits in the largest unit that keeps them above 1, such as `412.3 ms`; `-` for None."""
    if value is None:
        return "-"
    factor, unit = unit_of(value)
    return f"{value / factor:.4g} {unit}"


def unit_of(value: float) -> tuple[float, str]:
    """The largest unit of time in which a value is at least 1: its seconds and its name."""
    return next((pair for pair in UNITS if value >= pair[0]), UNITS[-1])


def interval_seconds(value: float, low: float | None = None, high: float | None = None) -> str:
    """A time with its interval, if known, all in one unit and with about three digits: `412 [409, 415] ms`."""
    factor, unit = UNITS[0 if value >= 1 else 1]
    digits = max(0, 3 - len(str(int(value / factor)))) if value / factor >= 1 else 3
    middle, *bounds = (f"{number / factor:.{digits}f}" for number in (value, low, high) if number is not None)
    return f"{middle} [{', '.join(bounds)}] {unit}" if bounds else f"{middle} {unit}"


def counted(count: int, noun: str, plural: str | None = None) -> str:
    """A number with its noun: `1 image`, `2 images`."""
    return f"{count} {noun if count == 1 else plural or noun + 's'}"


def counted_range(counts: Iterable[int], noun: str, plural: str | None = None) -> str:
    """The least and the greatest of some numbers with their noun: `2 launches`, `8 to 24 launches`."""
    ordered = sorted(counts) or [0]
    most = counted(ordered[-1], noun, plural)
    return most if ordered[0] == ordered[-1] else f"{ordered[0]} to {most}"


def size(value: float | None) -> str:
    """Bytes in GiB, or in MiB below one; empty for None."""
    if value is None:
        return ""
    return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"


def markdown(text: str) -> str:
    """Escape a foreign text for a Markdown table: no markup, links, mentions or further cells."""
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*_{}\[\]()#+!|~])", r"\\\1", text)
    return text.replace("@", "@\u200b").replace("://", ":\u200b//")


def markdown_table(header: list[str], rows: list[list[str]], numeric_from: int = 1) -> str:
    """A table of escaped cells; columns from `numeric_from` on are aligned right."""
    rule = ["---" if column < numeric_from else "---:" for column in range(len(header))]
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *rows)) + "\n"


def csv_cell(value: object) -> object:
    """Prevent a spreadsheet from reading a cell as a formula (OWASP, CSV injection)."""
    if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r"):
        return "'" + value
    return value


def file_name(text: str) -> str:
    """Replace every character that is not safe in all file systems and URLs."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.")[:120] or "unnamed"


def joined_name(*parts: str) -> str:
    """A file name of several parts, separated by underscores."""
    return file_name(re.sub(r"[,:]? ", "_", "_".join(part for part in parts if part)))
