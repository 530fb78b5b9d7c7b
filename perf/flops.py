"""FLOPs of a round, counted from the shapes of the networks: 2 for each multiply-add of convolutions, matrices and attention.

Pure arithmetic on `sd.config`, so that it needs no torch and is the same for every implementation; norms, activations
and the sampler, which cost bytes rather than FLOPs, are left out as FlopCounterMode leaves them out.
"""

from __future__ import annotations

from perf.configurations import Configuration
from sd.config import AutoencoderConfig, ModelConfig, TextConfig, UNetConfig


def unet(config: UNetConfig, height: int, width: int, tokens: int = 77) -> int:
    """FLOPs of one UNet call for one sample with latents of height x width."""
    embedding = 4 * config.model_channels
    total = 2 * (config.model_channels * embedding + embedding**2)
    cells = height * width

    def conv(inner: int, outer: int, at: int, side: int = 3) -> int:
        return 2 * side * side * inner * outer * at

    def res_block(inner: int, outer: int, at: int) -> int:
        shortcut = 0 if inner == outer else conv(inner, outer, at, side=1)
        return conv(inner, outer, at) + 2 * embedding * outer + conv(outer, outer, at) + shortcut

    def transformer(channels: int, at: int) -> int:
        attend = 4 * channels  # a query's products with one key and one value
        self_attention = 2 * 4 * channels**2 * at + attend * at * at
        cross_attention = (
            2 * 2 * channels**2 * at + 2 * 2 * channels * config.context_dim * tokens + attend * at * tokens
        )
        feed_forward = 2 * (8 + 4) * channels**2 * at  # GEGLU: to twice four times the width, and back from four times
        blocks = config.transformer_depth * (self_attention + cross_attention + feed_forward)
        return 2 * 2 * channels**2 * at + blocks

    channels = config.model_channels
    total += conv(config.in_channels, channels, cells)
    skips, factor = [channels], 1
    last = len(config.channel_mult) - 1
    for level, multiplier in enumerate(config.channel_mult):
        for _ in range(config.num_res_blocks):
            total += res_block(channels, multiplier * config.model_channels, cells)
            channels = multiplier * config.model_channels
            total += transformer(channels, cells) if factor in config.attention_resolutions else 0
            skips.append(channels)
        if level != last:
            cells, factor = cells // 4, factor * 2
            total += conv(channels, channels, cells)
            skips.append(channels)
    total += 2 * res_block(channels, channels, cells) + transformer(channels, cells)
    for level in range(last, -1, -1):
        for i in range(config.num_res_blocks + 1):
            outer = config.channel_mult[level] * config.model_channels
            total += res_block(channels + skips.pop(), outer, cells)
            channels = outer
            total += transformer(channels, cells) if factor in config.attention_resolutions else 0
            if level and i == config.num_res_blocks:
                cells, factor = cells * 4, factor // 2
                total += conv(channels, channels, cells)
    return total + conv(channels, config.out_channels, cells)


def decoder(config: AutoencoderConfig, height: int, width: int) -> int:
    """FLOPs of decoding one sample with latents of height x width."""
    cells = height * width
    channels = config.channels * config.channel_mult[-1]

    def conv(inner: int, outer: int, side: int = 3) -> int:
        return 2 * side * side * inner * outer * cells

    def res_block(inner: int, outer: int) -> int:
        return conv(inner, outer) + conv(outer, outer) + (0 if inner == outer else conv(inner, outer, 1))

    total = conv(config.embed_dim, config.latent_channels, 1) + conv(config.latent_channels, channels)
    total += 2 * res_block(channels, channels) + 4 * conv(channels, channels, 1) + 4 * channels * cells * cells
    for level in range(len(config.channel_mult) - 1, -1, -1):
        for _ in range(config.num_res_blocks + 1):
            outer = config.channel_mult[level] * config.channels
            total += res_block(channels, outer)
            channels = outer
        if level:
            cells *= 4
            total += conv(channels, channels)
    return total + conv(channels, config.image_channels)


def text_encoder(config: TextConfig) -> int:
    """FLOPs of encoding one prompt. Causal attention is counted as if it were full, as the kernels are usually rated."""
    tokens, width = config.context_length, config.width
    return config.layers * (2 * 12 * width**2 * tokens + 4 * width * tokens**2)


def of_round(configuration: Configuration, model: ModelConfig, unet_calls: int) -> int:
    """FLOPs of one round of a configuration on a model, with guidance's batch of two wherever there is a UNet."""
    factor = model.autoencoder.downsampling
    height = (configuration.height or model.image_size) // factor
    width = (configuration.width or model.image_size) // factor
    guided = 2 if configuration.workload != "txt2img" or configuration.scale != 1.0 else 1
    parts = {
        "text": guided * text_encoder(model.text),
        "unet": guided * unet_calls * unet(model.unet, height, width, model.text.context_length),
        "vae": decoder(model.autoencoder, height, width),
    }
    one = sum(parts.values()) if configuration.workload == "txt2img" else parts[configuration.workload]
    return one * configuration.batch
