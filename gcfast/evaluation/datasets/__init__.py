"""Data sets with boxes and masks, read in their published layouts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from gcfast.evaluation.datasets.coco import read_coco
from gcfast.evaluation.datasets.cub import read_cub
from gcfast.evaluation.datasets.folder import read_folder
from gcfast.evaluation.datasets.samples import (
    AnnotationError,
    Sample,
    ScoredLoader,
    ScoredSet,
    Truth,
    labelled_loader,
)

__all__ = [
    "AnnotationError",
    "Sample",
    "ScoredLoader",
    "ScoredSet",
    "Truth",
    "labelled_loader",
    "open_dataset",
    "read_coco",
    "read_cub",
    "read_folder",
]

_READERS: dict[str, Callable[[Path, str], ScoredSet]] = {
    "cub": read_cub,
    "coco": lambda root, half: read_coco(root, half=half),
    "folder": lambda root, _half: read_folder(root),
}


def open_dataset(spec: str, half: str = "test") -> ScoredSet:
    """Open a data set.

    Args:
        spec: ``cub:ROOT``, ``coco:ROOT`` or ``folder:ROOT``.
        half: "train" or "test"; a folder has one half and gives it for both.

    Raises:
        ValueError: another kind of data set, or files that do not follow the layout.
        FileNotFoundError: a file of the layout is missing.
    """
    kind, colon, root = spec.partition(":")
    if not colon or not root or kind not in _READERS:
        raise ValueError(f"`data` must be cub:ROOT, coco:ROOT or folder:ROOT, got {spec!r}")
    if half not in ("train", "test"):
        raise ValueError(f"`half` must be 'train' or 'test', got {half!r}")
    path = Path(root)
    if not path.is_dir():
        raise FileNotFoundError(f"`data` must name a folder, {root} is not one")
    return _READERS[kind](path, half)
