"""Record a profiler trace of one round of each configuration."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from perf.report.text import file_name
from perf.session.plan import Slot
from perf.session.runner import Limits, run_round
from perf.worker.wire import WorkerError

TRACE_SEED = 500_000  # differs from the seeds of timed rounds


def trace_all(
    launches, slots: Iterable[Slot], folder: Path, limits: Limits, log: Callable[[str], None]
) -> dict[str, dict]:
    """Trace each slot in a process of its own, whatever the session; return the workers' responses by configuration id.

    launches: a perf.session.workers.Launches. All rounds are measured by now, so nothing that goes wrong here is an error: a
    configuration that cannot be traced is logged and omitted, and Ctrl-C leaves out the rest.
    """
    traces: dict[str, dict] = {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        log(f"perf: nothing was traced: {folder} cannot be created: {error.strerror}")
        return traces
    for slot in slots:
        id = slot.configuration.id
        log(f"perf: tracing {id}")
        try:
            with launches.open(slot, own_process=True) as worker:
                worker.ask("load", limits.load, **launches.load_arguments(slot), observe=False)
                run_round(worker, limits.first_round, TRACE_SEED + 1)
                traces[id] = worker.ask(
                    "trace", limits.round, stem=str(folder.absolute() / file_name(id)), seed=TRACE_SEED
                )
        except WorkerError as error:
            log(f"perf: {id} was not traced: {error}")
        except KeyboardInterrupt:
            log(f"perf: tracing was interrupted at {id}")
            break
    return traces
