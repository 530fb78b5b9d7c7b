"""CUDA graphs: a function of tensors recorded once for each shape of its arguments, and replayed.

Source: torch.cuda.CUDAGraph; the wrapper keyed by shapes follows huggingface/flux-fast and chengzeyi/stable-fast.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sd.attention.modules import ProjectedContext
from sd.features import has
from sd.sampling.blend import Blend
from sd.sampling.denoiser import Denoiser
from sd.sampling.plan import Plan, run

# Arguments and results: a tensor, None, or tuples of them.
Nested = Tensor | None | tuple["Nested", ...]
WARM_UP_CALLS = 3  # libraries choose their kernels and workspaces before the recording


def leaves(nested: Nested) -> list[Tensor]:
    """The tensors in nested tuples, in order, without None."""
    if isinstance(nested, Tensor):
        return [nested]
    return [] if nested is None else [leaf for value in nested for leaf in leaves(value)]


def cloned(nested: Nested) -> Nested:
    """A copy of nested tuples and of their tensors, strides included."""
    if isinstance(nested, Tensor):
        return nested.clone()
    return None if nested is None else tuple(cloned(value) for value in nested)


class _Recording:
    """One graph with its static input and output memory."""

    def __init__(self, function: Callable[..., Any], arguments: tuple[Nested, ...]):
        inputs = tuple(cloned(argument) for argument in arguments)
        self.inputs = leaves(inputs)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_CALLS):
                function(*inputs)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        # Another thread that calls CUDA meanwhile, such as a data loader's, must not end the recording.
        mode: dict[str, Any] = {"capture_error_mode": "thread_local"} if has("capture_error_mode") else {}
        with torch.cuda.graph(self.graph, **mode):
            self.output = function(*inputs)
        self.copied: list[tuple[Tensor | None, int]] = [(None, 0)] * len(self.inputs)

    def __call__(self, arguments: tuple[Nested, ...]) -> Nested:
        for i, (static, new) in enumerate(zip(self.inputs, leaves(arguments))):
            # A tensor copied at the last call and unchanged since, such as a run's context, needs no second copy.
            if self.copied[i][0] is not new or self.copied[i][1] != new._version:
                static.copy_(new)
                self.copied[i] = (new, new._version)
        self.graph.replay()
        return cloned(self.output)  # the next replay overwrites the static output


class Graphed:
    """`function` of nested CUDA tensors as CUDA graphs, one recorded at the first call with each set of shapes.

    Results stay valid after later calls. The kernels may depend on nothing but the arguments' contents, the contents of
    memory that outlives the graphs, and state(), another value of which makes another recording.
    """

    def __init__(self, function: Callable[..., Any], state: Callable[[], Any] = lambda: None):
        self.function, self.state = function, state
        self.recordings: dict[tuple[Any, ...], _Recording] = {}

    def __call__(self, *arguments: Nested) -> Any:
        key = (self.state(), *((leaf.shape, leaf.stride(), leaf.dtype) for leaf in leaves(arguments)))
        if key not in self.recordings:
            self.recordings[key] = _Recording(self.function, arguments)
        return self.recordings[key](arguments)


class GraphedLoop:
    """A whole sampling loop as one CUDA graph for each plan, guidance scale and shape. loop: as sd.sampling.plan.run."""

    def __init__(self, loop: Callable[..., Tensor] = run):
        self.loop = loop
        self.graphs: dict[tuple[Plan, float | None, bool, bool], Graphed] = {}

    def __call__(
        self,
        plan: Plan,
        denoise: Denoiser,
        x: Tensor,
        noises: Tensor | None,
        on_step: Callable[[int, int], None],
        blend: Blend | None = None,
    ) -> Tensor:
        """As sd.sampling.plan.run, but on_step is called only once, after the replay."""
        # A condition and a blend are both tensors: the key of Graphed, the list of shapes, does not tell which is missing.
        key = (plan, denoise.guidance, denoise.condition is None, blend is None)
        if key not in self.graphs:

            def recorded(
                x: Tensor,
                noises: Tensor | None,
                context: Tensor | ProjectedContext,
                time_table: Tensor | None,
                condition: Tensor | None,
                blended: tuple[Tensor, Tensor, Tensor] | None,
            ) -> Tensor:
                copied = denoise.with_tensors(context, time_table, condition)
                return self.loop(plan, copied, x, noises, None, None if blended is None else Blend(*blended))

            self.graphs[key] = Graphed(recorded)
        blended = None if blend is None else (blend.mask, blend.latents, blend.noise)
        x = self.graphs[key](x, noises, denoise.context, denoise.time_table, denoise.condition, blended)
        on_step(plan.steps, plan.steps)
        return x
