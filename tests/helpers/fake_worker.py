"""A fake worker for tests of perf.launch.process, perf.session.runner and perf.session.run.

    python -I -S fake_worker.py SCRIPT

It implements the protocol of perf.worker.server with the standard library alone, so that it starts in tens of milliseconds.
SCRIPT is JSON, or a JSON file: the durations to report, and the errors to inject (see `Fake` and `misbehave`). Durations
are seeded noise. `Fake.handle` also works without a process.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import signal
import subprocess
import sys
import time

PROTOCOL = 2
IDENTITY = {"device": "cpu", "torch": "fake", "name": "fake", "uuid": None}


class Fake:
    """Responds as a worker does, by a script with these optional keys:

    seconds: of a round, or {id: seconds}; noise: its standard deviation as a fraction; seed: of the noise; anchor: seconds
    of the reference workload, or {id: seconds}; base: factor of another commit (a working folder other than the script's
    `head`); counter: a file that counts launches, so that they differ; sleep: the real seconds of a round; at: the errors,
    a list of {"op", "do", and when: "nth" (from 0, in this process), "id", "seed", "once" (a file: not again)}.
    """

    def __init__(self, script: dict, launch: int = 0):
        self.script, self.launch = script, launch
        self.configuration, self.slowdown, self.asked = {}, 0.0, {}
        if "counter" in script:
            descriptor = os.open(script["counter"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            os.write(descriptor, b".")
            self.launch = os.fstat(descriptor).st_size
            os.close(descriptor)

    def mishap(self, operation: str, **arguments) -> dict | None:
        """The scripted error of this request, if any; call once per request."""
        count = self.asked[operation] = self.asked.get(operation, -1) + 1
        for one in self.script.get("at", []):
            same = one.get("id", self._id()) == self._id() and one.get("seed", arguments.get("seed")) == arguments.get(
                "seed"
            )
            if one["op"] == operation and one.get("nth", count) == count and same:
                if "once" in one:
                    try:
                        os.close(os.open(one["once"], os.O_CREAT | os.O_EXCL))
                    except FileExistsError:
                        continue
                return one
        return None

    def handle(self, request: dict) -> dict:
        """Return the response, as perf.worker.server does."""
        request = dict(request)
        operation = request.pop("op")
        if operation == "load":  # errors of a load may depend on the configuration
            self.configuration, self.slowdown = request["configuration"], request["slowdown"]
        mishap = self.mishap(operation, **request)
        if mishap and mishap["do"] == "error":
            return {"error": {"kind": mishap["kind"], "message": mishap.get("message", "so the script says")}}
        answer = getattr(self, operation)(**request)
        if operation == "round":  # a change of the image metrics of a round shows when they are examined
            self.seed, self.change = request["seed"], mishap["image"] if mishap and mishap["do"] == "change" else {}
        return {"ok": answer}

    def probe(self, device, threads, clock=None, configurations=()):
        ceilings = {"matmul_flops_per_second": {"float32": 1e9}, "copy_bytes_per_second": 1e8}
        return {**IDENTITY, "device": device, "threads": threads, **ceilings}

    def load(self, configuration, device, threads, **_):
        facts = {**IDENTITY, "device": device, "threads": threads}
        answer = {"import_seconds": 0.01, "load_seconds": 0.02, "anchor": "fake-1", "sd": os.getcwd()}
        answer |= {
            "precision": configuration["precision"],
            "layers": "plain",
            "compiles": configuration["compile"] != "none",
        }
        return {**answer, "facts": facts, "pid": os.getpid()}

    def prepare(self, seed):
        return {}

    def round(self, seed):
        time.sleep(self.script.get("sleep", 0))
        other_commit = os.getcwd() != self.script.get("head", os.getcwd())
        key = (self.script.get("seed", 0), self._id(), self.slowdown, other_commit, self.launch, seed)
        wobble = math.exp(self.script.get("noise", 0.0) * random.Random(repr(key)).gauss(0, 1))
        seconds = self._of("seconds", 0.01) * (1 + self.slowdown) * wobble
        if other_commit:
            seconds *= self.script.get("base", 1.0)
        return {
            "started_unix_seconds": time.time(),
            "seconds": seconds,
            "wall_seconds": seconds,
            "device_seconds": None,
            "stages": {"text": 0.1 * seconds, "unet": 0.8 * seconds, "vae": 0.1 * seconds},
            "unet_calls": 2,
            "peak_bytes": {"allocated": None, "reserved": None, "rss": 1 << 20},
            "kernels": {"unet": ["fake"]},
            "compile": {"graphs": 0, "graph_breaks": 0, "recompiles": 0},
        }

    def examine(self, check=None):
        digest = hashlib.sha256(repr((self._id(), self.seed)).encode()).hexdigest()
        missing = [path for path in check or [] if not os.path.exists(path)]
        if missing:
            raise FileNotFoundError(missing[0])
        error, ratio = (1e-6, 90.0) if check else (None, None)
        image = {"sha256": digest, "finite": True, "constant": False, "latent_relative_error": error, "psnr_db": ratio}
        return {"anchor_seconds": self._of("anchor", 0.001), "image": {**image, **self.change}}

    def count(self, seed):
        return {"operators": {"mm": 10, "add": 5}, "bytes": 1000, "host_waits": 0, "generated_kernels": 0}

    def write_reference(self, path):
        with open(path, "w") as file:
            file.write("a reference")
        return {"path": path}

    def _of(self, name: str, usual: float) -> float:
        value = self.script.get(name, usual)
        return value.get(self._id(), usual) if isinstance(value, dict) else value

    def _id(self) -> str | None:
        return self.configuration.get("id")


def misbehave(mishap: dict, answer: dict) -> None:
    """Inject an error of a process. Returns if an ordinary response follows."""
    doing = mishap["do"]
    if doing == "hang":
        time.sleep(600)
    elif doing == "signal":
        sys.stderr.write(mishap.get("words", ""))
        sys.stderr.flush()
        os.kill(os.getpid(), mishap["number"])
        signal.pause()
    elif doing == "exit":
        sys.stderr.write(mishap.get("words", ""))
        sys.stderr.flush()
        os._exit(mishap.get("status", 3))
    elif doing == "close":  # its stdout, and stay alive
        os.close(1)
        time.sleep(mishap.get("then", 600))
        sys.stderr.write("the last words\n")
        sys.stderr.flush()
        os._exit(5)
    elif doing == "print":
        data = mishap["text"].encode() * mishap.get("times", 1)
        while data:
            data = data[os.write(1, data) :]
    elif doing == "partial":  # the start of the correct response, then exit
        os.write(1, json.dumps(answer).encode()[: mishap.get("bytes", 20)])
        os.kill(os.getpid(), signal.SIGKILL)
        signal.pause()
    elif doing == "child":  # it holds the pipe and would outlive this process
        child = os.fork()
        if child == 0:
            time.sleep(600)
        answer["ok"]["child"] = child


# The program of a SessionRunner. A job is a session; its result and its log lines are written to a file.
RUNNER = """
import json, os, signal, sys, tempfile
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # background processes ignore it
from test_session import B, A, LIMITS, command_of, summary
from perf.session.journal import JournalError
from perf.launch.process import Interpreter
from perf.session.lock import DeviceBusy
from perf.session.run import run
from perf.session.settings import SessionError, Settings

def one(job):
    tempfile.tempdir = job["folder"]
    Interpreter.command = lambda self: command_of(job["script"])
    logged = []
    settings = Settings("cpu", Path(job["folder"]), launches=2, rounds=2, resume=job["resume"], limits=LIMITS)
    try:
        answer = summary(run(settings, [A, B], logged.append))
    except (SessionError, DeviceBusy, JournalError, KeyboardInterrupt) as error:
        answer = {"error": type(error).__name__, "message": str(error)}
    with open(job["result"], "w") as file:
        json.dump({**answer, "logged": logged}, file)

for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        os.dup2(2, 1)
        try:
            one(json.loads(line))
        finally:
            os._exit(0)
    print(pid, flush=True)
    print(os.waitpid(pid, 0)[1], flush=True)
"""


class SessionRunner:
    """Runs sessions of tests/perf/test_session.py, each in a process of its own. Use as a context.

    They are forked from one process, so that Python starts and imports only once.
    """

    def __init__(self, import_path: list[str]):
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(import_path)}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        command = [sys.executable, "-c", RUNNER]
        self.process = subprocess.Popen(command, text=True, env=environment, **pipes)

    def start(self, folder, script: dict, resume: bool = False) -> tuple[int, str]:
        """Start a session in `folder`; return (process id, file of the result)."""
        result = os.path.join(folder, "result.json")
        if os.path.exists(result):
            os.unlink(result)
        job = {"folder": str(folder), "script": script, "resume": resume, "result": result}
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline()), result

    def end(self, started: tuple[int, str]) -> dict | None:
        """Wait for a session; return its result, or None if it was killed."""
        status = int(self.process.stdout.readline())
        assert status in (0, signal.SIGKILL), f"a session ended with status {status}"
        if status:
            return None
        with open(started[1]) as file:
            return json.load(file)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.communicate()


def main() -> None:
    """Respond until the pipe closes."""
    text = sys.argv[1]
    if not text.startswith("{"):
        with open(text) as file:
            text = file.read()
    script = json.loads(text)
    fake = Fake(script)
    hello = {"ok": {"protocol": script.get("protocol", PROTOCOL), "pid": os.getpid()}}
    mishap = fake.mishap("start")
    if mishap:
        misbehave(mishap, hello)
    print(json.dumps(hello), flush=True)
    for line in iter(sys.stdin.readline, ""):
        request = json.loads(line)
        try:
            answer = fake.handle(request)
        except Exception as error:
            answer = {"error": {"kind": "failed", "message": f"{type(error).__name__}: {error}"}}
        operation = request.pop("op")
        fake.asked[operation] -= 1  # the same request again, for errors of a process
        mishap = fake.mishap(operation, **request)
        if mishap:
            misbehave(mishap, answer)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
