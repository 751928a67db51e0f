"""What share of a map's activation lies where it should."""

from __future__ import annotations

import torch
from torch import Tensor

from gcfast._checks import (
    require_dtype,
    require_finite_rows,
    require_ids,
    require_same_device,
    require_shape,
)


def mask_score(maps: Tensor, masks: Tensor) -> Tensor:
    """The share of each map's activation that lies inside the mask.

    Args:
        maps: [B, H, W] floating point, not negative, finite.
        masks: [B, H, W] bool.

    Returns:
        [B] float32 in [0, 1]; 0 for a flat map.

    Raises:
        TypeError: masks that are not bool.
        ValueError: another shape or device; NaN, infinity or a negative value in a map.

    Source: paper, section 4.1.2.
    """
    sizes = require_shape("maps", maps, "B H W")
    require_dtype("masks", masks, (torch.bool,))
    require_shape("masks", masks, "B H W", sizes)
    require_same_device(maps=maps, masks=masks)
    _require_heat(maps)
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
        ValueError: as :func:`mask_score`; boxes that are not [B, 4].

    Source: paper, section 4.1.2.
    """
    require_shape("boxes", boxes, "B 4", require_shape("maps", maps, "B H W"))
    require_same_device(maps=maps, boxes=boxes)
    return mask_score(maps, box_masks(boxes, *maps.shape[1:]))


def part_score(maps: Tensor, parts: Tensor, objects: Tensor | None = None) -> Tensor:
    """The share of each map's activation on the part that tells the classes apart.

    Args:
        maps: [B, H, W] floating point, not negative, finite.
        parts: [B, H, W] bool.
        objects: [B, H, W] bool, or None. With it the share is of the activation on the object
            alone, so that finding the object is no merit any more.

    Returns:
        [B] float32 in [0, 1]; 0 for a flat map, and where nothing lies on the object.

    Raises:
        TypeError, ValueError: as :func:`mask_score`.
    """
    if objects is None:
        return mask_score(maps, parts)
    sizes = require_shape("maps", maps, "B H W")
    require_dtype("objects", objects, (torch.bool,))
    require_shape("objects", objects, "B H W", sizes)
    return mask_score(torch.where(objects, maps, 0.0), parts)


def flat_maps(maps: Tensor) -> Tensor:
    """Which maps have nothing left to show: [B] bool, every value of [B, H, W] zero."""
    require_shape("maps", maps, "B H W")
    require_finite_rows("maps", maps)
    return ~maps.flatten(1).any(1)


def two_object_scores(maps: Tensor, masks: Tensor, match: Tensor) -> tuple[Tensor, Tensor]:
    """How the activation is shared between two objects, one of which is what was matched.

    A score that a map of "some object" cannot win: with two objects it has to choose.

    Args:
        maps: [B, H, W] floating point, not negative, finite.
        masks: [B, 2, H, W] bool, disjoint, neither of them empty.
        match: [B] int64: which of the two is of the class of the nearest row, 0 or 1; -1 where it
            is neither.

    Returns:
        share [B] float32: of the activation on either object, what lies on the matching one, 0
        where nothing lies on them; right [B] float32: 1 where the matching object has the higher
        mean, 0 where not or where they are equal to one part in a million. NaN where ``match`` is
        -1.

    Raises:
        TypeError: masks that are not bool, ``match`` that is not int64.
        ValueError: another shape or device; NaN, infinity or a negative value in a map; an empty
            mask, with its row; a ``match`` out of range.
    """
    sizes = require_shape("maps", maps, "B H W")
    require_dtype("masks", masks, (torch.bool,))
    require_shape("masks", masks, "B 2 H W", sizes)
    require_shape("match", match, "B", sizes)
    require_dtype("match", match, (torch.int64,))
    require_ids("match", match, -1, 2)
    require_same_device(maps=maps, masks=masks, match=match)
    _require_heat(maps)
    heat = torch.where(masks, maps.double()[:, None], 0.0).sum((2, 3))  # [B, 2]
    share, right = two_object_shares(heat[:, None], masks.sum((2, 3)), match)
    return share[:, 0], right[:, 0]


def two_object_shares(heat: Tensor, areas: Tensor, match: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`two_object_scores` from sums: heat [B, V, 2], areas [B, 2] → [B, V] twice."""
    empty = (areas == 0).any(1).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"`masks` must not be empty, got no pixel in rows {empty[:10]}")
    heat = heat.double()
    at = match.clamp(min=0)[:, None, None].expand(-1, heat.shape[1], -1)
    mean = heat / areas[:, None]
    own, other = mean.gather(2, at)[..., 0], mean.gather(2, 1 - at)[..., 0]
    total = heat.sum(2)
    share = torch.where(total > 0, heat.gather(2, at)[..., 0] / total.clamp(min=1e-300), 0.0)
    # Summation order leaves some 1e-16 between equal means; a tie must stay a tie.
    right = (own > other * (1 + 1e-6)).double()
    nothing = (match < 0)[:, None]
    return (
        share.masked_fill(nothing, torch.nan).float(),
        right.masked_fill(nothing, torch.nan).float(),
    )


def _require_heat(maps: Tensor) -> None:
    """A share of signed values is none: it may lie outside [0, 1]."""
    require_finite_rows("maps", maps)
    if maps.numel() and bool(maps.amin() < 0):
        row = int((maps.flatten(1).amin(1) < 0).nonzero()[0])
        raise ValueError(
            f"`maps` must not be negative, got {float(maps[row].min()):g} in row {row}"
        )
