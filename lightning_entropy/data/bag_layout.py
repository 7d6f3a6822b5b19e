"""Which layout a folder of feature files has, and which file belongs to a slide."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from lightning_entropy.data.bag_files import FEATURE_KEYS, LAYOUTS, SIDECARS, SUFFIXES
from lightning_entropy.data.h5_rows import H5Handles

_CLAM_FOLDERS = {"pt_files": "pt", "h5_files": "h5"}
_SLIDE_SUFFIXES = frozenset(
    (".svs", ".tif", ".tiff", ".ndpi", ".mrxs", ".scn", ".vms", ".vmu", ".bif", ".svslide", ".czi", ".dcm")
)
_LOOKED_INTO = 5  # files that are opened to tell the two kinds of .h5 apart


@dataclass(frozen=True)
class BagFolder:
    """Where feature files lie: a folder, or the one file of the layout ``aem``."""

    root: Path
    layout: str

    def names(self, handles: H5Handles) -> list[str]:
        """Slides that there are features of, sorted."""
        if self.layout == "aem":
            return sorted(handles.get(self.root))
        suffix = SUFFIXES[self.layout]
        return [path.name.removesuffix(suffix) for path in _files(self.root) if path.name.endswith(suffix)]

    def find(self, slide: str) -> Path:
        """The file of a slide; its name may carry the suffix of the features or of the slide image.

        Args:
            slide: the name in the table.

        Returns:
            The path, whether it exists or not.
        """
        if self.layout == "aem":
            return self.root
        suffix = SUFFIXES[self.layout]
        candidates = [self.root / f"{slide}{suffix}"]
        if slide.endswith(suffix):
            candidates.append(self.root / slide)
        if Path(slide).suffix.lower() in _SLIDE_SUFFIXES:
            candidates.append(self.root / f"{Path(slide).with_suffix('')}{suffix}")
        return next((path for path in candidates if path.is_file()), candidates[0])


def _files(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.iterdir()
        if path.is_file() and not path.name.startswith(".") and not path.name.endswith(SIDECARS)
    )


def find_layout(features: Path, *, layout: str = "auto", handles: H5Handles) -> BagFolder:
    """Find out how features are stored.

    Args:
        features: a folder, CLAM's folder with ``pt_files`` or ``h5_files`` in it, or one ``.h5`` file.
        layout: ``"auto"``, or one of ``pt``, ``h5``, ``stamp``, ``aem``, ``npz``, ``npy``.
        handles: HDF5 files that are kept open.

    Raises:
        FileNotFoundError: if there is no such folder or file.
        ValueError: if the layout is not known, or several would fit; the message names what was found.
    """
    if layout not in ("auto", *LAYOUTS):
        raise ValueError(f"layout must be auto or one of {', '.join(LAYOUTS)}, got {layout!r}")
    if features.is_file():
        if layout not in ("auto", "aem") or features.suffix not in (".h5", ".hdf5"):
            raise ValueError(
                f"{features} is a file; features is a folder, or the one .h5 file of the layout aem (layout={layout!r})"
            )
        return BagFolder(features, _require_aem(features, handles))
    if not features.is_dir():
        raise FileNotFoundError(f"no folder or file of features at {features}")
    if layout == "aem":
        raise ValueError(f"{features} is a folder; the layout aem is one .h5 file with a group for each slide")
    root = _enter_clam(features, layout)
    if layout != "auto":
        return BagFolder(root, layout)
    known = set(SUFFIXES.values())
    counts = Counter(path.suffix for path in _files(root) if path.suffix in known)
    if not counts:
        others = sorted({path.suffix or path.name for path in root.iterdir()})[:10]
        raise ValueError(f"{root} holds no {', '.join(sorted(known))} files; found {others or 'nothing'}")
    if len(counts) > 1:
        found = ", ".join(f"{count} {suffix}" for suffix, count in sorted(counts.items()))
        raise ValueError(f"{root} holds files of several layouts ({found}): pass layout=... or a folder of one kind")
    suffix = next(iter(counts))
    if suffix != ".h5":
        return BagFolder(root, suffix[1:])
    return BagFolder(root, _kind_of_h5([path for path in _files(root) if path.suffix == ".h5"], handles))


def _enter_clam(features: Path, layout: str) -> Path:
    here = {name: kind for name, kind in _CLAM_FOLDERS.items() if (features / name).is_dir()}
    fitting = [name for name, kind in here.items() if layout in ("auto", kind)]
    if not fitting or any(path.suffix in SUFFIXES.values() for path in _files(features)):
        return features
    if len(fitting) > 1:
        raise ValueError(
            f"{features} holds {' and '.join(fitting)}: pass one of them as features, or layout='pt' or layout='h5'"
        )
    return features / fitting[0]


def _require_aem(path: Path, handles: H5Handles) -> str:
    try:
        file = handles.get(path)
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{path} cannot be read as HDF5: {error}") from error
    names = list(file)
    if not names or not any(hasattr(file[name], "keys") and "feat" in file[name] for name in names):
        raise ValueError(
            f"{path} holds {names[:10]}, expected a group for each slide with feat in it (layout aem). For a "
            "folder of one file a slide, pass the folder."
        )
    return "aem"


def _kind_of_h5(paths: list[Path], handles: H5Handles) -> str:
    """Tell CLAM's and TRIDENT's files from STAMP's by the first ones that can be opened."""
    found: dict[str, list[str]] = {}
    for path in paths:
        try:
            found[path.name] = sorted(handles.get(path))
        except (OSError, RuntimeError):  # damaged: reported with its row once the layout is known
            continue
        if len(found) == _LOOKED_INTO:
            break
    fitting = {kind for keys in found.values() for kind in ("h5", "stamp") if set(FEATURE_KEYS[kind]) & set(keys)}
    if len(fitting) == 1:
        return fitting.pop()
    inside = "; ".join(f"{name}: {', '.join(keys) or 'nothing'}" for name, keys in found.items())
    if not fitting:
        raise ValueError(
            f"the .h5 files in {paths[0].parent} hold neither features (CLAM, TRIDENT) nor feats or "
            f"patch_embeddings (STAMP): {inside or 'none of them can be opened'}"
        )
    raise ValueError(f"the .h5 files in {paths[0].parent} fit the layouts h5 and stamp ({inside}): pass layout=...")


__all__ = ["BagFolder", "find_layout"]
