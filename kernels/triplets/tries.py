"""Pairs tried for each anchor until enough are valid, without a look at the rest of the table.

:mod:`gcfast.reference.triplets` has the rules. A program follows one anchor. It measures the two
rows of a try in float32, whose error is bounded, and again in float64, in the order of the
specification, only where that error could decide: at the hinge.

Bytes: 8 D a try, from anywhere in the table. Operations: 6 D float32 a try.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gcfast.kernels.launch import TriesConfig, long_tries_config, tries_config
from gcfast.reference import STREAM_TRIES, TRY_ROUND

FIRST_TRIES = 16 * TRY_ROUND  # after which few anchors go on
SEARCH_WIDTH = 256  # places that are looked at together
FINITE = tl.constexpr(3.0e38)  # a sum in float32 beyond it may have overflowed
TINY = tl.constexpr(1e-30)  # more than what float32 can lose to underflow
STREAM = tl.constexpr(STREAM_TRIES)


@triton.jit
def _place(values_ptr, by_label_ptr, low, high, target, IS_ROW: tl.constexpr, WIDE: tl.constexpr):
    """The first place in [low, high) whose label (row, if IS_ROW) is not below the target."""
    while high > low:
        step = (high - low + WIDE - 1) // WIDE
        last = low + (tl.arange(0, WIDE) + 1) * step - 1
        mask = last < high
        value = tl.load(by_label_ptr + last, mask=mask, other=0)
        if not IS_ROW:
            value = tl.load(values_ptr + value, mask=mask, other=0)
        low += step * tl.sum((mask & (value < target)).to(tl.int64), axis=0)
        high = tl.minimum(low + step - 1, high)
    return low


@triton.jit(do_not_specialize=["N"])
def _ranges_kernel(
    ranges_ptr,
    anchor_labels_ptr,
    anchor_rows_ptr,
    labels_ptr,
    by_label_ptr,
    N,
    WIDE: tl.constexpr,
):
    """ranges[b]: where the anchor's label starts and ends in the order, and its own row, or -1.

    Grid: (B,).
    """
    i_b = tl.program_id(0).to(tl.int64)
    label = tl.load(anchor_labels_ptr + i_b)
    row = tl.load(anchor_rows_ptr + i_b)
    zero = label * 0
    start = _place(labels_ptr, by_label_ptr, zero, zero + N, label, False, WIDE)
    end = start
    if label == 0x7FFFFFFFFFFFFFFF:
        end += N - start
    else:
        end = _place(labels_ptr, by_label_ptr, start, zero + N, label + 1, False, WIDE)
    own = _place(labels_ptr, by_label_ptr, start, end, row, True, WIDE)
    is_there = (own < end) & (tl.load(by_label_ptr + own, mask=own < end, other=-1) == row)
    tl.store(ranges_ptr + 3 * i_b, start)
    tl.store(ranges_ptr + 3 * i_b + 1, end)
    tl.store(ranges_ptr + 3 * i_b + 2, tl.where(is_there, own, -1))


@triton.jit
def _different(keys_ptr, count, BLOCK_K: tl.constexpr):
    """How many different numbers are among the first ``count``."""
    different = count * 0
    for start in range(0, count, BLOCK_K):
        offs = start + tl.arange(0, BLOCK_K)
        key = tl.load(keys_ptr + offs, mask=offs < count, other=-1)
        seen = tl.zeros((BLOCK_K,), tl.int32)
        for before in range(0, start + BLOCK_K, BLOCK_K):
            offs_before = before + tl.arange(0, BLOCK_K)
            other = tl.load(keys_ptr + offs_before, mask=offs_before < count, other=-1)
            same = (key[:, None] == other[None, :]) & (offs_before[None, :] < offs[:, None])
            seen += tl.sum(same.to(tl.int32), axis=1)
        different += tl.sum(((offs < count) & (seen == 0)).to(tl.int32), axis=0)
    return different


@triton.jit
def _pairs(
    by_label_ptr, start, end, own, P, Q, anchor_row, first, seed, is_wanted, BLOCK_J: tl.constexpr
):
    """The rows of BLOCK_J tries from ``first`` on: positives and negatives."""
    zero = tl.zeros((BLOCK_J,), tl.int64)
    number = first + tl.arange(0, BLOCK_J)
    w0, w1, w2, w3 = tl.philox(
        seed,
        number.to(tl.uint32),
        ((zero + anchor_row) & 0xFFFFFFFF).to(tl.uint32),
        (((zero + anchor_row) >> 32) & 0xFFFFFFFF).to(tl.uint32),
        (zero + STREAM).to(tl.uint32),
    )
    to_p = (w1.to(tl.uint64) << 32) | w0.to(tl.uint64)
    to_n = (w3.to(tl.uint64) << 32) | w2.to(tl.uint64)
    at_p = start + tl.umulhi(to_p, (zero + P).to(tl.uint64)).to(tl.int64)
    at_n = tl.umulhi(to_n, (zero + Q).to(tl.uint64)).to(tl.int64)
    at_p += ((own >= 0) & (at_p >= own)).to(tl.int64)
    at_n += tl.where(at_n >= start, end - start, 0)
    mask = zero < tl.where(is_wanted, 1, 0)
    return tl.load(by_label_ptr + at_p, mask=mask, other=0), tl.load(
        by_label_ptr + at_n, mask=mask, other=0
    )


@triton.jit
def _goes_on(tried, tries, until, kept, different, T, ROUND: tl.constexpr):
    is_within = (tried + ROUND <= tries) & (tried < until)
    is_hopeful = 64 * tried.to(tl.int64) < tries * (4 + kept.to(tl.int64))
    return is_within & is_hopeful & (kept < 2 * (T + 1)) & (different <= T)


@triton.jit(do_not_specialize=["N", "T", "tries", "begin", "until", "seed"])
def _tries_kernel(
    keys_ptr,
    kept_ptr,
    found_ptr,
    different_ptr,
    ranges_ptr,
    anchors_ptr,
    anchor_rows_ptr,
    embeddings_ptr,
    by_label_ptr,
    margin_ptr,
    stride_anchors_b,
    stride_anchors_d,
    stride_embeddings_n,
    stride_embeddings_d,
    N,
    D,
    T,
    tries,
    begin,
    until,
    seed,
    ROUND: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """keys[b]: p N + n of the first 2 (T + 1) valid tries; kept[b]: how many were valid.

    found[b]: the number, from 1 on, of the try that found valid pair T + 1, or 0. different[b]: how
    many of the keys are, where more than T were kept. The tries from ``begin`` on are made, with
    what is there from those before, up to ``until``.  Grid: (B,).
    """
    i_b = tl.program_id(0).to(tl.int64)
    start = tl.load(ranges_ptr + 3 * i_b)
    end = tl.load(ranges_ptr + 3 * i_b + 1)
    own = tl.load(ranges_ptr + 3 * i_b + 2)
    P, Q = end - start - (own >= 0).to(tl.int64), start + N - end
    anchor_row = tl.load(anchor_rows_ptr + i_b)
    margin = tl.load(margin_ptr)
    most = 2 * (T + 1)
    keys_ptr += i_b * most
    anchors_ptr += i_b * stride_anchors_b
    share = (D + 8) * 1.1920928955078125e-07  # twice the bound on the error of a sum of squares
    kept, different, tried, found = T * 0, T * 0, begin, T * 0
    if begin > 0:
        kept, found = tl.load(kept_ptr + i_b), tl.load(found_ptr + i_b)
        different = tl.load(different_ptr + i_b)
    goes_on = (P > 0) & (Q > 0) & _goes_on(tried, tries, until, kept, different, T, ROUND)
    p, n = _pairs(by_label_ptr, start, end, own, P, Q, anchor_row, tried, seed, goes_on, BLOCK_J)
    while goes_on:
        for first in range(0, ROUND, BLOCK_J):
            number = tried + first + tl.arange(0, BLOCK_J)
            row_p = embeddings_ptr + p * stride_embeddings_n
            row_n = embeddings_ptr + n * stride_embeddings_n
            # The next pairs are looked up while these rows are on their way.
            next_p, next_n = _pairs(
                by_label_ptr, start, end, own, P, Q, anchor_row, tried + first + BLOCK_J, seed,
                True, BLOCK_J,
            )  # fmt: skip
            far, near = tl.zeros((BLOCK_J,), tl.float32), tl.zeros((BLOCK_J,), tl.float32)
            for start_d in range(0, D, BLOCK_D):
                offs_d = (start_d + tl.arange(0, BLOCK_D)).to(tl.int64)
                mask_d = offs_d < D
                anchor = tl.load(anchors_ptr + offs_d * stride_anchors_d, mask=mask_d, other=0.0)
                offs = offs_d[None, :] * stride_embeddings_d
                to_far = tl.load(row_p[:, None] + offs, mask=mask_d[None, :], other=0.0)
                to_near = tl.load(row_n[:, None] + offs, mask=mask_d[None, :], other=0.0)
                to_far -= anchor[None, :]
                to_near -= anchor[None, :]
                far += tl.sum(to_far * to_far, axis=1)
                near += tl.sum(to_near * to_near, axis=1)
            gap = far.to(tl.float64) - near.to(tl.float64) + margin
            slack = (far.to(tl.float64) + near.to(tl.float64)) * share + TINY
            is_valid = gap > slack
            # So written, NaN is unsure too.
            is_sure = (far < FINITE) & (near < FINITE) & (is_valid | (gap < -slack))
            if tl.min(is_sure.to(tl.int32), axis=0) == 0:
                exact_far = tl.zeros((BLOCK_J,), tl.float64)
                exact_near = tl.zeros((BLOCK_J,), tl.float64)
                for d in range(0, D):
                    anchor = tl.load(anchors_ptr + d * stride_anchors_d).to(tl.float64)
                    offs = tl.cast(d, tl.int64) * stride_embeddings_d
                    to_far = tl.load(row_p + offs, mask=is_sure == 0, other=0.0).to(tl.float64)
                    to_near = tl.load(row_n + offs, mask=is_sure == 0, other=0.0).to(tl.float64)
                    to_far -= anchor
                    to_near -= anchor
                    exact_far = exact_far + to_far * to_far
                    exact_near = exact_near + to_near * to_near
                is_valid = tl.where(is_sure, is_valid, exact_far + margin > exact_near)
            place = kept + tl.cumsum(is_valid.to(tl.int32), axis=0)  # from 1 on
            tl.store(keys_ptr + place - 1, p * N + n, mask=is_valid & (place <= most))
            found += tl.max(tl.where(is_valid & (place == T + 1), number + 1, 0), axis=0)
            kept += tl.sum(is_valid.to(tl.int32), axis=0)
            p, n = next_p, next_n
        tried += ROUND
        if kept > T:
            tl.debug_barrier()  # the keys are read by other threads than wrote them
            different = _different(keys_ptr, tl.minimum(kept, most), BLOCK_K)
        goes_on = _goes_on(tried, tries, until, kept, different, T, ROUND)
    tl.store(kept_ptr + i_b, kept)
    tl.store(found_ptr + i_b, found)
    tl.store(different_ptr + i_b, different)


class Tried(NamedTuple):
    """What the tries of each anchor found."""

    keys: Tensor  # [B, 2 (T + 1)] int64: p N + n of the valid ones, as many as there are
    kept: Tensor  # [B] int32: how many were valid
    found: Tensor  # [B] int32: the try of valid pair T + 1, from 1 on; 0 where there is none
    different: Tensor  # [B] int32: how many keys are, where more than T were kept


def label_ranges(
    anchor_labels: Tensor, anchor_rows: Tensor, labels: Tensor, by_label: Tensor
) -> Tensor:
    """[B, 3] int64: the anchor's label's start and end in the order, its own place there or -1."""
    ranges = torch.empty((len(anchor_labels), 3), dtype=torch.int64, device=labels.device)
    _ranges_kernel[(len(anchor_labels),)](
        ranges,
        anchor_labels,
        anchor_rows,
        labels,
        by_label,
        len(labels),
        WIDE=SEARCH_WIDTH,
        num_warps=4,
    )
    return ranges


def try_pairs(
    anchors: Tensor,
    anchor_rows: Tensor,
    ranges: Tensor,
    embeddings: Tensor,
    by_label: Tensor,
    *,
    triplets: int,
    margin: Tensor,
    seed: int,
    tries: int,
    config: TriesConfig | None = None,
) -> Tried:
    """Try pairs for each anchor; ``margin`` is [1] float64 on the device."""
    B, (N, D), device = len(anchors), embeddings.shape, anchors.device
    tried = Tried(
        torch.empty((B, 2 * (triplets + 1)), dtype=torch.int64, device=device),
        *(torch.empty(B, dtype=torch.int32, device=device) for _ in range(3)),
    )
    begin = 0
    # Few anchors need many tries: those have more tries side by side.
    launches = ((FIRST_TRIES, config or tries_config(D)), (tries, long_tries_config(D)))
    for until, config in launches:
        if begin >= tries and begin > 0:
            break
        _tries_kernel[(B,)](
            *tried,
            ranges,
            anchors,
            anchor_rows,
            embeddings,
            by_label,
            margin,
            *anchors.stride(),
            *embeddings.stride(),
            N,
            D,
            triplets,
            tries,
            begin,
            until,
            seed,
            ROUND=TRY_ROUND,
            BLOCK_J=config.block_j,
            BLOCK_D=config.block_d,
            BLOCK_K=config.block_k,
            num_warps=config.num_warps,
            enable_fp_fusion=False,  # the specification rounds the product and the sum
        )
        begin = until
    return tried
