"""`python -m perf doctor`: is this machine fit to measure? Reads, and changes nothing. Imports neither torch nor pytest."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from perf.commands.checks import (
    CANNOT,
    WARNING,
    Check,
    compile_check,
    compiler_check,
    cpu_checks,
    gpu_checks,
    no_gpu_check,
    stack_checks,
    suite_checks,
)
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
    add("--no-compile", action="store_true", help="leave out the trial of torch.compile, which takes half a minute")
    add("--timeout", type=float, default=300, help="seconds for each look at torch (default: 300)")
    add("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Print one line per check. Returns 1 when one says `cannot`, else 0."""
    checks = examine(args)
    impossible = [check.name for check in checks if check.status == CANNOT]
    if args.json:
        print(json.dumps({"schema": SCHEMA, "fit": not impossible, "checks": [asdict(check) for check in checks]}))
        return 1 if impossible else 0
    for check in checks:
        print(check)
    warned = sum(check.status == WARNING for check in checks)
    verdict = f"not fit to measure: {', '.join(impossible)}" if impossible else "fit to measure"
    print(f"{verdict} ({warned} warning{'' if warned == 1 else 's'})")
    return 1 if impossible else 0


def examine(args: argparse.Namespace) -> list[Check]:
    """All checks that suit the machine, in the order in which they are printed."""
    before = cpu_facts()  # first: looking at torch is a load of its own
    index = int(args.device.partition(":")[2] or 0)
    stack = stack_facts(args.python, index, args.timeout)
    checks, gpu = [], None
    if args.device != "cpu":
        device = open_device(stack.uuid) if stack.uuid else open_visible_device(index)
        gpu = device.facts()
        if isinstance(device, NoTelemetry):
            checks.append(no_gpu_check(device.reason, stack, required=args.device != "auto"))
        else:
            checks += gpu_checks(gpu)
            device.close()
    checks += stack_checks(stack, gpu)
    checks.append(compiler_check())
    if not args.no_compile and stack.torch_imported:
        trial = compile_trial(args.python, index if gpu is not None and stack.device else None, args.timeout)
        checks.append(compile_check(trial))
    return [*checks, *cpu_checks(before, cpu_facts()), *suite_checks(Path(args.storage))]


def _device(text: str) -> str:
    kind, colon, index = text.partition(":")
    if text in ("auto", "cpu", "cuda") or (kind == "cuda" and colon and index.isdigit()):
        return text
    raise argparse.ArgumentTypeError(f"{text!r} is none of auto, cpu, cuda, cuda:N")
