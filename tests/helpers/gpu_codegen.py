"""GPU code of the compiled networks, generated, compiled to machine code and counted on a machine without a GPU.

    python tests/helpers/gpu_codegen.py --write                     write the rows of docs/gpu-code.md from what ran
    python tests/helpers/gpu_codegen.py CASE [--json] [--ptxas]     one row, or its numbers; with the machine code's resources
    python tests/helpers/gpu_codegen.py CASE --code FILE            also write the generated code
    python tests/helpers/gpu_codegen.py --options             the options of inductor that change the code, by compile mode

dynamo, AOT autograd and inductor run as on a GPU, on fake tensors (fake_gpu.py). Where inductor would choose between
kernels by a measurement, it counts the candidates and keeps the library's. A case that is not compiled counts operators.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[2]))
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")


@dataclass(frozen=True)
class Case:
    """One call. part: unet, step, autoencoder or text_encoder; optimise: of --optimise; batch: images."""

    part: str
    model: str
    optimise: str
    batch: int
    gpu: str = "sm_90"


CASES = {
    "sd2 unet, none": Case("unet", "sd2", "none", 1),
    "sd2 unet, fast": Case("unet", "sd2", "fast", 1),
    "sd2 unet, fast and max-autotune": Case("unet", "sd2", "fast,max-autotune-no-cudagraphs", 1),
    "sd1 unet, fast": Case("unet", "sd1", "fast", 1),
    "sd2 step, fast": Case("step", "sd2", "fast,compile_step", 1),
    "sd2 autoencoder, fast": Case("autoencoder", "sd2", "fast", 1),
    "sd2 text encoder, fast": Case("text_encoder", "sd2", "fast", 1),
    "sd2 unet, fast, batch 8": Case("unet", "sd2", "fast", 8),
    "sd2 unet, fast, sm_80": Case("unet", "sd2", "fast", 1, "sm_80"),
    "tiny unet, fast": Case("unet", "tiny", "fast", 1),
    "tiny unet, fast, sm_80": Case("unet", "tiny", "fast", 1, "sm_80"),
}
NEWEST = "2.15"
# The torch of the GPU machines at hand; its calls are some of CASES.
OLDER, OLDER_CALLS = "2.11", ("sd2 unet, fast", "sd2 autoencoder, fast", "sd2 text encoder, fast", "tiny unet, fast")
RELEASE = ".".join(metadata.version("torch").split(".")[:2])  # of this interpreter's torch
MANY = 65536  # elements: the images of all levels, but not the partial statistics of a norm
PAGE = Path(__file__).parents[2] / "docs" / "gpu-code.md"


def row_name(name: str, release: str = RELEASE) -> str:
    """The name of a call's row in the table."""
    return f"{name}, torch {release}" if release == OLDER else name


ROWS = (*CASES, *(row_name(name, OLDER) for name in OLDER_CALLS))


def call_names() -> list[str]:
    """The calls that are counted with this torch."""
    return [*(OLDER_CALLS if RELEASE == OLDER else CASES)]


def missing() -> str | None:
    """The reason why this interpreter cannot generate the code, naming what it lacks; None if it can."""
    if RELEASE not in (NEWEST, OLDER):
        return f"the code and its counts are those of torch {NEWEST} and {OLDER}, and this is torch {RELEASE}"
    return None if importlib.util.find_spec("triton") else "needs triton, which comes with torch for NVIDIA GPUs"


@dataclass(frozen=True)
class Counts:
    """Counts of one call; launches are the sum of the next four.

    generated: launches of generated kernels; of a call that is not compiled, all other operators. kernels: distinct generated
    kernels. copies: launches that only change a layout; of a call that is not compiled, also a dtype. transposed: launches of
    generated kernels with strided accesses (`strides`), None of a call that is not compiled. bytes: inductor's
    count of what all kernels read and write. problems: distinct shapes for which inductor would measure kernels;
    candidates: Triton's for these.
    """

    convolutions: int
    products: int
    attention: int
    generated: int
    kernels: int
    convolutions_nhwc: int
    copies: int
    transposed: int | None
    bytes: int
    problems: int
    candidates: int
    others: tuple[str, ...]  # library calls of no known class

    @property
    def launches(self) -> int:
        return self.convolutions + self.products + self.attention + self.generated

    def row(self, name: str) -> str:
        """A line of the table in Markdown."""
        cells = [
            f"`{name}`",
            self.launches,
            f"{self.convolutions} ({self.convolutions_nhwc})",
            self.products,
            self.attention,
            self.generated,
            self.kernels,
            self.copies,
            "-" if self.transposed is None else self.transposed,
            f"{self.bytes / 1e9:.2f}",
            self.problems,
            self.candidates,
        ]
        return "| " + " | ".join(map(str, cells)) + " |"


HEAD = (
    "| call | launches | convolutions (NHWC) | products | attention | generated | distinct | copies | transposed | GB | "
    "autotuned | candidates |\n" + "|---" * 12 + "|"
)


def eager_counts(call: Callable[[], Any]) -> Counts:
    """Operators of a call that is not compiled; PyTorch launches one or two kernels for each."""
    from counting import Counting

    with Counting() as counting:
        call()
    ops = counting.ops
    products = sum(ops[name] for name in ("addmm", "mm", "bmm", "baddbmm"))
    attention = sum(count for name, count in ops.items() if name.startswith("_scaled_dot_product"))
    nhwc = sum(_is_nhwc(out.shape, out.stride()) for name, _, out in counting.calls if name == "convolution")
    others = counting.total - ops["convolution"] - products - attention
    counts = ops["convolution"], products, attention, others
    return Counts(*counts, 0, nhwc, counting.copies, None, counting.bytes, 0, 0, ())


@dataclass(frozen=True)
class Generated:
    """Inductor's output for one call, as Python source, with its byte count and the autotuning it would do."""

    code: str
    bytes: int
    choices: dict[str, int]  # Triton candidates by problem

    def kernels(self) -> dict[str, str]:
        """The source of each generated Triton kernel by name."""
        return dict(re.findall(r"^(triton_\w+) = async_compile\.triton\('\w+', '''(.*?)''',", self.code, re.S | re.M))

    def counts(self) -> Counts:
        body = self.code[self.code.index("    def call(self, args):") :]
        launched = Counter(re.findall(r"^ +(triton_\w+)\.run\(", body, re.M))
        library = re.findall(r"^ +(?:\w+ = )?(?:extern_kernels\.|torch\.ops\.\w+\.)(\w+)", body, re.M)
        groups = {"convolution": 0, "addmm|mm|bmm|baddbmm|bias_addmm": 0, r"_scaled_dot_product_\w+": 0}
        others = []
        for name in library:
            pattern = next((pattern for pattern in groups if re.fullmatch(pattern, name)), None)
            if pattern is None:
                others.append(name)
            else:
                groups[pattern] += 1
        kernels = self.kernels()
        assert launched.keys() <= kernels.keys()
        layouts = re.findall(
            r"^ +(buf\d+) = extern_kernels\.convolution\(.*\n +assert_\w+\(\1, \((.*?)\), \((.*?)\),", body, re.M
        )
        return Counts(
            *groups.values(),
            generated=sum(launched.values()),
            kernels=len(kernels),
            convolutions_nhwc=sum(_is_nhwc(*map(_numbers, layout[1:])) for layout in layouts),
            copies=sum(count for name, count in launched.items() if only_moves(kernels[name])),
            transposed=sum(count for name, count in launched.items() if strides(kernels[name])),
            bytes=self.bytes,
            problems=len(self.choices),
            candidates=sum(self.choices.values()),
            others=tuple(others),
        )


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(", ")))


def _is_nhwc(shape: Sequence[int], strides: Sequence[int]) -> bool:
    _, channels, _, width = shape
    return tuple(strides)[1:] == (1, width * channels, channels)


def only_moves(source: str) -> bool:
    """Whether a generated kernel stores what it loads in another layout: no arithmetic, no concatenation, no other dtype."""
    signature = re.search(r"'signature': \{(.*?)\}", source)
    assert signature, source
    types = set(re.findall(r"'\*(\w+)'", signature[1]))
    values = re.findall(r"^ +tmp\d+ = (.*)$", source, re.M)
    return len(types) == 1 and bool(values) and all(re.match(r"tl\.load\(|tmp\d+\.to\(", value) for value in values)


def strides(source: str) -> bool:
    """Whether a generated kernel of at least MANY elements loads or stores with a stride along its fastest index.

    Neighbouring threads then access distant memory, as where an image is written in NCHW and read in NHWC.
    """
    sizes = re.search(r"size_hints=\{(.*?)\}", source)
    assert sizes, source
    if math.prod(map(int, re.findall(r": (\d+)", sizes[1]))) < MANY:
        return False
    reduces_neighbours = "r0_index = " in source and "ReductionHint.OUTER" not in source
    index = "r0_index" if reduces_neighbours else "xindex"
    fastest = "|".join([index, *re.findall(rf"^ +(\w+) = (?:\({index} % \d+\)|{index})$", source, re.M)])
    addresses = " ".join(re.findall(r"tl\.(?:load|store)\(\w+ \+ \((.*?)\), ", source))
    # A factor of the index, as in 320*x0 or 4096*((-320) + x0); 512*(x0 // 16) + x0 % 16 has runs of 16 neighbours.
    return re.search(rf"\b\d+\*(?:\((?:\(-\d+\) \+ )?)?(?:{fastest})\b(?! //)", addresses) is not None


def generate(call: Callable[[], Any]) -> Generated:
    """Inductor's output for the graph that `call` compiles; the call ends where the code would be loaded."""
    from torch._inductor import config
    from torch._inductor.graph import GraphLowering
    from torch._inductor.select_algorithm import AlgorithmSelectorCache, ExternKernelCaller

    outputs: list[tuple[str, int]] = []
    choices: dict[str, int] = {}

    class Captured(Exception):
        pass

    def capture(graph: Any, code: Any) -> Any:
        outputs.append((getattr(code, "value", code), int(graph.count_bytes()[0])))
        raise Captured

    def choose(self: Any, name: str, candidates: list[Any], inputs: list[Any], layout: Any, *_: Any, **__: Any) -> Any:
        shapes = [(str(x.get_dtype()), *map(str, x.get_size()), *map(str, x.get_stride())) for x in inputs]
        if config.max_autotune:  # otherwise it measures nothing
            choices[f"{name} {shapes} {layout}"] = sum(not isinstance(x, ExternKernelCaller) for x in candidates)
        chosen = next(x for x in candidates if isinstance(x, ExternKernelCaller))
        node = chosen.output_node()
        return node if RELEASE == OLDER else (node, chosen)

    with (
        mock.patch.object(GraphLowering, "_compile_to_module_lines", capture),
        mock.patch.object(AlgorithmSelectorCache, "__call__", choose),
    ):
        try:
            call()
        except Exception:
            if not outputs:
                raise
    assert len(outputs) == 1, f"{len(outputs)} graphs"
    return Generated(*outputs[0], choices)


def call_of(case: Case) -> Callable[[], Any]:
    """The call of a case; to be made and called within fake_gpu."""
    import torch
    from fake_gpu import CUDA, FakeModel

    from sd.optimise.presets import parse
    from sd.sampling.samplers import sampler
    from sd.sampling.schedule import Schedule

    if case.part == "step":
        with torch.utils._mode_utils.no_dispatch():
            plan = sampler("plms")(Schedule(), 4, 0.0)
    model = FakeModel(case.model, parse(case.optimise, CUDA))
    x = model.latents(case.batch)
    if case.part == "text_encoder":
        return lambda: model.text_encoder(model.tokens(case.batch))
    if case.part == "autoencoder":
        return lambda: model.autoencoder.to_pixels(x)
    if case.part == "step":
        denoise = model.denoiser(case.batch, sorted({evaluation.t for evaluation in plan.evaluations}))
        return lambda: model.calls.sample(plan, denoise, x, None, None)
    denoise = model.denoiser(case.batch, [501.0])
    return lambda: denoise(x, 501.0, 0.5)


def machine_code(generated: Generated) -> dict[str, dict[str, int]]:
    """Registers, stack, local and shared memory of every generated kernel in its first configuration, from ptxas."""
    import triton
    from torch._inductor.codecache import PyCodeCache

    uses = {}
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        for name, source in generated.kernels().items():
            tuner = getattr(PyCodeCache.load(source), name)
            binary = tuner._precompile_config(tuner.configs[0]).kernel
            cubin.write_bytes(binary.asm["cubin"] if hasattr(binary, "asm") else Path(binary.cubin_path).read_bytes())
            command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(cubin)]
            report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            use = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", report)}
            uses[name] = {**use, "WARPS": tuner.configs[0].num_warps}
    return uses


def run(case: Case, ptxas: bool, code: Path | None = None) -> dict[str, Any]:
    """Counts of a case and, with `ptxas`, its kernels' resources. code: a file for the generated code."""
    from fake_gpu import fake_gpu

    if case.optimise == "none":
        with fake_gpu(case.gpu):
            return {"counts": dataclasses.asdict(eager_counts(call_of(case))), "resources": {}}
    with fake_gpu(case.gpu):
        generated = generate(call_of(case))
        counts = generated.counts()
    if code is not None:
        code.write_text(generated.code, encoding="utf-8")
    uses: dict[str, dict[str, int]] = {}
    if ptxas:
        with fake_gpu(case.gpu):
            uses = machine_code(generated)
    return {"counts": dataclasses.asdict(counts), "resources": uses}


def options_with_effect(mode: str) -> list[str]:
    """Options of inductor that change the code, or the candidates, of a 1x1 convolution, a norm and products of odd widths."""
    import torch
    from fake_gpu import CUDA, fake_gpu
    from torch import nn

    from sd.optimise.compile import INDUCTOR_OPTIONS, Compiler

    def compiled(*options: str) -> tuple[str, dict[str, int]]:
        torch._dynamo.reset()
        torch.set_default_dtype(torch.float16)
        with CUDA:
            linears = nn.Linear(4096, 65), nn.SiLU(), nn.Linear(65, 64)
            network = nn.Sequential(nn.Conv2d(32, 33, 1), nn.GroupNorm(1, 33), nn.SiLU(), nn.Flatten(2), *linears)
            x = torch.randn(2, 32, 64, 64)
        function = Compiler(mode, inductor=options)(network.requires_grad_(False).forward)
        generated = generate(lambda: function(x))
        return re.sub(r"#.*|'(backend_hash|kernel_num_gb)': [^,}]*", "", generated.code), generated.choices

    with fake_gpu("sm_90"):
        plain = compiled()
        assert compiled() == plain
        return [name for name in INDUCTOR_OPTIONS if compiled(name) != plain]


def rows_in(text: str) -> dict[str, str]:
    """The rows of the table in a page, by the name of their call."""
    lines = text.splitlines()
    columns = HEAD.splitlines()[0].count("|")
    return {line.split("`")[1]: line for line in lines if line.startswith("| `") and line.count("|") == columns}


def changes(name: str, row: str, text: str) -> str:
    """COUNTS and what differs between a row and that of a page, for example `launches 548 -> 568`."""
    heads = [head.strip() for head in HEAD.splitlines()[0].split("|")[2:-1]]
    old, new = (cells.split("|")[2:-1] if cells else [] for cells in (rows_in(text).get(name), row))
    if not old:
        return f"COUNTS {name}: new, {row}"
    pairs = [f"{head} {a.strip()} -> {b.strip()}" for head, a, b in zip(heads, old, new) if a.strip() != b.strip()]
    return f"COUNTS {name}: {', '.join(pairs) or 'unchanged'}"


def write(rows: dict[str, str]) -> None:
    """Replace the table of the page: the given rows, and for other calls those that it has."""
    text = PAGE.read_text(encoding="utf-8")
    rows = {**rows_in(text), **rows}
    table = "\n".join([HEAD, *(rows[name] for name in ROWS if name in rows)])
    begin = text.index(HEAD)
    end = text.index("\n\n", begin)
    PAGE.write_text(text[:begin] + table + text[end:], encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", nargs="*", choices=[[], *call_names()], help="default: all")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--ptxas", action="store_true")
    parser.add_argument("--code", metavar="FILE", type=Path, help="a file for the generated code of one case")
    parser.add_argument("--options", metavar="MODE", nargs="?", const="default", help="a compile mode")
    parser.add_argument("--write", action="store_true", help="also write the rows into docs/gpu-code.md")
    arguments = parser.parse_args(argv)
    if missing():
        parser.error(str(missing()))
    if arguments.code and len(arguments.case) != 1:
        parser.error("--code needs one case")
    if arguments.options:
        print(json.dumps(options_with_effect(arguments.options)))
        return
    if not arguments.json:
        print(HEAD)
    page = PAGE.read_text(encoding="utf-8")
    for name in arguments.case or call_names():
        # A process for each, since torch keeps what it asked about the GPU.
        alone = len(arguments.case) == 1
        result = run(CASES[name], arguments.ptxas, arguments.code) if alone else _in_a_process(name)
        row = Counts(**result["counts"]).row(row_name(name))
        print(json.dumps(result) if arguments.json else row, flush=True)
        print(changes(row_name(name), row, page), file=sys.stderr)
        if arguments.write:
            write({row_name(name): row})


def _in_a_process(name: str) -> dict[str, Any]:
    command = [sys.executable, __file__, name, "--json"]
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(output.splitlines()[-1])


if __name__ == "__main__":
    main()
