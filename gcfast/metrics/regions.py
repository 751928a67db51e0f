"""Sums of upsampled maps over masks, without upsampling the maps.

Bilinear upsampling is linear and a map is normalized before it, so the sum of an upsampled map over
a mask is <R m, mask> = <m, Rᵀ mask>. Rᵀ mask is computed once per image and serves all its maps:
one small matrix product replaces a full-size map for each.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gcfast._checks import require_dtype, require_finite_rows, require_same_device, require_shape


class RegionSums(NamedTuple):
    """Sums over V upsampled maps of each of B images, with n regions each; float64."""

    inside: Tensor  # [B, V, n]
    total: Tensor  # [B, V]
    areas: Tensor  # [B, n] int64, pixels

    def shares(self) -> Tensor:
        """Return the share of each map inside each region, [B, V, n] float32; 0 if it is flat."""
        total = self.total[..., None]
        return torch.where(total > 0, self.inside / total.clamp(min=1e-300), 0.0).float()


def upsampling(low: int, high: int, device: torch.device | None = None) -> Tensor:
    """Return R [high, low] float64: bilinear resizing, half-pixel centers, borders clamped."""
    eye = torch.eye(low, dtype=torch.float64, device=device)
    return F.interpolate(eye[None], size=high, mode="linear", align_corners=False)[0].T


def region_sums(maps: Tensor, masks: Tensor) -> RegionSums:
    """Sum maps, bilinearly upsampled to the masks' size, over the masks and over everything.

    Args:
        maps: [B, V, H, W] floating point, low-resolution maps, V of each image; finite.
        masks: [B, n, h, w] bool, n regions of each image.

    Returns:
        The sums of ``interpolate(maps, (h, w))``, to float64 rounding.

    Raises:
        TypeError: masks that are not bool.
        ValueError: another shape or device; NaN or infinity in a map, with the image's row.
    """
    sizes = require_shape("maps", maps, "B V H W")
    require_dtype("masks", masks, (torch.bool,))
    require_shape("masks", masks, "B n h w", {"B": sizes["B"]})
    require_same_device(maps=maps, masks=masks)
    require_finite_rows("maps", maps)
    rows = upsampling(maps.shape[2], masks.shape[2], maps.device)  # [h, H]
    columns = upsampling(maps.shape[3], masks.shape[3], maps.device)  # [w, W]
    # Bytes to float32 first: the long axis is then summed in float32, at most some thousand terms
    # of at most 1, and the rest in float64.
    thin = (masks.float() @ columns.float()).double()  # [B, n, h, W]
    low = rows.T @ thin  # [B, n, H, W]
    flat = maps.double().flatten(2)  # [B, V, P]
    inside = flat @ low.flatten(2).transpose(1, 2)
    everything = rows.sum(0)[:, None] * columns.sum(0)  # [H, W]
    return RegionSums(inside, flat @ everything.flatten(), masks.sum((2, 3)))
