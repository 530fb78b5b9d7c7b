"""`--perf-against` with a commit older than the package layout: today's worker on the `sd` of both sides."""

from __future__ import annotations

import io
import subprocess
import tarfile

import pytest
from selection import slow_or_nightly

from perf.configurations.configuration import Configuration
from perf.launch.process import ROOT, Interpreter, ProcessLaunch
from sd.features import has

BEFORE_PACKAGES = "f70d238"  # the last commit with sd/ as one flat folder
CONFIGURATIONS = [
    Configuration(attention="original", steps=2),
    Configuration(workload="unet"),
    Configuration(workload="vae"),
    Configuration(optimise="fused_qkv", steps=2),
    Configuration(optimise="original", sampler="ddim", steps=2),
]


@pytest.fixture(scope="module")
def older(tmp_path_factory) -> Interpreter:
    """An interpreter whose `sd` is that of BEFORE_PACKAGES."""
    archive = subprocess.run(
        ["git", "archive", BEFORE_PACKAGES, "sd"], cwd=ROOT, capture_output=True, check=False, timeout=60
    )
    if archive.returncode:
        pytest.skip(f"no git history with {BEFORE_PACKAGES}: {archive.stderr.decode().strip()}")
    folder = tmp_path_factory.mktemp("older")
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as files:
        files.extractall(folder)
    return Interpreter(source=folder)


@pytest.mark.parametrize(
    "configuration", slow_or_nightly(CONFIGURATIONS, lambda one: one.workload != "txt2img"), ids=str
)
@pytest.mark.parametrize("head_is_older", [False, True], ids=["head-is-newer", "head-is-older"])
def test_both_sides_of_a_pair_make_the_same_image(older, configuration, head_is_older):
    if configuration.attention == "sdpa" and not has("sdpa"):
        configuration = Configuration(**{**vars(configuration), "attention": "original"})
    sides = [older, Interpreter()] if head_is_older else [Interpreter(), older]
    load = {"configuration": configuration.as_dict(), "device": "cpu", "clock": "cpu", "threads": 1}
    with ProcessLaunch(sides[0]) as head, ProcessLaunch(sides[1]) as base:
        folders = [worker.ask("load", 120.0, **load)["sd"] for worker in (head, base)]
        assert folders == [str(side.source / "sd") for side in sides]
        rounds = [
            [{**worker.ask("round", 120.0, seed=seed), **worker.ask("examine", 120.0)} for worker in (head, base)]
            for seed in (1, 2)
        ]
    for ours, theirs in rounds:
        assert ours["image"]["sha256"] == theirs["image"]["sha256"]
        assert ours["work"] == theirs["work"] and ours["work"]["flops"] > 0
        assert ours["unet_calls"] == theirs["unet_calls"]
