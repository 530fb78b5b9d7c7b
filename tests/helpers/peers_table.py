"""The table of docs/optimisations.md against diffusers, OpenVINO and ONNX Runtime, measured anew on this machine.

python tests/helpers/peers_table.py                     tiny and sd-34M, one and two threads: an hour
python tests/helpers/peers_table.py "sd2 and threads1"  full size at 256 pixels; any expression of pytest's -k
python tests/helpers/peers_table.py --from run.json     print the table of a saved run of perf/test_peers.py
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parents[2]
FEATURES = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile", "amx_bf16", "asimd", "bf16")


def versions() -> str:
    """Versions of what is compared, and the processor with its features that matter."""
    packages = []
    for name in ("torch", "diffusers", "openvino", "onnxruntime"):
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
    """Lines of Markdown: CPU and wall milliseconds, the ratio of `sd-fast` to each side, the fraction of peak FLOP/s."""
    groups: dict[str, list[dict]] = {}
    for benchmark in run["benchmarks"]:
        groups.setdefault(benchmark["group"], []).append(benchmark)
    lines = []
    for group, benchmarks in groups.items():
        lines += ["", f"| {group} | CPU ms | wall ms | `sd-fast` / it | of peak |", "|---|---|---|---|---|"]
        by_side = {benchmark["params"]["side"]: benchmark for benchmark in benchmarks}
        for side, benchmark in by_side.items():
            info = benchmark["extra_info"]
            ratio = by_side.get("sd-fast", {"extra_info": {}})["extra_info"].get(f"ratio_to_{side.replace('-', '_')}")
            ratio_text = "-" if ratio is None else f"{ratio[0]:.2f} [{ratio[1]:.2f}, {ratio[2]:.2f}]"
            times = f"{1e3 * benchmark['stats']['median']:.1f} | {1e3 * info['wall_seconds']:.1f}"
            lines.append(f"| `{side}` | {times} | {ratio_text} | {info['flops_fraction']:.0%} |")
    return lines


def main(arguments: list[str]) -> int:
    """Measure, unless given a saved run, and print."""
    if arguments[:1] == ["--from"]:
        print(versions(), *table(json.loads(Path(arguments[1]).read_text(encoding="utf-8"))), sep="\n")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "run.json"
        command = [sys.executable, "-m", "pytest", "perf/test_peers.py", "-q", f"--benchmark-json={file}"]
        status = subprocess.run([*command, *(["-k", arguments[0]] if arguments else [])], cwd=ROOT, check=False)
        if status.returncode == 0:
            return main(["--from", str(file)])
    return status.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
