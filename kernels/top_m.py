"""The M highest of C, in order, ties to the lower channel.

A weight and its channel are packed into one 64-bit key whose order is the order wanted, so that one
bitonic network does the rest without a second tensor to carry along. A row is read once, in blocks;
the best M of each block are merged with the best so far.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gcfast import reference
from gcfast.kernels.launch import (
    TOP_M_MAX_C,
    TOP_M_MAX_M,
    TopMConfig,
    top_m_config,
)

# Below the key of minus infinity, whose upper half is 0x807FFFFF.
LOWEST_KEY = tl.constexpr(-0x7FFFFFFFFFFFFFFF)


@triton.jit
def _keys(weights, channels, mask):
    """int64 keys that grow with the weight, and for equal weights with falling channel."""
    weights = weights.to(tl.float32)
    # The two zeros are equal, and NaN of either sign comes before everything, as torch.sort has it.
    weights = tl.where(weights == 0, 0.0, weights)
    bits = weights.to(tl.int32, bitcast=True)
    # A negative float's magnitude bits are turned over; the sign then orders as an integer's does.
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    ordered = tl.where(weights != weights, 0x7FFFFFFF, ordered)
    keys = (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - channels).to(tl.int64)
    return tl.where(mask, keys, LOWEST_KEY)


@triton.jit
def _top_m_kernel(
    channels_ptr, kept_ptr, weights_ptr, stride_b, stride_c, C, M,
    BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """channels[b], kept[b] = the M highest of weights[b] [C], highest first.  Grid: (B,)."""
    i_b = tl.program_id(0).to(tl.int64)
    weights_ptr += i_b * stride_b
    best = tl.full((BLOCK_M,), LOWEST_KEY, tl.int64)
    for start in range(0, C, BLOCK_C):
        offs_c = start + tl.arange(0, BLOCK_C)
        mask_c = offs_c < C
        weights = tl.load(weights_ptr + offs_c.to(tl.int64) * stride_c, mask=mask_c, other=0.0)
        others = tl.topk(_keys(weights, offs_c, mask_c), BLOCK_M)
        # Of two sorted halves the larger of each pair, one half turned round, are the highest.
        best = tl.sort(tl.maximum(best, tl.flip(others, dim=0)), descending=True)

    offs_m = tl.arange(0, BLOCK_M)
    mask_m = offs_m < M
    channels = 0x7FFFFFFF - (best & 0x7FFFFFFF)
    # Read again, so that a zero keeps its sign and 16 bits stay 16 bits.
    kept = tl.load(weights_ptr + channels * stride_c, mask=mask_m, other=0.0)
    tl.store(channels_ptr + i_b * M + offs_m, channels, mask=mask_m)
    tl.store(kept_ptr + i_b * M + offs_m, kept, mask=mask_m)


def launch_top_m(
    weights: Tensor, m: int, *, config: TopMConfig | None = None
) -> tuple[Tensor, Tensor]:
    """See :func:`gcfast.ops.top_m`; above M = 256 or C = 8192 a library sort."""
    B, C = weights.shape
    if m > TOP_M_MAX_M or C > TOP_M_MAX_C:
        return reference.top_m(weights, m)
    channels = torch.empty((B, m), dtype=torch.int64, device=weights.device)
    kept = torch.empty((B, m), dtype=weights.dtype, device=weights.device)
    if B == 0:
        return channels, kept
    config = config or top_m_config(C, m)
    with torch.cuda.device_of(weights):
        _top_m_kernel[(B,)](
            channels, kept, weights, *weights.stride(), C, m,
            BLOCK_C=config.block_c, BLOCK_M=config.block_m, num_warps=config.num_warps,
        )  # fmt: skip
    return channels, kept


def top_m_bytes(B: int, C: int, M: int, *, itemsize: int = 4) -> int:
    """The least that must move: the weights in, M channels and weights out."""
    return B * (C * itemsize + M * (8 + itemsize))
