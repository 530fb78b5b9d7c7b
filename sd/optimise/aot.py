"""Networks compiled ahead of time by AOTInductor, as compile backend `aotinductor`.

The compiled code is in packages (.pt2), which later processes load in milliseconds and call without Python between the kernels. A
package is for one set of argument shapes, layouts and threads. It holds no weights: these are arguments too, whose values
inductor cannot make constants of the code.
Source: torch.export and torch._inductor.aoti_compile_and_package; the use for diffusion follows huggingface/flux-fast.
"""

from __future__ import annotations

import contextvars
import functools
import hashlib
import os
import platform
import sys
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sd.errors import ConfigError
from sd.features import has
from sd.kernels.build import cache_folder
from sd.optimise.cuda_graphs import Nested, leaves
from sd.optimise.runtimes import Flat, kinds

BACKEND = "compile backend aotinductor"
REMEDY = "choose compile backend inductor"
# Starts of variables of the environment that change the code of inductor, and of those among them that do not.
SETTINGS = ("TORCHINDUCTOR_", "AOT_INDUCTOR_", "AOTINDUCTOR_", "CXX=", "ATEN_CPU_CAPABILITY=")
WITHOUT_EFFECT = ("TORCHINDUCTOR_CACHE_DIR", "TORCHINDUCTOR_COMPILE_THREADS")
# Settings that AOTInductor leaves: its metadata, and in torch 2.11 all that it has set and restored.
left_by_compilation: set[str] = set()
loaded_code = {"graphs": 0, "generated_kernels": 0}  # of the packages that this process loaded


class AheadOfTime:
    """A network's method from packages of AOTInductor, which are compiled and kept where there is none.

    choice: what else decides the code, such as the optimisations of the network. Compiled code checks nothing, so `code`
    compares what may change between two runs: layers, weights, attention, arguments and threads. For another choice make another
    object.
    """

    def __init__(self, method: Callable[..., Any], choice: str):
        self.method, self.choice = method, choice
        self.network: nn.Module = getattr(method, "__self__")  # noqa: B009
        self.packages: dict[Any, _Package] = {}
        self.contents = _Contents(self.network)
        _sources()  # as near to their import as possible

    def __call__(self, *arguments: Nested) -> Any:
        """As the method. Raises as `code` does."""
        return self.code(arguments)(*arguments)

    def code(self, arguments: tuple[Nested, ...]) -> Callable[..., Any]:
        """The code for arguments of this kind with the network's present weights, which may change in place.

        Raises NotImplementedError where a gradient is needed, or under autocast, ConfigError for layers whose code it cannot
        compare, and for a folder that cannot be written.
        """
        weights = self.contents.weights()
        if weights is None:
            _require_known_layers(self.network)
            self.contents = _Contents(self.network)
            weights = self.contents.weights()
            assert weights is not None
        if torch.is_grad_enabled() and any(x.requires_grad for x in (*weights, *leaves(arguments))):
            raise NotImplementedError(f"{BACKEND}: has no backward pass; {REMEDY}")
        if torch.is_autocast_enabled(leaves(arguments)[0].device.type):
            raise NotImplementedError(f"{BACKEND}: does not run under autocast; {REMEDY}")
        key = (torch.get_num_threads(), getattr(self.network, "attention", None), kinds(arguments), self.contents.kinds)
        if key not in self.packages:
            self.packages[key] = self._package(arguments, weights, repr(key))
        return functools.partial(self.packages[key], weights)

    def _package(self, arguments: tuple[Nested, ...], weights: list[Tensor], key: str) -> _Package:
        _require_known_layers(self.network)
        inputs = [*weights, *leaves(arguments)]
        identity = [repr(getattr(self.network, "config", None)), self.method.__name__, self.choice, key]
        identity += [_sources(), *_machine(inputs[-1].device), *_settings()]
        name = hashlib.sha256("\n".join(identity).encode()).hexdigest()[:32]
        folder = _folder()
        for file in folder.glob(f"{name}-*.pt2"):
            with suppress(RuntimeError):  # damaged: compiled again
                return _Package(file)
        names = [f"network.{name}" for name in self.contents.names]
        return _Package(_compile(_WithWeights(Flat(self.method, arguments), names), inputs, folder, name))


class _Contents:
    """The layers and weights of a network, none of which is kept alive for it.

    names: of the weights. kinds: what of them and of the layers decides the code.
    """

    def __init__(self, network: nn.Module):
        weights: dict[str, Tensor] = {}
        self.slots: list[tuple[dict[str, Any], str, Any, int]] = []
        self.sizes: list[tuple[dict[Any, Any], int]] = []
        for prefix, module in network.named_modules():
            values = (module._parameters, module._buffers, module._modules)
            self.sizes += [(owner, len(owner)) for owner in (*values, module._forward_hooks, module._forward_pre_hooks)]
            for owner in values:
                for name, value in owner.items():
                    is_weight = isinstance(value, Tensor)
                    known = None if value is None else weakref.ref(value)
                    self.slots.append((owner, name, known, value.data_ptr() if is_weight else 0))
                    if is_weight:
                        weights[f"{prefix}.{name}".lstrip(".")] = value
        self.names = list(weights)
        self.kinds = (repr(network), tuple(self.names), kinds(weights.values()))

    def weights(self) -> list[Tensor] | None:
        """The weights, or None where the network has another layer or weight, or a weight has other memory."""
        weights: list[Tensor] = []
        if any(len(owner) != size for owner, size in self.sizes):
            return None
        for owner, name, known, pointer in self.slots:
            value: Any = owner.get(name)
            is_known = known is None if value is None else known is not None and known() is value
            is_weight = isinstance(value, Tensor)
            if not is_known or (is_weight and value.data_ptr() != pointer):
                return None
            if is_weight:
                weights.append(value)
        return weights


class _WithWeights(nn.Module):
    """A network's method with the weights of the network as the first arguments."""

    flat: Flat

    def __init__(self, flat: Flat, names: list[str]):
        super().__init__()
        vars(self)["flat"] = flat  # not as a module, whose weights would be constants
        self.names = names

    def forward(self, *tensors: Tensor) -> Any:
        count = len(self.names)
        return torch.func.functional_call(self.flat, dict(zip(self.names, tensors[:count])), tensors[count:])


class _Package:
    """The loaded code of a package. Its name ends with the number of generated kernels."""

    def __init__(self, file: Path):
        # Not aoti_load_package, which imports the compiler for more than a second and reads the structure of the arguments anew
        # at every call.
        self.loader: Any = torch._C._aoti.AOTIModelPackageLoader(str(file), "model", True, 1, -1)
        loaded_code["graphs"] += 1
        loaded_code["generated_kernels"] += int(file.stem.rpartition("-")[2])

    def __call__(self, weights: list[Tensor], *arguments: Nested) -> Any:
        outputs = self.loader.boxed_run([*weights, *leaves(arguments)])
        return outputs[0] if len(outputs) == 1 else tuple(outputs)


def _compile(flat: nn.Module, inputs: list[Tensor], folder: Path, name: str) -> Path:
    """Write the package of that name into the folder when it is complete, so that another process never reads a part."""
    from torch._inductor import cpu_vec_isa, metrics

    def search() -> None:
        with suppress(Exception):  # left to the compilation
            cpu_vec_isa.valid_vec_isa_list()

    # The search compiles test programs, for which a second core has time. Settings of inductor are variables of the context.
    searching = threading.Thread(target=contextvars.copy_context().run, args=(search,))
    searching.start()
    before = metrics.generated_kernel_count
    try:
        with torch.inference_mode(False), torch.no_grad():
            exported = torch.export.export(flat, tuple(inputs), strict=False)
    finally:
        searching.join()
    try:
        scratch = tempfile.TemporaryDirectory(dir=folder)
    except OSError as error:
        raise ConfigError(f"{BACKEND}: {folder} cannot be written ({error.strerror})") from None
    with scratch, _without_checks():
        made = Path(scratch.name) / "network.pt2"
        settings = {*_settings()}
        torch._inductor.aoti_compile_and_package(exported, package_path=str(made))
        left_by_compilation.update({*_settings()} - settings)
        file = folder / f"{name}-{metrics.generated_kernel_count - before}.pt2"
        metrics.generated_kernel_count = before  # counted when it is loaded
        return made.replace(file)


@contextmanager
def _without_checks() -> Iterator[None]:
    """Leave out the code that compares dtype, shape and strides of every input, where this torch has it in one method.

    It runs only under a variable of the environment, and with the weights among the inputs takes the C++ compiler longer than the
    network.
    """
    if not has("aot_checks"):
        yield
        return
    from torch._inductor.codegen.cpp_wrapper_cpu import CppWrapperCpu

    def no_checks(wrapper: Any) -> None:
        wrapper.prefix.splice_aot("""
            static bool _check_aoti_runtime_check_inputs_env() { return false; }
            static void __check_inputs_outputs(AtenTensorHandle*, AtenTensorHandle*) {}
            """)

    checks = CppWrapperCpu.generate_input_output_runtime_checks
    CppWrapperCpu.generate_input_output_runtime_checks = no_checks  # type: ignore[method-assign]
    try:
        yield
    finally:
        CppWrapperCpu.generate_input_output_runtime_checks = checks  # type: ignore[method-assign]


def _require_known_layers(network: nn.Module) -> None:
    """Raise ConfigError for layers, weights, methods or hooks of the user: their code and settings may change unnoticed."""
    for name, module in network.named_modules():
        # Of the network itself it may be the compiled method, and of layers one of sd.optimise.compile.separate_biases.
        replaced = None if module is network else vars(module).get("forward")
        parts = [type(module), getattr(replaced, "func", replaced), *map(type, module._parameters.values())]
        parts += [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        for part in parts:
            origin = getattr(part, "__module__", "builtins")  # of None
            if origin.partition(".")[0] not in ("sd", "torch", "builtins"):
                raise ConfigError(f"{BACKEND}: cannot tell whether {part} of {name or 'the network'} changes; {REMEDY}")


def _folder() -> Path:
    """A folder in that of TORCHINDUCTOR_CACHE_DIR, or the user's cache folder."""
    given = Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR", ""))
    # Where it is unset, torch sets it to this default when it compiles.
    is_default = given.name.startswith("torchinductor_") and given.parent == Path(tempfile.gettempdir())
    if given == Path() or is_default:
        return cache_folder()
    folder = given / "aotinductor"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"TORCHINDUCTOR_CACHE_DIR {given}: cannot be used ({error.strerror})") from None
    return folder


def _settings() -> list[str]:
    """Settings of inductor that are not its defaults, by the environment or in this process."""
    variables = sorted(f"{name}={value}" for name, value in os.environ.items())
    settings = [one for one in variables if one.startswith(SETTINGS) and not one.startswith(WITHOUT_EFFECT)]
    config: Any = sys.modules.get("torch._inductor.config")  # where it is not imported, no setting has changed
    if config:
        settings += [line for line in config.codegen_config().splitlines() if line not in left_by_compilation]
        # Functions, which it omits: their addresses, of this process alone.
        functions = [getattr(config, name, None) for name in getattr(config, "_save_config_ignore", ())]
        settings += [repr(function) for function in functions if callable(function)]
    return settings


@functools.cache
def _machine(device: torch.device) -> list[str]:
    """What the compiler reads of torch and of the processor or GPU."""
    names = [torch.__version__, str(getattr(torch.version, "git_version", None)), platform.machine()]
    if device.type == "cuda":
        names += [torch.cuda.get_device_name(device), repr(torch.cuda.get_device_capability(device))]
    names.append(torch.backends.cpu.get_cpu_capability())
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        names += sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))})
    except OSError:  # not on Linux
        names += [platform.platform(), platform.processor()]
    return names


@functools.cache
def _sources() -> str:
    """sha256 of the code of `sd`."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()
