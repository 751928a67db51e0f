"""Where the distance of every row comes among the sorted thresholds of an anchor.

For anchors with too many rows under their largest threshold to list them. Distances come from the
library's matrix product in float64, whose error is bounded, and are measured again in the order of
the specification where that error could decide.

Operations: 2 N D in float64 an anchor. Bytes: 20 N an anchor, and 20 N D for all anchors together.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

SLAB_ROWS = 32768  # of the table in float64 at once
SLICES = 16384  # of the range of an anchor's thresholds
BLOCK_N = 512


@triton.jit
def _step(sorted_ptr, first_ptr, front, back, scale, P, value, mask, SLICES: tl.constexpr):
    """The first of P sorted thresholds above each value; P where there is none, and for NaN."""
    is_below = mask & (value < back)
    beyond = tl.where(is_below & (value > front), value - front, 0.0)
    place = tl.minimum(beyond * scale, SLICES - 1.0).to(tl.int32)
    step = tl.load(first_ptr + place, mask=is_below, other=0)
    # The slice is right but for rounding and for what lies inside of it.
    goes_on = is_below
    while tl.max(goes_on.to(tl.int32), axis=0) > 0:
        before = tl.load(sorted_ptr + step - 1, mask=goes_on & (step > 0), other=float("-inf"))
        goes_on = goes_on & (before > value)
        step -= goes_on.to(tl.int32)
    goes_on = is_below
    while tl.max(goes_on.to(tl.int32), axis=0) > 0:
        here = tl.load(sorted_ptr + step, mask=goes_on, other=float("inf"))
        goes_on = goes_on & (here <= value)
        step += goes_on.to(tl.int32)
    return tl.where(is_below, step, P)


@triton.jit(do_not_specialize=["N", "P", "begin", "S"])
def _steps_kernel(
    steps_ptr,
    totals_ptr,
    products_ptr,
    anchor_squares_ptr,
    squares_ptr,
    sorted_ptr,
    first_ptr,
    ranges_ptr,
    anchors_ptr,
    anchor_labels_ptr,
    embeddings_ptr,
    labels_ptr,
    stride_anchors_b,
    stride_anchors_d,
    stride_embeddings_n,
    stride_embeddings_d,
    N,
    D,
    P,
    begin,
    S,
    SLICES: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """steps[b, n] for the S rows from ``begin`` on; totals[b, p] counts the negatives at a step.

    Grid: (ceil(S / BLOCK_N), B).
    """
    i_b = tl.program_id(1).to(tl.int64)
    offs_s = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = offs_s < S
    row = (begin + offs_s).to(tl.int64)
    product = tl.load(products_ptr + i_b * S + offs_s, mask=mask, other=0.0)
    squares = tl.load(squares_ptr + offs_s, mask=mask, other=0.0)
    squares += tl.load(anchor_squares_ptr + i_b)
    distance = squares - 2 * product
    error = squares * ((D + 16) * 8.881784197001252e-16)  # 2^-50, see `threshold_steps`
    front, back = tl.load(ranges_ptr + 3 * i_b), tl.load(ranges_ptr + 3 * i_b + 1)
    scale = tl.load(ranges_ptr + 3 * i_b + 2)
    label = tl.load(labels_ptr + row, mask=mask, other=0)
    is_negative = mask & (label != tl.load(anchor_labels_ptr + i_b))
    sorted_ptr += i_b * P
    first_ptr += i_b * SLICES
    least = distance - error
    # Written so that NaN is measured.
    is_near = is_negative & ((least >= back) == 0)
    step = tl.zeros((BLOCK_N,), tl.int32) + P
    if tl.max(is_near.to(tl.int32), axis=0) > 0:
        step = _step(sorted_ptr, first_ptr, front, back, scale, P, least, is_near, SLICES)
        here = tl.load(sorted_ptr + step, mask=is_near & (step < P), other=float("inf"))
        is_unsure = is_near & ((here > distance + error) == 0)
        if tl.max(is_unsure.to(tl.int32), axis=0) > 0:
            total = tl.zeros((BLOCK_N,), tl.float64)
            for d in range(0, D):
                offs = tl.cast(d, tl.int64)
                anchor = tl.load(anchors_ptr + i_b * stride_anchors_b + offs * stride_anchors_d).to(
                    tl.float64
                )
                value = tl.load(
                    embeddings_ptr + row * stride_embeddings_n + offs * stride_embeddings_d,
                    mask=is_unsure,
                    other=0.0,
                ).to(tl.float64)
                difference = value - anchor
                total = total + difference * difference
            exact = _step(sorted_ptr, first_ptr, front, back, scale, P, total, is_unsure, SLICES)
            step = tl.where(is_unsure, exact, step)
    tl.atomic_add(totals_ptr + i_b * (P + 1) + step, 1, mask=is_near & (step < P), sem="relaxed")
    tl.store(steps_ptr + i_b * N + row, step, mask=mask)


def threshold_steps(
    anchors: Tensor, anchor_labels: Tensor, embeddings: Tensor, labels: Tensor, ascending: Tensor
) -> tuple[Tensor, Tensor]:
    """The first threshold that is above the distance of each row.

    A product in float64 is off by at most D 2^-53 |a| |e|, whatever its order, and the squares by
    as much of themselves; the kernel takes (D + 16) 2^-50 (|a|^2 + |e|^2), several times as much.

    Args:
        anchors: [G, D] float32.
        anchor_labels: [G] int64.
        embeddings: [N, D] float32.
        labels: [N] int64, contiguous.
        ascending: [G, P] float64, contiguous: the sorted thresholds, P at least 1.

    Returns:
        (steps [G, N] int32, P for what is no negative or above all; totals [G, P + 1] int32, the
        negatives at each step but the last).
    """
    (G, D), N, P, device = anchors.shape, len(labels), ascending.shape[1], anchors.device
    steps = torch.empty((G, N), dtype=torch.int32, device=device)
    totals = torch.zeros((G, P + 1), dtype=torch.int32, device=device)
    back = ascending[:, -1]
    front = torch.where(ascending > -torch.inf, ascending, torch.inf).amin(1)
    scale = SLICES / (back - front)
    scale = torch.where((scale > 0) & (scale < torch.inf), scale, 0.0)
    places = (
        torch.arange(SLICES, device=device)
        / scale.clamp(min=torch.finfo(scale.dtype).tiny)[:, None]
    )
    edges = front[:, None] + torch.where(scale[:, None] > 0, places, 0.0)
    first = torch.searchsorted(ascending, edges, out_int32=True).clamp(max=P - 1)
    wide = anchors.double()
    anchor_squares = wide.square().sum(1)
    ranges = torch.stack([front, back, scale], 1)
    for begin in range(0, N, SLAB_ROWS):
        slab = embeddings[begin : begin + SLAB_ROWS].double()
        _steps_kernel[(triton.cdiv(len(slab), BLOCK_N), G)](
            steps,
            totals,
            wide @ slab.T,
            anchor_squares,
            slab.square().sum(1),
            ascending,
            first,
            ranges,
            anchors,
            anchor_labels,
            embeddings,
            labels,
            *anchors.stride(),
            *embeddings.stride(),
            N,
            D,
            P,
            begin,
            len(slab),
            SLICES=SLICES,
            BLOCK_N=BLOCK_N,
            num_warps=4,
            enable_fp_fusion=False,  # the specification rounds the product and the sum
        )
    return steps, totals
