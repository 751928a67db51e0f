"""Draws from the valid pairs of each anchor, or a list of them.

:mod:`gcfast.kernels.anchor_pairs` counts the pairs of each positive; the library's prefix sum over
the rows gives the number of the first pair of each. A program then finds for the number of a pair
its positive (a binary search in those sums), the tile of its negative (binary searches in the
tiles, many side by side) and its row: 7 N / 64 look-ups a draw, 12 N bytes an anchor for the sums.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gcfast.kernels.anchor_pairs import below, log2, measured_groups
from gcfast.kernels.launch import (
    TripletsConfig,
    multiprocessors,
    sample_triplets_config,
)
from gcfast.reference import STREAM_TRIPLETS, Triplets

MAX_FIRST = 2**62  # above every count, and far enough below 2^63 to add T
STREAM = tl.constexpr(STREAM_TRIPLETS)


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
    positive, above = tl.zeros((BLOCK_T,), tl.int32), tl.zeros((BLOCK_T,), tl.int32) + N
    for _ in range(0, steps):
        unsure = is_pair & (positive < above)
        middle = positive + (above - positive) // 2
        passed = unsure & (tl.load(ends_ptr + middle, mask=unsure, other=0) <= rank)
        positive = tl.where(passed, middle + 1, positive)
        above = tl.where(unsure & (passed == 0), middle, above)
    positive = tl.where(is_pair, positive, 0)
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
            inside = tl.where(mask, below(starts, values, mask, TILE, LOG_TILE), 0)
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
    config = config or sample_triplets_config(B, N, multiprocessors(device))
    with torch.cuda.device_of(anchors):
        for group in measured_groups(
            anchors, anchor_labels, anchor_rows, embeddings, labels, hardest, margin, config
        ):
            ends = group.counts.cumsum(1, dtype=torch.int64)
            counts[group.anchors] = ends[:, -1]
            _draws_kernel[(triton.cdiv(triplets, config.block_t), len(ends))](
                positives[group.anchors],
                negatives[group.anchors],
                ends,
                group.distances,
                group.ordered,
                group.anchor_labels,
                group.anchor_rows,
                group.labels,
                group.margin,
                N,
                triplets,
                group.ordered.shape[1],
                N.bit_length(),
                seed,
                -1 if first is None else min(first, MAX_FIRST),
                BLOCK_T=config.block_t,
                BLOCK_S=config.block_s,
                TILE=config.tile,
                LOG_TILE=log2(config.tile),
                num_warps=config.num_warps,
            )
    return Triplets(positives, negatives, positives >= 0, counts, hardest)
