"""Connected components of a map at all its levels at once.

The components of ``{map > level}`` are nested: as the level falls, pixels join and components grow or merge. One sweep
from the highest level to the lowest with a union-find (Tarjan, 1975) therefore visits every component of every level,
and costs what a handful of single levels cost. The sweep is vectorised over the pixels of a level and over the maps
of a batch. It is plain NumPy: no OpenCV, no SciPy.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.integer]


class Components(NamedTuple):
    """Components and the steps in which they exist unchanged, ``N`` of them.

    A component that grows or merges ends, and the grown one begins. ``boxes`` are inclusive pixel indices
    ``x0, y0, x1, y1``; ``begin`` and ``end`` bound its steps (end excluded); ``start`` is the first pixel in raster
    order (row times width plus column); ``weight`` is the sum of the weights of its pixels.
    """

    image: Ints
    boxes: Ints
    begin: Ints
    end: Ints
    start: Ints
    weight: Ints


class _Nodes:
    """Pixels in the order in which they join, as nodes of a union-find.

    Node ids ascend with the step, and within a step in raster order; a component's root is its lowest id, that is the
    pixel that joined first. With a frame, the nodes ``0 .. images - 1`` are what lies outside each map.
    """

    def __init__(self, step: NDArray[np.integer], *, last: int, frame: bool) -> None:
        self.images, self.height, self.width = step.shape
        self.outside = self.images if frame else 0
        flat = step.reshape(-1)
        order = np.argsort(flat, kind="stable")  # radix sort for small integers
        sorted_step = flat[order]
        joining = int(np.searchsorted(sorted_step, last, side="right"))
        self.step = np.concatenate((np.full(self.outside, -1, dtype=flat.dtype), sorted_step[:joining]))
        self.count = self.outside + joining
        order = order[:joining].astype(np.int32)
        self.image = order // (self.height * self.width)
        self.raster = order - self.image * (self.height * self.width)
        self.row = self.raster // self.width
        self.column = self.raster - self.row * self.width
        # Ranks with a border of one pixel, so that no neighbour has to be asked whether it exists.
        self.line = self.width + 2
        self.place = (self.image * (self.height + 2) + self.row + 1) * self.line + self.column + 1
        rank = np.full((self.images, self.height + 2, self.line), self.count, dtype=np.int32)
        if frame:
            rank[:] = np.arange(self.images, dtype=np.int32)[:, None, None]
            rank[:, 1:-1, 1:-1] = self.count
        self.rank = rank.reshape(-1)
        self.rank[self.place] = np.arange(self.outside, self.count, dtype=np.int32)


def _window_weights(nodes: _Nodes) -> Ints:
    """Twice the area between pixel centres that each pixel adds when it joins.

    Of a 2 x 2 window, half is inside the contour once three of its pixels are present, and all of it with the fourth.
    """
    rank = nodes.rank.reshape(nodes.images, nodes.height + 2, nodes.line)[:, 1:-1, 1:-1]
    a, b, c, d = rank[:, :-1, :-1], rank[:, :-1, 1:], rank[:, 1:, :-1], rank[:, 1:, 1:]
    upper, lower = np.maximum(a, b), np.maximum(c, d)
    fourth = np.maximum(upper, lower)
    third = np.maximum(np.minimum(upper, lower), np.where(upper > lower, np.minimum(a, b), np.minimum(c, d)))
    joined = np.concatenate((third.reshape(-1), fourth.reshape(-1)))
    return np.bincount(joined, minlength=nodes.count + 1)[: nodes.count].astype(np.int32)


class Sweep:
    """Components of the pixels that have joined, step by step.

    Every pixel first hangs on its earliest neighbour, and so, followed through, on a pixel without an earlier one:
    a peak. Pixels of one peak are connected from the step in which they join, so only peaks have to be united.

    Args:
        step: ``(images, height, width)``, the step in which each pixel joins, at least 0.
        steps: number of steps; pixels of a later step never join.
        diagonal: 8-connectivity, otherwise 4-connectivity.
        frame: everything outside the map is one component, there from the beginning.
        weight: what `Components.weight` counts: ``"pixels"``, or ``"area"`` for twice the area of the polygon through
            the centres of the outermost pixels (``cv2.contourArea``), which is right for components without holes.
    """

    def __init__(
        self,
        step: NDArray[np.integer],
        *,
        steps: int,
        diagonal: bool,
        frame: bool = False,
        weight: Literal["pixels", "area"] = "pixels",
    ) -> None:
        self.nodes = nodes = _Nodes(step, last=steps - 1, frame=frame)
        self.steps = steps
        # Half of the neighbours; the other half are theirs.
        shifts = [1, nodes.line, nodes.line + 1, nodes.line - 1] if diagonal else [1, nodes.line]
        peak_of_node = _peaks(nodes, shifts)
        peaks = np.flatnonzero(peak_of_node == np.arange(nodes.count, dtype=np.int32))  # the frames first, then by step
        number = np.zeros(nodes.count, dtype=np.int64)
        number[peaks] = np.arange(len(peaks))
        self._peak = number[peak_of_node]
        self._image = np.concatenate((np.arange(nodes.outside), nodes.image))[peaks]
        # All four by minimum, the far sides negated.
        self._extent = [np.full(len(peaks), nodes.height * nodes.width, dtype=np.int32) for _ in range(4)]
        self._weight = np.zeros(len(peaks), dtype=np.int32)
        self._weight_of_node = _window_weights(nodes) if weight == "area" else np.ones(nodes.count, dtype=np.int32)
        self._parent = np.arange(len(peaks))
        self._tag = np.zeros(len(peaks), dtype=np.int64)
        self._absorbed_in = np.full(len(peaks), steps)
        self._seen: list[tuple[Ints, ...]] = []
        here, there, joined = _borders(nodes, shifts, self._peak)
        every = np.arange(steps + 1)
        pixels = np.searchsorted(nodes.step, every)
        edges = np.searchsorted(joined, every)
        for value in np.flatnonzero(np.diff(pixels)).tolist():
            low, high = edges[value], edges[value + 1]
            self._unite(value, here[low:high], there[low:high])
            self._extend(value, slice(pixels[value], pixels[value + 1]))

    def _roots(self, of: Ints) -> Ints:
        parent = self._parent
        found = parent[of]
        while True:
            above = parent[found]
            if (above == found).all():
                break
            found = above
        parent[of] = found  # the next search starts from the root
        return found

    def _distinct(self, of: Ints) -> Ints:
        """Without repetitions, in no particular order."""
        places = np.arange(len(of))
        self._tag[of] = places  # of several, one is kept
        return of[self._tag[of] == places]

    def _unite(self, step: int, here: Ints, there: Ints) -> None:
        """Unite the peaks on both sides of borders that are reached in this step."""
        if not len(here):
            return
        parent = self._parent
        here, there = self._roots(here), self._roots(there)
        hooked = []
        while True:
            apart = here != there
            if not apart.any():
                break
            upper, lower = np.maximum(here, there)[apart], np.minimum(here, there)[apart]
            parent[upper] = lower  # of several, one is kept; the others are borders of the next round
            hung = self._distinct(upper)
            hooked.append(hung)
            above = parent[hung]
            while True:  # every chain of this round halves
                higher = parent[above]
                if (higher == above).all():
                    break
                parent[hung] = above = higher
            here, there = parent[upper], parent[lower]
        if hooked:
            gone = np.concatenate(hooked)
            root = self._roots(gone)
            for values in self._extent:
                np.minimum.at(values, root, values[gone])
            np.add.at(self._weight, root, self._weight[gone])
            self._absorbed_in[gone] = step

    def _extend(self, step: int, joining: slice) -> None:
        """Let pixels join the components of their peaks, and note the components that have changed."""
        nodes = self.nodes
        root = self._roots(self._peak[joining])
        inside = slice(joining.start - nodes.outside, joining.stop - nodes.outside)
        raster, column, weight = nodes.raster[inside], nodes.column[inside], self._weight_of_node[joining]
        if nodes.outside:  # what is connected with the frame has no box
            kept = np.flatnonzero(root >= nodes.outside)
            root, raster, column, weight = root[kept], raster[kept], column[kept], weight[kept]
        for values, of_pixel in zip(self._extent, (raster, column, -column, -raster)):
            np.minimum.at(values, root, of_pixel)
        np.add.at(self._weight, root, weight)
        changed = self._distinct(root)
        self._seen.append(
            (changed, np.full(len(changed), step), *(values[changed] for values in (*self._extent, self._weight)))
        )

    def components(self) -> Components:
        """Every component of every step, without the frame."""
        empty = tuple(np.zeros(0, dtype=np.int64) for _ in range(7))
        root, begin, first, left, right, last, weight = (np.concatenate(parts) for parts in zip(empty, *self._seen))
        order = np.argsort(root, kind="stable")  # of one root, the steps ascend already
        root, begin = root[order], begin[order]
        end = self._absorbed_in[root]
        same = root[1:] == root[:-1]
        end[:-1][same] = begin[1:][same]
        boxes = np.stack((left, first // self.nodes.width, -right, -last // self.nodes.width), axis=1)[order]
        return Components(self._image[root], boxes, begin, end, first[order], weight[order])


def fill_holes(values: NDArray[np.integer]) -> NDArray[np.integer]:
    """Maps whose holes are filled at every level.

    A pixel gets the lowest level at which it is connected with the outside of the map through its 4 neighbours: the
    least, over all paths to the border, of the largest value on the path. Found by running over the rows and columns
    in both directions until nothing changes; each run is vectorised over the other axis and the maps.

    Args:
        values: ``(images, height, width)``, at least 0.

    Returns:
        The same shape and dtype, nowhere below ``values``.
    """
    filled = np.full_like(values, values.max(initial=0))
    lasting = np.arange(len(values))
    while len(lasting):
        before = filled[lasting]
        after = before
        for axis in (1, 2):
            # The axis that is run along comes first, so that each line is one piece of memory.
            lines = np.ascontiguousarray(np.moveaxis(after, axis, 0))
            floor = np.ascontiguousarray(np.moveaxis(values[lasting], axis, 0))
            for order in (range(len(lines)), range(len(lines) - 1, -1, -1)):
                previous = np.zeros_like(lines[0])
                for n in order:
                    np.minimum(lines[n], previous, out=lines[n])
                    np.maximum(lines[n], floor[n], out=lines[n])
                    previous = lines[n]
            after = np.moveaxis(lines, 0, axis)
        filled[lasting] = after
        lasting = lasting[(after != before).any((1, 2))]
    return filled


def _peaks(nodes: _Nodes, shifts: list[int]) -> Ints:
    """For each node the one it leads to by way of earliest neighbours."""
    earliest = nodes.rank.copy()
    for shift in shifts:
        np.minimum(earliest[:-shift], nodes.rank[shift:], out=earliest[:-shift])
        np.minimum(earliest[shift:], nodes.rank[:-shift], out=earliest[shift:])
    towards = np.concatenate((np.arange(nodes.outside, dtype=np.int32), earliest[nodes.place]))
    while True:
        above = towards[towards]
        if np.array_equal(above, towards):
            return towards
        towards = above


def _borders(nodes: _Nodes, shifts: list[int], peak: Ints) -> tuple[Ints, Ints, Ints]:
    """Neighbours of different peaks: both peaks, and the step in which both pixels have joined, ascending.

    The frame needs none: a pixel at the border of the map has it as its peak.
    """
    peaks = np.full(len(nodes.rank), -1, dtype=np.int32)
    peaks[nodes.place] = peak[nodes.outside :]
    found = []
    for shift in shifts:
        here, there = peaks[:-shift], peaks[shift:]
        place = np.flatnonzero((here != there) & (np.minimum(here, there) >= 0))
        later = np.maximum(nodes.rank[place], nodes.rank[place + shift])
        found.append((here[place].astype(np.int64), there[place].astype(np.int64), nodes.step[later]))
    here, there, joined = (np.concatenate(parts) for parts in zip(*found))
    order = np.argsort(joined, kind="stable")
    return here[order], there[order], joined[order]


__all__ = ["Components", "Sweep", "fill_holes"]
