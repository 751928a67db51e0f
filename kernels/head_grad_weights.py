"""Grad-weights of the common head by its closed form; see ``gcfast.ops.head_grad_weights``.

A first small launch takes the cotangents [B, T, D] through the L2 norm. Grad-CAM is linear in them,
so it also averages them over T, and one product [B, D] x [D, C] is left. Grad-CAM++ needs the
product of every triplet: a program takes an image and a block of channels, and applies the
non-linearity and the sum over T to the accumulator, so that [B, T, C] exists only in registers. The
projected cotangents are written once, in the order that the product wants, and read by every block
of channels from the cache:

* ``ieee`` multiplies in float32 without tensor cores, which is bound by instructions. Rows are next
  to each other in memory, so that four of them are one load from shared memory.
* ``tf32`` allows 11 significant bits. Tensor cores multiply TF32 only with operands in an order
  that the weight does not have, so both factors are split into two bfloat16 numbers, 16 bits
  together, and three products of those are added up: hi hi + hi lo + lo hi.

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
def _store(tile, values, mask, half, IS_SPLIT: tl.constexpr):
    """Store numbers, or with IS_SPLIT their halves."""
    if IS_SPLIT:
        values, low = _halves(values)
        tl.store(tile + half, low, mask=mask)
    tl.store(tile, values, mask=mask)


@triton.jit
def _head_weight_kernel(
    out_ptr, weight_ptr, stride_weight_d, stride_weight_c, D, C, wide, half,
    IS_SPLIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Copy the weight [D, C] to rows of ``wide`` numbers, zeros around it.  Grid: half / BLOCK."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row, column = offs // wide, offs % wide
    weight = weight_ptr + row * stride_weight_d + column * stride_weight_c
    values = tl.load(weight, mask=(row < D) & (column < C), other=0.0).to(tl.float32)
    _store(out_ptr + offs, values, offs < half, half, IS_SPLIT)


@triton.jit
def _place(row, offs_d, tall, D, IS_SPLIT: tl.constexpr):
    """Where a row's numbers are: next to each other, or with those of other rows between them."""
    if IS_SPLIT:
        return row * D + offs_d
    return offs_d * tall + row


@triton.jit(do_not_specialize=["B", "quads"])
def _head_project_kernel(
    out_ptr, scales_ptr, cotangents_ptr, valid_ptr, embeddings_ptr, norms_ptr,
    stride_cotangents_b, stride_cotangents_t, stride_cotangents_d,
    stride_valid_b, stride_valid_t, stride_embeddings_b, stride_embeddings_d, stride_norms_b,
    B, T, D, pixels, quads, deep,
    IS_PLUS: tl.constexpr, IS_SPLIT: tl.constexpr, HAS_VALID: tl.constexpr,
    HAS_NORMS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out[b, t] = (c - f <f, c>) / (|u| P) of c = cotangents[b, t], zero where not valid.

    Rows from T to ``tall`` are zeros, as is everything from D to ``deep``, and scales[b] is
    P / (2 the number of valid t). Grid: B. Without IS_PLUS out[b], of the mean of c over the valid
    t, zero without one. Grid: ``tall``, B and rows of zeros. BLOCK_D covers ``deep``.
    """
    i_b = tl.program_id(0).to(tl.int64)
    tall = 4 * quads
    half = tall.to(tl.int64) * deep * (B if IS_PLUS else 1)
    offs_d = tl.arange(0, BLOCK_D).to(tl.int64)
    is_image = i_b < B
    mask_d = offs_d < tl.where(is_image, D, 0)
    columns = cotangents_ptr + i_b * stride_cotangents_b + offs_d * stride_cotangents_d
    f = tl.zeros((BLOCK_D,), tl.float32)
    length = tl.full((), 1.0, tl.float32)
    if HAS_NORMS:
        unit = embeddings_ptr + i_b * stride_embeddings_b + offs_d * stride_embeddings_d
        f = tl.load(unit, mask=mask_d, other=0.0).to(tl.float32)
        length = tl.load(norms_ptr + i_b * stride_norms_b, mask=is_image, other=1.0).to(tl.float32)
    total = tl.zeros((BLOCK_D,), tl.float32)
    count = 0
    for start in range(0, tall if IS_PLUS else T, BLOCK_T):
        offs_t = start + tl.arange(0, BLOCK_T).to(tl.int64)
        used = offs_t < tl.where(is_image, T, 0)
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
            tile = _place(offs_t[:, None], offs_d[None, :], tall, deep, IS_SPLIT)
            mask = (offs_t < tall)[:, None] & (offs_d < deep)[None, :]
            _store(out_ptr + i_b * tall * deep + tile, c, mask, half, IS_SPLIT)
        else:
            total += tl.sum(c, axis=0)
    if IS_PLUS:
        tl.store(scales_ptr + i_b, 0.5 * pixels / tl.maximum(count, 1))
    else:
        mean = total / tl.maximum(count, 1)  # [BLOCK_D]
        if HAS_NORMS:
            mean = mean - tl.sum(mean * f) * f
        mean = tl.where(count > 0, mean / (length * pixels), 0.0)
        row = out_ptr + _place(i_b, offs_d, tall, deep, IS_SPLIT)
        _store(row, mean, offs_d < deep, half, IS_SPLIT)


@triton.jit
def _product(
    rows_ptr, weight_ptr, half, half_weight, wide, offs_r, offs_c, tall, D,
    IS_SPLIT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """[BLOCK_R, BLOCK_C]: rows times weight."""
    acc = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    mask_c = offs_c < wide
    for start in range(0, D, BLOCK_D):
        offs_d = start + tl.arange(0, BLOCK_D)
        mask_d = offs_d < D
        mask_w = mask_d[:, None] & mask_c[None, :]
        weight = weight_ptr + (offs_d.to(tl.int64) * wide)[:, None] + offs_c[None, :]
        right = tl.load(weight, mask=mask_w, other=0.0)
        if IS_SPLIT:
            rows = rows_ptr + _place(offs_r[:, None], offs_d[None, :], tall, D, IS_SPLIT)
            mask = (offs_r < tall)[:, None] & mask_d[None, :]
            left = tl.load(rows, mask=mask, other=0.0)
            left_low = tl.load(rows + half, mask=mask, other=0.0)
            right_low = tl.load(weight + half_weight, mask=mask_w, other=0.0)
            acc = tl.dot(left_low, right, acc)
            acc = tl.dot(left, right_low, acc)
            acc = tl.dot(left, right, acc)
        else:
            rows = rows_ptr + _place(offs_r[None, :], offs_d[:, None], tall, D, IS_SPLIT)
            mask = (offs_r < tall)[None, :] & mask_d[:, None]
            left = tl.load(rows, mask=mask, other=0.0)
            acc = tl.dot(tl.trans(left), right, acc, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize=["B", "quads"])
def _head_product_kernel(
    out_ptr, rows_ptr, weight_ptr, valid_ptr, sums_ptr, scales_ptr,
    stride_valid_b, stride_valid_t, stride_sums_b, stride_sums_c,
    B, T, C, D, quads, wide, half_weight,
    IS_PLUS: tl.constexpr, IS_SPLIT: tl.constexpr, HAS_VALID: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out[b, c] = g[b], or with IS_PLUS scales[b] sum_t h / (1 + S_c h / 2).

    h = relu(g[b, t]), and g = sum_d rows[.., d] weight[d, c], with ``tall`` rows of an image, or of
    all. Grid: ceil(B / BLOCK_R), or with IS_PLUS B, times ceil(C / BLOCK_C); images fastest, so
    that neighbours in time share the columns of the weight.
    """
    i = tl.program_id(0).to(tl.int64)
    tall = 4 * quads  # so that it is seen to be whole vectors
    half = tall.to(tl.int64) * D * (B if IS_PLUS else 1)
    groups = B if IS_PLUS else tl.cdiv(B, BLOCK_R)
    group = i % groups
    offs_c = i // groups * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    if IS_PLUS:
        rows_ptr += group * tall * D
        sums = sums_ptr + group * stride_sums_b + offs_c * stride_sums_c
        sums = tl.load(sums, mask=mask_c, other=0.0)
        sums = tl.maximum(sums.to(tl.float32), 0.0, propagate_nan=tl.PropagateNan.ALL)
        total = tl.zeros((BLOCK_C,), tl.float32)
        for first in range(0, T, BLOCK_R):
            offs_r = first + tl.arange(0, BLOCK_R)
            g = _product(
                rows_ptr, weight_ptr, half, half_weight, wide, offs_r, offs_c, tall, D,
                IS_SPLIT, BLOCK_R, BLOCK_C, BLOCK_D,
            )  # fmt: skip
            used = offs_r < T
            if HAS_VALID:
                flag = valid_ptr + group * stride_valid_b + offs_r * stride_valid_t
                used = tl.load(flag, mask=used, other=0) != 0
            # As in grad_weights.py.
            g = tl.maximum(g, 0.0, propagate_nan=tl.PropagateNan.ALL)
            root = tl.math.rsqrt(1 + g * (0.5 * sums)[None, :])
            total += tl.sum(tl.where(used[:, None], g * root * root, 0.0), axis=0)
        tl.store(out_ptr + group * C + offs_c, total * tl.load(scales_ptr + group), mask=mask_c)
    else:
        offs_b = group * BLOCK_R + tl.arange(0, BLOCK_R)
        g = _product(
            rows_ptr, weight_ptr, half, half_weight, wide, offs_b, offs_c, tall, D,
            IS_SPLIT, BLOCK_R, BLOCK_C, BLOCK_D,
        )  # fmt: skip
        out = out_ptr + group * BLOCK_R * C + i // groups * BLOCK_C
        place = (tl.arange(0, BLOCK_R) * C)[:, None] + tl.arange(0, BLOCK_C)[None, :]  # in 32 bits
        tl.store(out + place, g, mask=(offs_b < B)[:, None] & mask_c[None, :])


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
    if D * (T if is_plus else 1) == 0:
        return out.zero_()
    config = config or head_grad_weights_config(
        B, T, C, precision, is_plus=is_plus, sms=multiprocessors(device)
    )
    # Triton's interpreter does not multiply bfloat16: there the halves are kept in float32.
    is_half = config.is_split and cotangents.is_cuda
    dtype = torch.bfloat16 if is_half else torch.float32
    # Rows of whole vectors; the weight itself where it has them.
    groups, tall = (B, T) if is_plus else (1, B)
    tall, wide, deep = triton.cdiv(tall, 4) * 4, triton.cdiv(C, 16) * 16, D
    if config.is_split:
        deep = triton.cdiv(D, 16) * 16
    rows = torch.empty((1 + config.is_split, groups * tall * deep), dtype=dtype, device=device)
    factor = weight
    is_copied = (weight.dtype, weight.stride()) != (dtype, (wide, 1)) or config.is_split
    if is_copied:
        factor = torch.empty((1 + config.is_split, deep, wide), dtype=dtype, device=device)
    scales = torch.empty(B, dtype=torch.float32, device=device)
    # Pointers that the flags leave unused still need a tensor.
    flags = scales if valid is None else valid.view(torch.uint8)
    unit, lengths = scales, scales
    if embeddings is not None and norms is not None:
        unit, lengths = embeddings, norms
    sums = scales if activation_sums is None else activation_sums
    valid_strides = (0, 0) if valid is None else flags.stride()
    unit_strides = (0, 0, 0) if norms is None else (*unit.stride(), *lengths.stride())
    block_t, block_d, project_warps = head_project_config(T, deep)
    common = {"IS_PLUS": is_plus, "IS_SPLIT": config.is_split, "HAS_VALID": valid is not None}
    with torch.cuda.device_of(cotangents):
        if is_copied:
            _head_weight_kernel[(triton.cdiv(deep * wide, WEIGHT_BLOCK),)](
                factor, weight, *weight.stride(), D, C, wide, deep * wide,
                IS_SPLIT=config.is_split, BLOCK=WEIGHT_BLOCK,
            )  # fmt: skip
        _head_project_kernel[(B if is_plus else tall,)](
            rows, scales, cotangents, flags, unit, lengths,
            *cotangents.stride(), *valid_strides, *unit_strides, B, T, D, pixels, tall // 4, deep,
            HAS_NORMS=norms is not None, BLOCK_T=block_t, BLOCK_D=block_d,
            num_warps=project_warps, **common,
        )  # fmt: skip
        groups = B if is_plus else triton.cdiv(B, config.block_rows)
        _head_product_kernel[(groups * triton.cdiv(C, config.block_c),)](
            out, rows, factor, flags, sums, scales,
            *valid_strides, *(sums.stride() if is_plus else (0, 0)), B, T, C, deep, tall // 4,
            wide, deep * wide,
            BLOCK_R=config.block_rows, BLOCK_C=config.block_c, BLOCK_D=config.block_d,
            num_warps=config.num_warps, num_stages=config.num_stages, **common,
        )  # fmt: skip
    return out
