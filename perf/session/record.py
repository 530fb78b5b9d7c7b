"""From a measured session to what a saved run holds (docs/saved-run.md). Pure: no torch, no pytest."""

from __future__ import annotations

import statistics
from dataclasses import replace
from pathlib import Path

from perf.analysis.statistics import MIN_VALUES, break_even, paired_ratio, self_comparison, sign_interval
from perf.configurations.configuration import usual_precision
from perf.runs import fingerprints as weights
from perf.runs.saved_run import SavedRun, parse
from perf.session.image_check import computing_type
from perf.session.measurements import Launch, Measured, paired_medians
from perf.session.run import Session

SCHEMA = 1
# The dtype whose matrix products are the ceiling of a precision, by what computes (see perf.worker.images).
CEILINGS = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def extra_info(session: Session, id: str) -> dict:
    """Everything about one configuration that stands beside its rounds."""
    measured = session.measurements.by_name[id]
    configuration, rounds = measured.slot.configuration, measured.rounds()
    device = configuration.device or session.settings.device
    first = measured.launches[min(measured.launches)].load
    precision = first["precision"]
    seconds = statistics.median(launch_medians(measured))
    stages = {
        name: _median_launch(measured, lambda one, name=name: one["stages"].get(name)) for name in rounds[0]["stages"]
    }
    unet_seconds = stages.get("unet")
    calls = rounds[0]["unet_calls"]
    number = computing_type(precision, device)
    # An approximate technique skips some of the work; journals of earlier versions have no count.
    work = None if configuration.approximate else rounds[0].get("work")
    counted, fewest = (work["flops"], work["minimum_bytes"]) if work else (None, None)
    joules = _median_launch(measured, lambda one: one["telemetry"] and one["telemetry"]["joules"])
    return {
        "schema": SCHEMA,
        "configuration": configuration.as_dict(),
        "variant": None,
        "launches": [_launch(launch) for _, launch in sorted(measured.launches.items())],
        "anchor": [[one["anchor_seconds"] for one in launch.rounds] for _, launch in sorted(measured.launches.items())],
        "stages": stages,
        "load_seconds": _median(launch.load["load_seconds"] for launch in measured.launches.values()),
        "first_call_seconds": first_call(measured),
        "first_picture_seconds": first_picture(measured),
        "compile": _compile(measured),
        "images_to_amortise": amortisation(session, id),
        "seconds_per_image": seconds / configuration.batch,
        "images_per_second": configuration.batch / seconds,
        "iterations_per_second": calls / unet_seconds if unet_seconds and calls else None,
        "device_seconds": _median_launch(measured, lambda one: one["device_seconds"]),
        "peak_bytes": {key: _largest(one["peak_bytes"][key] for one in rounds) for key in rounds[0]["peak_bytes"]},
        "joules_per_image": joules / configuration.batch if joules else None,
        "telemetry": [one["telemetry"] for one in rounds],
        "image": _image(session, measured),
        "weights": weights.identity(configuration),
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
    }


def launch_medians(measured: Measured) -> list[float]:
    """Median seconds of each launch that has a valid round."""
    medians = [measured.median(number) for number in sorted(measured.launches)]
    return [median for median in medians if median is not None]


def _launch(launch: Launch) -> dict:
    return {
        "start_unix_seconds": launch.rounds[0]["started_unix_seconds"] if launch.rounds else None,
        "round_seconds": [one["seconds"] for one in launch.rounds],
        "stage_seconds": _stage_seconds(launch.rounds),
        "load_seconds": launch.load["load_seconds"],
        "first_call_seconds": launch.first_call_seconds,
        "invalid": {str(i): one["invalid"] for i, one in enumerate(launch.rounds) if one["invalid"]},
    }


def _stage_seconds(rounds: list[dict]) -> dict[str, list[float | None]]:
    """Seconds of each round by stage, and `other`: what the stages leave of its wall time, which is the clock they have."""
    names = rounds[0]["stages"] if rounds else {}
    found = {name: [one["stages"].get(name) for one in rounds] for name in names}
    return {**found, "other": [one["wall_seconds"] - sum(one["stages"].values()) for one in rounds]} if found else {}


def _median_launch(measured: Measured, value) -> float | None:
    """The median over launches of the median of their valid rounds: the statistic that the time of a round has."""
    return _median(_median(map(value, launch.valid())) for launch in measured.launches.values())


def _median(values) -> float | None:
    there = [value for value in values if value is not None]
    return statistics.median(there) if there else None


def _largest(values) -> int | None:
    return max((value for value in values if value is not None), default=None)


def first_call(measured: Measured) -> dict:
    """Seconds of the first call: cold in the session's first launch, warm in the others, which find its compile cache."""
    return _cold_and_warm([launch.first_call_seconds for _, launch in sorted(measured.launches.items())])


def first_picture(measured: Measured) -> dict:
    """Seconds until a process has its first picture: importing torch, loading the model, the first call; cold and warm."""
    launches = [launch for _, launch in sorted(measured.launches.items())]
    before = [launch.load["import_seconds"] + launch.load["load_seconds"] for launch in launches]
    calls = [launch.first_call_seconds for launch in launches]
    return _cold_and_warm([None if call is None else start + call for start, call in zip(before, calls)])


def _cold_and_warm(seconds: list[float | None]) -> dict:
    return {"cold": seconds[0], "warm": _median(seconds[1:])}


def _compile(measured: Measured) -> dict | None:
    if not measured.launches[min(measured.launches)].load["compiles"]:
        return None
    counted = [one["compile"] for one in measured.rounds()]
    return {key: max(one[key] for one in counted) for key in ("graphs", "graph_breaks", "recompiles")}


def amortisation(session: Session, id: str) -> dict | None:
    """Images after which compiling has paid, against the same configuration without it in the same session."""
    compiled = session.measurements.by_name[id]
    configuration = compiled.slot.configuration
    eager = session.measurements.by_name.get(replace(configuration, compile="none").id)
    cold = compiled.launches[min(compiled.launches)].first_call_seconds
    if configuration.compile == "none" or eager is None or eager.failure or cold is None:
        return None
    pairs = paired_medians(eager, compiled)
    per_image = [[seconds / configuration.batch for seconds in medians] for medians in pairs]
    if len(per_image[0]) < MIN_VALUES:
        return None
    spent = max(0.0, cold - statistics.median(one["wall_seconds"] for one in compiled.rounds()))
    return break_even(spent, *per_image, seed=id).as_dict()


def speedup(session: Session, id: str) -> dict | None:
    """How many times faster than the `original` attention of the same work in this session, by pairs of launches."""
    measured = session.measurements.by_name[id]
    configuration = measured.slot.configuration
    plain = replace(
        configuration,
        engine="sd",
        attention="original",
        sdpa_kernels=(),
        compile="none",
        precision=_published_precision(session, configuration),
        optimise="",
        interpreter=None,
    )
    other = session.measurements.by_name.get(plain.id)
    if other is None or other is measured or other.failure:
        return None
    ours, theirs = paired_medians(measured, other)
    if len(ours) < MIN_VALUES:
        return None
    return {"against": plain.id, **paired_ratio(theirs, ours, seed=f"{id} {plain.id}").as_dict()}


def _published_precision(session: Session, configuration) -> str:
    """The precision of the session's `original`: the same one if it is there, else the usual one of the model."""
    plain = {"attention": "original", "sdpa_kernels": (), "compile": "none", "optimise": ""}
    same = replace(configuration, engine="sd", interpreter=None, **plain)
    return configuration.precision if same.id in session.measurements.by_name else usual_precision(configuration.model)


def interval(measured: Measured) -> tuple[float, float] | None:
    """The exact 95 % interval of the median launch, in seconds; None for fewer than 6 launches."""
    medians = launch_medians(measured)
    if len(medians) < MIN_VALUES:
        return None
    found = sign_interval(medians)
    return found.low, found.high


def _image(session: Session, measured: Measured) -> dict:
    # Round 0 is the one that is compared; where it was throttled its picture has been looked at all the same.
    first = next(launch.rounds[0] for _, launch in sorted(measured.launches.items()) if launch.rounds)["image"]
    reason = session.unchecked.get(measured.slot.configuration.id)
    found = {key: first[key] for key in ("sha256", "latent_relative_error", "psnr_db")}
    configuration = measured.slot.configuration
    verdict = "unchecked" if reason else "approximate" if configuration.approximate else "right"
    return {**found, "reference": configuration.reference().id, "verdict": verdict, "reason": reason}


def _fraction(session: Session, number: str, device: str, counted: int | None, seconds: float) -> float | None:
    ceilings = session.stack.get("matmul_flops_per_second") or {}
    ceiling = ceilings.get(CEILINGS[number])
    if ceiling is None or counted is None or device != session.settings.device:
        return None
    return counted / seconds / ceiling


def _paired(session: Session, id: str) -> dict | None:
    """The other label of the session: another commit, or the same once more."""
    variant = session.settings.variant
    if variant is None:
        return None
    other = session.measurements.by_name[f"{id}@{variant}"]
    return {
        "variant": variant,
        "name": session.settings.against[0] if session.settings.against else id,
        "launches": [_launch(launch) for _, launch in sorted(other.launches.items())],
    }


def perf_block(session: Session, partial: str | None, regressed: list[str]) -> dict:
    """The session as a whole, as `perf` in the saved run."""
    measurements, settings = session.measurements, session.settings
    thrown, total = measurements.counts()
    everything = list(measurements.by_name.values())
    anchors = [one["anchor_seconds"] for measured in everything for one in measured.rounds()]
    name = next((launch.load["anchor"] for measured in everything for launch in measured.launches.values()), None)
    return {
        "schema": SCHEMA,
        "clock": settings.clock,
        "threads": settings.threads,
        "isolated": settings.isolated,
        "launches": settings.launches,
        "rounds": settings.rounds,
        "order": [slot.name for slot in session.plan.slots],
        "started_unix_seconds": session.started_unix_seconds,
        "seconds": session.seconds,
        "partial": partial,
        "invalid": measurements.invalid(),
        "regressed": regressed,
        "anchor": {"name": name, "median_seconds": _median(anchors), "drift": measurements.drift()},
        "aa": _self_comparison(session),
        "against": settings.against[0] if settings.against else None,
        "injected_slowdown": settings.slowdown or None,
        "invalid_rounds": thrown,
        "total_rounds": total,
    }


def _self_comparison(session: Session) -> dict | None:
    ratios = [one.ratio.estimate for one in session.decisions.values() if one.ratio]
    if not session.settings.aa or not ratios:
        return None
    return {"comparisons": len(ratios), **self_comparison(ratios).as_dict()}


def saved_run(session: Session, infos: dict[str, dict]) -> SavedRun:
    """The session as the comparing side reads it, before anything is written."""
    benchmarks = [
        {
            "name": id,
            "fullname": id,
            "stats": {"data": [one["seconds"] for one in session.measurements.by_name[id].rounds()]},
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
