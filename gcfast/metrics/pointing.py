"""The pointing game: does the hottest pixel lie on the object?"""

from __future__ import annotations

import torch
from torch import Tensor

from gcfast._checks import (
    require_dtype,
    require_finite_rows,
    require_int,
    require_same_device,
    require_shape,
)


def pointing_game(maps: Tensor, masks: Tensor, tolerance: int = 15) -> Tensor:
    """Whether the maximum of each map lies on the object or within ``tolerance`` pixels of it.

    A map whose maximum is reached at several pixels points at none of them and misses, as a flat
    map does. Upsampling clamps at the border, so a maximum in an outermost cell of the feature map
    is such a tie.

    Args:
        maps: [B, H, W] floating point, not negative, finite.
        masks: [B, H, W] bool, the object.
        tolerance: pixels, Euclidean; 15 is the source's.

    Returns:
        [B] float32, 1 for a hit and 0 for a miss; an empty mask is never hit.

    Raises:
        TypeError: masks that are not bool; a tolerance that is no int.
        ValueError: another shape or device; NaN or infinity in a map; a negative tolerance.

    Source: Zhang et al., "Top-down neural attention by excitation backprop", ECCV 2016, section
        4.2 (arXiv:1608.00507), which averages the accuracies of its categories; the mean of what is
        returned here is over images.
    """
    sizes = require_shape("maps", maps, "B H W")
    require_dtype("masks", masks, (torch.bool,))
    require_shape("masks", masks, "B H W", sizes)
    require_same_device(maps=maps, masks=masks)
    require_int("tolerance", tolerance, 0)
    require_finite_rows("maps", maps)
    H, W = maps.shape[1:]
    flat = maps.flatten(1)
    peak, at = flat.max(1)
    single = (flat == peak[:, None]).sum(1) == 1
    # Only the pixels around the maximum are looked at.
    reach = torch.arange(-tolerance, tolerance + 1, device=maps.device)
    near = reach[:, None] ** 2 + reach**2 <= tolerance**2  # [S, S]
    y = (at // W)[:, None] + reach  # [B, S]
    x = (at % W)[:, None] + reach
    there = ((y >= 0) & (y < H))[:, :, None] & ((x >= 0) & (x < W))[:, None]
    rows = torch.arange(len(maps), device=maps.device)[:, None, None]
    patch = masks[rows, y.clamp(0, H - 1)[:, :, None], x.clamp(0, W - 1)[:, None]]
    hit = (patch & there & near).flatten(1).any(1)
    return (hit & single & (peak > 0)).float()
