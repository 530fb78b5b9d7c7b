"""The embedded model: its weights, its training images and its training script."""
