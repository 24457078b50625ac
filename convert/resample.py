"""Position embeddings for another image size: torch's bicubic interpolation, in NumPy.

torch.nn.functional.interpolate(mode="bicubic", align_corners=False) uses the cubic convolution kernel with
a = -0.75 and repeats the border; jax.image.resize("cubic") uses a = -0.5 and renormalizes at the border.
"""

import numpy as np

A = -0.75


def resample_positions(embedding: np.ndarray, tokens: int) -> np.ndarray:
    """Position embeddings [1 + n * n, D] or [1, 1 + n * n, D] -> float32 [tokens = 1 + m * m, D]. The first
    row, of the class token, is unchanged."""
    embedding = embedding.reshape(embedding.shape[-2:]).astype(np.float32)
    n, m = grid_side(len(embedding)), grid_side(tokens)
    weights = _interpolation_matrix(n, m)
    grid = embedding[1:].reshape(n, n, -1)
    grid = np.einsum("yi,xj,ijd->yxd", weights, weights, grid, optimize=True)
    return np.concatenate([embedding[:1], grid.reshape(m * m, -1)]).astype(np.float32)


def grid_side(tokens: int) -> int:
    """n for 1 + n * n tokens, a class token and a square grid of patches; 0 for other numbers."""
    side = round(max(tokens - 1, 0) ** 0.5)
    return side if side * side == tokens - 1 else 0


def _interpolation_matrix(n: int, m: int) -> np.ndarray:
    """Weights [m, n] that interpolate n points to m."""
    weights = np.zeros((m, n), np.float32)
    for row in range(m):
        position = (row + 0.5) * n / m - 0.5  # in the source
        left = int(np.floor(position))
        for point in range(left - 1, left + 3):
            weights[row, min(max(point, 0), n - 1)] += _cubic(abs(position - point))
    return weights


def _cubic(t: float) -> float:
    """The kernel at distance t, 0 <= t <= 2."""
    if t <= 1:
        return ((A + 2) * t - (A + 3)) * t * t + 1
    return ((A * t - 5 * A) * t + 8 * A) * t - 4 * A
