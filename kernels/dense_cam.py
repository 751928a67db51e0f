"""Heat maps from a weight for every channel: a matrix-vector product, then as ``sparse_cam``.

All activations are read once, where they lie: along the pixels, or along the channels in
channels-last and tokens, in whole vectors of either. That is far more than the maps that are
written, so a first launch shares the channels of an image out to as many programs as fill a GPU,
each of which writes its sums, and a second adds them up, normalises and resizes.

A map above ``SPARSE_CAM_MAX_PIXELS`` is made in parts, each of all channels; parts of it are then
what fills a GPU, and the second launch is that of ``sparse_cam``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gcfast.kernels.launch import (
    SPARSE_CAM_MAX_PIXELS,
    DenseCamConfig,
    dense_cam_config,
    multiprocessors,
    sparse_cam_config,
    sparse_cam_rows,
)
from gcfast.kernels.sparse_cam import (
    NORMALIZE,
    RESIZE_WARPS,
    _largest,
    _normalized,
    _resize_kernel,
    _smallest,
    _write_rows,
    is_near,
    laid_out,
)

BLOCK_S = 16  # sums of one image that are added at once


@triton.jit(do_not_specialize=["slices", "channels"])  # or batches of other sizes compile anew
def _channel_sums_kernel(
    sums_ptr, extremes_ptr, activations_ptr, weights_ptr,
    stride_act_b, stride_act_c, stride_act_h, stride_act_w, stride_wei_b, stride_wei_c,
    C, H, W, slices, channels, relu,
    IS_FLAT: tl.constexpr, IS_NEAR: tl.constexpr, IS_WHOLE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """sums[b, s, p] = sum over the channels c of slice s of w[b,c] A[b,c,p].

    Grid: (B * slices * ceil(H W / BLOCK_P),). IS_FLAT: rows of pixels follow one another.
    IS_NEAR: 32 bits hold the distance of any two activations of an image. IS_WHOLE: there is one
    slice, whose sums pass the ReLU, and their extremes [B, parts, 2] are written too.
    """
    parts = tl.cdiv(H * W, BLOCK_P)
    i_part = tl.program_id(0) % parts
    i_s = tl.program_id(0) // parts % slices
    i_b = (tl.program_id(0) // parts // slices).to(tl.int64)
    offs_p = i_part * BLOCK_P + tl.arange(0, BLOCK_P)
    mask_p = offs_p < H * W
    if IS_FLAT:
        pixels = offs_p.to(tl.int64) * stride_act_w
    else:
        rows, columns = (offs_p // W).to(tl.int64), (offs_p % W).to(tl.int64)
        pixels = rows * stride_act_h + columns * stride_act_w
    if IS_NEAR:
        pixels = pixels.to(tl.int32)
    activations_ptr += i_b * stride_act_b
    weights_ptr += i_b * stride_wei_b

    first = tl.multiple_of(i_s * channels, BLOCK_C)  # as dense_cam_config has it
    end = tl.minimum(first + channels, C)
    cam = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for start in range(first, end, BLOCK_C):
        offs_c = start + tl.arange(0, BLOCK_C)
        weight = tl.load(
            weights_ptr + offs_c.to(tl.int64) * stride_wei_c, mask=offs_c < end, other=0.0
        )
        place = offs_c.to(tl.int64) * stride_act_c
        if IS_NEAR:
            place = place.to(tl.int32)
        tile = tl.load(
            activations_ptr + (pixels[:, None] + place[None, :]),
            mask=mask_p[:, None] & (offs_c < end)[None, :],
            other=0.0,
        )  # [BLOCK_P, BLOCK_C]
        cam += tile.to(tl.float32) * weight.to(tl.float32)[None, :]
    sums = tl.sum(cam, axis=1)
    if IS_WHOLE:
        # Comparing, not tl.maximum, which would drop a NaN.
        sums = tl.where((relu != 0) & (sums < 0), 0.0, sums)
        extremes_ptr += 2 * tl.program_id(0).to(tl.int64)
        tl.store(extremes_ptr, _smallest(sums, mask_p))
        tl.store(extremes_ptr + 1, _largest(sums, mask_p))
    tl.store(sums_ptr + (i_b * slices + i_s) * H * W + offs_p, sums, mask=mask_p)


@triton.jit(do_not_specialize=["slices", "rows"])
def _dense_cam_kernel(
    out_ptr, sums_ptr, H, W, OH, OW, slices, rows, scale_h, scale_w, relu, normalize,
    IS_BYTE: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_OH: tl.constexpr, BLOCK_OW: tl.constexpr,
):  # fmt: skip
    """out[b] = resize(normalize(relu(sum_s sums[b, s]))).

    Grid: (B * ceil(OH / rows),), ``rows`` output rows each. BLOCK_P covers the map.
    """
    shared = tl.cdiv(OH, rows)
    i_b = (tl.program_id(0) // shared).to(tl.int64)
    first_row = tl.program_id(0) % shared * rows
    offs_p = tl.arange(0, BLOCK_P)
    sums_ptr += i_b * slices * H * W
    cam = tl.zeros((BLOCK_P,), tl.float32)
    for start in range(0, slices, BLOCK_S):
        offs_s = start + tl.arange(0, BLOCK_S)
        mask = (offs_s < slices)[:, None] & (offs_p < H * W)[None, :]
        tile = tl.load(sums_ptr + offs_s[:, None] * H * W + offs_p[None, :], mask=mask, other=0.0)
        cam += tl.sum(tile, axis=0)
    cam = tl.where((relu != 0) & (cam < 0), 0.0, cam)
    smallest, largest = _smallest(cam, offs_p < H * W), _largest(cam, offs_p < H * W)
    cam = _normalized(cam, smallest, largest, normalize)
    _write_rows(
        out_ptr + i_b * OH * OW, cam, smallest, largest, normalize, first_row,
        tl.minimum(first_row + rows, OH), H, W, OW, scale_h, scale_w,
        False, IS_BYTE, BLOCK_OH, BLOCK_OW,
    )  # fmt: skip


def launch_dense_cam(
    activations: Tensor,
    weights: Tensor,
    *,
    size: tuple[int, int],
    relu: bool = True,
    normalize: str | None = "max",
    grid: tuple[int, int] | None = None,
    dtype: torch.dtype = torch.float32,
    config: DenseCamConfig | None = None,
) -> Tensor:
    """See :func:`gcfast.ops.dense_cam`, which checks the arguments."""
    (B, C, H, W), strides = laid_out(activations, grid)
    OH, OW = size
    if 0 in (B, C):
        return torch.zeros((B, OH, OW), dtype=dtype, device=activations.device)
    stride_h, stride_w = strides[2:]
    is_flat = H == 1 or stride_h == W * stride_w
    if W == 1 and H > 1:
        strides = (*strides[:3], stride_h)  # of a column, whose own stride says nothing
        is_flat = True
    is_whole = H * W > SPARSE_CAM_MAX_PIXELS
    finish = sparse_cam_config(H * W, OH / H, OW)
    config = config or dense_cam_config(B, C, H * W, multiprocessors(activations.device))
    slices = triton.cdiv(C, config.channels)
    parts = triton.cdiv(H * W, config.block_p)
    out = torch.empty((B, OH, OW), dtype=dtype, device=activations.device)
    sums = torch.empty((B, slices, H * W), dtype=torch.float32, device=activations.device)
    extremes = sums.new_empty((B, parts, 2)) if is_whole else sums
    rows = sparse_cam_rows(B, OH, finish)
    scales = (H / OH, W / OW)
    high = {
        "IS_BYTE": dtype == torch.uint8,
        "BLOCK_OH": finish.block_oh,
        "BLOCK_OW": finish.block_ow,
    }
    programs = B * triton.cdiv(OH, rows)
    with torch.cuda.device_of(activations):
        _channel_sums_kernel[(B * slices * parts,)](
            sums, extremes, activations, weights, *strides, *weights.stride(),
            C, H, W, slices, config.channels, int(relu),
            IS_FLAT=is_flat,
            IS_NEAR=is_near((C, H, W), strides),
            IS_WHOLE=is_whole,
            BLOCK_C=config.block_c,
            BLOCK_P=config.block_p,
            num_warps=config.num_warps,
        )  # fmt: skip
        if is_whole:
            _resize_kernel[(programs,)](
                out, sums, extremes, H, W, OH, OW, parts, rows, *scales, NORMALIZE[normalize],
                BLOCK_P=finish.block_p, num_warps=RESIZE_WARPS, **high,
            )  # fmt: skip
        else:
            _dense_cam_kernel[(programs,)](
                out, sums, H, W, OH, OW, slices, rows, *scales, int(relu), NORMALIZE[normalize],
                BLOCK_S=BLOCK_S, BLOCK_P=finish.block_p, num_warps=finish.num_warps, **high,
            )  # fmt: skip
    return out


def dense_cam_bytes(
    B: int, C: int, P: int, OH: int, OW: int, *, itemsize: int = 4, map_itemsize: int = 4
) -> int:
    """The least that must move: all activations and their weights in, the maps out."""
    return B * (C * (P * itemsize + 4) + OH * OW * map_itemsize)
