"""CUDA graphs: a function of tensors recorded once for each shape of its arguments, and replayed.

Source: torch.cuda.CUDAGraph; the wrapper keyed by shapes follows huggingface/flux-fast and chengzeyi/stable-fast.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

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
        with torch.inference_mode(False):  # static inputs made in that mode could not be overwritten outside of it
            inputs = tuple(cloned(argument) for argument in arguments)
        self.inputs = leaves(inputs)
        device = self.inputs[0].device
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_CALLS):
                function(*inputs)
        torch.cuda.current_stream(device).wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        # Another thread that calls CUDA meanwhile, such as a data loader's, must not end the recording.
        mode: dict[str, Any] = {"capture_error_mode": "thread_local"} if has("capture_error_mode") else {}
        # By itself torch records on one stream, of the device that was current at the first recording of the process. Not that of
        # the warm-up, whose workspaces are outside of the recording's memory.
        with torch.cuda.graph(self.graph, stream=torch.cuda.Stream(device), **mode):
            self.output = function(*inputs)
        self.copied: list[tuple[Tensor | None, int]] = [(None, 0)] * len(self.inputs)

    def __call__(self, arguments: tuple[Nested, ...]) -> Nested:
        for i, (static, new) in enumerate(zip(self.inputs, leaves(arguments))):
            # A tensor copied at the last call and unchanged since, such as a run's context, needs no second copy. Changes of
            # tensors of the inference mode are not counted.
            version = -1 if new.is_inference() else new._version
            if self.copied[i][0] is not new or self.copied[i][1] != version or version < 0:
                static.copy_(new)
                self.copied[i] = (new, version)
        self.graph.replay()
        return cloned(self.output)  # the next replay overwrites the static output


def addresses_of(*networks: nn.Module) -> int:
    """A hash of the addresses and shapes of all parameters and buffers."""
    tensors = (tensor for network in networks for tensor in (*network.parameters(), *network.buffers()))
    return hash(tuple((tensor.data_ptr(), tensor.shape) for tensor in tensors))


class Graphed:
    """`function` of nested CUDA tensors as CUDA graphs, one recorded at the first call with each set of shapes.

    Results stay valid after later calls. The kernels may depend on nothing but the arguments' contents and the memory of
    `networks`, whose addresses a recording keeps: where they have changed, all recordings are made anew. every_call: whether
    each call compares them, which takes milliseconds of the host with a UNet of full size, or the caller by `begin_run`.
    """

    def __init__(self, function: Callable[..., Any], *networks: nn.Module, every_call: bool = True):
        self.function, self.networks, self.every_call = function, networks, every_call
        self.recordings: dict[tuple[Any, ...], _Recording] = {}
        self.addresses: int | None = None

    def begin_run(self, addresses: int | None = None) -> None:
        """Drop the recordings if the weights have moved. addresses: their `addresses_of`, where the caller has it."""
        addresses = addresses_of(*self.networks) if addresses is None else addresses
        if addresses != self.addresses:
            self.recordings.clear()
        self.addresses = addresses

    def __call__(self, *arguments: Nested) -> Any:
        if self.every_call:
            self.begin_run()
        key = tuple((leaf.shape, leaf.stride(), leaf.dtype) for leaf in leaves(arguments))
        if key not in self.recordings:
            self.recordings[key] = _Recording(self.function, arguments)
        return self.recordings[key](arguments)


class GraphedLoop:
    """A whole sampling loop as one CUDA graph for each plan, guidance scale and shape. loop: as sd.sampling.plan.run."""

    def __init__(self, network: nn.Module, loop: Callable[..., Tensor] = run):
        self.network, self.loop = network, loop
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

            self.graphs[key] = Graphed(recorded, self.network)
        blended = None if blend is None else (blend.mask, blend.latents, blend.noise)
        x = self.graphs[key](x, noises, denoise.context, denoise.time_table, denoise.condition, blended)
        on_step(plan.steps, plan.steps)
        return x
