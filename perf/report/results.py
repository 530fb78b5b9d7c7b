"""Saved runs as a report shows them: validated values, one `Result` per configuration of a session.

Needs neither torch nor pytest. perf.runs.saved_run reads the values of verdicts; this module reads the others by the same
rules. Keys missing from a run are None, so that older and newer runs stand in one report.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from perf.analysis import ranking
from perf.analysis.counts import CountsComparison
from perf.analysis.statistics import Interval
from perf.configurations.configuration import (
    engine_name,
    images_per_round,
    is_approximate,
    is_reference,
    name_of_work,
    sampling,
    technique,
    usual_precision,
)
from perf.report.estimate import Estimate
from perf.report.text import interval_seconds
from perf.runs.history import MACHINE
from perf.runs.saved_run import SavedBenchmark, SavedRun, load, parse, root_of

KNOWN_GPU = re.compile(r"\b(P100|T4|A10G?|V100|A100|A800|H100|H200|B200|GH200|L40S?|L4|A\d{4}|RTX \w+(?: Ti)?)\b")
STAGES = ("text", "encode", "unet", "vae", "forward", "backward", "optimiser", "average")


@dataclass(frozen=True)
class Facets:
    """The values that the page filters by."""

    model: str
    gpu: str
    batch: str
    torch: str
    attention: str


@dataclass(frozen=True)
class SavedSession:
    """A saved run with its machine. synthetic: why no machine has measured it, None for a measured run."""

    saved: SavedRun
    document: Mapping[str, object]
    torch: str
    facts: Mapping[str, object]
    ceilings: Mapping[str, float]  # measured peak FLOP/s of matrix products, by dtype
    copy_bytes_per_second: float | None  # measured, read and written
    commit: str | None
    rounds: int | None
    launches: int | None
    synthetic: str | None

    @property
    def name(self) -> str:
        """The stem of the file, such as `0007_nightly`."""
        return self.saved.name

    @property
    def started(self) -> float:
        """Unix seconds; 0 if unknown."""
        return self.saved.started_unix_seconds or 0.0

    @property
    def order(self) -> tuple[float, str]:
        """Sort key of sessions by time."""
        return self.started, self.name

    @property
    def gpu(self) -> str:
        """Short name of the device, such as `A100`; of a CPU with its processor, since several share a name."""
        processor = f" ({self.facts['processor']})" if self.facts.get("processor") else ""
        return short_device(str(self.facts.get("name") or "unknown device")) + processor

    @property
    def machine(self) -> str:
        """Device, clock and whether the run is synthetic, for titles."""
        clock = ", CPU time" if self.facts.get("clock") == "cpu" else ""
        return f"{self.gpu}{clock}{', synthetic' if self.synthetic else ''}"

    @property
    def device(self) -> tuple[str, ...]:
        """Facts that are equal for sessions of the same machine, whatever its software."""
        return tuple(str(self.saved.machine[key]) for key in MACHINE)

    @property
    def stamp(self) -> str:
        """`INVALID` or `drifted` for a session whose times are no evidence or approximate, else empty."""
        return "INVALID" if self.saved.invalid else "drifted" if self.saved.drifted else ""

    @property
    def identity(self) -> tuple[str, ...]:
        """Facts that are equal for sessions of the same machine and software stack."""
        return tuple(str(value) for value in self.saved.machine.values())


@dataclass(frozen=True)
class Result:
    """One configuration of a session. Seconds are per round unless named otherwise; a round makes `images` images."""

    session: SavedSession
    benchmark: SavedBenchmark
    model: str
    technique: str  # the configuration's id without model, workload and batch
    attention: str
    batch: int
    steps: int
    sampler: str
    sampling: tuple[str, ...]  # parts of the id for timestep spacing, sigmas and guidance scale
    size: tuple[int, int]  # height and width in pixels, 0 for the model's own
    compile: str
    workload: str
    torch: str
    stages: Mapping[str, Estimate] = field(default_factory=dict)  # wall seconds; `other` only if saved per round
    peak_bytes: float | None = None
    flops: float | None = None
    floor_bytes: float | None = None  # minimum bytes that a round moves
    flops_fraction: float | None = None  # of the measured peak FLOP/s
    amortise: tuple[int | None, int | None, int | None] | None = None  # images: estimate, low, high; None for never
    first_call: tuple[float | None, float | None] = (None, None)  # cold and warm
    speedup: Interval | None = None
    speedup_against: str | None = None
    psnr_db: float | None = None
    latent_relative_error: float | None = None
    approximate: bool = False  # the image differs from the reference by design
    image_reference: str | None = None
    kernels: tuple[str, ...] = ()  # of attention, as recorded during the run
    trace: Mapping[str, float] = field(default_factory=dict)  # seconds of one round by kernel class
    joules: Estimate | None = None  # per image
    counts: CountsComparison | None = None

    @property
    def images(self) -> int:
        """Images of a round: more than `batch` in training, where a round has several steps."""
        return images_per_round(vars(self))

    @property
    def id(self) -> str:
        """The configuration's id."""
        return self.benchmark.id

    @functools.cached_property
    def time(self) -> Estimate:
        """Seconds per image."""
        return Estimate.over_launches(self.benchmark.launches).per(self.images)

    @property
    def seconds_per_image(self) -> float:
        """Median over launches."""
        return self.time.value

    @property
    def interval(self) -> tuple[float, float]:
        """Seconds per image: 95 % interval of the median launch; for a single launch the range of the rounds."""
        return self.time.low, self.time.high

    @property
    def interval_name(self) -> str:
        """The kind of `interval`."""
        return self.time.name

    @property
    def verdict(self) -> str | None:
        """The verdict's code; INVALID for a failed image check or session, None if nothing was compared."""
        if self.benchmark.image_failure or self.session.saved.invalid:
            return "INVALID"
        return self.benchmark.decision.verdict.value if self.benchmark.decision else None

    @property
    def reason(self) -> str:
        """The verdict in full, with ratio and reason code; empty if nothing was compared."""
        if self.benchmark.image_failure:
            return f"INVALID (wrong_image {self.benchmark.image_failure})"
        if self.session.saved.invalid:
            return f"INVALID ({self.session.saved.invalid})"
        return str(self.benchmark.decision or "")

    @property
    def marks(self) -> tuple[str, ...]:
        """`INVALID`, `drifted` and `approximate`, as they apply."""
        return ranking.marks(self.verdict == "INVALID", bool(self.session.saved.drifted), self.approximate)

    @property
    def work(self) -> tuple:
        """Values that are equal for results of the same work, the batch apart."""
        return self.model, self.workload, self.steps, self.sampler, self.sampling, self.size

    @property
    def work_name(self) -> str:
        """The work for titles, such as `sd2` or `tiny, ddim 20 steps`."""
        return name_of_work(self.model, self.workload, self.sampler, self.steps, self.size, self.sampling)

    @property
    def label(self) -> str:
        """Configuration, machine and torch version, for rows of tables."""
        return f"{self.id}, {self.session.machine}, torch {self.torch}"

    @property
    def facets(self) -> Facets:
        """The values that the page filters by."""
        return Facets(self.model, self.session.gpu, str(self.batch), self.torch, self.attention)


def short_device(name: str) -> str:
    """Shorten a device name: `NVIDIA A100-SXM4-80GB` to `A100`, a CPU's name without trademarks and clock."""
    known = KNOWN_GPU.search(name)
    if known:
        return known[1]
    cleaned = re.sub(r"\((?:R|TM)\)|\b(?:NVIDIA|CPU|Processor)\b|@.*$", " ", name, flags=re.IGNORECASE)
    return " ".join(cleaned.split()) or name


def read_session(path: Path) -> tuple[SavedSession, list[Result]]:
    """Read a saved run. Raises BaselineError (perf.runs.saved_run)."""
    return session_of(load(path), path)


def session_of(document: object, path: Path) -> tuple[SavedSession, list[Result]]:
    """Read a parsed saved run; results without a valid round are left out. Raises BaselineError."""
    saved = parse(document, path)
    root = root_of(document, path)
    stack = {} if saved.plain else root["machine_info"]["stack"].object()
    scalars = {key: value for key, value in stack.items() if isinstance(value, (str, int, float, bool))}
    ceilings, copy_rate = stack.get("matmul_flops_per_second"), stack.get("copy_bytes_per_second")
    perf = _part(root, "perf")
    session = SavedSession(
        saved=saved,
        document=root.object(),
        torch=str(saved.machine.get("torch") or "unknown"),
        facts={**scalars, **{key: value for key, value in saved.machine.items() if value is not None}},
        ceilings={key: value for key, value in ceilings.items() if _positive(value)}
        if isinstance(ceilings, dict)
        else {},
        copy_bytes_per_second=copy_rate if _positive(copy_rate) else None,
        commit=root["commit_info"]["id"].optional_text() if isinstance(root["commit_info"].value, dict) else None,
        rounds=_whole(perf["rounds"].optional_number(1, 1e6)),
        launches=_whole(perf["launches"].optional_number(1, 1e6)),
        synthetic=root["synthetic"].optional_text(),
    )
    return session, [
        _result(session, benchmark, node["extra_info"])
        for benchmark, node in zip(saved.benchmarks, root["benchmarks"].items())
        if benchmark.variant is None and benchmark.configuration is not None and benchmark.launch_medians
    ]


def _part(node, key: str):
    """A child node; an empty object where it is missing."""
    child = node[key]
    return dataclasses.replace(child, value={}) if child.value is None else child


def _result(session: SavedSession, benchmark: SavedBenchmark, info) -> Result:
    configuration = info["configuration"]

    def option(key: str, default: str) -> str:
        return configuration[key].optional_text() or default

    model, attention = option("model", "unknown"), option("attention", "unknown")
    batch, workload = _whole(configuration["batch"].number(1, 1e6)), option("workload", "txt2img")
    steps = _whole(configuration["steps"].optional_number(1, 1e6) or 50)
    optimise = configuration["optimise"].text() if configuration["optimise"].value else ""
    kernels = configuration["sdpa_kernels"]
    technique_options = {
        "model": model,
        "engine": option("engine", "sd"),
        "attention": attention,
        "sdpa_kernels": [node.text() for node in kernels.items()] if kernels.value is not None else [],
        "optimise": optimise,
        "lora_rank": _whole(configuration["lora_rank"].number(0, 1e6)) if configuration["lora_rank"].value else 0,
        "checkpointing": bool(configuration["checkpointing"].value),
        "compile": option("compile", "none"),
        "compile_scope": option("compile_scope", "unet"),
        "compile_backend": option("compile_backend", "inductor"),
        "precision": option("precision", usual_precision(model)),
    }
    scale = configuration["scale"].optional_number(0, 1e6)
    scale = 7.5 if scale is None else scale  # as in files of the first release
    image, first_call, speedup = (_part(info, key) for key in ("image", "first_call_seconds", "speedup"))
    amortise = info["images_to_amortise"]
    return Result(
        session=session,
        benchmark=benchmark,
        model=model,
        technique="-".join(
            [
                *([] if technique_options["engine"] == "sd" else [engine_name(technique_options["engine"])]),
                *technique(technique_options),
                *filter(None, (configuration[key].optional_text() for key in ("device", "interpreter"))),
            ]
        ),
        attention=attention,
        batch=batch,
        steps=steps,
        sampler=option("sampler", "plms"),
        sampling=tuple(
            sampling(configuration["timestep_spacing"].optional_text(), option("sigmas", "schedule"), scale)
        ),
        size=tuple(_whole(configuration[key].optional_number(0, 1e6) or 0) for key in ("height", "width")),
        compile=technique_options["compile"],
        workload=workload,
        torch=_part(info, "facts")["torch"].optional_text() or session.torch,
        stages=_stages(session, benchmark, info),
        peak_bytes=benchmark.peak_bytes,
        flops=info["flops"].optional_number(0, 1e30),
        floor_bytes=info["floor_bytes"].optional_number(0, 1e30),
        flops_fraction=info["flops_fraction"].optional_number(0, 1e6),
        amortise=None
        if amortise.value is None
        else tuple(_whole(amortise[key].optional_number(0, 1e15)) for key in ("estimate", "low", "high")),
        first_call=(first_call["cold"].optional_number(), first_call["warm"].optional_number()),
        speedup=_interval(speedup) if speedup.value else None,
        speedup_against=speedup["against"].optional_text(),
        psnr_db=image["psnr_db"].optional_number(-1e3, 1e3),
        latent_relative_error=image["latent_relative_error"].optional_number(0, 1e30),
        approximate=is_approximate(optimise),
        image_reference=image["reference"].optional_text(),
        kernels=_kernels(info["kernel"]),
        trace=_numbers(info["trace"]["seconds"]) if isinstance(info["trace"].value, dict) else {},
        counts=_counts(info["counts_comparison"]),
        joules=_joules(
            benchmark, info["telemetry"], images_per_round({"batch": batch, "steps": steps, "workload": workload})
        ),
    )


def _counts(node) -> CountsComparison | None:
    if node.value is None:
        return None
    changes = tuple(change.text() for change in node["changes"].items())
    return CountsComparison(node["against"].text(), changes, node["not_compared"].optional_text())


def _numbers(node, keys: Sequence[str] = ()) -> dict[str, float]:
    if node.value is None:
        return {}
    printable = [key for key in node.object() if key.isprintable() and len(key) < 100]
    numbers = {key: node[key].optional_number(0, 1e12) for key in keys or printable}
    return {key: number for key, number in numbers.items() if number is not None}


def _kernels(node) -> tuple[str, ...]:
    if not isinstance(node.value, dict):
        return ()
    return tuple(dict.fromkeys(kernel.text() for network in node.value for kernel in node[network].items()))


def _interval(node) -> Interval:
    low, high = (node[key].optional_number(0, 1e30) for key in ("low", "high"))
    estimate = node["estimate"].number(0, 1e30)
    return Interval.point(estimate) if low is None or high is None else Interval(estimate, low, high)


def _stages(session: SavedSession, benchmark: SavedBenchmark, info) -> dict[str, Estimate]:
    """Seconds of a round by stage, over launches if those of each round were saved."""
    medians, launches = _numbers(info["stages"], STAGES), {}
    for launch in info["launches"].items():
        if launch["stage_seconds"].value is None:
            return _stages_without_rounds(session, benchmark, medians)
        count, invalid = len(launch["round_seconds"].items()), launch["invalid"].object()
        for name in launch["stage_seconds"].object():
            if name not in (*STAGES, "other"):
                continue
            node = launch["stage_seconds"][name]
            if len(node.items()) != count:
                node.fail(f"has {len(node.items())} rounds, not {count}")
            rounds = [item.optional_number(-1e7, 1e7) for at, item in enumerate(node.items()) if str(at) not in invalid]
            launches.setdefault(name, []).append([seconds for seconds in rounds if seconds is not None])
    return {name: Estimate.over_launches(rounds) for name, rounds in launches.items() if any(rounds)}


def _stages_without_rounds(session: SavedSession, benchmark: SavedBenchmark, medians: dict) -> dict[str, Estimate]:
    if (
        medians and session.facts.get("clock") != "cpu"
    ):  # stages have wall time, whose rest of a CPU time has no meaning
        medians["other"] = max(0.0, benchmark.session_median - sum(medians.values()))
    reason = "no interval: saved before stages were recorded per round"
    return {name: Estimate(value, None, None, reason) for name, value in medians.items()}


def _joules(benchmark: SavedBenchmark, telemetry, images: int) -> Estimate | None:
    """Joules per image, over launches if the telemetry of each round was saved."""
    if benchmark.joules_per_image is None:
        return None
    samples = telemetry.items() if telemetry.value is not None else []
    joules = iter(node["joules"].optional_number(0, 1e12) if isinstance(node.value, dict) else None for node in samples)
    launches = [list(itertools.islice(joules, len(rounds))) for rounds in benchmark.launches]
    known = [[value for value in rounds if value is not None] for rounds in launches]
    if not any(known):
        return Estimate(benchmark.joules_per_image, None, None, "no interval: not saved per round")
    return Estimate.over_launches(known).per(images)


def _whole(number: float | None) -> int | None:
    return None if number is None else int(number)


def _positive(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < 1e30


def newest(results: Iterable[Result]) -> list[Result]:
    """The last result of each configuration, machine and software stack."""
    latest: dict[tuple, Result] = {}
    for result in sorted(results, key=lambda result: result.session.order):
        latest[(result.session.identity, result.torch, result.id)] = result
    return list(latest.values())


def ranked(results: Iterable[Result]) -> list[Result]:
    """By work (image size, steps, ...), each from the fastest image to the slowest; INVALID ones last.

    Results of one session are in the order of their paired ratios, others in that of their seconds.
    """
    results = list(results)
    if len({id(result.session) for result in results}) == 1:
        by_id = {result.id: result for result in results}
        return [by_id[entry.id] for entry in ranking.ranked(map(entry_of, results))]
    works = list(dict.fromkeys(ranking.work_of(result.benchmark.configuration) for result in results))

    def key(result: Result):
        work = works.index(ranking.work_of(result.benchmark.configuration))
        return work, result.verdict == "INVALID", result.seconds_per_image

    return sorted(results, key=key)


def entry_of(result: Result) -> ranking.Entry:
    """A result as an entry of a ranking within its session."""
    why_not = next((mark for mark in result.marks if mark != "drifted"), None)
    return ranking.Entry(
        id=result.id,
        seconds=result.seconds_per_image,
        rounds=[
            [None if seconds is None else seconds / result.images for seconds in rounds]
            for rounds in result.benchmark.cycles
        ],
        work=ranking.work_of(result.benchmark.configuration),
        text=interval_seconds(result.seconds_per_image, *result.interval),
        why_not=why_not,
        is_reference=is_reference(result.benchmark.configuration or {}),
        speedup=result.speedup,
        against=result.speedup_against or "original",
    )
