"""Gradients at a feature map to one weight a channel; see ``gcfast.ops.grad_weights``.

The work is one read of the gradients [B, T, C, H, W], and everything here serves that read. The sum
over T comes first, elementwise and without a word between threads: the method's non-linearity needs
only the channel's sum of activations, so it is elementwise too. Pixels are added up once, at the
end. Two kernels share this plan. Where each triplet's [C, H, W] is one run of memory with few
pixels a channel (7 x 7: a power-of-two tile over the pixels would leave 15 of 64 lanes idle and
could not load vectors), the run is read as such, whole channels at a time; every other layout goes
through a tile of channels x pixels at its strides.

Fusing ``top_m`` behind this does not pay: [B, C] float32 is written and read once, 2 x 8 KiB an
image at C = 2,048, beside 19.1 MiB of gradients (T = 50, 7 x 7, float32), 0.08 %. To own a whole
row a program would have to read all of an image's channels, so that B programs would be left.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gcfast.kernels.launch import (
    GradWeightsConfig,
    grad_weights_config,
    multiprocessors,
)

MEAN_BLOCKS = {"BLOCK_T": 64, "BLOCK_C": 256}


@triton.jit
def _relu(x):
    """max(x, 0), NaN kept."""
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _sum_pixels(run, place, inside, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    """The sums [BLOCK_C] over the pixels of a run's channels, which ``place`` finds in it."""
    spread = tl.where(inside, tl.gather(run, place, 0), 0.0)
    return tl.sum(tl.reshape(spread, (BLOCK_C, BLOCK_P)), axis=1)


@triton.jit
def _grad_weights_run_kernel(
    out_ptr,
    gradients_ptr,
    valid_ptr,
    activations_ptr,
    stride_out_b,
    stride_out_s,
    stride_gradients_b,
    stride_gradients_t,
    stride_valid_b,
    stride_valid_t,
    stride_activations_b,
    stride_activations_c,
    stride_activations_h,
    stride_activations_w,
    T,
    C,
    P,
    W,
    channels,
    triplets,
    splits,
    IS_PLUS: tl.constexpr,
    HAS_VALID: tl.constexpr,
    IS_PARTIAL: tl.constexpr,
    IS_MAP_RUN: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """out[b, s, c] = sum_t sum_p term(gradients[b, t, c, p]) over the valid t of part s.

    term(g) = g / P, or relu(g) / (2 + S_c relu(g)); divided by the number of valid t unless
    IS_PARTIAL. Grid: B * splits * ceil(C / channels), channels fastest. A program reads
    ``channels`` whole channels, up to BLOCK_E elements of the run.
    """
    i = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(C, channels)
    i_c, i_s, i_b = i % blocks, (i // blocks) % splits, i // (blocks * splits)
    first_c = i_c * channels
    kept = tl.minimum(channels, C - first_c).to(tl.int32)
    # `channels` was chosen so that every block starts on this boundary: loads become vectors.
    start = tl.multiple_of(first_c * P, ALIGN)
    offs_e = tl.arange(0, BLOCK_E)
    # Two bounds whose divisibility the compiler can see, where `kept * P` would hide it.
    mask_e = (offs_e < tl.multiple_of(channels * P, ALIGN)) & (start + offs_e < C * P)

    # Where pixel p of channel c lies in the block: c * P + p, out of the padded [BLOCK_C, BLOCK_P].
    offs_cp = tl.arange(0, BLOCK_C * BLOCK_P)
    own_c, own_p = offs_cp // BLOCK_P, offs_cp % BLOCK_P
    inside = (own_c < kept) & (own_p < P)
    place = tl.where(inside, own_c * P + own_p, 0)

    offs_c = tl.arange(0, BLOCK_C)
    sums = tl.zeros((BLOCK_E,), tl.float32)
    if IS_PLUS:
        maps = activations_ptr + i_b * stride_activations_b
        if IS_MAP_RUN:
            run = tl.load(maps + start + offs_e, mask=mask_e, other=0.0).to(tl.float32)
            per_channel = _sum_pixels(run, place, inside, BLOCK_C, BLOCK_P)
        else:
            pixel = (first_c + own_c) * stride_activations_c
            pixel += (own_p // W).to(tl.int64) * stride_activations_h
            pixel += (own_p % W).to(tl.int64) * stride_activations_w
            tile = tl.load(maps + pixel, mask=inside, other=0.0).to(tl.float32)
            per_channel = tl.sum(tl.reshape(tile, (BLOCK_C, BLOCK_P)), axis=1)
        # The channel of each element; what lies behind the last one is never added up.
        own = tl.minimum(offs_e // P, BLOCK_C - 1)
        sums = tl.gather(_relu(per_channel), own, 0)  # [BLOCK_E]

    gradients = gradients_ptr + i_b * stride_gradients_b + start
    acc = tl.zeros((BLOCK_E,), tl.float32)
    count = 0
    first_t = i_s * triplets
    last_t = tl.minimum(first_t + triplets, T)
    for t in range(first_t, last_t, BLOCK_T):
        offs_t = t + tl.arange(0, BLOCK_T).to(tl.int64)
        mask_t = offs_t < last_t
        if HAS_VALID:
            row = valid_ptr + i_b * stride_valid_b + offs_t * stride_valid_t
            mask_t = tl.load(row, mask=mask_t, other=0) != 0
        count += tl.sum(mask_t.to(tl.int32))
        rows = gradients + (offs_t * stride_gradients_t)[:, None] + offs_e[None, :]
        # A triplet that is not valid is not read: its lanes are off.
        g = tl.load(rows, mask=mask_t[:, None] & mask_e[None, :], other=0.0).to(tl.float32)
        if IS_PLUS:
            g = _relu(g)
            g = g / (2 + g * sums[None, :])
            g = tl.where(mask_t[:, None], g, 0.0)  # 0 * inf where a sum overflowed
        acc += tl.sum(g, axis=0)  # [BLOCK_E]

    total = _sum_pixels(acc, place, inside, BLOCK_C, BLOCK_P)
    if not IS_PLUS:
        total = total / P
    if not IS_PARTIAL:
        total = total / tl.maximum(count, 1)
    out = out_ptr + i_b * stride_out_b + i_s * stride_out_s + first_c + offs_c
    tl.store(out, total, mask=offs_c < kept)


@triton.jit
def _grad_weights_tile_kernel(
    out_ptr,
    gradients_ptr,
    valid_ptr,
    activations_ptr,
    stride_out_b,
    stride_out_s,
    stride_gradients_b,
    stride_gradients_t,
    stride_gradients_c,
    stride_gradients_h,
    stride_gradients_w,
    stride_valid_b,
    stride_valid_t,
    stride_activations_b,
    stride_activations_c,
    stride_activations_h,
    stride_activations_w,
    T,
    C,
    P,
    W,
    triplets,
    splits,
    IS_PLUS: tl.constexpr,
    HAS_VALID: tl.constexpr,
    IS_PARTIAL: tl.constexpr,
    IS_FLAT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """As ``_grad_weights_run_kernel``, at any strides.

    Grid: B * splits * ceil(C / BLOCK_C), channels fastest. IS_FLAT: pixel p lies at p times
    ``stride_gradients_w``, so that no division hides from the compiler what is contiguous.
    """
    i = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(C, BLOCK_C)
    i_c, i_s, i_b = i % blocks, (i // blocks) % splits, i // (blocks * splits)
    offs_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C

    sums = tl.zeros((BLOCK_C,), tl.float32)
    if IS_PLUS:
        rows = activations_ptr + i_b * stride_activations_b + offs_c * stride_activations_c
        part = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
        for start in range(0, P, BLOCK_P):
            offs_p = start + tl.arange(0, BLOCK_P)
            pixel = (offs_p // W).to(tl.int64) * stride_activations_h
            pixel += (offs_p % W).to(tl.int64) * stride_activations_w
            mask = mask_c[:, None] & (offs_p < P)[None, :]
            part += tl.load(rows[:, None] + pixel[None, :], mask=mask, other=0.0).to(tl.float32)
        sums = _relu(tl.sum(part, axis=1))

    first_t = i_s * triplets
    last_t = tl.minimum(first_t + triplets, T)
    rows = gradients_ptr + i_b * stride_gradients_b + offs_c * stride_gradients_c  # [BLOCK_C]
    acc = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    for start in range(0, P, BLOCK_P):
        offs_p = start + tl.arange(0, BLOCK_P)
        if IS_FLAT:
            pixel = offs_p.to(tl.int64) * stride_gradients_w
        else:
            pixel = (offs_p // W).to(tl.int64) * stride_gradients_h
            pixel += (offs_p % W).to(tl.int64) * stride_gradients_w
        tiles = rows[:, None] + pixel[None, :]
        mask = mask_c[:, None] & (offs_p < P)[None, :]
        part = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
        for t in range(first_t, last_t):
            used = 1
            if HAS_VALID:
                used = tl.load(valid_ptr + i_b * stride_valid_b + t * stride_valid_t)
            if used != 0:
                g = tl.load(tiles + t * stride_gradients_t, mask=mask, other=0.0).to(tl.float32)
                if IS_PLUS:
                    g = _relu(g)
                    g = g / (2 + g * sums[:, None])
                part += g
        acc += tl.where(mask, part, 0.0)  # 0 * inf beyond the last pixel
    total = tl.sum(acc, axis=1)  # [BLOCK_C]
    if not IS_PLUS:
        total = total / P
    if not IS_PARTIAL:
        count = (last_t - first_t).to(tl.int32)
        if HAS_VALID:
            count = 0
            for t in range(first_t, last_t):
                used = tl.load(valid_ptr + i_b * stride_valid_b + t * stride_valid_t) != 0
                count += used.to(tl.int32)
        total = total / tl.maximum(count, 1)
    out = out_ptr + i_b * stride_out_b + i_s * stride_out_s + offs_c
    tl.store(out, total, mask=mask_c)


@triton.jit
def _grad_weights_mean_kernel(
    out_ptr,
    parts_ptr,
    valid_ptr,
    stride_valid_b,
    stride_valid_t,
    T,
    C,
    splits,
    HAS_VALID: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out[b, c] = sum_s parts[b, s, c] / number of valid t. Grid: B * ceil(C / BLOCK_C)."""
    i = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(C, BLOCK_C)
    i_c, i_b = i % blocks, i // blocks
    offs_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    total = tl.zeros((BLOCK_C,), tl.float32)
    for s in range(splits):
        total += tl.load(parts_ptr + (i_b * splits + s) * C + offs_c, mask=mask_c, other=0.0)
    count = T
    if HAS_VALID:
        count = 0
        for start in range(0, T, BLOCK_T):
            offs_t = start + tl.arange(0, BLOCK_T).to(tl.int64)
            row = valid_ptr + i_b * stride_valid_b + offs_t * stride_valid_t
            count += tl.sum((tl.load(row, mask=offs_t < T, other=0) != 0).to(tl.int32))
    tl.store(out_ptr + i_b * C + offs_c, total / tl.maximum(count, 1), mask=mask_c)


def _run_blocks(config: GradWeightsConfig, P: int) -> dict[str, int]:
    return {
        "ALIGN": config.align,
        "BLOCK_T": config.block_t,
        "BLOCK_C": triton.next_power_of_2(config.channels),
        "BLOCK_P": triton.next_power_of_2(P),
        "BLOCK_E": triton.next_power_of_2(config.channels * P),
    }


def launch_grad_weights(
    gradients: Tensor,
    valid: Tensor | None = None,
    *,
    activations: Tensor | None = None,
    method: str = "gradcam",
    config: GradWeightsConfig | None = None,
) -> Tensor:
    """[B, T, C, H, W], any strides, to [B, C] fp32. Trusts its input; ``ops`` checks it."""
    B, T, C, H, W = gradients.shape
    P = H * W
    out = torch.empty((B, C), dtype=torch.float32, device=gradients.device)
    if out.numel() == 0:
        return out
    stride_b, stride_t, stride_c, stride_h, stride_w = gradients.stride()
    # Strides of sizes of one say nothing; what they would be in a run is as good as any.
    stride_p = stride_w if W > 1 else stride_h if H > 1 else 1
    is_flat = H == 1 or W == 1 or stride_h == W * stride_w
    is_run = is_flat and stride_p == 1 and (C == 1 or stride_c == P)
    config = config or grad_weights_config(
        B,
        T,
        C,
        P,
        gradients.element_size(),
        is_run=is_run,
        is_last=stride_c == 1,
        sms=multiprocessors(gradients.device),
    )
    splits = max(1, min(config.splits, T))
    triplets = triton.cdiv(T, splits)
    parts = out if splits == 1 else out.new_empty((B, splits, C))
    flags = None if valid is None else valid.view(torch.uint8)
    valid_strides = (0, 0) if flags is None else flags.stride()
    shared = {
        "IS_PLUS": method == "gradcam++",
        "HAS_VALID": flags is not None,
        "IS_PARTIAL": splits > 1,
        "num_warps": config.num_warps,
    }
    # Pointers that the flags leave unused still need a tensor.
    if method == "gradcam":
        activations = None
    maps = gradients if activations is None else activations
    map_strides = (0, 0, 0, 0) if activations is None else activations.stride()
    tensors = (parts, gradients, out if flags is None else flags, maps)
    part_strides = (splits * C, C)
    with torch.cuda.device_of(gradients):
        if is_run and config.channels:
            _grad_weights_run_kernel[(B * splits * triton.cdiv(C, config.channels),)](
                *tensors, *part_strides, stride_b, stride_t, *valid_strides, *map_strides,
                T, C, P, W, config.channels, triplets, splits,
                IS_MAP_RUN=activations is not None and activations.is_contiguous(),
                **_run_blocks(config, P), **shared,
            )  # fmt: skip
        else:
            _grad_weights_tile_kernel[(B * splits * triton.cdiv(C, config.block_c),)](
                *tensors, *part_strides, stride_b, stride_t, stride_c,
                stride_h, stride_p if is_flat else stride_w, *valid_strides, *map_strides,
                T, C, P, W, triplets, splits,
                IS_FLAT=is_flat, BLOCK_C=config.block_c, BLOCK_P=config.block_p, **shared,
            )  # fmt: skip
        if splits > 1:
            _grad_weights_mean_kernel[(B * triton.cdiv(C, MEAN_BLOCKS["BLOCK_C"]),)](
                out, parts, tensors[2], *valid_strides, T, C, splits,
                HAS_VALID=flags is not None, **MEAN_BLOCKS,
            )  # fmt: skip
    return out
