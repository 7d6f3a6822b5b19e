from __future__ import annotations

import numpy as np
import torch

from lightning_entropy.recipes.tile_grid import grid_adjacency, grid_step


def _reference(coords: np.ndarray, step: int) -> np.ndarray:
    near = np.abs(coords[:, None] - coords[None]).max(axis=-1) <= step
    np.fill_diagonal(near, False)
    degree = near.sum(axis=1).clip(min=1)
    return near / np.sqrt(degree[:, None] * degree[None])


def test_adjacency_is_that_of_touching_tiles() -> None:
    rng = np.random.default_rng(0)
    cells = np.stack(np.meshgrid(np.arange(6), np.arange(5)), axis=-1).reshape(-1, 2)
    cells = cells[rng.permutation(len(cells))[:22]]
    coords = torch.zeros(2, 25, 2, dtype=torch.long)
    mask = torch.zeros(2, 25, dtype=torch.bool)
    coords[0, :22], mask[0, :22] = torch.from_numpy(cells * 224 + 17), True
    coords[1, :5], mask[1, :5] = torch.from_numpy(cells[:5] * 224), True
    adjacency = grid_adjacency(coords, mask).to_dense()
    assert adjacency.shape == (2, 25, 25)
    np.testing.assert_allclose(adjacency[0, :22, :22], _reference(cells, 1), rtol=1e-6)
    np.testing.assert_allclose(adjacency[1, :5, :5], _reference(cells[:5], 1), rtol=1e-6)
    assert adjacency[~mask].sum() == 0
    torch.testing.assert_close(adjacency, adjacency.transpose(1, 2))


def test_the_step_is_the_usual_distance_not_the_smallest() -> None:
    first = np.array([(x, y) for x in range(0, 1000, 200) for y in range(0, 600, 200)])
    second = first[:6] + np.array([3001, 3])  # another piece of tissue, tiled from its own corner
    assert grid_step(np.concatenate([first, second])) == 200
    assert grid_step(np.array([[5, 5]])) is None


def test_tiles_without_neighbours_have_no_edges() -> None:
    coords = torch.tensor([[[0, 0], [1000, 700]]])
    assert grid_adjacency(coords, torch.ones(1, 2)).to_dense().sum() == 0
    assert grid_adjacency(coords, torch.zeros(1, 2)).shape == (1, 2, 2)
