"""Model presets: frozen descriptions of the networks. sd.config.yaml_reader reads YAML files in the original layout."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from sd.errors import ConfigError

TextKind = Literal["openclip", "clip"]  # SD2, SD1: parameter names, activation and padding differ
Parameterization = Literal["eps", "v"]  # prediction type of the UNet: noise, or v of arXiv 2202.00512
# Input channels of the UNet, in this order.
INPAINTING_CHANNELS = 9  # noisy latents 4, mask 1, latents of the masked image 4
DEPTH_CHANNELS = 5  # noisy latents 4, depth 1
INPUTS = {INPAINTING_CHANNELS: "an inpainting", DEPTH_CHANNELS: "a depth-to-image"}
OTHER_INPUTS = {7: "an upscaler", 8: "an instruct-pix2pix"}  # unsupported


@dataclass(frozen=True)
class UNetConfig:
    """Shape of the UNet (`unet_config` of the original YAML files)."""

    context_dim: int
    in_channels: int = 4
    out_channels: int = 4
    model_channels: int = 320
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    attention_resolutions: tuple[int, ...] = (4, 2, 1)  # downsampling factors that have attention
    num_heads: int | None = None  # exactly one of these two is set
    num_head_channels: int | None = None
    transformer_depth: int = 1
    use_linear_in_transformer: bool = False
    norm_groups: int = 32
    guidance_embedding: int | None = None  # channels of the embedded guidance scale, of consistency models

    def __post_init__(self) -> None:
        if (self.num_heads is None) == (self.num_head_channels is None):
            raise ConfigError("unet: give either num_heads or num_head_channels")

    def heads(self, channels: int) -> int:
        """Number of attention heads in a block of `channels` channels."""
        divisor = self.num_heads or self.num_head_channels or 1
        if channels % divisor:
            split = f"{self.num_heads} heads" if self.num_heads else f"heads of {self.num_head_channels} channels"
            raise ConfigError(f"unet: {channels} channels cannot be split into {split}")
        return self.num_heads or channels // divisor


@dataclass(frozen=True)
class AutoencoderConfig:
    """Shape of the KL autoencoder (`first_stage_config.params.ddconfig` of the original YAML files)."""

    channels: int = 128
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    image_channels: int = 3
    latent_channels: int = 4
    embed_dim: int = 4
    norm_groups: int = 32

    @property
    def downsampling(self) -> int:
        """Pixels per latent cell along one axis."""
        return 1 << (len(self.channel_mult) - 1)


@dataclass(frozen=True)
class TextConfig:
    """Shape of the text encoder. `layers` counts the blocks that run: SD2 skips the last of its 24."""

    kind: TextKind
    width: int
    layers: int
    vocab_size: int = 49408
    context_length: int = 77

    def __post_init__(self) -> None:
        if self.kind not in ("openclip", "clip"):
            raise ConfigError(f"text encoder kind {self.kind!r}: choose openclip or clip")

    @property
    def heads(self) -> int:
        """Number of attention heads: width / 64, as in every released model, and 1 below that width."""
        return max(1, self.width // 64)


@dataclass(frozen=True)
class ScheduleConfig:
    """Noise schedule of the forward process: betas linear in sqrt space."""

    linear_start: float = 0.00085
    linear_end: float = 0.0120
    timesteps: int = 1000


@dataclass(frozen=True)
class ModelConfig:
    """Description of a model: the networks, and the settings that its weights do not show."""

    name: str
    unet: UNetConfig
    text: TextConfig
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    parameterization: Parameterization = "eps"
    scale_factor: float = 0.18215  # latents = encoder output * scale_factor
    image_size: int = 512  # native height and width in pixels
    native_mha: bool = False  # the YAML file selects nn.MultiheadAttention

    def __post_init__(self) -> None:
        if self.parameterization not in ("eps", "v"):
            raise ConfigError(f"parameterization {self.parameterization!r}: choose eps or v")
        if self.unet.context_dim != self.text.width:
            raise ConfigError(
                f"{self.name}: the UNet's context_dim {self.unet.context_dim} is not the text encoder's width {self.text.width}"
            )

    @property
    def inpainting(self) -> bool:
        """Whether the UNet takes a mask and a masked image beside the latents."""
        return self.unet.in_channels == INPAINTING_CHANNELS

    @property
    def depth_to_image(self) -> bool:
        """Whether the UNet takes a depth map beside the latents."""
        return self.unet.in_channels == DEPTH_CHANNELS

    def as_inpainting(self) -> ModelConfig:
        """The inpainting model tuned from this one: its UNet has INPAINTING_CHANNELS input channels."""
        return replace(self, name=f"{self.name}-inpaint", unet=replace(self.unet, in_channels=INPAINTING_CHANNELS))

    def as_depth_to_image(self) -> ModelConfig:
        """The depth-to-image model tuned from this one: its UNet has DEPTH_CHANNELS input channels."""
        return replace(self, name=f"{self.name}-depth", unet=replace(self.unet, in_channels=DEPTH_CHANNELS))


_SD1_UNET = UNetConfig(context_dim=768, num_heads=8)
_SD2_UNET = UNetConfig(context_dim=1024, num_head_channels=64, use_linear_in_transformer=True)
_OPENCLIP_H = TextConfig("openclip", width=1024, layers=23)

PRESETS = {
    "sd1": ModelConfig("sd1", _SD1_UNET, TextConfig("clip", width=768, layers=12)),
    "sd2": ModelConfig("sd2", _SD2_UNET, _OPENCLIP_H),
    "sd2-v": ModelConfig("sd2-v", _SD2_UNET, _OPENCLIP_H, parameterization="v", image_size=768),
    # The embedded model: the architecture of SD2 with about 4 million parameters, trained by sd.tiny.train.
    "tiny": ModelConfig(
        "tiny",
        UNetConfig(
            context_dim=32,
            model_channels=40,
            channel_mult=(1, 2),
            num_res_blocks=1,
            attention_resolutions=(2, 1),
            num_head_channels=8,
            use_linear_in_transformer=True,
            norm_groups=8,
        ),
        TextConfig("openclip", width=32, layers=2),
        AutoencoderConfig(channels=16, channel_mult=(1, 2, 2, 3), num_res_blocks=1, norm_groups=8),
        parameterization="v",
        image_size=64,
        scale_factor=1.0,  # folded into the last and first convolutions of the autoencoder
    ),
}
PRESETS.update({f"{name}-inpaint": PRESETS[name].as_inpainting() for name in ("sd1", "sd2", "tiny")})
PRESETS["sd2-depth"] = PRESETS["sd2"].as_depth_to_image()


def preset(name: str) -> ModelConfig:
    """Return the preset `name`; ConfigError lists the valid names."""
    if name not in PRESETS:
        raise ConfigError(f"no preset {name!r}: choose one of {', '.join(PRESETS)}, or give a YAML file")
    return PRESETS[name]
