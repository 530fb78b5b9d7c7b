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
import inspect
import os
import platform
import sys
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sd.features import has
from sd.kernels.build import cache_folder
from sd.optimise.cuda_graphs import Nested, leaves
from sd.optimise.runtimes import Flat, kinds

SOURCES = Path(__file__).parents[1]
# Of the environment of inductor; these change no code.
WITHOUT_EFFECT = ("TORCHINDUCTOR_CACHE_DIR", "TORCHINDUCTOR_COMPILE_THREADS")
loaded_code = {"graphs": 0, "generated_kernels": 0}  # of the packages that this process loaded


class AheadOfTime:
    """A network's method from packages of AOTInductor, which are compiled and kept where there is none.

    choice: what else decides the code, such as the optimisations of the network. Compiled code checks nothing, so `code`
    compares what may change between two runs: weights, arguments and threads. For another choice make another object.
    """

    def __init__(self, method: Callable[..., Any], choice: str):
        self.method, self.choice = method, choice
        self.network: nn.Module = getattr(method, "__self__")  # noqa: B009
        self.packages: dict[Any, _Package] = {}
        self.weights = _Weights(self.network)

    def __call__(self, *arguments: Nested) -> Any:
        """As the method. Raises NotImplementedError where a gradient is needed."""
        return self.code(arguments)(*arguments)

    def code(self, arguments: tuple[Nested, ...]) -> Callable[..., Any]:
        """The code for arguments of this kind with the network's present weights, which may change in place."""
        weights = self.weights.tensors()
        if weights is None:
            self.weights = _Weights(self.network)
            weights = self.weights.tensors() or []
        if torch.is_grad_enabled() and any(x.requires_grad for x in (*weights, *leaves(arguments))):
            raise NotImplementedError("compile backend aotinductor: has no backward pass; choose backend inductor")
        key = (torch.get_num_threads(), kinds(arguments), self.weights.kinds)
        if key not in self.packages:
            self.packages[key] = self._package(arguments, weights, repr(key))
        return functools.partial(self.packages[key], weights)

    def _package(self, arguments: tuple[Nested, ...], weights: list[Tensor], key: str) -> _Package:
        identity = [torch.__version__, _processor(), _sources(self.network), repr(self.network), self.method.__name__]
        identity += [repr(getattr(self.network, "config", None)), self.choice, key]
        identity += _settings()
        folder = _folder()
        name = hashlib.sha256("\n".join(identity).encode()).hexdigest()[:32]
        for file in folder.glob(f"{name}-*.pt2"):
            try:
                return _Package(file)
            except RuntimeError:  # damaged
                file.unlink(missing_ok=True)
        inputs = [*weights, *leaves(arguments)]
        names = [f"network.{name}" for name in self.weights.names]
        return _Package(_compile(_WithWeights(Flat(self.method, arguments), names), inputs, folder, name))


class _Weights:
    """Names and kinds of the parameters and buffers of a network, without keeping a tensor that the network replaces."""

    def __init__(self, network: nn.Module):
        found = [
            (f"{prefix}.{name}".lstrip("."), owner, name, weight)
            for prefix, module in network.named_modules()
            for owner in (module._parameters, module._buffers)
            for name, weight in owner.items()
            if weight is not None
        ]
        self.names = [full_name for full_name, *_ in found]
        self.kinds = (tuple(self.names), kinds(weight for *_, weight in found))
        self.slots = [(owner, name, weakref.ref(weight), weight.data_ptr()) for _, owner, name, weight in found]

    def tensors(self) -> list[Tensor] | None:
        """The tensors, or None where the network has replaced one, or the memory of one."""
        tensors: list[Tensor] = []
        for owner, name, known, pointer in self.slots:
            weight = owner.get(name)
            if not isinstance(weight, Tensor) or weight is not known() or weight.data_ptr() != pointer:
                return None
            tensors.append(weight)
        return tensors


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

    # The search compiles test programs, for which a second core has time. Settings of inductor are variables of the context.
    search = threading.Thread(target=contextvars.copy_context().run, args=(cpu_vec_isa.valid_vec_isa_list,))
    search.start()
    before = metrics.generated_kernel_count
    try:
        exported = torch.export.export(flat, tuple(inputs), strict=False)
    finally:
        search.join()
    with tempfile.TemporaryDirectory(dir=folder) as scratch, _without_checks():
        made = Path(scratch) / "network.pt2"
        torch._inductor.aoti_compile_and_package(exported, package_path=str(made))
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


def _folder() -> Path:
    """A folder in that of TORCHINDUCTOR_CACHE_DIR, or the user's cache folder."""
    given = os.environ.get("TORCHINDUCTOR_CACHE_DIR", "")
    if not given or Path(given).name.startswith(
        "torchinductor_"
    ):  # torch's own default, which it sets there when it compiles
        return cache_folder()
    folder = Path(given) / "aotinductor"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _settings() -> list[str]:
    """Settings of inductor that are not its defaults, by the environment or in this process."""
    starts = ("TORCHINDUCTOR_", "AOT_INDUCTOR_")
    by_environment = [f"{name}={value}" for name, value in os.environ.items() if name.startswith(starts)]
    config: Any = sys.modules.get("torch._inductor.config")  # imported by whoever changes it
    changed = config.codegen_config().splitlines() if config else []
    return [setting for setting in sorted(by_environment) if not setting.startswith(WITHOUT_EFFECT)] + changed


@functools.cache
def _processor() -> str:
    """What the compiler reads of the processor, or the GPU's name and architecture."""
    names = [platform.machine()]
    if torch.cuda.is_available():
        names += [torch.cuda.get_device_name(), repr(torch.cuda.get_device_capability())]
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        names += sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))})
    except OSError:  # not on Linux
        names += [platform.platform(), platform.processor()]
    return "\n".join(names)


def _sources(network: nn.Module) -> str:
    """sha256 of the code that is compiled: that of `sd`, and of the classes of a network that the user has changed.

    Code without a file, and hooks, may be other code in each process, which then compiles by itself.
    """
    files, digest = {*SOURCES.rglob("*.py")}, hashlib.sha256()
    for module in network.modules():
        layer, replaced = type(module), vars(module).get("forward")
        own = replaced is None or isinstance(replaced, functools.partial)  # of sd.optimise.compile.separate_biases
        if not own or module._forward_hooks or module._forward_pre_hooks:
            digest.update(os.urandom(16))
        if not layer.__module__.startswith(("sd.", "torch.")):
            try:
                files.add(Path(inspect.getfile(layer)))
            except (OSError, TypeError):
                digest.update(os.urandom(16))
    for file in sorted(files):
        digest.update(file.read_bytes())
    return digest.hexdigest()
