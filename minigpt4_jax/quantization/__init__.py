"""Weights in 8 and 4 bits: schemes and matrix products."""
