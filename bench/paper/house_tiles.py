"""Tiles like a satellite's of a house, its lot, the street and the neighbours, with masks.

A tile shows 48 m x 48 m. It is drawn at four times its size and averaged down. Every part that a
price may depend on has a mask: the roof of the house in the middle, its pool, all trees, and the
street where that is a busy one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

METRES = 48.0
FINER = 4  # drawn pixels a side of each pixel
PARTS = ("roof", "pool", "trees", "busy road")

Colour = tuple[int, int, int]
Point = tuple[float, float]

ROOFS: tuple[Colour, ...] = (
    (112, 108, 106), (88, 84, 84), (134, 110, 92), (150, 92, 72), (120, 122, 128), (98, 80, 68),
)  # fmt: skip
CARS: tuple[Colour, ...] = (
    (225, 225, 228), (40, 42, 48), (150, 152, 156), (150, 40, 40), (50, 80, 140), (90, 120, 150),
)  # fmt: skip
SUN: Point = (1.0, 0.7)  # shadows fall this way, in metres for each metre of height


@dataclass(frozen=True)
class Lot:
    """What is to be drawn; lengths in metres."""

    kind: str  # "detached", "semi", "townhouse"
    footprint: float  # of the house, in square metres
    storeys: int
    pool: bool
    trees: int
    busy: bool


class Canvas:
    """A tile while it is being drawn, in metres; ``parts`` says which part each pixel shows."""

    def __init__(self, pixels: int, rng: np.random.Generator) -> None:
        self.rng = rng
        self.scale = pixels * FINER / METRES
        size = (pixels * FINER, pixels * FINER)
        self.image = Image.new("RGB", size, (96, 112, 66))
        self.draw = ImageDraw.Draw(self.image, "RGBA")
        self.parts = Image.new("L", size)  # 0: none, else 1 + the number in PARTS
        self.draw_parts = ImageDraw.Draw(self.parts)

    def polygon(self, points: Sequence[Point], colour: tuple[int, ...], part: str = "") -> None:
        """Fill a polygon; what it covers belongs to its part and to no other from then on."""
        scaled = [(x * self.scale, y * self.scale) for x, y in points]
        self.draw.polygon(scaled, fill=colour)
        if len(colour) == 3:
            self.draw_parts.polygon(scaled, fill=_number(part))

    def disc(self, at: Point, radius: float, colour: tuple[int, ...], part: str = "") -> None:
        """Fill a disc, as :meth:`polygon`."""
        (x, y), r = at, radius
        box = [v * self.scale for v in (x - r, y - r, x + r, y + r)]
        self.draw.ellipse(box, fill=colour)
        if len(colour) == 3:
            self.draw_parts.ellipse(box, fill=_number(part))

    def textured(self) -> None:
        """Make the ground's even green a lawn: patches of greener and drier grass."""
        size = self.image.size[0]
        coarse = self.rng.normal(0, 1, (9, 9, 1)) @ np.array([[9.0, 6.0, 5.0]])
        coarse += self.rng.normal(0, 1, (9, 9, 1)) @ np.array([[7.0, -3.0, -2.0]])
        layers = [
            np.asarray(
                Image.fromarray(coarse[..., i].astype(np.float32)).resize(
                    (size, size), Image.Resampling.BICUBIC
                )
            )
            for i in range(3)
        ]
        fine = self.rng.normal(0, 6, (size // 2, size // 2, 1)).repeat(2, 0).repeat(2, 1)
        ground = np.asarray(self.image, np.float32) + np.stack(layers, 2) + fine
        self.image.paste(Image.fromarray(ground.clip(0, 255).astype(np.uint8)))


def _number(part: str) -> int:
    return 1 + PARTS.index(part) if part else 0


def rectangle(at: Point, width: float, depth: float, angle: float = 0.0) -> list[Point]:
    """Corners of a rectangle round a point, turned by an angle in radians."""
    c, s = np.cos(angle), np.sin(angle)
    half = [(-width / 2, -depth / 2), (width / 2, -depth / 2), (width / 2, depth / 2),
            (-width / 2, depth / 2)]  # fmt: skip
    return [(at[0] + c * x - s * y, at[1] + s * x + c * y) for x, y in half]


def shade(colour: Colour, factor: float) -> Colour:
    """A colour made lighter or darker."""
    red, green, blue = (int(min(255, max(0, v * factor))) for v in colour)
    return red, green, blue


def roof(
    canvas: Canvas, at: Point, width: float, depth: float, angle: float, height: float, part: str
) -> None:
    """A gabled or hipped roof with its shadow; the faces away from the sun are darker."""
    rng = canvas.rng
    colour = ROOFS[rng.integers(len(ROOFS))]
    a, b, c, d = corners = rectangle(at, width, depth, angle)
    fall = (SUN[0] * height * 0.45, SUN[1] * height * 0.45)
    for step in (0.5, 1.0):
        moved = [(x + step * fall[0], y + step * fall[1]) for x, y in corners]
        canvas.polygon(moved, (18, 22, 30, 95))
    hip = 0.5 * min(width, depth) if rng.random() < 0.5 else 0.0
    if width < depth:  # the ridge runs along the longer side
        a, b, c, d = b, c, d, a
        width, depth = depth, width
    along = hip / width

    def between(p: Point, q: Point, t: float) -> Point:
        return p[0] + t * (q[0] - p[0]), p[1] + t * (q[1] - p[1])

    left, right = between(a, d, 0.5), between(b, c, 0.5)
    first, last = between(left, right, along), between(left, right, 1 - along)
    faces = [([a, b, last, first], (a, b)), ([c, d, first, last], (c, d))]
    if hip:
        faces += [([b, c, last], (b, c)), ([d, a, first], (d, a))]
    for points, (p, q) in faces:
        middle = between(p, q, 0.5)
        out = (middle[0] - at[0], middle[1] - at[1])
        lit = -(out[0] * SUN[0] + out[1] * SUN[1]) / (np.hypot(*out) * np.hypot(*SUN))
        canvas.polygon(points, shade(colour, 1.0 + 0.24 * lit), part)


def tree(canvas: Canvas, at: Point, radius: float) -> None:
    """A crown of overlapping leaf masses, brighter towards the sun, and its shadow."""
    rng = canvas.rng
    canvas.disc((at[0] + 0.55 * radius, at[1] + 0.4 * radius), radius, (14, 20, 22, 110))
    base = np.array([46, 78, 38]) + rng.normal(0, 7, 3) + rng.normal(0, 6)
    canvas.disc(at, 0.86 * radius, shade(tuple(base), 0.78), "trees")
    for _ in range(int(9 + 2 * radius)):
        turn, out = rng.uniform(0, 2 * np.pi), radius * np.sqrt(rng.uniform(0, 0.75))
        x, y = np.cos(turn) * out, np.sin(turn) * out
        lit = -(x * SUN[0] + y * SUN[1]) / (radius * np.hypot(*SUN))
        canvas.disc(
            (at[0] + x, at[1] + y),
            radius * rng.uniform(0.18, 0.34),
            shade(tuple(base), 1.0 + 0.35 * lit + rng.normal(0, 0.07)),
            "trees",
        )


def pool(canvas: Canvas, at: Point) -> None:
    """A swimming pool with a paved rim: a rectangle or two rounded basins."""
    rng = canvas.rng
    width, depth = rng.uniform(6.5, 9.5), rng.uniform(3.4, 4.6)
    if rng.random() < 0.5:
        width, depth = depth, width
    water = (int(rng.integers(48, 90)), int(rng.integers(160, 190)), int(rng.integers(190, 215)))
    rim = (196, 190, 178)
    if rng.random() < 0.6:
        angle = rng.normal(0, 0.08)
        canvas.polygon(rectangle(at, width + 2.4, depth + 2.4, angle), rim)
        canvas.polygon(rectangle(at, width, depth, angle), water, "pool")
        edge = rectangle((at[0] - 0.2, at[1] - depth / 2 + 0.35), width - 0.6, 0.5, angle)
        canvas.polygon(edge, shade(water, 0.82), "pool")
        return
    shift = (0.25 * width, 0.0) if width > depth else (0.0, 0.25 * depth)
    for grown, colour, part in ((1.2, rim, ""), (0.0, water, "pool")):
        for sign in (-1, 1):
            where = (at[0] + sign * shift[0], at[1] + sign * shift[1])
            canvas.disc(where, 0.55 * min(width, depth) + grown, colour, part)


def car(canvas: Canvas, at: Point, lengthways: bool, part: str = "") -> None:
    """A car seen from above; traffic belongs to the busy road."""
    colour = CARS[canvas.rng.integers(len(CARS))]
    size = (1.9, 4.4) if lengthways else (4.4, 1.9)
    canvas.polygon(rectangle((at[0] + 0.4, at[1] + 0.3), *size), (15, 15, 20, 90))
    canvas.polygon(rectangle(at, *size), colour, part)
    canvas.polygon(rectangle(at, 0.62 * size[0], 0.45 * size[1]), shade(colour, 0.55), part)


def street(canvas: Canvas, busy: bool) -> float:
    """The street along the lower edge; returns the y at which the lots begin."""
    rng = canvas.rng
    width = rng.uniform(13.5, 16.0) if busy else rng.uniform(6.0, 7.5)
    top = METRES - width
    grey = int(rng.integers(74, 90) if busy else rng.integers(112, 134))
    canvas.polygon([(0, top - 2.6), (METRES, top - 2.6), (METRES, top - 1.2), (0, top - 1.2)],
                   (178, 174, 166))  # fmt: skip
    canvas.polygon([(0, top), (METRES, top), (METRES, METRES), (0, METRES)],
                   (grey, grey, grey + 3), "busy road" if busy else "")  # fmt: skip
    if busy:
        middle = top + width / 2
        lines = [(middle - 0.35, (206, 180, 70), 0.0), (middle + 0.35, (206, 180, 70), 0.0)]
        lines += [(top + f * width, (214, 214, 214), 1.0) for f in (0.27, 0.73)]
        for y, colour, dashed in lines:
            for x in np.arange(-2, METRES, 6.0) if dashed else [0.0]:
                length = 3.0 if dashed else METRES
                canvas.polygon(rectangle((x + length / 2, y), length, 0.3), colour, "busy road")
    for _ in range(rng.integers(2, 6) if busy else rng.integers(0, 3)):
        at = (rng.uniform(2, METRES - 2), rng.uniform(top + 1.4, METRES - 1.4))
        car(canvas, at, False, "busy road" if busy else "")
    return top - 2.6


def clutter(canvas: Canvas, yard: tuple[float, float, float, float]) -> None:
    """Things in a garden that no price depends on; some are as blue as a pool."""
    rng = canvas.rng
    x0, y0, x1, y1 = yard
    for _ in range(rng.integers(0, 4)):
        at = (rng.uniform(x0, x1), rng.uniform(y0, y1))
        kind = rng.integers(4)
        if kind == 0:
            blue = rng.random() < 0.5
            canvas.polygon(rectangle((at[0] + 0.7, at[1] + 0.5), 3, 2.4), (15, 18, 24, 90))
            canvas.polygon(rectangle(at, 3, 2.4), (70, 110, 160) if blue else (150, 140, 128))
        elif kind == 1:
            canvas.disc(at, 1.9, (60, 90, 170))
            canvas.disc(at, 1.5, (36, 38, 42))
        elif kind == 2:
            canvas.polygon(rectangle(at, *rng.uniform(2.5, 5, 2)), (172, 160, 142))
        else:
            for _ in range(6):
                spot = (at[0] + rng.normal(0, 1.2), at[1] + rng.normal(0, 1.2))
                canvas.disc(spot, rng.uniform(0.6, 1.6), (134, 116, 84, 150))


def draw_tile(
    lot: Lot, pixels: int, rng: np.random.Generator
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """One tile.

    Args:
        lot: what it shows.
        pixels: the side of the tile.
        rng: of everything that the lot leaves open.

    Returns:
        Image uint8 [pixels, pixels, 3] and masks bool [4, pixels, pixels] in the order of PARTS.
    """
    canvas = Canvas(pixels, rng)
    canvas.textured()
    front = street(canvas, lot.busy)
    gap = {"detached": rng.uniform(3.0, 6.0), "semi": rng.uniform(2.4, 3.6), "townhouse": 0.3}
    aspect = {"detached": rng.uniform(1.0, 1.5), "semi": 0.75, "townhouse": 0.55}[lot.kind]
    width = float(np.sqrt(lot.footprint * aspect))
    depth = lot.footprint / width
    middle = METRES / 2 + rng.normal(0, 0.8)
    setback = rng.uniform(3.5, 6.0)
    house = (middle, front - setback - depth / 2)
    back = house[1] - depth / 2
    pitch = width + gap[lot.kind]
    # Fences between the lots and at their end.
    end = max(1.0, back - rng.uniform(13, 19))
    for side in (-1.5, -0.5, 0.5, 1.5):
        x = middle + side * pitch
        canvas.polygon(rectangle((x, (end + back) / 2), 0.25, back - end), (120, 104, 84))
    canvas.polygon(rectangle((METRES / 2, end), METRES, 0.25), (120, 104, 84))
    yard = (middle - pitch / 2 + 2.5, end + 2.5, middle + pitch / 2 - 2.5, back - 2.5)
    for side in (-2, -1, 1, 2):
        clutter(canvas, (yard[0] + side * pitch, yard[1], yard[2] + side * pitch, yard[3]))
    clutter(canvas, yard)
    if lot.pool:
        # In a garden narrower than the pool it reaches over the fence, as no real one does.
        at = (middle + rng.normal(0, 1.0), float(np.clip(back - rng.uniform(5, 9), end + 4, back)))
        pool(canvas, at)
    for side in (-3, -2, -1, 1, 2, 3, 0):
        x = middle + side * pitch
        own = side == 0
        grow = 1.0 if own else rng.uniform(0.85, 1.15)
        y = house[1] + (0 if own else rng.normal(0, 0.7))
        drive = x + 0.28 * width * (1 if rng.random() < 0.5 else -1)
        canvas.polygon(
            [(drive - 1.5, y), (drive + 1.5, y), (drive + 1.5, front + 2.4),
             (drive - 1.5, front + 2.4)], (160, 156, 150),
        )  # fmt: skip
        if rng.random() < 0.4:
            car(canvas, (drive, front - 2.6), True)
        angle = rng.normal(0, 0.03) if lot.kind == "detached" else 0.0
        size = (width * min(grow, 1.0 + gap[lot.kind] / width / 2), depth * grow)
        roof(canvas, (x, y), *size, angle, 3.0 + 2.2 * lot.storeys, "roof" if own else "")
    # Roofs of the street behind.
    for x in np.arange(rng.uniform(-6, 4), METRES + 6, width + 5):
        roof(canvas, (x, end - rng.uniform(12, 15)), width, depth, 0.0, 6.0, "")
    for _ in range(lot.trees):
        radius = rng.uniform(1.6, 4.0)
        at = (rng.uniform(0, METRES), rng.uniform(0, front + 1.5))
        if abs(at[0] - house[0]) < 0.5 * width and abs(at[1] - house[1]) < 0.5 * depth:
            continue  # a crown may hang over the house's edge, but does not stand on it
        tree(canvas, at, radius)
    return finished(canvas, pixels)


def finished(canvas: Canvas, pixels: int) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """The tile as a sensor gives it: averaged, hazy, noisy, in any of the four directions."""
    rng = canvas.rng
    small = canvas.image.reduce(FINER).filter(ImageFilter.GaussianBlur(0.4))
    values: NDArray[np.floating] = np.asarray(small, np.float32)
    haze = rng.uniform(0.0, 0.12)
    values = (values * rng.uniform(0.88, 1.1) + rng.normal(0, 2, 3)) * (1 - haze) + 190 * haze
    values += rng.normal(0, 3.5, values.shape)
    shown = np.asarray(canvas.parts)
    full = [Image.fromarray((shown == _number(part)).view(np.uint8) * 255) for part in PARTS]
    # More than half of a pixel: never two parts.
    masks = np.stack([np.asarray(mask.reduce(FINER)) > 128 for mask in full])
    turns = int(rng.integers(4))
    image = np.rot90(values.clip(0, 255).astype(np.uint8), turns)
    masks = np.rot90(masks, turns, (1, 2))
    assert image.shape == (pixels, pixels, 3)
    return np.ascontiguousarray(image), np.ascontiguousarray(masks)
