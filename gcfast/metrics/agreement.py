"""How far two maps of the same image agree."""

from __future__ import annotations

import torch
from torch import Tensor

from gcfast._checks import require_finite_rows, require_same_device, require_shape


def cosine(maps: Tensor, others: Tensor) -> Tensor:
    """Return the cosine of each map and its counterpart, as vectors of pixels.

    Args:
        maps: [B, H, W] floating point, finite.
        others: [B, H, W] floating point, finite.

    Returns:
        [B] float32 in [-1, 1]; 0 where either map is flat.

    Raises:
        ValueError: another shape or device; NaN or infinity in a map, with its row.
    """
    a, b = _pixels(maps, others)
    return _cosine(a, b)


def spearman(maps: Tensor, others: Tensor) -> Tensor:
    """Return Spearman's rank correlation of each map and its counterpart, ties at their mean rank.

    Args:
        maps: [B, H, W] floating point, finite.
        others: [B, H, W] floating point, finite.

    Returns:
        [B] float32 in [-1, 1]; 0 where either map is constant.

    Raises:
        ValueError: another shape or device; NaN or infinity in a map, with its row.
    """
    a, b = (_ranks(values) for values in _pixels(maps, others))
    return _cosine(a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True))


def _pixels(maps: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Check both and return them as [B, P] float64."""
    sizes = require_shape("maps", maps, "B H W")
    require_shape("others", others, "B H W", sizes)
    require_same_device(maps=maps, others=others)
    require_finite_rows("maps", maps)
    require_finite_rows("others", others)
    return maps.double().flatten(1), others.double().flatten(1)


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    product = (a * b).sum(1)
    sizes = a.norm(dim=1) * b.norm(dim=1)
    agreement = torch.where(sizes > 0, product / sizes.clamp(min=1e-300), 0.0)
    return agreement.clamp(-1, 1).float()


def _ranks(values: Tensor) -> Tensor:
    """Return ranks [B, P] from 0 on, equal values sharing their mean rank."""
    ordered = values.sort(1).values
    below = torch.searchsorted(ordered, values, right=False)
    up_to = torch.searchsorted(ordered, values, right=True)
    return (below + up_to - 1).double() / 2
