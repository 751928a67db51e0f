"""Grad-weights of the common head by its closed form; see ``gcfast.ops.head_grad_weights``.

A first small launch takes the cotangents [B, T, D] through the L2 norm. Grad-CAM is linear in them,
so it also averages them over T, and one product [B, D] x [D, C] is left. Grad-CAM++ needs the
product of every triplet: a program takes the triplets of an image or of several and a block of
channels, and applies the non-linearity and the sum over T to the accumulator, so that [B, T, C]
exists only in registers. The projected cotangents are written once and read by every block of
channels from the cache, as the product wants them:

* ``ieee`` multiplies in float32 without tensor cores, which is bound by what it multiplies. So rows
  of several images share a tile where one would leave it half empty (five images of 50 triplets
  fill 250 rows of 256), and rows are next to each other in memory, so that four of them are one
  load from shared memory.
* ``tf32`` allows 11 significant bits. Tensor cores multiply TF32 only with operands in an order
  that the weight does not have, so both factors are split into two bfloat16 numbers, 16 bits
  together, and three products of those are added up (the lower halves' own product is below
  what is kept): hi hi + hi lo + lo hi.

Fusing ``top_m`` behind this does not pay: it would save writing and reading [B, C] float32, 16 KiB
an image at C = 2,048, beside T D + D C / B numbers read (T = 50, D = 128, B = 64: 41 KiB) and
T D C multiplications, and a program would have to own all C channels of an image.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gcfast.kernels.launch import (
    HeadConfig,
    head_grad_weights_config,
    head_project_config,
    multiprocessors,
)

WEIGHT_BLOCK = 1024


@triton.jit
def _halves(x):
    """The two bfloat16 numbers whose sum is nearest; the second is 0 beside one not finite."""
    high = x.to(tl.bfloat16)
    rest = x - high.to(tl.float32)
    return high, tl.where(high - high == 0, rest, 0.0).to(tl.bfloat16)


@triton.jit
def _head_weight_kernel(
    out_ptr, weight_ptr, stride_weight_d, stride_weight_c, D, C, BLOCK: tl.constexpr
):
    """out[0], out[1] = the halves of the weight [D, C].  Grid: ceil(D C / BLOCK)."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < D * C
    weight = weight_ptr + offs // C * stride_weight_d + offs % C * stride_weight_c
    high, low = _halves(tl.load(weight, mask=mask, other=0.0).to(tl.float32))
    tl.store(out_ptr + offs, high, mask=mask)
    tl.store(out_ptr + D * C + offs, low, mask=mask)


@triton.jit
def _head_project_kernel(
    out_ptr, scales_ptr, cotangents_ptr, valid_ptr, embeddings_ptr, norms_ptr,
    stride_out_half, stride_out_group, stride_out_row, stride_out_d,
    stride_cotangents_b, stride_cotangents_t, stride_cotangents_d,
    stride_valid_b, stride_valid_t, stride_embeddings_b, stride_embeddings_d, stride_norms_b,
    B, T, D, pixels, images, tall,
    IS_PLUS: tl.constexpr, IS_SPLIT: tl.constexpr, HAS_VALID: tl.constexpr,
    HAS_NORMS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """rows[b, t] = (c - f <f, c>) / (|u| P) of c = cotangents[b, t], zero where not valid.

    Without IS_PLUS rows[b], of the mean of c over the valid t, zero without one. With it
    scales[b] = P / (2 the number of valid t). Row (b, t) is written to group b // images, as its
    row (b % images) T + t; rows up to ``tall`` that no image has are zeros. Grid: B. BLOCK_D covers
    D.
    """
    i_b = tl.program_id(0).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D).to(tl.int64)
    mask_d = offs_d < D
    columns = cotangents_ptr + i_b * stride_cotangents_b + offs_d * stride_cotangents_d
    out = out_ptr + i_b // images * stride_out_group + offs_d * stride_out_d
    f = tl.zeros((BLOCK_D,), tl.float32)
    length = tl.full((), 1.0, tl.float32)
    if HAS_NORMS:
        unit = embeddings_ptr + i_b * stride_embeddings_b + offs_d * stride_embeddings_d
        f = tl.load(unit, mask=mask_d, other=0.0).to(tl.float32)
        length = tl.load(norms_ptr + i_b * stride_norms_b).to(tl.float32)
    total = tl.zeros((BLOCK_D,), tl.float32)
    count = 0
    for start in range(0, T, BLOCK_T):
        offs_t = start + tl.arange(0, BLOCK_T).to(tl.int64)
        used = offs_t < T
        if HAS_VALID:
            row = valid_ptr + i_b * stride_valid_b + offs_t * stride_valid_t
            used = tl.load(row, mask=used, other=0) != 0
        count += tl.sum(used.to(tl.int32))
        tile = columns[None, :] + (offs_t * stride_cotangents_t)[:, None]
        c = tl.load(tile, mask=used[:, None] & mask_d[None, :], other=0.0).to(tl.float32)
        if IS_PLUS:
            if HAS_NORMS:
                c = c - tl.sum(c * f[None, :], axis=1)[:, None] * f[None, :]
            # f or |u| of an image without a triplet may be NaN.
            c = tl.where(used[:, None], c / (length * pixels), 0.0)
            tile = out[None, :] + ((i_b % images * T + offs_t) * stride_out_row)[:, None]
            mask = (offs_t < T)[:, None] & mask_d[None, :]
            if IS_SPLIT:
                c, low = _halves(c)
                tl.store(tile + stride_out_half, low, mask=mask)
            tl.store(tile, c, mask=mask)
        else:
            total += tl.sum(c, axis=0)
    if IS_PLUS:
        tl.store(scales_ptr + i_b, 0.5 * pixels / tl.maximum(count, 1))
    else:
        mean = total / tl.maximum(count, 1)  # [BLOCK_D]
        if HAS_NORMS:
            mean = mean - tl.sum(mean * f) * f
        mean = tl.where(count > 0, mean / (length * pixels), 0.0)
        row = out + i_b % images * stride_out_row
        if IS_SPLIT:
            mean, low = _halves(mean)
            tl.store(row + stride_out_half, low, mask=mask_d)
        tl.store(row, mean, mask=mask_d)
    if (i_b % images == images - 1) | (i_b == B - 1):
        rows = (i_b % images + 1) * (T if IS_PLUS else 1)
        zeros = tl.zeros((BLOCK_D,), tl.float32)
        for i_row in range(rows, tall):
            tl.store(out + i_row * stride_out_row, zeros, mask=mask_d)
            if IS_SPLIT:
                tl.store(out + i_row * stride_out_row + stride_out_half, zeros, mask=mask_d)


@triton.jit
def _product(
    rows_ptr, weight_ptr, stride_half_r, stride_row, stride_row_d, stride_half_w, stride_weight_d,
    stride_weight_c, offs_r, offs_c, C, D,
    IS_SPLIT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """[BLOCK_R, BLOCK_C]: rows times weight. Every row can be read."""
    acc = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    mask_c = (offs_c < C)[None, :]
    for start in range(0, D, BLOCK_D):
        offs_d = start + tl.arange(0, BLOCK_D)
        mask_d = offs_d < D
        weight = weight_ptr + (offs_d.to(tl.int64) * stride_weight_d)[:, None]
        weight = weight + (offs_c * stride_weight_c)[None, :]
        right = tl.load(weight, mask=mask_d[:, None] & mask_c, other=0.0)
        if IS_SPLIT:
            rows = rows_ptr + (offs_r * stride_row)[:, None] + offs_d[None, :]
            left = tl.load(rows, mask=mask_d[None, :], other=0.0)
            left_low = tl.load(rows + stride_half_r, mask=mask_d[None, :], other=0.0)
            right_low = tl.load(weight + stride_half_w, mask=mask_d[:, None] & mask_c, other=0.0)
            acc = tl.dot(left_low, right, acc)
            acc = tl.dot(left, right_low, acc)
            acc = tl.dot(left, right, acc)
        else:
            rows = rows_ptr + (offs_d * stride_row_d)[:, None] + offs_r[None, :]
            left = tl.trans(tl.load(rows, mask=mask_d[:, None], other=0.0))
            acc = tl.dot(left, right, acc, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize=["B"])
def _head_product_kernel(
    out_ptr, rows_ptr, weight_ptr, valid_ptr, sums_ptr, scales_ptr,
    stride_half_r, stride_group, stride_row, stride_row_d,
    stride_half_w, stride_weight_d, stride_weight_c,
    stride_valid_b, stride_valid_t, stride_sums_b, stride_sums_c,
    B, T, C, D,
    IS_PLUS: tl.constexpr, IS_SPLIT: tl.constexpr, HAS_VALID: tl.constexpr, IMAGES: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out[b, c] = g[b], or with IS_PLUS sum_t 2 relu(g[b, t]) / (2 + S_c relu(g[b, t])) scales[b].

    g = sum_d rows[.., d] weight[d, c]. Grid: ceil(B / IMAGES) * ceil(C / BLOCK_C), groups fastest,
    so that neighbours in time share the columns of the weight. A tile holds the rows of IMAGES
    images; with IS_PLUS one image may take several tiles.
    """
    i = tl.program_id(0).to(tl.int64)
    groups = tl.cdiv(B, IMAGES)
    group = i % groups
    offs_c = i // groups * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    rows_ptr += group * stride_group
    sums_ptr += offs_c * stride_sums_c
    total = tl.zeros((BLOCK_C,), tl.float32)
    for first in range(0, IMAGES * T, BLOCK_R):
        offs_r = first + tl.arange(0, BLOCK_R)
        g = _product(
            rows_ptr, weight_ptr, stride_half_r, stride_row, stride_row_d,
            stride_half_w, stride_weight_d, stride_weight_c, offs_r, offs_c, C, D,
            IS_SPLIT, BLOCK_R, BLOCK_C, BLOCK_D,
        )  # fmt: skip
        image = offs_r // T if IMAGES > 1 else offs_r * 0
        offs_b = group * IMAGES + image
        used = (offs_r < IMAGES * T) & (offs_b < B)
        if IS_PLUS:
            if HAS_VALID:
                flag = valid_ptr + offs_b * stride_valid_b + (offs_r - image * T) * stride_valid_t
                used = tl.load(flag, mask=used, other=0) != 0
            g = tl.maximum(g, 0.0, propagate_nan=tl.PropagateNan.ALL)
            # The terms of every row with the sums of each image in turn: what is not the image's
            # own is not added up. That takes fewer registers than sums for every row.
            for one in tl.static_range(IMAGES):
                i_b = group * IMAGES + one
                inside = mask_c & (i_b < B)
                sums = tl.load(sums_ptr + i_b * stride_sums_b, mask=inside, other=0.0)
                sums = tl.maximum(sums.to(tl.float32), 0.0, propagate_nan=tl.PropagateNan.ALL)
                # relu(g) / (1 + relu(g) sums / 2), as in grad_weights.py.
                root = tl.math.rsqrt(1 + g * (0.5 * sums)[None, :])
                own = (used & (image == one))[:, None]
                total += tl.sum(tl.where(own, g * root * root, 0.0), axis=0)
                if IMAGES > 1:
                    total *= tl.load(scales_ptr + i_b, mask=i_b < B, other=0.0)
                    tl.store(out_ptr + i_b * C + offs_c, total, mask=inside)
                    total = tl.zeros((BLOCK_C,), tl.float32)
        else:
            out = out_ptr + (offs_b * C)[:, None] + offs_c[None, :]
            tl.store(out, g, mask=used[:, None] & mask_c[None, :])
    if IS_PLUS and IMAGES == 1:
        tl.store(out_ptr + group * C + offs_c, total * tl.load(scales_ptr + group), mask=mask_c)


def launch_head_grad_weights(
    cotangents: Tensor,
    weight: Tensor,
    valid: Tensor | None = None,
    *,
    pixels: int,
    embeddings: Tensor | None = None,
    norms: Tensor | None = None,
    activation_sums: Tensor | None = None,
    method: str = "gradcam",
    precision: str = "ieee",
    config: HeadConfig | None = None,
) -> Tensor:
    """[B, T, D] and [D, C], any strides, to [B, C] fp32. Trusts its input; ``ops`` checks it."""
    B, T, D = cotangents.shape
    C = weight.shape[1]
    device = cotangents.device
    out = torch.empty((B, C), dtype=torch.float32, device=device)
    if out.numel() == 0:
        return out
    is_plus = method == "gradcam++"
    per_image = T if is_plus else 1  # rows of the product
    if per_image * D == 0:
        return out.zero_()
    sms = multiprocessors(device)
    config = config or head_grad_weights_config(B, per_image, C, precision, sms=sms)
    images = min(B, max(1, config.block_rows // per_image))
    groups = triton.cdiv(B, images)
    tall = triton.cdiv(images * per_image, config.block_rows) * config.block_rows
    if config.is_split:
        # Triton's interpreter does not multiply bfloat16: there the halves are kept in float32.
        half = torch.bfloat16 if cotangents.is_cuda else torch.float32
        rows = torch.empty((2, groups, tall, D), dtype=half, device=device)
        row_strides = (rows.stride(0), rows.stride(1), D, 1)
        factor = torch.empty((2, D, C), dtype=half, device=device)
        factor_strides = factor.stride()
    else:
        rows = torch.empty((groups, D, tall), dtype=torch.float32, device=device)
        row_strides = (0, rows.stride(0), 1, tall)
        factor = weight.float()
        factor_strides = (0, *factor.stride())
    scales = torch.empty(B, dtype=torch.float32, device=device)
    # Pointers that the flags leave unused still need a tensor.
    flags = scales if valid is None else valid.view(torch.uint8)
    unit, lengths = (scales, scales) if norms is None else (embeddings, norms)
    sums = scales if activation_sums is None else activation_sums
    valid_strides = (0, 0) if valid is None else flags.stride()
    unit_strides = (0, 0, 0) if norms is None else (*unit.stride(), *lengths.stride())
    block_t, block_d, project_warps = head_project_config(T, D)
    common = {"IS_PLUS": is_plus, "IS_SPLIT": config.is_split, "HAS_VALID": valid is not None}
    with torch.cuda.device_of(cotangents):
        if config.is_split:
            _head_weight_kernel[(triton.cdiv(D * C, WEIGHT_BLOCK),)](
                factor, weight, *weight.stride(), D, C, BLOCK=WEIGHT_BLOCK
            )
        _head_project_kernel[(B,)](
            rows, scales, cotangents, flags, unit, lengths, *row_strides,
            *cotangents.stride(), *valid_strides, *unit_strides, B, T, D, pixels, images, tall,
            HAS_NORMS=norms is not None, BLOCK_T=block_t, BLOCK_D=block_d,
            num_warps=project_warps, **common,
        )  # fmt: skip
        _head_product_kernel[(groups * triton.cdiv(C, config.block_c),)](
            out, rows, factor, flags, sums, scales, *row_strides, *factor_strides,
            *valid_strides, *(sums.stride() if is_plus else (0, 0)), B, per_image, C, D,
            IMAGES=images, BLOCK_R=config.block_rows, BLOCK_C=config.block_c,
            BLOCK_D=config.block_d, num_warps=config.num_warps, num_stages=config.num_stages,
            **common,
        )  # fmt: skip
    return out
