"""Pictures of birds on cluttered backgrounds, with the masks that heat maps are scored on.

A picture is a function of its label, a seed and an index. Two labels with the same seed and index
give the same bird in the same place and differ only in the pixels of the species' own part.
Berries, flowers and leaves around it have the colors of the parts: a color alone says nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageFilter

from gcfast.demo import anatomy
from gcfast.demo.brush import Array, noise
from gcfast.demo.scenery import draw_place, paint
from gcfast.demo.species import COLORS, SPECIES
from gcfast.metrics import mask_box

SIZE = 144
_SUPERSAMPLE = 3
# Plumage: back colors of small brown, gray and olive birds; low in saturation, so that no
# plumage can be taken for a field mark.
_PLUMAGE = np.array(
    [(128, 100, 74), (112, 108, 104), (112, 110, 78), (146, 122, 96), (104, 84, 68),
     (98, 108, 118), (134, 108, 92), (126, 122, 100)],
    dtype=np.float64,
)  # fmt: skip
_CREAM = np.array([226, 214, 190], dtype=np.float64)


@dataclass(frozen=True)
class Picture:
    """One picture and its truth; S pixels a side.

    Attributes:
        image: uint8 [S, S, 3].
        label: position in ``species.SPECIES``.
        bird: bool [S, S], every pixel that shows some of the bird.
        box: (x0, y0, x1, y1), half open, around ``bird``.
        part: bool [S, S], every pixel that shows some of the part that tells the species.
    """

    image: Array
    label: int
    bird: Array
    box: tuple[int, int, int, int]
    part: Array


def draw_bird(label: int, *, seed: int, index: int, size: int = SIZE) -> Picture:
    """Draw one bird of the species ``label``.

    Args:
        label: position in ``species.SPECIES``.
        seed: not negative.
        index: not negative; label, seed, index and size determine every pixel.
        size: pixels a side, at least 64.

    Returns:
        The picture and its masks.

    Raises:
        ValueError: a label, seed, index or size out of range.
    """
    if not 0 <= label < len(SPECIES):
        raise ValueError(f"`label` must be in [0, {len(SPECIES)}), got {label}")
    if seed < 0 or index < 0:
        raise ValueError(f"`seed` and `index` must not be negative, got {seed} and {index}")
    if size < 64:
        raise ValueError(f"`size` must be at least 64, got {size}")
    # The label does not affect the draws: it chooses among colors that are drawn for all.
    rng = np.random.default_rng([seed, index])
    place = draw_place(rng)
    pose = anatomy.draw_pose(rng, size, place.support)
    figure = anatomy.draw_figure(pose, _SUPERSAMPLE)
    table = _color_table(rng, label)
    x, y = _position(rng, figure, size)

    feet = figure.feet + np.array([x, y])
    image = paint(rng, place, size, feet, toward=pose.facing)
    masks = _masks(figure.regions, SPECIES[label].part)
    crop = _Crop(x, y, masks.shape[1], masks.shape[0], size)
    shade = _shade(rng, masks, size / 144)
    _lay_over(image, crop, figure.regions, table, masks[..., 0], shade)
    bird = np.zeros((size, size), dtype=bool)
    bird[crop.into] = masks[crop.out][..., 0] > 0
    part = np.zeros((size, size), dtype=bool)
    part[crop.into] = masks[crop.out][..., 2] > 0
    return Picture(_grade(rng, image), label, bird, mask_box(bird), part)


def as_batch(pictures: Sequence[Picture]) -> torch.Tensor:
    """Return the images of pictures as float32 [B, 3, S, S] in [0, 1]."""
    images = np.stack([picture.image for picture in pictures])
    return torch.from_numpy(images).permute(0, 3, 1, 2).float().div_(255).contiguous()


def _position(rng: np.random.Generator, figure: anatomy.Figure, size: int) -> tuple[int, int]:
    """Draw the figure's top left corner, in output pixels: anywhere the whole bird fits."""
    corner = []
    x0, y0, x1, y1 = mask_box(np.asarray(figure.regions) > 0)
    for low, high in ((x0, x1), (y0, y1)):
        first = math.ceil(3 - low / _SUPERSAMPLE)
        last = max(first, math.floor(size - 3 - high / _SUPERSAMPLE))
        # The mean of two draws is more often near the middle than at the edge.
        corner.append(first + round((last - first) * float(rng.random(2).mean())))
    return corner[0], corner[1]


def _mix(a: Array, b: Array, share: float) -> Array:
    out: Array = a + (b - a) * share
    return out


def _color_table(rng: np.random.Generator, label: int) -> Array:
    """Draw the colors [N_REGIONS, 3] of one bird: plumage, and its species' field mark."""
    u = rng.random(8)
    first, second = _PLUMAGE[rng.integers(len(_PLUMAGE), size=2)]
    plumage = _mix(first, second, 0.5 * u[0]) * (0.85 + 0.3 * u[1])
    belly = _mix(plumage, _CREAM, 0.40 + 0.35 * u[2])
    wing = plumage * (0.70 + 0.12 * u[3])
    bare = np.array([118, 102, 90]) * (0.8 + 0.3 * u[4])
    tint = 1.0 + 0.16 * (rng.random(3) - 0.5)

    table = np.zeros((anatomy.N_REGIONS, 3))
    table[anatomy.BACK] = plumage
    table[anatomy.FLANK] = _mix(plumage, belly, 0.45)
    table[anatomy.BELLY] = belly
    table[anatomy.FACE] = _mix(plumage, belly, 0.25)
    table[anatomy.STREAK] = plumage * (0.74 + 0.2 * u[5])
    table[anatomy.WING] = wing
    table[anatomy.PRIMARY] = wing * 0.78
    table[anatomy.WING_EDGE] = _mix(wing, _CREAM, 0.16 + 0.16 * u[6])
    table[anatomy.EYE] = (24, 18, 16)
    table[anatomy.GLINT] = (255, 255, 255)
    plain = {
        "crown": plumage * 0.94,
        "bill": bare * 0.95,
        "eye-ring": _mix(plumage, belly, 0.15),
        "throat": _mix(plumage, belly, 0.55),
        "breast": _mix(plumage, belly, 0.50),
        "wing-bar": wing * 1.06,
        "rump": plumage * 0.97,
        "tail": plumage * 0.72,
        "legs": bare * 0.85,
    }
    species = SPECIES[label]
    for part, (fill, line) in anatomy.REGIONS.items():
        color = np.array(COLORS[species.look]) * tint if part == species.part else plain[part]
        table[line] = color * 0.80 + 4
        table[fill] = color
    return table.clip(0, 255)


class _Crop:
    """The overlap of a figure of width w and height h at (x, y) with a picture of ``size``."""

    def __init__(self, x: int, y: int, w: int, h: int, size: int) -> None:
        x0, y0, x1, y1 = max(x, 0), max(y, 0), min(x + w, size), min(y + h, size)
        self.into = (slice(y0, y1), slice(x0, x1))
        self.out = (slice(y0 - y, y1 - y), slice(x0 - x, x1 - x))


_WING = (anatomy.WING, anatomy.PRIMARY, anatomy.WING_EDGE, anatomy.BAR, anatomy.BAR_LINE)


def _reduced(regions: Image.Image, table: Array) -> Array:
    """Look colors up in table [N_REGIONS, 3] and reduce: uint8 [h, w, 3]."""
    painted = regions.copy()
    painted.putpalette(table.astype(np.uint8).ravel().tolist())
    reduced: Array = np.asarray(painted.convert("RGB").reduce(_SUPERSAMPLE))
    return reduced


def _masks(regions: Image.Image, part: str) -> Array:
    """Return how much of each pixel, of 255, is bird, wing and the part: uint8 [h, w, 3]."""
    table = np.zeros((anatomy.N_REGIONS, 3))
    table[1:, 0] = 255
    table[list(_WING), 1] = 255
    table[list(anatomy.REGIONS[part]), 2] = 255
    return _reduced(regions, table)


def _blurred(cover: Array, radius: float) -> Array:
    image = Image.fromarray(cover).filter(ImageFilter.BoxBlur(radius))
    blurred: Array = np.asarray(image, dtype=np.float32)
    return blurred


def _shade(rng: np.random.Generator, masks: Array, scale: float) -> Array:
    """Return the light on the bird, float32 [h, w], about 1.

    The blurred outline approximates the height of the body; its slope against the light gives the
    shade. The wing is a second, flatter sheet that shades its own lower edge. The masks' third
    plane, which depends on the species, is not used.
    """
    h, w = masks.shape[:2]
    slant, strength = rng.random(2).tolist()
    height = _blurred(masks[..., 0], 7.0 * scale)
    height += 0.5 * _blurred(masks[..., 0], 2.3 * scale)
    height += 0.25 * _blurred(masks[..., 1], 1.7 * scale)
    shade: Array = noise(rng, 32, (w, h)) * 0.24 + 0.88
    slope = (0.009 + 0.005 * strength) * scale
    shade[1:-1] += (height[2:] - height[:-2]) * slope
    shade[:, 1:-1] += (height[:, 2:] - height[:, :-2]) * (slope * 1.4 * (slant - 0.5))
    return shade.clip(0.35, 1.5, out=shade)


def _lay_over(
    image: Array, crop: _Crop, regions: Image.Image, table: Array, cover: Array, shade: Array
) -> None:
    """Draw the lit bird over image [S, S, 3] float32, in place."""
    # Region 0 is black, so the reduction gives color times coverage.
    colored = _reduced(regions, table)[crop.out] * shade[crop.out][..., None]
    clear = np.float32(1) - cover[crop.out][..., None] * np.float32(1 / 255)
    image[crop.into] = image[crop.into] * clear + colored


def _grade(rng: np.random.Generator, image: Array) -> Array:
    """Add dapples, the color of the light and grain to bird and background; returns uint8."""
    size = len(image)
    depth, warm, bright, grain = rng.random(4).tolist()
    warmth, gain = 0.12 * (warm - 0.45), 0.86 + 0.30 * bright
    dapple = noise(rng, 5, (size, size), smooth=True) * (0.10 + 0.45 * depth)
    dapple += 1 - 0.5 * (0.10 + 0.45 * depth)
    dapple *= gain
    image *= dapple[..., None]
    image *= np.array([1 + warmth, 1.0, 1 - warmth], dtype=np.float32)
    image += rng.standard_normal((size, size, 1), dtype=np.float32) * (1.0 + 3.0 * grain)
    graded: Array = image.clip(0, 255, out=image).astype(np.uint8)
    return graded
