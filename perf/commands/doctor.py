"""`python -m perf doctor`: read-only check of a machine's fitness for measuring, without torch or pytest."""

from __future__ import annotations

import argparse
import json
import re
import sys
from dataclasses import asdict
from pathlib import Path

from perf.commands import checks
from perf.commands.checks import BUSY, CANNOT, WARNING, Check
from perf.commands.torch_probe import compile_trial, stack_facts
from perf.machine.facts import cpu_facts
from perf.machine.nvml import NoTelemetry, open_device, open_visible_device

SCHEMA = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m perf doctor`."""
    add = parser.add_argument
    add("--device", type=_device, default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    add("--python", default=sys.executable, help="interpreter whose torch is examined (default: this one)")
    add("--storage", default=".benchmarks", help="folder of the saved runs (default: .benchmarks)")
    add("--no-compile", action="store_true", help="skip the trial of torch.compile, which takes half a minute")
    add("--timeout", type=float, default=300, help="seconds for each subprocess with torch (default: 300)")
    add("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Print one line per check. Returns 1 if a check has the status `cannot`, else 0, also on a busy machine."""
    results = examine(args)
    busy = any(check.name == "load" and check.status == BUSY for check in results)
    impossible = [check.name for check in results if check.status == CANNOT]
    if args.json:
        fit = {"fit": not impossible and not busy, "busy": busy}
        print(json.dumps({"schema": SCHEMA, **fit, "checks": [asdict(check) for check in results]}))
        return 1 if impossible else 0
    for check in results:
        print(check)
    warnings = sum(check.status in (WARNING, BUSY) for check in results)
    verdict = "busy: it can measure, but small differences will not be visible" if busy else "fit to measure"
    verdict = f"not fit to measure: {', '.join(impossible)}" if impossible else verdict
    print(f"{verdict} ({warnings} warning{'' if warnings == 1 else 's'})")
    return 1 if impossible else 0


def examine(args: argparse.Namespace) -> list[Check]:
    """All checks that apply to the machine, in the order of printing."""
    before = cpu_facts()  # first, because the subprocesses with torch are a load of their own
    index = int(args.device.partition(":")[2] or 0)
    stack = stack_facts(args.python, index, args.timeout)
    results, gpu = [], None
    if args.device != "cpu":
        device = open_device(stack.uuid) if stack.uuid else open_visible_device(index)
        gpu = device.facts()
        if isinstance(device, NoTelemetry):
            results.append(checks.no_gpu_check(device.reason, stack, required=args.device != "auto"))
        else:
            results += checks.gpu_checks(gpu)
            device.close()
    results += [*checks.stack_checks(stack, gpu), checks.compiler_check()]
    if not args.no_compile and stack.torch_imported:
        trial = compile_trial(args.python, index if gpu is not None and stack.device else None, args.timeout)
        results.append(checks.compile_check(trial))
    return [*results, *checks.cpu_checks(before, cpu_facts()), *checks.suite_checks(Path(args.storage))]


def _device(text: str) -> str:
    if re.fullmatch(r"auto|cpu|cuda(:\d+)?", text):
        return text
    raise argparse.ArgumentTypeError(f"{text!r}: choose from auto, cpu, cuda, cuda:N")
