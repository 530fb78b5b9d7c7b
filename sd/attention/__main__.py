"""Command line of the attention backends: `python -m sd.attention`."""

from __future__ import annotations

import argparse

import torch

from sd.attention.accuracy import error_table
from sd.attention.availability import availability_table


def main(arguments: list[str] | None = None) -> None:
    """Print which attention backends are usable, on the CPU in fp32 and on a GPU in fp16, or their errors."""
    parser = argparse.ArgumentParser(prog="python -m sd.attention", description=main.__doc__)
    parser.add_argument(
        "--errors", action="store_true", help="largest error of each backend against `original` in float64, by dtype"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the random inputs of --errors")
    options = parser.parse_args(arguments)
    devices = [("cpu", torch.float32)] + [("cuda", torch.float16)] * torch.cuda.is_available()
    for device, dtype in devices:
        machine = f"torch {torch.__version__}, {torch.cuda.get_device_name() if device == 'cuda' else 'CPU'}"
        if options.errors:
            print(f"{machine}, largest error against original in float64, seed {options.seed}")
            print("\n".join(error_table(device, options.seed)))
        else:
            print(f"{machine}, {str(dtype)[6:]}")
            for implementation, kernel, status in availability_table(device, dtype):
                print(f"  {implementation:<9} {kernel:<14} {status}")


if __name__ == "__main__":
    main()
