"""Saved runs for several GPUs, computed from the published values and labelled synthetic: no machine measured them.

`python tests/helpers/synthetic_runs.py FOLDER` writes them, to inspect the report by eye.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
from dataclasses import replace
from pathlib import Path

from perf.configurations.configuration import Configuration, usual
from perf.configurations.sets import SETS
from perf.report.published import GPUS, published
from perf.report.results import Result, session_of

SYNTHETIC = "made by arithmetic from the published figures, with invented noise: no machine has measured this"
LAUNCHES, ROUNDS = 10, 2
STEP = 30.0  # seconds between launches
SHARES = {"text": 0.01, "unet": 0.93, "vae": 0.05, "other": 0.01}  # of a round
DAY = 86_400.0
START = 1_767_225_600.0


def document(
    gpu: str,
    times: dict[Configuration, float],
    *,
    number: int = 1,
    torch: str = "2.0.0+cu117",
    commit: str = "0" * 40,
    rounds: int = ROUNDS,
    driver: str = "525.60",
    extra: dict[str, dict] | None = None,
    verdicts: dict[str, dict] | None = None,
) -> dict:
    """A saved run. times: seconds per image by configuration. extra: further keys of extra_info by id."""
    draw = random.Random(f"{gpu} {number}")
    started = START + DAY * number
    benchmarks = []
    for position, (configuration, seconds) in enumerate(times.items()):
        info = extra_info(configuration, seconds, draw, started + position, rounds)
        info.update((extra or {}).get(configuration.id, {}))
        info["verdict"] = (verdicts or {}).get(configuration.id)
        data = [one for launch in info["launches"] for one in launch["round_seconds"]]
        name = f"test_txt2img[{configuration.id}]"
        benchmarks.append(
            {
                "group": None,
                "name": name,
                "fullname": f"perf/test_txt2img.py::{name}",
                "params": None,
                "param": configuration.id,
                "extra_info": info,
                "options": {},
                "stats": {"data": data, "rounds": len(data), "median": sorted(data)[len(data) // 2]},
            }
        )
    return {
        "synthetic": SYNTHETIC,
        "machine_info": {"node": "synthetic", "stack": stack(gpu, torch, driver)},
        "commit_info": {"id": commit, "dirty": False},
        "benchmarks": benchmarks,
        "datetime": "",
        "version": "5.3.1",
        "perf": {
            "schema": 1,
            "clock": "wall",
            "threads": None,
            "isolated": True,
            "launches": LAUNCHES,
            "rounds": rounds,
            "order": [configuration.id for configuration in times],
            "started_unix_seconds": started,
            "seconds": 1000.0,
            "partial": None,
            "invalid": None,
            "regressed": [],
            "anchor": {"name": "synthetic", "median_seconds": 0.01, "drift": 0.002},
            "aa": None,
            "invalid_rounds": 0,
            "total_rounds": LAUNCHES * rounds * len(times),
        },
    }


def stack(gpu: str, torch: str, driver: str) -> dict:
    """`machine_info.stack` of a GPU that is not there."""
    return {
        "device": "cuda",
        "name": gpu,
        "uuid": f"GPU-synthetic-{gpu}",
        "driver": driver,
        "torch": torch,
        "cuda": "11.7",
        "cudnn": "8500",
        "triton": None,
        "xformers": None,
        "python": "3.10.12",
        "memory_bytes": 40 * 2**30,
        "power_limit_watts": 300.0,
        "sm_clock_max_mhz": 1410,
        "memory_clock_max_mhz": 1215,
        "matmul_flops_per_second": {"float16": 100e12},
        "copy_bytes_per_second": 1.5e12,
    }


def extra_info(
    configuration: Configuration, per_image: float, draw: random.Random, started: float, rounds: int
) -> dict:
    """`extra_info` of a benchmark. Everything but the median is invented in proportion to it."""
    batch, seconds = configuration.batch, per_image * configuration.batch
    launches = []
    for number in range(LAUNCHES):
        offset = draw.gauss(1, 0.004)
        times = [seconds * offset * draw.gauss(1, 0.002) for _ in range(rounds)]
        launches.append(
            {
                "start_unix_seconds": started + STEP * number,
                "round_seconds": times,
                "stage_seconds": {name: [share * one for one in times] for name, share in SHARES.items()},
                "load_seconds": 5.0,
                "first_call_seconds": seconds * (20 if configuration.compile != "none" and number == 0 else 1.2),
                "invalid": {},
            }
        )
    compiled = configuration.compile != "none"
    saved = round(20 * batch / 0.1)
    flops = 84.6e12 * batch * configuration.steps / 50 * ((configuration.height or 512) / 512) ** 2
    return {
        "schema": 1,
        "configuration": configuration.as_dict(),
        "variant": None,
        "launches": launches,
        "anchor": [[0.01] * rounds for _ in launches],
        "stages": {name: share * seconds for name, share in SHARES.items() if name != "other"},
        "load_seconds": 5.0,
        "first_call_seconds": {"cold": launches[0]["first_call_seconds"], "warm": 1.2 * seconds},
        "first_picture_seconds": {"cold": 10 + launches[0]["first_call_seconds"], "warm": 10 + 1.2 * seconds},
        "compile": {"graphs": 1, "graph_breaks": 0, "recompiles": 0} if compiled else None,
        "images_to_amortise": {"estimate": saved, "low": saved // 2, "high": 2 * saved} if compiled else None,
        "seconds_per_image": seconds / batch,
        "images_per_second": batch / seconds,
        "iterations_per_second": 51 / seconds,
        "device_seconds": 0.99 * seconds,
        "peak_bytes": {"allocated": int((2.5 + 0.9 * batch) * 2**30), "reserved": None, "rss": 2**31},
        "joules_per_image": 250.0 * seconds / batch,
        "telemetry": [
            {"joules": 250.0 * seconds * draw.gauss(1, 0.01), "sm_clock_mhz": 1400} for _ in range(LAUNCHES * rounds)
        ],
        "image": {
            "sha256": "0" * 64,
            "latent_relative_error": 0.004,
            "psnr_db": 52.0,
            "reference": configuration.reference().id,
            "verdict": "right",
            "reason": None,
        },
        "weights": {"kind": "random", "sha256": None},
        "flops": int(flops),
        "floor_bytes": int(flops / 84.6e12 / batch * 88e9),
        "flops_fraction": flops / seconds / 100e12,
        "kernel": {"unet": ["synthetic"]},
        "speedup": None,
        "verdict": None,
    }


def published_run(gpu: str, number: int = 1, **more) -> dict:
    """One session of one GPU with the published times of SD2 at batch 1, 2 and 4."""
    times = {}
    for configuration in SETS["published"]:
        technique = configuration.id.removeprefix("sd2-").removesuffix(f"-b{configuration.batch}")
        for cell in published():
            wanted = ("sd2", gpu, configuration.batch, technique)
            if (cell.model, cell.gpu, cell.batch, cell.technique) == wanted and cell.seconds_per_image:
                times[configuration] = cell.seconds_per_image
    return document(f"NVIDIA {gpu}", times, number=number, **more)


def growth_run(gpu: str = "A100") -> dict:
    """One configuration over steps, batches and sizes, growing as 0.2 s + 0.04 s a step, and with the pixels to the 1.2."""
    base = usual("sd2")
    times = {replace(base, steps=steps): 0.2 + 0.04 * steps for steps in (10, 25, 50, 100)}
    times |= {replace(base, batch=batch): (0.6 + 1.6 * batch) / batch for batch in (1, 2, 4, 8)}
    times |= {replace(base, height=size, width=size): 2.2 * (size / 512) ** 2.4 for size in (256, 384, 640, 768)}
    return document(f"NVIDIA {gpu}", times, number=2, torch="2.14.0+cu130")


def ladder_run(gpu: str = "A100") -> dict:
    """The ladder, each step faster, with times by kernel class and energy."""
    times, seconds = {}, 4.0
    for configuration in SETS["ladder"]:
        times[configuration] = seconds
        seconds *= 0.8
    traces = {
        "conv": 0.4,
        "gemm": 0.3,
        "attention": 0.2,
        "norm": 0.1,
        "elementwise": 0.1,
        "copy": 0.05,
        "launch gap": 0.02,
    }
    extra = {
        configuration.id: {"trace": {"seconds": {name: share * time for name, share in traces.items()}}}
        for configuration, time in times.items()
    }
    return document(f"NVIDIA {gpu}", times, number=3, torch="2.15.0+cu132", extra=extra)


def nightly_runs(count: int, rounds: int = 2, gpu: str = "A100", configurations: int = 5) -> list[dict]:
    """Stored sessions of some configurations every night, one of them slower from two thirds on, with verdicts."""
    documents = []
    for number in range(count):
        slow = 1.06 if number >= 2 * count // 3 else 1.0
        times = {one: 2.0 + 0.2 * place for place, one in enumerate(SETS["published"][:configurations])}
        slowed = next(iter(times))
        times[slowed] *= slow
        verdict, reason = ("SLOWER", "beyond_margin") if slow > 1 else ("SAME", "within_margin")
        if number < 6:
            verdict, reason = "INCONCLUSIVE", "too_few_sessions"
        verdicts = {slowed.id: {"verdict": verdict, "reason": reason, "ratio": None, "margin": 0.01, "against": None}}
        if verdict == "SLOWER":
            verdicts[slowed.id]["ratio"] = {"estimate": slow, "low": slow - 0.02, "high": slow + 0.02}
        made = document(
            f"NVIDIA {gpu}",
            times,
            number=number,
            rounds=rounds,
            torch="2.14.0+cu130" if number < count // 2 else "2.15.0+cu132",
            commit=hashlib.sha1(f"synthetic {number // 5}".encode()).hexdigest(),
            verdicts=verdicts,
        )
        made["perf"]["regressed"] = [slowed.id] if verdict == "SLOWER" else []
        documents.append(made)
    return documents


def write(folder: Path, documents: list[dict], label: str) -> list[Path]:
    """Save runs under numbered names."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, made in enumerate(documents, 1):
        paths.append(folder / f"{number:04d}_{label}.json")
        paths[-1].write_text(json.dumps(made), encoding="utf-8")
    return paths


def results_of(*documents: dict, name: str = "0001_x") -> list[Result]:
    """Results of runs, as a report reads them; the files are named 0000_NAME, 0001_NAME, ..."""
    found = []
    for number, made in enumerate(documents):
        found += session_of(made, Path(f"{number:04d}_{name}.json"))[1]
    return found


def everything() -> list[dict]:
    """The runs that the tests of the report render."""
    return [published_run(gpu, number) for number, gpu in enumerate(GPUS)] + [growth_run(), ladder_run()]


if __name__ == "__main__":
    destination = Path(sys.argv[1])
    write(destination, everything(), "synthetic")
    write(destination / "nightly", nightly_runs(12), "nightly")
