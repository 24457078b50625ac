"""The outlines of the shapes: corners and proportions."""

import functools
import math

import numpy as np


@functools.cache
def _polygon(shape: str) -> np.ndarray:
    """Corners [N, 2] of a shape that has corners, unrotated, y down."""
    if shape == "square":
        return np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)], float)
    if shape == "triangle":
        turns = np.arange(3) / 3
        return np.stack([np.sin(turns * math.tau), -np.cos(turns * math.tau)], 1)
    if shape == "star":
        turns, radius = np.arange(10) / 10, np.where(np.arange(10) % 2, 0.45, 1.0)
        return np.stack([radius * np.sin(turns * math.tau), -radius * np.cos(turns * math.tau)], 1)
    arm = 0.34  # half the width of a cross's arms
    # a quarter of the cross, to be rotated three times
    quarter = np.array([(arm, -1), (arm, -arm), (1, -arm)], float)
    turn = np.array([(0, 1), (-1, 0)], float)  # 90 degrees clockwise, row vectors, y down
    return np.concatenate([quarter @ np.linalg.matrix_power(turn, k) for k in range(4)])


def outline(shape: str, angle: float) -> tuple[np.ndarray | None, tuple[float, float]]:
    """The rotated corners [N, 2] in [0, width] x [0, height], None for round shapes; and (width, height),
    the longer of which is 1."""
    if shape in ("circle", "ring"):
        return None, (1.0, 1.0)
    a = math.radians(angle)
    points = _polygon(shape) @ np.array([(math.cos(a), math.sin(a)), (-math.sin(a), math.cos(a))])
    points = points - points.min(0)
    points = points / points.max()
    width, height = points.max(0)
    return points, (float(width), float(height))
