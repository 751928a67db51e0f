"""Sparse heat maps in one launch: gather, weighted sum, normalisation, bilinear upsampling.

The least that must move is ``sparse_cam_bytes``: for most shapes nearly all of it is the maps that
are written. So everything before the upsampling is arranged to be small beside that, even where
several programs share an image and each does it again.

* A map up to 64 x 64 is held whole in registers, padded to a square window. Each program makes it
  (K M P elements are read, which L2 serves to all but the first), normalises it, and writes its
  share of the output rows. An image has as many programs as it takes to fill a GPU, so one image
  has many and a large batch one or two each.
* Of a larger map only the window under the current output tile is held. Its largest and smallest
  value must be known first, and each program goes through the whole map for them: the price of one
  launch without a barrier over the device.

The upsampling is separable, columns first, as ``F.interpolate`` associates it: two reads of shared
memory and one interpolation for each output value (``tl.gather``), where four taps would take four
and three. Products with interpolation matrices would not need shared memory, but spread a NaN or
an infinity (0 times which is NaN) over the whole map; the taps keep to where the reference has it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gcfast.kernels.launch import (
    SparseCamConfig,
    sparse_cam_config,
    sparse_cam_slices,
)

NORMALIZE = {None: 0, "max": 1, "minmax": 2}


@triton.jit
def _low_resolution(
    activations_ptr, neighbors_ptr, channels_ptr, weights_ptr, mixing_ptr, share, offset,
    stride_act_c, stride_act_h, stride_act_w, stride_nei_k, stride_cha_n, stride_cha_m,
    stride_wei_n, stride_wei_m, stride_mix_k, first_h, first_w,
    C, H, W, N, K, M, relu,
    HAS_MIXING: tl.constexpr, WINDOW: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """sum_k x_k sum_m w[n_k,m] A[ch[n_k,m]] - offset, then ReLU, on a window; [WINDOW * WINDOW].

    The pointers of activations, neighbours and mixing are those of one image.
    """
    offs_p = tl.arange(0, WINDOW * WINDOW)
    rows = first_h + offs_p // WINDOW
    columns = first_w + offs_p % WINDOW
    mask_p = (rows < H) & (columns < W)
    pixels = rows.to(tl.int64) * stride_act_h + columns.to(tl.int64) * stride_act_w

    cam = tl.zeros((WINDOW * WINDOW,), tl.float32)
    for start in range(0, K * M, BLOCK_M):
        offs_j = start + tl.arange(0, BLOCK_M)
        mask_j = offs_j < K * M
        i_k = (offs_j // M).to(tl.int64)
        i_m = (offs_j % M).to(tl.int64)
        row = tl.load(neighbors_ptr + i_k * stride_nei_k, mask=mask_j, other=-1)
        mask_j = mask_j & (row >= 0) & (row < N)
        channel = tl.load(
            channels_ptr + row * stride_cha_n + i_m * stride_cha_m, mask=mask_j, other=-1
        )
        weight = tl.load(
            weights_ptr + row * stride_wei_n + i_m * stride_wei_m, mask=mask_j, other=0.0
        ).to(tl.float32)
        if HAS_MIXING:
            mixed = tl.load(mixing_ptr + i_k * stride_mix_k, mask=mask_j, other=0.0)
            weight *= mixed.to(tl.float32)
        else:
            weight *= share
        # An id that is out of range is not followed.
        mask_j = mask_j & (channel >= 0) & (channel < C)
        tile = tl.load(
            activations_ptr + channel[:, None] * stride_act_c + pixels[None, :],
            mask=mask_j[:, None] & mask_p[None, :],
            other=0.0,
        )  # [BLOCK_M, WINDOW * WINDOW]
        cam += tl.sum(tile.to(tl.float32) * weight[:, None], axis=0)
    cam -= offset
    # Comparing, not tl.maximum, which would drop a NaN.
    return tl.where((relu != 0) & (cam < 0), 0.0, cam)


@triton.jit
def _extremes(cam, first_h, first_w, H, W, WINDOW: tl.constexpr):
    """(smallest, largest) of the window's pixels inside the map, both NaN where one is."""
    offs_p = tl.arange(0, WINDOW * WINDOW)
    mask = (first_h + offs_p // WINDOW < H) & (first_w + offs_p % WINDOW < W)
    smallest = tl.min(tl.where(mask, cam, float("inf")), axis=0)
    largest = tl.max(tl.where(mask, cam, float("-inf")), axis=0)
    # The reductions skip NaN.
    nan = tl.max((mask & (cam != cam)).to(tl.int32), axis=0)
    smallest = tl.where(nan != 0, float("nan"), smallest)
    largest = tl.where(nan != 0, float("nan"), largest)
    return smallest, largest


@triton.jit
def _normalized(cam, smallest, largest, normalize):
    """The map by its largest magnitude (1), or from its smallest value to its largest (2)."""
    low = tl.where(normalize == 2, smallest, 0.0)
    # NaN for both where there is one, so that it does not matter which of them tl.maximum takes.
    peak = tl.maximum(tl.abs(smallest - low), tl.abs(largest - low))
    peak = tl.where(smallest != smallest, smallest, peak)
    # The division is good to two units in the last place, and so may end above 1.
    scaled = tl.where(peak == 0, 0.0, (cam - low) / tl.where(peak == 0, 1.0, peak))
    scaled = tl.where(scaled > 1, 1.0, tl.where(scaled < -1, -1.0, scaled))
    return tl.where(normalize == 0, cam, scaled)


@triton.jit
def _taps(offs, scale, size):
    """The two source positions of output positions, and how far towards the second."""
    source = tl.maximum((offs + 0.5) * scale - 0.5, 0.0)
    first = tl.minimum(source.to(tl.int32), size - 1)
    second = tl.minimum(first + 1, size - 1)
    # At most 1 also for lanes beyond the output, which would overflow for nothing.
    return first, second, tl.minimum(source - first.to(tl.float32), 1.0)


@triton.jit
def _store_rows(
    out_ptr, across, first_row, end_row, first_column, end_column, origin_h, scale_h, H, OW,
    IS_BYTE: tl.constexpr, WINDOW: tl.constexpr, BLOCK_OH: tl.constexpr, BLOCK_OW: tl.constexpr,
):  # fmt: skip
    """Interpolate down the columns of ``across`` [WINDOW, BLOCK_OW], and write those rows."""
    offs_h = first_row + tl.arange(0, BLOCK_OH)
    offs_w = first_column + tl.arange(0, BLOCK_OW)
    top, bottom, down = _taps(offs_h, scale_h, H)
    top = tl.minimum(tl.maximum(top - origin_h, 0), WINDOW - 1)
    bottom = tl.minimum(tl.maximum(bottom - origin_h, 0), WINDOW - 1)
    index = tl.zeros((BLOCK_OH, BLOCK_OW), tl.int32)
    upper = tl.gather(across, index + top[:, None], axis=0)
    lower = tl.gather(across, index + bottom[:, None], axis=0)
    values = upper * (1.0 - down)[:, None] + lower * down[:, None]  # [BLOCK_OH, BLOCK_OW]
    if IS_BYTE:
        values = tl.minimum(tl.maximum(values, 0.0), 1.0) * 255.0
        # Adding and taking away 1.5 * 2^23 rounds to the nearest even, as torch.round does.
        values = (values + 12582912.0) - 12582912.0
    mask = (offs_h < end_row)[:, None] & (offs_w < end_column)[None, :]
    pointers = out_ptr + offs_h.to(tl.int64)[:, None] * OW + offs_w[None, :]
    tl.store(pointers, values.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _across(
    cam, first_column, origin_w, scale_w, W,
    WINDOW: tl.constexpr, BLOCK_OW: tl.constexpr,
):  # fmt: skip
    """Interpolate along the rows of ``cam`` [WINDOW * WINDOW] to [WINDOW, BLOCK_OW].

    Flat, since Triton 3.7.1 stops at an assertion for a gather along the rows of a small matrix.
    """
    offs = tl.arange(0, WINDOW * BLOCK_OW)
    left, right, along = _taps(first_column + offs % BLOCK_OW, scale_w, W)
    left = tl.minimum(tl.maximum(left - origin_w, 0), WINDOW - 1)
    right = tl.minimum(tl.maximum(right - origin_w, 0), WINDOW - 1)
    row = offs // BLOCK_OW * WINDOW
    near = tl.gather(cam, row + left, axis=0)
    far = tl.gather(cam, row + right, axis=0)
    return tl.reshape(near * (1.0 - along) + far * along, (WINDOW, BLOCK_OW))


@triton.jit(do_not_specialize=["slices"])  # or batches of other sizes are compiled for anew
def _sparse_cam_kernel(
    out_ptr, activations_ptr, neighbors_ptr, channels_ptr, weights_ptr, mixing_ptr, offsets_ptr,
    stride_act_b, stride_act_c, stride_act_h, stride_act_w, stride_nei_b, stride_nei_k,
    stride_cha_n, stride_cha_m, stride_wei_n, stride_wei_m, stride_mix_b, stride_mix_k, stride_off,
    C, H, W, N, K, M, OH, OW, slices, tile_h, tile_w, scale_h, scale_w, center, relu, normalize,
    HAS_MIXING: tl.constexpr, IS_BYTE: tl.constexpr, IS_WHOLE: tl.constexpr, WINDOW: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_OH: tl.constexpr, BLOCK_OW: tl.constexpr,
):  # fmt: skip
    """map[b] = resize(normalize(relu(sum_k x_k (sum_m w[n_k,m] A[b,ch[n_k,m]] - center o[n_k])))).

    Grid: (B * slices,); a slice is every ``slices``-th tile of output rows. An output tile has
    ``tile_h`` x ``tile_w`` pixels, of which BLOCK_OH x BLOCK_OW at most.
    """
    i_b = (tl.program_id(0) // slices).to(tl.int64)
    i_slice = tl.program_id(0) % slices
    out_ptr += i_b * OH * OW
    activations_ptr += i_b * stride_act_b
    neighbors_ptr += i_b * stride_nei_b
    if HAS_MIXING:
        mixing_ptr += i_b * stride_mix_b

    found = 0
    for i_k in range(0, K):
        row = tl.load(neighbors_ptr + i_k * stride_nei_k)
        found += ((row >= 0) & (row < N)).to(tl.int32)
    share = 1.0 / tl.maximum(found, 1).to(tl.float32)
    offset = 0.0
    if center != 0:
        for i_k in range(0, K):
            row = tl.load(neighbors_ptr + i_k * stride_nei_k)
            inside = (row >= 0) & (row < N)
            value = tl.load(offsets_ptr + row * stride_off, mask=inside, other=0.0).to(tl.float32)
            mixed = share
            if HAS_MIXING:
                mixed = tl.load(mixing_ptr + i_k * stride_mix_k).to(tl.float32)
            offset += tl.where(inside, value * mixed, 0.0) * center

    if IS_WHOLE:
        cam = _low_resolution(
            activations_ptr, neighbors_ptr, channels_ptr, weights_ptr, mixing_ptr, share, offset,
            stride_act_c, stride_act_h, stride_act_w, stride_nei_k, stride_cha_n, stride_cha_m,
            stride_wei_n, stride_wei_m, stride_mix_k, 0, 0,
            C, H, W, N, K, M, relu, HAS_MIXING, WINDOW, BLOCK_M,
        )  # fmt: skip
        smallest, largest = _extremes(cam, 0, 0, H, W, WINDOW)
        cam = _normalized(cam, smallest, largest, normalize)
        for first_column in range(0, OW, tile_w):
            across = _across(cam, first_column, 0, scale_w, W, WINDOW, BLOCK_OW)
            for first_row in range(i_slice * tile_h, OH, slices * tile_h):
                _store_rows(
                    out_ptr, across, first_row, OH, first_column, OW, 0, scale_h, H, OW,
                    IS_BYTE, WINDOW, BLOCK_OH, BLOCK_OW,
                )  # fmt: skip
    else:
        smallest = float("inf")
        largest = float("-inf")
        if normalize != 0:
            for first_h in range(0, H, WINDOW):
                for first_w in range(0, W, WINDOW):
                    cam = _low_resolution(
                        activations_ptr, neighbors_ptr, channels_ptr, weights_ptr, mixing_ptr,
                        share, offset, stride_act_c, stride_act_h, stride_act_w, stride_nei_k,
                        stride_cha_n, stride_cha_m, stride_wei_n, stride_wei_m, stride_mix_k,
                        first_h, first_w, C, H, W, N, K, M, relu, HAS_MIXING, WINDOW, BLOCK_M,
                    )  # fmt: skip
                    low, high = _extremes(cam, first_h, first_w, H, W, WINDOW)
                    # Once NaN it stays: every comparison with it is false.
                    smallest = tl.where((low < smallest) | (low != low), low, smallest)
                    largest = tl.where((high > largest) | (high != high), high, largest)
        for first_row in range(i_slice * tile_h, OH, slices * tile_h):
            source = tl.maximum((first_row + 0.5) * scale_h - 0.5, 0.0)
            origin_h = tl.minimum(source.to(tl.int32), H - 1)
            for first_column in range(0, OW, tile_w):
                source = tl.maximum((first_column + 0.5) * scale_w - 0.5, 0.0)
                origin_w = tl.minimum(source.to(tl.int32), W - 1)
                cam = _low_resolution(
                    activations_ptr, neighbors_ptr, channels_ptr, weights_ptr, mixing_ptr,
                    share, offset, stride_act_c, stride_act_h, stride_act_w, stride_nei_k,
                    stride_cha_n, stride_cha_m, stride_wei_n, stride_wei_m, stride_mix_k,
                    origin_h, origin_w, C, H, W, N, K, M, relu, HAS_MIXING, WINDOW, BLOCK_M,
                )  # fmt: skip
                cam = _normalized(cam, smallest, largest, normalize)
                across = _across(cam, first_column, origin_w, scale_w, W, WINDOW, BLOCK_OW)
                _store_rows(
                    out_ptr, across, first_row, tl.minimum(first_row + tile_h, OH),
                    first_column, tl.minimum(first_column + tile_w, OW), origin_h, scale_h, H, OW,
                    IS_BYTE, WINDOW, BLOCK_OH, BLOCK_OW,
                )  # fmt: skip


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
    if activations.ndim == 3:  # tokens [B, P, C]
        assert grid is not None
        B, _, C = activations.shape
        H, W = grid
        stride_b, stride_p, stride_c = activations.stride()
        strides: tuple[int, ...] = (stride_b, stride_c, W * stride_p, stride_p)
    else:
        B, C, H, W = activations.shape
        strides = activations.stride()
    K, (N, M), (OH, OW) = neighbors.shape[1], channels.shape, size
    if 0 in (B, K, N, M):
        return torch.zeros((B, OH, OW), dtype=dtype, device=activations.device)
    config = config or sparse_cam_config(H, W, OW)
    tile_h, tile_w = config.tile(H, OH, W, OW)
    slices = sparse_cam_slices(B, triton.cdiv(OH, tile_h))
    out = torch.empty((B, OH, OW), dtype=dtype, device=activations.device)
    # Where there is none, any pointer will do: nothing is read through it.
    given_mixing = weights if mixing is None else mixing
    given_offsets = weights if offsets is None else offsets
    with torch.cuda.device_of(activations):
        _sparse_cam_kernel[(B * slices,)](
            out, activations, neighbors, channels, weights, given_mixing, given_offsets,
            *strides, *neighbors.stride(), *channels.stride(), *weights.stride(),
            *given_mixing.stride(), given_offsets.stride(0),
            C, H, W, N, K, M, OH, OW, slices, tile_h, tile_w, H / OH, W / OW,
            0.0 if offsets is None else float(center), int(relu), NORMALIZE[normalize],
            HAS_MIXING=mixing is not None, IS_BYTE=dtype == torch.uint8, IS_WHOLE=config.whole,
            WINDOW=config.window, BLOCK_M=config.block_m, BLOCK_OH=config.block_oh,
            BLOCK_OW=config.block_ow, num_warps=config.num_warps,
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
