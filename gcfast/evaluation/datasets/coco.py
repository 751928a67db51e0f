"""COCO's instance annotations: polygons and both kinds of run-length encoding.

Source: Lin et al., "Microsoft COCO: common objects in context", ECCV 2014; the format is described
at https://cocodataset.org/#format-data.
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gcfast.evaluation.datasets.samples import Box, Sample, ScoredSet

SPLITS = {"test": ("val2017", "val2014"), "train": ("train2017", "train2014")}


@dataclass(frozen=True)
class Regions:
    """The union of segmentations as in the JSON: polygons, counts, or compressed counts."""

    segmentations: tuple[Any, ...]
    height: int
    width: int

    def read(self) -> NDArray[np.bool_]:
        """Decode the mask [h, w]."""
        mask = np.zeros((self.height, self.width), bool)
        for one in self.segmentations:
            mask |= decode_segmentation(one, self.height, self.width)
        return mask


def read_coco(
    root: Path, *, half: str = "test", category: str = "bird", split: str | None = None
) -> ScoredSet:
    """Read the images that show a category, with its boxes and masks.

    An image's mask is the union of the category's instances, crowds included; its boxes are those
    of the instances that are not crowds. Images without such a box are skipped and counted, and so
    are those with an instance that lacks its box or its segmentation: heat on it would count as
    misplaced.

    Args:
        root: the folder with ``annotations/instances_<split>.json`` and ``<split>/`` (or
            ``images/<split>/``).
        half: "test" uses the split val2017 or val2014, "train" train2017 or train2014, whichever
            exists.
        category: its name in the JSON.
        split: another split by its name.

    Returns:
        The samples in the order of the JSON's images, all labelled ``category``.

    Raises:
        FileNotFoundError: the annotations or a picture are missing.
        ValueError: the JSON is not COCO's, lists an image twice, or does not know the category.
    """
    root = Path(root)
    wanted = SPLITS[half] if split is None else (split,)
    found = [s for s in wanted if (root / "annotations" / f"instances_{s}.json").is_file()]
    if not found:
        tried = " or ".join(f"annotations/instances_{s}.json" for s in wanted)
        raise FileNotFoundError(f"COCO at {root} lacks {tried}")
    name = found[0]
    file = root / "annotations" / f"instances_{name}.json"
    try:
        content = json.loads(file.read_bytes())
        images = [(i["id"], i["file_name"], i["height"], i["width"]) for i in content["images"]]
        annotations = [(a["image_id"], a["category_id"], a) for a in content["annotations"]]
        numbers = {c["name"]: c["id"] for c in content["categories"]}
        if not all(isinstance(n, str) for _, n, _, _ in images):
            raise TypeError("a file_name that is no text")
        # An id that cannot be hashed fails here, with the file's name.
        hash((tuple(i for i, _, _, _ in images), tuple(i for i, _, _ in annotations)))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file} must hold images, annotations and categories: {error!r}"
        ) from error
    for listed in ([i for i, _, _, _ in images], [n for _, n, _, _ in images]):
        picture, times = max(Counter(listed).items(), key=lambda c: c[1], default=("", 1))
        if times > 1:
            raise ValueError(f"{file} must list each image once, {picture} comes {times} times")
    if category not in numbers:
        raise ValueError(
            f"`category` must be one of {', '.join(sorted(numbers))}, got {category!r}"
        )
    folder = root / name if (root / name).is_dir() else root / "images" / name
    by_image: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for image, category_number, annotation in annotations:
        if category_number == numbers[category]:
            by_image[image].append(annotation)
    samples, skipped = [], []
    for image, file_name, height, width in images:
        instances = by_image.get(image)
        if not instances:
            continue
        path = folder / file_name
        if not path.is_file():
            raise FileNotFoundError(f"COCO at {root} lacks {path.relative_to(root)}")
        single = [i for i in instances if not i.get("iscrowd")]
        reason = ""
        if not single:
            reason = "a crowd only, no box"
        elif not all(_has_area(i.get("bbox")) for i in single):
            reason = "an instance without a box"
        elif not all(i.get("segmentation") for i in instances):
            reason = "an instance without a segmentation"
        if reason:
            skipped.append((file_name, reason))
            continue
        mask = Regions(tuple(i["segmentation"] for i in instances), height, width)
        boxes = tuple(_box(i["bbox"]) for i in single)
        samples.append(Sample(path, file_name, category, boxes, mask))
    return ScoredSet(f"COCO {name}, {category}", samples, skipped, has_masks=True)


def decode_segmentation(segmentation: Any, height: int, width: int) -> NDArray[np.bool_]:
    """Decode the mask [h, w] of one annotation's ``segmentation``.

    Raises:
        ValueError: neither polygons nor a run-length encoding, or one of another size.
    """
    if isinstance(segmentation, list):
        mask = np.zeros((height, width), bool)
        for polygon in segmentation:
            if len(polygon) < 6 or len(polygon) % 2:
                raise ValueError(f"a polygon must have three points or more, got {polygon}")
            mask |= fill_polygon(np.asarray(polygon, float).reshape(-1, 2), height, width)
        return mask
    if not isinstance(segmentation, dict) or not {"size", "counts"} <= segmentation.keys():
        raise ValueError(
            f"a segmentation must be polygons or size and counts: {segmentation!r:.60}"
        )
    if list(segmentation["size"]) != [height, width]:
        raise ValueError(
            f"the mask has size {segmentation['size']}, the image is listed with {[height, width]}"
        )
    counts = segmentation["counts"]
    if isinstance(counts, str):
        counts = decompress_counts(counts)
    if any(c < 0 for c in counts) or sum(counts) != height * width:
        raise ValueError(f"the counts must add up to {height * width}, got {sum(counts)}")
    values = np.arange(len(counts)) % 2 == 1  # alternating, outside first
    return np.repeat(values, counts).reshape(width, height).T  # column by column


def decompress_counts(text: str) -> list[int]:
    """Decode the run lengths in COCO's compressed string.

    Each number is split into 5-bit digits, lowest first, in characters from "0" on; bit 5 of a
    digit says that another follows, bit 4 of the last is the sign. From the fourth number on, the
    string has the difference from the number two places before.

    Source: ``rleToString`` in cocoapi's ``common/maskApi.c``.
    """
    counts: list[int] = []
    value = shift = 0
    for character in text:
        digit = ord(character) - 48
        if not 0 <= digit < 64:
            raise ValueError(
                f"compressed counts must hold characters from '0' to 'o', got {text!r:.60}"
            )
        value |= (digit & 31) << shift
        shift += 5
        if digit & 32:
            continue
        if digit & 16:
            value -= 1 << shift
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
        value = shift = 0
    if shift:
        raise ValueError(f"compressed counts must end with a whole number, got {text!r:.60}")
    return counts


def fill_polygon(points: NDArray[np.float64], height: int, width: int) -> NDArray[np.bool_]:
    """Return the pixels [h, w] whose center is in a polygon [n, 2] of (x, y), by the even-odd rule.

    pycocotools rounds outlines on a finer grid instead; the two differ only along the outline.
    """
    edges = np.zeros((height, width + 1), np.int64)
    for (x0, y0), (x1, y1) in zip(points, np.roll(points, -1, 0), strict=True):
        low, high = min(y0, y1), max(y0, y1)
        # Rows whose center y + 0.5 is in [low, high): a shared vertex is counted once.
        first, last = max(0, int(np.ceil(low - 0.5))), min(height, int(np.ceil(high - 0.5)))
        if last <= first:
            continue
        rows = np.arange(first, last)
        crossing = x0 + (rows + 0.5 - y0) * ((x1 - x0) / (y1 - y0))
        np.add.at(edges, (rows, np.ceil(crossing - 0.5).clip(0, width).astype(int)), 1)
    inside: NDArray[np.bool_] = edges.cumsum(1)[:, :width] % 2 == 1
    return inside


def _box(values: Sequence[float]) -> Box:
    x, y, width, height = map(float, values)
    return x, y, x + width, y + height


def _has_area(values: Any) -> bool:
    if not isinstance(values, list) or len(values) != 4:
        return False
    if not all(isinstance(v, int | float) and math.isfinite(v) for v in values):
        return False
    return bool(values[2] > 0 and values[3] > 0)
