"""Squared norms of the rows of a table, for `knn` where they are not at hand: one read, no copy."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

SQUARES_BLOCK_N, SQUARES_BLOCK_D = 64, 64


@triton.jit
def _squares_kernel(
    squares_ptr,
    table_ptr,
    stride_table_n,
    stride_table_d,
    N,
    D,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """squares[n] = sum_d table[n, d]^2.  Grid: (ceil(N / BLOCK_N),)."""
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    rows = table_ptr + offs_n * stride_table_n  # [BLOCK_N]
    total = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for start in range(0, D, BLOCK_D):
        offs_d = (start + tl.arange(0, BLOCK_D)).to(tl.int64)
        mask = mask_n[:, None] & (offs_d < D)[None, :]
        tile = tl.load(rows[:, None] + offs_d[None, :] * stride_table_d, mask=mask, other=0.0)
        tile = tile.to(tl.float32)
        total += tile * tile
    tl.store(squares_ptr + offs_n, tl.sum(total, axis=1), mask=mask_n)


def row_squares(table: Tensor) -> Tensor:
    """Squared norms [N] float32 of the rows of [N, D], from one read and with no copy."""
    N, D = table.shape
    squares = torch.empty(N, dtype=torch.float32, device=table.device)
    if N == 0:
        return squares
    with torch.cuda.device_of(table):
        _squares_kernel[(triton.cdiv(N, SQUARES_BLOCK_N),)](
            squares,
            table,
            *table.stride(),
            N,
            D,
            BLOCK_N=SQUARES_BLOCK_N,
            BLOCK_D=SQUARES_BLOCK_D,
            num_warps=4,
        )
    return squares
