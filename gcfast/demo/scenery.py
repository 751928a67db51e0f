"""Places for a bird: the background, what is near it, and what it stands on.

Distance is blur: the far layer is painted small and enlarged, the middle one blurred a little, the
near one drawn sharp at twice the size and reduced. Every place has berries, petals and leaves in
the colors of the parts, whatever the species.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from gcfast.demo.brush import Array, Brush, Rgb, noise, rgb, to_inks

# Background colors: top, bottom and the two tones of what is scattered between them.
_PALETTES: dict[str, list[tuple[Rgb, Rgb, Rgb, Rgb]]] = {
    "foliage": [
        ((120, 150, 80), (48, 72, 36), (96, 132, 58), (38, 58, 30)),
        ((168, 150, 82), (88, 70, 38), (176, 132, 60), (70, 58, 34)),
    ],
    "blossom": [
        ((170, 186, 178), (110, 136, 104), (150, 168, 128), (84, 110, 78)),
        ((196, 186, 190), (128, 132, 120), (176, 168, 166), (98, 108, 92)),
    ],
    "sky": [
        ((120, 168, 214), (206, 220, 228), (236, 238, 238), (176, 200, 218)),
        ((190, 190, 196), (226, 216, 206), (240, 232, 222), (168, 172, 182)),
    ],
    "bokeh": [
        ((58, 76, 62), (26, 34, 30), (150, 164, 96), (86, 108, 78)),
        ((96, 80, 66), (38, 32, 34), (206, 168, 104), (120, 98, 78)),
    ],
    "grass": [
        ((150, 168, 118), (92, 116, 56), (132, 152, 76), (66, 88, 40)),
        ((188, 172, 122), (132, 112, 66), (198, 176, 112), (98, 84, 48)),
    ],
    "reeds": [
        ((150, 168, 168), (120, 112, 76), (186, 164, 106), (96, 96, 66)),
        ((196, 184, 158), (104, 118, 112), (176, 150, 98), (112, 98, 66)),
    ],
    "bark": [
        ((104, 124, 84), (62, 72, 50), (120, 140, 88), (48, 56, 40)),
        ((150, 146, 132), (90, 84, 74), (128, 122, 104), (72, 66, 58)),
    ],
    "rocks": [
        ((148, 172, 188), (92, 104, 110), (128, 134, 132), (84, 90, 94)),
        ((178, 170, 156), (120, 110, 98), (150, 140, 124), (92, 86, 80)),
    ],
}
_CLUNG = ("bark", "reeds")


@dataclass(frozen=True)
class Place:
    """A kind of place, one of its palettes, and where it supports the bird: below or ahead."""

    kind: str
    tones: Array  # [4, 3]
    support: str


def draw_place(rng: np.random.Generator) -> Place:
    """Draw a place."""
    kinds = list(_PALETTES)
    kind = kinds[int(rng.integers(len(kinds)))]
    palettes = _PALETTES[kind]
    tones = np.array(palettes[int(rng.integers(len(palettes)))], dtype=np.float64)
    tones = tones * (0.9 + 0.2 * rng.random((1, 3)))
    return Place(kind, tones, "ahead" if kind in _CLUNG else "below")


def paint(rng: np.random.Generator, place: Place, size: int, feet: Array, *, toward: int) -> Array:
    """Paint the place without its bird, float32 [size, size, 3] in [0, 255].

    Args:
        rng: source of all draws.
        place: from :func:`draw_place`.
        size: pixels a side.
        feet: [2, 2], (x, y) of the feet in pixels; the perch passes through them.
        toward: 1 if the trunk that a bird clings to is to the right of its feet, -1 if left.
    """
    brush = _Scene(rng, place, size, feet, toward)
    brush.far()
    brush.middle()
    return brush.near()


class _Scene(Brush):
    """Paints one picture; holds the generator, the place and the sizes that all steps share."""

    def __init__(
        self, rng: np.random.Generator, place: Place, size: int, feet: Array, toward: int
    ) -> None:
        super().__init__(rng, size, place.tones)
        self.place = place
        self.feet = feet
        self.toward = toward
        self.canvas = Image.new("RGB", (size, size))

    # Layers.

    def far(self) -> None:
        """Paint light and large shapes, far out of focus, at a third of the size."""
        rng, third = self.rng, self.size // 3
        top, bottom, light, dark = self.tones
        ramp = np.linspace(0, 1, third)[:, None, None] ** (0.7 + 0.8 * rng.random())
        drift = noise(rng, 4, (third, third), smooth=True)[..., None] - 0.5
        base = top + (bottom - top) * np.clip(ramp + 0.5 * drift, 0, 1)
        canvas = Image.fromarray(base.clip(0, 255).astype(np.uint8))
        pen = ImageDraw.Draw(canvas)
        n = {"sky": 6, "rocks": 10}.get(self.place.kind, 26)
        at = rng.random((n, 2)) * third
        shares = rng.random((n, 1))
        inks = to_inks(dark + (light - dark) * shares)
        radii = third * (0.03 + 0.09 * rng.random(n))
        flat = 0.35 if self.place.kind in ("sky", "rocks") else 1.0
        for (x, y), ink, r in zip(at.tolist(), inks, radii.tolist(), strict=True):
            pen.ellipse((x - r / flat, y - r * flat, x + r / flat, y + r * flat), fill=ink)
        spots = int(rng.integers(2, 7))
        self.accents(pen, rng.random((spots, 2)) * third, large=0.6, faded=0.35)
        canvas = canvas.filter(ImageFilter.GaussianBlur(third * (0.02 + 0.03 * rng.random())))
        self.canvas = canvas.resize((self.size, self.size), Image.Resampling.BICUBIC)
        if self.place.kind == "bokeh":
            self._discs()

    def _discs(self) -> None:
        """Paint points of light out of focus: transparent discs with a brighter rim."""
        rng, size = self.rng, self.size
        n = 16
        colors = self.tones[2] * (0.7 + 0.6 * rng.random((n, 1)))
        accent = rng.random(n) < 0.35
        colors[accent] = self.accent_colors(int(accent.sum()))
        pen = ImageDraw.Draw(self.canvas, "RGBA")
        for (x, y), r, color in zip(
            (rng.random((n, 2)) * size).tolist(),
            (size * (0.03 + 0.05 * rng.random(n))).tolist(),
            colors,
            strict=True,
        ):
            pen.ellipse(
                (x - r, y - r, x + r, y + r),
                fill=(*rgb(color), 110),
                outline=(*rgb(color * 1.2 + 10), 150),
            )

    def middle(self) -> None:
        """Paint twigs, stems and leaves a little out of focus."""
        rng, size, kind = self.rng, self.size, self.place.kind
        _, _, light, dark = self.tones
        pen = ImageDraw.Draw(self.canvas)
        if kind in ("foliage", "blossom", "bokeh", "bark", "sky"):
            for _ in range(3 if kind != "sky" else 2):
                self.twig(pen, 1.0, leafy=kind in ("foliage", "blossom"))
        if kind in ("grass", "reeds"):
            n = 46 if kind == "grass" else 26
            self.stand(pen, n, (0.35, 0.95), 1.0)
        if kind == "rocks":
            self._stones(pen, 3, 0.55)
        if kind in ("foliage", "blossom"):
            n = 30
            mix = rng.random((n, 1))
            self.leaves(
                pen,
                rng.random((n, 2)) * size,
                rng.random(n) * 2 * math.pi,
                size * (0.08 + 0.10 * rng.random(n)),
                dark * 1.1 + (light - dark) * mix,
            )
        low = 0.45 if kind in ("grass", "rocks") else 0.0
        at = rng.random((int(rng.integers(3, 7)), 2)) * (size, size * (1 - low)) + (0, size * low)
        self.accents(pen, at, faded=0.1)
        self.canvas = self.canvas.filter(
            ImageFilter.BoxBlur(size / 144 * (0.8 + 0.9 * rng.random()))
        )

    def near(self) -> Array:
        """Paint the perch and its surroundings, in focus."""
        size, kind = self.size, self.place.kind
        sheet = self.canvas.resize((2 * size, 2 * size), Image.Resampling.NEAREST)
        pen = ImageDraw.Draw(sheet)
        if kind == "grass":
            self._ground(pen)
        elif kind == "rocks":
            self._rock(pen)
        elif kind == "bark":
            self._trunk(sheet)
        elif kind == "reeds":
            self._stem(pen)
        else:
            self._branch(pen, leafy=kind in ("foliage", "blossom", "bokeh"))
        self._garnish(pen)
        out: Array = np.asarray(sheet.reduce(2), dtype=np.float32)
        return out

    # Parts of the layers.

    def _garnish(self, pen: ImageDraw.ImageDraw) -> None:
        """Paint the near accents: on stalks if plants grow from the ground, else on thin twigs."""
        rng, size = self.rng, self.size
        if self.place.kind in ("grass", "rocks", "reeds"):
            n = int(rng.integers(4, 9))
            heads = rng.random((n, 2)) * (size, 0.75 * size) + (0, 0.25 * size)
            roots = heads + np.stack(
                [(rng.random(n) - 0.5) * 0.15 * size, size * (0.1 + 0.5 * rng.random(n))], 1
            )
            stalk = self.tones[3] * 0.5 + np.array([40, 56, 22])
            self.blades(
                pen, heads, roots, np.full(n, 0.012 * size), np.repeat(stalk[None], n, 0), scale=2.0
            )
            self.accents(pen, heads, scale=2.0)
            return
        for _ in range(int(rng.integers(2, 4))):
            path = self.twig(pen, 2.0, leafy=True, thin=True)
            picks = path[3 + rng.integers(len(path) - 3, size=int(rng.integers(1, 4)))]
            self.accents(pen, picks + (rng.random(picks.shape) - 0.5) * 0.05 * size, scale=2.0)

    def _branch(self, pen: ImageDraw.ImageDraw, *, leafy: bool) -> None:
        rng, size = self.rng, self.size
        (fx, fy), slope = self.feet.mean(0).tolist(), 0.30 * (rng.random() - 0.5)
        thick = size * (0.035 + 0.035 * rng.random())
        x = np.linspace(-0.05, 1.05, 12) * size
        # No bend at the feet, so that they always stand on wood.
        bend = size * 0.05 * np.sin((x - fx) / size * 5) * (rng.random() - 0.5) * 2
        y = fy + slope * (x - fx) + bend + 0.5 * thick
        half = 0.5 * thick * (1 + 0.25 * (rng.random(12) - 0.5))
        wood = np.array([[104, 86, 68], [120, 112, 104], [84, 66, 54]][int(rng.integers(3))])
        wood = wood * (0.8 + 0.4 * rng.random())
        bands = ((1.0, -1.0, 0.72), (0.45, -1.0, 1.0), (-0.35, -1.0, 1.22))
        for low, high, tone in bands:
            edge = np.concatenate(
                [np.stack([x, y + high * half], 1), np.stack([x, y + low * half], 1)[::-1]]
            )
            pen.polygon((2 * edge).ravel().tolist(), fill=rgb(wood * tone))
        for k in range(24):
            i, v = rng.random(), 2 * rng.random() - 1
            px = float(i * size)
            py = float(np.interp(px, x, y) + v * 0.75 * np.interp(px, x, half))
            pen.line(
                (2 * px, 2 * py, 2 * px + size * 0.05, 2 * py + slope * size * 0.05),
                fill=rgb(wood * (0.66 if k % 3 else 1.25)),
                width=2,
            )
        for _ in range(3):
            at = rng.random() * size
            root = np.array([at, np.interp(at, x, y)])
            tip = root + size * np.array(
                [0.5 * (rng.random() - 0.5), -0.2 if rng.random() < 0.5 else 0.16]
            )
            pen.line((2 * np.stack([root, tip])).ravel().tolist(), fill=rgb(wood * 0.9), width=4)
            if leafy:
                n = 4
                t = rng.random((n, 1))
                light, dark = self.tones[2], self.tones[3]
                colors = dark * 1.3 + (light * 1.1 - dark) * rng.random((n, 1))
                self.leaves(
                    pen,
                    root + (tip - root) * t,
                    rng.random(n) * 6.28,
                    size * (0.07 + 0.08 * rng.random(n)),
                    colors,
                    scale=2.0,
                )

    def _ground(self, pen: ImageDraw.ImageDraw) -> None:
        rng, size = self.rng, self.size
        fy = float(self.feet[:, 1].mean())
        light, dark = self.tones[2], self.tones[3]
        x = np.linspace(-0.05, 1.05, 9) * size
        y = fy - size * 0.015 + size * 0.03 * (rng.random(9) - 0.5)
        soil = 0.55 * dark + 0.45 * np.array([104, 84, 60])
        edge = np.concatenate(
            [np.stack([x, y], 1), [[1.05 * size, 1.1 * size], [-0.05 * size, 1.1 * size]]]
        )
        pen.polygon((2 * edge).ravel().tolist(), fill=rgb(soil))
        n = 60
        roots = np.stack([rng.random(n) * size, fy + rng.random(n) * (size * 1.05 - fy)], 1)
        # Behind the feet blades may be tall; in front they stay below them.
        order = np.argsort(roots[:, 1])
        roots = roots[order]
        away = np.abs(roots[:, 0] - self.feet[:, 0].mean()) > 0.2 * size
        heights = np.where(away, size * (0.06 + 0.2 * rng.random(n)), 0.8 * (roots[:, 1] - fy))
        tips = roots + np.stack([(rng.random(n) - 0.5) * 0.15 * size, -heights], 1)
        colors = dark + (light * 1.1 - dark) * rng.random((n, 1))
        self.blades(pen, roots, tips, size * (0.012 + 0.02 * rng.random(n)), colors, scale=2.0)
        pen.ellipse(
            [
                2 * float(v)
                for v in (
                    self.feet[:, 0].min() - 0.1 * size,
                    fy - 0.012 * size,
                    self.feet[:, 0].max() + 0.1 * size,
                    fy + 0.035 * size,
                )
            ],
            fill=rgb(soil * 0.62),
        )

    def _stones(self, pen: ImageDraw.ImageDraw, n: int, horizon: float) -> None:
        rng, size = self.rng, self.size
        for k in range(n):
            center = np.array([rng.random(), horizon + 0.12 * k + 0.1 * rng.random()]) * size
            self.boulder(pen, center, size * (0.18 + 0.16 * rng.random()), 1.0)

    def _rock(self, pen: ImageDraw.ImageDraw) -> None:
        """Paint a ledge under the feet and stones around it."""
        rng, size = self.rng, self.size
        fx, fy = self.feet.mean(0).tolist()
        light, dark = self.tones[2], self.tones[3]
        tone = dark + (light - dark) * (0.3 + 0.5 * rng.random())
        x = np.array([-0.1, 0.18, 0.34, 0.5, 0.66, 0.84, 1.1]) * size + (fx - 0.5 * size) * 0.6
        x[[0, -1]] = (-0.1 * size, 1.1 * size)
        y = fy + size * 0.02 + np.abs(x - fx) * (0.15 + 0.3 * rng.random(7))
        y[np.abs(x - fx) < 0.24 * size] = fy - 0.004 * size
        for drop, gain in ((0.0, 1.18), (0.045, 0.95), (0.16, 0.78)):
            top = np.stack([x, y + drop * size * (0.7 + 0.6 * rng.random(7))], 1)
            if drop == 0.0:
                top[:, 1] = y
            edge = np.concatenate([top, [[1.2 * size, 1.2 * size], [-0.2 * size, 1.2 * size]]])
            pen.polygon((2 * edge).ravel().tolist(), fill=rgb(tone * gain))
        self.boulder(pen, np.array([rng.random() * size, 0.98 * size]), 0.16 * size, 2.0)
        for _ in range(26):
            px = rng.random() * size
            low = float(np.interp(px, x, y))
            py = low + rng.random() * (size - low)
            r = size * 0.006 * (0.5 + rng.random())
            pen.ellipse(
                [2 * float(v) for v in (px - 1.6 * r, py - r, px + 1.6 * r, py + r)],
                fill=rgb(tone * (0.62 + 0.7 * rng.random())),
            )

    def _trunk(self, sheet: Image.Image) -> None:
        """Paint a trunk that the bird clings to, on the side that its feet point to."""
        rng, size = self.rng, self.size
        (x0, y0), (x1, y1) = self.feet.tolist()
        side = self.toward
        lean = (x1 - x0) / (y1 - y0) if abs(y1 - y0) > 1e-6 else 0.0
        rows = np.linspace(-0.05, 1.05, 9) * size
        rim = x0 + lean * (rows - y0)
        wide = size * (0.30 + 0.25 * rng.random())
        edge = np.concatenate(
            [np.stack([rim, rows], 1), np.stack([rim + side * wide, rows], 1)[::-1]]
        )
        mask = Image.new("L", sheet.size)
        ImageDraw.Draw(mask).polygon((2 * edge).ravel().tolist(), fill=255)
        wood = np.array([[112, 94, 76], [138, 132, 124], [92, 78, 66]][int(rng.integers(3))])
        grain = 0.55 + 0.9 * (
            0.65 * noise(rng, (7, 34), (size, size)) + 0.35 * noise(rng, (20, 60), (size, size))
        )
        across = (np.arange(size)[None] - rim.mean()) * side / wide
        round_ = 1.12 - 1.0 * np.abs(across - 0.42)
        bark = (wood * (grain * np.clip(round_, 0.4, 1.2))[..., None]).clip(0, 255)
        plate = Image.fromarray(bark.astype(np.uint8)).resize(sheet.size)
        sheet.paste(plate, mask=mask)

    def _stem(self, pen: ImageDraw.ImageDraw) -> None:
        rng, size = self.rng, self.size
        self.stand(pen, 7, (0.3, 0.8), 2.0)
        (x0, y0), (x1, y1) = self.feet.tolist()
        lean = (x1 - x0) / (y1 - y0) if abs(y1 - y0) > 1e-6 else 0.0
        rows = np.array([-0.05, 1.05]) * size
        cane = np.stack([x0 + lean * (rows - y0), rows], 1) + np.array(
            [self.toward * 0.008 * size, 0]
        )
        tone = self.tones[2] * (0.8 + 0.3 * rng.random())
        wide = size * (0.02 + 0.016 * rng.random())
        for shift, share, gain in ((0.0, 1.0, 0.72), (-0.12, 0.7, 1.0), (-0.2, 0.25, 1.2)):
            pen.line(
                (2 * (cane + np.array([shift * wide, 0]))).ravel().tolist(),
                fill=rgb(tone * gain),
                width=max(1, round(2 * wide * share)),
            )
        for knot in rng.random(3) * size:
            at = x0 + lean * (knot - y0) + self.toward * 0.008 * size
            pen.line(
                [2 * float(v) for v in (at - 0.6 * wide, knot, at + 0.6 * wide, knot)],
                fill=rgb(tone * 0.6),
                width=3,
            )
            n = 2
            root = np.repeat([[at, knot]], n, 0)
            tip = root + size * (rng.random((n, 2)) - (0.5, 0.7)) * (0.9, 0.5)
            self.blades(
                pen,
                root,
                tip,
                np.full(n, 0.03 * size),
                tone * (0.7 + 0.4 * rng.random((n, 1))),
                scale=2.0,
            )
