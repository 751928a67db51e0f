"""Sparse heat maps in one launch: gather, weighted sum, normalisation, bilinear upsampling.

The least that must move is ``sparse_cam_bytes``: for most shapes nearly all of it is the maps that
are written. So everything before the upsampling is arranged to be small beside that, even where
several programs share an image and each does it again: one chain of three loads that depend on each
other (the neighbour, its channels, their pixels), one reduction, one division a pixel. An image has
as many programs as it takes to fill a GPU, so one image has many and a large batch a few each.

A map of up to ``SPARSE_CAM_MAX_PIXELS`` is held whole in registers. A larger one would take too
many and too long: a first launch writes it in parts, and the second reads it where it is needed.

The upsampling is separable, columns first, as ``F.interpolate`` associates it. A program goes from
one pair of source rows to the next: it interpolates both along their length once, and every output
row between them is one interpolation of the two in registers, written in whole vectors. Products
with interpolation matrices would spread a NaN or an infinity (0 times which is NaN) over the whole
map; the taps keep to where the reference has it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gcfast.kernels.launch import (
    SparseCamConfig,
    sparse_cam_config,
    sparse_cam_rows,
)

NORMALIZE = {None: 0, "max": 1, "minmax": 2}
RESIZE_WARPS = 4


@triton.jit
def _low_resolution(
    activations_ptr, neighbors_ptr, channels_ptr, weights_ptr, mixing_ptr, offsets_ptr, offs_p,
    stride_act_c, stride_act_h, stride_act_w, stride_nei_k, stride_cha_n, stride_cha_m,
    stride_wei_n, stride_wei_m, stride_mix_k, stride_off, C, H, W, N, K, M, center, relu,
    HAS_MIXING: tl.constexpr, IS_NEAR: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """relu(sum_k x_k (sum_m w[n_k,m] A[ch[n_k,m]] - center o[n_k])) at the pixels ``offs_p``.

    The pointers of activations, neighbours and mixing are those of one image. IS_NEAR: 32 bits hold
    the distance of any two of its activations.
    """
    mask_p = offs_p < H * W
    pixels = (offs_p // W).to(tl.int64) * stride_act_h + (offs_p % W).to(tl.int64) * stride_act_w
    # Taken for scattered, whatever the strides are: vectors along the pixels of some memory formats
    # would add up the channels in another order, and their maps would differ in the last bit.
    pixels = tl.max_contiguous(pixels.to(tl.int32) if IS_NEAR else pixels, 1)

    cam = tl.zeros((BLOCK_P,), tl.float32)
    found = 0
    for i_k in range(0, K):
        row = tl.load(neighbors_ptr + i_k * stride_nei_k)
        # An id that is out of range is not followed: it has no channels.
        is_row = (row >= 0) & (row < N)
        end_m = tl.where(is_row, M, 0)
        found += is_row.to(tl.int32)
        mixed = 1.0
        if HAS_MIXING:
            mixed = tl.load(mixing_ptr + i_k * stride_mix_k).to(tl.float32)
        for start in range(0, M, BLOCK_M):
            offs_m = start + tl.arange(0, BLOCK_M)
            mask_m = offs_m < end_m
            channel = channels_ptr + row * stride_cha_n + offs_m.to(tl.int64) * stride_cha_m
            channel = tl.load(channel, mask=mask_m, other=-1)
            weight = weights_ptr + row * stride_wei_n + offs_m.to(tl.int64) * stride_wei_m
            weight = tl.load(weight, mask=mask_m, other=0.0).to(tl.float32) * mixed
            # One number a channel goes to every thread: where it is, below 0 for nowhere.
            place = tl.where((channel >= 0) & (channel < C), channel * stride_act_c, -1)
            if IS_NEAR:
                place = place.to(tl.int32)
            tile = tl.load(
                activations_ptr + (pixels[:, None] + place[None, :]),
                mask=mask_p[:, None] & (place >= 0)[None, :],
                other=0.0,
            )  # [BLOCK_P, BLOCK_M]
            cam += tl.sum(tile.to(tl.float32) * weight[None, :], axis=1)
        if center != 0:
            value = tl.load(offsets_ptr + row * stride_off, mask=is_row, other=0.0).to(tl.float32)
            cam -= tl.where(is_row, center * value * mixed, 0.0)
    if not HAS_MIXING:
        cam *= 1.0 / tl.maximum(found, 1).to(tl.float32)
    # Comparing, not tl.maximum, which would drop a NaN.
    return tl.where((relu != 0) & (cam < 0), 0.0, cam)


@triton.jit
def _smallest(cam, inside):
    """The smallest value inside; NaN does not count."""
    return tl.min(tl.where(inside, cam, float("inf")), axis=0)


@triton.jit
def _largest(cam, inside):
    """The largest value inside, NaN where there is one, which a reduction of floats would skip."""
    bits = cam.to(tl.int32, bitcast=True)
    # A negative float's magnitude bits are turned over: integers in the order of the floats.
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    bits = tl.where(cam != cam, 0x7FFFFFFF, bits)
    bits = tl.max(tl.where(inside, bits, -0x80000000), axis=0)
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _normalized(cam, smallest, largest, normalize):
    """The map by its largest magnitude (1), or from its smallest value to its largest (2)."""
    low = tl.where(normalize == 2, smallest, 0.0)
    peak = tl.maximum(tl.abs(smallest - low), tl.abs(largest - low))
    peak = tl.where(largest != largest, largest, peak)
    # Correctly rounded, and so at most 1 in magnitude.
    scaled = tl.div_rn(cam - low, tl.where(peak == 0, 1.0, peak))
    scaled = tl.where(peak == 0, 0.0, scaled)
    return tl.where(normalize == 0, cam, scaled)


@triton.jit
def _source(offs, scale):
    """Where in the map output positions lie."""
    return tl.maximum((offs + 0.5) * scale - 0.5, 0.0)


@triton.jit
def _first_tap(offs, scale, size):
    """The source position at or before output positions."""
    return tl.minimum(_source(offs, scale).to(tl.int32), size - 1)


@triton.jit
def _at(cam, place, smallest, largest, normalize, IN_MEMORY: tl.constexpr):
    """Pixels of the normalised map: of a tensor that is, or in memory as it came."""
    if IN_MEMORY:
        pixels = _normalized(tl.load(cam + place), smallest, largest, normalize)
    else:
        pixels = tl.gather(cam, place, 0)
    return pixels


@triton.jit
def _write_rows(
    out_ptr, cam, smallest, largest, normalize, first_row, end_row, H, W, OW, scale_h, scale_w,
    IN_MEMORY: tl.constexpr, IS_BYTE: tl.constexpr, BLOCK_OH: tl.constexpr, BLOCK_OW: tl.constexpr,
):  # fmt: skip
    """Resize the map to the output rows from ``first_row`` to ``end_row``."""
    for first_column in range(0, OW, BLOCK_OW):
        offs_w = first_column + tl.arange(0, BLOCK_OW)
        left = _first_tap(offs_w, scale_w, W)
        right = tl.minimum(left + 1, W - 1)
        # At most 1 also for lanes beyond the output, which would overflow for nothing.
        along = tl.minimum(_source(offs_w, scale_w) - left, 1.0)
        row = first_row
        while row < end_row:
            top = _first_tap(row, scale_h, H)
            bottom = tl.minimum(top + 1, H - 1)
            near = _at(cam, top * W + left, smallest, largest, normalize, IN_MEMORY)
            far = _at(cam, top * W + right, smallest, largest, normalize, IN_MEMORY)
            upper = near * (1.0 - along) + far * along
            near = _at(cam, bottom * W + left, smallest, largest, normalize, IN_MEMORY)
            far = _at(cam, bottom * W + right, smallest, largest, normalize, IN_MEMORY)
            lower = near * (1.0 - along) + far * along
            # Up to the first row that has another pair: guessed too low, then looked for.
            end = ((top + 1.5) / scale_h - 1.5).to(tl.int32)
            end = tl.minimum(tl.maximum(end, row + 1), end_row)
            while (end < end_row) & (_first_tap(end, scale_h, H) == top):
                end += 1
            for start in range(row, end, BLOCK_OH):
                offs_h = start + tl.arange(0, BLOCK_OH)
                down = tl.minimum(_source(offs_h, scale_h) - top, 1.0)
                values = upper[None, :] * (1.0 - down)[:, None] + lower[None, :] * down[:, None]
                if IS_BYTE:
                    # In [0, 1], or NaN. The bound of the product keeps it from being fused with the
                    # sum, which must see it rounded. Adding 1.5 * 2^23 rounds to the nearest even,
                    # as torch.round does, and leaves the integer in the lowest bits.
                    values = tl.maximum(values * 255.0, 0.0) + 12582912.0
                    values = values.to(tl.int32, bitcast=True)
                mask = (offs_h < end)[:, None] & (offs_w < OW)[None, :]
                pointers = out_ptr + offs_h.to(tl.int64)[:, None] * OW + offs_w[None, :]
                tl.store(pointers, values.to(out_ptr.dtype.element_ty), mask=mask)
            row = end


@triton.jit(do_not_specialize=["rows"])  # or batches of other sizes are compiled for anew
def _sparse_cam_kernel(
    out_ptr, activations_ptr, neighbors_ptr, channels_ptr, weights_ptr, mixing_ptr, offsets_ptr,
    stride_act_b, stride_act_c, stride_act_h, stride_act_w, stride_nei_b, stride_nei_k,
    stride_cha_n, stride_cha_m, stride_wei_n, stride_wei_m, stride_mix_b, stride_mix_k, stride_off,
    C, H, W, N, K, M, OH, OW, rows, scale_h, scale_w, center, relu, normalize,
    HAS_MIXING: tl.constexpr, IS_NEAR: tl.constexpr, IS_BYTE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_OH: tl.constexpr, BLOCK_OW: tl.constexpr,
):  # fmt: skip
    """map[b] = resize(normalize(relu(sum_k x_k (sum_m w[n_k,m] A[b,ch[n_k,m]] - center o[n_k])))).

    Grid: (B * ceil(OH / rows),), ``rows`` output rows each. BLOCK_P covers the map.
    """
    slices = tl.cdiv(OH, rows)
    i_b = (tl.program_id(0) // slices).to(tl.int64)
    first_row = tl.program_id(0) % slices * rows
    neighbors_ptr += i_b * stride_nei_b
    mixing_ptr += i_b * stride_mix_b
    offs_p = tl.arange(0, BLOCK_P)
    cam = _low_resolution(
        activations_ptr + i_b * stride_act_b, neighbors_ptr, channels_ptr, weights_ptr, mixing_ptr,
        offsets_ptr, offs_p, stride_act_c, stride_act_h, stride_act_w, stride_nei_k, stride_cha_n,
        stride_cha_m, stride_wei_n, stride_wei_m, stride_mix_k, stride_off,
        C, H, W, N, K, M, center, relu, HAS_MIXING, IS_NEAR, BLOCK_M, BLOCK_P,
    )  # fmt: skip
    smallest, largest = _smallest(cam, offs_p < H * W), _largest(cam, offs_p < H * W)
    cam = _normalized(cam, smallest, largest, normalize)
    _write_rows(
        out_ptr + i_b * OH * OW, cam, smallest, largest, normalize, first_row,
        tl.minimum(first_row + rows, OH), H, W, OW, scale_h, scale_w,
        False, IS_BYTE, BLOCK_OH, BLOCK_OW,
    )  # fmt: skip


@triton.jit
def _large_map_kernel(
    map_ptr, extremes_ptr,
    activations_ptr, neighbors_ptr, channels_ptr, weights_ptr, mixing_ptr, offsets_ptr,
    stride_act_b, stride_act_c, stride_act_h, stride_act_w, stride_nei_b, stride_nei_k,
    stride_cha_n, stride_cha_m, stride_wei_n, stride_wei_m, stride_mix_b, stride_mix_k, stride_off,
    C, H, W, N, K, M, center, relu,
    HAS_MIXING: tl.constexpr, IS_NEAR: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """map[b] as in ``_sparse_cam_kernel`` before ``normalize``, and the extremes of its parts.

    Grid: (B * ceil(H W / BLOCK_P),). The extremes are [B, parts, 2].
    """
    parts = tl.cdiv(H * W, BLOCK_P)
    i_b = (tl.program_id(0) // parts).to(tl.int64)
    offs_p = tl.program_id(0) % parts * BLOCK_P + tl.arange(0, BLOCK_P)
    cam = _low_resolution(
        activations_ptr + i_b * stride_act_b, neighbors_ptr + i_b * stride_nei_b, channels_ptr,
        weights_ptr, mixing_ptr + i_b * stride_mix_b, offsets_ptr, offs_p,
        stride_act_c, stride_act_h, stride_act_w, stride_nei_k, stride_cha_n, stride_cha_m,
        stride_wei_n, stride_wei_m, stride_mix_k, stride_off, C, H, W, N, K, M, center, relu,
        HAS_MIXING, IS_NEAR, BLOCK_M, BLOCK_P,
    )  # fmt: skip
    tl.store(map_ptr + i_b * H * W + offs_p, cam, mask=offs_p < H * W)
    extremes_ptr += 2 * tl.program_id(0).to(tl.int64)
    tl.store(extremes_ptr, _smallest(cam, offs_p < H * W))
    tl.store(extremes_ptr + 1, _largest(cam, offs_p < H * W))


@triton.jit(do_not_specialize=["rows"])
def _resize_kernel(
    out_ptr, map_ptr, extremes_ptr, H, W, OH, OW, parts, rows, scale_h, scale_w, normalize,
    IS_BYTE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_OH: tl.constexpr, BLOCK_OW: tl.constexpr,
):  # fmt: skip
    """out[b] = resize(normalize(map[b])).  Grid: (B * ceil(OH / rows),), ``rows`` rows each."""
    slices = tl.cdiv(OH, rows)
    i_b = (tl.program_id(0) // slices).to(tl.int64)
    first_row = tl.program_id(0) % slices * rows
    extremes_ptr += i_b * parts * 2
    smallest = float("inf")
    largest = float("-inf")
    for start in range(0, parts, BLOCK_P):
        offs = start + tl.arange(0, BLOCK_P)
        low = tl.load(extremes_ptr + 2 * offs, mask=offs < parts, other=0.0)
        high = tl.load(extremes_ptr + 2 * offs + 1, mask=offs < parts, other=0.0)
        smallest = tl.minimum(smallest, _smallest(low, offs < parts))
        high = _largest(high, offs < parts)
        # Once NaN it stays: every comparison with it is false.
        largest = tl.where((high > largest) | (high != high), high, largest)
    _write_rows(
        out_ptr + i_b * OH * OW, map_ptr + i_b * H * W, smallest, largest, normalize, first_row,
        tl.minimum(first_row + rows, OH), H, W, OW, scale_h, scale_w,
        True, IS_BYTE, BLOCK_OH, BLOCK_OW,
    )  # fmt: skip


def laid_out(
    activations: Tensor, grid: tuple[int, int] | None
) -> tuple[tuple[int, int, int, int], tuple[int, ...]]:
    """B, C, H, W of maps, or of tokens [B, P, C] on a grid, and the strides of each."""
    if activations.ndim == 4:
        B, C, H, W = activations.shape
        return (B, C, H, W), activations.stride()
    assert grid is not None
    B, _, C = activations.shape
    H, W = grid
    stride_b, stride_p, stride_c = activations.stride()
    return (B, C, H, W), (stride_b, stride_c, W * stride_p, stride_p)


def is_near(sizes: tuple[int, int, int], strides: tuple[int, ...]) -> bool:
    """Whether 32 bits hold the distance of any two of an image's activations, C, H, W of them."""
    return sum((n - 1) * step for n, step in zip(sizes, strides[1:], strict=True)) < 2**31


def launch_sparse_cam(
    activations: Tensor,
    neighbors: Tensor,
    channels: Tensor,
    weights: Tensor,
    *,
    size: tuple[int, int],
    mixing: Tensor | None = None,
    offsets: Tensor | None = None,
    center: float = 0.0,
    relu: bool = True,
    normalize: str | None = "max",
    grid: tuple[int, int] | None = None,
    dtype: torch.dtype = torch.float32,
    config: SparseCamConfig | None = None,
) -> Tensor:
    """See :func:`gcfast.ops.sparse_cam`, which checks the arguments."""
    (B, C, H, W), strides = laid_out(activations, grid)
    K, (N, M), (OH, OW) = neighbors.shape[1], channels.shape, size
    if 0 in (B, K, N, M):
        return torch.zeros((B, OH, OW), dtype=dtype, device=activations.device)
    config = config or sparse_cam_config(H * W, OH / H, OW)
    rows = sparse_cam_rows(B, OH, config)
    out = torch.empty((B, OH, OW), dtype=dtype, device=activations.device)
    # Where there is none, any pointer will do: nothing is read through it.
    given_mixing = weights if mixing is None else mixing
    given_offsets = weights if offsets is None else offsets
    inputs = (
        activations, neighbors, channels, weights, given_mixing, given_offsets,
        *strides, *neighbors.stride(), *channels.stride(), *weights.stride(),
        *given_mixing.stride(), given_offsets.stride(0), C, H, W, N, K, M,
    )  # fmt: skip
    choices = (0.0 if offsets is None else float(center), int(relu), NORMALIZE[normalize])
    low = {
        "HAS_MIXING": mixing is not None,
        "IS_NEAR": is_near((C, H, W), strides),
        "BLOCK_M": config.block_m,
        "BLOCK_P": config.block_p,
        "num_warps": config.num_warps,
    }
    high = {
        "IS_BYTE": dtype == torch.uint8,
        "BLOCK_OH": config.block_oh,
        "BLOCK_OW": config.block_ow,
    }
    sizes = (rows, H / OH, W / OW)
    programs = B * -(-OH // rows)
    with torch.cuda.device_of(activations):
        if config.block_p >= H * W:
            _sparse_cam_kernel[(programs,)](out, *inputs, OH, OW, *sizes, *choices, **low, **high)
        else:
            parts = triton.cdiv(H * W, config.block_p)
            maps = torch.empty((B, H, W), dtype=torch.float32, device=activations.device)
            extremes = maps.new_empty((B, parts, 2))
            _large_map_kernel[(B * parts,)](maps, extremes, *inputs, *choices[:2], **low)
            _resize_kernel[(programs,)](
                out, maps, extremes, H, W, OH, OW, parts, *sizes, choices[2],
                BLOCK_P=config.block_p, num_warps=RESIZE_WARPS, **high,
            )  # fmt: skip
    return out


def sparse_cam_bytes(
    B: int, K: int, M: int, P: int, OH: int, OW: int, *, itemsize: int = 4, map_itemsize: int = 4
) -> int:
    """The least that must move: K M channels of each image and their weights in, the maps out.

    Channels-last reads more, a sector of 32 bytes for each element where the kept channels are far
    apart.
    """
    return B * (K * M * (P * itemsize + 8 + 4) + OH * OW * map_itemsize)
