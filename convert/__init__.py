"""Weights in and out: released checkpoints to a model directory, the trained part back to .pth."""
