"""`python -m perf.plugin.serve FOLDER TEST ARGUMENTS`: a worker process that runs one test of the user's suite.

pytest collects the test and its fixtures as usual. Its `measured(function)` then answers the requests of the session, and
each round is one call of the function.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import pytest

from perf.worker.server import Worker, open_pipes, respond

SERVE = pytest.StashKey[Callable[..., NoReturn]]()
# Options that do not suit a single unsaved test beside others.
OFF = (
    "benchmark_only",
    "benchmark_skip",
    "benchmark_save",
    "benchmark_autosave",
    "benchmark_compare",
    "benchmark_json",
    "basetemp",  # which each process would empty
    "log_file",
    "xmlpath",
)


class Server:
    """A plugin that lets `measured` serve. reason: (kind, message) why the test did not get there."""

    def __init__(self, requests: Any, responses: Any):
        self.requests, self.responses = requests, responses
        self.reason = ("failed", "the test was not run; is it selected under this id?")

    @pytest.hookimpl(tryfirst=True)
    def pytest_configure(self, config):
        """Disable what belongs to the session alone."""
        config.stash[SERVE] = self.serve
        for name in OFF:
            if hasattr(config.option, name):
                setattr(config.option, name, None)
        config.option.benchmark_disable, config.option.benchmark_enable = True, False

    def serve(self, function: Callable[[], Any]) -> NoReturn:
        """Answer requests until the session closes the pipe; a round is a call of the function."""
        worker = Worker(lambda seed: _something(function()))
        for line in self.requests:
            respond(self.responses, worker.answer(line))
        sys.stderr.flush()
        os._exit(0)

    def pytest_runtest_logreport(self, report):
        """Keep the reason of a skip or failure."""
        if report.skipped:
            self.reason = (
                "unavailable",
                str(report.longrepr[-1] if isinstance(report.longrepr, tuple) else report.longrepr),
            )
        elif report.failed:
            lines = report.longreprtext.strip().splitlines()
            self.reason = (
                "failed",
                f"the test failed before measured(function): {lines[-1] if lines else report.when}",
            )
        elif report.when == "call":
            self.reason = ("failed", "the test did not call measured(function)")

    def pytest_collectreport(self, report):
        """Keep the reason of a failed collection."""
        if report.failed:
            lines = report.longreprtext.strip().splitlines()
            self.reason = ("failed", f"{report.nodeid} cannot be collected: {lines[-1] if lines else ''}")


def is_worker(config) -> bool:
    """Whether this process serves one test; known before any `pytest_configure`, whose order depends on the installation."""
    return any(isinstance(plugin, Server) for plugin in config.pluginmanager.get_plugins())


def _something(returned: Any) -> Any:
    """An output that can be compared; a benchmark's function may return nothing."""
    from perf.worker.engines.interface import nothing

    return nothing() if returned is None else returned


def main() -> None:
    """Run the test; answer with the reason if it ends without being measured."""
    requests, responses = open_pipes()
    folder, test, *arguments = sys.argv[1:]
    os.chdir(folder)
    sys.path.append(folder)
    server = Server(requests, responses)
    pytest.main([*arguments, "-s", test], plugins=[server])
    kind, message = server.reason
    if requests.readline():
        respond(responses, {"error": {"kind": kind, "message": " ".join(message.split())[:2000] or kind}})
    os._exit(0)


if __name__ == "__main__":
    from perf.plugin import serve  # under this name, whose SERVE the fixture reads

    serve.main()
