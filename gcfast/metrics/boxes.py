"""Boxes of whole pixels (x0, y0, x1, y1), the end exclusive: their overlap, and masks."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gcfast._checks import require_shape


def box_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """Return the intersection over union of each pair of boxes.

    Args:
        boxes: [A, 4].
        others: [B, 4].

    Returns:
        [A, B] float64; 0 if both are empty.

    Raises:
        ValueError: another shape.
    """
    require_shape("boxes", boxes, "A 4")
    require_shape("others", others, "B 4")
    a, b = boxes.double()[:, None], others.double()[None]
    low = torch.maximum(a[..., :2], b[..., :2])
    high = torch.minimum(a[..., 2:], b[..., 2:])
    common = (high - low).clamp(min=0).prod(2)
    union = _areas(a) + _areas(b) - common
    return torch.where(union > 0, common / union.clamp(min=1e-300), 0.0)


def box_masks(boxes: Tensor, height: int, width: int) -> Tensor:
    """Return boxes [B, 4] as masks [B, H, W] bool."""
    require_shape("boxes", boxes, "B 4")
    x = torch.arange(width, device=boxes.device)[None, None]
    y = torch.arange(height, device=boxes.device)[None, :, None]
    x0, y0, x1, y1 = boxes[:, :, None, None].unbind(1)
    return (x >= x0) & (x < x1) & (y >= y0) & (y < y1)


def mask_box(mask: NDArray[np.bool_]) -> tuple[int, int, int, int]:
    """Return the smallest box around the pixels of a mask [H, W].

    Raises:
        ValueError: the mask is empty.
    """
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    if not len(columns):
        raise ValueError("`mask` must hold at least one pixel, got none")
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _areas(boxes: Tensor) -> Tensor:
    return (boxes[..., 2:] - boxes[..., :2]).clamp(min=0).prod(-1)
