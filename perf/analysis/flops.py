"""FLOPs and minimum bytes of a round, from the shape of the networks: the same for every implementation.

FLOPs leave out norms, activations and the sampler, as torch's FlopCounterMode does. Minimum bytes are the weights of each
network once per call, whatever the batch, plus its input and output once. Tensors between layers add to that, and
techniques that cache between calls (`cache_context_kv`) read a few per cent less.

A model is a sd.config.presets.ModelConfig, and a configuration has the fields of
perf.configurations.configuration.Configuration; neither is imported, so that this module is pure arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

TOKEN_BYTES = 8  # int64
TRAINING_BYTES = 40  # of an update for each weight in fp32: gradient, weight, two moments, average; written and read
GENERATIONS = ("txt2img", "inpaint")  # workloads of all stages; the others are one part
STAGES = ("text", "unet", "vae")


def total(network: Iterable[Layer]) -> int:
    """FLOPs of a network for one sample."""
    return sum(layer.flops for layer in network)


def weights(network: Iterable[Layer]) -> int:
    """Number of weights of a network."""
    return sum(layer.weights for layer in network)


def of_round(configuration: Any, model: Any, unet_calls: int) -> int:
    """FLOPs of one round, with a UNet batch of two per image under guidance."""
    height, width = _latent_size(configuration, model)
    guided = _guided(configuration)
    tokens = model.text.context_length
    parts = {
        "text": guided * total(text_encoder(model.text)),
        "unet": guided * unet_calls * total(unet(model.unet, height, width, tokens)),
        "vae": total(decoder(model.autoencoder, height, width)),
        # The backward pass computes two products for each of the forward pass. What checkpointing repeats is no work.
        "train": 3 * unet_calls * total(unet(model.unet, height, width, tokens)),
    }
    flops = int(configuration.batch) * _of_workload(configuration, parts)
    if configuration.workload == "inpaint":  # which encodes its image once, whatever the batch
        flops += total(encoder(model.autoencoder, height, width))
    return flops


def minimum_bytes_of_round(configuration: Any, model: Any, unet_calls: int, item_bytes: int) -> int:
    """Minimum bytes of one round; item_bytes: size of a number in bytes."""
    height, width = _latent_size(configuration, model)
    cells, pixels = height * width, height * width * model.autoencoder.downsampling**2
    guided, batch = _guided(configuration) * configuration.batch, configuration.batch
    context = model.text.context_length * model.text.width
    latents = (model.unet.in_channels + model.unet.out_channels) * cells
    text = weights(text_encoder(model.text)) + guided * context
    denoiser = weights(unet(model.unet, height, width)) + guided * (latents + context)
    image = model.autoencoder.embed_dim * cells + model.autoencoder.image_channels * pixels
    vae = weights(decoder(model.autoencoder, height, width)) + batch * image
    parts = {
        "text": item_bytes * text + TOKEN_BYTES * guided * model.text.context_length,
        "unet": unet_calls * item_bytes * denoiser,
        "vae": item_bytes * vae,
        "train": unet_calls * (item_bytes * 2 * denoiser + TRAINING_BYTES * weights(unet(model.unet, height, width))),
    }
    minimum = _of_workload(configuration, parts)
    if configuration.workload == "inpaint":
        moments = model.autoencoder.embed_dim * cells  # twice as many numbers as the latents have
        minimum += item_bytes * int(weights(encoder(model.autoencoder, height, width)) + image + moments)
    return minimum


def _latent_size(configuration: Any, model: Any) -> tuple[int, int]:
    factor = model.autoencoder.downsampling
    return (configuration.height or model.image_size) // factor, (configuration.width or model.image_size) // factor


def _guided(configuration: Any) -> int:
    """UNet samples and prompts of an image."""
    if configuration.workload == "train":
        return 1
    return 2 if configuration.workload not in GENERATIONS or configuration.scale != 1.0 else 1


def _of_workload(configuration: Any, parts: dict[str, int]) -> int:
    stages = STAGES if configuration.workload in GENERATIONS else (configuration.workload,)
    return sum(parts[stage] for stage in stages)


class Layer(NamedTuple):
    """FLOPs of a layer for one sample (2 per multiply-add), and its number of weights, biases included."""

    flops: int
    weights: int


def _conv(inner: int, outer: int, cells: int, side: int = 3) -> Layer:
    return Layer(2 * side * side * inner * outer * cells, side * side * inner * outer + outer)


def _linear(inner: int, outer: int, rows: int, bias: bool = True) -> Layer:
    return Layer(2 * inner * outer * rows, inner * outer + bias * outer)


def _norm(channels: int) -> Layer:
    """No FLOPs, as in FlopCounterMode."""
    return Layer(0, 2 * channels)


def _attend(width: int, queries: int, keys: int) -> Layer:
    """QK^T and the product with V. Causal attention counts as full, as kernels are usually rated."""
    return Layer(4 * width * queries * keys, 0)


def unet(config: Any, height: int, width: int, tokens: int = 77) -> Iterator[Layer]:
    """One UNet call with latents of height x width."""
    embedding, cells = 4 * config.model_channels, height * width
    yield _linear(config.model_channels, embedding, 1)
    yield _linear(embedding, embedding, 1)

    def res_block(inner: int, outer: int) -> Iterator[Layer]:
        yield from (_norm(inner), _conv(inner, outer, cells), _linear(embedding, outer, 1))
        yield from (_norm(outer), _conv(outer, outer, cells))
        if inner != outer:
            yield _conv(inner, outer, cells, side=1)

    def transformer(channels: int) -> Iterator[Layer]:
        yield from (_norm(channels), _linear(channels, channels, cells))
        for _ in range(config.transformer_depth):
            for source, rows in ((channels, cells), (config.context_dim, tokens)):
                yield from (_norm(channels), _linear(channels, channels, cells, bias=False))
                yield from 2 * (_linear(source, channels, rows, bias=False),)
                yield from (_attend(channels, cells, rows), _linear(channels, channels, cells))
            # GEGLU: to twice four times the width, and back from four times.
            yield from (_norm(channels), _linear(channels, 8 * channels, cells), _linear(4 * channels, channels, cells))
        yield _linear(channels, channels, cells)

    channels = config.model_channels
    yield _conv(config.in_channels, channels, cells)
    skips, factor = [channels], 1
    last = len(config.channel_mult) - 1
    for level, multiplier in enumerate(config.channel_mult):
        for _ in range(config.num_res_blocks):
            yield from res_block(channels, multiplier * config.model_channels)
            channels = multiplier * config.model_channels
            yield from transformer(channels) if factor in config.attention_resolutions else ()
            skips.append(channels)
        if level != last:
            cells, factor = cells // 4, factor * 2
            yield _conv(channels, channels, cells)
            skips.append(channels)
    yield from res_block(channels, channels)
    yield from transformer(channels)
    yield from res_block(channels, channels)
    for level in range(last, -1, -1):
        for i in range(config.num_res_blocks + 1):
            outer = config.channel_mult[level] * config.model_channels
            yield from res_block(channels + skips.pop(), outer)
            channels = outer
            yield from transformer(channels) if factor in config.attention_resolutions else ()
            if level and i == config.num_res_blocks:
                cells, factor = cells * 4, factor // 2
                yield _conv(channels, channels, cells)
    yield from (_norm(channels), _conv(channels, config.out_channels, cells))


def _vae_block(inner: int, outer: int, cells: int) -> Iterator[Layer]:
    yield from (_norm(inner), _conv(inner, outer, cells), _norm(outer), _conv(outer, outer, cells))
    if inner != outer:
        yield _conv(inner, outer, cells, side=1)


def _vae_middle(channels: int, cells: int) -> Iterator[Layer]:
    yield from _vae_block(channels, channels, cells)
    yield _norm(channels)
    yield from 4 * (_conv(channels, channels, cells, side=1),)
    yield _attend(channels, cells, cells)
    yield from _vae_block(channels, channels, cells)


def encoder(config: Any, height: int, width: int) -> Iterator[Layer]:
    """Encoding an image to latents of height x width."""
    channels, cells = config.channels, height * width * config.downsampling**2
    yield _conv(config.image_channels, channels, cells)
    for level, multiplier in enumerate(config.channel_mult):
        for _ in range(config.num_res_blocks):
            yield from _vae_block(channels, multiplier * config.channels, cells)
            channels = multiplier * config.channels
        if level != len(config.channel_mult) - 1:
            cells //= 4
            yield _conv(channels, channels, cells)
    yield from _vae_middle(channels, cells)
    yield from (_norm(channels), _conv(channels, 2 * config.latent_channels, cells))
    yield _conv(2 * config.latent_channels, 2 * config.embed_dim, cells, side=1)


def decoder(config: Any, height: int, width: int) -> Iterator[Layer]:
    """Decoding latents of height x width."""
    cells = height * width
    channels = config.channels * config.channel_mult[-1]
    yield _conv(config.embed_dim, config.latent_channels, cells, side=1)
    yield _conv(config.latent_channels, channels, cells)
    yield from _vae_middle(channels, cells)
    for level in range(len(config.channel_mult) - 1, -1, -1):
        for _ in range(config.num_res_blocks + 1):
            outer = config.channel_mult[level] * config.channels
            yield from _vae_block(channels, outer, cells)
            channels = outer
        if level:
            cells *= 4
            yield _conv(channels, channels, cells)
    yield from (_norm(channels), _conv(channels, config.image_channels, cells))


def text_encoder(config: Any) -> Iterator[Layer]:
    """Encoding one prompt. Only the rows of the token table that a prompt reads count as weights."""
    tokens, width = config.context_length, config.width
    yield Layer(0, 2 * tokens * width)
    for _ in range(config.layers):
        yield from (_norm(width), _linear(width, 3 * width, tokens), _attend(width, tokens, tokens))
        yield from (_linear(width, width, tokens), _norm(width))
        yield from (_linear(width, 4 * width, tokens), _linear(4 * width, width, tokens))
    yield _norm(width)
