"""Numbers and names as a reader sees them, and texts of others made safe for Markdown."""

from __future__ import annotations

import re

from perf.report.spread import Spread


def seconds(value: float) -> str:
    """Four digits with the unit that keeps them readable: `412.3 ms`."""
    for factor, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if value >= factor:
            return f"{value / factor:.4g} {unit}"
    return f"{value / 1e-9:.4g} ns"


def span(value: float, low: float, high: float) -> str:
    """A time with its interval, all in one unit: `412 [409, 415] ms`."""
    factor, unit = (1.0, "s") if value >= 1 else (1e-3, "ms")
    digits = max(0, 3 - len(str(int(value / factor)))) if value / factor >= 1 else 3
    return f"{value / factor:.{digits}f} [{low / factor:.{digits}f}, {high / factor:.{digits}f}] {unit}"


def bounded(found: Spread, form: str) -> str:
    """A value with its bounds, where it has any, all in one form."""
    value, *bounds = (form.format(one) for one in (found.value, found.low, found.high) if one is not None)
    return f"{value} [{', '.join(bounds)}]" if bounds else value


def spread_seconds(found: Spread) -> str:
    """A time with its interval, or alone where it has none."""
    if found.low is None or found.high is None:
        return seconds(max(0.0, found.value))
    return span(found.value, found.low, found.high)


def size(value: float | None) -> str:
    """Bytes in GiB, or in MiB where that is more readable; empty where they are not known."""
    if value is None:
        return ""
    return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"


def markdown(text: str) -> str:
    """A text that others chose, as plain text in a Markdown table: neither markup, links, mentions nor cells of its own."""
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*_{}\[\]()#+!|~])", r"\\\1", text)
    return text.replace("@", "@\u200b").replace("://", ":\u200b//")


def markdown_table(header: list[str], rows: list[list[str]], numeric_from: int = 1) -> str:
    """A table whose cells are Markdown already; columns from `numeric_from` on are aligned right."""
    rule = ["---" if column < numeric_from else "---:" for column in range(len(header))]
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *rows)) + "\n"


def csv_cell(value: object) -> object:
    """A cell that no spreadsheet takes for a formula (OWASP, CSV injection)."""
    if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r"):
        return "'" + value
    return value


def file_name(text: str) -> str:
    """Only what every file system and URL takes as it is."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.")[:120] or "unnamed"


def words_name(*parts: str) -> str:
    """A file name of words: what separates them becomes one _."""
    return file_name(re.sub(r"[,:]? ", "_", "_".join(part for part in parts if part)))
