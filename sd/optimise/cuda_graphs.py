"""CUDA graphs: a function of tensors recorded once for each shape of its arguments, and replayed.

Source: torch.cuda.CUDAGraph; the wrapper keyed by shapes follows huggingface/flux-fast and chengzeyi/stable-fast.
"""

from __future__ import annotations

import torch

from sd.sampling.samplers import Plan, run

WARM_UP_CALLS = 3  # before recording, so that libraries have chosen their kernels and their memory


def leaves(arguments) -> list[torch.Tensor]:
    """The tensors in nested tuples, in order; None is skipped."""
    if isinstance(arguments, torch.Tensor):
        return [arguments]
    return [] if arguments is None else [leaf for value in arguments for leaf in leaves(value)]


def _static(arguments):
    """The same nest with copies of its tensors, strides included."""
    if isinstance(arguments, torch.Tensor):
        return arguments.clone()
    return None if arguments is None else tuple(_static(value) for value in arguments)


class _Recording:
    """One graph, the memory it reads and the memory it writes."""

    def __init__(self, function, arguments):
        self.inputs = _static(arguments)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_CALLS):
                function(*self.inputs)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.output = function(*self.inputs)
        self.given = [(None, 0)] * len(leaves(arguments))

    def __call__(self, arguments):
        for i, (held, new) in enumerate(zip(leaves(self.inputs), leaves(arguments))):
            # What was given last time and not written to since, such as a run's context, is in place already.
            if self.given[i][0] is not new or self.given[i][1] != new._version:
                held.copy_(new)
                self.given[i] = (new, new._version)
        self.graph.replay()
        return _static(self.output)  # the graph writes to the same memory again at its next call


class Graphed:
    """`function` of tensors on a CUDA device, nested in tuples, that returns such, as CUDA graphs.

    Recorded at the first call with arguments of such shapes; a result is safe to keep. Its kernels must depend on
    nothing but the arguments' contents.
    """

    def __init__(self, function):
        self.function = function
        self.recordings = {}

    def __call__(self, *arguments):
        key = tuple((leaf.shape, leaf.stride(), leaf.dtype) for leaf in leaves(arguments))
        if key not in self.recordings:
            self.recordings[key] = _Recording(self.function, arguments)
        return self.recordings[key](arguments)


class GraphedLoop:
    """A whole sampling loop as one CUDA graph for each plan, guidance scale and shape. `loop`: as sd.sampling.samplers.run."""

    def __init__(self, loop=run):
        self.loop = loop
        self.graphs = {}

    def __call__(self, plan: Plan, denoise, x, noises, on_step):
        """As sd.sampling.samplers.run; on_step is called once, at the end, since a graph has no steps to stop at."""
        key = (plan, denoise.guidance)
        if key not in self.graphs:

            def recorded(x, noises, context, time_table):
                return self.loop(plan, denoise.with_tensors(context, time_table), x, noises)

            self.graphs[key] = Graphed(recorded)
        x = self.graphs[key](x, noises, denoise.context, denoise.time_table)
        on_step(plan.steps, plan.steps)
        return x
