"""Settings of a measuring session."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from perf.configurations.configuration import Configuration
from perf.launch.process import Interpreter
from perf.session.plan import Loading, Slot
from perf.session.runner import Limits

CLOCKS = ("wall", "cpu")  # perf.worker.clock.CLOCKS


class SessionError(Exception):
    """A session that cannot start or resume; the message names the cause and the remedy."""


class SessionRefused(SessionError):
    """A device or an option that the first worker rejects, before anything is measured: a usage error."""


@dataclass(frozen=True)
class Settings:
    """The options of a session, independent of the configurations to measure.

    launches: of each configuration. looks: for pairs, numbers of launches after which they are judged; more than the first
    are measured only where a pair is undecided. rounds: of each launch. most_rounds: of a launch of
    pairs that `rounds` do not settle; 0 for no more. loading: which slots are loaded together, None to choose by memory.
    clock: `wall` or `cpu`. threads: torch's CPU threads, None on a GPU for its
    default. isolated: each launch in a fresh process. resume: the name of the unfinished session to resume, True for the
    one whose plan matches. interpreters: other Pythons by label. against: (short hash, interpreter with its `sd`) of
    another commit. aa: measure every configuration against itself. second: the configuration of --perf-b to compare each
    one with, by id. slowdown: fraction by which the working tree is slowed, to test the verdicts. margin: the smallest
    relevant change, as a fraction. folder: of the journal and the reference images. trace: folder for profiler traces,
    None for none. compile_cache: a folder that persists between sessions; without one the first launch of each
    configuration compiles from scratch. counting: whether to count operators, which takes one untimed round.
    selection: the options that choose the configurations, as text.
    directory: where engines of the user's own run and are found.
    rootpath, pytest_arguments: the root of the user's suite and the options of pytest, for its tests.
    """

    device: str
    folder: Path
    clock: str = "wall"
    threads: int | None = None
    launches: int = 10
    looks: tuple[int, ...] = ()
    loading: Loading | None = None
    rounds: int = 2
    most_rounds: int = 0
    isolated: bool = True
    resume: bool | str = False
    interpreters: dict[str, Interpreter] = field(default_factory=dict)
    against: tuple[str, Interpreter] | None = None
    aa: bool = False
    second: dict[str, Configuration] = field(default_factory=dict)
    slowdown: float = 0.0
    margin: float = 0.01
    limits: Limits = field(default_factory=Limits)
    trace: Path | None = None
    compile_cache: Path | None = None
    counting: bool = True
    selection: str = "default"
    directory: Path = field(default_factory=Path.cwd)
    rootpath: Path = field(default_factory=Path.cwd)
    pytest_arguments: tuple[str, ...] = ()

    @property
    def variant(self) -> str | None:
        """The second label of every configuration in this session, if any."""
        return "base" if self.against else "b" if self.second else "aa" if self.aa else None

    def slots(self, configuration: Configuration) -> list[Slot]:
        """A configuration's slots: its own, and that of its variant."""
        own, variant = Slot(configuration), self.variant
        if self.second:
            return [own, Slot(self.second[configuration.id], variant, configuration.id)]
        return [own, Slot(configuration, variant)] if variant else [own]

    def other_name(self, id: str) -> str | None:
        """The name of what a configuration is compared with in this session: a commit or the id of --perf-b."""
        return self.second[id].id if self.second else self.against_name

    @property
    def against_name(self) -> str | None:
        """The short hash of the other commit, if any."""
        return self.against[0] if self.against else None
