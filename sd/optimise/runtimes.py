"""Networks run by another inference runtime on a CPU: OpenVINO and ONNX Runtime, as compile backends.

The function is traced and converted at the first call for each set of shapes. OpenVINO's own backend of torch.compile is not
used: with torch 2.15 its guards fail.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import tempfile
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sd.errors import Unavailable
from sd.optimise.cuda_graphs import Nested, leaves

PACKAGES = {"openvino": ("openvino",), "onnxrt": ("onnx", "onnxruntime", "onnxscript")}


def require_runtime(name: str, device: torch.device) -> None:
    """Raise Unavailable without the runtime's packages, or on another device than a CPU."""
    if device.type != "cpu":
        raise Unavailable(f"compile backend {name}: runs on a CPU here, and the device is {device}; use inductor")
    missing = [package for package in PACKAGES[name] if importlib.util.find_spec(package) is None]
    if missing:
        raise Unavailable(
            f"compile backend {name}: needs {', '.join(missing)}, of the extra `peers-cpu`: pip install -e '.[peers-cpu]'"
        )


class Flat(nn.Module):
    """A method of a network as a module whose arguments are the tensors of its own arguments, in order."""

    def __init__(self, method: Callable[..., Any], arguments: tuple[Nested, ...]):
        super().__init__()
        self.network, self.method, self.arguments = getattr(method, "__self__"), method, arguments  # noqa: B009

    def forward(self, *tensors: Tensor) -> Any:
        remaining = iter(tensors)

        def rebuild(nested: Nested) -> Nested:
            if isinstance(nested, Tensor):
                return next(remaining).to(nested.dtype)
            return None if nested is None else tuple(rebuild(value) for value in nested)

        return self.method(*(rebuild(argument) for argument in self.arguments))


class _FlatOfFp32(Flat):
    """The same with a result in fp32."""

    def forward(self, *tensors: Tensor) -> Tensor:
        out: Tensor = super().forward(*tensors)
        return out.float()


def kinds(arguments: Iterable[Any]) -> tuple[Any, ...]:
    """Shape, strides, dtype and device of tensors, in nested sequences too, and type and value of all else."""
    return tuple(
        [
            (x.shape, x.stride(), x.dtype, x.device, x.requires_grad)
            if isinstance(x, Tensor)
            else (type(x), kinds(x) if isinstance(x, (tuple, list)) else x)
            for x in arguments
        ]
    )


class Runtime:
    """A network's method in another runtime; one conversion for each set of shapes. Its result is a copy."""

    def __init__(self, method: Callable[..., Any], name: str):
        self.method, self.convert = method, {"openvino": _openvino, "onnxrt": _onnxruntime}[name]
        self.converted: dict[tuple[Any, ...], Callable[[list[Any]], Any]] = {}
        self.dtype = torch.float32

    def __call__(self, *arguments: Nested) -> Tensor:
        tensors = leaves(arguments)
        key = (torch.get_num_threads(), *(tensor.shape for tensor in tensors))
        inputs = [tensor.detach().float().contiguous() for tensor in tensors]
        if key not in self.converted:
            with torch.no_grad(), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
                warnings.simplefilter("ignore")  # of the tracers, about themselves
                flat = _FlatOfFp32(self.method, arguments).eval()
                self.dtype = self.method(*arguments).dtype
                self.converted[key] = self.convert(flat, inputs)
        out = self.converted[key]([tensor.numpy() for tensor in inputs])
        return torch.from_numpy(out.copy()).to(self.dtype)


def _openvino(network: Flat, inputs: list[Tensor]) -> Callable[[list[Any]], Any]:
    import openvino

    model = openvino.convert_model(network, example_input=tuple(inputs), input=[list(x.shape) for x in inputs])
    half = any(weight.dtype == torch.bfloat16 for weight in network.parameters())
    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "bf16" if half else "f32",
    }
    request = openvino.Core().compile_model(model, "CPU", settings).create_infer_request()
    return lambda arrays: request.infer(arrays, share_inputs=True)[0]


def _onnxruntime(network: Flat, inputs: list[Tensor]) -> Callable[[list[Any]], Any]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.onnx"
        torch.onnx.export(network, tuple(inputs), path, dynamo=True, external_data=True, verbose=False)
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    return lambda arrays: session.run(None, dict(zip(names, arrays)))[0]
