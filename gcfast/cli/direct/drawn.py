"""Pictures as the network sees them, and maps laid back on them."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from gcfast.images.decode import read_picture
from gcfast.images.html import Panel
from gcfast.images.overlay import overlay
from gcfast.images.placed import overlay_whole
from gcfast.images.preprocessing import Preprocessing

_PANEL = 448  # pixels of the longer side of an overlay on the page


class Seen(NamedTuple):
    """A picture file as the network takes it."""

    path: str
    images: Tensor  # [1, 3, H, W]
    view: NDArray[np.uint8]  # [H, W, 3]


def seen(path: str, preprocessing: Preprocessing) -> Seen:
    """Read a picture; raises whatever Pillow raises on a damaged file, or a transform."""
    values = preprocessing.load(path).values
    images = preprocessing.normalize(torch.from_numpy(np.array(values))[None])
    return Seen(path, images, preprocessing.pictures(images)[0])


def readable(path: str, preprocessing: Preprocessing) -> Seen | None:
    """Read a picture; None if it cannot be read."""
    try:
        return seen(path, preprocessing)
    except Exception:  # whatever Pillow raises, or a transform
        return None


def laid_back(
    preprocessing: Preprocessing,
    path: str,
    view: NDArray[np.uint8],
    heat: NDArray[np.float32],
    options: argparse.Namespace,
) -> tuple[Image.Image, dict[str, Any]]:
    """Lay a map on the whole picture, or on the view where that is asked for or all there is.

    Returns:
        The overlay, and what leads back from the map to the picture, for transforms.json: column
        ``u`` and row ``v`` of the map, counted from 0, are at x = x0 + (u + 0.5) · scale_x and
        y = y0 + (v + 0.5) · scale_y, in pixels of the picture (the right way up) from its corner.
    """
    place: dict[str, Any] = {"map_size": list(heat.shape)}
    picture = None
    if preprocessing.transform is None:
        picture = read_picture(path, depth=preprocessing.depth).picture
        x0, y0, x1, y1 = window = preprocessing.window(picture.size)
        place |= {
            "picture_size": [picture.height, picture.width],
            "x0": x0,
            "y0": y0,
            "scale_x": (x1 - x0) / heat.shape[1],
            "scale_y": (y1 - y0) / heat.shape[0],
        }
    if picture is None or options.overlays == "view":
        return Image.fromarray(overlay(view, heat, alpha=options.alpha, dim=options.dim)), place
    return overlay_whole(picture, heat, window, alpha=options.alpha, dim=options.dim), place


def panel(picture: Image.Image, caption: str) -> Panel:
    """Show a picture, made smaller in place if it is large."""
    picture.thumbnail((_PANEL, _PANEL))
    return Panel(np.asarray(picture.convert("RGB")), caption)


def safe_name(name: str) -> str:
    """Keep of a file name's stem only the characters that file systems and URLs accept."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", Path(name).stem)[:60]
