"""A worker: the real one with the embedded model, what it says of errors, and killed at random moments."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_session import FAKE, SCRIPT, fake, measure, summary  # noqa: F401 (fake is a fixture)

from perf.configurations.configuration import Configuration
from perf.launch.in_process import InProcessLaunch
from perf.launch.process import ROOT, Interpreter, ProcessLaunch
from perf.session.image_check import image_failure
from perf.session.settings import SessionError
from perf.worker.server import BusyLoop, Worker, collect_garbage, error_kind
from perf.worker.wire import KINDS, WorkerError
from sd.features import has

KILLS = 25
FEW = 10_000  # objects; Python 3.12 leaves some hundred out of collections by itself
TINY = Configuration(attention="original", steps=2, height=64, width=64)


class Link:
    """Something that can be in a cycle and have a weak reference."""


def ok(answer: dict) -> dict:
    assert "ok" in answer, answer
    return answer["ok"]


def loading(configuration: Configuration | dict = TINY, **changes) -> dict:
    fields = configuration if isinstance(configuration, dict) else configuration.as_dict()
    given = {"configuration": fields, "device": "cpu", "clock": "cpu", "threads": 1}
    return {"op": "load", **given, **changes}


def round_of(worker: Worker, seed: int, check: list[str] | None = None) -> dict:
    """The answers about one round, as the session joins them."""
    ok(worker.handle({"op": "prepare", "seed": seed}))
    answer = ok(worker.handle({"op": "round", "seed": seed}))
    return {**answer, **ok(worker.handle({"op": "examine", "check": check}))}


def error(worker: Worker, **request) -> tuple[str, str]:
    """(kind, message) of an answer that is an error, on one line."""
    answer = worker.handle(request)
    assert set(answer) == {"error"} and set(answer["error"]) == {"kind", "message"}
    kind, message = answer["error"]["kind"], answer["error"]["message"]
    assert kind in KINDS and message and message.isprintable()
    return kind, message


@pytest.fixture(scope="module", autouse=True)
def _threads_as_before():
    import torch

    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def worker() -> Worker:
    loaded = Worker()
    answer = ok(loaded.handle(loading()))
    assert (answer["pid"], answer["facts"]["device"]) == (os.getpid(), "cpu")
    assert Path(answer["sd"]) == ROOT / "sd"
    return loaded


def test_a_round_is_timed_examined_and_compared(worker, tmp_path):
    first = round_of(worker, 1)
    assert first["seconds"] > 0 and first["wall_seconds"] > 0 and first["anchor_seconds"] > 0
    assert (
        set(first["stages"]) == {"text", "unet", "vae"}
        and sum(first["stages"].values()) <= 1.01 * first["wall_seconds"]
    )
    assert first["device_seconds"] is None and first["peak_bytes"]["allocated"] is None
    assert first["peak_bytes"]["rss"] > 1 << 20
    assert first["unet_calls"] >= TINY.steps
    assert first["work"]["flops"] > first["work"]["minimum_bytes"] > 0
    assert first["compile"] == {"graphs": 0, "graph_breaks": 0, "recompiles": 0}
    assert first["image"]["finite"] and not first["image"]["constant"]
    assert first["image"]["latent_relative_error"] is None
    reference = str(tmp_path / "reference.npz")
    assert ok(worker.handle({"op": "write_reference", "path": reference})) == {"path": reference}
    again = round_of(worker, 1, [reference])["image"]
    assert again["sha256"] == first["image"]["sha256"]
    assert again["latent_relative_error"] == 0 and again["psnr_db"] == 100
    other = round_of(worker, 1001, [reference])["image"]
    assert other["sha256"] != first["image"]["sha256"]
    assert other["latent_relative_error"] > 0.1 and other["psnr_db"] < 45
    json.dumps(first, allow_nan=False)


@pytest.mark.skipif(not has("sdpa"), reason="torch 1.12 has another API of dispatch modes")
def test_a_round_is_counted_exactly(worker):
    first, again = (ok(worker.handle({"op": "count", "seed": seed})) for seed in (1, 2))
    assert first == again
    assert first["operators"]["convolution"] > 20 * TINY.steps and "view" not in first["operators"]
    assert first["bytes"] > 1e7 and first["generated_kernels"] == 0
    assert first["host_waits"] == 2  # for whether the image is finite and not black
    fused = Worker()
    ok(fused.handle(loading(replace(TINY, attention="sdpa", optimise="fused_qkv"))))
    counted = ok(fused.handle({"op": "count", "seed": 1}))
    assert counted["operators"]["mm"] < first["operators"]["mm"]
    assert counted["bytes"] < first["bytes"]


@pytest.mark.skipif(has("sdpa"), reason="this torch counts operators")
def test_old_torch_reports_no_counts(worker):
    assert set(ok(worker.handle({"op": "count", "seed": 1})).values()) == {None, 0}


def test_a_merged_lora_changes_the_image_and_not_the_work(worker, tmp_path):
    plain = round_of(worker, 1)
    merged = Worker()
    ok(merged.handle(loading(replace(TINY, lora_rank=4, optimise="fused_qkv"))))
    reference = str(tmp_path / "reference.npz")
    ok(worker.handle({"op": "write_reference", "path": reference}))
    changed = round_of(merged, 1, [reference])
    assert changed["image"]["finite"] and 0.001 < changed["image"]["latent_relative_error"] < 1
    assert changed["work"]["flops"] == plain["work"]["flops"]


TRAINING = Configuration(workload="train", attention="sdpa" if has("sdpa") else "mha", steps=3, batch=2)


@pytest.mark.slow
def test_a_round_of_training_is_compared_with_the_losses_of_its_reference(tmp_path):
    reference, loaded, path = Worker(), Worker(), str(tmp_path / "reference.npz")
    ok(reference.handle(loading(TRAINING.reference())))
    first = round_of(reference, 1)
    assert set(first["stages"]) == {"forward", "backward", "optimiser", "average"} and first["unet_calls"] == 3
    assert sum(first["stages"].values()) <= first["wall_seconds"]
    ok(reference.handle({"op": "write_reference", "path": path}))
    ok(loaded.handle(loading(replace(TRAINING, checkpointing=True))))
    rounds = [round_of(loaded, seed, [path])["image"] for seed in (1, 9, 1)]
    assert image_failure(rounds[0], "full", "cpu", workload="train") is None
    assert image_failure(rounds[1], "full", "cpu", workload="train").startswith(
        "losses and gradient norms: relative error"
    )
    assert rounds[0]["sha256"] == rounds[2]["sha256"]  # each round starts from the same weights
    # A step that does not update the weights has the same first loss, and no others.
    loaded.engine.engine.trainer.optimiser.step = lambda: None
    frozen = round_of(loaded, 1, [path])["image"]
    assert image_failure(frozen, "full", "cpu", workload="train").startswith(
        "losses and gradient norms: relative error"
    )


@pytest.mark.peers
def test_diffusers_trains_with_the_same_losses():
    pytest.importorskip("diffusers", reason="the extra `peers` is not installed")
    from perf.worker.engines import open_engine

    traces = []
    for engine in ("sd", "diffusers"):
        opened = open_engine(replace(TRAINING, engine=engine).as_dict(), "cpu")
        opened.prepare(3)
        traces.append(opened.round(3).latents)
    assert (traces[0] - traces[1]).norm() < 1e-4 * traces[0].norm()


@pytest.mark.slow
@pytest.mark.parametrize("model", ["tiny", "tiny-inpaint"])
def test_a_round_of_inpainting_is_compared_with_its_reference(model, tmp_path):
    """The reference is that of its own configuration, and the image of another seed is not taken for it."""
    attention = "sdpa" if has("sdpa") else "mha"
    configuration = Configuration(model, workload="inpaint", attention=attention, steps=2, sampler="ddim")
    reference, loaded, path = Worker(), Worker(), str(tmp_path / "reference.npz")
    ok(reference.handle(loading(configuration.reference())))
    first = round_of(reference, 1)
    assert set(first["stages"]) == {"encode", "text", "unet", "vae"}
    ok(reference.handle({"op": "write_reference", "path": path}))
    ok(loaded.handle(loading(configuration)))
    same, other = (round_of(loaded, seed, [path])["image"] for seed in (1, 9))
    assert image_failure(same, "full", "cpu") is None
    assert image_failure(other, "full", "cpu").startswith("latents: relative error")


@pytest.mark.slow
@pytest.mark.peers
@pytest.mark.parametrize("model", ["tiny", "tiny-inpaint"])
def test_diffusers_inpaints_the_same_image(model):
    pytest.importorskip("diffusers", reason="the extra `peers` is not installed")
    from perf.worker.engines import open_engine

    ours, theirs = (
        open_engine(configuration.as_dict(), "cpu").round(3)
        for configuration in (
            Configuration(model, workload="inpaint", sampler="ddim", steps=4, batch=2, engine=engine)
            for engine in ("sd", "diffusers")
        )
    )
    assert (ours.latents - theirs.latents).norm() < 1e-3 * ours.latents.norm()
    assert (ours.images.int() - theirs.images.int()).abs().max() <= 2


def test_the_busy_loop_prolongs_each_step_by_its_fraction():
    seconds = [0.0]

    def clock() -> float:
        seconds[0] += 0.01  # what a reading takes
        return seconds[0]

    busy = BusyLoop(0.5, clock)
    for step in range(3):
        seconds[0] += 1.0
        begin = seconds[0]
        busy(step, 3)
        assert 0.5 <= seconds[0] - begin < 0.55


@pytest.mark.slow
def test_a_round_contains_the_busy_loop_of_every_step(monkeypatch):
    """By the loop's own account of the steps, whose time differs from run to run."""
    steps = []

    class Recorded(BusyLoop):
        def __call__(self, step, count):
            steps.append(self.clock() - self.last)
            super().__call__(step, count)

    monkeypatch.setattr("perf.worker.server.BusyLoop", Recorded)
    slowed = Worker()
    ok(slowed.handle(loading(slowdown=1.0)))
    for seed in (1, 2):
        steps.clear()
        seconds = round_of(slowed, seed)["seconds"]
        assert len(steps) == TINY.steps and min(steps) > 0
        assert seconds >= 2 * sum(steps)


@pytest.mark.parametrize("workload", ["text", "unet", "vae"])
def test_a_workload_without_steps_is_slowed_at_its_end(workload):
    seconds, slowed = [0.0], Worker()
    ok(slowed.handle(loading(replace(TINY, workload=workload), slowdown=1.0)))
    slowed.clock = slowed.busy_loop.clock = lambda: seconds.__setitem__(0, seconds[0] + 0.01) or seconds[0]
    round_of(slowed, 1)
    assert slowed.busy_loop.steps == 1


def test_the_stage_of_the_unet_shares_the_halves_of_guidance(monkeypatch):
    outputs, batches = [], []
    for optimise in ("none", "shared_guidance"):
        made = Worker()
        ok(made.handle(loading(replace(TINY, workload="unet", optimise=optimise))))
        made.engine.engine.model.unet.register_forward_pre_hook(lambda module, given: batches.append(len(given[0])))
        round_of(made, 1)
        outputs.append(made.output.latents)
    assert batches == [2, 1] and (outputs[0] - outputs[1]).abs().max() < 1e-4


def test_the_peak_of_a_round_leaves_out_the_reference_workload(worker, monkeypatch):
    monkeypatch.setattr("perf.worker.server.peak_bytes", lambda: {"allocated": 10**9, "reserved": None, "rss": None})
    assert worker.reference_workload.bytes > 4 * 8 * 512 * 512
    assert round_of(worker, 1)["peak_bytes"]["allocated"] == 10**9 - worker.reference_workload.bytes


def test_collections_between_rounds_leave_out_the_libraries_objects():
    """They would be examined for longer than a round of the embedded model takes; garbage of a round is still collected."""
    links = []

    def leave_a_cycle(seed):
        link = Link()
        link.itself = link
        links.append(weakref.ref(link))
        return 1

    worker, here = Worker(leave_a_cycle), os.getcwd()
    own = {"directory": here, "folder": here, "given": []}
    try:
        ok(worker.handle(loading({**TINY.as_dict(), "engine": "own"}, own=own)))
        assert gc.get_freeze_count() < FEW
        for _ in range(3):
            round_of(worker, 1)
        assert gc.get_freeze_count() > FEW
        assert [link() is None for link in links] == [True, True, False]
        ok(worker.handle(loading()))
        assert gc.get_freeze_count() < FEW
    finally:
        collect_garbage(every_object=True)


def test_what_cannot_be_asked():
    fresh = Worker()
    assert error(fresh, op="dance") == ("usage", "a worker has no operation 'dance'")
    assert error(fresh, op="handle")[0] == "usage"
    assert error(fresh, op=["round"])[0] == "usage"
    assert error(fresh)[0] == "failed"
    assert error(fresh, op="round")[1].startswith("TypeError: ")
    assert error(fresh, op="round", seed=1)[0] == "failed"  # nothing is loaded
    assert error(fresh, op="write_reference", path="/nowhere/x")[0] == "failed"
    assert "error" in fresh.handle([1]) and "error" in fresh.handle(None)
    assert error(fresh, **loading(configuration={**TINY.as_dict(), "attention": "flashy"}))[0] == "usage"


def test_what_cannot_run_here_is_unavailable_and_says_why():
    kind, message = error(Worker(), **loading(Configuration(attention="mha", sdpa_kernels=("cudnn",), steps=1)))
    assert kind == "unavailable" and "mha with kernels cudnn cannot run here" in message
    import torch

    if not torch.cuda.is_available():
        kind, message = error(Worker(), **loading(device="cuda"))
        assert kind == "unavailable" and "no CUDA device" in message
        assert error(Worker(), op="probe", device="cuda", clock="wall", threads=None)[0] == "unavailable"


def probing(*configurations: Configuration) -> dict:
    dicts = [configuration.as_dict() for configuration in configurations]
    return {"op": "probe", "device": "cpu", "clock": "cpu", "threads": 1, "configurations": dicts}


def test_techniques_that_are_none_are_refused_by_the_probe():
    kind, message = error(Worker(), **probing(Configuration(optimise="fsat")))
    assert kind == "usage" and "optimise 'fsat': choose a preset" in message
    known = Configuration(optimise="fast"), Configuration(optimise="channels_last,fused_qkv")
    assert "ok" in Worker().handle(probing(*known))


def test_contradictory_techniques_are_refused_by_the_probe():
    """The load would find it only after the minutes of the configurations before it."""
    wrong = Configuration(precision="autocast", compile="default", compile_backend="openvino")
    kind, message = error(Worker(), **probing(Configuration(), wrong))
    assert kind == "usage" and message.startswith(f"{wrong.id}: compile backend openvino: with autocast")


def test_a_file_that_is_no_checkpoint_is_described(tmp_path):
    path = tmp_path / "model.ckpt"
    path.write_bytes(b"not a checkpoint")
    kind, message = error(Worker(), **loading(Configuration(checkpoint=str(path))))
    assert kind in ("usage", "failed") and "model.ckpt" in message


class Stub:
    """An engine whose rounds end with an error."""

    def __init__(self, error: BaseException):
        self.error = error

    def prepare(self, seed: int):
        pass

    def round(self, seed: int):
        raise self.error


@pytest.mark.slow
@pytest.mark.parametrize("batch, advice", [(4, "try batch 2"), (1, "try a smaller image, or precision fp16")])
@pytest.mark.parametrize(
    "raised",
    [
        MemoryError(),
        RuntimeError("CUDA out of memory. Tried\nto"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_out_of_memory_says_what_to_try_and_lets_go_of_the_model(raised, batch, advice):
    full = Worker()
    full.engine, full.configuration = Stub(raised), Configuration(batch=batch)
    kind, message = error(full, op="round", seed=1)
    assert kind == "out_of_memory"
    assert message.startswith("out of memory at a peak of ") and message.endswith(f" GiB: {advice}")
    assert full.engine is None and full.output is None


def test_kinds_of_error():
    from sd.errors import BadImage, SDError, Unavailable

    assert error_kind(Unavailable("x")) == "unavailable"
    assert error_kind(BadImage("x")) == "bad_image"
    assert error_kind(SDError("x")) == "usage"
    assert error_kind(ZeroDivisionError("x")) == "failed"
    broken = Worker()
    broken.engine = Stub(ZeroDivisionError("a\nb" + "c" * 5000))
    kind, message = error(broken, op="round", seed=1)
    assert (kind, message[:22], len(message) < 2100) == ("failed", "ZeroDivisionError: a b", True)
    broken.engine = Stub(ValueError())
    assert error(broken, op="round", seed=1) == ("failed", "ValueError: ValueError")


def test_workers_of_one_process_have_variables_of_their_own_and_no_peak_of_memory(monkeypatch):
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    seen = []
    monkeypatch.setattr(Worker, "ping", lambda self: seen.append(os.environ.get("TORCHINDUCTOR_CACHE_DIR")) or {})
    with InProcessLaunch({"TORCHINDUCTOR_CACHE_DIR": "a"}) as first, InProcessLaunch({}) as second:
        for launch in (first, second):
            launch.ask("ping", 1.0)
        assert seen == ["a", None] and "TORCHINDUCTOR_CACHE_DIR" not in os.environ
        monkeypatch.setattr("perf.worker.server.peak_bytes", lambda: {"allocated": 10, "reserved": 20, "rss": 30})
        for launch in (first, second):
            launch.worker.reference_workload = SimpleNamespace(bytes=1)
        engines = [worker for worker in Worker.alive if worker.engine is not None]
        with monkeypatch.context() as patch:
            for worker in engines:  # of other tests
                patch.setattr(worker, "engine", None)
            first.worker.engine = object()
            assert first.worker._peak_bytes() == {"allocated": 9, "reserved": 20, "rss": 30}
            second.worker.engine = object()
            assert first.worker._peak_bytes() == {"allocated": None, "reserved": None, "rss": None}


def test_in_process_the_answers_are_the_same():
    with InProcessLaunch() as launch:
        assert launch.ask("ping", 1.0) == {}
        with pytest.raises(WorkerError, match="has no operation 'dance'") as caught:
            launch.ask("dance", 1.0)
        assert caught.value.kind == "usage"


# --- as a process. Its `ping` does what a library might.
PING = """
import os, subprocess, sys, perf.worker.server
def ping(self, what):
    {}
    return {{"did": what}}
perf.worker.server.Worker.ping = ping
perf.worker.server.main()
"""


def real(body: str) -> list[str]:
    return [sys.executable, "-c", PING.format(body)]


@pytest.mark.parametrize(
    "body",
    [
        "print('loading ...')",
        "print('loading ...', flush=True)",
        "sys.stdout.buffer.write(b'\\xff' * 100000)",
        "os.write(1, b'{}\\n')",
        "subprocess.run(['echo', '{}'])",
        "subprocess.run(['cat'], timeout=20)",  # which reads its input to the end
    ],
)
def test_what_a_library_prints_or_reads_is_not_on_the_pipe(body):
    with ProcessLaunch(Interpreter(), real(body)) as worker:
        for number in range(3):
            assert worker.ask("ping", 20.0, what=number) == {"did": number}


def test_a_question_is_an_error_and_takes_no_request_for_its_answer():
    with ProcessLaunch(Interpreter(), real("input('Run remote code? [y/N] ')")) as worker:
        for _ in range(2):
            with pytest.raises(WorkerError, match="EOFError") as caught:
                worker.ask("ping", 20.0, what=1)
            assert caught.value.kind == "failed"


def test_what_ends_a_worker_is_its_last_word():
    last_words = pytest.raises(WorkerError, match=r"^the worker ended with status 1: no more$")
    with ProcessLaunch(Interpreter(), real("sys.exit('no more')")) as worker, last_words:
        worker.ask("ping", 20.0, what=1)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a worker ends after its round")
def test_a_worker_ends_with_a_launcher_that_is_killed():
    """In the middle of whatever it does: its input, which this process has too, stays open."""
    code = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-m', 'perf.worker']); time.sleep(600)"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, **pipes) as between:
        pid = json.loads(between.stdout.readline())["ok"]["pid"]
        between.kill()
        between.wait()
        deadline = time.monotonic() + 20
        while alive(pid) and time.monotonic() < deadline:
            time.sleep(0.005)
        assert not alive(pid)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def workers() -> list[int]:
    """The fake workers of this process."""
    found = []
    for one in filter(str.isdigit, os.listdir("/proc")):
        try:
            parent = Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split()[1]
            command = Path(f"/proc/{one}/cmdline").read_bytes()
        except OSError:
            continue
        if parent == str(os.getpid()) and os.fsencode(FAKE) in command:
            found.append(int(one))
    return found


@pytest.mark.nightly
def test_kill_9_of_workers_at_random_moments_is_one_line_each(fake, tmp_path):  # noqa: F811
    fake(**SCRIPT)
    turns: dict[str, Any] = {"loading": "single"}  # in which a failed configuration is tried once more
    begin = time.monotonic()
    whole = summary(measure(tmp_path / "whole", **turns)[0])
    usual = time.monotonic() - begin
    kills, number = 0, 0
    while kills < KILLS:
        number += 1
        folder, done, killed = tmp_path / str(number), threading.Event(), []

        def kill(draw=random.Random(number), done=done, killed=killed):
            while not done.wait(draw.uniform(0.1, 0.7) * usual):
                for pid in workers()[:1]:
                    with contextlib.suppress(ProcessLookupError):  # it has ended by itself
                        os.kill(pid, signal.SIGKILL)
                        killed.append(pid)

        killer = threading.Thread(target=kill)
        killer.start()
        try:
            session, _ = measure(folder, **turns)
        except SessionError as error:  # the very first worker
            assert str(error).startswith("nothing can be measured: the worker was ended by SIGKILL"), f"seed {number}"
            session = None
        finally:
            done.set()
            killer.join()
        kills += len(killed)
        if session is None:
            continue
        lines = [failure[1] for failure in summary(session)["failures"].values() if failure]
        lines += session.unchecked.values()
        assert all(line.startswith("the worker was ended by SIGKILL") for line in lines), f"seed {number}: {lines}"
        assert all(line.isprintable() for line in lines)
        resumed = summary(measure(folder, resume=True, **turns)[0])
        assert resumed["failures"] == whole["failures"], f"seed {number}"
        assert resumed["seconds"] == whole["seconds"], f"seed {number}"
