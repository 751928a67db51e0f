"""What the maps of `bench/scenes.py` look like: a grid as PNG and rows for the HTML page."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from scenes_compose import Pictures
from scenes_network import SceneNetwork, to_input
from torch import Tensor

import gcfast
from gcfast.images.html import Panel, ReportRow
from gcfast.images.overlay import overlay

MATCH, OTHER = (60, 220, 90), (255, 80, 80)

Explain = Callable[[Tensor], Tensor]  # images [B, 3, h, w] to maps [B, h, w] in [0, 1]


def channel_sum(network: SceneNetwork, images: Tensor) -> Tensor:
    """The sum over all channels of `head`, divided by its maximum, at the size of the images."""
    with torch.inference_mode():
        maps = network.head(network.back(network.front(images))).sum(1, keepdim=True)
        maps = maps / maps.amax((2, 3), keepdim=True).clamp(min=1e-12)
        return F.interpolate(maps, images.shape[2:], mode="bilinear", align_corners=False)[:, 0]


def outlined(
    image: NDArray[np.uint8], masks: NDArray[np.bool_], colors: list[tuple[int, int, int]]
) -> NDArray[np.uint8]:
    """A copy of image [h, w, 3] with a line two pixels wide around every mask of [n, h, w]."""
    out = image.copy()
    for mask, color in zip(masks, colors, strict=True):
        wide = mask.copy()
        for axis in (0, 1):
            wide |= np.roll(wide, 2, axis) | np.roll(wide, -2, axis)
        out[wide & ~mask] = color
    return out


def overlay_rows(
    pictures: Pictures,
    chosen: list[int],
    rows: Pictures,
    explainer: gcfast.Explainer,
    maps: Mapping[str, Explain],
) -> list[ReportRow]:
    """A report row for each chosen picture: picture, neighbour, and one overlay for each map.

    Args:
        pictures: With one or two objects each.
        chosen: Numbers of the pictures to show.
        rows: The training pictures, in the order of the database.
        explainer: Holds the database.
        maps: Caption to a function that explains images.
    """
    images = to_input(pictures.images[chosen])
    why = explainer.explain_batch(images, details=True)
    heats = {caption: explain(images).clamp(0, 1).numpy() for caption, explain in maps.items()}
    out = []
    for at, number in enumerate(chosen):
        image, names = pictures.images[number], pictures.names[number]
        neighbor = int(why.neighbors[at, 0])
        label = rows.names[neighbor][0]
        colors = [MATCH if name == label or len(names) == 1 else OTHER for name in names]
        panels = [
            Panel(outlined(image, pictures.masks[number], colors), "picture, objects outlined"),
            Panel(rows.images[neighbor], f"nearest row: {label}"),
        ]
        panels += [Panel(overlay(image, heat[at]), caption) for caption, heat in heats.items()]
        found = "" if len(names) == 1 or label in names else "; the nearest row shows neither"
        notes = f"squared distance to the nearest row {float(why.distances[at, 0]):.3f}{found}"
        out.append(ReportRow(" and ".join(names), panels, notes))
    return out


def save_grid(rows: list[ReportRow], path: Path) -> None:
    """The panels of all rows as one PNG, two rows on a line, captions left to the page."""
    lines = [np.concatenate([panel.image for panel in row.panels], axis=1) for row in rows]
    if len(lines) % 2:
        lines.append(np.zeros_like(lines[0]))
    left, right = np.concatenate(lines[0::2]), np.concatenate(lines[1::2])
    gap = np.full((len(left), 8, 3), 255, np.uint8)
    Image.fromarray(np.concatenate([left, gap, right], axis=1)).save(path)
