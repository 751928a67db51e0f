"""The mean cotangent over all valid pairs of each anchor, without a list of them.

:mod:`gcfast.kernels.triplets.scan` finds the rows that valid pairs are made of; the pairs of each
are counted by binary searches in the sorted distances and thresholds. The sum ends in the library's
matrix product in float64: 2 N D operations and 8 N bytes of weights an anchor.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gcfast.kernels.launch import NearConfig
from gcfast.kernels.triplets.scan import Group, Scan
from gcfast.kernels.triplets.tries import label_ranges
from gcfast.reference import label_order

SLAB_BYTES = 256 * 2**20  # of rows in float64 for one matrix product
WEIGHTS_BYTES = 512 * 2**20  # of the weights of all rows for some anchors


def launch_mean_cotangents(
    anchors: Tensor,
    anchor_labels: Tensor,
    anchor_rows: Tensor,
    embeddings: Tensor,
    labels: Tensor,
    by_label: Tensor | None = None,
    *,
    margin: float,
    config: NearConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The mean over all valid pairs, as :func:`gcfast.ops.mean_cotangents`, which checks."""
    (B, D), N, device = anchors.shape, len(labels), anchors.device
    cotangents = torch.zeros((B, D), dtype=torch.float32, device=device)
    counts = torch.zeros(B, dtype=torch.int64, device=device)
    hardest = torch.full((B, 2), -1, dtype=torch.int64, device=device)
    if B == 0 or N == 0:
        return cotangents, counts, hardest
    labels, anchor_labels, anchor_rows, by_label = (
        ids.contiguous()
        for ids in (
            labels,
            anchor_labels,
            anchor_rows,
            label_order(labels) if by_label is None else by_label,
        )
    )
    everyone = torch.arange(B, device=device)
    with torch.cuda.device_of(anchors):
        ranges = label_ranges(anchor_labels, anchor_rows, labels, by_label)
        scan = Scan(anchors, anchor_labels, embeddings, labels, by_label, ranges, margin, config)
        for group in scan.groups(everyone):
            hardest[group.which] = group.hardest
            for part in torch.arange(len(group.which), device=device).split(
                max(1, WEIGHTS_BYTES // (8 * N))
            ):
                one = Group._make(None if c is None else c[part] for c in group)
                which = one.which
                weights, counts[which] = _weights(one, N)
                mean = 2 * _product(weights, embeddings) / counts[which].clamp(min=1)[:, None]
                # Without a pair every weight is 0, and so is the sum, but for rows of NaN.
                found = counts[which] > 0
                cotangents[which] = torch.where(found[:, None], mean, 0.0).float()
    return cotangents, counts, hardest


def _weights(group: Group, N: int) -> tuple[Tensor, Tensor]:
    """([G, N] float64: m_n of a negative, -n_p of a positive; [G] int64: valid pairs)."""
    per_positive = group.counts()
    G, P = per_positive.shape
    per_negative = (P - group.steps).double()
    # Column N takes what stands for no row.
    weights = torch.zeros((G, N + 1), dtype=torch.float64, device=per_negative.device)
    if group.negatives is None:
        weights[:, :N] = per_negative
    else:
        weights.scatter_(1, group.negatives.long(), per_negative)
    weights.scatter_(1, group.positives, -per_positive.double())
    return weights[:, :N], per_positive.sum(1)


def _product(weights: Tensor, embeddings: Tensor) -> Tensor:
    """[G, N] float64 times [N, D] float32, a slab of rows at a time: [G, D] float64."""
    slab = max(1, SLAB_BYTES // (8 * max(embeddings.shape[1], 1)))
    total = weights.new_zeros((len(weights), embeddings.shape[1]))
    for start in range(0, len(embeddings), slab):
        total += weights[:, start : start + slab] @ embeddings[start : start + slab].double()
    return total
