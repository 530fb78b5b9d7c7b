"""Load an untrusted checkpoint into validated state dicts.

`read` reads any file format, `load` validates the result against the networks of a ModelConfig, and `materialise` of
sd.checkpoint.networks puts it into a module. Each tensor is read once into memory of its own, which the module then keeps:
loading takes the size of the weights that are used, without a second copy of the model.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from sd.checkpoint import layouts
from sd.checkpoint.detect import (
    Prediction,
    detect,
    recorded_prediction,
    reject_contradiction,
    reject_other_models,
    require_parts,
)
from sd.checkpoint.diffusers_folder import WEIGHT_FILES
from sd.checkpoint.diffusers_reader import (
    SCHEDULER,
    Reader,
    image_size,
    parameterization,
    read_folder,
    read_network,
    require_settings,
    scheduler_note,
)
from sd.checkpoint.file_formats import FileIndex, index, read_tensors, require_path, shapes_of
from sd.checkpoint.networks import expected_shapes
from sd.checkpoint.spellings import V_PREDICTION_MARKERS, ZERO_SNR_MARKERS, original_names, prefixes
from sd.config.presets import ModelConfig
from sd.errors import CheckpointError, CheckpointWarning, listed
from sd.sampling.schedule import Schedule

_OPENCLIP_H_LAYERS = 24  # of which 23 run; files with transformers' names show neither projection nor scale
_SCHEDULE = "alphas_cumprod"  # stored in the released files

_SCHEDULE_BUFFERS = (
    "betas alphas_cumprod alphas_cumprod_prev sqrt_alphas_cumprod sqrt_one_minus_alphas_cumprod "
    "log_one_minus_alphas_cumprod sqrt_recip_alphas_cumprod sqrt_recipm1_alphas_cumprod posterior_variance "
    "posterior_log_variance_clipped posterior_mean_coef1 posterior_mean_coef2 lvlb_weights logvar "
    "scale_factor global_step epoch lr num_timesteps"
).split()
# Entries of published files that inference does not use.
_IGNORABLE = re.compile(
    "|".join(
        [
            rf"({'|'.join(_SCHEDULE_BUFFERS)})$",
            r"ddim_\w+$",
            r"model_ema\.",
            r"depth_model\.",  # the depth estimator of depth-to-image models
            r"loss\.",
            rf"first_stage_model\.((loss|model_ema)\.|({'|'.join(_SCHEDULE_BUFFERS)})$)",
            r"cond_stage_model\.model\.(visual\.|(attn_mask|text_projection|logit_scale)$)",
            r"cond_stage_model\.model\.(input_resolution|context_length|vocab_size)$",
            r"cond_stage_model\.(transformer\.)?(vision_model\.|(visual_projection\.weight|text_projection\.weight|logit_scale)$)",
            r"cond_stage_model\.(transformer|model)\.(text_model\.)?embeddings\.position_ids$",
        ]
    )
)
# Weights that only a released OpenCLIP tower has; its last block is trained but not used.
_RELEASED_OPENCLIP = (f"{layouts.OPENCLIP}text_projection", f"{layouts.OPENCLIP}logit_scale")
_GUIDANCE = f"{layouts.UNET}time_embedding.cond_proj.weight"
_BLOCK = re.compile(r"transformer\.resblocks\.(\d{1,4})\.")


@dataclass(frozen=True)
class Checkpoint:
    """A state dict in the original layout, and the metadata of its file.

    prediction: the prediction type that the checkpoint records, if any. others: names of entries that are not tensors.
    names: the names in the file. ignored: description of contents that are not used.
    """

    state: dict[str, Tensor]
    global_step: int | None = None
    prediction: Prediction | None = None
    others: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    ignored: str | None = None


def read_checkpoint(
    path: str | Path,
    progress: bool | None = None,
    select: Callable[[str], bool] | None = None,
    *,
    vae: str | Path | None = None,
    text_encoder: str | Path | None = None,
    strict: bool = True,
    shapes_only: bool = False,
) -> Checkpoint:
    """Read a checkpoint into the original layout, with its metadata.

    path: as in `read`; names in the spellings of other tools are mapped. select: predicate of the original names to read;
    folders are read whole. vae, text_encoder: files or folders of these networks, in place of those in the checkpoint.
    strict False: unknown names inside the networks of diffusers are left unchanged. shapes_only: tensors on the meta device,
    without reading the weights.
    """
    path, read = require_path(path), shapes_of if shapes_only else read_tensors
    parts = {"autoencoder": vae, "text_encoder": text_encoder}
    replaced = {network: file for network, file in parts.items() if file is not None}
    if path.is_dir():
        predicted = parameterization(path)  # an invalid value is rejected before gigabytes are read
        networks = [network for network in WEIGHT_FILES if network not in replaced]
        checkpoint = Checkpoint(
            read_folder(path, progress, networks, strict, read),
            prediction=None if predicted is None else Prediction(predicted, f"scheduler ({SCHEDULER})"),
            ignored=scheduler_note(path),
        )
    else:
        unused = tuple(prefix for network in replaced for prefix in prefixes(network))
        checkpoint = _read_file(
            path,
            progress,
            lambda name: not name.startswith(unused) and (select is None or select(name)),
            strict,
            read,
        )
    for network, file in replaced.items():
        checkpoint.state.update(_read_network(file, network, progress, strict, read))
    return checkpoint


def names_of(file_index: FileIndex, network: str | None = None, strict: bool = True) -> dict[str, str]:
    """`original_names` of the tensors of a file, which errors name."""
    try:
        return original_names(file_index.tensors, network, strict)
    except CheckpointError as error:
        raise CheckpointError(f"{file_index.path}: {error}") from None


def _read_file(
    path: Path, progress: bool | None, select: Callable[[str], bool], strict: bool, read: Reader
) -> Checkpoint:
    file_index = index(path)
    names = names_of(file_index, strict=strict)
    tensors = read(file_index, [name for name, new in names.items() if select(new)], progress)
    state = layouts.attention_as_convolutions({names[name]: tensor for name, tensor in tensors.items()})
    predicted = recorded_prediction(file_index)
    return Checkpoint(state, file_index.global_step, predicted, file_index.others, tuple(file_index.tensors))


def _read_network(path: str | Path, network: str, progress: bool | None, strict: bool, read: Reader) -> layouts.State:
    """Read `autoencoder` or `text_encoder` from a file or folder of it alone, or of a whole model, in the original layout."""
    path = require_path(path)
    if path.is_dir():
        return read_network(path, network, progress, strict, read)
    file_index, own = index(path), prefixes(network)
    names = names_of(file_index, network, strict)
    needed = [name for name, new in names.items() if new.startswith(own) and not _IGNORABLE.match(new)]
    expected = {"autoencoder": "decoder.conv_in", "text_encoder": "token_embedding"}[network]
    if not any(expected in names[name] for name in needed):
        noun = network.replace("_", " ")
        raise CheckpointError(
            f"{path}: contains no {noun} of Stable Diffusion ({expected} is missing); give another file"
        )
    state = read(file_index, needed, progress)
    return layouts.attention_as_convolutions({names[name]: tensor for name, tensor in state.items()})


def read(path: str | Path, progress: bool | None = None) -> dict[str, Tensor]:
    """Read every tensor of a checkpoint, by its name in the file, on the CPU in the file's dtype.

    path: a .safetensors or torch file (detected from its content, not its extension; a nested `state_dict` is used), or
    a diffusers folder, which is returned in the original layout. progress: True shows a bar on stderr, None only on a
    terminal. Nothing in the file is executed. Raises CheckpointError naming the file and a remedy.
    """
    path = require_path(path)
    return read_folder(path, progress) if path.is_dir() else read_tensors(index(path), None, progress)


def require_usual_settings(
    path: str | Path, checkpoint: Checkpoint, vae: str | Path | None = None, text_encoder: str | Path | None = None
) -> None:
    """Raise CheckpointError for settings of a diffusers folder that a file of its weights could not record.

    Arguments as in `read_checkpoint`. A model whose sizes are of no preset is loaded with a config, which has these settings.
    """
    if not any(Path(folder).is_dir() for folder in (path, vae, text_encoder) if folder is not None):
        return
    state = checkpoint.state
    try:
        config = detect(path, state, checkpoint.prediction)
        text = layouts.split_networks(state)[0]["text_encoder"]
    except CheckpointError:
        return
    released = any(name in state for name in _RELEASED_OPENCLIP)
    require_settings(Path(path), _with_text_layers(path, text, config, released), vae, text_encoder)


# --- networks


def _with_text_layers(path: str | Path, text: Iterable[str], config: ModelConfig, released: bool) -> ModelConfig:
    """The config with the number of text blocks that run; 0 means that it depends on the file.

    released: a released OpenCLIP tower, whose last block is not used; of other files (tiny, diffusers) every block is.
    """
    if config.text.layers:
        return config
    layers = len({match[1] for match in map(_BLOCK.match, text) if match})
    if config.text.kind == "openclip" and (released or layers == _OPENCLIP_H_LAYERS):
        layers -= 1
    if layers < 1:
        raise CheckpointError(f"{path}: its text encoder has no blocks to run; download the file again")
    return replace(config, text=replace(config.text, layers=layers))


# --- validating


def _name_in_file(network: str, name: str, hf: bool) -> str:
    """Name of a network's weight in the original layout; hf: the text encoder has the names of transformers."""
    if network != "text_encoder":
        return layouts.PREFIXES[network] + name
    if not hf:
        return layouts.OPENCLIP + name
    return layouts.CLIP + next(iter(layouts.openclip_text_to_hf({name: torch.zeros(3)})))


def _validate(
    files: dict[str, str | Path],
    networks: dict[str, layouts.State],
    config: ModelConfig,
    hf: bool,
    ignore_unknown_keys: bool,
) -> None:
    """Remove ignorable entries from `networks`; reject missing and unknown ones, and wrong shapes and dtypes.

    files: the path of each network.
    """
    for file in dict.fromkeys(files.values()):
        own = [network for network in networks if files[network] == file]
        _validate_file(file, {network: networks[network] for network in own}, config, hf, ignore_unknown_keys)


def _validate_file(
    path: str | Path, networks: dict[str, layouts.State], config: ModelConfig, hf: bool, ignore_unknown_keys: bool
) -> None:
    missing, shapes, dtypes, unknown = [], [], [], []
    for network, state in networks.items():
        expected = expected_shapes(config)[network]
        for name, shape in expected.items():
            full = _name_in_file(network, name, hf)
            if name not in state:
                missing.append(full)
                continue
            state[name] = _matrix_or_convolution(state[name], shape)
            if state[name].shape != shape:
                shapes.append(f"{full} {tuple(state[name].shape)} instead of {tuple(shape)}")
            elif state[name].dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
                dtypes.append(f"{full} ({str(state[name].dtype)[6:]})")
        for name in [name for name in state if name not in expected]:
            block = _BLOCK.match(name) if network == "text_encoder" and config.text.kind == "openclip" else None
            full = _name_in_file(network, name, hf)
            # The last block of a released tower follows those that run.
            if not _IGNORABLE.match(full) and not (block and int(block[1]) == config.text.layers):
                unknown.append(full)
            del state[name]
    if unknown and ignore_unknown_keys:
        _warn(f"{path}: --ignore-unknown-keys leaves out {len(unknown)} of its weights: {listed(unknown)}")
        unknown = []
    faults = {"missing": missing, "of a wrong shape": shapes, "not floating point": dtypes, "unknown": unknown}
    if any(faults.values()):
        summary = "; ".join(f"{len(names)} {fault}: {listed(names)}" for fault, names in faults.items() if names)
        only_unknown = (
            ", or leave them out with --ignore-unknown-keys" if list(filter(None, faults.values())) == [unknown] else ""
        )
        raise CheckpointError(
            f"{path}: its weights do not fit the config {config.name} ({summary}); "
            f"give the config of this model, or download the file again{only_unknown}"
        )


def _matrix_or_convolution(weight: Tensor, shape: torch.Size) -> Tensor:
    """A 1x1 convolution [O, I, 1, 1] as the matrix [O, I] or the reverse, where `shape` has the other of the two."""
    ranks = {weight.dim(), len(shape)}
    longer, shorter = sorted((tuple(weight.shape), tuple(shape)), key=len, reverse=True)
    return weight.reshape(shape) if ranks == {2, 4} and longer == (*shorter, 1, 1) else weight


def _warn(message: str) -> None:
    warnings.warn(message, CheckpointWarning, stacklevel=4)  # the caller of `load` or `from_checkpoint`


def load(
    path: str | Path,
    config: ModelConfig | None = None,
    progress: bool | None = None,
    *,
    vae: str | Path | None = None,
    text_encoder: str | Path | None = None,
    ignore_unknown_keys: bool = False,
    shapes_only: bool = False,
) -> tuple[ModelConfig, dict[str, layouts.State]]:
    """Read a checkpoint and validate it against a config.

    Returns (config, {"unet": state, "autoencoder": state, "text_encoder": state}); the names and shapes of each state are
    exactly those of UNet, Autoencoder and TextEncoder, the tensors on the CPU in the file's floating dtype.
    config None: sd1, sd2 or tiny, or the inpainting or depth-to-image model of one of them, by the sizes in the file, with
    the prediction type that the checkpoint records: in the scheduler of a diffusers folder, in an entry `v_pred` or in the
    metadata; without a record SD1 and SD2 are loaded as eps.
    text.layers = 0: the number depends on the file.
    vae, text_encoder: files or folders of these networks, in place of those in the checkpoint, if it has any.
    ignore_unknown_keys: leave out unknown weights inside the networks, and load a model of zero terminal SNR, whose noise
    schedule is not supported. shapes_only: tensors on the meta device, without reading the
    weights.
    Warns with CheckpointWarning of entries outside the networks. Raises CheckpointError, naming the file and a remedy,
    unless the file is a whole model of that config.
    """
    used = (*layouts.PREFIXES.values(), layouts.OPENCLIP, layouts.CLIP)
    checkpoint = read_checkpoint(
        path,
        progress,
        # A second set of weights (model_ema) and other unused entries are not read.
        lambda name: name == _SCHEDULE or name.startswith(used) or not _IGNORABLE.match(name),
        vae=vae,
        text_encoder=text_encoder,
        strict=not ignore_unknown_keys,
        shapes_only=shapes_only,
    )
    state, predicted = checkpoint.state, checkpoint.prediction
    reject_other_models(path, state, checkpoint.names)
    require_parts(path, state)
    if config is None:
        config = detect(path, state, predicted)
        size = image_size(Path(path)) if Path(path).is_dir() else None
        config = replace(config, image_size=size or config.image_size)
    config = _with_guidance_embedding(state, config)
    reject_contradiction(path, state, config, predicted)
    _report_unused(path, checkpoint, config, used, ignore_unknown_keys)
    released, hf = any(name in state for name in _RELEASED_OPENCLIP), layouts.text_kind(state) == "clip"
    try:
        networks, _ = layouts.split_networks(state)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    state.clear()
    config = _with_text_layers(path, networks["text_encoder"], config, released)
    require_settings(Path(path), config, vae, text_encoder)
    files = {"unet": path, "autoencoder": vae or path, "text_encoder": text_encoder or path}
    _validate(files, networks, config, hf, ignore_unknown_keys)
    return config, networks


def _with_guidance_embedding(state: layouts.State, config: ModelConfig) -> ModelConfig:
    """The config of a file whose UNet embeds the guidance scale, which no YAML file describes."""
    weight = state.get(_GUIDANCE)
    channels = int(weight.shape[1]) if weight is not None and weight.dim() == 2 else None
    return replace(config, unet=replace(config.unet, guidance_embedding=channels))


def _differs(alphas: Tensor, config: ModelConfig) -> bool:
    """Whether the alphas_cumprod of a file, in any precision, are others than those of the config's schedule."""
    expected = Schedule(config.schedule).alphas_cumprod
    return alphas.shape != expected.shape or not torch.allclose(alphas.to(expected), expected, rtol=0, atol=0.01)


def _report_unused(
    path: str | Path, checkpoint: Checkpoint, config: ModelConfig, used: tuple[str, ...], ignore_unknown_keys: bool
) -> None:
    """Remove the markers from the state and warn of other entries outside the networks; reject zero terminal SNR."""
    state = checkpoint.state
    zero_snr = [name for name in ZERO_SNR_MARKERS if name in state or name in checkpoint.others]
    if zero_snr and not ignore_unknown_keys:
        raise CheckpointError(
            f"{path}: its entry {zero_snr[0]} is of a model with zero terminal SNR, whose noise schedule is not supported: "
            f"use other weights, or pass --ignore-unknown-keys for images by the ordinary schedule"
        )
    if zero_snr:
        _warn(f"{path}: {zero_snr[0]} asks for zero terminal SNR; the ordinary noise schedule is used")
    for name in (*V_PREDICTION_MARKERS, *ZERO_SNR_MARKERS):
        state.pop(name, None)
    extra = [name for name in state if not name.startswith(used) and not _IGNORABLE.match(name)]
    if extra:
        _warn(f"{path}: {len(extra)} entries are of none of its networks and are not used: {listed(extra)}")
    alphas = state.pop(_SCHEDULE, None)
    if alphas is not None and not alphas.is_meta and _differs(alphas, config):
        _warn(f"{path}: its {_SCHEDULE} is of another noise schedule than that of {config.name}, and is not used")
    if checkpoint.ignored:
        _warn(f"{path}: {checkpoint.ignored}")
