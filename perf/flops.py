"""What a round has to compute and to move: FLOPs, and the fewest bytes, by the same arithmetic for every implementation.

Norms, activations and the sampler, which cost bytes rather than FLOPs, are left out of the FLOPs as FlopCounterMode leaves
them out. The bytes are a floor: each network's weights once a call, whatever the batch, and its input and output once. What
runs between its layers moves more, and techniques that keep something from call to call (`cache_context_kv`) read a few
per cent less.
"""

from __future__ import annotations

from collections.abc import Iterable

from perf import layers
from perf.configurations import Configuration
from sd.config import ModelConfig

TOKEN_BYTES = 8  # int64


def total(network: Iterable[layers.Layer]) -> int:
    """FLOPs of all layers of a network (perf.layers), for one sample."""
    return sum(layer.flops for layer in network)


def weights(network: Iterable[layers.Layer]) -> int:
    """Number of weights of all layers of a network."""
    return sum(layer.weights for layer in network)


def of_round(configuration: Configuration, model: ModelConfig, unet_calls: int) -> int:
    """FLOPs of one round of a configuration on a model, with guidance's batch of two wherever there is a UNet."""
    height, width = _latent_size(configuration, model)
    guided = _guided(configuration)
    tokens = model.text.context_length
    parts = {
        "text": guided * total(layers.text_encoder(model.text)),
        "unet": guided * unet_calls * total(layers.unet(model.unet, height, width, tokens)),
        "vae": total(layers.decoder(model.autoencoder, height, width)),
    }
    return configuration.batch * _of_workload(configuration, parts)


def floor_bytes_of_round(configuration: Configuration, model: ModelConfig, unet_calls: int, item_bytes: int) -> int:
    """Bytes that a round cannot do without, with numbers of `item_bytes` bytes; see above what they are."""
    height, width = _latent_size(configuration, model)
    cells, pixels = height * width, height * width * model.autoencoder.downsampling**2
    guided, batch = _guided(configuration) * configuration.batch, configuration.batch
    context = model.text.context_length * model.text.width
    latents = (model.unet.in_channels + model.unet.out_channels) * cells
    text = weights(layers.text_encoder(model.text)) + guided * context
    unet = weights(layers.unet(model.unet, height, width)) + guided * (latents + context)
    image = model.autoencoder.embed_dim * cells + model.autoencoder.image_channels * pixels
    vae = weights(layers.decoder(model.autoencoder, height, width)) + batch * image
    parts = {
        "text": item_bytes * text + TOKEN_BYTES * guided * model.text.context_length,
        "unet": unet_calls * item_bytes * unet,
        "vae": item_bytes * vae,
    }
    return _of_workload(configuration, parts)


def _latent_size(configuration: Configuration, model: ModelConfig) -> tuple[int, int]:
    factor = model.autoencoder.downsampling
    return (configuration.height or model.image_size) // factor, (configuration.width or model.image_size) // factor


def _guided(configuration: Configuration) -> int:
    """UNet samples and prompts of an image."""
    return 2 if configuration.workload != "txt2img" or configuration.scale != 1.0 else 1


def _of_workload(configuration: Configuration, parts: dict[str, int]) -> int:
    return sum(parts.values()) if configuration.workload == "txt2img" else parts[configuration.workload]
