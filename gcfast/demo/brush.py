"""Tools that paint pictures: noise, leaves, blades, and accents that distract.

Accents are berries, flowers and turned leaves in the colors of ``species.COLORS``. They are drawn
independently of the species, so a color in the picture is no evidence of it.
"""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageDraw

from gcfast.demo.species import COLORS

Array = np.ndarray
Rgb = tuple[int, int, int]

_ACCENTS = np.array(list(COLORS.values()))


def noise(
    rng: np.random.Generator,
    cells: int | tuple[int, int],
    size: tuple[int, int],
    *,
    smooth: bool = False,
) -> Array:
    """Return noise float32, about [0, 1], of size (width, height) from ``cells`` a side."""
    shape = (cells, cells) if isinstance(cells, int) else cells
    grid = Image.fromarray(rng.random(shape, dtype=np.float32))
    method = Image.Resampling.BICUBIC if smooth else Image.Resampling.BILINEAR
    out: Array = np.array(grid.resize(size, method))
    return out


def to_inks(colors: Array) -> list[Rgb]:
    """Return colors [n, 3] as Pillow takes them."""
    return [(r, g, b) for r, g, b in np.minimum(colors, 255).astype(int).tolist()]


def rgb(color: Array) -> Rgb:
    """Return one color [3] as Pillow takes it."""
    r, g, b = color.tolist()
    return min(int(r), 255), min(int(g), 255), min(int(b), 255)


_T = np.linspace(0, 1, 6)
_LEAF = np.concatenate(
    [
        np.stack([_T, 0.5 * np.sin(np.pi * _T**0.8)], 1),
        np.stack([_T[::-1], -0.5 * np.sin(np.pi * _T[::-1] ** 0.8)], 1)[1:-1],
    ]
)  # [10, 2]: base at the origin, tip at (1, 0), a width of 1


class Brush:
    """Draws elements; points and lengths are in pixels of the picture, times a ``scale``."""

    def __init__(self, rng: np.random.Generator, size: int, tones: Array) -> None:
        self.rng = rng
        self.size = size
        self.tones = tones  # [4, 3]: top, bottom, and the light and dark of the plants between

    def leaves(
        self,
        pen: ImageDraw.ImageDraw,
        at: Array,
        angles: Array,
        lengths: Array,
        colors: Array,
        *,
        scale: float = 1.0,
        width: float = 0.42,
    ) -> None:
        """Draw leaves of two halves, the lower one darker; at [n, 2], the rest [n] and [n, 3]."""
        c, s = np.cos(angles), np.sin(angles)
        turn = np.stack([np.stack([c, s], -1), np.stack([-s, c], -1)], 1)  # [n, 2, 2]
        blade = _LEAF * (1, width)
        points = ((blade @ turn) * lengths[:, None, None] + at[:, None]) * scale
        flat = points.reshape(len(points), -1).tolist()
        for outline, ink, dark in zip(flat, to_inks(colors), to_inks(colors * 0.82), strict=True):
            pen.polygon(outline, fill=ink)
            pen.polygon(outline[:12], fill=dark)

    def blades(
        self,
        pen: ImageDraw.ImageDraw,
        roots: Array,
        tips: Array,
        widths: Array,
        colors: Array,
        *,
        scale: float = 1.0,
        bend: float = 0.2,
    ) -> None:
        """Draw curved blades of grass from roots to tips [n, 2]."""
        t = np.linspace(0, 1, 6)[None, :, None]
        run = tips - roots
        side = np.stack([-run[:, 1], run[:, 0]], -1)
        bends = (self.rng.random((len(roots), 1, 1)) - 0.5) * 2 * bend
        spine = roots[:, None] + run[:, None] * t + side[:, None] * bends * (t * (1 - t))
        unit = side / np.maximum(np.linalg.norm(side, axis=1, keepdims=True), 1e-6)
        half = unit[:, None] * widths[:, None, None] * (1 - t) / 2
        points = np.concatenate([spine + half, (spine - half)[:, ::-1]], 1) * scale
        flat = points.reshape(len(points), -1).tolist()
        for outline, ink in zip(flat, to_inks(colors), strict=True):
            pen.polygon(outline, fill=ink)

    def accents(
        self,
        pen: ImageDraw.ImageDraw,
        at: Array,
        *,
        scale: float = 1.0,
        large: float = 1.0,
        faded: float = 0.0,
    ) -> None:
        """Draw berries, flowers and turned leaves at [n, 2], in the colors of the parts."""
        rng, n = self.rng, len(at)
        colors = self.accent_colors(n) * (0.8 + 0.35 * rng.random((n, 1)))
        colors = colors + (self.tones[:2].mean(0) - colors) * faded
        kinds = rng.integers(4, size=n).tolist()
        radii = (scale * large * self.size / 144 * (2.2 + 3.4 * rng.random(n))).tolist()
        turns = (rng.random(n) * 2 * math.pi).tolist()
        draw = (self._berries, self._flower, self._turned_leaf, self._fruit)
        for (x, y), color, kind, r, turn in zip(
            (at * scale).tolist(), colors, kinds, radii, turns, strict=True
        ):
            draw[kind](pen, x, y, r, turn, color)

    def _berries(
        self, pen: ImageDraw.ImageDraw, x: float, y: float, r: float, turn: float, color: Array
    ) -> None:
        q = 0.85 * r
        ink, dark, shine = rgb(color), rgb(color * 0.62), rgb(color * 0.5 + 125)
        for k in range(3):
            bx = x + 1.25 * r * math.cos(turn + 2.1 * k)
            by = y + 1.25 * r * math.sin(turn + 2.1 * k)
            pen.ellipse((bx - q, by - q, bx + q, by + q), fill=dark)
            pen.ellipse((bx - q, by - q, bx + 0.6 * q, by + 0.6 * q), fill=ink)
            pen.ellipse((bx - 0.5 * q, by - 0.6 * q, bx - 0.1 * q, by - 0.2 * q), fill=shine)

    def _flower(
        self, pen: ImageDraw.ImageDraw, x: float, y: float, r: float, turn: float, color: Array
    ) -> None:
        q = 0.72 * r
        inks = rgb(color), rgb(color * 0.88)
        for k in range(5):
            px = x + r * math.cos(turn + 1.2566 * k)
            py = y + r * math.sin(turn + 1.2566 * k)
            pen.ellipse((px - q, py - q, px + q, py + q), fill=inks[k % 2])
        q = 0.42 * r
        pen.ellipse((x - q, y - q, x + q, y + q), fill=(206, 176, 92))

    def _turned_leaf(
        self, pen: ImageDraw.ImageDraw, x: float, y: float, r: float, turn: float, color: Array
    ) -> None:
        self.leaves(
            pen, np.array([[x, y]]), np.array([turn]), np.array([4.0 * r]), color[None], width=0.5
        )

    def _fruit(
        self, pen: ImageDraw.ImageDraw, x: float, y: float, r: float, turn: float, color: Array
    ) -> None:
        wide, tall = 1.15 * r, (1.2 + 0.08 * turn) * r
        for shrink, gain in ((1.0, 0.66), (0.84, 0.88), (0.6, 1.08)):
            dx, dy = wide * shrink, tall * shrink
            cx, cy = x - 0.5 * (wide - dx), y - 0.5 * (tall - dy)
            pen.ellipse((cx - dx, cy - dy, cx + dx, cy + dy), fill=rgb(color * gain))
        pen.ellipse(
            (x - 0.6 * r, y - 0.9 * r, x - 0.25 * r, y - 0.5 * r), fill=rgb(color * 0.5 + 125)
        )

    def twig(
        self, pen: ImageDraw.ImageDraw, scale: float, *, leafy: bool, thin: bool = False
    ) -> Array:
        """Draw a bent twig from one side into the picture; returns points [9, 2] along it."""
        rng, size = self.rng, self.size
        start = np.array([-0.05 if rng.random() < 0.5 else 1.05, rng.random()]) * size
        end = np.array([size * rng.random(), size * rng.random()])
        bow = (rng.random(2) - 0.5) * size * 0.3
        t = np.linspace(0, 1, 9)[:, None]
        path: Array = start + (end - start) * t + bow * 4 * t * (1 - t)
        wood = np.array([92, 76, 60]) * (0.7 + 0.5 * rng.random())
        pen.line(
            (path * scale).ravel().tolist(),
            fill=rgb(wood),
            joint="curve",
            width=max(1, round(scale * size * (0.008 + (0 if thin else 0.016) * rng.random()))),
        )
        if leafy:
            n = 5 if thin else 8
            light, dark = self.tones[2], self.tones[3]
            at = path[rng.integers(len(path), size=n)]
            self.leaves(
                pen,
                at,
                rng.random(n) * 2 * math.pi,
                size * (0.07 + 0.07 * rng.random(n)),
                dark * 1.2 + (light - dark) * rng.random((n, 1)),
                scale=scale,
            )
        return path

    def stand(
        self, pen: ImageDraw.ImageDraw, n: int, tops: tuple[float, float], scale: float
    ) -> None:
        """Draw upright stems from the lower edge; ``tops``: their heights as a share of S."""
        rng, size = self.rng, self.size
        light, dark = self.tones[2], self.tones[3]
        roots = np.stack([rng.random(n) * size * 1.1 - 0.05 * size, np.full(n, 1.02 * size)], 1)
        heights = size * (tops[0] + (tops[1] - tops[0]) * rng.random(n))
        lean = (rng.random(n) - 0.5) * 0.5 * heights
        tips = np.stack([roots[:, 0] + lean, roots[:, 1] - heights], 1)
        colors = dark + (light - dark) * rng.random((n, 1)) * 1.15
        self.blades(pen, roots, tips, size * (0.015 + 0.03 * rng.random(n)), colors, scale=scale)

    def boulder(self, pen: ImageDraw.ImageDraw, center: Array, radius: float, scale: float) -> None:
        """Draw an angular stone with a lit, almost flat top and a dark foot."""
        rng = self.rng
        light, dark = self.tones[2], self.tones[3]
        tone = dark + (light - dark) * rng.random()
        angle = np.sort(rng.random(11)) * 2 * math.pi
        ring = np.stack([np.cos(angle), np.sin(angle) * 0.62], 1)
        ring *= radius * (0.88 + 0.24 * rng.random((11, 1)))
        for shrink, lift, gain in ((1.0, 0.0, 0.74), (0.90, -0.10, 1.0), (0.66, -0.24, 1.16)):
            facet = center + ring * shrink + np.array([0, lift * radius])
            pen.polygon((scale * facet).ravel().tolist(), fill=rgb(tone * gain))
        specks = center + (rng.random((18, 2)) - 0.5) * radius * (1.3, 0.8)
        for px, py in (specks * scale).tolist():
            r = scale * radius * 0.03 * (0.5 + rng.random())
            shade = tone * (0.7 + 0.6 * rng.random())
            pen.ellipse((px - r, py - r, px + r, py + r), fill=rgb(shade))

    def accent_colors(self, n: int) -> Array:
        """Draw colors [n, 3] from those of the parts."""
        colors: Array = _ACCENTS[self.rng.integers(len(_ACCENTS), size=n)]
        return colors
