"""The specification of ``refine``, and its CPU path; part of :mod:`gcfast.reference`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

REFINE_EPS = 0.1  # of the channels' mean variance, added to each one's
# A map is the same everywhere where its mean cube comes this close to 1, and so is an output whose
# variance is at most this part of its mean square: what is left is rounding.
REFINE_SAME_MAP, REFINE_SAME_OUTPUT = 1e-6, 1e-10
TILE_BYTES = 3 * 2**20  # of an output worked on at once, which the cache of a CPU core holds


def refine(maps: Tensor, finer: Tensor) -> Tensor:
    r"""Maps at the resolution of an earlier layer's output x of the same images.

    With u the map, negative values dropped, divided by its maximum and resized bilinearly
    (half-pixel centres), and with the mean m_c and the variance s_c of each channel over the pixels
    p: ``h_c = sum_p u_p^3 x_cp / sum_p u_p^3``, ``v_c = (h_c - m_c) / (s_c + eps mean_c s_c)``,
    ``f = relu(sum_c v_c (x_c - m_c))``; the result is ``u f / max f``.

    Hot pixels that are like all the others (h = m, so that f is 0) tell nothing, and u stays as it
    is: so it does where the map, or the output, is the same everywhere. Without a positive value u
    is 0, and so is the result.
    """
    B, C, H, W = finer.shape
    tile = max(1, TILE_BYTES // (4 * C * H * W)) if finer.is_cpu else max(B, 1)
    return refined(maps, finer, [slice(at, at + tile) for at in range(0, max(B, 1), tile)])


def refined(maps: Tensor, finer: Tensor, parts: Sequence[slice]) -> Tensor:
    """:func:`refine`, worked on in these parts of the images, which cover all of them in order."""
    dtype = torch.float64 if torch.float64 in (maps.dtype, finer.dtype) else torch.float32
    B, _, H, W = finer.shape
    maps = maps.to(dtype).clamp(min=0)
    peak = maps.amax((1, 2), keepdim=True)
    u = torch.where(peak == 0, 0.0, maps / peak)  # NaN stays NaN
    u = F.interpolate(u[:, None], size=(H, W), mode="bilinear", align_corners=False).flatten(1)
    cubes = u**3  # [B, P]
    total = cubes.sum(1, keepdim=True)
    same_map = total >= (1 - REFINE_SAME_MAP) * H * W
    hot = cubes / torch.where(total == 0, 1.0, total) - 1 / (H * W)  # weights of h - m
    f = torch.cat([_likeness(finer[part].to(dtype), hot[part], same_map[part]) for part in parts])
    f = (f - f.mean(1, keepdim=True)).clamp(min=0)  # its mean is that of the means' rounding
    top = f.amax(1, keepdim=True)
    return (u * torch.where(top == 0, 1.0, f / top)).view(B, H, W)


def _likeness(finer: Tensor, hot: Tensor, same_map: Tensor) -> Tensor:
    """``sum_c v_c (x_c - m_c)`` of each place, [b, P]; ``hot`` [b, P], ``same_map`` [b, 1]."""
    x = finer.flatten(2)  # [b, C, P]; both memory formats without a copy
    mean = x.mean(2, keepdim=True)
    x = x - mean
    difference = torch.bmm(hot[:, None], x.mT)[:, 0]  # [b, C]
    variance = x.square().mean(2)
    floor = variance.mean(1, keepdim=True)
    square = mean.square().mean((1, 2))[:, None] + floor
    same = same_map | (floor <= REFINE_SAME_OUTPUT * square)
    v = torch.where(same, 0.0, difference / (variance + REFINE_EPS * floor))
    return torch.bmm(v[:, None], x)[:, 0]
