"""Grad-weights of the common head by its closed form; see ``gcfast.ops.head_grad_weights``.

Grad-CAM is linear in the cotangents, so their mean over T comes first (one read of [B, T, D], by a
small kernel that projects it too) and one product [B, D] x [D, C] is left. Grad-CAM++ needs the
product of every triplet: a program takes one image and a block of channels, multiplies block by
block of triplets, and applies the non-linearity and the sum over T to the accumulator, so that
[B, T, C] exists only in registers. The projection through the L2 norm happens on the way into the
product: <f, c> in a first sweep over D, c - f <f, c> on the tile that is multiplied.

Fusing ``top_m`` behind this does not pay: it would save writing and reading [B, C] float32, 16 KiB
an image at C = 2,048, beside T D + D C / B numbers read (T = 50, D = 128, B = 64: 41 KiB) and
T D C multiplications, and a program would have to own all C channels of an image: B programs in
place of B C / BLOCK_C, each with C accumulators a triplet.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gcfast.kernels.launch import (
    HeadConfig,
    head_grad_weights_config,
    head_mean_config,
    multiprocessors,
)


@triton.jit
def _head_mean_kernel(
    out_ptr,
    cotangents_ptr,
    valid_ptr,
    embeddings_ptr,
    norms_ptr,
    stride_cotangents_b,
    stride_cotangents_t,
    stride_cotangents_d,
    stride_valid_b,
    stride_valid_t,
    stride_embeddings_b,
    stride_embeddings_d,
    stride_norms_b,
    T,
    D,
    HAS_VALID: tl.constexpr,
    HAS_NORMS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out[b] = (c - f <f, c>) / |u| of c = mean_t cotangents[b, t], zero without a valid t.

    Grid: B. BLOCK_D covers D.
    """
    i_b = tl.program_id(0).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D).to(tl.int64)
    mask_d = offs_d < D
    columns = cotangents_ptr + i_b * stride_cotangents_b + offs_d * stride_cotangents_d
    total = tl.zeros((BLOCK_D,), tl.float32)
    count = 0
    for start in range(0, T, BLOCK_T):
        offs_t = start + tl.arange(0, BLOCK_T).to(tl.int64)
        mask_t = offs_t < T
        if HAS_VALID:
            row = valid_ptr + i_b * stride_valid_b + offs_t * stride_valid_t
            mask_t = tl.load(row, mask=mask_t, other=0) != 0
        count += tl.sum(mask_t.to(tl.int32))
        tile = columns[None, :] + (offs_t * stride_cotangents_t)[:, None]
        mask = mask_t[:, None] & mask_d[None, :]
        total += tl.sum(tl.load(tile, mask=mask, other=0.0).to(tl.float32), axis=0)
    mean = total / tl.maximum(count, 1)  # [BLOCK_D]
    if HAS_NORMS:
        unit = embeddings_ptr + i_b * stride_embeddings_b + offs_d * stride_embeddings_d
        f = tl.load(unit, mask=mask_d, other=0.0).to(tl.float32)
        norm = tl.load(norms_ptr + i_b * stride_norms_b).to(tl.float32)
        mean = (mean - tl.sum(mean * f) * f) / norm
        mean = tl.where(count > 0, mean, 0.0)  # f or |u| of an image without a triplet may be NaN
    tl.store(out_ptr + i_b * D + offs_d, mean, mask=mask_d)


@triton.jit(do_not_specialize=["B"])
def _head_product_kernel(
    out_ptr,
    cotangents_ptr,
    weight_ptr,
    stride_weight_d,
    stride_weight_c,
    B,
    C,
    D,
    pixels,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out[b, c] = sum_d cotangents[b, d] weight[d, c] / pixels.

    Grid: ceil(B / BLOCK_B) * ceil(C / BLOCK_C), images fastest, so that neighbours in time share
    the columns of the weight.
    """
    i = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(B, BLOCK_B)
    offs_b = (i % blocks) * BLOCK_B + tl.arange(0, BLOCK_B)
    offs_c = (i // blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_b, mask_c = offs_b < B, offs_c < C
    acc = tl.zeros((BLOCK_B, BLOCK_C), tl.float32)
    for start in range(0, D, BLOCK_D):
        offs_d = start + tl.arange(0, BLOCK_D).to(tl.int64)
        mask_d = offs_d < D
        tile = cotangents_ptr + (offs_b * D)[:, None] + offs_d[None, :]
        c = tl.load(tile, mask=mask_b[:, None] & mask_d[None, :], other=0.0)
        tile = (
            weight_ptr + (offs_d * stride_weight_d)[:, None] + (offs_c * stride_weight_c)[None, :]
        )
        w = tl.load(tile, mask=mask_d[:, None] & mask_c[None, :], other=0.0).to(tl.float32)
        acc = tl.dot(c, w, acc, input_precision=PRECISION)
    out = out_ptr + (offs_b * C)[:, None] + offs_c[None, :]
    tl.store(out, acc / pixels, mask=mask_b[:, None] & mask_c[None, :])


@triton.jit
def _head_plus_kernel(
    out_ptr,
    cotangents_ptr,
    weight_ptr,
    valid_ptr,
    embeddings_ptr,
    norms_ptr,
    sums_ptr,
    stride_cotangents_b,
    stride_cotangents_t,
    stride_cotangents_d,
    stride_weight_d,
    stride_weight_c,
    stride_valid_b,
    stride_valid_t,
    stride_embeddings_b,
    stride_embeddings_d,
    stride_norms_b,
    stride_sums_b,
    stride_sums_c,
    T,
    C,
    D,
    pixels,
    HAS_VALID: tl.constexpr,
    HAS_NORMS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out[b, c] = mean_t P relu(g) / (2 + S_c relu(g)), g = sum_d c'[t, d] weight[d, c] / P.

    c' = (c - f <f, c>) / |u|. Grid: B * ceil(C / BLOCK_C), channels fastest, so that the programs
    of an image read its cotangents while they are in the cache.
    """
    i = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(C, BLOCK_C)
    i_b = i // blocks
    offs_c = (i % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    sums = sums_ptr + i_b * stride_sums_b + offs_c * stride_sums_c
    sums = tl.load(sums, mask=mask_c, other=0.0).to(tl.float32)
    sums = tl.maximum(sums, 0.0, propagate_nan=tl.PropagateNan.ALL)  # [BLOCK_C]
    norm = 1.0
    if HAS_NORMS:
        norm = tl.load(norms_ptr + i_b * stride_norms_b).to(tl.float32)
    columns = weight_ptr + offs_c * stride_weight_c
    image = cotangents_ptr + i_b * stride_cotangents_b
    unit = embeddings_ptr + i_b * stride_embeddings_b

    total = tl.zeros((BLOCK_C,), tl.float32)
    count = 0
    for first in range(0, T, BLOCK_T):
        offs_t = first + tl.arange(0, BLOCK_T).to(tl.int64)
        mask_t = offs_t < T
        if HAS_VALID:
            row = valid_ptr + i_b * stride_valid_b + offs_t * stride_valid_t
            mask_t = tl.load(row, mask=mask_t, other=0) != 0
        count += tl.sum(mask_t.to(tl.int32))
        rows = image + offs_t * stride_cotangents_t  # [BLOCK_T]
        along = tl.zeros((BLOCK_T,), tl.float32)
        if HAS_NORMS:
            for start in range(0, D, BLOCK_D):
                offs_d = start + tl.arange(0, BLOCK_D).to(tl.int64)
                mask_d = offs_d < D
                tile = rows[:, None] + (offs_d * stride_cotangents_d)[None, :]
                c = tl.load(tile, mask=mask_t[:, None] & mask_d[None, :], other=0.0).to(tl.float32)
                f = tl.load(unit + offs_d * stride_embeddings_d, mask=mask_d, other=0.0)
                along += tl.sum(c * f.to(tl.float32)[None, :], axis=1)
        acc = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
        for start in range(0, D, BLOCK_D):
            offs_d = start + tl.arange(0, BLOCK_D).to(tl.int64)
            mask_d = offs_d < D
            tile = rows[:, None] + (offs_d * stride_cotangents_d)[None, :]
            c = tl.load(tile, mask=mask_t[:, None] & mask_d[None, :], other=0.0).to(tl.float32)
            if HAS_NORMS:
                f = tl.load(unit + offs_d * stride_embeddings_d, mask=mask_d, other=0.0)
                c = c - along[:, None] * f.to(tl.float32)[None, :]
            tile = columns[None, :] + (offs_d * stride_weight_d)[:, None]
            w = tl.load(tile, mask=mask_d[:, None] & mask_c[None, :], other=0.0).to(tl.float32)
            acc = tl.dot(c, w, acc, input_precision=PRECISION)
        g = tl.maximum(acc / (norm * pixels), 0.0, propagate_nan=tl.PropagateNan.ALL)
        g = pixels * g / (2 + g * sums[None, :])
        total += tl.sum(tl.where(mask_t[:, None], g, 0.0), axis=0)
    out = out_ptr + i_b * C + offs_c
    tl.store(out, total / tl.maximum(count, 1), mask=mask_c)


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
    # With 16 bits of it the largest tiles do not stay in registers, and it is small.
    weight = weight.float()
    sms = multiprocessors(device)
    # Pointers that the flags leave unused still need a tensor.
    flags = out if valid is None else valid.view(torch.uint8)
    unit, lengths = (out, out) if embeddings is None or norms is None else (embeddings, norms)
    given = {"HAS_VALID": valid is not None, "HAS_NORMS": norms is not None}
    valid_strides = (0, 0) if valid is None else flags.stride()
    unit_strides = (0, 0, 0) if norms is None else (*unit.stride(), *lengths.stride())
    with torch.cuda.device_of(cotangents):
        if method == "gradcam++":
            assert activation_sums is not None
            config = config or head_grad_weights_config(T, B, C, sms=sms)
            _head_plus_kernel[(B * triton.cdiv(C, config.block_c),)](
                out,
                cotangents,
                weight,
                flags,
                unit,
                lengths,
                activation_sums,
                *cotangents.stride(),
                *weight.stride(),
                *valid_strides,
                *unit_strides,
                *activation_sums.stride(),
                T,
                C,
                D,
                pixels,
                PRECISION=precision,
                BLOCK_T=config.block_rows,
                BLOCK_C=config.block_c,
                BLOCK_D=config.block_d,
                num_warps=config.num_warps,
                **given,
            )
            return out
        mean = torch.empty((B, D), dtype=torch.float32, device=device)
        block_t, block_d, num_warps = head_mean_config(T, D)
        _head_mean_kernel[(B,)](
            mean,
            cotangents,
            flags,
            unit,
            lengths,
            *cotangents.stride(),
            *valid_strides,
            *unit_strides,
            T,
            D,
            BLOCK_T=block_t,
            BLOCK_D=block_d,
            num_warps=num_warps,
            **given,
        )
        config = config or head_grad_weights_config(B, 1, C, sms=sms, images=True)
        blocks = triton.cdiv(B, config.block_rows) * triton.cdiv(C, config.block_c)
        _head_product_kernel[(blocks,)](
            out,
            mean,
            weight,
            *weight.stride(),
            B,
            C,
            D,
            pixels,
            PRECISION=precision,
            BLOCK_B=config.block_rows,
            BLOCK_C=config.block_c,
            BLOCK_D=config.block_d,
            num_warps=config.num_warps,
        )
    return out
