"""The tables of docs/cpu-peers.md against diffusers, OpenVINO and ONNX Runtime, measured anew on this machine.

python tests/helpers/peers_table.py                     tiny and sd-34M, one and two threads: an hour and a half
python tests/helpers/peers_table.py "sd2 and threads1"  full size; any expression of pytest's -k
python tests/helpers/peers_table.py --from run.json     print the table of a saved run of perf/test_peers.py
python tests/helpers/peers_table.py --profile sd-34M    time by operation of `sd-fast` and of OpenVINO, on --threads threads,
                                                        in --precision bf16 or full
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).parents[2]
PROFILED = 5  # calls
KINDS = {  # patterns of torch.profiler's names, of which the first counts
    "cpp_fused": "generated kernels",  # whose names have those of the operators around them
    "convolution_pointwise|mkldnn_convolution|slow_conv2d": "convolutions",
    "linear_pointwise|addmm|aten::mm": "linear layers",
    "avx2_layer": "convolutions and linear layers",
    "avx2_group_norm": "group norms",
    "scaled_dot_product|avx(2|512)_attention": "attention",
    "Dynamo Cache Lookup": "guards of Dynamo",
}
FEATURES = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile", "amx_bf16", "asimd", "bf16")


def versions() -> str:
    """Versions of what is compared, and the processor with its features that matter."""
    packages = []
    for name in ("torch", "torchao", "diffusers", "openvino", "onnxruntime"):
        try:
            packages.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            packages.append(f"without {name}")
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(encoding="utf-8") if cpuinfo.exists() else ""
    model = re.search(r"^model name\s*: (.*)$", text, re.MULTILINE)
    flags = set(re.findall(r"\w+", "".join(re.findall(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)[:1])))
    features = " ".join(name for name in FEATURES if name in flags)
    return f"{', '.join(packages)}; {model[1] if model else 'unknown processor'} ({features})"


def table(run: dict) -> list[str]:
    """Lines of Markdown: milliseconds, the ratio of our side to each with its 95 % interval, fraction of peak FLOP/s.

    Our side is `sd-fast`, in training `sd`. The clock is in the group's name: CPU time of one thread, wall time of several,
    with the gain over one.
    """
    groups: dict[str, dict[str, dict]] = {}
    for benchmark in run["benchmarks"]:
        groups.setdefault(benchmark["group"], {})[benchmark["params"]["side"]] = benchmark
    lines = []
    for group, sides in groups.items():
        ours = "sd-fast" if "sd-fast" in sides else "sd"
        ratios = sides[ours]["extra_info"]
        product = ratios.get("gain_of_product")
        columns = ["ms", *(["gain over 1 thread"] if product else []), f"`{ours}` / it", "of peak"]
        lines += ["", f"| {group} | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
        for side, benchmark in sides.items():
            info = benchmark["extra_info"]
            cells = [f"`{side}`", f"{1e3 * benchmark['stats']['median']:.1f}"]
            if product:
                cells.append(_with_interval(info["gain_over_one_thread"]))
            cells.append("" if side == ours else _with_interval(ratios[f"ratio_to_{side.replace('-', '_')}"]))
            lines.append(f"| {' | '.join(cells)} | {info['flops_fraction']:.0%} |")
        if product:
            lines.append(f"| a matrix product | | {_with_interval(product)} | | |")
    return lines[1:]


def _with_interval(ratio: list[float]) -> str:
    return "{:.2f} [{:.2f}, {:.2f}]".format(*ratio)


def profile(name: str, threads: int, precision: str) -> list[str]:
    """Lines of Markdown: milliseconds by operation of a call of `sd-fast`, by torch.profiler, and of OpenVINO, by its counters.

    Both slow the call down a little. The host's part of `sd-fast` is what no operation accounts for.
    """
    import openvino
    import torch

    from perf.test_peers import TASKS, optimisations, own_network

    suffix = "" if precision == "full" else f"-{precision}"
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    task = TASKS[name]
    network, inputs = task.network().eval().requires_grad_(False), task.inputs()
    requests = []

    class Counting(openvino.Core):
        def compile_model(self, model, device, settings):
            compiled = super().compile_model(model, device, {**settings, "PERF_COUNT": True})
            return SimpleNamespace(
                create_infer_request=lambda: requests.append(compiled.create_infer_request()) or requests[0]
            )

    openvino.Core = Counting
    with torch.no_grad():
        side = "openvino" + suffix
        peer = task.ours(own_network(network, side), optimisations(side), inputs)
        # Set before compilation: each generated kernel then appears in the profile.
        torch._inductor.config.cpp.enable_kernel_profile = True
        side = "sd-fast" + suffix
        ours = task.ours(own_network(network, side), optimisations(side), inputs)
        for call in (ours, peer):
            for _ in range(PROFILED):
                call()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as events:
            for _ in range(PROFILED):
                ours()
    by_kind: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for event in events.key_averages():
        kind = next(
            (kind for pattern, kind in KINDS.items() if re.search(pattern, event.key)), "host, and other operators"
        )
        by_kind[kind] += event.self_cpu_time_total / 1e3 / PROFILED
        if kind in KINDS.values() and not event.key.endswith(
            ".default"
        ):  # the dispatch of an operator that is there too
            calls[kind] += event.count // PROFILED
    theirs: Counter[str] = Counter()
    nodes: Counter[str] = Counter()
    for node in requests[0].get_profiling_info():
        theirs[node.node_type] += node.real_time.total_seconds() * 1e3
        nodes[node.node_type] += node.real_time.total_seconds() > 0
    lines = []
    for side, times, counts in (("sd-fast" + suffix, by_kind, calls), ("openvino" + suffix, theirs, nodes)):
        lines += ["", f"| {name}, `{side}` | ms | calls |", "|---|---|---|"]
        rows = [(kind, ms) for kind, ms in times.most_common() if ms >= 0.01 * times.total()]
        lines += [f"| {kind} | {ms:.2f} | {counts[kind] or ''} |" for kind, ms in rows]
        lines.append(f"| all | {times.total():.2f} | |")
    return lines[1:]


def main(argv: list[str] | None = None) -> int:
    """Measure, unless given a saved run, and print; returns pytest's exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("expression", nargs="?", help="cases, as for pytest's -k (default: all but full size)")
    parser.add_argument("--from", dest="run", type=Path, metavar="RUN.json", help="print the table of a saved run")
    parser.add_argument("--profile", metavar="CASE", help="print the time by operation of a case")
    parser.add_argument("--threads", type=int, default=1, help="of --profile (default: 1)")
    parser.add_argument("--precision", choices=("full", "bf16"), default="full", help="of --profile (default: full)")
    arguments = parser.parse_args(argv)
    if arguments.profile:
        print(versions(), *profile(arguments.profile, arguments.threads, arguments.precision), sep="\n")
        return 0
    if arguments.run:
        print(*table(json.loads(arguments.run.read_text(encoding="utf-8"))), sep="\n")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "run.json"
        command = [sys.executable, "-m", "pytest", "perf/test_peers.py", "-q", f"--benchmark-json={file}"]
        command += ["-k", arguments.expression] if arguments.expression else []
        status = subprocess.run(command, cwd=ROOT, check=False).returncode
        print(versions())
        return status or main(["--from", str(file)])


if __name__ == "__main__":
    sys.exit(main())
