"""Process-wide settings (TF32, SDPA kernels): set around a model's own calls, restored afterwards, separate between threads."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from counting import needs_fused_attention
from models import smallest

from sd import Optimisations
from sd.errors import ConfigError
from sd.features import has
from sd.optimise.apply import float32_precision

matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn


def _settings() -> dict[str, object]:
    """Every process-wide setting that a model may change, by name."""
    settings = {}
    readers = {
        "matmul_precision": torch.get_float32_matmul_precision,
        "matmul": lambda: matmul.allow_tf32,
        "cudnn": lambda: cudnn.allow_tf32,
    }
    for name, read in readers.items():
        try:
            settings[name] = read()
        except RuntimeError:  # unreadable after the settings of torch 2.9 were used
            settings[name] = None
    if has("fp32_precision"):
        owners = (matmul, torch.backends.mkldnn.matmul, cudnn.conv, cudnn.rnn)
        settings["fp32_precision"] = [owner.fp32_precision for owner in owners]
    if has("sdpa"):
        cuda = torch.backends.cuda
        settings["sdpa"] = (cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled())
    return settings


@pytest.fixture(autouse=True)
def _restore_settings():
    precision, convolutions = torch.get_float32_matmul_precision(), cudnn.allow_tf32
    owners = [matmul, cudnn.conv, cudnn.rnn, torch.backends.mkldnn.matmul] if has("fp32_precision") else []
    values = [owner.fp32_precision for owner in owners]
    yield
    _set_legacy(precision, convolutions)
    for owner, value in zip(owners, values):
        owner.fp32_precision = value


def _set_legacy(precision: str, convolutions: bool) -> None:
    torch.set_float32_matmul_precision(precision)
    cudnn.allow_tf32 = convolutions


def _set_fp32_precision(owner: str, precision: str) -> None:
    if not has("fp32_precision"):
        pytest.skip("torch >= 2.9")
    {"matmul": matmul, "conv": cudnn.conv}[owner].fp32_precision = precision


CALLERS = {
    "defaults": lambda: None,
    "medium": lambda: _set_legacy("medium", True),
    "tf32": lambda: _set_legacy("high", True),
    "ieee": lambda: _set_legacy("highest", False),
    "fp32_precision-matmul": lambda: _set_fp32_precision("matmul", "tf32"),
    "fp32_precision-conv": lambda: _set_fp32_precision("conv", "ieee"),
}


@pytest.mark.parametrize("caller", CALLERS)
@pytest.mark.parametrize("tf32", [False, True])
def test_tf32_is_set_and_restored(caller, tf32):
    CALLERS[caller]()
    before = _settings()
    with float32_precision(tf32):
        inside = _settings()
    assert _settings() == before
    if inside["matmul"] is not None and inside["cudnn"] is not None:
        assert (inside["matmul"], inside["cudnn"]) == (tf32, tf32)
    else:
        assert inside["fp32_precision"] == ["tf32" if tf32 else "ieee"] * 4


def test_tf32_is_restored_after_an_exception():
    before = _settings()
    with pytest.raises(KeyError), float32_precision(True):
        raise KeyError
    assert _settings() == before


def test_tf32_of_another_thread_waits():
    """Else the settings that a thread restores last would be those of another model, for the whole process."""
    before, order = _settings(), []

    def other():
        with float32_precision(False):
            order.append("other")

    thread = threading.Thread(target=other)
    with float32_precision(True):
        thread.start()
        thread.join(timeout=0.3)
        order.append("first")
    thread.join(timeout=60)
    assert order == ["first", "other"] and _settings() == before


def test_a_move_that_failed_is_repeated():
    model, half = smallest(Optimisations()), []
    to = torch.nn.Module.to

    def fails(module, *arguments, **keywords):
        half.append(module)
        if len(half) == 3:  # the second network; each is moved, and then gets its layout
            raise RuntimeError("out of memory")
        return to(module, *arguments, **keywords)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.Module, "to", fails)
        with pytest.raises(RuntimeError, match="out of memory"):
            model.to("meta")
    assert {weight.device.type for weight in model.parameters()} == {"cpu", "meta"}
    with pytest.MonkeyPatch.context() as patch:
        moved = []
        patch.setattr("sd.networks.apply", lambda *arguments: moved.append(arguments[3]))
        model.to("cpu")
    assert moved == [torch.device("cpu")]


@pytest.mark.parametrize("network", ["unet", "autoencoder", "text_encoder"])
def test_weights_that_were_rounded_in_part_are_not_taken_for_fp32(network):
    model = smallest(Optimisations())
    next(getattr(model, network).parameters()).data = next(getattr(model, network).parameters()).data.bfloat16()
    with pytest.raises(ConfigError, match=r"already rounded to torch\.bfloat16"):
        model.optimise(Optimisations())


def test_the_first_image_may_be_made_under_a_profiler_of_the_caller():
    model = smallest(Optimisations())
    with torch.autograd.profiler.profile():
        model.txt2img("a red star", steps=4, sampler="ddim")
    assert model.kernels["unet"] == ()
    model.txt2img("a red star", steps=4, sampler="ddim")
    assert all(model.kernels.values())
    model.optimise(Optimisations())
    model.stop_observing()
    model.txt2img("a red star", steps=4, sampler="ddim")
    assert not any(model.kernels.values())


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize(
    "fields", [{}, {"precision": "bf16"}, {"original_steps": True}], ids=["full", "bf16", "original"]
)
def test_a_run_is_true_fp32_and_restores_the_settings(fields, raises):
    torch.set_float32_matmul_precision("medium")  # on a CPU, bf16 products
    before, during = _settings(), []

    def progress(step, steps):
        during.append((torch.get_float32_matmul_precision(), cudnn.allow_tf32))
        if raises:
            raise Interrupted

    model = smallest(Optimisations(**fields))
    assert _settings() == before
    try:
        model.txt2img("a red star", steps=2, progress=progress)
    except Interrupted:
        assert raises
    assert _settings() == before
    assert set(during) == {("highest", False)}


@needs_fused_attention
@pytest.mark.parametrize("raises", [False, True])
def test_sdpa_kernels_are_restored(raises):
    def progress(step, steps):
        if raises:
            raise Interrupted

    before = _settings()
    model = smallest(Optimisations(attention="sdpa", sdpa_kernels=("math",)))
    try:
        model.txt2img("a red star", steps=2, progress=progress)
    except Interrupted:
        assert raises
    assert _settings() == before


class TestThreads:
    CHOICES = (("math",), ("flash",))

    def _model(self, kernels):
        return smallest(Optimisations(attention="sdpa", sdpa_kernels=kernels))

    @pytest.mark.slow
    @needs_fused_attention
    def test_each_model_runs_its_own_kernels(self):
        """Two models in two threads, in turns at random; each run records its kernels."""

        def kernels_of_runs(kernels) -> set[tuple[str, ...]]:
            model, seen = self._model(kernels), set()
            for seed in range(15):
                model.optimise(model.optimisations)  # a new observation
                model.txt2img("a red star", steps=2, seed=seed)
                seen.add(model.kernels["unet"])
            return seen

        before = _settings()
        with ThreadPoolExecutor(2) as threads:
            assert list(threads.map(kernels_of_runs, self.CHOICES)) == [{kernels} for kernels in self.CHOICES]
        assert _settings() == before

    @needs_fused_attention
    def test_a_model_waits_for_the_run_of_another_thread(self):
        """Started in the middle of a run under `math`, a run under `flash` uses `flash`, and the former still `math`."""
        first, second = (self._model(kernels) for kernels in self.CHOICES)
        thread = threading.Thread(target=lambda: second.txt2img("a red star", steps=4, sampler="ddim"))
        waited = []

        def progress(step, steps):
            if step == 1:
                thread.start()
                thread.join(timeout=0.3)
                waited.append(thread.is_alive())

        first.txt2img("a red star", steps=4, sampler="ddim", progress=progress)
        thread.join(timeout=60)
        assert waited == [True] and not thread.is_alive()
        assert [model.kernels["unet"] for model in (first, second)] == list(self.CHOICES)

    def test_a_progress_callback_may_decode(self):
        model = smallest(Optimisations())
        previews = []
        model.txt2img("a red star", steps=2, progress=lambda *_: previews.append(model.decode(torch.zeros(1, 4, 8, 8))))
        assert len(previews) == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("operation", ["matmul", "convolution"])
def test_fp32_is_true_fp32_unless_tf32_is_chosen(operation):
    """TF32 rounds to 11 bits: a relative error of about 3e-4; fp32 stays below 1e-5."""

    def error(tf32: bool) -> float:
        with float32_precision(tf32):
            ours = call(*inputs)
        exact = call(*(x.double() for x in inputs))
        return ((ours - exact).norm() / exact.norm()).item()

    generator = torch.Generator("cuda").manual_seed(0)
    shapes = ((512, 512), (512, 512)) if operation == "matmul" else ((2, 64, 32, 32), (64, 64, 3, 3))
    call = torch.matmul if operation == "matmul" else torch.nn.functional.conv2d
    inputs = [torch.randn(shape, generator=generator, device="cuda") for shape in shapes]
    assert error(tf32=False) <= 1e-5
    if torch.cuda.get_device_capability() >= (8, 0):
        assert error(tf32=True) > 1e-5
