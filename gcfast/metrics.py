"""Scores of heat maps against what they should fall on. Batched, on the maps' device."""

from __future__ import annotations

import torch
from torch import Tensor

from gcfast._checks import require_dtype, require_finite_rows, require_same_device, require_shape


def mask_score(maps: Tensor, masks: Tensor) -> Tensor:
    """The share of each map's activation that lies inside the mask.

    Args:
        maps: [B, H, W] floating point, not negative, finite.
        masks: [B, H, W] bool.

    Returns:
        [B] float32 in [0, 1]; 0 for a flat map.

    Raises:
        TypeError: masks that are not bool.
        ValueError: another shape or device; NaN or infinity in a map.

    Source: paper, section 4.1.2.
    """
    sizes = require_shape("maps", maps, "B H W")
    require_dtype("masks", masks, (torch.bool,))
    require_shape("masks", masks, "B H W", sizes)
    require_same_device(maps=maps, masks=masks)
    require_finite_rows("maps", maps)
    total = maps.double().sum((1, 2))
    inside = torch.where(masks, maps.double(), 0.0).sum((1, 2))
    return torch.where(total > 0, inside / total.clamp(min=1e-300), 0.0).float()


def box_masks(boxes: Tensor, height: int, width: int) -> Tensor:
    """Boxes [B, 4] of whole pixels (x0, y0, x1, y1), the end exclusive, as masks [B, H, W]."""
    require_shape("boxes", boxes, "B 4")
    x = torch.arange(width, device=boxes.device)[None, None]
    y = torch.arange(height, device=boxes.device)[None, :, None]
    x0, y0, x1, y1 = boxes[:, :, None, None].unbind(1)
    return (x >= x0) & (x < x1) & (y >= y0) & (y < y1)


def box_score(maps: Tensor, boxes: Tensor) -> Tensor:
    """The share of each map's activation that lies inside the bounding box.

    Args:
        maps: [B, H, W] floating point, not negative, finite.
        boxes: [B, 4] whole pixels (x0, y0, x1, y1), the end exclusive.

    Returns:
        [B] float32 in [0, 1]; 0 for a flat map.

    Raises:
        ValueError: as :func:`mask_score`.

    Source: paper, section 4.1.2.
    """
    return mask_score(maps, box_masks(boxes, *maps.shape[1:]))
