"""The bird: outlines in its own frame, a pose, and the map of regions they draw.

The bird is drawn as an image of region numbers. Colors come from a table of one color per region,
so two species differ in that table only, and the visible mask of any part is a look-up in the same
image.

Frames: lengths in units of the body, x to the front, y down, the bird facing right.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image, ImageDraw

Array = np.ndarray
# Takes points [..., 2] of the body or the head to where the pose has them.
Frame = Callable[[ArrayLike], Array]

# Region numbers; 0 is no bird.
BACK, BELLY, FLANK, WING, WING_EDGE, PRIMARY, FACE, STREAK, EYE, GLINT = range(1, 11)
BILL, BILL_LINE, CROWN, CROWN_LINE, RING, THROAT, THROAT_LINE = range(11, 18)
BREAST, BREAST_LINE, BAR, BAR_LINE, RUMP, RUMP_LINE = range(18, 24)
TAIL, TAIL_LINE, LEGS, LEGS_LINE = range(24, 28)
N_REGIONS = 28

# A part's first region has its color, the second the shade of its feather strokes.
REGIONS: dict[str, tuple[int, int]] = {
    "crown": (CROWN, CROWN_LINE),
    "bill": (BILL, BILL_LINE),
    "eye-ring": (RING, RING),
    "throat": (THROAT, THROAT_LINE),
    "breast": (BREAST, BREAST_LINE),
    "wing-bar": (BAR, BAR_LINE),
    "rump": (RUMP, RUMP_LINE),
    "tail": (TAIL, TAIL_LINE),
    "legs": (LEGS, LEGS_LINE),
}

_BODY = [(0.36, -0.27), (0.08, -0.31), (-0.24, -0.23), (-0.47, -0.08), (-0.54, 0.05), (-0.36, 0.17),
         (-0.05, 0.29), (0.24, 0.28), (0.45, 0.13), (0.53, -0.05), (0.49, -0.20)]  # fmt: skip
_BELLY = [(0.42, 0.14), (0.24, 0.275), (-0.05, 0.285), (-0.36, 0.165), (-0.52, 0.06),
          (-0.25, 0.10), (0.10, 0.12), (0.30, 0.08)]  # fmt: skip
_FLANK = [(0.48, 0.10), (0.24, 0.22), (-0.05, 0.22), (-0.40, 0.13), (-0.52, 0.05),
          (-0.25, 0.02), (0.10, 0.04), (0.34, 0.0)]  # fmt: skip
_BREAST = [(0.60, -0.06), (0.56, 0.12), (0.36, 0.29), (0.16, 0.31), (0.20, 0.14), (0.28, 0.02),
           (0.38, -0.08)]  # fmt: skip
_RUMP = [(-0.17, -0.30), (-0.32, -0.27), (-0.50, -0.13), (-0.60, 0.02), (-0.50, 0.05),
         (-0.38, -0.01), (-0.22, -0.13)]  # fmt: skip
_WING = [(0.33, -0.06), (0.25, -0.17), (0.04, -0.19), (-0.22, -0.10), (-0.46, 0.06),
         (-0.68, 0.17), (-0.40, 0.17), (-0.12, 0.18), (0.14, 0.15), (0.30, 0.06)]  # fmt: skip
_PRIMARY = [(-0.08, 0.03), (-0.28, 0.02), (-0.48, 0.09), (-0.68, 0.17), (-0.40, 0.165),
            (-0.16, 0.165), (-0.04, 0.12)]  # fmt: skip
_BARS = [
    [(0.20, -0.17), (0.12, -0.185), (0.10, -0.10), (0.055, 0.02), (0.01, 0.145), (0.085, 0.15),
     (0.135, 0.04), (0.17, -0.06)],
    [(0.03, -0.17), (-0.04, -0.155), (-0.07, -0.06), (-0.11, 0.03), (-0.16, 0.13), (-0.09, 0.15),
     (-0.04, 0.05), (0.0, -0.05)],
]  # fmt: skip
# In the frame of the head, whose radius is about 0.22.
_HEAD = [(0.20, -0.02), (0.155, -0.135), (0.04, -0.205), (-0.10, -0.195), (-0.20, -0.10),
         (-0.225, 0.04), (-0.14, 0.19), (0.02, 0.215), (0.15, 0.15), (0.205, 0.06)]  # fmt: skip
_CROWN = [(0.205, -0.03), (0.16, -0.14), (0.05, -0.212), (-0.09, -0.212), (-0.215, -0.12),
          (-0.24, -0.01), (-0.13, -0.06), (0.0, -0.10), (0.12, -0.07)]  # fmt: skip
_FACE = [(0.19, 0.0), (0.06, -0.03), (-0.10, -0.01), (-0.16, 0.07), (-0.07, 0.14), (0.08, 0.12),
         (0.18, 0.06)]  # fmt: skip
_THROAT = [(0.19, 0.06), (0.10, 0.075), (-0.01, 0.13), (-0.03, 0.25), (0.06, 0.35), (0.19, 0.33),
           (0.26, 0.20)]  # fmt: skip
_UPPER_BILL = [(0.155, -0.055), (0.26, -0.035), (0.36, 0.02), (0.42, 0.065), (0.28, 0.045),
               (0.15, 0.045)]  # fmt: skip
_LOWER_BILL = [(0.15, 0.035), (0.28, 0.04), (0.385, 0.06), (0.28, 0.085), (0.15, 0.085)]
_HEAD_AT = (0.43, -0.29)
_EYE_AT = (0.065, -0.025)


@dataclass(frozen=True)
class Pose:
    """How one bird sits; angles in radians, lengths in body units, ``unit`` in pixels.

    ``support`` is "below" (branch, ground) or "ahead" (a stem or trunk that the bird clings to).
    """

    unit: float
    facing: int
    body_angle: float
    head_angle: float
    looks_back: bool
    tail_angle: float
    support: str
    plump: float
    bill_length: float
    tail_length: float
    leg: float
    crest: float
    streaks: Array  # [n, 2] positions along and across the flank, in [0, 1]


@dataclass(frozen=True)
class Figure:
    """A drawn bird: region numbers uint8 [h, w] supersampled, and the position of its feet.

    ``feet`` [2, 2] are (x, y) in output pixels from the top left corner of ``regions``.
    """

    regions: Image.Image
    feet: Array


def draw_pose(rng: np.random.Generator, size: int, support: str) -> Pose:
    """Draw a pose for a picture of ``size`` pixels a side; takes the same draws for every pose."""
    u = rng.random(11)
    clinging = support == "ahead"
    low, high = (0.75, 1.25) if clinging else (-0.05, 0.75)
    body = low + (high - low) * u[0]
    return Pose(
        unit=size * (0.36 + 0.11 * u[1]),
        facing=1 if u[2] < 0.5 else -1,
        body_angle=body,
        head_angle=(0.35 if clinging else 0.0) + 0.75 * (u[3] - 0.45),
        looks_back=bool(u[4] < 0.18),
        tail_angle=0.55 * (u[5] - 0.55),
        support=support,
        plump=0.92 + 0.22 * u[6],
        bill_length=0.85 + 0.4 * u[7],
        tail_length=0.44 + 0.20 * u[8],
        leg=0.24 + 0.08 * u[9],
        crest=max(0.0, 0.14 * (u[10] - 0.5)),
        streaks=rng.random((26, 2)),
    )


@cache
def _basis(n: int, steps: int) -> Array:
    """Return samples of a closed Catmull-Rom curve as weights [n * steps, n] on its points."""
    t = np.arange(steps) / steps
    blend = 0.5 * np.stack(
        [-t + 2 * t**2 - t**3, 2 - 5 * t**2 + 3 * t**3, t + 4 * t**2 - 3 * t**3, -(t**2) + t**3],
        axis=1,
    )  # [steps, 4]
    basis = np.zeros((n * steps, n))
    for i in range(n):
        for j in range(4):
            basis[i * steps : (i + 1) * steps, (i + j - 1) % n] += blend[:, j]
    return basis


def smooth(points: Array, steps: int = 5) -> Array:
    """Return a smooth closed outline [n * steps, 2] through points [n, 2]."""
    curve: Array = _basis(len(points), steps) @ points
    return curve


def _rotation(angle: float) -> Array:
    """Return [2, 2] for row vectors; a positive angle lifts the bird's front (y is down)."""
    c, s = math.cos(angle), math.sin(angle)
    return np.array([[c, -s], [s, c]])


class _Pen:
    """Collects shapes in body units, then draws them at the scale of the picture."""

    def __init__(self) -> None:
        # (kind, region, width or radius, counts for the outline of the bird), and its points.
        self.shapes: list[tuple[str, int, float, bool]] = []
        self.points: list[Array] = []

    def polygon(self, points: Array, region: int, *, silhouette: bool = False) -> None:
        self._add("polygon", points, region, 0.0, silhouette)

    def line(self, points: Array, region: int, width: float, *, silhouette: bool = False) -> None:
        self._add("line", points, region, width, silhouette)

    def strokes(self, starts: Array, run: tuple[float, float], region: int, frame: Frame) -> None:
        """Draw short feather strokes from starts [n, 2] along ``run``, both in the given frame."""
        ends = frame(np.stack([starts, starts + np.array(run)], axis=1))
        for stroke in ends:
            self._add("line", stroke, region, 0.014, False)

    def disc(self, center: Array, region: int, radius: float) -> None:
        self._add("disc", center[None], region, radius, False)

    def _add(self, kind: str, points: Array, region: int, width: float, solid: bool) -> None:
        self.shapes.append((kind, region, width, solid))
        self.points.append(points)

    def render(self, scale: float, facing: int, supersample: int) -> tuple[Image.Image, Array]:
        """Return region numbers, cropped to the bird, and the crop's corner [2] in those pixels."""
        counts = [len(points) for points in self.points]
        at = np.concatenate(self.points) * (facing * scale, scale)
        solid = at[np.repeat([shape[3] for shape in self.shapes], counts)]
        pad = 0.10 * scale
        low = np.floor((solid.min(0) - pad) / supersample) * supersample
        high = solid.max(0) + pad
        width, height = (math.ceil(v / supersample) * supersample for v in (high - low).tolist())
        regions = Image.new("L", (width, height))
        silhouette = Image.new("L", (width, height))
        inner, outer = ImageDraw.Draw(regions), ImageDraw.Draw(silhouette)
        flat = (at - low).ravel().tolist()
        first = 0
        for (kind, region, breadth, is_solid), count in zip(self.shapes, counts, strict=True):
            outline = flat[2 * first : 2 * (first + count)]
            first += count
            for pen, ink in ((inner, region), (outer, 255)):
                if pen is outer and not is_solid:
                    continue
                if kind == "polygon":
                    pen.polygon(outline, fill=ink)
                elif kind == "line":
                    pen.line(outline, fill=ink, width=max(1, round(breadth * scale)))
                else:
                    (x, y), r = outline, breadth * scale
                    pen.ellipse((x - r, y - r, x + r, y + r), fill=ink)
        # Patches are drawn too large and cut at the outline here.
        cut = np.where(np.asarray(silhouette), np.asarray(regions), np.uint8(0))
        return Image.fromarray(cut), low


def draw_figure(pose: Pose, supersample: int) -> Figure:
    """Draw the bird in ``pose``: tail and legs first, then body, wing and head over them."""
    pen = _Pen()
    turn = _rotation(pose.body_angle)
    plump = np.array([1.0, pose.plump])

    def body(points: ArrayLike) -> Array:
        out: Array = (np.asarray(points) * plump) @ turn
        return out

    head_at = body(_HEAD_AT)
    head_turn = _rotation(pose.head_angle)
    mirror = np.array([-1.0 if pose.looks_back else 1.0, 1.0])

    def head(points: ArrayLike) -> Array:
        out: Array = (np.asarray(points) @ head_turn) * mirror + head_at
        return out

    feet = _legs(pen, pose, body)
    _tail(pen, pose, turn, body)
    pen.polygon(smooth(body(_BODY)), BACK, silhouette=True)
    pen.line(np.stack([body((0.27, -0.08)), head_at]), BACK, 0.40, silhouette=True)
    pen.polygon(smooth(head(_HEAD)), BACK, silhouette=True)
    crown = np.array(_CROWN)
    crown[3:5] += [(-0.4 * pose.crest, -pose.crest), (-1.2 * pose.crest, -0.5 * pose.crest)]
    pen.polygon(smooth(head(crown)), BACK, silhouette=True)

    pen.polygon(smooth(body(_FLANK)), FLANK)
    pen.polygon(smooth(body(_BELLY)), BELLY)
    spots = pose.streaks
    pen.strokes(spots * (0.75, 0.42) - (0.30, 0.24), (-0.055, 0.018), STREAK, body)
    pen.polygon(smooth(body(_BREAST)), BREAST)
    pen.strokes(spots[:14] * (0.28, 0.32) + (0.24, -0.05), (-0.028, 0.022), BREAST_LINE, body)
    pen.polygon(smooth(body(_RUMP)), RUMP)
    low_back = spots[14:24] @ np.array([(-0.26, 0.20), (0.0, 0.13)]) - (0.25, 0.265)
    pen.strokes(low_back, (-0.04, 0.02), RUMP_LINE, body)
    _wing(pen, body)
    _head(pen, pose, head, crown)
    regions, low = pen.render(pose.unit * supersample, pose.facing, supersample)
    offset = feet * np.array([pose.facing, 1]) * pose.unit - low / supersample
    return Figure(regions, offset)


def _legs(pen: _Pen, pose: Pose, body: Frame) -> Array:
    """Draw two legs down to the perch; returns the feet [2, 2] in body units."""
    below = pose.support == "below"
    down = np.array([0.05, 1.0]) if below else np.array([0.95, 0.32])
    grip = np.array([1.0, 0.0]) if below else np.array([-0.1, -1.0])
    hips = body([(-0.10, 0.20), (0.06, 0.22)])
    feet: Array = hips + (pose.leg + 0.06) * down
    # Both feet hold the same straight perch.
    reach = feet @ down
    feet = feet + (reach.mean() - reach)[:, None] * down / float(down @ down)
    for hip, foot in zip(hips, feet, strict=True):
        knee = 0.55 * hip + 0.45 * foot - 0.05 * grip
        pen.line(np.stack([hip, knee]), LEGS, 0.062, silhouette=True)
        pen.line(np.stack([knee, foot]), LEGS, 0.050, silhouette=True)
        for toe in (0.13, 0.075, -0.085):
            tip = foot + toe * grip + 0.035 * down
            pen.line(np.stack([foot, tip]), LEGS, 0.042, silhouette=True)
        pen.line(np.stack([knee, foot]) + 0.012 * grip, LEGS_LINE, 0.012)
    return feet


def _tail(pen: _Pen, pose: Pose, turn: Array, body: Frame) -> None:
    swing = _rotation(pose.tail_angle) @ turn
    n = pose.tail_length
    root = body((-0.44, -0.01))
    outline = np.array([(0.08, -0.075), (-0.5 * n, -0.065), (-n, -0.095), (-n - 0.03, 0.0),
                        (-n + 0.02, 0.085), (-0.5 * n, 0.075), (0.08, 0.085)])  # fmt: skip
    pen.polygon(smooth(outline @ swing + root), TAIL, silhouette=True)
    for y in (-0.045, 0.0, 0.045):
        shaft = np.array([(-0.05, 0.6 * y), (-n + 0.02, 1.25 * y)])
        pen.line(shaft @ swing + root, TAIL_LINE, 0.013)


def _wing(pen: _Pen, body: Frame) -> None:
    pen.polygon(smooth(body(_WING)), WING, silhouette=True)
    pen.polygon(smooth(body(_PRIMARY)), PRIMARY)
    for y in (0.045, 0.075, 0.105, 0.135):
        pen.line(body([(-0.10, y), (-0.58, 0.12 + 0.3 * y)]), WING_EDGE, 0.012)
    for x in (0.24, -0.02, -0.16):
        pen.line(body([(x, -0.11), (x - 0.055, 0.0), (x - 0.09, 0.11)]), WING_EDGE, 0.012)
    for bar in _BARS:
        pen.polygon(smooth(body(bar), 3), BAR)
        for a, b in ((1, 0), (3, 6)):
            pen.line(body([bar[a], bar[b]]), BAR_LINE, 0.010)


def _head(pen: _Pen, pose: Pose, head: Frame, crown: Array) -> None:
    pen.polygon(smooth(head(_FACE)), FACE)
    pen.polygon(smooth(head(_THROAT)), THROAT)
    dots = np.array([(0.06, 0.16), (0.13, 0.19), (0.07, 0.25), (0.16, 0.27)])
    pen.strokes(dots, (-0.02, 0.04), THROAT_LINE, head)
    pen.polygon(smooth(head(crown)), CROWN)
    dots = np.array([(0.10, -0.15), (0.02, -0.15), (-0.07, -0.15), (-0.15, -0.13)])
    pen.strokes(dots, (-0.06, -0.015), CROWN_LINE, head)
    stretch = np.array([pose.bill_length, 1.0])
    for outline, region in ((_LOWER_BILL, BILL_LINE), (_UPPER_BILL, BILL)):
        points = (np.array(outline) - (0.15, 0.0)) * stretch + (0.15, 0.0)
        pen.polygon(smooth(head(points)), region, silhouette=True)
    eye = head(_EYE_AT)
    pen.disc(eye, RING, 0.083)
    pen.disc(eye, EYE, 0.047)
    pen.disc(eye + np.array([0.012, -0.016]), GLINT, 0.014)
