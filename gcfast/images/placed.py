"""A map of the network's view, laid back on the whole picture."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from gcfast.images.overlay import overlay

_ROWS = 512  # of a picture at once: a float copy of a large one would not fit into memory
_DIMMED = 0.4  # lightness that is left of what the network did not see


def overlay_whole(
    picture: Image.Image,
    heat: NDArray[Any],
    window: tuple[float, float, float, float],
    *,
    alpha: float = 0.55,
    dim: float = 0.0,
) -> Image.Image:
    """Lay a map over the whole picture; what the network did not see is dimmed and grey.

    Args:
        picture: in mode "RGB", of size (w, h).
        heat: floating point [H, W] in [0, 1].
        window: (x0, y0, x1, y1), the part of the picture that the map is of, in its pixels; it may
            reach beyond the picture.
        alpha: opacity of the heat where it is 1, in [0, 1].
        dim: as for :func:`gcfast.images.overlay.overlay`, of what the network saw.

    Returns:
        A picture in mode "RGB" of the same size.

    Raises:
        TypeError, ValueError: as :func:`gcfast.images.overlay.overlay`; a window outside the
            picture.
    """
    (w, h), (H, W), (x0, y0, x1, y1) = picture.size, heat.shape, window
    left, top, right, bottom = (
        min(max(round(value), 0), most) for value, most in ((x0, w), (y0, h), (x1, w), (y1, h))
    )
    if left >= right or top >= bottom:
        raise ValueError(f"`window` must be part of the {w} x {h} picture, got {list(window)}")
    out = Image.blend(Image.new("L", picture.size), picture.convert("L"), _DIMMED).convert("RGB")
    values = Image.fromarray(np.asarray(heat, np.float32))
    across, down = W / (x1 - x0), H / (y1 - y0)
    for start in range(top, bottom, _ROWS):
        stop = min(start + _ROWS, bottom)
        # The part of the map that covers these rows; its edge covers what rounding adds.
        box = (
            min(max((left - x0) * across, 0), W),
            min(max((start - y0) * down, 0), H),
            min(max((right - x0) * across, 0), W),
            min(max((stop - y0) * down, 0), H),
        )
        part = values.resize((right - left, stop - start), Image.Resampling.BILINEAR, box=box)
        photo = np.asarray(picture.crop((left, start, right, stop)))
        blended = overlay(photo, np.asarray(part).clip(0, 1), alpha=alpha, dim=dim)
        out.paste(Image.fromarray(blended), (left, start))
    return out
