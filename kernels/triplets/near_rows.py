"""The negatives near each anchor, found by matrix products and measured in float64.

Distances come from |a|^2 + |e|^2 - 2 <a, e> with the product in bfloat16 on tensor cores. Its error
is bounded, and every row that may be within the limit is kept: none is lost, some too many are.
What is kept is then measured in float64 in the order of the specification, which decides.

Bytes: the table in bfloat16, of which a copy is made, once a block of anchors; 4 a row that is
kept. Operations: 2 N D on tensor cores an anchor, and 3 D in float64 a row that is kept.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gcfast.kernels.launch import NearConfig
from gcfast.kernels.search.row_squares import row_squares

EXACT_BLOCK = 128
# Triton's interpreter multiplies the bits of bfloat16 as integers.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
LARGEST = 3.0e38  # of squares in float32
PRODUCT_ERROR = 1.01 * 2.0**-7  # of |a| |e|: both sides are rounded to 8 bits
SUM_ERROR = 2.0**-21  # of |a| |e| and dimension, twice what tensor cores that truncate may lose


@triton.jit(do_not_specialize=["B", "N", "capacity", "rows_per_split"])
def _near_kernel(
    ids_ptr,
    counts_ptr,
    floors_ptr,
    anchors_ptr,
    anchor_labels_ptr,
    embeddings_ptr,
    squares_ptr,
    labels_ptr,
    B,
    N,
    D,
    capacity,
    rows_per_split,
    share,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """ids[b, :counts[b]]: the negatives with 2 <a, e> >= floors[b] + share |e|^2, in any order.

    Grid: (splits, ceil(B / BLOCK_B)).
    """
    offs_b = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    mask_b = offs_b < B
    floor = tl.load(floors_ptr + offs_b, mask=mask_b, other=0.0)
    anchor_label = tl.load(anchor_labels_ptr + offs_b, mask=mask_b, other=0)
    begin = tl.program_id(0) * rows_per_split
    for start in range(begin, tl.minimum(begin + rows_per_split, N), BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        mask_n = offs_n < N
        rows = embeddings_ptr + offs_n.to(tl.int64) * D
        product = tl.zeros((BLOCK_B, BLOCK_N), tl.float32)
        for start_d in range(0, D, BLOCK_D):
            offs_d = start_d + tl.arange(0, BLOCK_D)
            mask_d = offs_d < D
            anchor = tl.load(
                anchors_ptr + offs_b[:, None] * D + offs_d[None, :],
                mask=mask_b[:, None] & mask_d[None, :],
                other=0.0,
            )
            row = tl.load(
                rows[:, None] + offs_d[None, :],
                mask=mask_n[:, None] & mask_d[None, :],
                other=0.0,
            )
            if INTERPRETED:
                anchor, row = anchor.to(tl.float32), row.to(tl.float32)
            product = tl.dot(anchor, tl.trans(row), product, input_precision="ieee")
        square = tl.load(squares_ptr + offs_n, mask=mask_n, other=0.0)
        # Written so that NaN keeps the row: float64 will tell.
        is_near = (2 * product < floor[:, None] + square[None, :] * share) == 0
        label = tl.load(labels_ptr + offs_n, mask=mask_n, other=0)
        is_near = is_near & mask_n[None, :] & (label[None, :] != anchor_label[:, None])
        is_near = is_near & mask_b[:, None]
        number = tl.sum(is_near.to(tl.int32), axis=1)
        base = tl.atomic_add(counts_ptr + offs_b, number, mask=number > 0, sem="relaxed")
        slot = base[:, None] + tl.cumsum(is_near.to(tl.int32), axis=1) - 1
        out = ids_ptr + offs_b[:, None].to(tl.int64) * capacity + slot
        ids = offs_n[None, :] + tl.zeros((BLOCK_B, BLOCK_N), tl.int32)
        tl.store(out, ids, mask=is_near & (slot < capacity))


@triton.jit(do_not_specialize=["K"])
def _exact_kernel(
    distances_ptr,
    ids_ptr,
    anchors_ptr,
    embeddings_ptr,
    stride_anchors_b,
    stride_anchors_d,
    stride_embeddings_n,
    stride_embeddings_d,
    K,
    N,
    D,
    BLOCK_K: tl.constexpr,
):
    """distances[b, k] of row ids[b, k] in float64, d by d, each step rounded.

    NaN where there is no such row. Grid: (ceil(K / BLOCK_K), B).
    """
    i_b = tl.program_id(1).to(tl.int64)
    offs_k = tl.program_id(0).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    row = tl.load(ids_ptr + i_b * K + offs_k, mask=offs_k < K, other=-1).to(tl.int64)
    mask = (row >= 0) & (row < N)
    rows = embeddings_ptr + row * stride_embeddings_n
    anchor_ptr = anchors_ptr + i_b * stride_anchors_b
    total = tl.zeros((BLOCK_K,), tl.float64)
    for d in range(0, D):
        offs_d = tl.cast(d, tl.int64)
        value = tl.load(rows + offs_d * stride_embeddings_d, mask=mask, other=0.0).to(tl.float64)
        anchor = tl.load(anchor_ptr + offs_d * stride_anchors_d).to(tl.float64)
        difference = value - anchor
        total = total + difference * difference
    total = tl.where(mask, total, float("nan"))
    tl.store(distances_ptr + i_b * K + offs_k, total, mask=offs_k < K)


class NearRows:
    """Looks for the rows of a table that are near anchors.

    Args:
        embeddings: [N, D] float32.
        labels: [N] int64, contiguous.
    """

    def __init__(self, embeddings: Tensor, labels: Tensor, config: NearConfig) -> None:
        self.embeddings = embeddings
        self.labels = labels
        self.squares = row_squares(embeddings)
        self._halves = embeddings.bfloat16().contiguous()
        # Squares too large for float32 say nothing: minus infinity in their place lets all pass.
        self._floors = torch.where(self.squares < LARGEST, self.squares, -torch.inf)
        self.config = config
        D = embeddings.shape[1]
        # Of |a|^2 + |e|^2, which is at least 2 |a| |e|; the squares themselves have D roundings,
        # and a few are left for what is done with them.
        self.share = PRODUCT_ERROR + SUM_ERROR * (D + 8)

    def negatives(
        self, anchors: Tensor, anchor_labels: Tensor, limits: Tensor, capacity: int
    ) -> tuple[Tensor, Tensor]:
        """The negatives that may be within ``limits`` [B] float64 of each anchor.

        Args:
            anchors: [B, D] float32.
            anchor_labels: [B] int64, contiguous.
            limits: squared distances.
            capacity: how many are kept for an anchor at most.

        Returns:
            (ids [B, capacity] int32, in any order, then N; counts [B] int32, which exceed the
            capacity where some were lost).
        """
        B, (N, D), device = len(anchors), self.embeddings.shape, anchors.device
        ids = torch.full((B, capacity), N, dtype=torch.int32, device=device)
        counts = torch.zeros(B, dtype=torch.int32, device=device)
        # Outside the limit is what has |a|^2 + |e|^2 - 2 <a, e> - share (|a|^2 + |e|^2) > limit.
        own = anchors.double().square().sum(1) * (1 - self.share)
        floors = torch.where(own < LARGEST, own - limits, -torch.inf).float()
        floors = floors.clamp(max=torch.finfo(torch.float32).max)
        config = self.config
        blocks = triton.cdiv(B, config.block_b)
        splits = max(1, min(config.programs // blocks, triton.cdiv(N, config.block_n)))
        rows_per_split = triton.cdiv(triton.cdiv(N, splits), config.block_n) * config.block_n
        _near_kernel[(triton.cdiv(N, rows_per_split), blocks)](
            ids,
            counts,
            floors,
            anchors.bfloat16().contiguous(),
            anchor_labels,
            self._halves,
            self._floors,
            self.labels,
            B,
            N,
            D,
            capacity,
            rows_per_split,
            1 - self.share,
            BLOCK_B=config.block_b,
            BLOCK_N=config.block_n,
            BLOCK_D=config.block_d,
            num_warps=config.num_warps,
        )
        return ids, counts


def exact_distances(ids: Tensor, anchors: Tensor, embeddings: Tensor) -> Tensor:
    """Squared distances [B, K] in float64 to the rows ids [B, K]; NaN where that is no row."""
    distances = torch.empty(ids.shape, dtype=torch.float64, device=ids.device)
    (B, K), (N, D) = ids.shape, embeddings.shape
    if B * K == 0:
        return distances
    ids = ids.contiguous()
    _exact_kernel[(triton.cdiv(K, EXACT_BLOCK), B)](
        distances,
        ids,
        anchors,
        embeddings,
        *anchors.stride(),
        *embeddings.stride(),
        K,
        N,
        D,
        BLOCK_K=EXACT_BLOCK,
        num_warps=4,
        enable_fp_fusion=False,  # the specification rounds the product and the sum
    )
    return distances
