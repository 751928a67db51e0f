"""Finer heat maps, bound by reading the finer output twice: for its statistics, and for the sum.

The map is small, and each program works out what it needs of it again rather than have it made by
a launch of its own. Statistics are taken of each channel's distance from its first pixel: a channel
far from 0 loses nothing then, and one whose first pixel lies apart from all P has a variance of at
least its square over P, of which rounding takes no more than P parts in 2^24.

The maximum of f is known when all of an image's f are. So they are written first, with the largest
of each program's, and a third launch, of little work, divides.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gcfast.kernels.launch import RefineConfig, refine_config
from gcfast.reference.refining import REFINE_EPS, REFINE_SAME_MAP, REFINE_SAME_OUTPUT

NAN_BITS = tl.constexpr(0x7FC00000)  # above those of every number that is not negative


@triton.jit
def _peak(map_ptr, pixels, BLOCK: tl.constexpr):
    """The largest of the values above 0, or 0; NaN where there is one, or an infinity."""
    peak = 0.0
    for start in range(0, pixels, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        values = tl.load(map_ptr + offs, mask=offs < pixels, other=0.0).to(tl.float32)
        peak = tl.maximum(peak, tl.max(values, axis=0)) + tl.sum(values * 0.0, axis=0)
    return peak


@triton.jit
def _at(map_ptr, place, peak):
    """Pixels of the map divided by its maximum."""
    values = tl.load(map_ptr + place).to(tl.float32)
    return tl.div_rn(tl.where(values < 0, 0.0, values), tl.where(peak == 0, 1.0, peak))


@triton.jit
def _resized(map_ptr, peak, offs_p, h, w, W, scale_h, scale_w):
    """The map at pixels of the finer output: bilinear with half-pixel centres, columns first."""
    down = tl.maximum((offs_p // W + 0.5) * scale_h - 0.5, 0.0)
    along = tl.maximum((offs_p % W + 0.5) * scale_w - 0.5, 0.0)
    # Lanes beyond the output stay inside the map.
    top = tl.minimum(down.to(tl.int32), h - 1)
    left = tl.minimum(along.to(tl.int32), w - 1)
    bottom = tl.minimum(top + 1, h - 1)
    right = tl.minimum(left + 1, w - 1)
    down = tl.minimum(down - top, 1.0)
    along = tl.minimum(along - left, 1.0)
    upper = _at(map_ptr, top * w + left, peak) * (1.0 - along)
    upper += _at(map_ptr, top * w + right, peak) * along
    lower = _at(map_ptr, bottom * w + left, peak) * (1.0 - along)
    lower += _at(map_ptr, bottom * w + right, peak) * along
    return upper * (1.0 - down) + lower * down


@triton.jit
def _statistics_kernel(
    statistics_ptr, map_ptr, x_ptr, stride_x_b, stride_x_c, stride_x_p, C, P, h, w, W,
    scale_h, scale_w, same_map,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Write h - m, m and s of BLOCK_C channels of an image: [B, 3, C].

    Grid: (B * ceil(C / BLOCK_C),).
    """
    parts = tl.cdiv(C, BLOCK_C)
    i_b = (tl.program_id(0) // parts).to(tl.int64)
    offs_c = tl.program_id(0) % parts * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    map_ptr += i_b * h * w
    peak = _peak(map_ptr, h * w, BLOCK_P)
    x_ptr += i_b * stride_x_b + offs_c.to(tl.int64) * stride_x_c
    first = tl.load(x_ptr, mask=mask_c, other=0.0).to(tl.float32)
    sums = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    squares = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    hot = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    total = tl.zeros((BLOCK_P,), tl.float32)
    for start in range(0, P, BLOCK_P):
        offs_p = start + tl.arange(0, BLOCK_P)
        mask_p = offs_p < P
        u = tl.where(mask_p, _resized(map_ptr, peak, offs_p, h, w, W, scale_h, scale_w), 0.0)
        cubes = u * u * u
        total += cubes
        x = tl.load(
            x_ptr[:, None] + offs_p.to(tl.int64)[None, :] * stride_x_p,
            mask=mask_c[:, None] & mask_p[None, :],
            other=0.0,
        )  # [BLOCK_C, BLOCK_P]
        x = tl.where(mask_p[None, :], x.to(tl.float32) - first[:, None], 0.0)
        sums += x
        squares += x * x
        hot += x * cubes[None, :]
    total = tl.sum(total, axis=0)
    mean = tl.sum(sums, axis=1) / P
    variance = tl.maximum(tl.sum(squares, axis=1) / P - mean * mean, 0.0)
    # Comparing drops a NaN, adding it back does not.
    variance += 0.0 * mean
    difference = tl.sum(hot, axis=1) / tl.where(total == 0, 1.0, total) - mean
    difference = tl.where(total >= (1.0 - same_map) * P, 0.0, difference)
    statistics_ptr += i_b * 3 * C + offs_c
    tl.store(statistics_ptr, difference, mask=mask_c)
    tl.store(statistics_ptr + C, first + mean, mask=mask_c)
    tl.store(statistics_ptr + 2 * C, variance, mask=mask_c)


@triton.jit
def _sum_kernel(
    f_ptr, tops_ptr, statistics_ptr, x_ptr, stride_x_b, stride_x_c, stride_x_p, C, P,
    eps, same_output,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """relu(sum_c v_c (x_c - m_c)) at BLOCK_P pixels of an image, and the largest of them.

    Grid: (B * ceil(P / BLOCK_P),). ``tops`` are bits of floats, [B, parts].
    """
    parts = tl.cdiv(P, BLOCK_P)
    i_b = (tl.program_id(0) // parts).to(tl.int64)
    offs_p = tl.program_id(0) % parts * BLOCK_P + tl.arange(0, BLOCK_P)
    mask_p = offs_p < P
    statistics_ptr += i_b * 3 * C
    variances = tl.zeros((BLOCK_C,), tl.float32)
    squares = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(0, C, BLOCK_C):
        offs_c = start + tl.arange(0, BLOCK_C)
        mean = tl.load(statistics_ptr + C + offs_c, mask=offs_c < C, other=0.0)
        variance = tl.load(statistics_ptr + 2 * C + offs_c, mask=offs_c < C, other=0.0)
        variances += variance
        squares += mean * mean + variance
    floor = tl.sum(variances, axis=0) / C
    is_same = floor <= same_output * (tl.sum(squares, axis=0) / C)
    x_ptr += i_b * stride_x_b + offs_p.to(tl.int64) * stride_x_p
    f = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    for start in range(0, C, BLOCK_C):
        offs_c = start + tl.arange(0, BLOCK_C)
        mask_c = offs_c < C
        difference = tl.load(statistics_ptr + offs_c, mask=mask_c, other=0.0)
        mean = tl.load(statistics_ptr + C + offs_c, mask=mask_c, other=0.0)
        variance = tl.load(statistics_ptr + 2 * C + offs_c, mask=mask_c, other=0.0)
        bottom = variance + eps * floor
        v = tl.where(is_same, 0.0, difference / tl.where(bottom == 0, 1.0, bottom))
        x = tl.load(
            x_ptr[None, :] + offs_c.to(tl.int64)[:, None] * stride_x_c,
            mask=mask_c[:, None] & mask_p[None, :],
            other=0.0,
        )  # [BLOCK_C, BLOCK_P]
        f += v[:, None] * (x.to(tl.float32) - mean[:, None])
    f = tl.sum(f, axis=0)
    f = tl.where(f <= 0, 0.0, f)  # which keeps NaN, and no zero below 0
    bits = tl.where(f != f, NAN_BITS, f.to(tl.int32, bitcast=True))
    tl.store(f_ptr + i_b * P + offs_p, f, mask=mask_p)
    tl.store(tops_ptr + tl.program_id(0), tl.max(tl.where(mask_p, bits, 0), axis=0))


@triton.jit
def _product_kernel(
    out_ptr, tops_ptr, map_ptr, P, parts, h, w, W, scale_h, scale_w, BLOCK: tl.constexpr
):
    """Write u f / max f, in the place of f.  Grid: (B * ceil(P / BLOCK),)."""
    programs = tl.cdiv(P, BLOCK)
    i_b = (tl.program_id(0) // programs).to(tl.int64)
    offs_p = tl.program_id(0) % programs * BLOCK + tl.arange(0, BLOCK)
    map_ptr += i_b * h * w
    bits = 0
    for start in range(0, parts, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        found = tl.load(tops_ptr + i_b * parts + offs, mask=offs < parts, other=0)
        bits = tl.maximum(bits, tl.max(found, axis=0))
    top = tl.cast(bits, tl.float32, bitcast=True)
    peak = _peak(map_ptr, h * w, BLOCK)
    u = _resized(map_ptr, peak, offs_p, h, w, W, scale_h, scale_w)
    out_ptr += i_b * P + offs_p
    f = tl.load(out_ptr, mask=offs_p < P, other=0.0)
    f = tl.div_rn(f, tl.where(top == 0, 1.0, top))
    tl.store(out_ptr, u * tl.where(top == 0, 1.0, f), mask=offs_p < P)


def launch_refine(maps: Tensor, finer: Tensor, *, config: RefineConfig | None = None) -> Tensor:
    """See :func:`gcfast.ops.refine`, which checks the arguments."""
    B, C, H, W = finer.shape
    _, h, w = maps.shape
    P = H * W
    out = torch.empty((B, H, W), dtype=torch.float32, device=maps.device)
    if B == 0:
        return out
    maps = maps.contiguous()
    x = finer.flatten(2)  # a view of both memory formats; another is copied
    config = config or refine_config(is_last=x.stride(1) == 1 and C > 1)
    parts = triton.cdiv(P, config.sum_block_p)
    statistics = out.new_empty((B, 3, C))
    tops = torch.empty((B, parts), dtype=torch.int32, device=out.device)
    scales = (h / H, w / W)
    with torch.cuda.device_of(finer):
        _statistics_kernel[(B * triton.cdiv(C, config.block_c),)](
            statistics, maps, x, *x.stride(), C, P, h, w, W, *scales, REFINE_SAME_MAP,
            BLOCK_C=config.block_c, BLOCK_P=config.block_p, num_warps=config.num_warps,
        )  # fmt: skip
        _sum_kernel[(B * parts,)](
            out, tops, statistics, x, *x.stride(), C, P, REFINE_EPS, REFINE_SAME_OUTPUT,
            BLOCK_C=config.sum_block_c, BLOCK_P=config.sum_block_p, num_warps=config.num_warps,
        )  # fmt: skip
        block = config.product_block
        _product_kernel[(B * triton.cdiv(P, block),)](
            out, tops, maps, P, parts, h, w, W, *scales, BLOCK=block
        )
    return out


def refine_bytes(B: int, C: int, P: int, p: int, *, itemsize: int = 4) -> int:
    """The least that must move: the finer output twice, P pixels, the map of p in, P out."""
    return B * (2 * C * P * itemsize + 4 * p + 4 * P)
