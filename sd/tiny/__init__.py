"""The embedded model: its weights, the pictures it was trained on, and the script that trained it."""
