"""The content of a saved run (docs/saved-run.md) from a measured session. Pure: no torch, no pytest."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from perf.analysis import ranking
from perf.analysis.counts import MADE_WITH, CountsComparison, compare
from perf.analysis.paired import MIN_LAUNCHES, break_even, launch_effects, ratio_of_effects
from perf.analysis.ranking import work_of
from perf.analysis.statistics import launch_interval, self_comparison
from perf.analysis.verdicts import Decision, Verdict
from perf.configurations.configuration import Configuration, images_per_round, is_approximate, usual_precision
from perf.runs import fingerprints
from perf.runs.saved_run import SCHEMA, SavedRun, parse
from perf.session.image_check import computing_type
from perf.session.measurements import REFERENCE_SECONDS, Launch, SlotMeasurements, paired_rounds
from perf.session.run import Session

# The dtype whose matrix products are the ceiling of a precision, by what computes (see perf.worker.images).
PEAK_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def extra_info(session: Session, id: str) -> dict:
    """Return a configuration's `extra_info`: everything but its rounds. Requires a valid round."""
    measured = session.measurements.by_name[id]
    configuration, rounds, launches = measured.slot.configuration, measured.rounds(), measured.ordered_launches()
    device = configuration.device or session.settings.device
    # Nothing else loads at the time of the first launch (perf.session.runner).
    first, images = launches[0].load, images_per_round(configuration.as_dict())
    precision = first["precision"]
    seconds = statistics.median(launch_medians(measured))
    stages = {
        name: _median_launch(measured, lambda round_, name=name: round_["stages"].get(name))
        for name in rounds[0]["stages"]
    }
    unet_seconds = stages.get("unet")
    calls = rounds[0]["unet_calls"]
    number = computing_type(precision, device)
    # An approximate technique skips some of the work; journals of earlier versions have no count.
    work = None if configuration.approximate else rounds[0].get("work")
    counted, fewest = (work["flops"], work["minimum_bytes"]) if work else (None, None)
    joules = _median_launch(measured, lambda round_: round_["telemetry"] and round_["telemetry"]["joules"])
    return {
        "schema": SCHEMA,
        "configuration": configuration.as_dict(),
        "variant": None,
        "launches": list(map(_launch, launches)),
        "anchor": [[round_[REFERENCE_SECONDS] for round_ in launch.rounds] for launch in launches],
        "stages": stages,
        "load_seconds": first["load_seconds"],
        "first_call_seconds": _cold_and_warm([launch.first_call_seconds for launch in launches], session),
        "first_picture_seconds": _cold_and_warm([_first_image_seconds(first, launch) for launch in launches], session),
        "compile": _compile(measured),
        "counts": counts(measured),
        "counts_comparison": None,
        "images_to_amortise": amortisation(session, id),
        "seconds_per_image": seconds / images,
        "images_per_second": images / seconds,
        "iterations_per_second": calls / unet_seconds if unet_seconds and calls else None,
        "device_seconds": _median_launch(measured, lambda round_: round_["device_seconds"]),
        "peak_bytes": {
            key: max(
                (round_["peak_bytes"][key] for round_ in rounds if round_["peak_bytes"][key] is not None), default=None
            )
            for key in rounds[0]["peak_bytes"]
        },
        "joules_per_image": joules / images if joules else None,
        "telemetry": [round_["telemetry"] for round_ in rounds],
        "image": _image(session, measured),
        "weights": fingerprints.identity(configuration),
        "flops": counted,
        "floor_bytes": fewest,
        "flops_fraction": _fraction(session, number, device, counted, seconds),
        "kernel": rounds[-1]["kernels"],
        "facts": first["facts"],
        "precision": precision,
        "speedup": speedup(session, id),
        "paired": _paired(session, id),
        "trace": session.traces.get(id),
        "verdict": None,
        "marks": [],
    }


def launch_medians(measured: SlotMeasurements) -> list[float]:
    """Median seconds of each launch with a valid round."""
    medians = [measured.median(number) for number in sorted(measured.launches)]
    return [median for median in medians if median is not None]


def _launch(launch: Launch) -> dict:
    return {
        "start_unix_seconds": launch.rounds[0]["started_unix_seconds"] if launch.rounds else None,
        "round_seconds": [round_["seconds"] for round_ in launch.rounds],
        "stage_seconds": _stage_seconds(launch.rounds),
        "load_seconds": launch.load["load_seconds"],
        "first_call_seconds": launch.first_call_seconds,
        "invalid": {str(i): round_["invalid"] for i, round_ in enumerate(launch.rounds) if round_["invalid"]},
    }


def _stage_seconds(rounds: list[dict]) -> dict[str, list[float | None]]:
    """Seconds of each round by stage; `other` is the rest of the wall time, the clock of the stages."""
    if not rounds or not rounds[0]["stages"]:
        return {}
    seconds = {name: [round_["stages"].get(name) for round_ in rounds] for name in rounds[0]["stages"]}
    return {**seconds, "other": [round_["wall_seconds"] - sum(round_["stages"].values()) for round_ in rounds]}


def _median_launch(measured: SlotMeasurements, value: Callable[[dict], float | None]) -> float | None:
    """The median over launches of the median of their valid rounds, like the time of a round."""
    return _median(_median(map(value, launch.valid())) for launch in measured.launches.values())


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _first_image_seconds(load: dict, launch: Launch) -> float | None:
    """Seconds until a process has its first image: importing torch and loading the model as in `load`, the first call."""
    if launch.first_call_seconds is None:
        return None
    return load["import_seconds"] + load["load_seconds"] + launch.first_call_seconds


def _cold_and_warm(seconds: Sequence[float | None], session: Session) -> dict[str, float | None]:
    """Cold: the session's first launch, null where it may be warm. Warm: the others."""
    return {"cold": _first_if_cold(seconds, session), "warm": _median(seconds[1:])}


def _first_if_cold(seconds: Sequence[float | None], session: Session) -> float | None:
    """None with a compile cache of the user's, and in a process that may have compiled the same before."""
    settings = session.settings
    return seconds[0] if settings.compile_cache is None and settings.isolated else None


def _compile(measured: SlotMeasurements) -> dict | None:
    if not measured.launches[min(measured.launches)].load["compiles"]:
        return None
    counts = [round_["compile"] for round_ in measured.rounds()]
    return {key: max(count[key] for count in counts) for key in ("graphs", "graph_breaks", "recompiles")}


def counts(measured: SlotMeasurements) -> dict | None:
    """Exact counts of a round, with what decides which code ran; None if the first launch has not counted."""
    if measured.counts is None or not measured.rounds():
        return None
    first = measured.launches[min(measured.launches)].load
    facts = {**first["facts"], "precision": first["precision"]}
    if measured.slot.configuration.engine == "sd":
        facts["diffusers"] = None
    if facts["device"] == "cuda":
        facts["threads"] = None
    compiled = _compile(measured) or {"graphs": 0, "graph_breaks": 0, "recompiles": 0}
    return {**{key: facts.get(key) for key in MADE_WITH}, **measured.counts, **compiled}


def compare_counts(session: Session, id: str) -> CountsComparison:
    """The counts of a configuration compared with those of its second label in this session."""
    measured = session.measurements.by_name
    name = session.settings.other_name(id) or "itself"
    return compare(counts(measured[id]), counts(measured[f"{id}@{session.settings.variant}"]), name)


def amortisation(session: Session, id: str) -> dict | None:
    """The number of images after which compiling pays off, against the same configuration not compiled in this session."""
    compiled = session.measurements.by_name[id]
    configuration = compiled.slot.configuration
    eager = _other(session, compiled, replace(configuration, compile="none"))
    cold = _first_if_cold([compiled.launches[min(compiled.launches)].first_call_seconds], session)
    if configuration.compile == "none" or eager is None or cold is None:
        return None
    images = images_per_round(configuration.as_dict())
    per_image = [
        [[seconds / images for seconds in rounds] for rounds in launches]
        for launches in paired_rounds(eager, compiled, "wall_seconds")  # compiling takes wall time too
    ]
    if sum(map(bool, per_image[0])) < MIN_LAUNCHES:
        return None
    spent = max(0.0, cold - statistics.median(round_["wall_seconds"] for round_ in compiled.rounds()))
    return break_even(spent, *per_image).as_dict()


def speedup(session: Session, id: str) -> dict | None:
    """The speed-up over the `original` attention for the same work in this session, by paired rounds.

    Engines of the user's own are compared with the first of them.
    """
    measured = session.measurements.by_name[id]
    if measured.slot.configuration.own:
        return _speedup_over(session, measured, _first_own(session, measured.slot.configuration))
    original = replace(
        measured.slot.configuration,
        engine="sd",
        attention="original",
        sdpa_kernels=(),
        compile="none",
        optimise="",
        checkpointing=False,
        interpreter=None,
    )
    if original.id not in session.measurements.by_name:  # else `original` at the model's default precision
        original = replace(original, precision=usual_precision(original.model))
    return _speedup_over(session, measured, original)


def _first_own(session: Session, configuration: Configuration) -> Configuration:
    """The first configuration of the session with an engine of the user's own and the same work."""
    own = [slot.configuration for slot in session.plan.own_slots if slot.configuration.own]
    return next(each for each in own if work_of(each.as_dict()) == work_of(configuration.as_dict()))


def _speedup_over(session: Session, measured: SlotMeasurements, original: Configuration) -> dict | None:
    other = _other(session, measured, original)
    if other is None:
        return None
    own, others = paired_rounds(measured, other)
    effects = launch_effects(others, own)
    if len(effects) < MIN_LAUNCHES:
        return None
    return {"against": original.id, **ratio_of_effects(effects).as_dict()}


def _other(session: Session, measured: SlotMeasurements, configuration: Configuration) -> SlotMeasurements | None:
    """The measurements of another configuration of the session, unless it failed."""
    other = session.measurements.by_name.get(configuration.id)
    return None if other is None or other is measured or other.failure else other


def interval(measured: SlotMeasurements) -> tuple[float, float] | None:
    """The 95 % interval of the median launch, in seconds; None for a single launch."""
    medians = launch_medians(measured)
    if len(medians) < MIN_LAUNCHES:
        return None
    bounds = launch_interval(medians)
    return bounds.low, bounds.high


def _image(session: Session, measured: SlotMeasurements) -> dict:
    # Only round 0 is compared with the reference, even if it was throttled.
    image = next(launch.rounds[0] for launch in measured.ordered_launches() if launch.rounds)["image"]
    configuration = measured.slot.configuration
    reason = session.unchecked.get(configuration.id)
    verdict = "unchecked" if reason else "approximate" if configuration.approximate else "right"
    return {
        **{key: image[key] for key in ("sha256", "latent_relative_error", "psnr_db")},
        "reference": configuration.reference().id,
        "verdict": verdict,
        "reason": reason,
    }


def _fraction(session: Session, number: str, device: str, counted: int | None, seconds: float) -> float | None:
    ceilings = session.stack.get("matmul_flops_per_second") or {}
    ceiling = ceilings.get(PEAK_DTYPES[number])
    if ceiling is None or counted is None or device != session.settings.device:
        return None
    return counted / seconds / ceiling


def _paired(session: Session, id: str) -> dict | None:
    """The launches of the configuration's variant: another commit, the side of --perf-b, or an A/A repetition."""
    variant = session.settings.variant
    if variant is None:
        return None
    other = session.measurements.by_name[f"{id}@{variant}"]
    return {
        "variant": variant,
        "name": session.settings.other_name(id) or id,
        "launches": list(map(_launch, other.ordered_launches())),
    }


def marks(session: Session, info: dict, decision: Decision | None) -> list[str]:
    """The marks of a result in the saved run and the terminal."""
    invalid = session.invalid is not None or (decision is not None and decision.verdict is Verdict.INVALID)
    drifted = session.measurements.drifted() is not None
    return list(ranking.marks(invalid, drifted, is_approximate(info["configuration"]["optimise"])))


def perf_block(session: Session, partial: str | None, regressed: list[str]) -> dict:
    """Return the `perf` block of the saved run, about the whole session."""
    measurements, settings = session.measurements, session.settings
    discarded, total = measurements.counts()
    slots = list(measurements.by_name.values())
    reference_seconds = [round_[REFERENCE_SECONDS] for measured in slots for round_ in measured.rounds()]
    name = next((launch.load["anchor"] for measured in slots for launch in measured.launches.values()), None)
    return {
        "schema": SCHEMA,
        "clock": settings.clock,
        "threads": settings.threads,
        "isolated": settings.isolated,
        "launches": settings.launches,
        "rounds": settings.rounds,
        "most_rounds": settings.most_rounds,
        "order": [slot.name for slot in session.plan.slots],
        "order_seed": session.plan.seed,
        "loading": session.plan.loading,
        "looks": list(session.plan.looks),
        "started_unix_seconds": session.started_unix_seconds,
        "seconds": session.seconds,
        "selection": settings.selection,
        "partial": partial,
        "invalid": session.invalid,
        "drifted": measurements.drifted(),
        "regressed": regressed,
        "anchor": {
            "name": name,
            "median_seconds": _median(reference_seconds),
            "drift": measurements.drift(),
            "drift_low": measurements.least_drift(),
        },
        "control": _control(session),
        "aa": _self_comparison(session),
        "against": settings.against_name,
        "injected_slowdown": settings.slowdown or None,
        "invalid_rounds": discarded,
        "total_rounds": total,
    }


def _control(session: Session) -> dict | None:
    """The control arm: its configuration, its launches, and its ratio to its twin."""
    slot, decision = session.plan.control, session.control
    if slot is None:
        return None
    return {
        "configuration": slot.configuration.id,
        "ratio": decision.ratio.as_dict() if decision and decision.ratio else None,
        "launches": list(map(_launch, session.measurements.by_name[slot.name].ordered_launches())),
    }


def _self_comparison(session: Session) -> dict | None:
    ratios = [decision.ratio.estimate for decision in session.decisions.values() if decision.ratio]
    if not session.settings.aa or not ratios:
        return None
    return self_comparison(ratios).as_dict()


def saved_run(session: Session, infos: dict[str, dict]) -> SavedRun:
    """Return the session as a saved run, before it is written."""
    benchmarks = [
        {
            "name": id,
            "fullname": id,
            "stats": {"data": [round_["seconds"] for round_ in session.measurements.by_name[id].rounds()]},
            "extra_info": info,
        }
        for id, info in infos.items()
    ]
    return parse(
        {
            "machine_info": {"stack": session.stack},
            "benchmarks": benchmarks,
            "perf": perf_block(session, None, []),
            "datetime": "",
            "version": "",
        },
        Path("this session"),
    )
