"""Caltech-UCSD Birds-200-2011, as unpacked from its two archives.

``CUB_200_2011.tgz`` holds ``images.txt``, ``image_class_labels.txt``, ``classes.txt``,
``bounding_boxes.txt``, ``train_test_split.txt`` and ``images/``; ``segmentations.tgz`` holds the
folder ``segmentations/``, expected inside the first's folder or next to it.

Source: Wah et al., "The Caltech-UCSD Birds-200-2011 dataset", CNS-TR-2011-001.
"""

from __future__ import annotations

import math
from pathlib import Path

from gcfast.evaluation.datasets.samples import Box, MaskFile, Sample, ScoredSet, text_of

_FILES = (
    "images.txt",
    "image_class_labels.txt",
    "classes.txt",
    "bounding_boxes.txt",
    "train_test_split.txt",
)


def read_cub(root: Path, half: str, *, zero_shot: bool = True) -> ScoredSet:
    """Read one half of the birds.

    Args:
        root: the folder with ``images.txt``, or the one that holds it as ``CUB_200_2011``.
        half: "train" or "test".
        zero_shot: split by species, as metric learning does: the first half of the classes (1 to
            100) trains, the others test. False uses ``train_test_split.txt``.

    Returns:
        The samples in the order of ``images.txt``; with masks if ``segmentations/`` exists.

    Raises:
        FileNotFoundError: an annotation file or a picture is missing.
        ValueError: a line that does not follow the format, an image that a file lacks.

    Source: the split by species: Song et al., "Deep metric learning via lifted structured feature
        embedding", CVPR 2016, section 5.
    """
    root = Path(root)
    if not (root / "images.txt").exists() and (root / "CUB_200_2011").is_dir():
        root = root / "CUB_200_2011"
    missing = [name for name in _FILES if not (root / name).is_file()]
    if missing:
        raise FileNotFoundError(f"CUB-200-2011 at {root} lacks {', '.join(missing)}")
    names = _table(root / "images.txt", 1)
    labels = _table(root / "image_class_labels.txt", 1)
    classes = _table(root / "classes.txt", 1)
    boxes = _table(root / "bounding_boxes.txt", 4)
    training = _table(root / "train_test_split.txt", 1)
    order = {number: place for place, number in enumerate(classes)}
    folders = (root / "segmentations", root.parent / "segmentations")
    segmentations = next((f for f in folders if f.is_dir()), None)

    samples, skipped = [], []
    for image, (name,) in names.items():
        for table, file in ((labels, _FILES[1]), (training, _FILES[4])):
            if image not in table:
                raise ValueError(f"{root / file} must know every image, got none for {image}")
        label = labels[image][0]
        if label not in order:
            raise ValueError(f"{root / 'classes.txt'} must name every class, got none for {label}")
        first = order[label] < len(classes) // 2
        trains = first if zero_shot else training[image][0] == "1"
        if trains != (half == "train"):
            continue
        if image not in boxes:
            skipped.append((name, "no box in bounding_boxes.txt"))
            continue
        path = root / "images" / name
        if not path.is_file():
            raise FileNotFoundError(f"CUB-200-2011 at {root} lacks images/{name}")
        mask = None
        if segmentations is not None:
            file_path = segmentations / Path(name).with_suffix(".png")
            if not file_path.is_file():
                skipped.append((name, "no file in segmentations/"))
                continue
            mask = MaskFile(file_path)
        box = _box(boxes[image], root)
        samples.append(Sample(path, name, classes[label][0], (box,), mask))
    return ScoredSet("CUB-200-2011", samples, skipped, segmentations is not None)


def _box(values: list[str], root: Path) -> Box:
    try:
        x, y, width, height = map(float, values)
    except ValueError:
        x = y = width = height = math.nan
    if not (all(map(math.isfinite, (x, y, width, height))) and width > 0 and height > 0):
        raise ValueError(
            f"{root / 'bounding_boxes.txt'} must give x y width height, width and height above 0, "
            f"got {' '.join(values)}"
        )
    return x, y, x + width, y + height


def _table(path: Path, values: int) -> dict[str, list[str]]:
    """Read lines of a number and some values, by number as text, in order."""
    table: dict[str, list[str]] = {}
    for at, line in enumerate(text_of(path).splitlines(), start=1):
        if not line.strip():
            continue
        number, *rest = line.split()
        if len(rest) != values or not number.isdecimal():
            raise ValueError(
                f"{path} must hold a number and {values} value{'s' if values > 1 else ''} a line, "
                f"got {line!r} in line {at}"
            )
        if number in table:
            raise ValueError(
                f"{path} must hold each number once, {number} comes again in line {at}"
            )
        table[number] = rest
    return table
