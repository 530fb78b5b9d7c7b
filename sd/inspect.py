"""Contents of a checkpoint: `python -m sd.inspect FILE`.

Prints format, layout, networks with their precisions, prediction type if recorded, other entries, and whether the
checkpoint can be loaded. Only the index of the file is read, and nothing in it is executed.
"""

from __future__ import annotations

import argparse
import sys

from sd.choices import EMBEDDED_WEIGHTS
from sd.cli.startup import add_parts, exit_on_interrupt
from sd.errors import SDError, checkpoint_warnings_as_lines, printable


def main(argv: list[str] | None = None) -> int:
    """Command line. Returns the exit status: 0 if the checkpoint can be loaded, 2 with one line on stderr if not."""
    parser = argparse.ArgumentParser(prog="python -m sd.inspect", description="Show the contents of a checkpoint.")
    parser.add_argument("checkpoint", help="a .ckpt or .safetensors file, a diffusers folder, or tiny")
    add_parts(parser.add_argument)
    options = parser.parse_args(argv)
    path = str(EMBEDDED_WEIGHTS) if options.checkpoint == "tiny" else options.checkpoint
    with exit_on_interrupt():  # after the options are valid: torch takes seconds
        from sd.checkpoint.contents import describe_prediction, summary
        from sd.checkpoint.load import load

    try:
        parts = {"vae": options.vae, "text_encoder": options.text_encoder}
        for line in summary(path, **parts, strict=not options.ignore_unknown_keys):
            print(printable(line))
        with checkpoint_warnings_as_lines():
            config, _ = load(path, **parts, ignore_unknown_keys=options.ignore_unknown_keys, shapes_only=True)
    except SDError as error:
        print("cannot be loaded: " + printable(str(error)), file=sys.stderr)
        return 2
    print(
        f"loads as: {config.name}, {config.image_size}x{config.image_size} pixels, {describe_prediction(path, config)}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
