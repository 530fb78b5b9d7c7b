"""The embedded model: its weights, its training images and its training script."""

from pathlib import Path

WEIGHTS = Path(__file__).parent / "tiny.safetensors"
