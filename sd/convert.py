"""Convert a checkpoint from one layout or container to another: `python -m sd.convert INPUT OUTPUT --to LAYOUT`."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

from sd.checkpoint import layouts
from sd.checkpoint.diffusers_folder import write_folder
from sd.checkpoint.file_formats import write_ckpt, write_safetensors
from sd.checkpoint.load import load, read_contents, refuse_other_models
from sd.choices import EMBEDDED_WEIGHTS
from sd.errors import ConfigError, SDError, printable

LAYOUTS = ("original", "native-mha", "diffusers", "safetensors")


def convert(source, target, to: str, config=None, force: bool = False, progress: bool | None = None) -> list[str]:
    """Write the model `source` in another layout to `target`, all of it or nothing.

    source: a .ckpt or .safetensors file in any layout, a diffusers folder, or `tiny`. target: a new .ckpt or
    .safetensors file, or with to="diffusers" a new folder. to: one of LAYOUTS; `safetensors` is the original layout in
    a .safetensors file. config: preset or YAML file, which only diffusers needs, and only for models that are no
    preset or predict v. force: replace what is there. Returns the names of what the target cannot hold.
    Raises CheckpointError or ConfigError.
    """
    target = Path(target)
    if to not in LAYOUTS:
        raise ConfigError(f"layout {to!r}: choose one of {', '.join(LAYOUTS)}")
    if config is not None and to != "diffusers":
        raise ConfigError(f"--config {config}: is for --to diffusers alone; the weights keep their names and shapes")
    _check_target(target, to, force)
    if str(source) == "tiny":
        source, config = EMBEDDED_WEIGHTS, config or "tiny"
    with tempfile.TemporaryDirectory(prefix=".converting-", dir=target.absolute().parent) as scratch:
        made = Path(scratch) / target.name
        if to == "diffusers":
            dropped = _to_folder(source, made, config, progress)
        else:
            dropped = _to_file(source, made, to, progress)
        _replace(made, target, Path(scratch))
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
        what = "a folder that is no diffusers model" if target.is_dir() else "a file"
        raise ConfigError(f"{target}: is {what}, which --force does not replace; choose another name")


def _replace(made: Path, target: Path, scratch: Path) -> None:
    if target.is_dir():  # a folder cannot be replaced in one step: the old one goes aside, and back if that fails
        aside = scratch / "replaced"
        os.replace(target, aside)
        try:
            os.replace(made, target)
        except OSError:
            os.replace(aside, target)
            raise
    else:
        os.replace(made, target)


def _to_file(source, made: Path, to: str, progress) -> list[str]:
    contents = read_contents(source, progress)
    state = contents.state
    refuse_other_models(source, state)
    native = layouts.is_native_mha(state)
    if native and to != "native-mha":
        state = layouts.native_to_original(state)
    elif to == "native-mha" and not native:
        state = layouts.original_to_native(state)
    if made.suffix == ".ckpt":
        write_ckpt(made, state, contents.global_step)
    else:
        metadata = {"format": "pt"}
        if contents.global_step is not None:
            metadata["global_step"] = str(contents.global_step)
        write_safetensors(made, state, metadata)
    return list(contents.others)


def _to_folder(source, made: Path, config, progress) -> list[str]:
    from sd.pipeline import resolve_config  # brings the samplers and all; the other layouts need none of it

    names = _names(source)
    config, networks = load(source, resolve_config(config), progress)
    kept = layouts.join_networks(networks, config.text.kind)
    write_folder(made, networks, config)
    if any(".mha." in name for name in names):
        kept = {**kept, **layouts.original_to_native(kept)}
    bare = {name.replace("transformer.text_model.", "transformer.") for name in kept}  # the variant without text_model.
    return [name for name in names if name not in kept and name not in bare and not name.endswith(".mha.in_proj_bias")]


def _names(source) -> list[str]:
    from sd.checkpoint.file_formats import index

    if Path(source).is_dir():
        return []
    contents = index(source)
    return [*contents.tensors, *contents.others, *(["global_step"] if contents.global_step is not None else [])]


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status: 0, or 2 with one line on stderr."""
    parser = argparse.ArgumentParser(prog="python -m sd.convert", description=__doc__.partition(":")[0] + ".")
    parser.add_argument("input", help="a .ckpt or .safetensors file, a diffusers folder, or the word tiny")
    parser.add_argument("output", help="a .ckpt or .safetensors file, or with --to diffusers a folder")
    parser.add_argument(
        "--to", required=True, choices=LAYOUTS, help="safetensors is the original layout in that container"
    )
    parser.add_argument("--config", help="preset or YAML file; for --to diffusers where the weights do not say which")
    parser.add_argument("--force", action="store_true", help="replace the output if it is there")
    options = parser.parse_args(argv)
    try:
        dropped = convert(options.input, options.output, options.to, options.config, options.force)
    except SDError as error:
        print(printable(str(error)), file=sys.stderr)
        return 2
    except OSError as error:  # a full disk, a folder that may not be written
        print(f"{options.output}: cannot be written ({error.strerror or error})", file=sys.stderr)
        return 2
    if dropped:
        shown = ", ".join(dropped[:10]) + (f" and {len(dropped) - 10} more" if len(dropped) > 10 else "")
        print(f"left out, which this layout cannot hold: {printable(shown)}", file=sys.stderr)
    print(options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
