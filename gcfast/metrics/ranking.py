"""How well the order of a map's pixels tells the object from the rest.

Both scores take the pixels from the hottest down, so that squaring a map, or any other increasing
function of it, changes nothing: the share of heat on the object can be raised that way.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gcfast._checks import (
    require_dtype,
    require_finite_rows,
    require_same_device,
    require_shape,
)


def ranking_scores(maps: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Return the average precision and the best IoU of each map's pixels for the object.

    A threshold takes all pixels that are at least as hot. The average precision is the mean over
    the object's pixels of the precision at the threshold of that pixel; equally hot pixels share
    one. The best IoU is the highest over all thresholds, an upper bound of what any rule that picks
    one can reach.

    Args:
        maps: [B, H, W] floating point, finite, at the size of the images.
        masks: [B, H, W] bool, the object.

    Returns:
        The average precision and the best IoU, [B] float32 in [0, 1]; both are the object's share
        of the image for a flat map, and NaN where the mask is empty.

    Raises:
        TypeError: masks that are not bool.
        ValueError: another shape or device; NaN or infinity in a map, with its row.
    """
    sizes = require_shape("maps", maps, "B H W")
    require_dtype("masks", masks, (torch.bool,))
    require_shape("masks", masks, "B H W", sizes)
    require_same_device(maps=maps, masks=masks)
    require_finite_rows("maps", maps)
    if maps.numel() == 0:
        nothing = maps.new_full((len(maps),), torch.nan, dtype=torch.float32)
        return nothing, nothing.clone()
    heat, order = maps.flatten(1).sort(dim=1, descending=True)  # [B, P]
    inside = masks.flatten(1).gather(1, order)
    P = heat.shape[1]
    places = torch.arange(P, device=maps.device)
    # Equally hot pixels are taken together: each place counts up to the last of its run.
    last = torch.ones_like(inside)
    last[:, :-1] = heat[:, 1:] != heat[:, :-1]
    ends = torch.where(last, places, P).flip(1).cummin(1).values.flip(1)  # [B, P]
    found = inside.cumsum(1).gather(1, ends).double()
    taken = (ends + 1).double()
    pixels = inside.sum(1, keepdim=True).double()  # [B, 1]
    precision = torch.where(inside, found / taken, 0.0).sum(1) / pixels[:, 0]
    overlap = (found / (taken + pixels - found)).amax(1)
    empty = pixels[:, 0] == 0
    return (
        precision.masked_fill(empty, torch.nan).float(),
        overlap.masked_fill(empty, torch.nan).float(),
    )


def auroc(scores: Tensor, positive: Tensor) -> float:
    """Return the area under the ROC curve: how often a positive scores higher than a negative.

    Args:
        scores: [n] floating point, without NaN.
        positive: [n] bool.

    Returns:
        In [0, 1], ties counted as a half; NaN without a positive or without a negative.

    Raises:
        TypeError: ``positive`` that is not bool.
        ValueError: another shape, or NaN.
    """
    sizes = require_shape("scores", scores, "n")
    require_dtype("positive", positive, (torch.bool,))
    require_shape("positive", positive, "n", sizes)
    if bool(scores.isnan().any()):
        raise ValueError("`scores` must be numbers, got NaN")
    _, group, sizes_of = torch.unique(scores, return_inverse=True, return_counts=True)
    # The mean rank of each group of equal scores, from 1 on (Mann and Whitney 1947).
    ranks = (sizes_of.cumsum(0).double() - (sizes_of.double() - 1) / 2)[group]
    hits = int(positive.sum())
    misses = len(scores) - hits
    if not hits or not misses:
        return float("nan")
    return float((ranks[positive].sum() - hits * (hits + 1) / 2) / (hits * misses))
