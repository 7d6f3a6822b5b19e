"""From the arguments of ``LocalizationSet`` to a source of images with boxes or masks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lightning_entropy.data.localization_cub import is_cub, read_cub
from lightning_entropy.data.localization_metadata import has_metadata, read_metadata
from lightning_entropy.data.localization_objects import generated_objects
from lightning_entropy.data.localization_picture import LocalizationSource
from lightning_entropy.data.localization_rows import drawn, source_of_rows
from lightning_entropy.data.localization_voc import VOC_CLASSES, read_voc

_EMBEDDED = "embedded:"
EMBEDDED_OBJECTS = ("objects",)
_PUBLISHED = {"cub": "CUB", "ilsvrc": "ILSVRC", "openimages": "OpenImages"}  # wsolevaluation's names of their metadata
_FACTORS = {"strength": 0.6, "background_correlation": 0.0}  # what they are when they are not given


def open_localization(
    images: str,
    *,
    image_root: str | None = None,
    multilabel: bool | None = None,
    strength: float = 0.6,
    background_correlation: float = 0.0,
    counts: Mapping[str, int | None],
    seed: int = 0,
) -> LocalizationSource:
    """Open a generated set or files.

    Args:
        images: as in :class:`~lightning_entropy.data.LocalizationSet`.
        image_root: the folder that images are named from.
        multilabel: whether images may have several classes; None for what they come with.
        strength: of the generated set.
        background_correlation: of the generated set.
        counts: number of images for each split; None for all.
        seed: of what is drawn.

    Raises:
        ValueError: if there is nothing of that name, the arguments do not go together, or the files cannot be used.
    """
    factors = {"strength": strength, "background_correlation": background_correlation}
    if images.startswith(_EMBEDDED):
        name = images[len(_EMBEDDED) :]
        if name not in EMBEDDED_OBJECTS:
            raise ValueError(f"embedded images {name!r} do not exist; there is {', '.join(EMBEDDED_OBJECTS)}")
        if image_root is not None:
            raise ValueError(f"image_root={image_root!r} is for images in files, and images is {images!r}")
        given = {f"{split}_count": count for split, count in counts.items() if count is not None}
        return generated_objects(seed=seed, strength=strength, background_correlation=background_correlation, **given)
    for name, value in factors.items():
        if value != _FACTORS[name]:
            raise ValueError(f"{name}={value} is for embedded:objects, and images is {images!r}")
    kind, colon, place = images.partition(":")
    if not colon or kind not in (*_PUBLISHED, "voc"):
        kind, place = "", images
    root, metadata = _folders(kind, place)
    val_count = counts.get("val")
    if kind == "voc":
        if image_root is not None or multilabel is False:
            wrong = "multilabel=False" if image_root is None else f"image_root={image_root!r}"
            raise ValueError(
                f"{wrong} cannot be used with {images!r}: a VOC image has several classes and its own folder"
            )
        rows, classes = read_voc(root, val_count=val_count, seed=seed), list(VOC_CLASSES)
    elif metadata is None:
        rows, classes = read_cub(root, val_count=val_count, seed=seed)
    else:
        bases = [root / "SPLIT", root, root / "images", *([root / _PUBLISHED[kind]] if kind else [])]
        rows, classes = read_metadata(
            metadata,
            roots=[Path(image_root)] if image_root is not None else bases,
            mask_roots=[root / name for name in ("masks", "annotations", "SPLIT")] + bases,
            multilabel=bool(multilabel),
        )
    return source_of_rows(
        drawn(rows, counts, seed=seed),
        classes,
        multilabel=kind == "voc" or bool(multilabel),
        has_masks=any(row.masks for row in rows),
        mask_classes=kind == "voc",
    )


def _folders(kind: str, place: str) -> tuple[Path, Path | None]:
    """The folder of the images, and that of the metadata: None for CUB as it is published."""
    first, comma, second = place.partition(",") if kind else (place, "", "")
    root = Path(first)
    if not root.is_dir():
        hint = (
            ""
            if kind
            else "; the embedded set is embedded:objects, published ones are cub:, ilsvrc:, openimages:, voc:"
        )
        raise ValueError(f"images: {first!r} is no folder{hint}")
    if kind == "voc" or not kind:
        return root, root
    name = _PUBLISHED[kind]
    base = Path(second) if comma else root
    candidates = [base / name, base] if comma else [base / "metadata" / name, base / "metadata", base]
    for candidate in candidates:
        if has_metadata(candidate):
            return root, candidate
    if kind == "cub" and not comma and is_cub(root):
        return root, None
    looked = ", ".join(map(str, candidates))
    raise ValueError(
        f"no metadata of wsolevaluation (train/image_ids.txt, ...) in {looked}; get the folder metadata/{name} of "
        f"clovaai/wsolevaluation and pass {kind}:{first},FOLDER"
    )


__all__ = ["EMBEDDED_OBJECTS", "open_localization"]
