"""Documents for tests: fenced blocks with the rule of their comment, links, anchors, and a copy of the repository."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md"))]
SHELLS = ("bash", "sh", "console")
# Reasons to skip a block; any text may follow.
REASONS = ("needs a GPU", "needs a checkpoint", "needs a network", "needs a cluster", "takes minutes")
COMMENTS = {
    "not run": re.compile(rf"not run: (?P<reason>{'|'.join(REASONS)})\b.*"),
    "run with": re.compile(r"run with (?P<arguments>-.*?): .+"),
    "may exit": re.compile(r"may exit (?P<status>\d+): .+"),
    "extra": re.compile(r"needs the extra (?P<extra>report|peers)"),
    "put into": re.compile(r"put into (?P<file>\S+) before `(?P<before>.+)`"),
}
EXTRAS = {"report": ("jinja2", "matplotlib"), "peers": ("diffusers", "transformers")}
BLOCK = re.compile(
    r"(?:^<!-- (?P<comment>[^\n]*) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)
SOURCES = ("sd", "perf", "tests", "docs", "examples", "constraints", "conftest.py", "pyproject.toml", "README.md")
COPIED = (*SOURCES, ".gitignore")
PROGRAMS = {
    "pytest": "pytest",
    "pytest-benchmark": "pytest_benchmark",
    "txt2img": "sd.txt2img",
    "img2img": "sd.img2img",
    "inpaint": "sd.inpaint",
    "depth2img": "sd.depth2img",
    "sd-convert": "sd.convert",
    "sd-perf": "perf",
}


@dataclass(frozen=True)
class Block:
    """A fenced block. rule: a key of COMMENTS, `run` without a comment, None for an unknown comment."""

    document: Path
    line: int
    language: str
    text: str
    rule: str | None
    values: dict[str, str]

    @property
    def where(self) -> str:
        """File and line."""
        return f"{self.document.relative_to(ROOT)}:{self.line}"

    def commands(self) -> list[str]:
        """Commands of a shell block; of a console block those after the $."""
        lines = self.text.splitlines()
        if self.language == "console":
            lines = [line[2:] for line in lines if line.startswith("$ ")]
        return [line for line in lines if line.strip() and not line.lstrip().startswith("#")]

    def script(self) -> str:
        """Script for bash, which ends at the first failing command, except for an allowed status."""
        commands = self.commands()
        if self.rule == "run with":
            commands = [f"{command} {self.values['arguments']}" for command in commands]
        if self.rule == "may exit":
            commands = [f"{command} || [ $? -eq {self.values['status']} ]" for command in commands]
        return "\n".join(["set -euo pipefail", *commands])


def blocks(document: Path) -> list[Block]:
    """Fenced blocks of a document, in order."""
    text, result = document.read_text(encoding="utf-8"), []
    for match in BLOCK.finditer(text):
        rule, values = ("run", {}) if match["comment"] is None else (None, {})
        for name, pattern in COMMENTS.items():
            if parsed := pattern.fullmatch(match["comment"] or ""):
                rule, values = name, parsed.groupdict()
        line = text.count("\n", 0, match.start("text"))
        result.append(Block(document, line, match["language"], match["text"], rule, values))
    return result


def without_code(text: str) -> str:
    """Text of a document without blocks and `code`, which contain no links."""
    return re.sub(r"`[^`\n]*`", "", BLOCK.sub("", text))


def links(document: Path) -> list[str]:
    """Targets of all links and images."""
    return re.findall(r"\]\(([^()\s]+)\)", without_code(document.read_text(encoding="utf-8")))


def anchors(document: Path) -> set[str]:
    """Anchors of the headings, in GitHub's spelling."""
    headings = re.findall(r"^#+ (.+)$", BLOCK.sub("", document.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def copy_of_the_repository(folder: Path) -> Path:
    """Copy the files that documented commands need, with an environment that runs this Python."""
    folder.mkdir()
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name)
        else:
            shutil.copy2(ROOT / name, folder / name)
    programs = folder / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name, module in {"python": "", **PROGRAMS}.items():
        program = programs / name
        program.write_text(f'#!/bin/sh\nexec "{sys.executable}" {f"-m {module}" if module else ""} "$@"\n')
        program.chmod(0o755)
    (folder / "tmp").mkdir()
    (folder / "tmp" / ".gitignore").write_text("*\n")
    for command in (["init", "-q"], ["add", "-A"]):  # files that appear later are untracked
        subprocess.run(["git", *command], cwd=folder, check=True, capture_output=True)
    return folder


def environment(folder: Path) -> dict[str, str]:
    """Environment variables that activate the copy's environment; temporary files stay inside the copy."""
    temporary = folder / "tmp"
    temporary.mkdir(exist_ok=True)
    removed = ("PYTEST_ADDOPTS", "PYTHONDONTWRITEBYTECODE", "USE_XFORMERS", "ATTN_PRECISION", "PYTEST_CURRENT_TEST")
    inherited = {name: value for name, value in os.environ.items() if name not in removed}
    return {
        **inherited,
        "PATH": os.pathsep.join([str(folder / ".venv" / "bin"), os.environ["PATH"]]),
        "PYTHONPATH": str(folder),
        "TMPDIR": str(temporary),
        "COLUMNS": "150",
    }
