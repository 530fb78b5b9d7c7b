"""torch.compile of the networks and of the sampling step: modes, scopes and inductor's options."""

from __future__ import annotations

import contextvars
import functools
import importlib.util
import operator
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sd import choices
from sd.attention.functions import Attention, allowed_kernels
from sd.attention.modules import ProjectedContext
from sd.attention.observation import ObservedCall
from sd.errors import Unavailable
from sd.features import has, require
from sd.models.autoencoder import Autoencoder
from sd.models.layers import GroupNorm
from sd.models.text_encoder import TextEncoder
from sd.models.unet import UNet
from sd.optimise.aot import AheadOfTime
from sd.optimise.cuda_graphs import cloned
from sd.optimise.guards import GuardedOnce
from sd.optimise.runtimes import Runtime, require_runtime
from sd.sampling.blend import Blend
from sd.sampling.denoiser import Denoiser, predict_noise
from sd.sampling.plan import HISTORY_LENGTH, Plan

CUDA_GRAPH_MODES = ("reduce-overhead", "max-autotune")  # modes that record CUDA graphs by themselves
# The settings of torch._inductor.config behind each name.
INDUCTOR_OPTIONS: dict[str, dict[str, bool]] = {
    **{name: {name: True} for name in choices.INDUCTOR_OPTIONS},
    # Inductor reads it in coordinate descent alone.
    "coordinate_descent_check_all_directions": {
        "coordinate_descent_tuning": True,
        "coordinate_descent_check_all_directions": True,
    },
    "no_epilogue_fusion": {"epilogue_fusion": False},
    "no_shape_padding": {"shape_padding": False},
    "no_split_reductions": {
        "split_reductions": False
    },  # one kernel for the statistics of a norm instead of up to three
    "persistent_tma_matmul": {"triton.enable_persistent_tma_matmul": True},  # Hopper: templates with epilogues
    "programmatic_launch": {"triton.enable_pdl": True},  # Hopper: a kernel starts before the end of the one before it
}
CPU_OPTIONS = ("conv_1x1_as_mm", "freezing")  # the others change only code of GPUs
# Most elements of a group of a norm that are reduced in one kernel. On an H200 one kernel is faster for 20480 and slower for
# 40960 elements (docs/your-gpu.md). PyTorch has this limit for a GB200 where there are fewer groups than multiprocessors, and
# 8192 for older GPUs (torch/_inductor/choices.py of torch 2.15).
WHOLE_NORM = 32768
PREPARING_THREAD = "inductor-cpp-compiler"
# Limit of graphs per code object: sizes and batches of the UNet, or its 14 distinct blocks at several sizes.
MAX_GRAPHS = 128


# torch 2.0 has no function that returns the settings of a mode; these are its own, and those of the later no-cudagraphs.
_MODES_OF_TORCH_2_0 = {
    "reduce-overhead": {"triton.cudagraphs": True, "size_asserts": False},
    "max-autotune": {"epilogue_fusion": True, "max_autotune": True, "triton.cudagraphs": True},
    "max-autotune-no-cudagraphs": {"epilogue_fusion": True, "max_autotune": True},
}


@dataclass(frozen=True)
class Compiler:
    """Compiles functions of tensors. mode: one of COMPILE_MODES but none; inductor: names of INDUCTOR_OPTIONS.

    whole_norms: see `choices_of_whole_norms`.

    kernels: the SDPA kernels that the compiled code may use, empty for all. PyTorch chooses the kernel at compile time but
    leaves this restriction out of its cache keys, so it becomes a tag of the key.

    choice: of sd.optimise.aot.AheadOfTime.
    """

    mode: str
    backend: str = "inductor"
    inductor: tuple[str, ...] = ()
    kernels: tuple[str, ...] = ()
    whole_norms: bool = False
    choice: str = ""

    def require(self, device: torch.device) -> None:
        """Raise Unavailable for features that this torch, or on a CPU this machine, lacks."""
        if self.backend in choices.RUNTIMES:
            require_runtime(self.backend, device)
            return
        require("compile", f"compile mode {self.mode}")
        if self.backend in ("tensorrt", "cudagraphs") and device.type != "cuda":
            raise Unavailable(f"compile backend {self.backend}: needs an NVIDIA GPU, and the device is {device}")
        if self.backend == "tensorrt" and importlib.util.find_spec("torch_tensorrt") is None:
            raise Unavailable("compile backend tensorrt: needs the package torch_tensorrt: pip install torch-tensorrt")
        if self.backend == "aotinductor":
            require("aot", f"compile backend {self.backend}")
            if sys.platform != "linux":
                raise Unavailable(f"compile backend {self.backend}: runs on Linux; choose inductor")
        generates_code = self.backend in ("inductor", "aotinductor")
        if generates_code and (device.type == "cpu" or self.backend == "aotinductor"):  # whose host code is C++
            require_cpp_compiler(f"compile mode {self.mode}")
        if generates_code and (reason := why_no_triton(device)):
            raise Unavailable(f"compile mode {self.mode}: {reason}; leave it out")
        if self.whole_norms:
            require("reduction_choices", "whole_norms")
            if device.type == "cpu":
                raise Unavailable("whole_norms: changes no code for a CPU: leave it out")
        if self.inductor:
            from torch._inductor import config  # imports the compiler, which takes seconds
        for name in self.inductor:
            settings = INDUCTOR_OPTIONS[name]
            if not all(has_setting(config, setting) for setting in settings):
                raise Unavailable(f"inductor option {name}: torch {torch.__version__} does not have it")
            if all(operator.attrgetter(setting)(config) == value for setting, value in settings.items()):
                raise Unavailable(f"inductor option {name}: is the default of torch {torch.__version__}: leave it out")
            if name == "conv_1x1_as_mm" and self.mode.startswith("max-autotune"):
                raise Unavailable(f"inductor option {name}: mode {self.mode} includes it: leave it out")
            if device.type == "cpu" and name not in CPU_OPTIONS:
                raise Unavailable(f"inductor option {name}: changes no code for a CPU: leave it out")

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Compile `function` as one graph for each set of argument shapes; a graph break is an error."""
        if self.backend in choices.RUNTIMES:
            return Runtime(function, self.backend)
        if self.backend == "aotinductor":
            return AheadOfTime(function, self.choice)
        if self.backend == "tensorrt":
            import torch_tensorrt  # noqa: F401  registers the backend
        arguments: dict[str, Any] = {"fullgraph": True, "dynamic": False, "backend": self.backend}
        if has("recompile_limit"):
            arguments["recompile_limit"] = MAX_GRAPHS
        if self.backend == "inductor":
            arguments["options"] = self.options()
        compiled: Callable[..., Any] = torch.compile(function, **arguments)
        if not has("recompile_limit"):
            compiled = _with_graph_limit(compiled)
        if not self.kernels and not self.whole_norms and "freezing" not in self.inductor:
            return compiled

        def in_context(*arguments: Any) -> Any:
            with self._compile_context():
                return compiled(*arguments)

        return in_context

    @contextmanager
    def _compile_context(self) -> Iterator[None]:
        """Settings of the process at compile time: tags of the cache; Dynamo ignores `freezing` among the options."""
        tags = ["sdpa " + ",".join(self.kernels)] if self.kernels else []
        tags += [f"whole_norms {WHOLE_NORM}"] if self.whole_norms else []
        with ExitStack() as stack:
            if tags:
                stack.enter_context(cache_key_tag(" ".join(tags)))
            if self.whole_norms:
                from torch._inductor.virtualized import V

                stack.enter_context(V.set_choices_handler(choices_of_whole_norms()))
            if "freezing" in self.inductor:
                stack.enter_context(torch._inductor.config.patch(freezing=True))
            yield

    def options(self) -> dict[str, Any]:
        """Settings of inductor: those of the mode, then those named.

        The modes of max-autotune include coordinate descent, which tunes about 160 kernels of a UNet in turn, for minutes. It
        is an option by itself here.
        """
        of_mode: dict[str, Any] = {}
        if self.mode != "default":
            options = torch._inductor.list_mode_options if has("mode_options") else _MODES_OF_TORCH_2_0.__getitem__
            of_mode = dict(options(self.mode))
            of_mode.pop("coordinate_descent_tuning", None)
        for name in self.inductor:
            of_mode.update(INDUCTOR_OPTIONS[name])
        return of_mode

    def with_cloned_outputs(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Compile `function`; results stay valid after later calls."""
        return self.cloning(self(function))

    def cloning(self, compiled: Callable[..., Any]) -> Callable[..., Any]:
        """`compiled` with copied results where CUDA graphs overwrite their output memory at the next call."""
        records_graphs = self.mode in CUDA_GRAPH_MODES if self.backend == "inductor" else self.backend == "cudagraphs"
        return compiled if not records_graphs else lambda *arguments: cloned(compiled(*arguments))


@functools.cache
def choices_of_whole_norms() -> Any:
    """Inductor's choices, but reductions of up to WHOLE_NORM elements are not split.

    Most group norms of a UNet then compute their statistics in one kernel instead of two or three.
    """
    from torch._inductor.choices import InductorChoices

    class WholeNorms(InductorChoices):
        def reduction_split_factor(  # inductor passes the last argument by name
            self, device: Any, reduction_numel_hint: int, numel_hint: int, inner_reduction: bool
        ) -> int:
            if reduction_numel_hint <= WHOLE_NORM:
                return 1
            return int(super().reduction_split_factor(device, reduction_numel_hint, numel_hint, inner_reduction))

    return WholeNorms()


def has_setting(config: Any, setting: str) -> bool:
    """Whether inductor has the setting, such as `triton.enable_pdl`."""
    for name in setting.split("."):
        if not hasattr(config, name):
            return False
        config = getattr(config, name)
    return True


def _with_graph_limit(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """`compiled` with the limit MAX_GRAPHS where torch.compile has no argument for it."""
    from torch._dynamo import config

    names = ("recompile_limit", "accumulated_recompile_limit", "cache_size_limit", "accumulated_cache_size_limit")
    limits = {name: MAX_GRAPHS for name in names if hasattr(config, name)}

    def limited(*arguments: Any) -> Any:
        with config.patch(limits):
            return compiled(*arguments)

    return limited


def cache_key_tag(tag: str) -> AbstractContextManager[Any]:
    """Context that adds `tag` to the keys of the compile cache or, where torch has no tags, disables that cache."""
    if has("cache_key_tag"):
        config: Any = torch.compiler.config
        return config.patch(cache_key_tag=f"{config.cache_key_tag} {tag}")  # type: ignore[no-any-return]
    from torch._functorch import config as functorch

    patch: Any = getattr(functorch, "patch", None)
    return patch(enable_autograd_cache=False) if hasattr(functorch, "enable_autograd_cache") else nullcontext()


def why_no_triton(device: torch.device) -> str | None:
    """Why inductor can generate no code for this GPU, or None; nothing is known of a GPU that is not here."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    if importlib.util.find_spec("triton") is None:
        return "needs Triton, which is not installed"
    capability = torch.cuda.get_device_capability(device)
    return (
        None
        if capability >= (7, 0)
        else f"Triton needs a GPU of sm_70 or newer, and this is sm_{capability[0]}{capability[1]}"
    )


def require_cpp_compiler(option: str) -> None:
    """Raise Unavailable, naming the option, if inductor would find no C++ compiler, or no headers of Python."""
    if reason := choices.why_no_inductor():
        raise Unavailable(f"{option}: {reason}")


@functools.cache
def prepare_cpp_compiler() -> None:
    """Let inductor prepare the compilation of C++ kernels in a thread, where torch has functions for these steps.

    It compiles up to three test programs to find the vector instructions of this CPU, and a header that all kernels share; also
    with a warm cache each process preprocesses that header, to see whether it has changed. The first call would do these one
    after the other, while a second core has nothing to do. Inductor keeps the results for the process. What raises here is left
    to the compilation, which does what is missing.
    """
    if not has("vector_instructions"):
        return
    # Imported before the thread starts: two threads that import one package may see it half-initialised.
    from torch._inductor import codecache, config, cpp_builder, cpu_vec_isa  # noqa: F401

    def prepare() -> None:
        with suppress(Exception):
            cpu_vec_isa.valid_vec_isa_list()
            if getattr(config, "cpp_cache_precompile_headers", False):
                # A kernel that does nothing: its compilation needs the header.
                codecache.CppPythonBindingsCodeCache.load_pybinding([], 'extern "C" void kernel() {}')

    # Settings of inductor are variables of the context. Not a daemon, which could leave half a file to another process.
    threading.Thread(target=contextvars.copy_context().run, args=(prepare,), name=PREPARING_THREAD).start()


def compile_blocks(unet: UNet, compiler: Compiler) -> None:
    """Regional compilation: each ResBlock and transformer block by itself; blocks of equal shapes share their code."""
    for block in (*unet.res_blocks, *unet.transformer_blocks()):
        vars(block)["forward"] = compiler(block.forward)


def separate_biases(unet: UNet, enabled: bool) -> None:
    """Add the bias of the linear layers before a residual or a norm in the kernel that follows, not in the product.

    A product with a bias is slower, and the kernel that follows reads its result in any case. Inductor has this as a pass
    (torch/_inductor/fx_passes/post_grad.py), but since torch 2.11 not in half precision, because the product is rounded once
    more. False undoes it.
    """
    linears: list[nn.Module] = [linear for block in unet.transformer_blocks() for linear in block.output_layers()]
    for transformer in unet.transformers:
        linears += [transformer.proj_in, transformer.proj_out]
    for linear in linears:
        vars(linear).pop("forward", None)
        if enabled and isinstance(linear, nn.Linear):  # SD1 projects by convolutions
            vars(linear)["forward"] = functools.partial(_product_then_bias, linear)


def use_nhwc(network: nn.Module, enabled: bool) -> None:
    """Write the group norms and concatenations of a network that is compiled in NHWC order, or as PyTorch's operators."""
    for module in network.modules():
        if isinstance(module, (GroupNorm, UNet)):
            module.nhwc = enabled


def _product_then_bias(linear: nn.Linear, x: Tensor) -> Tensor:
    product = F.linear(x, linear.weight)
    return product + linear.bias.to(product.dtype)  # under autocast the bias is fp32


def restore(unet: UNet, autoencoder: Autoencoder, text_encoder: TextEncoder) -> None:
    """Undo every compilation of the networks."""
    restore_unet(unet)
    use_nhwc(autoencoder.decoder, False)
    vars(autoencoder).pop("to_pixels", None)
    vars(text_encoder).pop("forward", None)


def restore_unet(unet: UNet) -> None:
    """Undo every replacement of a method of the UNet, its blocks or layers, and what is written for compiled code alone."""
    separate_biases(unet, False)
    use_nhwc(unet, False)
    for name in ("denoise", "denoise_with_features"):
        vars(unet).pop(name, None)
    for block in (*unet.res_blocks, *unet.transformer_blocks()):
        vars(block).pop("forward", None)


# Columns of a plan's table (see sd.sampling.plan.Evaluation), then the weights of the history. sigma: sqrt(1 - alpha^2).
COLUMNS = ("t", "c_in", "c_x", "alpha", "sigma", "c_skip", "c_out", "sigma_up", "guidance")


def plan_table(
    plan: Plan, guidance: float | None, device: torch.device | str, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Coefficients of a plan [evaluations, 16] on `device`: COLUMNS, then 1 + HISTORY_LENGTH weights, then zeros."""
    rows = []
    for call in plan.evaluations:
        sigma = (1 - call.alpha**2) ** 0.5
        row = [call.t, call.c_in, call.c_x, call.alpha, sigma, call.c_skip, call.c_out, call.sigma_up]
        row += [guidance or 0.0, *call.weights]
        # Rows of 16 numbers are aligned, so that inductor's kernels need no copy of them.
        rows.append(row + [0.0] * (16 - len(row)))
    return torch.tensor(rows, dtype=torch.float64).to(device, dtype)


class CompiledStep:
    """The sampling loop with one compiled graph for a step: UNet, guidance and sampler update.

    Every coefficient is a tensor: only a new shape, or guidance or noise added or removed, compiles again, not a step,
    sampler, guidance scale or prompt. The published experiment named this as an open problem.
    """

    def __init__(self, unet: UNet, compiler: Compiler, attention: Attention):
        self.unet, self.attention = unet, attention
        self.guarded = GuardedOnce(self._step, compiler(self._step), unet)
        self.call = ObservedCall(compiler.cloning(self.guarded))
        self.tables: dict[tuple[Any, ...], Tensor] = {}

    def _step(
        self,
        x: Tensor,
        timesteps: Tensor | None,
        context: Tensor | ProjectedContext,
        row: Tensor,
        history: tuple[Tensor, ...],
        noise: Tensor | None,
        guided: bool,
        predicts_v: bool,
        condition: Tensor | None,
        shared: bool,
    ) -> tuple[Tensor, Tensor]:
        """(x, output) after one evaluation. row [16]: of the plan's table; history: HISTORY_LENGTH outputs, newest first."""
        size = len(COLUMNS) + 1 + HISTORY_LENGTH
        t, c_in, c_x, alpha, sigma, c_skip, c_out, sigma_up, guidance, *weights = row[:size]
        if timesteps is None:
            timesteps = t.expand(1 if shared else len(x) * (2 if guided else 1))
        alpha_sigma = (alpha, sigma) if predicts_v else None
        scale = guidance if guided else None
        e = predict_noise(self.unet.denoise, c_in * x, timesteps, context, scale, alpha_sigma, condition, shared)
        output = c_skip * x + c_out * e
        x = c_x * x
        for weight, past in zip(weights, (output, *history)):
            x = x + weight * past
        return x if noise is None else x + sigma_up * noise, output

    def __call__(
        self,
        plan: Plan,
        denoise: Denoiser,
        x: Tensor,
        noises: Tensor | None = None,
        on_step: Callable[[int, int], None] | None = None,
        blend: Blend | None = None,
    ) -> Tensor:
        """As sd.sampling.plan.run."""
        if not plan.evaluations:  # img2img at a strength without steps has an empty table
            return plan.init_noise_sigma * x
        guided = denoise.guidance is not None
        key = (plan, denoise.guidance, x.device, x.dtype)
        if key not in self.tables:  # copied to the device at the first run only
            self.tables[key] = plan_table(plan, denoise.guidance, x.device, x.dtype)
        table = self.tables[key]
        x = plan.init_noise_sigma * x
        history = tuple(torch.zeros_like(x) for _ in range(HISTORY_LENGTH))
        call = self.guarded.of_run(self.call)
        step = 0
        for i, evaluation in enumerate(plan.evaluations):
            timesteps = None if denoise.time_table is None else denoise.timesteps(evaluation.t, x)
            noise = None if noises is None else noises[i]
            with allowed_kernels(self.attention):
                x, output = call(
                    x,
                    timesteps,
                    denoise.context,
                    table[i],
                    history,
                    noise,
                    guided,
                    denoise.predicts_v,
                    denoise.condition,
                    denoise.shared,
                )
            history = (output, *history[:-1])
            if evaluation.ends_step:
                step += 1
                if blend is not None:
                    x = blend(x, *plan.noise_level(i + 1))
                if on_step is not None:
                    on_step(step, plan.steps)
        return x
