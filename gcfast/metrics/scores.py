"""Scores of maps against the objects that they should fall on."""

from __future__ import annotations

import torch
from torch import Tensor

from gcfast._checks import (
    require_dtype,
    require_finite_rows,
    require_ids,
    require_int,
    require_same_device,
    require_shape,
)
from gcfast.metrics.boxes import box_masks


def mask_score(maps: Tensor, masks: Tensor) -> Tensor:
    """Return the share of each map's activation that is inside the mask.

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
    _require_masks(maps, "masks", masks)
    _require_heat(maps)
    total = maps.double().sum((1, 2))
    inside = torch.where(masks, maps.double(), 0.0).sum((1, 2))
    return torch.where(total > 0, inside / total.clamp(min=1e-300), 0.0).float()


def box_score(maps: Tensor, boxes: Tensor) -> Tensor:
    """Return the share of each map's activation that is inside the bounding box.

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
    """Return the share of each map's activation on the part that tells the classes apart.

    Args:
        maps: [B, H, W] floating point, not negative, finite.
        parts: [B, H, W] bool.
        objects: [B, H, W] bool, or None. With it the share is of the activation on the object
            alone, so that finding the object scores nothing.

    Returns:
        [B] float32 in [0, 1]; 0 for a flat map, or one with no activation on the object.

    Raises:
        TypeError, ValueError: as :func:`mask_score`.
    """
    if objects is None:
        return mask_score(maps, parts)
    _require_masks(maps, "objects", objects)
    return mask_score(torch.where(objects, maps, 0.0), parts)


def pointing_game(maps: Tensor, masks: Tensor, tolerance: int = 15) -> Tensor:
    """Return whether each map's maximum is on the object or within ``tolerance`` pixels of it.

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
    _require_masks(maps, "masks", masks)
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


def flat_maps(maps: Tensor) -> Tensor:
    """Return which maps are zero everywhere: [B] bool of [B, H, W]."""
    require_shape("maps", maps, "B H W")
    require_finite_rows("maps", maps)
    return ~maps.flatten(1).any(1)


def two_object_scores(maps: Tensor, masks: Tensor, match: Tensor) -> tuple[Tensor, Tensor]:
    """Return how the activation is shared between two objects, one of which was matched.

    A map of "some object" cannot win this score: with two objects it has to choose.

    Args:
        maps: [B, H, W] floating point, not negative, finite.
        masks: [B, 2, H, W] bool, disjoint, neither of them empty.
        match: [B] int64: which of the two is of the nearest row's class, 0 or 1; -1 for neither.

    Returns:
        share [B] float32: of the activation on both objects, the part on the matching one, 0
        without any; right [B] float32: 1 if the matching object has the higher mean, 0 if not or if
        they are equal to one part in a million. NaN where ``match`` is -1.

    Raises:
        TypeError: masks that are not bool, ``match`` that is not int64.
        ValueError: another shape or device; NaN, infinity or a negative value in a map; an empty
            mask, with its row; a ``match`` out of range.
    """
    sizes = _require_masks(maps, "masks", masks, "B 2 H W")
    require_shape("match", match, "B", sizes)
    require_dtype("match", match, (torch.int64,))
    require_ids("match", match, -1, 2)
    require_same_device(maps=maps, match=match)
    _require_heat(maps)
    heat = torch.where(masks, maps.double()[:, None], 0.0).sum((2, 3))  # [B, 2]
    share, right = two_object_shares(heat[:, None], masks.sum((2, 3)), match)
    return share[:, 0], right[:, 0]


def two_object_shares(heat: Tensor, areas: Tensor, match: Tensor) -> tuple[Tensor, Tensor]:
    """Make :func:`two_object_scores` from sums: heat [B, V, 2], areas [B, 2] → [B, V] twice."""
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


def _require_masks(
    maps: Tensor, name: str, masks: Tensor, letters: str = "B H W"
) -> dict[str, int]:
    """Check maps [B, H, W] and bool masks that fit them; returns the sizes by letter."""
    sizes = require_shape("maps", maps, "B H W")
    require_dtype(name, masks, (torch.bool,))
    require_shape(name, masks, letters, sizes)
    require_same_device(maps=maps, **{name: masks})
    return sizes


def _require_heat(maps: Tensor) -> None:
    """Check that maps are not negative: a share of signed values may be outside [0, 1]."""
    require_finite_rows("maps", maps)
    if maps.numel() and bool(maps.amin() < 0):
        row = int((maps.flatten(1).amin(1) < 0).nonzero()[0])
        raise ValueError(
            f"`maps` must not be negative, got {float(maps[row].min()):g} in row {row}"
        )
