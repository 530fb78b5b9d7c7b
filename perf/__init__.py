"""The performance suite: full txt2img runs, measured. Imports sd; never imported by it."""
