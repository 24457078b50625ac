"""Position embeddings for another image size: torch's bicubic interpolation, in NumPy.

torch.nn.functional.interpolate(mode="bicubic", align_corners=False) uses the cubic kernel with
a = -0.75 and repeats the border; jax.image.resize("cubic") has a = -0.5 and drops it.
"""

import numpy as np

A = -0.75


def resample_positions(pos: np.ndarray, tokens: int) -> np.ndarray:
    """[1 + n*n, D] or [1, 1 + n*n, D] -> float32 [tokens = 1 + m*m, D]; the CLS row is kept."""
    pos = pos.reshape(pos.shape[-2:]).astype(np.float32)
    n, m = grid_side(len(pos)), grid_side(tokens)
    weights = _cubic_matrix(n, m)  # [m, n]
    grid = pos[1:].reshape(n, n, -1)
    grid = np.einsum("yi,xj,ijd->yxd", weights, weights, grid, optimize=True)
    return np.concatenate([pos[:1], grid.reshape(m * m, -1)]).astype(np.float32)


def grid_side(tokens: int) -> int:
    """Side of the square patch grid behind 1 + side*side tokens; 0 when there is none."""
    side = round(max(tokens - 1, 0) ** 0.5)
    return side if side * side == tokens - 1 else 0


def _cubic_matrix(n: int, m: int) -> np.ndarray:
    """[m, n]: how much each of n source points gives to each of m."""
    weights = np.zeros((m, n), np.float32)
    for out in range(m):
        at = (out + 0.5) * n / m - 0.5
        left = int(np.floor(at))
        for tap in range(left - 1, left + 3):
            weights[out, min(max(tap, 0), n - 1)] += _cubic(abs(at - tap))
    return weights


def _cubic(t: float) -> float:
    if t <= 1:
        return ((A + 2) * t - (A + 3)) * t * t + 1
    return ((A * t - 5 * A) * t + 8 * A) * t - 4 * A
