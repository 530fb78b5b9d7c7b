"""How a session measures, as its options say. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from perf.launch.process import Interpreter
from perf.session.runner import Limits

CLOCKS = ("wall", "cpu")  # perf.worker.clock.CLOCKS


class SessionError(Exception):
    """A session that cannot start or go on; the message says why and what to do."""


@dataclass(frozen=True)
class Settings:
    """How a session measures.

    clock: `wall` or `cpu`. threads: of torch on the CPU, None for torch's own choice. isolated: each launch in a fresh
    process. interpreters: other Pythons by label. against: (name, interpreter with its `sd`) of another commit. aa: every
    configuration against itself. slowdown: a fraction by which the working tree is slowed, for tests of the gate.
    margin: the change that counts, as a fraction. folder: where the journal and the reference pictures are.
    trace: where a traced round of each configuration goes, None for none.
    """

    device: str
    folder: Path
    clock: str = "wall"
    threads: int | None = None
    launches: int = 10
    rounds: int = 2
    isolated: bool = True
    resume: bool = False
    interpreters: dict[str, Interpreter] = field(default_factory=dict)
    against: tuple[str, Interpreter] | None = None
    aa: bool = False
    slowdown: float = 0.0
    margin: float = 0.01
    limits: Limits = field(default_factory=Limits)
    trace: Path | None = None
    compile_cache: Path | None = None  # kept between sessions; without it a configuration's first launch compiles anew

    @property
    def variant(self) -> str | None:
        """The second label that every configuration has in this session, if any."""
        return "base" if self.against else "aa" if self.aa else None

    @property
    def side_by_side(self) -> bool:
        """Whether variants are loaded together: not on a GPU, whose memory may hold one, and which is not so noisy."""
        return self.device == "cpu"
