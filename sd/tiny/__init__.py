"""The embedded model: its weights, the pictures it was trained on, and the script that trained it."""

from pathlib import Path

WEIGHTS = Path(__file__).parent / "tiny.safetensors"
