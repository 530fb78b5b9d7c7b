"""Trace one round of each configuration in a worker of its own."""

from __future__ import annotations

from pathlib import Path

TRACE_SEED = 500_000  # differs from the seeds of timed rounds


def trace_all(launches, slots, folder: Path, limits, say) -> dict[str, dict]:
    """Trace every slot of the working tree in a process of its own; returns `trace` by configuration id.

    launches: as perf.session.workers.Launches. One that cannot be traced is said and left out. Raises OSError where the folder
    cannot be made.
    """
    from perf.report.text import file_name
    from perf.worker.wire import WorkerError

    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for slot in slots:
        id = slot.configuration.id
        say(f"perf: tracing {id}")
        try:
            with launches.open(slot) as worker:
                worker.ask("load", limits.load, **launches.load_arguments(slot))
                worker.ask("round", limits.first_round, seed=TRACE_SEED + 1)
                found[id] = worker.ask(
                    "trace", limits.round, stem=str(folder.absolute() / file_name(id)), seed=TRACE_SEED
                )
        except WorkerError as error:
            say(f"perf: {id} was not traced: {error}")
    return found
