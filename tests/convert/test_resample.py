"""Position embeddings for another image size, compared with torch and with the original."""

import numpy as np
import pytest
from helpers.paths import REFERENCE

from convert.resample import grid_side, resample_positions


@pytest.mark.smoke
def test_grid_sides():
    assert [grid_side(n) for n in (2, 5, 17, 257, 1025)] == [1, 2, 4, 16, 32]
    assert [grid_side(n) for n in (0, 1, 3, 256)] == [0, 0, 0, 0]


@pytest.mark.smoke
def test_constants_stay_and_the_class_token_is_kept():
    pos = np.full((1, 17, 3), 2.5, np.float16)
    pos[0, 0] = 9
    out = resample_positions(pos, 50)
    assert out.shape == (50, 3) and out.dtype == np.float32
    assert np.all(out[0] == 9) and np.allclose(out[1:], 2.5)


@pytest.mark.parametrize("n, m", [(4, 8), (16, 32), (5, 7), (8, 3), (1, 4), (7, 7)])
def test_equal_to_torch(n, m):
    torch = pytest.importorskip("torch")
    pos = np.random.default_rng(n).normal(size=(1 + n * n, 6)).astype(np.float32)
    grid = torch.tensor(pos[1:]).reshape(1, n, n, 6).permute(0, 3, 1, 2)
    want = torch.nn.functional.interpolate(grid, (m, m), mode="bicubic", align_corners=False)
    got = resample_positions(pos, 1 + m * m)[1:].reshape(m, m, 6)
    np.testing.assert_allclose(got, want[0].permute(1, 2, 0).numpy(), atol=1e-5)


@pytest.mark.skipif(not REFERENCE.exists(), reason="needs ../shared/reference")
def test_equal_to_the_original():
    dump = np.load(REFERENCE / "dumps" / "pos_interp.npz")
    got = resample_positions(dump["src"], dump["dst"].shape[1])
    np.testing.assert_allclose(got, dump["dst"][0], atol=2e-6)
