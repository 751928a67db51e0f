"""The mean cotangent over all valid pairs of each anchor, without a list of them.

Beside the negatives of each positive (:mod:`gcfast.kernels.anchor_pairs`) it counts the positives
of each negative, by the same search in ordered tiles of thresholds: 7 N P / 64 look-ups an anchor
with P positives. Its sum ends in the library's matrix product in float64: 2 N D operations and 8 N
bytes of weights an anchor.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gcfast.kernels.anchor_pairs import (
    below,
    log2,
    measured_groups,
    places,
    positive_thresholds,
)
from gcfast.kernels.launch import (
    TripletsConfig,
    multiprocessors,
    sample_triplets_config,
)

SLAB_BYTES = 256 * 2**20  # of rows in float64 for one matrix product


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
        _, mask_p, threshold = positive_thresholds(
            distances_ptr + i_b * N, by_label_ptr, start, last, anchor_row, margin, TILE
        )
        negated = -threshold
        negated = tl.where(mask_p & (negated == negated), negated, float("inf"))
        out = thresholds_ptr + i_b * tiles * TILE + (start - begin)
        tl.store(out + places(negated, TILE), negated)


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
        count += below(start_of_tile, -distance, mask_n & (same == 0), TILE, LOG_TILE)
    taken = tl.load(counts_ptr + i_b * N + offs_n, mask=mask_n, other=0)
    weight = tl.where(same, -taken, count).to(tl.float64)
    tl.store(weights_ptr + i_b * N + offs_n, weight, mask=mask_n)


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
    config = config or sample_triplets_config(B, N, multiprocessors(device))
    slab = max(1, SLAB_BYTES // (8 * max(D, 1)))
    with torch.cuda.device_of(anchors):
        for group in measured_groups(
            anchors, anchor_labels, anchor_rows, embeddings, labels, hardest, margin, config
        ):
            G, tiles, _ = group.ordered.shape
            thresholds = group.ordered  # which is no longer needed and has the same size
            _thresholds_kernel[(G, config.groups)](
                thresholds,
                group.distances,
                group.anchor_rows,
                group.by_label,
                group.starts,
                group.ends,
                group.margin,
                N,
                tiles,
                TILE=config.tile,
                num_warps=config.num_warps,
            )
            weights = torch.empty((G, N), dtype=torch.float64, device=device)
            _weights_kernel[(triton.cdiv(N, config.block_p), G)](
                weights,
                group.counts,
                group.distances,
                thresholds,
                group.anchor_labels,
                group.labels,
                group.starts,
                group.ends,
                N,
                tiles,
                BLOCK_P=config.block_p,
                TILE=config.tile,
                LOG_TILE=log2(config.tile),
                num_warps=config.num_warps,
            )
            total = group.counts.sum(1, dtype=torch.int64)
            pull = torch.zeros((G, D), dtype=torch.float64, device=device)
            for start in range(0, N, slab):
                rows = embeddings[start : start + slab].double()
                pull += weights[:, start : start + slab] @ rows
            counts[group.anchors] = total
            mean = 2 * pull / total.clamp(min=1)[:, None]
            # Without a pair every weight is 0, and so is the sum, but for rows of NaN.
            cotangents[group.anchors] = torch.where(total[:, None] > 0, mean, 0.0).float()
    return cotangents, counts, hardest
