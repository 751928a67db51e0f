"""Valid triplets: their exact counts, draws from them, and the mean over all of them.

Anchors are taken in groups whose distances to all N rows fit into ``SCRATCH_BYTES``. For each group

1. :func:`_distances_kernel` measures the distances and :func:`_order_kernel` puts those of the
   negatives in order, one tile of rows after another;
2. :func:`_counts_kernel` counts for each positive the negatives under its threshold
   D(a, p) + margin, by a binary search in every tile; the library's prefix sum over the rows then
   gives the number of the first pair of each positive;
3. :func:`_draws_kernel` finds for each number of a pair its positive (a binary search in those
   sums), the tile of its negative (binary searches in the tiles, many side by side) and the row.

The mean over all pairs needs counts for the negatives too (:func:`_weights_kernel`: the same search
in ordered tiles of thresholds) and ends in the library's matrix product in float64.

What must be done for an anchor with P positives, T draws and tiles of 64 rows: 3 N D float64
operations for the distances (subtract, multiply, add: no fused multiply-add, which would round
otherwise than the specification), 64 N comparisons for the order and 7 (P + T) N / 64 look-ups; for
the mean 7 N P / 64 look-ups and 2 N D operations more. Bytes: the table once a block of anchors,
24 N for the distances and their ordered copy, 16 N for the counts and their sums.

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

from gcfast.kernels.launch import (
    Specialisation,
    TripletsConfig,
    multiprocessors,
    triplets_config,
)
from gcfast.reference import STREAM_TRIPLETS, Triplets

SCRATCH_BYTES = 512 * 2**20  # for the anchors of one group; an anchor has 28 N bytes
TRANSPOSE_BYTES = 2**30  # a table up to this size is copied so that neighbouring rows are adjacent
SLAB_BYTES = 256 * 2**20  # of rows in float64 for one matrix product
MAX_GROUP = 4096  # anchors: a grid has 65,535 places in all but its first dimension

MAX_FIRST = 2**62  # above every count, and far enough below 2^63 to add T
HARDEST_BLOCK_N = 1024

FAR_ROW = tl.constexpr(0x7FFFFFFF)


@triton.jit
def _below(tiles, values, mask, TILE: tl.constexpr, LOG_TILE: tl.constexpr):
    """How many of the TILE ascending numbers that start at each pointer are below each value."""
    place = tl.zeros_like(values).to(tl.int32)
    for i in tl.static_range(LOG_TILE):
        half = tl.full((), TILE >> (i + 1), tl.int32)
        found = tl.load(tiles + (place + (half - 1)), mask=mask, other=float("inf"))
        place += tl.where(found < values, half, 0)
    found = tl.load(tiles + place, mask=mask, other=float("inf"))
    return place + (found < values).to(tl.int32)


@triton.jit
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
def _places(values, TILE: tl.constexpr):
    """The place of each of TILE numbers in ascending order, ties by index: how many come before.

    TILE^2 comparisons, which for so few are less than a sorting network's exchanges.
    """
    index = tl.arange(0, TILE)
    is_tie = (values[None, :] == values[:, None]) & (index[None, :] < index[:, None])
    is_before = (values[None, :] < values[:, None]) | is_tie
    return tl.sum(is_before.to(tl.int32), axis=1)


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
    tl.store(out + _places(distance, TILE), distance)


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
        offs_p = start + tl.arange(0, BLOCK_P)
        mask_p = offs_p < last
        row = tl.load(by_label_ptr + offs_p, mask=mask_p, other=0)
        mask_p = mask_p & (row != anchor_row)
        threshold = tl.load(distances_ptr + i_b * N + row, mask=mask_p, other=0.0) + margin
        count = tl.zeros((BLOCK_P,), tl.int32)
        for tile in range(first_tile, last_tile):
            start_of_tile = ordered + tl.cast(tile, tl.int64) * TILE
            count += _below(start_of_tile, threshold, mask_p, TILE, LOG_TILE)
        tl.atomic_add(counts_ptr + i_b * N + row, count, mask=mask_p)


@triton.jit(do_not_specialize=["seed", "first"])
def _draws_kernel(
    positives_ptr,
    negatives_ptr,
    ends_ptr,
    distances_ptr,
    ordered_ptr,
    anchor_labels_ptr,
    anchor_rows_ptr,
    labels_ptr,
    margin_ptr,
    N,
    T,
    tiles,
    steps,
    seed,
    first,
    STREAM: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    TILE: tl.constexpr,
    LOG_TILE: tl.constexpr,
):
    """positives, negatives [b, t] of the pair number rank(b, t), -1 where there is no such pair.

    ends[b, n] is the number of pairs whose positive's row is at most n. The rank is first + t where
    first >= 0, t where there are at most T pairs, otherwise floor(x pairs / 2^64) with x the 64
    bits that Philox gives (t, row, stream) under the seed. Grid: (ceil(T / BLOCK_T), B).
    """
    i_b = tl.program_id(1).to(tl.int64)
    offs_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    anchor_label = tl.load(anchor_labels_ptr + i_b)
    anchor_row = tl.load(anchor_rows_ptr + i_b)
    ends_ptr += i_b * N
    distances_ptr += i_b * N
    pairs = tl.load(ends_ptr + N - 1)

    zero = tl.zeros((BLOCK_T,), tl.int64)
    low, high, _, _ = tl.philox(
        seed,
        offs_t.to(tl.uint32),
        ((zero + anchor_row) & 0xFFFFFFFF).to(tl.uint32),
        (((zero + anchor_row) >> 32) & 0xFFFFFFFF).to(tl.uint32),
        (zero + STREAM).to(tl.uint32),
    )
    word = (high.to(tl.uint64) << 32) | low.to(tl.uint64)
    drawn = tl.umulhi(word, (zero + pairs).to(tl.uint64)).to(tl.int64)
    is_listed = (first >= 0) | (pairs <= T)
    rank = tl.where(is_listed, tl.maximum(first, 0) + offs_t.to(tl.int64), drawn)
    is_pair = (offs_t < T) & (rank < pairs)

    # The positive: the first row whose pairs reach beyond the rank.
    below, above = tl.zeros((BLOCK_T,), tl.int32), tl.zeros((BLOCK_T,), tl.int32) + N
    for _ in range(0, steps):
        open_ = is_pair & (below < above)
        middle = below + (above - below) // 2
        passed = open_ & (tl.load(ends_ptr + middle, mask=open_, other=0) <= rank)
        below = tl.where(passed, middle + 1, below)
        above = tl.where(open_ & (passed == 0), middle, above)
    positive = tl.where(is_pair, below, 0)
    before = tl.load(ends_ptr + positive - 1, mask=is_pair & (positive > 0), other=0)
    left = (rank - before).to(tl.int32)  # this many of its negatives come first; below N
    threshold = tl.load(distances_ptr + positive, mask=is_pair, other=0.0) + tl.load(margin_ptr)

    # The tile of rows where the negative is.
    ordered = ordered_ptr + i_b * tiles * TILE
    tile = tl.zeros((BLOCK_T,), tl.int32)
    is_open = is_pair
    for start in range(0, tiles, BLOCK_S):
        if tl.max(is_open.to(tl.int32), axis=0) > 0:
            offs_s = start + tl.arange(0, BLOCK_S)
            starts = ordered + offs_s.to(tl.int64)[None, :] * TILE
            mask = is_open[:, None] & (offs_s < tiles)[None, :]
            values = tl.broadcast_to(threshold[:, None], (BLOCK_T, BLOCK_S))
            inside = tl.where(mask, _below(starts, values, mask, TILE, LOG_TILE), 0)
            through = tl.cumsum(inside, axis=1)  # [BLOCK_T, BLOCK_S]
            is_passed = through <= left[:, None]
            passed = tl.sum(is_passed.to(tl.int32), axis=1)  # tiles, of these BLOCK_S
            left -= tl.where(is_open, tl.max(tl.where(is_passed, through, 0), axis=1), 0)
            is_here = is_open & (passed < BLOCK_S)
            tile = tl.where(is_here, start + passed, tile)
            is_open = is_open & (passed == BLOCK_S)

    # And its row.
    offs_n = tile[:, None] * TILE + tl.arange(0, TILE)[None, :]
    mask = is_pair[:, None] & (offs_n < N)
    distance = tl.load(distances_ptr + offs_n, mask=mask, other=float("inf"))
    label = tl.load(labels_ptr + offs_n, mask=mask, other=0)
    is_valid = mask & (label != anchor_label) & (distance < threshold[:, None])
    number = tl.cumsum(is_valid.to(tl.int32), axis=1)
    is_it = is_valid & (number == left[:, None] + 1)
    negative = tl.max(tl.where(is_it, offs_n, -1), axis=1)

    offs = i_b * T + offs_t
    tl.store(positives_ptr + offs, tl.where(is_pair, positive, -1).to(tl.int64), mask=offs_t < T)
    tl.store(negatives_ptr + offs, negative.to(tl.int64), mask=offs_t < T)


@triton.jit
def _thresholds_kernel(
    thresholds_ptr,
    distances_ptr,
    anchor_rows_ptr,
    by_label_ptr,
    starts_ptr,
    ends_ptr,
    margin_ptr,
    N,
    tiles,
    TILE: tl.constexpr,
):
    """-(d(b, p) + margin) of the positives, in ascending tiles, then infinity.

    Tiles beyond the last positive are not written. Grid: (B, groups of tiles).
    """
    i_b = tl.program_id(0).to(tl.int64)
    anchor_row = tl.load(anchor_rows_ptr + i_b)
    begin, last = tl.load(starts_ptr + i_b), tl.load(ends_ptr + i_b)
    margin = tl.load(margin_ptr)
    first = begin + tl.program_id(1) * TILE
    for start in range(first, last, tl.num_programs(1) * TILE):
        offs_p = start + tl.arange(0, TILE)
        mask_p = offs_p < last
        row = tl.load(by_label_ptr + offs_p, mask=mask_p, other=0)
        mask_p = mask_p & (row != anchor_row)
        negated = -(tl.load(distances_ptr + i_b * N + row, mask=mask_p, other=0.0) + margin)
        negated = tl.where(mask_p & (negated == negated), negated, float("inf"))
        out = thresholds_ptr + i_b * tiles * TILE + (start - begin)
        tl.store(out + _places(negated, TILE), negated)


@triton.jit
def _weights_kernel(
    weights_ptr,
    counts_ptr,
    distances_ptr,
    thresholds_ptr,
    anchor_labels_ptr,
    labels_ptr,
    starts_ptr,
    ends_ptr,
    N,
    tiles,
    BLOCK_P: tl.constexpr,
    TILE: tl.constexpr,
    LOG_TILE: tl.constexpr,
):
    """weights[b, n] = m_n for a negative, -n_p for a positive.  Grid: (ceil(N / BLOCK_P), B)."""
    i_b = tl.program_id(1).to(tl.int64)
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    mask_n = offs_n < N
    positives = tl.load(ends_ptr + i_b) - tl.load(starts_ptr + i_b)
    same = tl.load(labels_ptr + offs_n, mask=mask_n, other=0) == tl.load(anchor_labels_ptr + i_b)
    distance = tl.load(distances_ptr + i_b * N + offs_n, mask=mask_n, other=0.0)
    count = tl.zeros((BLOCK_P,), tl.int32)
    thresholds = thresholds_ptr + i_b * tiles * TILE
    for start in range(0, positives, TILE):
        start_of_tile = thresholds + tl.cast(start, tl.int64)
        count += _below(start_of_tile, -distance, mask_n & (same == 0), TILE, LOG_TILE)
    taken = tl.load(counts_ptr + i_b * N + offs_n, mask=mask_n, other=0)
    weight = tl.where(same, -taken, count).to(tl.float64)
    tl.store(weights_ptr + i_b * N + offs_n, weight, mask=mask_n)


class _Group(NamedTuple):
    """Anchors whose distances are measured and whose pairs are counted."""

    anchors: slice
    config: TripletsConfig
    labels: Tensor  # of the anchors [G]
    rows: Tensor  # of the anchors [G]
    starts: Tensor  # [G]: where the anchor's label starts in `by_label`
    ends: Tensor  # [G]
    distances: Tensor  # [G, N] float64
    ordered: Tensor  # [G, tiles, TILE] float64: ascending in each tile, of negatives
    counts: Tensor  # [G, N] int32: valid pairs of a positive, 0 elsewhere


class _Table(NamedTuple):
    labels: Tensor  # [N]
    by_label: Tensor  # [N]: rows in the order of (label, row)
    margin: Tensor  # [1] float64: an argument would be rounded to float32


def _prepare(labels: Tensor, margin: float) -> tuple[_Table, Tensor]:
    in_order, by_label = labels.sort(stable=True)
    margins = torch.full((1,), margin, dtype=torch.float64, device=labels.device)
    return _Table(labels.contiguous(), by_label, margins), in_order


def _groups(
    anchors: Tensor,
    anchor_labels: Tensor,
    anchor_rows: Tensor,
    embeddings: Tensor,
    table: _Table,
    labels_in_order: Tensor,
    hardest: Tensor,
    config: TripletsConfig | None,
) -> Iterator[_Group]:
    """Steps 1 and 2, a group at a time; fills ``hardest`` [B, 2]."""
    N, D = embeddings.shape
    device = anchors.device
    if embeddings.stride(0) != 1 and len(anchors) > 1 and embeddings.nbytes <= TRANSPOSE_BYTES:
        embeddings = embeddings.T.contiguous().T
    anchor_labels = anchor_labels.contiguous()
    starts = torch.searchsorted(labels_in_order, anchor_labels)
    ends = torch.searchsorted(labels_in_order, anchor_labels, right=True)
    size = max(1, min(MAX_GROUP, SCRATCH_BYTES // (28 * N)))
    for first in range(0, len(anchors), size):
        part = slice(first, min(first + size, len(anchors)))
        G = part.stop - part.start
        chosen = config or triplets_config(G, N, multiprocessors(device))
        tiles = triton.cdiv(N, chosen.tile)
        group = _Group(
            part,
            chosen,
            anchor_labels[part],
            anchor_rows[part].contiguous(),
            starts[part],
            ends[part],
            torch.empty((G, N), dtype=torch.float64, device=device),
            torch.empty((G, tiles, chosen.tile), dtype=torch.float64, device=device),
            torch.zeros((G, N), dtype=torch.int32, device=device),
        )
        _distances_kernel[(triton.cdiv(N, chosen.block_n), triton.cdiv(G, chosen.block_b))](
            group.distances,
            anchors[part],
            embeddings,
            *anchors.stride(),
            *embeddings.stride(),
            G,
            N,
            D,
            BLOCK_B=chosen.block_b,
            BLOCK_N=chosen.block_n,
            num_warps=chosen.num_warps,
            enable_fp_fusion=False,  # the specification rounds the product and the sum
        )
        _order_kernel[(tiles, G)](
            group.ordered,
            group.distances,
            group.labels,
            table.labels,
            N,
            TILE=chosen.tile,
            num_warps=chosen.num_warps,
        )
        _hardest_kernel[(G,)](
            hardest[part],
            group.distances,
            group.labels,
            group.rows,
            table.labels,
            N,
            BLOCK_N=HARDEST_BLOCK_N,
            num_warps=chosen.num_warps,
        )
        tiles_per_split = triton.cdiv(tiles, chosen.splits)
        _counts_kernel[(G, chosen.groups, triton.cdiv(tiles, tiles_per_split))](
            group.counts,
            group.distances,
            group.ordered,
            group.rows,
            table.by_label,
            group.starts,
            group.ends,
            table.margin,
            N,
            tiles,
            tiles_per_split,
            BLOCK_P=chosen.block_p,
            TILE=chosen.tile,
            LOG_TILE=_log2(chosen.tile),
            num_warps=chosen.num_warps,
        )
        yield group


def _log2(n: int) -> int:
    return n.bit_length() - 1


def launch_sample_triplets(
    anchors: Tensor,
    anchor_labels: Tensor,
    anchor_rows: Tensor,
    embeddings: Tensor,
    labels: Tensor,
    *,
    triplets: int,
    margin: float,
    seed: int = 0,
    first: int | None = None,
    config: TripletsConfig | None = None,
) -> Triplets:
    """Draws or lists valid pairs, as :func:`gcfast.ops.sample_triplets`, which checks the input."""
    B, N, device = len(anchors), len(labels), anchors.device
    positives = torch.full((B, triplets), -1, dtype=torch.int64, device=device)
    negatives = torch.full_like(positives, -1)
    counts = torch.zeros(B, dtype=torch.int64, device=device)
    hardest = torch.full((B, 2), -1, dtype=torch.int64, device=device)
    if B == 0 or N == 0:
        return Triplets(positives, negatives, positives >= 0, counts, hardest)
    table, in_order = _prepare(labels, margin)
    inputs = (anchors, anchor_labels, anchor_rows, embeddings, table, in_order, hardest, config)
    with torch.cuda.device_of(anchors):
        for group in _groups(*inputs):
            chosen = group.config
            ends = group.counts.cumsum(1, dtype=torch.int64)
            counts[group.anchors] = ends[:, -1]
            _draws_kernel[(triton.cdiv(triplets, chosen.block_t), len(ends))](
                positives[group.anchors],
                negatives[group.anchors],
                ends,
                group.distances,
                group.ordered,
                group.labels,
                group.rows,
                table.labels,
                table.margin,
                N,
                triplets,
                group.ordered.shape[1],
                N.bit_length(),
                seed,
                -1 if first is None else min(first, MAX_FIRST),
                STREAM=STREAM_TRIPLETS,
                BLOCK_T=chosen.block_t,
                BLOCK_S=chosen.block_s,
                TILE=chosen.tile,
                LOG_TILE=_log2(chosen.tile),
                num_warps=chosen.num_warps,
            )
    return Triplets(positives, negatives, positives >= 0, counts, hardest)


def launch_mean_cotangents(
    anchors: Tensor,
    anchor_labels: Tensor,
    anchor_rows: Tensor,
    embeddings: Tensor,
    labels: Tensor,
    *,
    margin: float,
    config: TripletsConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The mean over all valid pairs, as :func:`gcfast.ops.mean_cotangents`, which checks."""
    (B, D), N, device = anchors.shape, len(labels), anchors.device
    cotangents = torch.zeros((B, D), dtype=torch.float32, device=device)
    counts = torch.zeros(B, dtype=torch.int64, device=device)
    hardest = torch.full((B, 2), -1, dtype=torch.int64, device=device)
    if B == 0 or N == 0:
        return cotangents, counts, hardest
    table, in_order = _prepare(labels, margin)
    inputs = (anchors, anchor_labels, anchor_rows, embeddings, table, in_order, hardest, config)
    slab = max(1, SLAB_BYTES // (8 * max(D, 1)))
    with torch.cuda.device_of(anchors):
        for group in _groups(*inputs):
            chosen = group.config
            G, tiles, _ = group.ordered.shape
            shared = (group.starts, group.ends)
            thresholds = group.ordered  # which is no longer needed and has the same size
            _thresholds_kernel[(G, chosen.groups)](
                thresholds,
                group.distances,
                group.rows,
                table.by_label,
                *shared,
                table.margin,
                N,
                tiles,
                TILE=chosen.tile,
                num_warps=chosen.num_warps,
            )
            weights = torch.empty((G, N), dtype=torch.float64, device=device)
            _weights_kernel[(triton.cdiv(N, chosen.block_p), G)](
                weights,
                group.counts,
                group.distances,
                thresholds,
                group.labels,
                table.labels,
                *shared,
                N,
                tiles,
                BLOCK_P=chosen.block_p,
                TILE=chosen.tile,
                LOG_TILE=_log2(chosen.tile),
                num_warps=chosen.num_warps,
            )
            total = group.counts.sum(1, dtype=torch.int64)
            pull = torch.zeros((G, D), dtype=torch.float64, device=device)
            for start in range(0, N, slab):
                rows = embeddings[start : start + slab].double()
                pull += weights[:, start : start + slab] @ rows
            counts[group.anchors] = total
            # Without a pair the sum is 0, whatever it is divided by.
            cotangents[group.anchors] = (2 * pull / total.clamp(min=1)[:, None]).float()
    return cotangents, counts, hardest


def specialisations() -> Iterator[Specialisation]:
    """Every form of the kernels that the launchers can ask for: one of each."""
    config = triplets_config(64, 10**5, 132)
    shared = {
        "distances_ptr": "*fp64",
        "ordered_ptr": "*fp64",
        "thresholds_ptr": "*fp64",
        "weights_ptr": "*fp64",
        "margin_ptr": "*fp64",
        "counts_ptr": "*i32",
        "anchors_ptr": "*fp32",
        "embeddings_ptr": "*fp32",
        "seed": "i64",
        "first": "i64",
    }
    constants = {
        "BLOCK_B": config.block_b,
        "BLOCK_N": config.block_n,
        "BLOCK_P": config.block_p,
        "BLOCK_S": config.block_s,
        "BLOCK_T": config.block_t,
        "LOG_TILE": _log2(config.tile),
        "STREAM": STREAM_TRIPLETS,
        "TILE": config.tile,
    }
    for kernel in (
        _distances_kernel,
        _order_kernel,
        _hardest_kernel,
        _counts_kernel,
        _draws_kernel,
        _thresholds_kernel,
        _weights_kernel,
    ):
        fixed = {name: constants[name] for name in kernel.arg_names if name in constants}
        options: dict[str, int] = {"num_warps": config.num_warps}
        if kernel is _hardest_kernel:
            fixed["BLOCK_N"] = HARDEST_BLOCK_N
        if kernel is _distances_kernel:
            options["enable_fp_fusion"] = False
        others = [name for name in kernel.arg_names if name not in fixed]
        other = {name: "*i64" if name.endswith("_ptr") else "i32" for name in others}
        yield Specialisation(
            kernel, {name: shared.get(name, other[name]) for name in others}, fixed, options
        )
