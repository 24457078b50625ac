"""Ahead-of-time compilation for TPU slices you do not have, from shapes alone."""
