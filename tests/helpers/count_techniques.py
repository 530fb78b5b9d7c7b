"""Exact operator counts of one UNet call by technique: `python tests/helpers/count_techniques.py` prints the table.

With `--compiled` it prints the kernels that torch.compile generates, which takes minutes. Models: the embedded one and SD2's
topology at a fifth of its width (34 M parameters); guidance's batch of 2, fp32, eager. docs/optimisations.md contains
the table, and tests/sd/test_counts.py compares it with the code.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator

import torch
from counting import Counting

from perf.test_peers import CASES
from sd.attention.functions import DEFAULT_ATTENTION
from sd.config.presets import preset
from sd.models.autoencoder import Autoencoder
from sd.models.text_encoder import TextEncoder
from sd.models.unet import UNet
from sd.optimise.apply import apply
from sd.optimise.optimisations import Optimisations

CACHES = {"cache_context_kv": True, "cache_time_embeddings": True}
ROWS = {
    "original": {"attention": "original", "original_steps": True},
    "none": {},
    "channels_last": {"channels_last": True},
    "fused_qkv": {"fused_qkv": True},
    "fused_kv": {"fused_kv": True},
    "cache_context_kv": {"cache_context_kv": True},
    "cache_time_embeddings": {"cache_time_embeddings": True},
    "shared_guidance": {"shared_guidance": True},
    "all of them": {"channels_last": True, "fused_qkv": True, **CACHES},
}


class Case:
    """A UNet with seeded weights, and its inputs."""

    def __init__(self, name: str):
        config, size = CASES[name]
        torch.manual_seed(0)
        self.unet = UNet(config).eval().requires_grad_(False)
        # `apply` takes all three networks; these two are not called.
        self.others = Autoencoder(preset("tiny").autoencoder), TextEncoder(preset("tiny").text)
        self.x, self.timesteps = torch.randn(1, 4, size, size), torch.full((2,), 501.0)
        self.context = torch.randn(2, 77, config.context_dim)

    @torch.no_grad()
    def call(self, counting: Counting | None = None, **fields):
        """The output of one UNet call with the inputs of the sampling loop under these optimisations."""
        chosen = Optimisations(**{"attention": DEFAULT_ATTENTION, **fields})
        apply(self.unet, *self.others, torch.device("cpu"), chosen)
        x, times, context = self.x, self.timesteps, self.context
        if chosen.shared_guidance:
            times = times[:1]
        else:
            x = torch.cat([x, x])
        x = x.contiguous(memory_format=chosen.memory_format())
        if chosen.cache_context_kv:
            context = self.unet.project_context(context)
        if chosen.cache_time_embeddings:
            times = self.unet.time_table(times[:1])
        if counting is None:
            return self.unet(x, times, context)
        with counting:
            return self.unet(x, times, context)

    def count(self, **fields) -> Counting:
        """The counts of such a call."""
        counting = Counting()
        self.call(counting, **fields)
        return counting


def table() -> list[str]:
    """Lines of Markdown."""
    heads = [f"{name}: {quantity}" for name in CASES for quantity in ("ops", "MB moved", "copies")]
    lines = ["| " + " | ".join(["technique", *heads]) + " |", "|---" * (len(heads) + 1) + "|"]
    cases = [Case(name) for name in CASES]
    for row, fields in ROWS.items():
        counts = [case.count(**fields) for case in cases]
        cells = [cell for c in counts for cell in (str(c.total), f"{c.bytes / 1e6:.1f}", str(c.copies))]
        lines.append("| " + " | ".join([f"`{row}`" if row != "all of them" else row, *cells]) + " |")
    return lines


def compiled_table() -> Iterator[str]:
    """Yield lines of Markdown: the kernels of one compiled call, row by row."""
    from torch._dynamo.utils import counters
    from torch._inductor import config
    from torch._inductor.utils import run_and_get_code

    config.force_disable_caches = True  # cached code is not generated
    heads = [f"{name}: {source}" for name in CASES for source in ("fused", "of libraries")]
    yield "| " + " | ".join(["technique, compiled", *heads]) + " |"
    yield "|---" * (len(heads) + 1) + "|"
    cases = [Case(name) for name in CASES]
    for row, fields in ROWS.items():
        if row == "original":  # synchronises within the call: not one graph
            continue
        cells = []
        for case in cases:
            torch._dynamo.reset()
            counters.clear()
            _, (code,) = run_and_get_code(case.call, compile="default", **fields)  # fails unless there is one graph
            assert not counters["graph_break"]
            cells += map(str, kernels_in(code))
        yield "| " + " | ".join([f"`{row}`" if row != "all of them" else row, *cells]) + " |"


def kernels_in(code: str) -> tuple[int, int]:
    """(generated fused kernels, library calls) in the `call` function of inductor's output."""
    called = code[code.index("def call(") :]
    fused = re.findall(r"^ +cpp_fused\w*\(", called, re.MULTILINE)
    library = re.findall(r"^ +(?:\w+ = )?(?:extern_kernels|torch\.ops)[\w.]*\(", called, re.MULTILINE)
    return len(fused), len(library)


if __name__ == "__main__":
    print(f"torch {torch.__version__}")
    for line in compiled_table() if "--compiled" in sys.argv else table():
        print(line, flush=True)
