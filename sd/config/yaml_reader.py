"""Read YAML files in the original layout, with every key checked, into a ModelConfig.

The file is data. A `target` is compared with known names and never imported, and an interpolation (`${oc.env:HOME}`) is
rejected and never resolved.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from sd.config.presets import (
    DEPTH_CHANNELS,
    INPAINTING_CHANNELS,
    OTHER_INPUTS,
    AutoencoderConfig,
    ModelConfig,
    ScheduleConfig,
    TextConfig,
    TextKind,
    UNetConfig,
)
from sd.errors import ConfigError, listed

CONFIGS = Path(__file__).parent  # the YAML files of this package
MAX_BYTES = 1 << 20  # released files have under 5,000
MAX_DEPTH = 50  # released files have 7 levels

MODEL_TARGET = "ldm.models.diffusion.ddpm.LatentDiffusion"
INPAINTING_TARGET = "ldm.models.diffusion.ddpm.LatentInpaintDiffusion"
DEPTH_TARGET = "ldm.models.diffusion.ddpm.LatentDepth2ImageDiffusion"
INPUTS_OF_TARGETS = {INPAINTING_TARGET: INPAINTING_CHANNELS, DEPTH_TARGET: DEPTH_CHANNELS}  # channels of the UNet
UNET_TARGET = "ldm.modules.diffusionmodules.openaimodel.UNetModel"
AUTOENCODER_TARGET = "ldm.models.autoencoder.AutoencoderKL"
OPENCLIP_TARGET = "ldm.modules.encoders.modules.FrozenOpenCLIPEmbedder"
CLIP_TARGET = "ldm.modules.encoders.modules.FrozenCLIPEmbedder"
DEPTH_ESTIMATOR_TARGET = "ldm.modules.midas.api.MiDaSInference"
TEXT_KINDS: dict[str, TextKind] = {OPENCLIP_TARGET: "openclip", CLIP_TARGET: "clip"}

_OTHER_MODELS = {
    "LatentFinetuneDiffusion": "a fine-tuning wrapper",
    "LatentUpscaleDiffusion": "an upscaler",
    "LatentUpscaleFinetuneDiffusion": "an upscaler",
    "ImageEmbeddingConditionedLatentDiffusion": "an unCLIP model",
}
# The released width of the other text encoder, and its class; further widths belong to custom models.
_WRONG_WIDTH = {"openclip": (768, "FrozenCLIPEmbedder"), "clip": (1024, "FrozenOpenCLIPEmbedder")}

# Keys that only training uses, or that are options of `sd`, by section.
_IGNORED = {
    "": "data lightning",
    "model": "base_learning_rate",
    "model.params": "num_timesteps_cond log_every_t first_stage_key cond_stage_key cond_stage_trainable use_ema "
    "monitor scheduler_config personalization_config ckpt_path ignore_keys loss_type l_simple_weight "
    "original_elbo_weight learn_logvar logvar_init ucg_training reset_ema reset_num_ema_updates",
    "model.params.depth_stage_config": "params",  # of the depth estimator, which `sd` does not have
    "model.params.unet_config": "",
    "model.params.unet_config.params": "image_size use_checkpoint use_fp16 use_bf16 dropout",
    "model.params.first_stage_config": "",
    "model.params.first_stage_config.params": "monitor lossconfig ckpt_path ignore_keys image_key colorize_nlabels",
    "model.params.first_stage_config.params.ddconfig": "resolution dropout",
    "model.params.cond_stage_config": "",
    "model.params.cond_stage_config.params": "freeze device",
}
_REQUIRED = object()


class _Section:
    """One mapping of the file: values are checked when taken, and `close` rejects the keys that were not."""

    def __init__(self, path: Path, name: str, mapping: Any) -> None:
        self.path, self.name = path, name
        if not isinstance(mapping, dict):
            raise ConfigError(f"{path}: {name or 'the file'} is {_describe(mapping)} where keys and values are needed")
        self.remaining = dict(mapping)

    def key(self, key: str) -> str:
        return f"{self.name}.{key}" if self.name else key

    def fail(self, key: str, fault: str) -> NoReturn:
        raise ConfigError(f"{self.path}: {self.key(key)}: {fault}")

    def take(self, key: str, default: Any = _REQUIRED) -> Any:
        if key not in self.remaining and default is _REQUIRED:
            self.fail(key, "is missing, and the model cannot be built without it")
        return self.remaining.pop(key, default)

    def section(self, key: str, optional: bool = False) -> _Section:
        value = self.take(key, None if optional else _REQUIRED)
        return _Section(self.path, self.key(key), {} if value is None and optional else value)

    def checked(self, key: str, valid: Callable[[Any], bool], expected: str, default: Any = _REQUIRED) -> Any:
        value = self.take(key, default)
        if not valid(value):
            self.fail(key, f"must be {expected}, not {_describe(value)}")
        return value

    def integer(self, key: str, default: Any = _REQUIRED, minimum: int = 1) -> int:
        def valid(value: Any) -> bool:
            return type(value) is int and value >= minimum

        return int(self.checked(key, valid, f"a whole number of at least {minimum}", default))

    def count(self, key: str) -> int | None:
        """A positive whole number, or None if it is absent or -1, the original's value for absent."""
        if self.remaining.get(key, -1) == -1:
            self.remaining.pop(key, None)
            return None
        return self.integer(key)

    def number(self, key: str) -> float:
        return float(
            self.checked(
                key, lambda value: type(value) in (int, float) and 0 < value < float("inf"), "a positive number"
            )
        )

    def boolean(self, key: str) -> bool:
        return bool(self.checked(key, lambda value: type(value) is bool, "True or False", default=False))

    def integers(self, key: str) -> tuple[int, ...]:
        def valid(value: Any) -> bool:
            return type(value) is list and bool(value) and all(type(item) is int and item > 0 for item in value)

        return tuple(self.checked(key, valid, "a list of positive whole numbers"))

    def choice(self, key: str, choices: tuple[Any, ...], reason: str, default: Any = _REQUIRED) -> Any:
        value = self.take(key, default)
        if not any(type(value) is type(choice) and value == choice for choice in choices):
            supported = " or ".join(_describe(choice) for choice in choices)
            self.fail(key, f"is {_describe(value)} and can only be {supported}: {reason}")
        return value

    def close(self) -> None:
        ignored = _IGNORED[self.name].split()
        unknown = [self.key(str(key)) for key in self.remaining if key not in ignored]
        if unknown:
            raise ConfigError(f"{self.path}: unknown key {', '.join(unknown)}: misspelt, or of an unsupported model")


def _describe(value: Any) -> str:
    if isinstance(value, dict):
        return "a mapping"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def read_yaml(path: str | Path) -> ModelConfig:
    """Read the model that a YAML file in the original layout describes; it is named after the file.

    `text.layers` is 0: the checkpoint determines it. Raises ConfigError naming the file, and the key by its dotted path,
    for anything unknown, missing, contradictory or unsupported.
    """
    path = Path(path)
    top = _Section(path, "", _parse(path))
    model = top.section("model")
    target = model.take("target")
    supported = (MODEL_TARGET, *INPUTS_OF_TARGETS)
    if target not in supported:
        other = _OTHER_MODELS.get(str(target).rpartition(".")[2])
        reason = f"is {other}, and" if other else "is unknown:"
        model.fail("target", f"{_describe(target)} {reason} only {listed(supported)} are supported")
    params = model.section("params")
    unet, native_mha = _unet(params, target)
    autoencoder = _autoencoder(params)
    text = _text(params, unet)
    if target in INPUTS_OF_TARGETS:
        order = ["mask", "masked_image"] if target == INPAINTING_TARGET else ["midas_in"]
        params.choice("concat_keys", (order,), "released models have this order of channels", default=order)
        params.choice("finetune_keys", (None,), "it is for training: give null", default=None)
    if target == INPAINTING_TARGET:
        params.choice("masked_image_key", ("masked_image",), "released models have this key", default="masked_image")
    if target == DEPTH_TARGET:
        estimator = params.section("depth_stage_config")
        estimator.choice("target", (DEPTH_ESTIMATOR_TARGET,), "released models were trained with it")
        estimator.close()
    config = _model(path, params, unet, autoencoder, text, native_mha)
    for section in (params, model, top):
        section.close()
    return config


def _parse(path: Path) -> dict[Any, Any]:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ConfigError(f"{path}: has more than {MAX_BYTES} bytes, give the YAML file of the model")
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}): give a YAML file or a preset") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not UTF-8 text: give the YAML file of the model, not its checkpoint") from None
    if "${" in text:
        raise ConfigError(f"{path}: has an interpolation (${{...}}), which is rejected: write the value itself")

    import yaml  # a dependency of OmegaConf
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        _reject_bombs(path, text)
        contents = OmegaConf.to_container(OmegaConf.load(io.StringIO(text)), resolve=False)
    except ConfigError:
        raise
    except (yaml.YAMLError, OmegaConfBaseException, OSError, ValueError) as error:
        raise ConfigError(f"{path}: is not YAML: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(contents, dict):
        raise ConfigError(f"{path}: is a list where `model:` is needed: give the YAML file of a model")
    return contents


def _reject_bombs(path: Path, text: str) -> None:
    """Reject aliases, a few of which can expand beyond the memory, and deep nesting, whose parsing takes too long."""
    import yaml

    depth = 0
    for event in yaml.parse(text):
        if isinstance(event, yaml.AliasEvent):
            raise ConfigError(f"{path}: has an alias (*name), which is rejected: write the value itself")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise ConfigError(f"{path}: is nested more than {MAX_DEPTH} deep")


def _unet(params: _Section, model_target: str) -> tuple[UNetConfig, bool]:
    config = params.section("unet_config")
    config.choice("target", (UNET_TARGET,), "no other network is supported")
    section = config.section("params")
    in_channels = section.integer("in_channels")
    if in_channels in OTHER_INPUTS:
        section.fail(
            "in_channels", f"{in_channels} are those of {OTHER_INPUTS[in_channels]} model, which is unsupported"
        )
    targets = {channels: target for target, channels in INPUTS_OF_TARGETS.items()}
    target = targets.get(in_channels, MODEL_TARGET)
    if target != model_target:
        section.fail("in_channels", f"{in_channels} contradicts model.target: use {target.rpartition('.')[2]}")
    out_channels = section.integer("out_channels")
    if target == MODEL_TARGET and out_channels != in_channels:
        section.fail("out_channels", f"must be in_channels, {in_channels}")
    if target != MODEL_TARGET and out_channels != 4:
        section.fail("out_channels", f"must be 4: the latents among the {in_channels} input channels")
    num_heads, num_head_channels = section.count("num_heads"), section.count("num_head_channels")
    if num_heads and num_head_channels:
        section.fail("num_head_channels", "contradicts num_heads: give only one of them")
    if not num_heads and not num_head_channels:
        section.fail("num_heads", "is missing, and so is num_head_channels: give one of them")
    section.choice("use_spatial_transformer", (True,), "without it there is no cross-attention to the prompt")
    section.choice("legacy", (False,), "that head layout predates Stable Diffusion", default=False)
    section.choice("num_classes", (None,), "class embeddings are not supported", default=None)
    # Some forks select the attention backend by these names; `sd` has an option for it.
    attention = ("softmax", "softmax-xformers")
    section.choice("spatial_transformer_attn_type", attention, "no other attention is known", default="softmax")
    unet = UNetConfig(
        context_dim=section.integer("context_dim"),
        in_channels=in_channels,
        out_channels=out_channels,
        model_channels=section.integer("model_channels"),
        channel_mult=section.integers("channel_mult"),
        num_res_blocks=section.integer("num_res_blocks"),
        attention_resolutions=section.integers("attention_resolutions"),
        num_heads=num_heads,
        num_head_channels=num_head_channels,
        transformer_depth=section.integer("transformer_depth", 1),
        use_linear_in_transformer=section.boolean("use_linear_in_transformer"),
        norm_groups=section.integer("norm_groups", 32),
    )
    native_mha = section.boolean("use_native_mha")
    _check_unet(section, unet)
    section.close()
    config.close()
    return unet, native_mha


def _check_unet(section: _Section, unet: UNetConfig) -> None:
    factors = [2**level for level in range(len(unet.channel_mult))]
    if not set(unet.attention_resolutions) <= set(factors):
        section.fail("attention_resolutions", f"{list(unet.attention_resolutions)} are not all among {factors}")
    if unet.model_channels % unet.norm_groups:
        section.fail("model_channels", f"{unet.model_channels} is no multiple of norm_groups, {unet.norm_groups}")
    key = "num_heads" if unet.num_heads else "num_head_channels"
    divisor = unet.num_heads or unet.num_head_channels or 1
    for factor, multiplier in zip(factors, unet.channel_mult):
        channels = unet.model_channels * multiplier
        # The middle block, at the last level, always has attention.
        attended = factor in unet.attention_resolutions or factor == factors[-1]
        if attended and channels % divisor:
            section.fail(key, f"{divisor} does not divide the {channels} channels of the level {factor}")


def _autoencoder(params: _Section) -> AutoencoderConfig:
    config = params.section("first_stage_config")
    config.choice("target", (AUTOENCODER_TARGET,), "no other autoencoder is supported")
    section = config.section("params")
    shape = section.section("ddconfig")
    shape.choice("double_z", (True,), "without it the encoder gives no variance")
    shape.choice("attn_resolutions", ([],), "released autoencoders have attention in the middle only", default=[])
    shape.choice("attn_type", ("vanilla", "vanilla-xformers"), "no other attention is known", default="vanilla")
    image_channels = shape.integer("in_channels")
    if shape.integer("out_ch") != image_channels:
        shape.fail("out_ch", f"must be in_channels, {image_channels}")
    if image_channels != 3:
        shape.fail("in_channels", f"must be 3, for RGB images, not {image_channels}")
    autoencoder = AutoencoderConfig(
        channels=shape.integer("ch"),
        channel_mult=shape.integers("ch_mult"),
        num_res_blocks=shape.integer("num_res_blocks"),
        image_channels=image_channels,
        latent_channels=shape.integer("z_channels"),
        embed_dim=section.integer("embed_dim"),
        norm_groups=shape.integer("norm_groups", 32),
    )
    if autoencoder.channels % autoencoder.norm_groups:
        shape.fail("ch", f"{autoencoder.channels} is no multiple of norm_groups, {autoencoder.norm_groups}")
    for part in (shape, section, config):
        part.close()
    return autoencoder


def _text(params: _Section, unet: UNetConfig) -> TextConfig:
    config = params.section("cond_stage_config")
    kind = TEXT_KINDS[config.choice("target", tuple(TEXT_KINDS), "no other text encoder is supported")]
    section = config.section("params", optional=True)
    section.choice("max_length", (77,), "the tokenizer returns 77 tokens", default=77)
    # The weights come from the checkpoint, so names of pretrained weights are only compared.
    if kind == "openclip":
        section.choice("layer", ("penultimate",), "Stable Diffusion 2 was trained on the last layer but one")
        section.choice("arch", ("ViT-H-14",), "it is the tower of Stable Diffusion 2", default="ViT-H-14")
        section.choice("version", ("laion2b_s32b_b79k",), "it is the tower of SD2", default="laion2b_s32b_b79k")
    else:
        name = "openai/clip-vit-large-patch14"
        section.choice("layer", ("last",), "Stable Diffusion 1 was trained on the last layer", default="last")
        section.choice("version", (name,), "it is the tower of Stable Diffusion 1", default=name)
    wrong_width, other = _WRONG_WIDTH[kind]
    if unet.context_dim == wrong_width:
        config.fail("target", f"contradicts unet_config's context_dim {wrong_width}, which is {other}'s")
    section.close()
    config.close()
    return TextConfig(kind, width=unet.context_dim, layers=0)


def _model(
    path: Path,
    params: _Section,
    unet: UNetConfig,
    autoencoder: AutoencoderConfig,
    text: TextConfig,
    native_mha: bool,
) -> ModelConfig:
    if {params.integer("channels", unet.out_channels), autoencoder.embed_dim} != {unet.out_channels}:
        params.fail(
            "channels",
            f"must be the same number of latent channels as in unet_config (out_channels {unet.out_channels}) and in "
            f"first_stage_config (embed_dim {autoencoder.embed_dim})",
        )
    params.choice("beta_schedule", ("linear",), "Stable Diffusion 1 and 2 use no other", default="linear")
    hybrid = unet.in_channels != unet.out_channels
    key, default = ("hybrid", _REQUIRED) if hybrid else ("crossattn", "crossattn")
    params.choice("conditioning_key", (key,), "no other input is supported", default=default)
    params.choice("scale_by_std", (False,), "give the scale_factor of the trained model", default=False)
    schedule = ScheduleConfig(
        params.number("linear_start"), params.number("linear_end"), params.integer("timesteps", 1000, minimum=2)
    )
    if not schedule.linear_start < schedule.linear_end < 1:
        params.fail("linear_end", f"{schedule.linear_end} must lie between linear_start {schedule.linear_start} and 1")
    return ModelConfig(
        name=path.stem,
        unet=unet,
        text=text,
        autoencoder=autoencoder,
        schedule=schedule,
        parameterization=params.choice("parameterization", ("eps", "v"), "no other is known", default="eps"),
        scale_factor=params.number("scale_factor"),
        image_size=params.integer("image_size") * autoencoder.downsampling,
        native_mha=native_mha,
    )
