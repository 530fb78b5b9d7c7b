"""What a report shows of saved runs: validated values, read defensively, one `Result` a configuration of a session.

Needs neither torch nor pytest. perf.runs.saved_run reads what a verdict rests on; this reads the rest by the same rules. Keys
that a run does not have are None: older and newer runs stand in one report.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from perf.analysis.ranking import sort_by_seconds
from perf.analysis.statistics import Interval
from perf.configurations.configuration import is_approximate, technique, usual_precision
from perf.report.spread import Spread, over_launches, value_alone
from perf.runs.saved_run import SavedBenchmark, SavedRun, load, parse, root_of

KNOWN_GPU = re.compile(r"\b(P100|T4|A10G?|V100|A100|A800|H100|H200|B200|GH200|L40S?|L4|A\d{4}|RTX \w+(?: Ti)?)\b")
STAGES = ("text", "unet", "vae")
STAGES_ALONE = "no interval: saved before the stages of each round were"


@dataclass(frozen=True)
class Facets:
    """What a reader filters by, as texts."""

    model: str
    gpu: str
    batch: str
    torch: str
    attention: str


@dataclass(frozen=True)
class Session:
    """One saved run and the machine it was made on. `synthetic` says that no machine has measured it, and why."""

    saved: SavedRun
    document: Mapping[str, object]
    torch: str
    facts: Mapping[str, object]
    ceilings: Mapping[str, float]  # measured FLOP/s of matrix products, by dtype
    copy_bytes_per_second: float | None  # measured, read and written
    commit: str | None
    rounds: int | None
    launches: int | None
    synthetic: str | None

    @property
    def name(self) -> str:
        """Such as `0007_nightly`."""
        return self.saved.name

    @property
    def started(self) -> float:
        """Unix seconds; 0 where it is not known."""
        return self.saved.started_unix_seconds or 0.0

    @property
    def gpu(self) -> str:
        """The device's short name, such as `A100`."""
        return short_device(str(self.facts.get("name") or "unknown device"))

    @property
    def machine(self) -> str:
        """What tells this machine and its way of measuring from others, for a reader."""
        clock = ", CPU time" if self.facts.get("clock") == "cpu" else ""
        made = ", synthetic" if self.synthetic else ""
        return f"{self.gpu}{clock}{made}"

    @property
    def identity(self) -> tuple:
        """All that has to be alike for two sessions to be of one machine and stack."""
        return tuple(str(value) for value in self.saved.machine.values())


@dataclass(frozen=True)
class Result:
    """One configuration of a session. Seconds are per round unless the name says otherwise; a round makes `batch` images."""

    session: Session
    benchmark: SavedBenchmark
    model: str
    technique: str  # the configuration's id without model, work and batch
    attention: str
    batch: int
    steps: int
    sampler: str
    size: tuple[int, int]  # height and width in pixels, 0 for the model's own
    compile: str
    workload: str
    torch: str
    stages: Mapping[str, Spread] = field(default_factory=dict)  # wall seconds, and `other` where rounds were saved
    peak_bytes: float | None = None
    flops: float | None = None
    floor_bytes: float | None = None  # the fewest that a round can move
    flops_fraction: float | None = None
    amortise: tuple[int | None, int | None, int | None] | None = None  # images: estimate, low, high; None for never
    first_call: tuple[float | None, float | None] = (None, None)  # cold and warm
    speedup: Interval | None = None
    speedup_against: str | None = None
    psnr_db: float | None = None
    latent_relative_error: float | None = None
    approximate: bool = False  # another picture by intent
    image_reference: str | None = None
    kernels: tuple[str, ...] = ()
    trace: Mapping[str, float] = field(default_factory=dict)  # seconds of one round, by class of kernel
    joules: Spread | None = None  # per image

    @property
    def id(self) -> str:
        """The configuration's id."""
        return self.benchmark.id

    @functools.cached_property
    def spread(self) -> Spread:
        """Seconds per image: the median launch with its interval."""
        return over_launches(self.benchmark.launches).over(self.batch)

    @property
    def seconds_per_image(self) -> float:
        """Median over launches."""
        return self.spread.value

    @property
    def interval(self) -> tuple[float, float]:
        """Seconds per image: the exact 95 % interval of the median launch, or from under 6 launches their range."""
        return self.spread.low, self.spread.high

    @property
    def interval_name(self) -> str:
        """What `interval` is."""
        return self.spread.name

    @property
    def verdict(self) -> str | None:
        """The verdict's word, where this was compared with something; INVALID for a wrong picture."""
        if self.benchmark.image_failure:
            return "INVALID"
        return self.benchmark.decision.verdict.value if self.benchmark.decision else None

    @property
    def work(self) -> tuple:
        """What has to be alike for times to be of the same work, but for the batch."""
        return self.model, self.workload, self.steps, self.sampler, self.size

    @property
    def work_name(self) -> str:
        """Such as `sd2` or `tiny, ddim 20 steps`."""
        parts = [self.model] + ([self.workload] if self.workload != "txt2img" else [])
        if (self.sampler, self.steps) != ("plms", 50):
            parts.append(f"{self.sampler} {self.steps} steps")
        if any(self.size):
            parts.append(f"{self.size[0] or 'native'}x{self.size[1] or 'native'} px")
        return ", ".join(parts)

    @property
    def facets(self) -> Facets:
        """What a reader filters by."""
        return Facets(self.model, self.session.gpu, str(self.batch), self.torch, self.attention)


def short_device(name: str) -> str:
    """`NVIDIA A100-SXM4-80GB` -> `A100`; a CPU's name without its marks of trade."""
    found = KNOWN_GPU.search(name)
    if found:
        return found[1]
    cleaned = re.sub(r"\((?:R|TM)\)|\b(?:NVIDIA|CPU|Processor)\b|@.*$", " ", name, flags=re.IGNORECASE)
    return " ".join(cleaned.split()) or name


def read_session(path: Path) -> tuple[Session, list[Result]]:
    """A saved run as a report shows it. Raises BaselineError (perf.runs.saved_run)."""
    return session_of(load(path), path)


def session_of(document: object, path: Path) -> tuple[Session, list[Result]]:
    """The same of a parsed document; results without a round are left out."""
    saved = parse(document, path)
    root = root_of(document, path)
    stack = {} if saved.plain else root["machine_info"]["stack"].object()
    scalars = {key: value for key, value in stack.items() if isinstance(value, (str, int, float, bool))}
    ceilings = stack.get("matmul_flops_per_second")
    commit = root["commit_info"]["id"].optional_text() if isinstance(root["commit_info"].value, dict) else None
    perf = None if saved.plain else root["perf"]
    session = Session(
        saved=saved,
        document=root.object(),
        torch=str(saved.machine.get("torch") or "unknown"),
        facts={**scalars, **{key: value for key, value in saved.machine.items() if value is not None}},
        ceilings={key: value for key, value in ceilings.items() if _positive(value)}
        if isinstance(ceilings, dict)
        else {},
        copy_bytes_per_second=stack["copy_bytes_per_second"] if _positive(stack.get("copy_bytes_per_second")) else None,
        commit=commit,
        rounds=_whole(perf["rounds"].optional_number(1, 1e6)) if perf else None,
        launches=_whole(perf["launches"].optional_number(1, 1e6)) if perf else None,
        synthetic=root["synthetic"].optional_text(),
    )
    nodes = root["benchmarks"].items()
    results = []
    for benchmark, node in zip(saved.benchmarks, nodes):
        if benchmark.variant is None and benchmark.configuration is not None and benchmark.launch_medians:
            results.append(_result(session, benchmark, node["extra_info"]))
    return session, results


def _result(session: Session, benchmark: SavedBenchmark, info) -> Result:
    wanted = info["configuration"]

    def text(key: str, usual: str) -> str:
        return wanted[key].optional_text() or usual

    model, attention = text("model", "unknown"), text("attention", "unknown")
    image = info["image"] if info["image"].value is not None else None
    first = info["first_call_seconds"] if info["first_call_seconds"].value is not None else None
    amortise = info["images_to_amortise"] if info["images_to_amortise"].value is not None else None
    facts = info["facts"] if info["facts"].value is not None else None
    against, speedup = _speedup(info["speedup"])
    return Result(
        session=session,
        benchmark=benchmark,
        model=model,
        technique=_technique(wanted, model, attention),
        attention=attention,
        batch=_whole(wanted["batch"].number(1, 1e6)),
        steps=_whole(wanted["steps"].optional_number(1, 1e6) or 50),
        sampler=text("sampler", "plms"),
        size=tuple(_whole(wanted[key].optional_number(0, 1e6) or 0) for key in ("height", "width")),
        compile=text("compile", "none"),
        workload=text("workload", "txt2img"),
        torch=(facts["torch"].optional_text() if facts else None) or session.torch,
        stages=_stages(session, benchmark, info),
        peak_bytes=benchmark.peak_bytes,
        flops=info["flops"].optional_number(0, 1e30),
        floor_bytes=info["floor_bytes"].optional_number(0, 1e30),
        flops_fraction=info["flops_fraction"].optional_number(0, 1e6),
        amortise=tuple(_whole(amortise[key].optional_number(0, 1e15)) for key in ("estimate", "low", "high"))
        if amortise
        else None,
        first_call=tuple(first[key].optional_number() for key in ("cold", "warm")) if first else (None, None),
        speedup=speedup,
        speedup_against=against,
        psnr_db=image["psnr_db"].optional_number(-1e3, 1e3) if image else None,
        latent_relative_error=image["latent_relative_error"].optional_number(0, 1e30) if image else None,
        approximate=is_approximate(_optimise(wanted)),
        image_reference=image["reference"].optional_text() if image else None,
        kernels=_kernels(info["kernel"]),
        trace=_numbers(info["trace"]["seconds"]) if isinstance(info["trace"].value, dict) else {},
        joules=_joules(benchmark, info["telemetry"], _whole(wanted["batch"].number(1, 1e6))),
    )


def _optimise(wanted) -> str:
    return wanted["optimise"].text() if wanted["optimise"].value else ""


def _technique(wanted, model: str, attention: str) -> str:
    """The way it is made, by which a configuration has its colour: `mha-mem_efficient-compile`."""
    kernels = wanted["sdpa_kernels"]
    values = {
        "model": model,
        "engine": wanted["engine"].optional_text() or "sd",
        "attention": attention,
        "sdpa_kernels": [node.text() for node in kernels.items()] if kernels.value is not None else [],
        "optimise": _optimise(wanted),
        "compile": wanted["compile"].optional_text() or "none",
        "compile_scope": wanted["compile_scope"].optional_text() or "unet",
        "precision": wanted["precision"].optional_text() or usual_precision(model),
    }
    engine = [] if values["engine"] == "sd" else [values["engine"]]
    where = (wanted["device"].optional_text(), wanted["interpreter"].optional_text())
    return "-".join([*engine, *technique(values), *filter(None, where)])


def _numbers(node, keys: Iterable[str] | None = None) -> dict[str, float]:
    if node.value is None:
        return {}
    found = {}
    for key in keys or [key for key in node.object() if key.isprintable() and len(key) < 100]:
        number = node[key].optional_number(0, 1e12)
        if number is not None:
            found[key] = number
    return found


def _speedup(node) -> tuple[str | None, Interval | None]:
    if node.value is None:
        return None, None
    low, high = node["low"].optional_number(0, 1e30), node["high"].optional_number(0, 1e30)
    estimate = node["estimate"].number(0, 1e30)
    bounded = low is not None and high is not None
    return node["against"].optional_text(), Interval(estimate, low, high) if bounded else Interval.point(estimate)


def _kernels(node) -> tuple[str, ...]:
    if not isinstance(node.value, dict):
        return ()
    names = [one.text() for kernels in node.value for one in node[kernels].items()]
    return tuple(dict.fromkeys(names))


def _stages(session: Session, benchmark: SavedBenchmark, info) -> dict[str, Spread]:
    """Seconds of a round by stage, over launches where each round's were saved."""
    alone, rounds = _numbers(info["stages"], STAGES), {}
    for launch in info["launches"].items():
        if launch["stage_seconds"].value is None:
            return _stages_alone(session, benchmark, alone)
        count, invalid = len(launch["round_seconds"].items()), launch["invalid"].object()
        for name in launch["stage_seconds"].object():
            if name not in (*STAGES, "other"):
                continue
            seconds = launch["stage_seconds"][name]
            if len(seconds.items()) != count:
                seconds.fail(f"has {len(seconds.items())} rounds, not {count}")
            kept = [one.optional_number(-1e7, 1e7) for at, one in enumerate(seconds.items()) if str(at) not in invalid]
            rounds.setdefault(name, []).append([one for one in kept if one is not None])
    return {name: over_launches(launches) for name, launches in rounds.items() if any(launches)}


def _stages_alone(session: Session, benchmark: SavedBenchmark, found: dict[str, float]) -> dict[str, Spread]:
    """Those of a run that has only their medians; under a clock of CPU time what they leave of it says nothing."""
    if found and session.facts.get("clock") != "cpu":
        found["other"] = max(0.0, benchmark.session_median - sum(found.values()))
    return {name: value_alone(value, STAGES_ALONE) for name, value in found.items()}


def _joules(benchmark: SavedBenchmark, telemetry, batch: int) -> Spread | None:
    """Joules of an image, over launches where the telemetry of each round was saved."""
    saved = benchmark.joules_per_image
    ones = telemetry.items() if telemetry.value is not None else []
    left = iter(one["joules"].optional_number(0, 1e12) if isinstance(one.value, dict) else None for one in ones)
    launches = [list(itertools.islice(left, len(rounds))) for rounds in benchmark.launches]
    known = [[joules for joules in rounds if joules is not None] for rounds in launches]
    if saved is None or not any(known):
        return None if saved is None else value_alone(saved, "no interval: no round's own was saved")
    return over_launches(known).over(batch)


def _whole(number: float | None) -> int | None:
    return None if number is None else int(number)


def _positive(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < 1e30


def newest(results: Iterable[Result]) -> list[Result]:
    """Of each configuration on each machine and stack its last session: what stands in every chart but the history."""
    latest: dict[tuple, Result] = {}
    for result in sorted(results, key=lambda one: (one.session.started, one.session.name)):
        latest[(result.session.identity, result.torch, result.id)] = result
    return list(latest.values())


def ranked(results: Iterable[Result]) -> list[Result]:
    """From the fastest image to the slowest; those whose picture is wrong last, for they have no time."""
    return sort_by_seconds(
        results, lambda result: result.seconds_per_image, lambda result: result.benchmark.image_failure is not None
    )
