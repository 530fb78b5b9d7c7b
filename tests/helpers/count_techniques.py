"""What each technique asks of PyTorch in one UNet call, counted exactly: `python tests/helpers/count_techniques.py` prints the table,
and with `--compiled`, after minutes, what torch.compile's code generator makes of them.

Of the embedded model and of SD2's topology at a fifth of its width (34 M parameters), guidance's batch of 2, fp32, eager.
Counts have no noise, so that docs/optimisations.md holds the table and tests/sd/test_counts.py holds it to the code.
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
        self.x, self.timesteps = torch.randn(2, 4, size, size), torch.full((2,), 501.0)
        self.context = torch.randn(2, 77, config.context_dim)

    @torch.no_grad()
    def call(self, counting: Counting | None = None, **fields):
        """The output of one UNet call as the sampling loop makes it under these optimisations."""
        how = Optimisations(**{"attention": DEFAULT_ATTENTION, **fields})
        apply(self.unet, *self.others, torch.device("cpu"), how)
        x, times, context = self.x.contiguous(memory_format=how.memory_format()), self.timesteps, self.context
        if how.cache_context_kv:
            context = self.unet.project_context(context)
        if how.cache_time_embeddings:
            times = self.unet.time_table(times[:1])
        if counting is None:
            return self.unet(x, times, context)
        with counting:
            return self.unet(x, times, context)

    def count(self, **fields) -> Counting:
        """What such a call consists of."""
        counting = Counting()
        self.call(counting, **fields)
        return counting


def table() -> list[str]:
    """Lines of Markdown."""
    heads = [f"{name}: {what}" for name in CASES for what in ("ops", "MB moved", "copies")]
    lines = ["| " + " | ".join(["technique", *heads]) + " |", "|---" * (len(heads) + 1) + "|"]
    cases = [Case(name) for name in CASES]
    for row, fields in ROWS.items():
        counts = [case.count(**fields) for case in cases]
        cells = [cell for one in counts for cell in (str(one.total), f"{one.bytes / 1e6:.1f}", str(one.copies))]
        lines.append("| " + " | ".join([f"`{row}`" if row != "all of them" else row, *cells]) + " |")
    return lines


def compiled_table() -> Iterator[str]:
    """Lines of Markdown, one as soon as it is known: the kernels of one compiled call and inductor's graphs."""
    from torch._dynamo.utils import counters
    from torch._inductor import config
    from torch._inductor.utils import run_and_get_code

    config.force_disable_caches = True  # what comes from a cache is not generated
    heads = [f"{name}: {what}" for name in CASES for what in ("fused", "of libraries")]
    yield "| " + " | ".join(["technique, compiled", *heads]) + " |"
    yield "|---" * (len(heads) + 1) + "|"
    cases = [Case(name) for name in CASES]
    for row, fields in ROWS.items():
        if row == "original":  # waits for the host within the call: not one graph
            continue
        cells = []
        for case in cases:
            torch._dynamo.reset()
            counters.clear()
            _, (code,) = run_and_get_code(case.call, compile="default", **fields)  # one graph, or this fails
            assert not counters["graph_break"]
            cells += map(str, kernels_in(code))
        yield "| " + " | ".join([f"`{row}`" if row != "all of them" else row, *cells]) + " |"


def kernels_in(code: str) -> tuple[int, int]:
    """(fused ones that were generated, calls of libraries) in the function that inductor's output calls them from."""
    called = code[code.index("def call(") :]
    fused = re.findall(r"^ +cpp_fused\w*\(", called, re.MULTILINE)
    library = re.findall(r"^ +(?:\w+ = )?(?:extern_kernels|torch\.ops)[\w.]*\(", called, re.MULTILINE)
    return len(fused), len(library)


if __name__ == "__main__":
    print(f"torch {torch.__version__}")
    for line in compiled_table() if "--compiled" in sys.argv else table():
        print(line, flush=True)
