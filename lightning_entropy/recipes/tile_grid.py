"""The graph of a slide's tiles, for models that ask for one."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def grid_step(coords: np.ndarray) -> int | None:
    """The most frequent distance between tiles that follow each other in a column or a row; ``None`` if none
    do.

    Args:
        coords: ``(N, 2)`` integer positions.
    """
    distances = []
    for along, across in ((0, 1), (1, 0)):
        line = coords[np.lexsort((coords[:, along], coords[:, across]))]
        steps = np.diff(line, axis=0)
        distances.append(steps[(steps[:, across] == 0) & (steps[:, along] > 0), along])
    found, counts = np.unique(np.concatenate(distances), return_counts=True)
    return int(found[counts.argmax()]) if len(found) else None


def _edges(coords: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pairs (i, j) of tiles that touch, diagonals included, in both directions."""
    step = grid_step(coords)
    if step is None:
        return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
    # Pieces of tissue are tiled from corners of their own: cells are compared, not coordinates.
    cells = np.rint((coords - coords.min(axis=0)) / step).astype(np.int64)
    width = int(cells[:, 1].max()) + 3
    keys = (cells[:, 0] + 1) * width + cells[:, 1] + 1
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    rows, columns = [], []
    for shift in (dx * width + dy for dx in (-1, 0, 1) for dy in (-1, 0, 1) if (dx, dy) != (0, 0)):
        place = np.searchsorted(ordered, keys + shift).clip(max=len(keys) - 1)
        found = ordered[place] == keys + shift
        rows.append(np.flatnonzero(found))
        columns.append(order[place[found]])
    return np.concatenate(rows), np.concatenate(columns)


def grid_adjacency(coords: Tensor, mask: Tensor) -> Tensor:
    """Adjacency of tiles on a regular grid, normalised by degree.

    Two tiles are neighbours when they touch, corners included; the step of the grid is the most frequent
    distance between tiles that follow each other in a column or a row. The weight of an edge is ``1 /
    sqrt(deg_i deg_j)``.

    Args:
        coords: ``(B, N, 2)`` integer positions of the tiles.
        mask: ``(B, N)``, non-zero where a tile exists; padding has no edges.

    Returns:
        Sparse ``(B, N, N)``, float32, on the device of ``coords``.
    """
    size = coords.shape[1]
    indices, weights = [], []
    for bag, (places, exists) in enumerate(zip(coords.cpu().numpy(), mask.cpu().numpy() != 0)):
        members = np.flatnonzero(exists)
        if len(members) == 0:
            continue
        row, column = _edges(places[members])
        degree = np.bincount(row, minlength=len(members)).clip(min=1)
        indices.append(np.stack([np.full(len(row), bag), members[row], members[column]]))
        weights.append(1 / np.sqrt(degree[row] * degree[column]))
    shape = (len(mask), size, size)
    place = torch.empty(3, 0, dtype=torch.long)
    weight = torch.empty(0)
    if indices:
        place = torch.from_numpy(np.concatenate(indices, axis=1))
        weight = torch.from_numpy(np.concatenate(weights)).float()
    adjacency = torch.sparse_coo_tensor(place, weight, shape, check_invariants=False)
    return adjacency.coalesce().to(coords.device)


__all__ = ["grid_adjacency", "grid_step"]
