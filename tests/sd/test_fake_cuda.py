"""The networks and sampling loops on fake CUDA tensors: devices, dtypes and shapes, and no synchronisation.

PyTorch's fake tensors check operators without computing, so no GPU is needed. As on a GPU, operands on two devices are an
error; reading a value, which would synchronise, is an error too.
"""

from __future__ import annotations

import pytest
import torch
from selection import slow_or_nightly

from sd import Optimisations
from sd.config.presets import preset
from sd.models.autoencoder import Autoencoder
from sd.models.text_encoder import TextEncoder
from sd.models.unet import UNet
from sd.optimise.apply import apply
from sd.optimise.optimisations import WEIGHT_DTYPES
from sd.sampling import plan as plans
from sd.sampling import samplers
from sd.sampling.denoiser import Denoiser
from sd.sampling.schedule import Schedule

fake_tensor = pytest.importorskip("torch._subclasses.fake_tensor", reason="this torch has no fake tensors")
CUDA = torch.device("cuda")
SCHEDULE = Schedule()  # made outside the fake mode: fake tensors have no values
CACHES = {"cache_context_kv": True, "cache_time_embeddings": True}
CHOICES = {
    "autocast-original": {"precision": "autocast", "attention": "original"},
    "autocast-mha": {"precision": "autocast", "attention": "mha"},
    "autocast-sdpa": {"precision": "autocast", "attention": "sdpa"},
    "fp16": {"precision": "fp16", "attention": "sdpa", "channels_last": True},
    "exact": {"precision": "bf16", "attention": "sdpa", "channels_last": True, "fused_qkv": True, **CACHES},
}


def _works() -> bool:
    """Whether this torch can create fake CUDA tensors without a GPU."""
    try:
        with fake_tensor.FakeTensorMode():
            a = torch.ones(2, 2, device=CUDA)
            return torch.nn.functional.scaled_dot_product_attention(a[None], a[None], a[None]).device.type == "cuda"
    except (RuntimeError, AssertionError, AttributeError):
        return False


pytestmark = pytest.mark.skipif(not _works(), reason="no fake CUDA tensors without a GPU in this torch")


class FakeModel:
    """The three networks of a model on a fake GPU after `apply`."""

    def __init__(self, name: str, optimisations: Optimisations):
        self.optimisations, self.config = optimisations, preset(name)
        torch.set_default_dtype(WEIGHT_DTYPES[optimisations.precision])
        try:
            with CUDA:
                self.unet, self.autoencoder = UNet(self.config.unet), Autoencoder(self.config.autoencoder)
                self.text_encoder = TextEncoder(self.config.text)
        finally:
            torch.set_default_dtype(torch.float32)
        self.calls = apply(self.unet, self.autoencoder, self.text_encoder, CUDA, optimisations)

    def contexts(self, batch: int):
        """Contexts of prompts and of negative prompts."""
        tokens = torch.zeros(batch, self.config.text.context_length, dtype=torch.long, device=CUDA)
        return self.text_encoder(tokens), self.text_encoder(tokens)

    def denoiser(self, times: list[float]) -> Denoiser:
        """The denoiser of two prompts, with the caches of the optimisations for these timesteps."""
        denoise = Denoiser(self.calls.unet_of_run(), *self.contexts(2), 7.5, self.config.parameterization)
        if self.optimisations.cache_context_kv:
            denoise.context = self.unet.project_context(denoise.context)
        if self.optimisations.cache_time_embeddings:
            denoise.times, denoise.time_table = times, self.unet.time_table(torch.tensor(times).to(CUDA))
        return denoise

    def latents(self, batch: int):
        side = self.config.image_size // self.config.autoencoder.downsampling
        return torch.randn(batch, 4, side, side, device=CUDA)


@pytest.fixture
def fake(monkeypatch):
    """Create a FakeModel under the fake mode and no_grad."""
    # These query the absent GPU.
    monkeypatch.setattr("sd.optimise.apply.require_available", lambda *_: None)
    monkeypatch.setattr("sd.optimise.apply.check", lambda *_: None)
    monkeypatch.setattr("sd.optimise.apply.for_head_dim", lambda attention, *_: attention)
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    # The weights have their final device and dtype; fake ones cannot be moved in place.
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, *_, **__: self)
    with fake_tensor.FakeTensorMode(), torch.no_grad():
        yield lambda name, choice: FakeModel(name, Optimisations(**choice))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "choice"),
    [
        *(("tiny", choice) for choice in CHOICES),
        ("sd1", "autocast-original"),
        ("sd2-v", "autocast-mha"),
        ("sd2-v", "exact"),
    ],
)
def test_a_step_and_a_decoded_image(fake, name, choice):
    model = fake(name, CHOICES[choice])
    optimisations, config = model.optimisations, model.config
    with optimisations.autocast(CUDA):
        denoise = model.denoiser([501.0])
        x = model.latents(2).contiguous(memory_format=optimisations.memory_format())
        noise = denoise(x, 501.0, 0.5)
        pixels = model.calls.decode(x)
    assert (noise.shape, noise.dtype, noise.device.type) == (x.shape, torch.float32, "cuda")
    assert pixels.shape == (2, 3, config.image_size, config.image_size) and pixels.device.type == "cuda"


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("sampler", samplers.SAMPLERS)
@pytest.mark.parametrize("choice", slow_or_nightly(["autocast-sdpa", "exact"], lambda choice: choice == "exact"))
def test_no_sampler_synchronises(fake, sampler, eta, choice):
    if eta and sampler != "ddim":
        pytest.skip("this sampler has no eta")
    model = fake("tiny", CHOICES[choice])
    plan = samplers.sampler(sampler)(SCHEDULE, 10, eta)
    denoise = model.denoiser(sorted({evaluation.t for evaluation in plan.evaluations}))
    x, steps = model.latents(2), []
    noises = [torch.randn_like(x) for _ in plan.evaluations] if plan.draws_noise else None
    with model.optimisations.autocast(CUDA):
        out = plans.run(plan, denoise, x, noises, lambda step, _: steps.append(step))
    assert (out.shape, out.device.type, steps[-1]) == (x.shape, "cuda", 10)


def test_reading_from_the_device_is_an_error(fake):
    """The tests above rely on this error."""
    with pytest.raises(RuntimeError, match="_local_scalar_dense"):
        fake("tiny", CHOICES["autocast-sdpa"]).latents(1).sum().item()


def test_a_tensor_on_the_cpu_is_an_error(fake):
    model = fake("tiny", CHOICES["autocast-sdpa"])
    with pytest.raises(RuntimeError, match="device"):
        model.unet(torch.randn(2, 4, 8, 8), torch.full((2,), 1.0), torch.randn(2, 77, 32, device=CUDA))
