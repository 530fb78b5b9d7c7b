"""Convert a checkpoint to another layout or file format: `python -m sd.convert INPUT OUTPUT --to LAYOUT`.

Functions import what imports torch, which Ctrl-C may interrupt.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

from sd import __version__
from sd.choices import EMBEDDED_WEIGHTS, SAMPLERS
from sd.cli.startup import add_parts, exit_on_interrupt
from sd.errors import ConfigError, SDError, checkpoint_warnings_as_lines, listed, printable

LAYOUTS = ("original", "native-mha", "diffusers", "safetensors")


def convert(
    source: str | Path,
    target: str | Path,
    to: str,
    config: str | Path | None = None,
    force: bool = False,
    progress: bool | None = None,
    sampler: str | None = None,
    *,
    vae: str | Path | None = None,
    text_encoder: str | Path | None = None,
    ignore_unknown_keys: bool = False,
) -> list[str]:
    """Write the model `source` in another layout to `target`, completely or not at all.

    source: a .ckpt or .safetensors file in any layout, a diffusers folder, or `tiny`. target: a new .ckpt or .safetensors
    file, or with to="diffusers" a new folder. to: one of LAYOUTS; `safetensors` is the original layout in a .safetensors
    file. config: preset or YAML file, only for to="diffusers", and required only for models that are no preset or
    predict v. force: replace an existing target. sampler: that of a folder's scheduler. vae, text_encoder: files or folders
    of these networks, in place of those in `source`. ignore_unknown_keys: leave out unknown weights inside the networks of
    a folder. Returns the names of the entries that the target cannot hold. Raises CheckpointError or ConfigError.
    """
    target = Path(target)
    if to not in LAYOUTS:
        raise ConfigError(f"layout {to!r}: choose one of {', '.join(LAYOUTS)}")
    if config is not None and to != "diffusers":
        raise ConfigError(f"--config {config}: is only for --to diffusers; the other layouts need no config")
    if sampler is not None and to != "diffusers":
        raise ConfigError(f"--sampler {sampler}: is only for --to diffusers; files have no scheduler")
    _check_target(target, to, force)
    if str(source) == "tiny":
        source, config = EMBEDDED_WEIGHTS, config or "tiny"
    with tempfile.TemporaryDirectory(prefix=".converting-", dir=target.absolute().parent) as scratch:
        output = Path(scratch) / target.name
        if to == "diffusers":
            dropped = _to_folder(source, output, config, progress, sampler, vae, text_encoder, ignore_unknown_keys)
        else:
            dropped = _to_file(source, output, to, progress, vae, text_encoder, ignore_unknown_keys)
        _replace(target, output, Path(scratch))
    return dropped


def _check_target(target: Path, to: str, force: bool) -> None:
    if to == "diffusers":
        if target.suffix in (".ckpt", ".safetensors"):
            raise ConfigError(f"{target}: the diffusers layout is a folder; give a name without {target.suffix}")
    elif target.suffix != ".safetensors" and (to == "safetensors" or target.suffix != ".ckpt"):
        choices = ".safetensors" if to == "safetensors" else ".safetensors or .ckpt"
        raise ConfigError(f"{target}: --to {to} writes a file whose name ends in {choices}")
    if not target.absolute().parent.is_dir():
        raise ConfigError(f"{target}: the folder {target.parent} does not exist; make it first")
    if not target.exists():
        return
    if not force:
        raise ConfigError(f"{target}: exists; choose another name, or pass --force to replace it")
    if target.is_dir() != (to == "diffusers") or (target.is_dir() and not (target / "model_index.json").is_file()):
        existing = "a folder that is no diffusers model" if target.is_dir() else "a file"
        raise ConfigError(f"{target}: is {existing}, which --force does not replace; choose another name")


def _replace(target: Path, output: Path, scratch: Path) -> None:
    if not target.is_dir():
        os.replace(output, target)
        return
    backup = scratch / "replaced"  # a folder cannot be replaced in one step
    try:
        os.replace(target, backup)
        os.replace(output, target)
    except BaseException:  # also Ctrl-C: the caller deletes `scratch`
        if backup.exists() and not target.exists():
            os.replace(backup, target)
        raise


def _to_file(
    source: str | Path,
    output: Path,
    to: str,
    progress: bool | None,
    vae: str | Path | None,
    text_encoder: str | Path | None,
    ignore_unknown_keys: bool,
) -> list[str]:
    import torch

    from sd.checkpoint import layouts
    from sd.checkpoint.detect import reject_other_models, text_kind
    from sd.checkpoint.file_formats import write_ckpt, write_safetensors
    from sd.checkpoint.load import read_checkpoint, require_usual_settings
    from sd.checkpoint.spellings import V_PREDICTION_MARKERS

    checkpoint = read_checkpoint(source, progress, vae=vae, text_encoder=text_encoder, strict=not ignore_unknown_keys)
    state = checkpoint.state
    reject_other_models(source, state, checkpoint.names)
    require_usual_settings(source, checkpoint, vae, text_encoder)
    if layouts.text_kind(state) == "clip" and text_kind(source, state) == "openclip":
        state = layouts.clip_names_to_openclip(state)
    native = layouts.is_native_mha(state)
    if native and to != "native-mha":
        state = layouts.native_to_original(state)
    elif to == "native-mha" and not native:
        state = layouts.original_to_native(state)
    if checkpoint.prediction is not None and checkpoint.prediction.parameterization == "v":
        state.setdefault(V_PREDICTION_MARKERS[0], torch.empty(0))  # the settings of a folder are not in the file
    step = checkpoint.global_step
    if output.suffix == ".ckpt":
        write_ckpt(output, state, step)
    else:
        write_safetensors(output, state, {"format": "pt", **({} if step is None else {"global_step": str(step)})})
    return list(checkpoint.others)


def _to_folder(
    source: str | Path,
    output: Path,
    config: str | Path | None,
    progress: bool | None,
    sampler: str | None,
    vae: str | Path | None,
    text_encoder: str | Path | None,
    ignore_unknown_keys: bool,
) -> list[str]:
    from sd.checkpoint import layouts
    from sd.checkpoint.diffusers_folder import write_folder
    from sd.checkpoint.file_formats import index
    from sd.checkpoint.load import load, names_of
    from sd.checkpoint.spellings import V_PREDICTION_MARKERS
    from sd.networks import resolve_config

    names: dict[str, str] = {}  # of the file: in the original layout
    if not Path(source).is_dir():
        file_index = index(source)
        step = ["global_step"] if file_index.global_step is not None else []
        names = {name: name for name in (*file_index.others, *step)}
        names.update(names_of(file_index, strict=not ignore_unknown_keys))
    model, networks = load(
        source,
        resolve_config(config),
        progress,
        vae=vae,
        text_encoder=text_encoder,
        ignore_unknown_keys=ignore_unknown_keys,
    )
    written = layouts.join_networks(networks, model.text.kind)
    write_folder(output, networks, model, sampler)
    known = {*written, *layouts.original_to_native(written), *layouts.join_networks(networks, "clip")}
    # Some files have the names of the text encoder without text_model; the prediction type is in the scheduler's settings.
    known |= {name.replace("transformer.text_model.", "transformer.") for name in known} | set(V_PREDICTION_MARKERS)
    return [name for name, new in names.items() if new not in known and not new.endswith(".mha.in_proj_bias")]


def main(argv: list[str] | None = None) -> int:
    """Command line. Returns the exit status: 0, or 2 with one line on stderr."""
    parser = argparse.ArgumentParser(prog="python -m sd.convert", description=__doc__.partition(":")[0] + ".")
    parser.add_argument("input", help="a .ckpt or .safetensors file, a diffusers folder, or tiny")
    parser.add_argument("output", help="a .ckpt or .safetensors file, or with --to diffusers a folder")
    parser.add_argument(
        "--to", required=True, choices=LAYOUTS, help="safetensors: the original layout in a .safetensors file"
    )
    parser.add_argument("--config", help="preset or YAML file for --to diffusers, if the weights do not determine it")
    parser.add_argument(
        "--sampler",
        choices=SAMPLERS,
        help="whose steps the scheduler of a folder takes, for --to diffusers (default: plms, and ddim for models of v)",
    )
    parser.add_argument("--force", action="store_true", help="replace an existing output")
    add_parts(parser.add_argument)
    parser.add_argument("--version", action="version", version=f"sd-convert of sd-perf {__version__}")
    options = parser.parse_args(argv)
    with exit_on_interrupt():
        from sd.checkpoint.contents import summary
    try:
        with checkpoint_warnings_as_lines():
            dropped = convert(
                options.input,
                options.output,
                options.to,
                options.config,
                options.force,
                None,
                options.sampler,
                vae=options.vae,
                text_encoder=options.text_encoder,
                ignore_unknown_keys=options.ignore_unknown_keys,
            )
            written = summary(options.output)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except SDError as error:
        print(printable(str(error)), file=sys.stderr)
        return 2
    except OSError as error:  # such as a full disk or missing permissions
        print(f"{options.output}: cannot be written ({error.strerror or error})", file=sys.stderr)
        return 2
    if dropped:
        print(f"left out, which this layout cannot hold: {printable(listed(dropped))}", file=sys.stderr)
    print("\n  ".join([options.output, *map(printable, written)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
