"""Labels of scenes for training a vision encoder."""

import numpy as np

from minigpt4_jax.shapes.drawing import render_with_owners
from minigpt4_jax.shapes.scene import (
    BACKGROUNDS,
    CELLS,
    COLOR_NAMES,
    MAX_OBJECTS,
    SHAPES,
    SIZES,
    Scene,
)


def scene_labels(
    scene: Scene, grid: int, owners: np.ndarray | None = None, min_share: float = 0.06
) -> dict[str, np.ndarray]:
    """Integer labels of a scene. Ids count from 1 in the order of SHAPES, COLOR_NAMES, SIZES and CELLS;
    0 means none.

    objects     [3, 4] shape, color, size, cell of each object in raster order, then rows of 0
    cells       [9, 3] shape, color, size of the object in each cell
    patches     [grid, grid, 4] number (1 to 3), shape, color, size of the object that covers most of
                each patch; 0 where none covers at least `min_share` of it
    count       [] number of objects;  background [] index into BACKGROUNDS (from 0)

    owners: of `render_with_owners`, if the scene is drawn already.
    """
    if owners is None:
        owners = render_with_owners(scene)[1]
    ids = np.zeros((MAX_OBJECTS + 1, 4), np.int32)  # row 0: no object
    for i, thing in enumerate(scene.objects):
        ids[i + 1] = (
            SHAPES.index(thing.shape) + 1,
            COLOR_NAMES.index(thing.color) + 1,
            SIZES.index(thing.size) + 1,
            CELLS.index(thing.cell) + 1,
        )
    cells = np.zeros((9, 3), np.int32)
    cells[ids[1 : len(scene.objects) + 1, 3] - 1] = ids[1 : len(scene.objects) + 1, :3]
    owner = _patch_owners(owners, grid, min_share)
    patches = np.concatenate([owner[..., None], ids[owner][..., :3]], -1)
    return {
        "objects": ids[1:],
        "cells": cells,
        "patches": patches.astype(np.int32),
        "count": np.array(len(scene.objects), np.int32),
        "background": np.array(BACKGROUNDS.index(scene.background), np.int32),
    }


def _patch_owners(owners: np.ndarray, grid: int, min_share: float) -> np.ndarray:
    """[grid, grid]: the object with most pixels of each patch, 0 where that is less than `min_share` of
    them."""
    size = owners.shape[0]
    edges = np.arange(size) * grid // size  # the patch that each pixel row or column falls into
    patch = edges[:, None] * grid + edges[None, :]
    counts = np.bincount(
        (patch * (MAX_OBJECTS + 1) + owners).ravel(), minlength=grid * grid * (MAX_OBJECTS + 1)
    )
    counts = counts.reshape(grid, grid, MAX_OBJECTS + 1)
    best = counts[..., 1:].argmax(-1) + 1
    owner: np.ndarray = np.where(counts[..., 1:].max(-1) >= min_share * counts.sum(-1), best, 0)
    return owner
