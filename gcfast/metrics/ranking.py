"""How well the order of a map's pixels tells the object from the rest.

Both scores take the pixels from the hottest down, so that squaring a map, or any other increasing
function of it, changes nothing: the share of heat on the object can be raised that way.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
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
        maps: [B, H, W] floating point, finite, at the size of the images; compared in float32, on
            the CPU.
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
    # One integer a pixel, the heat's rank above one bit for the mask: numbers alone sort several
    # times faster than numbers with their places. As integers, floats of one sign are in order.
    bits = maps.detach().float().cpu().flatten(1).numpy().view(np.int32).astype(np.int64)
    coldness = np.where(bits < 0, bits & 0x7FFFFFFF, -bits)
    keys = np.sort(2 * coldness + masks.cpu().flatten(1).numpy(), axis=1)
    scores = torch.stack([torch.from_numpy(_ranked(row)) for row in keys], 1)
    precision, overlap = scores.float().to(maps.device)
    return precision, overlap


def _ranked(keys: NDArray[np.int64]) -> NDArray[np.float64]:
    """Average precision and best IoU of one map's sorted pixels [P]: twice the coldness, + mask."""
    last = np.append(keys[1:] >> 1 != keys[:-1] >> 1, True)  # equally hot pixels are one step
    ends = np.flatnonzero(last)
    found = np.cumsum(keys & 1)[ends].astype(np.float64)
    taken = ends + 1.0
    pixels = found[-1]
    if pixels == 0:
        return np.full(2, np.nan)
    precision = (found / taken * np.diff(found, prepend=0.0)).sum() / pixels
    return np.array([precision, (found / (taken + pixels - found)).max()])


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
