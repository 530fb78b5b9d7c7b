"""Inner `pytest` runs with the real plugin and pytest-benchmark on a synthetic machine without worker processes.

`Machine` replaces the worker processes of a session: it implements their protocol with seeded log-normal durations. `Inner`
is a folder with one measured test, run by pytester in this process.
"""

from __future__ import annotations

import contextlib
import copy
import json
import random
import shutil
import statistics
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import rich._emoji_codes
import rich.progress
import rich.table  # noqa: F401

import perf.session.record  # noqa: F401 (pytester removes modules that an inner run imports first)
from perf.configurations.configuration import from_dict
from perf.launch.process import ROOT
from perf.machine.nvml import NoTelemetry
from perf.machine.stack import torch_version
from perf.worker.wire import WorkerError

SEED = 20_240
CONFTEST = 'pytest_plugins = ["perf.plugin"]\n'
MEASURED = (ROOT / "perf" / "test_txt2img.py").read_text(encoding="utf-8")
ONE = ("--attention=sdpa", "--steps=2")  # one configuration: tiny-sdpa-plms2-b1
TWO = ("--attention=original", "--attention=sdpa", "--steps=2")
# Warnings are errors, but for one of inner sessions in this process: modules of an installed sd-perf are imported already.
STRICT = ("-W", "error", "-W", "ignore::pytest.PytestAssertRewriteWarning")
SDPA, ORIGINAL = "tiny-sdpa-plms2-b1", "tiny-original-plms2-b1"


class Machine:
    """A synthetic machine that replaces worker processes; tests set its fields.

    slow: factor of the working tree by configuration id; base_slow: of another commit. offset: factor of the machine,
    reference workload included. noise: standard deviation of the log seconds of a round. drift: relative slowdown of the
    reference workload by the end of the session. compile_seconds: of a first call with a cold cache. wrong: ids with
    wrong images. refused: {id: (kind, message)} of failing loads. no_device: the error of the probe. interrupt_after:
    rounds until Ctrl-C. more: operators that the working tree has beyond the other commit and earlier sessions.
    """

    def __init__(self, seed: int = SEED):
        self.draw = random.Random(seed)
        self.slow: dict[str, float] = {}
        self.base_slow = 1.0
        self.offset, self.noise, self.drift = 1.0, 0.0005, 0.0
        self.compile_seconds, self.compiled = 2.0, set()
        self.wrong: set[str] = set()
        self.refused: dict[str, tuple[str, str]] = {}
        self.no_device: str | None = None
        self.interrupt_after: int | None = None
        self.more: dict[str, int] = {}
        self.rounds = 0  # including warm-up rounds
        self.opened: list = []  # the interpreter of every process
        self.commands: list = []  # its command, None for that of a worker

    def __call__(self, interpreter, command: list[str] | None = None) -> _Launch:
        self.opened.append(interpreter)
        self.commands.append(command)
        return _Launch(self, interpreter)


class _Launch:
    """One synthetic process."""

    pid = 0

    def __init__(self, machine: Machine, interpreter):
        self.machine, self.base = machine, interpreter.source != ROOT
        self.configuration = None
        self.factor = 1.0  # of this process alone

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def send(self, operation: str, **arguments) -> None:
        self.sent = (operation, arguments)

    def receive(self, timeout_seconds: float) -> dict:
        operation, arguments = self.sent
        return self.ask(operation, timeout_seconds, **arguments)

    def ask(self, operation: str, timeout_seconds: float, **arguments) -> dict:
        """The response of perf.worker.server."""
        return getattr(self, "_" + operation)(**arguments)

    def _probe(self, device, clock, threads, configurations):
        if self.machine.no_device:
            raise WorkerError("unavailable", self.machine.no_device)
        return {"uuid": None, "matmul_flops_per_second": {"float32": 1e11}, "copy_bytes_per_second": 1e10}

    def _load(self, configuration, device, clock, threads, slowdown=0.0, own=None):
        self.configuration, self.slowdown = from_dict(configuration), slowdown
        refusal = self.machine.refused.get(self.configuration.id + ("@base" if self.base else ""))
        if refusal:
            raise WorkerError(*refusal)
        facts = {"device": device, "torch": torch_version("__version__"), "threads": threads}
        return {
            "import_seconds": 1.0,
            "load_seconds": 0.5,
            "anchor": "synthetic-anchor-1",
            "precision": self.configuration.precision,
            "compiles": self.configuration.compile != "none",
            "sd": "sd",
            "facts": facts,
            "pid": 1,
        }

    def _prepare(self, seed):
        return {}

    def _round(self, seed):
        machine, configuration = self.machine, self.configuration
        machine.rounds += 1
        if machine.interrupt_after is not None and machine.rounds > machine.interrupt_after:
            raise KeyboardInterrupt
        factor = machine.base_slow if self.base else machine.slow.get(configuration.id, 1.0) * (1 + self.slowdown)
        seconds = 0.2 * machine.offset * self.factor * factor * machine.draw.lognormvariate(0, machine.noise)
        self.seed = seed
        cold = configuration.compile != "none" and configuration.id not in machine.compiled
        machine.compiled.add(configuration.id)
        return {
            "started_unix_seconds": time.time(),
            "seconds": seconds,
            "wall_seconds": seconds + machine.compile_seconds * cold,
            "device_seconds": None,
            "stages": {"text": 0.1 * seconds, "unet": 0.7 * seconds, "vae": 0.2 * seconds},
            "unet_calls": configuration.steps + 1,
            "work": {"flops": 10**9 * (configuration.steps + 1), "minimum_bytes": 10**8},
            "peak_bytes": {"allocated": None, "reserved": None, "rss": 300 << 20},
            "kernels": {"unet": ["math"]},
            "compile": {"graphs": int(configuration.compile != "none"), "graph_breaks": 0, "recompiles": 0},
        }

    def _examine(self, check=None):
        machine = self.machine
        wrong = check and self.configuration.id in machine.wrong
        image = {
            "sha256": f"{self.seed:064x}",
            "finite": True,
            "constant": False,
            "latent_relative_error": 0.5 if wrong else 1e-6,
            "psnr_db": 20.0 if wrong else 80.0,
        }
        return {"anchor_seconds": 0.01 * machine.offset * (1 + machine.drift * (machine.rounds > 8)), "image": image}

    def _count(self, seed):
        operators = Counter({"addmm": 20, "add": 5}) + Counter({} if self.base else self.machine.more)
        return {"operators": dict(operators), "bytes": 10**9, "host_waits": 0, "generated_kernels": 0}

    def _write_reference(self, path):
        Path(path).touch()
        return {"path": path}


class Inner:
    """A folder with a conftest, an ini file and one measured test, `suite/test_measured.py`."""

    def __init__(self, pytester, machine: Machine):
        self.pytester, self.machine, self.path = pytester, machine, pytester.path
        pytester.makeini(
            "[pytest]\naddopts = --strict-markers -p no:cacheprovider -p no:hypothesispytest -p no:anyio -p no:cov\n"
        )
        pytester.makeconftest(CONFTEST)
        (self.path / "suite").mkdir()
        (self.path / "suite" / "test_measured.py").write_text(MEASURED, encoding="utf-8")

    def run(self, *arguments, launches: int | None = 2, rounds: int | None = 2, what=ONE, plugins=()):
        """Run pytest in this process; `what` holds the matrix options. launches, rounds: None for the suite's own choice."""
        options = {"--perf-launches": launches, "--perf-rounds": rounds}
        requested = [f"{option}={value}" for option, value in options.items() if value is not None]
        # As in a fresh process: until an inner run has read its markers, pytest would look for them in those of the outer one.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pytest.mark, "_config", None)
            result = self.pytester.runpytest_inprocess(*arguments, *what, *requested, plugins=plugins)
        self.output = result.stdout.str() + result.stderr.str() + f"\n(seed {SEED})"
        return result

    def prints(self, *texts: str) -> None:
        """Assert that each text is in one line of the last output."""
        lines = self.output.splitlines()
        for text in texts:
            assert any(text in line for line in lines), f"{text!r} was not printed:\n{self.output}"

    def prints_no(self, *texts: str) -> None:
        """Assert that no text is in the last output."""
        assert not [text for text in texts if text in self.output], self.output

    @property
    def storage(self) -> Path:
        """The folder of this machine's saved runs."""
        (folder,) = (self.path / ".benchmarks").iterdir()
        return folder

    def saved(self, folder: Path | None = None) -> list[Path]:
        """The saved runs, oldest first."""
        return sorted((folder or self.path).rglob("[0-9]*_*.json"), key=lambda path: path.name)

    def last(self) -> dict:
        """The newest saved run."""
        return json.loads(self.saved()[-1].read_text(encoding="utf-8"))

    def store(self, sessions: int, offset: float = 0.03, **options) -> list[Path]:
        """Save sessions of an unchanged tree: one measured, the others derived from it with random machine offsets."""
        first = self.run("--benchmark-save=nightly", **{"what": ONE, "launches": 6, **options})
        assert first.ret == 0, self.output
        path, draw = self.saved()[-1], random.Random(SEED)
        document = json.loads(path.read_text(encoding="utf-8"))
        for number in range(1, sessions + 1):
            made = another_day(document, number, draw.lognormvariate(0, offset), draw)
            (path.parent / f"{number:04d}_nightly.json").write_text(json.dumps(made), encoding="utf-8")
        self.machine.offset = draw.lognormvariate(0, offset)
        return self.saved()


def another_day(document: dict, number: int, offset: float, draw: random.Random) -> dict:
    """The same session on another day: `offset` applies to the reference workload too; the rounds have 0.2 % more noise."""
    made = copy.deepcopy(document)
    made["perf"]["started_unix_seconds"] += float(number) - 1000.0
    for benchmark in made["benchmarks"]:
        info, own = benchmark["extra_info"], offset * draw.lognormvariate(0, 0.002)
        for launch in info["launches"]:
            launch["round_seconds"] = [seconds * own for seconds in launch["round_seconds"]]
        info["anchor"] = [[seconds * offset for seconds in launch] for launch in info["anchor"]]
        data = [seconds for launch in info["launches"] for seconds in launch["round_seconds"]]
        benchmark["stats"].update(data=data, median=statistics.median(data), min=min(data), max=max(data))
    return made


@pytest.fixture(name="machine")
def machine_fixture() -> Machine:
    """A machine with little noise."""
    return Machine()


@pytest.fixture(name="inner")
def inner_fixture(pytester, machine, monkeypatch, tmp_path) -> Inner:
    """A folder to run pytest in, on the synthetic machine, which has no GPU."""
    frequencies = iter(range(1_000_000))  # pytest-benchmark treats another frequency as another machine
    monkeypatch.setattr("perf.session.workers.ProcessLaunch", machine)
    monkeypatch.setattr("perf.plugin.state.open_visible_device", lambda: NoTelemetry("a test"))
    # One order of rounds, since the noise of a round depends on the rounds before it.
    monkeypatch.setattr("perf.session.run.random", SimpleNamespace(randrange=lambda limit: 1))
    monkeypatch.setattr("perf.session.lock.lock_folder", lambda: tmp_path / "locks")
    monkeypatch.setattr(
        "pytest_benchmark.plugin.get_cpu_info",  # the real one takes a second
        lambda: {"brand_raw": "Synthetic CPU", "hz_actual": next(frequencies), "hz_actual_friendly": "1 GHz"},
    )
    for name in ("PYTEST_ADDOPTS", "CUDA_VISIBLE_DEVICES", "RUNNER_ENVIRONMENT"):
        monkeypatch.delenv(name, raising=False)
    return Inner(pytester, machine)


def fill_disk_for(monkeypatch, ending: str) -> None:
    """Simulate a full disk for files with this ending, at their renaming into place."""
    replace = shutil.os.replace

    def refuse(source, target, **options):
        if str(target).endswith(ending):
            raise OSError(28, "No space left on device", str(target))
        return replace(source, target, **options)

    monkeypatch.setattr("os.replace", refuse)


def watched_by(monkeypatch, invalid, telemetry: dict | None = None) -> None:
    """Replace telemetry: invalid(n) is the reason why the n-th timed round is invalid, or None."""
    tries = iter(range(1_000_000))

    @contextlib.contextmanager
    def watch(pid):
        yield SimpleNamespace(telemetry=telemetry, invalid=invalid(next(tries)))

    monkeypatch.setattr("perf.session.run.no_watch", watch)
