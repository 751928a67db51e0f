"""What drawing triplets and averaging over them share: distances, and valid pairs counted.

The distances of an anchor to all rows are measured in float64; those of the negatives are put in
order, one tile of rows after another; and for each positive the negatives under its threshold
D(a, p) + margin are counted by a binary search in every tile.

What must be done for an anchor with P positives and tiles of 64 rows: 3 N D float64 operations for
the distances (subtract, multiply, add: no fused multiply-add, which would round otherwise than the
specification), 64 N comparisons for the order and 7 P N / 64 look-ups. Bytes: the table once a
block of anchors, 24 N for the distances and their ordered copy, 4 N for the counts.

Sorting all N negatives, as a library could, would cost more than measuring them. The positives of
an anchor are read from the rows in order of their labels, which the library sorts once a call:
N log N against B N D. Nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gcfast.kernels.launch import TripletsConfig

SCRATCH_BYTES = 512 * 2**20  # for the anchors of one group; an anchor has 28 N bytes
TRANSPOSE_BYTES = 2**30  # a table up to this size is copied so that neighbouring rows are adjacent
MAX_GROUP = 4096  # anchors: a grid has 65,535 places in all but its first dimension
HARDEST_BLOCK_N = 1024

FAR_ROW = tl.constexpr(0x7FFFFFFF)


@triton.jit
def places(values, TILE: tl.constexpr):
    """The place of each of TILE numbers in ascending order, ties by index: how many come before.

    TILE^2 comparisons, which for so few are less than a sorting network's exchanges.
    """
    index = tl.arange(0, TILE)
    is_tie = (values[None, :] == values[:, None]) & (index[None, :] < index[:, None])
    is_before = (values[None, :] < values[:, None]) | is_tie
    return tl.sum(is_before.to(tl.int32), axis=1)


@triton.jit
def below(tiles, values, mask, TILE: tl.constexpr, LOG_TILE: tl.constexpr):
    """How many of the TILE ascending numbers that start at each pointer are below each value."""
    place = tl.zeros_like(values).to(tl.int32)
    for i in tl.static_range(LOG_TILE):
        half = tl.full((), TILE >> (i + 1), tl.int32)
        found = tl.load(tiles + (place + (half - 1)), mask=mask, other=float("inf"))
        place += tl.where(found < values, half, 0)
    found = tl.load(tiles + place, mask=mask, other=float("inf"))
    return place + (found < values).to(tl.int32)


@triton.jit(do_not_specialize=["B"])
def _distances_kernel(
    distances_ptr,
    anchors_ptr,
    embeddings_ptr,
    stride_anchors_b,
    stride_anchors_d,
    stride_embeddings_n,
    stride_embeddings_d,
    B,
    N,
    D,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """distances[b, n] = sum_d (e[n, d] - a[b, d])^2 in float64, d by d, each step rounded.

    Grid: (ceil(N / BLOCK_N), ceil(B / BLOCK_B)).
    """
    i_n = tl.program_id(0).to(tl.int64)
    offs_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_b = tl.program_id(1).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    mask_n, mask_b = offs_n < N, offs_b < B
    rows = embeddings_ptr + offs_n * stride_embeddings_n  # [BLOCK_N]
    anchors = anchors_ptr + offs_b * stride_anchors_b  # [BLOCK_B]
    total = tl.zeros((BLOCK_B, BLOCK_N), tl.float64)
    for _ in range(0, D):
        row = tl.load(rows, mask=mask_n, other=0.0).to(tl.float64)
        anchor = tl.load(anchors, mask=mask_b, other=0.0).to(tl.float64)
        difference = row[None, :] - anchor[:, None]
        total = total + difference * difference
        rows += stride_embeddings_d
        anchors += stride_anchors_d
    mask = mask_b[:, None] & mask_n[None, :]
    tl.store(distances_ptr + offs_b[:, None] * N + offs_n[None, :], total, mask=mask)


@triton.jit
def _order_kernel(
    ordered_ptr,
    distances_ptr,
    anchor_labels_ptr,
    labels_ptr,
    N,
    TILE: tl.constexpr,
):
    """ordered[b, tile]: the distances of the tile's negatives, ascending, then infinity.

    Grid: (tiles, B).
    """
    i_n, i_b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    offs_n = i_n * TILE + tl.arange(0, TILE)
    mask_n = offs_n < N
    distance = tl.load(distances_ptr + i_b * N + offs_n, mask=mask_n, other=float("inf"))
    label = tl.load(labels_ptr + offs_n, mask=mask_n, other=0)
    # The comparison turns a NaN away, which has no place in any order.
    is_negative = (label != tl.load(anchor_labels_ptr + i_b)) & (distance < float("inf"))
    distance = tl.where(mask_n & is_negative, distance, float("inf"))
    out = ordered_ptr + (i_b * tl.num_programs(0) + i_n) * TILE
    tl.store(out + places(distance, TILE), distance)


@triton.jit
def _hardest_kernel(
    hardest_ptr,
    distances_ptr,
    anchor_labels_ptr,
    anchor_rows_ptr,
    labels_ptr,
    N,
    BLOCK_N: tl.constexpr,
):
    """The farthest positive and the nearest negative, ties to the lower row.  Grid: (B,)."""
    i_b = tl.program_id(0).to(tl.int64)
    anchor_label = tl.load(anchor_labels_ptr + i_b)
    anchor_row = tl.load(anchor_rows_ptr + i_b)
    far = tl.full((BLOCK_N,), -1.0, tl.float64)
    near = tl.full((BLOCK_N,), float("inf"), tl.float64)
    far_row = tl.full((BLOCK_N,), FAR_ROW, tl.int32)
    near_row = tl.full((BLOCK_N,), FAR_ROW, tl.int32)
    for start in range(0, N, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        mask_n = offs_n < N
        distance = tl.load(distances_ptr + i_b * N + offs_n, mask=mask_n, other=float("nan"))
        same = tl.load(labels_ptr + offs_n, mask=mask_n, other=0) == anchor_label
        farther = same & (offs_n != anchor_row) & (distance > far)  # strictly: the earlier stays
        far = tl.where(farther, distance, far)
        far_row = tl.where(farther, offs_n, far_row)
        nearer = (same == 0) & (distance < near)
        near = tl.where(nearer, distance, near)
        near_row = tl.where(nearer, offs_n, near_row)
    far_row = tl.min(tl.where(far == tl.max(far, axis=0), far_row, FAR_ROW), axis=0)
    near_row = tl.min(tl.where(near == tl.min(near, axis=0), near_row, FAR_ROW), axis=0)
    tl.store(hardest_ptr + i_b * 2, tl.where(far_row == FAR_ROW, -1, far_row).to(tl.int64))
    tl.store(hardest_ptr + i_b * 2 + 1, tl.where(near_row == FAR_ROW, -1, near_row).to(tl.int64))


@triton.jit
def positive_thresholds(
    distances_ptr, by_label_ptr, start, last, anchor_row, margin, BLOCK_P: tl.constexpr
):
    """(rows, which are positives, d(b, p) + margin) of BLOCK_P places in the order of labels.

    ``distances_ptr`` is the anchor's own.
    """
    offs_p = start + tl.arange(0, BLOCK_P)
    mask_p = offs_p < last
    row = tl.load(by_label_ptr + offs_p, mask=mask_p, other=0)
    mask_p = mask_p & (row != anchor_row)
    threshold = tl.load(distances_ptr + row, mask=mask_p, other=0.0) + margin
    return row, mask_p, threshold


@triton.jit
def _counts_kernel(
    counts_ptr,
    distances_ptr,
    ordered_ptr,
    anchor_rows_ptr,
    by_label_ptr,
    starts_ptr,
    ends_ptr,
    margin_ptr,
    N,
    tiles,
    tiles_per_split,
    BLOCK_P: tl.constexpr,
    TILE: tl.constexpr,
    LOG_TILE: tl.constexpr,
):
    """counts[b, p] += the negatives of this stretch of tiles with d(b, n) < d(b, p) + margin.

    Integers are added, so their order does not matter. Grid: (B, groups of positives, stretches).
    """
    i_b = tl.program_id(0).to(tl.int64)
    anchor_row = tl.load(anchor_rows_ptr + i_b)
    first = tl.load(starts_ptr + i_b) + tl.program_id(1) * BLOCK_P
    last = tl.load(ends_ptr + i_b)
    margin = tl.load(margin_ptr)
    first_tile = tl.program_id(2) * tiles_per_split
    last_tile = tl.minimum(first_tile + tiles_per_split, tiles)
    ordered = ordered_ptr + i_b * tiles * TILE
    for start in range(first, last, tl.num_programs(1) * BLOCK_P):
        row, mask_p, threshold = positive_thresholds(
            distances_ptr + i_b * N, by_label_ptr, start, last, anchor_row, margin, BLOCK_P
        )
        count = tl.zeros((BLOCK_P,), tl.int32)
        for tile in range(first_tile, last_tile):
            start_of_tile = ordered + tl.cast(tile, tl.int64) * TILE
            count += below(start_of_tile, threshold, mask_p, TILE, LOG_TILE)
        tl.atomic_add(counts_ptr + i_b * N + row, count, mask=mask_p)


class Group(NamedTuple):
    """Anchors whose distances are measured and whose pairs are counted, and where they are."""

    anchors: slice
    anchor_labels: Tensor  # [G]
    anchor_rows: Tensor  # [G]
    labels: Tensor  # [N]
    by_label: Tensor  # [N]: rows in the order of (label, row)
    starts: Tensor  # [G]: where the anchor's label starts in `by_label`
    ends: Tensor  # [G]
    margin: Tensor  # [1] float64: as an argument it would be rounded to float32
    distances: Tensor  # [G, N] float64
    ordered: Tensor  # [G, tiles, tile] float64: those of negatives, ascending in each tile
    counts: Tensor  # [G, N] int32: valid pairs of a positive, 0 elsewhere


def measured_groups(
    anchors: Tensor,
    anchor_labels: Tensor,
    anchor_rows: Tensor,
    embeddings: Tensor,
    labels: Tensor,
    hardest: Tensor,
    margin: float,
    config: TripletsConfig,
) -> Iterator[Group]:
    """The anchors, group after group as they fit into ``SCRATCH_BYTES``; fills hardest [B, 2]."""
    (N, D), device = embeddings.shape, anchors.device
    if embeddings.stride(0) != 1 and len(anchors) > 1 and embeddings.nbytes <= TRANSPOSE_BYTES:
        embeddings = embeddings.T.contiguous().T
    anchor_labels, anchor_rows = anchor_labels.contiguous(), anchor_rows.contiguous()
    labels = labels.contiguous()
    in_order, by_label = labels.sort(stable=True)
    starts = torch.searchsorted(in_order, anchor_labels)
    ends = torch.searchsorted(in_order, anchor_labels, right=True)
    margins = torch.full((1,), margin, dtype=torch.float64, device=device)
    tiles = triton.cdiv(N, config.tile)
    size = max(1, min(MAX_GROUP, SCRATCH_BYTES // (28 * N)))
    for first in range(0, len(anchors), size):
        part = slice(first, min(first + size, len(anchors)))
        G = part.stop - part.start
        group = Group(
            part,
            anchor_labels[part],
            anchor_rows[part],
            labels,
            by_label,
            starts[part],
            ends[part],
            margins,
            torch.empty((G, N), dtype=torch.float64, device=device),
            torch.empty((G, tiles, config.tile), dtype=torch.float64, device=device),
            torch.zeros((G, N), dtype=torch.int32, device=device),
        )
        _distances_kernel[(triton.cdiv(N, config.block_n), triton.cdiv(G, config.block_b))](
            group.distances,
            anchors[part],
            embeddings,
            *anchors.stride(),
            *embeddings.stride(),
            G,
            N,
            D,
            BLOCK_B=config.block_b,
            BLOCK_N=config.block_n,
            num_warps=config.num_warps,
            enable_fp_fusion=False,  # the specification rounds the product and the sum
        )
        _order_kernel[(tiles, G)](
            group.ordered,
            group.distances,
            group.anchor_labels,
            labels,
            N,
            TILE=config.tile,
            num_warps=config.num_warps,
        )
        _hardest_kernel[(G,)](
            hardest[part],
            group.distances,
            group.anchor_labels,
            group.anchor_rows,
            labels,
            N,
            BLOCK_N=HARDEST_BLOCK_N,
            num_warps=config.num_warps,
        )
        tiles_per_split = triton.cdiv(tiles, config.splits)
        _counts_kernel[(G, config.groups, triton.cdiv(tiles, tiles_per_split))](
            group.counts,
            group.distances,
            group.ordered,
            group.anchor_rows,
            by_label,
            group.starts,
            group.ends,
            margins,
            N,
            tiles,
            tiles_per_split,
            BLOCK_P=config.block_p,
            TILE=config.tile,
            LOG_TILE=log2(config.tile),
            num_warps=config.num_warps,
        )
        yield group


def log2(n: int) -> int:
    """The logarithm of a power of 2."""
    return n.bit_length() - 1
