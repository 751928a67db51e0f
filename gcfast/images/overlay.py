"""Heat maps as colors, and laid over photographs."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

# Every fifth entry of the 256-entry color map "inferno" (perceptually uniform, its lightness rises
# monotonically) by Nathaniel J. Smith and Stefan van der Walt, released under CC0 1.0 at
# https://github.com/BIDS/colormap. Interpolated linearly it is within 1.2/255 of the full table.
_INFERNO = bytes.fromhex(
    "00000402020c0504170a072210092d160b391e0c45260c512f0a5b380962400a67490b6a510e6c59106e61136e69166e"
    "71196e781c6d801f6c88226a902568982766a02a63a82e5fb0315bb73557bf3952c63d4dcc4248d34743d94d3ddf5337"
    "e45a31e9612bed6925f1711ff47918f78212f98b0bfa9407fb9d07fca60cfcb014fbba1ffac42af8cd37f6d746f4e156"
    "f2ea69f2f27df5f992fcffa4"
)
ANCHORS = np.frombuffer(_INFERNO, np.uint8).reshape(-1, 3)  # [52, 3], from cold to hot


def _table() -> NDArray[np.uint8]:
    """Return the 256-entry color table, uint8 [256, 3]."""
    at = np.linspace(0.0, 255.0, len(ANCHORS))
    channels = [np.interp(np.arange(256), at, ANCHORS[:, i]) for i in range(3)]
    return np.rint(np.stack(channels, axis=1)).astype(np.uint8)


_INFERNO_256 = _table()


def colorize(heat: NDArray[Any], table: NDArray[np.uint8] | None = None) -> NDArray[np.uint8]:
    """Color a heat map: 0 is near black, 1 is pale yellow.

    Args:
        heat: floating point [H, W] in [0, 1].
        table: uint8 [256, 3], another color map.

    Returns:
        uint8 [H, W, 3], a new array.

    Raises:
        TypeError: ``heat`` is not a floating-point array.
        ValueError: ``heat`` is not [H, W], or holds values outside [0, 1] or NaN.

    Source: color map "inferno" (CC0), see the table's comment.
    """
    _check_heat(heat)
    index = np.rint(np.clip(heat, 0.0, 1.0) * 255.0).astype(np.uint8)
    colors: NDArray[np.uint8] = (_INFERNO_256 if table is None else table)[index]
    return colors


def overlay(
    image: NDArray[np.uint8],
    heat: NDArray[Any],
    *,
    alpha: float = 0.55,
    dim: float = 0.0,
    table: NDArray[np.uint8] | None = None,
) -> NDArray[np.uint8]:
    """Lay a heat map over a photograph; cold areas keep the photograph, or what ``dim`` leaves.

    The opacity of a pixel is ``alpha * (1 - (1 - heat)^2)``: nothing where it is cold, ``alpha`` at
    the hottest. The photograph below loses color, not lightness, at the same pace, so that the
    object's own hues are not read as heat.

    Args:
        image: uint8 [H, W, 3], RGB.
        heat: floating point [H, W] in [0, 1].
        alpha: opacity of the heat where it is 1, in [0, 1].
        dim: share of its color that the photograph loses everywhere, and half that share of its
            light, in [0, 1]: small spots of heat stand out.
        table: uint8 [256, 3], another color map.

    Returns:
        uint8 [H, W, 3], a new array. Where ``heat`` is 0 it equals ``image``, if ``dim`` is 0.

    Raises:
        TypeError: ``image`` is not uint8 or ``heat`` is not floating point.
        ValueError: the shapes do not match, ``alpha`` or ``dim`` is outside [0, 1], or ``heat``
            holds NaN or values outside [0, 1].
    """
    check_image(image, "image")
    _check_heat(heat)
    if heat.shape != image.shape[:2]:
        raise ValueError(
            f"`heat` must have the height and width of `image`, {list(image.shape[:2])}, "
            f"got {list(heat.shape)}"
        )
    for name, value in (("alpha", alpha), ("dim", dim)):
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"`{name}` must be in [0, 1], got {value}")
    h = np.clip(heat, 0.0, 1.0).astype(np.float32)[..., None]  # [H, W, 1]
    # Steep at first, so that a weak response is visible; the dark end of the color map never
    # reaches a noticeable opacity, so cold does not mean darkened.
    strength = 1.0 - (1.0 - h) ** 2
    photo = image.astype(np.float32)
    luma = photo @ np.array([0.299, 0.587, 0.114], np.float32)  # [H, W], ITU-R BT.601
    photo += (luma[..., None] - photo) * dim
    photo *= 1.0 - dim / 2
    photo += (luma[..., None] * (1.0 - dim / 2) - photo) * (strength * alpha)
    photo += (colorize(heat, table).astype(np.float32) - photo) * (strength * alpha)
    return np.rint(photo).astype(np.uint8)


def check_image(image: NDArray[np.uint8], name: str) -> None:
    """Raise TypeError or ValueError unless the image is uint8 [H, W, 3] and not empty."""
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8:
        kind = image.dtype if isinstance(image, np.ndarray) else type(image).__name__
        raise TypeError(f"`{name}` must be a uint8 array, got {kind}")
    if image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(f"`{name}` must have shape [H, W, 3], got {list(image.shape)}")


def _check_heat(heat: NDArray[Any]) -> None:
    if not isinstance(heat, np.ndarray) or not np.issubdtype(heat.dtype, np.floating):
        kind = heat.dtype if isinstance(heat, np.ndarray) else type(heat).__name__
        raise TypeError(f"`heat` must be a floating-point array, got {kind}")
    if heat.ndim != 2:
        raise ValueError(f"`heat` must have shape [H, W], got {list(heat.shape)}")
    # Written so that NaN fails too; the slack is for maps rounded in half precision.
    if heat.size and not (heat.min() >= -1e-3 and heat.max() <= 1 + 1e-3):
        raise ValueError(f"`heat` must be in [0, 1], got {heat.min():.4g} to {heat.max():.4g}")
