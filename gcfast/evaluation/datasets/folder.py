"""A user's own pictures: class folders, with masks or boxes next to them."""

from __future__ import annotations

import csv
import io
import math
from collections import defaultdict
from pathlib import Path

from gcfast.evaluation.datasets.samples import Box, MaskFile, Sample, ScoredSet, text_of
from gcfast.images.folder import ImageFolder

_COLUMNS = ("path", "x0", "y0", "x1", "y1")


def read_folder(root: Path) -> ScoredSet:
    """Read ``root/images/<class>/…``, masks of ``root/masks`` and boxes of ``root/boxes.csv``.

    Masks or boxes may be missing. A mask has its picture's path with the extension ``.png``
    (``images/a/1.jpg``, ``masks/a/1.png``), and is the object where its value is at least 128.
    ``boxes.csv`` has the columns path (relative to ``images``), x0, y0, x1, y1 in pixels, the end
    exclusive; a picture with several objects has several lines. Without boxes, the box of the mask
    is used. A picture without its mask (if there are masks), or without either, is skipped.

    Raises:
        FileNotFoundError: neither masks nor boxes, or a box of a picture that does not exist.
        ValueError: as :class:`gcfast.images.folder.ImageFolder`; a line of ``boxes.csv`` that is
            not a box; pictures that differ only in their extensions, and would share a mask.
    """
    root = Path(root)
    images = ImageFolder(root / "images")
    masks, table = root / "masks", root / "boxes.csv"
    if not masks.is_dir() and not table.is_file():
        raise FileNotFoundError(f"{root} must hold masks/ or boxes.csv to score against")
    boxes = _boxes(table) if table.is_file() else {}
    strangers = sorted(set(boxes) - set(images.ids))
    if strangers:
        raise FileNotFoundError(
            f"{table} must name pictures under images/, {len(strangers)} are missing: "
            f"{', '.join(strangers[:5])}"
        )
    samples, skipped = [], []
    owners: dict[Path, str] = {}
    for name, label in zip(images.ids, images.labels, strict=True):
        mask = masks / Path(name).with_suffix(".png")
        other = owners.setdefault(mask, name)
        if masks.is_dir() and other != name:
            raise ValueError(
                f"{masks} must hold a mask for each picture, {mask.relative_to(root).as_posix()} "
                f"would be of {other} and of {name}"
            )
        if masks.is_dir() and not mask.is_file():
            skipped.append((name, "no mask"))
        elif not masks.is_dir() and name not in boxes:
            skipped.append((name, "no box"))
        else:
            samples.append(
                Sample(
                    images.root / name,
                    name,
                    label,
                    tuple(boxes.get(name, ())),
                    MaskFile(mask) if masks.is_dir() else None,
                )
            )
    return ScoredSet(root.name, samples, skipped, masks.is_dir())


def _boxes(path: Path) -> dict[str, list[Box]]:
    boxes: dict[str, list[Box]] = defaultdict(list)
    with io.StringIO(text_of(path).removeprefix("\ufeff"), newline="") as file:
        reader = csv.DictReader(file)
        lacking = [c for c in _COLUMNS if c not in (reader.fieldnames or [])]
        if lacking:
            raise ValueError(f"{path} must have the columns {', '.join(_COLUMNS)}, lacks {lacking}")
        for row in reader:
            try:
                x0, y0, x1, y1 = (float(row[c]) for c in _COLUMNS[1:])
                good = all(map(math.isfinite, (x0, y0, x1, y1))) and x0 < x1 and y0 < y1
            except (TypeError, ValueError):
                good = False
            if not good:
                raise ValueError(
                    f"{path} must give x0 < x1 and y0 < y1 in pixels, line {reader.line_num} "
                    f"gives {', '.join(str(row[c]) for c in _COLUMNS[1:])}"
                )
            if not row["path"]:
                raise ValueError(f"{path} must name a picture in each line, line "
                                 f"{reader.line_num} names none")  # fmt: skip
            boxes[Path(row["path"]).as_posix()].append((x0, y0, x1, y1))
    return boxes
