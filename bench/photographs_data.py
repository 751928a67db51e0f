"""Photographs with instance masks, in COCO's layout, for `bench/photographs.py`."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scenes_network import SceneNetwork
from torch import Tensor, nn

from gcfast.evaluation.datasets.coco import SPLITS, read_coco

SIDE = 224  # of the network's input
MIN_CROP = 32  # pixels, the shorter side of a box that becomes a row


@dataclass(frozen=True)
class Photograph:
    """A picture squashed to a square, with what is on it."""

    name: str
    image: NDArray[np.uint8]  # [S, S, 3]
    masks: dict[str, NDArray[np.bool_]]  # class to the union of its instances, [S, S]
    crops: list[tuple[str, NDArray[np.uint8]]]  # class and box of an instance, [S, S, 3]


def squash(image: Image.Image, side: int = SIDE) -> NDArray[np.uint8]:
    return np.array(image.resize((side, side), Image.Resampling.BICUBIC))


def split_of(root: Path) -> str:
    """The split that `root` has annotations of, validation first.

    Raises:
        FileNotFoundError: If it has none.
    """
    for name in (name for names in SPLITS.values() for name in names):
        if (root / "annotations" / f"instances_{name}.json").is_file():
            return name
    raise FileNotFoundError(f"{root} must hold annotations/instances_<split>.json of COCO")


def load_photographs(root: Path, limit: int | None = None, side: int = SIDE) -> list[Photograph]:
    """All pictures that show something, by file name.

    Args:
        root: The folder with `annotations/` and the pictures.
        limit: How many to take at most.
        side: Of the squares, in pixels.

    Raises:
        FileNotFoundError, ValueError: As `gcfast.evaluation.datasets.coco.read_coco`.
    """
    split = split_of(root)
    file = root / "annotations" / f"instances_{split}.json"
    categories = [one["name"] for one in json.loads(file.read_bytes())["categories"]]
    found = defaultdict(list)
    for category in categories:
        for sample in read_coco(root, split=split, category=category).samples:
            found[sample.path].append(sample)
    photographs = []
    for path in sorted(found)[:limit]:
        with Image.open(path) as file_image:
            picture = file_image.convert("RGB")
        masks, crops = {}, []
        for sample in found[path]:
            assert sample.mask is not None
            whole = Image.fromarray(sample.mask.read().astype(np.uint8) * 255)
            small = np.asarray(whole.resize((side, side), Image.Resampling.BOX)) >= 128
            if small.any():
                masks[sample.label] = small
            for x0, y0, x1, y1 in sample.boxes:
                if min(x1 - x0, y1 - y0) >= MIN_CROP:
                    box = (int(x0), int(y0), round(x1), round(y1))
                    crops.append((sample.label, squash(picture.crop(box), side)))
        if masks:
            photographs.append(Photograph(path.name, squash(picture, side), masks, crops))
    return photographs


class Backbone(nn.Module):
    """EfficientNet-Lite0 with ImageNet weights, its averaged activations as the embedding."""

    def __init__(self, *, imagenet: bool = True) -> None:
        super().__init__()
        network = SceneNetwork(imagenet=imagenet)
        self.front, self.back, self.head = network.front, network.back, network.head

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, 3, h, w] to [B, 1280], not normalised."""
        return self.head(self.back(self.front(images))).mean((2, 3))
