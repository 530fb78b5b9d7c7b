"""Command line of the attention backends: `python -m sd.attention`."""

from __future__ import annotations

import argparse

import torch

from sd.attention.availability import table


def main(arguments: list[str] | None = None) -> None:
    """Print, for the CPU in fp32 and, where there is one, the GPU in fp16, what is usable; or how exact it is."""
    parser = argparse.ArgumentParser(prog="python -m sd.attention", description=main.__doc__)
    parser.add_argument(
        "--errors", action="store_true", help="largest error of each against `original` in float64, by dtype"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random inputs of --errors")
    options = parser.parse_args(arguments)
    devices = [("cpu", torch.float32)] + [("cuda", torch.float16)] * torch.cuda.is_available()
    for device, dtype in devices:
        name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
        if options.errors:
            from sd.attention.accuracy import error_table

            print(f"torch {torch.__version__}, {name}, largest error against original in float64, seed {options.seed}")
            print("\n".join(error_table(device, options.seed)))
        else:
            print(f"torch {torch.__version__}, {name}, {str(dtype)[6:]}")
            for implementation, kernel, verdict in table(device, dtype):
                print(f"  {implementation:<9} {kernel:<14} {verdict}")


if __name__ == "__main__":
    main()
