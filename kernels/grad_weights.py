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
# Integers that 16 divides where it divides C, for which Triton loads vectors.
ROUND = ("C", "stride_gradients_b", "stride_gradients_t", "stride_gradients_h")
# Integers that are 1, as a rule, by kernel and by whether channels come last.
ONES = {
    ("_grad_weights_run_kernel", False): ("splits", "stride_valid_t", "stride_activations_w"),
    ("_grad_weights_tile_kernel", False): ("splits", "stride_valid_t", "stride_gradients_w"),
    ("_grad_weights_tile_kernel", True): ("splits", "stride_gradients_c", "stride_activations_c"),
}


@triton.jit
def _relu(x):
    """max(x, 0), NaN kept."""
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _plus(g, half_sums):
    """Twice the terms of Grad-CAM++, relu(g) / (2 + sums relu(g)), which is exact for sums of 0.

    The square of the reciprocal root is good to 2^-21 and takes two instructions; a division good
    to 2^-22 takes nine, since it also serves divisors outside of [1, inf].
    """
    g = _relu(g)
    root = tl.math.rsqrt(1 + g * half_sums)
    return g * root * root


@triton.jit
def _count(valid_ptr, stride, T, HAS_VALID: tl.constexpr, BLOCK_T: tl.constexpr):
    """The valid triplets of an image, at least 1."""
    count = T
    if HAS_VALID:
        count = 0
        for start in range(0, T, BLOCK_T):
            offs_t = start + tl.arange(0, BLOCK_T).to(tl.int64)
            flags = tl.load(valid_ptr + offs_t * stride, mask=offs_t < T, other=0)
            count += tl.sum((flags != 0).to(tl.int32))
    return tl.maximum(count, 1)


@triton.jit
def _sum_pixels(run, kept, P, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    """The sums [BLOCK_C] over the P pixels of a run's channels, the first ``kept`` of them.

    A few pixels of every channel at a time, or their places would fill the registers.
    """
    offs = tl.arange(0, BLOCK_C * BLOCK_P)
    own_c = offs // BLOCK_P
    total = tl.zeros((BLOCK_C,), tl.float32)
    for first in range(0, P, BLOCK_P):
        own_p = first + offs % BLOCK_P
        inside = (own_c < kept) & (own_p < P)
        spread = tl.gather(run, tl.where(inside, own_c * P + own_p, 0), 0)
        total += tl.sum(tl.reshape(tl.where(inside, spread, 0.0), (BLOCK_C, BLOCK_P)), axis=1)
    return total


@triton.jit
def _load_triplets(
    gradients, valid_ptr, stride_gradients_t, stride_valid_t, first, last_t, offs_e, mask_e,
    HAS_VALID: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """(the elements of some triplets [BLOCK_T, BLOCK_E], which of them count [BLOCK_T])."""
    offs_t = first + tl.arange(0, BLOCK_T).to(tl.int64)
    used = offs_t < last_t
    if HAS_VALID:
        used = tl.load(valid_ptr + offs_t * stride_valid_t, mask=used, other=0) != 0
    rows = gradients + (offs_t * stride_gradients_t)[:, None] + offs_e[None, :]
    # A triplet that is not valid is not read: its lanes are off.
    return tl.load(rows, mask=used[:, None] & mask_e[None, :], other=0.0), used


@triton.jit
def _grad_weights_run_kernel(
    out_ptr, gradients_ptr, valid_ptr, activations_ptr,
    stride_out_b, stride_out_s, stride_gradients_b, stride_gradients_t,
    stride_valid_b, stride_valid_t,
    stride_activations_b, stride_activations_c, stride_activations_h, stride_activations_w,
    T, C, P, W, channels, triplets, splits,
    IS_PLUS: tl.constexpr, HAS_VALID: tl.constexpr, IS_PARTIAL: tl.constexpr,
    IS_MAP_RUN: tl.constexpr, ALIGN: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
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

    offs_c = tl.arange(0, BLOCK_C)
    valid_ptr += i_b * stride_valid_b
    first_t = i_s * triplets
    last_t = tl.minimum(first_t + triplets, T)
    gradients = gradients_ptr + i_b * stride_gradients_b + start
    g, used = _load_triplets(
        gradients, valid_ptr, stride_gradients_t, stride_valid_t, first_t, last_t, offs_e, mask_e,
        HAS_VALID, BLOCK_T,
    )  # fmt: skip
    half_sums = tl.zeros((BLOCK_E,), tl.float32)
    if IS_PLUS:
        maps = activations_ptr + i_b * stride_activations_b
        pixel = start + offs_e
        if not IS_MAP_RUN:
            own_p = offs_e % P
            pixel = (first_c + offs_e // P) * stride_activations_c
            pixel += (own_p // W).to(tl.int64) * stride_activations_h
            pixel += (own_p % W).to(tl.int64) * stride_activations_w
        run = tl.load(maps + pixel, mask=mask_e, other=0.0).to(tl.float32)
        per_channel = 0.5 * _relu(_sum_pixels(run, kept, P, BLOCK_C, BLOCK_P))
        # The channel of each element; what lies behind the last one is never added up.
        half_sums = tl.gather(per_channel, tl.minimum(offs_e // P, BLOCK_C - 1), 0)  # [BLOCK_E]

    acc = tl.zeros((BLOCK_E,), tl.float32)
    for t in range(first_t, last_t, BLOCK_T):
        # The next ones are on their way while these are added up.
        ahead, ahead_used = _load_triplets(
            gradients, valid_ptr, stride_gradients_t, stride_valid_t, t + BLOCK_T, last_t,
            offs_e, mask_e, HAS_VALID, BLOCK_T,
        )  # fmt: skip
        g = g.to(tl.float32)
        if IS_PLUS:
            g = tl.where(used[:, None], _plus(g, half_sums[None, :]), 0.0)  # 0 * inf otherwise
        acc += tl.sum(g, axis=0)  # [BLOCK_E]
        g, used = ahead, ahead_used

    total = _sum_pixels(acc, kept, P, BLOCK_C, BLOCK_P)
    total = 0.5 * total if IS_PLUS else total / P
    if not IS_PARTIAL:
        total = total / _count(valid_ptr, stride_valid_t, T, HAS_VALID, 64)
    out = out_ptr + i_b * stride_out_b + i_s * stride_out_s + first_c + offs_c
    tl.store(out, total, mask=offs_c < kept)


@triton.jit
def _load_tile(
    rows, valid_ptr, stride_gradients_t, stride_gradients_h, stride_gradients_w, stride_valid_t,
    mask_c, step, T, P, W,
    HAS_VALID: tl.constexpr, IS_FLAT: tl.constexpr, IS_LAST: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """(a tile of channels and pixels [BLOCK_C, BLOCK_P], which of the pixels count [BLOCK_P])."""
    if IS_LAST:
        offs = step * BLOCK_P + tl.arange(0, BLOCK_P)
        t = offs // P
        offs_p = offs % P
    else:
        tiles = tl.cdiv(P, BLOCK_P)
        t = step // tiles
        offs_p = step % tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    used = t < T
    if HAS_VALID:
        used = tl.load(valid_ptr + t.to(tl.int64) * stride_valid_t, mask=used, other=0) != 0
    if IS_FLAT:
        pixel = offs_p.to(tl.int64) * stride_gradients_w
    else:
        pixel = (offs_p // W).to(tl.int64) * stride_gradients_h
        pixel += (offs_p % W).to(tl.int64) * stride_gradients_w
    pixel += t.to(tl.int64) * stride_gradients_t
    # A triplet that is not valid is not read: its lanes are off.
    used = offs_p < tl.where(used, P, 0)
    mask = mask_c[:, None] & used[None, :]
    return tl.load(rows[:, None] + pixel[None, :], mask=mask, other=0.0), used


@triton.jit
def _grad_weights_tile_kernel(
    out_ptr, gradients_ptr, valid_ptr, activations_ptr,
    stride_out_b, stride_out_s, stride_gradients_b, stride_gradients_t, stride_gradients_c,
    stride_gradients_h, stride_gradients_w, stride_valid_b, stride_valid_t,
    stride_activations_b, stride_activations_c, stride_activations_h, stride_activations_w,
    T, C, P, W, steps, splits,
    IS_PLUS: tl.constexpr, HAS_VALID: tl.constexpr, IS_PARTIAL: tl.constexpr,
    IS_FLAT: tl.constexpr, IS_LAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """As ``_grad_weights_run_kernel``, at any strides.

    Grid: B * splits * ceil(C / BLOCK_C), channels fastest. A program takes ``steps`` tiles of
    BLOCK_P pixels, of one triplet each; or with IS_LAST (channels-last) of the pixels of all
    triplets in one row, so that no tile but the last has lanes to spare. IS_FLAT: pixel p lies at
    p times ``stride_gradients_w``, so that no division hides from the compiler what is contiguous.
    """
    i = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(C, BLOCK_C)
    i_c, i_s, i_b = i % blocks, (i // blocks) % splits, i // (blocks * splits)
    offs_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    valid_ptr += i_b * stride_valid_b

    half_sums = tl.zeros((BLOCK_C,), tl.float32)
    if IS_PLUS:
        rows = activations_ptr + i_b * stride_activations_b + offs_c * stride_activations_c
        part = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
        for start in range(0, P, BLOCK_P):
            offs_p = start + tl.arange(0, BLOCK_P)
            pixel = (offs_p // W).to(tl.int64) * stride_activations_h
            pixel += (offs_p % W).to(tl.int64) * stride_activations_w
            mask = mask_c[:, None] & (offs_p < P)[None, :]
            part += tl.load(rows[:, None] + pixel[None, :], mask=mask, other=0.0).to(tl.float32)
        half_sums = 0.5 * _relu(tl.sum(part, axis=1))

    rows = gradients_ptr + i_b * stride_gradients_b + offs_c * stride_gradients_c  # [BLOCK_C]
    acc = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    first = i_s.to(tl.int32) * steps
    g, used = _load_tile(
        rows, valid_ptr, stride_gradients_t, stride_gradients_h, stride_gradients_w,
        stride_valid_t, mask_c, first, T, P, W, HAS_VALID, IS_FLAT, IS_LAST, BLOCK_P,
    )  # fmt: skip
    for step in range(first, first + steps):
        # The next one is on its way while this one is added up; of the last one nothing is read.
        ahead, ahead_used = _load_tile(
            rows, valid_ptr, stride_gradients_t, stride_gradients_h, stride_gradients_w,
            stride_valid_t, offs_c < tl.where(step + 1 < first + steps, C, 0), step + 1, T, P, W,
            HAS_VALID, IS_FLAT, IS_LAST, BLOCK_P,
        )  # fmt: skip
        g = g.to(tl.float32)
        if IS_PLUS:
            g = tl.where(used[None, :], _plus(g, half_sums[:, None]), 0.0)  # 0 * inf otherwise
        acc += g
        g, used = ahead, ahead_used
    total = tl.sum(acc, axis=1)  # [BLOCK_C]
    total = 0.5 * total if IS_PLUS else total / P
    if not IS_PARTIAL:
        total = total / _count(valid_ptr, stride_valid_t, T, HAS_VALID, 64)
    out = out_ptr + i_b * stride_out_b + i_s * stride_out_s + offs_c
    tl.store(out, total, mask=mask_c)


@triton.jit
def _grad_weights_mean_kernel(
    out_ptr, parts_ptr, valid_ptr, stride_valid_b, stride_valid_t, T, C, splits,
    HAS_VALID: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out[b, c] = sum_s parts[b, s, c] / number of valid t. Grid: B * ceil(C / BLOCK_C)."""
    i = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(C, BLOCK_C)
    i_c, i_b = i % blocks, i // blocks
    offs_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    total = tl.zeros((BLOCK_C,), tl.float32)
    for s in range(splits):
        total += tl.load(parts_ptr + (i_b * splits + s) * C + offs_c, mask=mask_c, other=0.0)
    count = _count(valid_ptr + i_b * stride_valid_b, stride_valid_t, T, HAS_VALID, BLOCK_T)
    tl.store(out_ptr + i_b * C + offs_c, total / count, mask=mask_c)


def _run_blocks(config: GradWeightsConfig, P: int) -> dict[str, int]:
    return {
        "ALIGN": config.align,
        "BLOCK_T": config.block_t,
        "BLOCK_C": triton.next_power_of_2(config.channels),
        "BLOCK_P": max(1, triton.next_power_of_2(P) // 4),
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
                T, C, P, W, config.channels, triton.cdiv(T, splits), splits,
                IS_MAP_RUN=activations is not None and activations.is_contiguous(),
                **_run_blocks(config, P), **shared,
            )  # fmt: skip
        else:
            is_last = stride_c == 1
            rows = (T * P, 1) if is_last else (P, T)
            steps = triton.cdiv(triton.cdiv(rows[0], config.block_p) * rows[1], splits)
            _grad_weights_tile_kernel[(B * splits * triton.cdiv(C, config.block_c),)](
                *tensors, *part_strides, stride_b, stride_t, stride_c,
                stride_h, stride_p if is_flat else stride_w, *valid_strides, *map_strides,
                T, C, P, W, steps, splits,
                IS_FLAT=is_flat, IS_LAST=is_last, BLOCK_C=config.block_c, BLOCK_P=config.block_p,
                **shared,
            )  # fmt: skip
        if splits > 1:
            _grad_weights_mean_kernel[(B * triton.cdiv(C, MEAN_BLOCKS["BLOCK_C"]),)](
                out, parts, tensors[2], *valid_strides, T, C, splits,
                HAS_VALID=flags is not None, **MEAN_BLOCKS,
            )  # fmt: skip
    return out
