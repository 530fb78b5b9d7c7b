"""YAML files in the original layout, checked key by key: a file that is read says exactly one known model.

Everything in the file is data. A `target` is compared with the names known here and never imported, and an
interpolation (`${oc.env:HOME}`) is refused and never resolved.
"""

from __future__ import annotations

import io
from pathlib import Path

from sd.config.presets import AutoencoderConfig, ModelConfig, ScheduleConfig, TextConfig, UNetConfig
from sd.errors import ConfigError

CONFIGS = Path(__file__).parent  # the files that come with this package
LARGEST = 1 << 20  # bytes; released files have under 5,000
DEEPEST = 50  # levels; released files have 7

MODEL_TARGET = "ldm.models.diffusion.ddpm.LatentDiffusion"
UNET_TARGET = "ldm.modules.diffusionmodules.openaimodel.UNetModel"
AUTOENCODER_TARGET = "ldm.models.autoencoder.AutoencoderKL"
OPENCLIP_TARGET = "ldm.modules.encoders.modules.FrozenOpenCLIPEmbedder"
CLIP_TARGET = "ldm.modules.encoders.modules.FrozenCLIPEmbedder"
TEXT_KINDS = {OPENCLIP_TARGET: "openclip", CLIP_TARGET: "clip"}

_OTHER_MODELS = {
    "LatentInpaintDiffusion": "an inpainting model",
    "LatentFinetuneDiffusion": "a fine-tuning wrapper",
    "LatentDepth2ImageDiffusion": "a depth-to-image model",
    "LatentUpscaleDiffusion": "an upscaler",
    "LatentUpscaleFinetuneDiffusion": "an upscaler",
    "ImageEmbeddingConditionedLatentDiffusion": "an unCLIP model",
}
_OTHER_CHANNELS = {5: "a depth-to-image", 7: "an upscaler", 8: "an instruct-pix2pix", 9: "an inpainting"}
# The width of the one embedder is never that of the other; other widths are custom models.
_FOREIGN_WIDTH = {"openclip": (768, CLIP_TARGET), "clip": (1024, OPENCLIP_TARGET)}

# What only training needs, or what is chosen by an option here, by section.
_TRAINING = {
    "": "data lightning",
    "model": "base_learning_rate",
    "model.params": "num_timesteps_cond log_every_t first_stage_key cond_stage_key cond_stage_trainable use_ema "
    "monitor scheduler_config personalization_config ckpt_path ignore_keys loss_type l_simple_weight "
    "original_elbo_weight learn_logvar logvar_init ucg_training reset_ema reset_num_ema_updates",
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
    """One mapping of the file: what is taken is checked, and `close` refuses what is left unless it may be."""

    def __init__(self, path: Path, name: str, mapping):
        self.path, self.name = path, name
        if not isinstance(mapping, dict):
            raise ConfigError(f"{path}: {name or 'the file'} is {_describe(mapping)} where keys and values are needed")
        self.left = dict(mapping)

    def key(self, key: str) -> str:
        """The dotted path of a key."""
        return f"{self.name}.{key}" if self.name else key

    def fail(self, key: str, what: str):
        """ConfigError that names the file and the dotted path of the key."""
        raise ConfigError(f"{self.path}: {self.key(key)}: {what}")

    def take(self, key: str, default=_REQUIRED):
        if key not in self.left and default is _REQUIRED:
            self.fail(key, "is missing, and the model cannot be built without it")
        return self.left.pop(key, default)

    def section(self, key: str, optional: bool = False) -> _Section:
        value = self.take(key, None if optional else _REQUIRED)
        return _Section(self.path, self.key(key), {} if value is None and optional else value)

    def integer(self, key: str, default=_REQUIRED, least: int = 1) -> int:
        value = self.take(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            self.fail(key, f"must be a whole number of at least {least}, and is {_describe(value)}")
        return value

    def count(self, key: str) -> int | None:
        """A positive whole number, or None where it is absent or the original's -1, which means the same."""
        if self.left.get(key, -1) == -1:
            self.left.pop(key, None)
            return None
        return self.integer(key)

    def number(self, key: str) -> float:
        value = self.take(key)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < float("inf"):
            self.fail(key, f"must be a positive number, and is {_describe(value)}")
        return float(value)

    def boolean(self, key: str, default: bool) -> bool:
        value = self.take(key, default)
        if not isinstance(value, bool):
            self.fail(key, f"must be True or False, and is {_describe(value)}")
        return value

    def integers(self, key: str) -> tuple[int, ...]:
        value = self.take(key)
        if not isinstance(value, list) or not value or not all(type(item) is int and item > 0 for item in value):
            self.fail(key, f"must be a list of positive whole numbers, and is {_describe(value)}")
        return tuple(value)

    def choice(self, key: str, choices: tuple, why: str, default=_REQUIRED):
        value = self.take(key, default)
        if not any(type(value) is type(choice) and value == choice for choice in choices):
            one_of = " or ".join(_describe(choice) for choice in choices)
            self.fail(key, f"is {_describe(value)} and can only be {one_of}: {why}")
        return value

    def close(self) -> None:
        ignored = _TRAINING[self.name].split()
        unknown = [self.key(str(key)) for key in self.left if key not in ignored]
        if unknown:
            raise ConfigError(
                f"{self.path}: unknown key {', '.join(unknown)}: misspelt, or of a model that cannot be run here"
            )


def _describe(value) -> str:
    if isinstance(value, dict):
        return "a mapping"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def read_yaml(path) -> ModelConfig:
    """The model that a YAML file in the original layout describes, named after the file.

    `text.layers` is 0: the file does not say it, the checkpoint does. Raises ConfigError naming the file, and the key
    by its dotted path, for anything unknown, missing, contradictory or of a model that cannot be run here.
    """
    path = Path(path)
    top = _Section(path, "", _parse(path))
    model = top.section("model")
    target = model.take("target")
    if target != MODEL_TARGET:
        other = _OTHER_MODELS.get(str(target).rpartition(".")[2])
        what = f"{_describe(target)} is {other}, and" if other else f"{_describe(target)} is unknown:"
        model.fail("target", f"{what} only {MODEL_TARGET} can be run here")
    params = model.section("params")
    unet, native_mha = _unet(params)
    autoencoder = _autoencoder(params)
    text = _text(params, unet)
    config = _model(path, params, unet, autoencoder, text, native_mha)
    for section in (params, model, top):
        section.close()
    return config


def _parse(path: Path) -> dict:
    try:
        if path.stat().st_size > LARGEST:
            raise ConfigError(f"{path}: has more than {LARGEST} bytes, give the YAML file of the model")
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}): give a YAML file or a preset") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not UTF-8 text: give the YAML file of the model, not its checkpoint") from None
    if "${" in text:
        raise ConfigError(f"{path}: has an interpolation (${{...}}), which is refused: write the value itself")

    import yaml  # which OmegaConf brings
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        _refuse_bombs(path, text)
        contents = OmegaConf.to_container(OmegaConf.load(io.StringIO(text)), resolve=False)
    except (yaml.YAMLError, OmegaConfBaseException, OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path}: is not YAML: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(contents, dict):
        raise ConfigError(f"{path}: is a list where `model:` is needed: give the YAML file of a model")
    return contents


def _refuse_bombs(path: Path, text: str) -> None:
    """A few nested aliases can stand for more values than memory holds; deep nesting takes more time than there is."""
    import yaml

    depth = 0
    for event in yaml.parse(text):
        if isinstance(event, yaml.AliasEvent):
            raise ConfigError(f"{path}: has an alias (*name), which is refused: write the value itself")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            raise ConfigError(f"{path}: is nested more than {DEEPEST} deep, which no model's file is")


def _unet(params: _Section) -> tuple[UNetConfig, bool]:
    config = params.section("unet_config")
    config.choice("target", (UNET_TARGET,), "no other network can be run here")
    section = config.section("params")
    in_channels = section.integer("in_channels")
    if in_channels in _OTHER_CHANNELS:
        section.fail(
            "in_channels", f"{in_channels} are those of {_OTHER_CHANNELS[in_channels]} model, which cannot be run here"
        )
    if section.integer("out_channels") != in_channels:
        section.fail("out_channels", f"must be in_channels, {in_channels}")
    num_heads, num_head_channels = section.count("num_heads"), section.count("num_head_channels")
    if num_heads and num_head_channels:
        section.fail("num_head_channels", "contradicts num_heads: give one of the two")
    if not num_heads and not num_head_channels:
        section.fail("num_heads", "is missing, and so is num_head_channels: give one of the two")
    section.choice("use_spatial_transformer", (True,), "without it there is no cross-attention to the prompt")
    section.choice("legacy", (False,), "that head layout is of models before Stable Diffusion", default=False)
    section.choice("num_classes", (None,), "a model with class embeddings cannot be run here", default=None)
    # These names choose an attention implementation in some forks; here an option does.
    attention = ("softmax", "softmax-xformers")
    section.choice("spatial_transformer_attn_type", attention, "no other attention is known", default="softmax")
    unet = UNetConfig(
        context_dim=section.integer("context_dim"),
        in_channels=in_channels,
        out_channels=in_channels,
        model_channels=section.integer("model_channels"),
        channel_mult=section.integers("channel_mult"),
        num_res_blocks=section.integer("num_res_blocks"),
        attention_resolutions=section.integers("attention_resolutions"),
        num_heads=num_heads,
        num_head_channels=num_head_channels,
        transformer_depth=section.integer("transformer_depth", 1),
        use_linear_in_transformer=section.boolean("use_linear_in_transformer", False),
        norm_groups=section.integer("norm_groups", 32),
    )
    factors = [2**level for level in range(len(unet.channel_mult))]
    if not set(unet.attention_resolutions) <= set(factors):
        section.fail("attention_resolutions", f"{list(unet.attention_resolutions)} are not all among {factors}")
    if unet.model_channels % unet.norm_groups:
        section.fail("model_channels", f"{unet.model_channels} is no multiple of norm_groups, {unet.norm_groups}")
    for factor, mult in zip(factors, unet.channel_mult):
        # The middle block, at the last level, always has attention.
        if factor in unet.attention_resolutions or factor == factors[-1]:
            channels = unet.model_channels * mult
            key, value = ("num_heads", num_heads) if num_heads else ("num_head_channels", num_head_channels)
            if value and channels % value:
                section.fail(key, f"{value} does not divide the {channels} channels of the level {factor}")
    native_mha = section.boolean("use_native_mha", False)
    section.close()
    config.close()
    return unet, native_mha


def _autoencoder(params: _Section) -> AutoencoderConfig:
    config = params.section("first_stage_config")
    config.choice("target", (AUTOENCODER_TARGET,), "no other autoencoder can be run here")
    section = config.section("params")
    shape = section.section("ddconfig")
    shape.choice("double_z", (True,), "without it the encoder gives no variance")
    shape.choice("attn_resolutions", ([],), "released autoencoders have attention in the middle only", default=[])
    shape.choice("attn_type", ("vanilla", "vanilla-xformers"), "no other attention is known", default="vanilla")
    image_channels = shape.integer("in_channels")
    if shape.integer("out_ch") != image_channels:
        shape.fail("out_ch", f"must be in_channels, {image_channels}")
    autoencoder = AutoencoderConfig(
        channels=shape.integer("ch"),
        channel_mult=shape.integers("ch_mult"),
        num_res_blocks=shape.integer("num_res_blocks"),
        image_channels=image_channels,
        latent_channels=shape.integer("z_channels"),
        embed_dim=section.integer("embed_dim"),
        norm_groups=shape.integer("norm_groups", 32),
    )
    if autoencoder.image_channels != 3:
        shape.fail("in_channels", f"must be 3, for colour pictures, and is {autoencoder.image_channels}")
    if autoencoder.channels % autoencoder.norm_groups:
        shape.fail("ch", f"{autoencoder.channels} is no multiple of norm_groups, {autoencoder.norm_groups}")
    for part in (shape, section, config):
        part.close()
    return autoencoder


def _text(params: _Section, unet: UNetConfig) -> TextConfig:
    config = params.section("cond_stage_config")
    target = config.choice("target", tuple(TEXT_KINDS), "no other text encoder can be run here")
    kind = TEXT_KINDS[target]
    section = config.section("params", optional=True)
    section.choice("max_length", (77,), "the tokenizer makes 77 tokens", default=77)
    # The weights come from the checkpoint, so that a name of pretrained ones is only compared.
    if kind == "openclip":
        section.choice("layer", ("penultimate",), "Stable Diffusion 2 was trained on the last but one")
        section.choice("arch", ("ViT-H-14",), "it is the tower of Stable Diffusion 2", default="ViT-H-14")
        section.choice("version", ("laion2b_s32b_b79k",), "it is the tower of SD2", default="laion2b_s32b_b79k")
    else:
        name = "openai/clip-vit-large-patch14"
        section.choice("layer", ("last",), "Stable Diffusion 1 was trained on the last", default="last")
        section.choice("version", (name,), "it is the tower of Stable Diffusion 1", default=name)
    foreign, owner = _FOREIGN_WIDTH[kind]
    if unet.context_dim == foreign:
        config.fail("target", f"contradicts unet_config's context_dim {foreign}, which is {owner.rpartition('.')[2]}'s")
    section.close()
    config.close()
    return TextConfig(kind, width=unet.context_dim, layers=0)


def _model(path, params, unet, autoencoder, text, native_mha) -> ModelConfig:
    if {params.integer("channels", unet.in_channels), autoencoder.embed_dim} != {unet.in_channels}:
        params.fail(
            "channels",
            f"the latents must have as many in unet_config (in_channels {unet.in_channels}) as in first_stage_config "
            f"(embed_dim {autoencoder.embed_dim}) and here",
        )
    params.choice("beta_schedule", ("linear",), "Stable Diffusion 1 and 2 use no other", default="linear")
    params.choice("conditioning_key", ("crossattn",), "no other input can be given here", default="crossattn")
    params.choice("scale_by_std", (False,), "give the scale_factor of the trained model", default=False)
    schedule = ScheduleConfig(
        params.number("linear_start"), params.number("linear_end"), params.integer("timesteps", 1000, least=2)
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
