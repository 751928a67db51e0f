"""Draws from the valid pairs of each anchor, or a list of them.

Most anchors find their draws by trying pairs (:mod:`gcfast.kernels.triplets.tries`). For the others
the pairs of each positive are counted (:mod:`gcfast.kernels.triplets.scan`); a program then finds
for the number of a pair its positive, by a binary search in the sums of these counts, and its
negative, by going through those that are near.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gcfast.kernels.launch import TriesConfig
from gcfast.kernels.triplets.scan import Group, Scan
from gcfast.kernels.triplets.tries import label_ranges, try_pairs
from gcfast.reference import STREAM_TRIPLETS, Triplets, default_tries, label_order

MAX_FIRST = 2**62  # above every count, and far enough below 2^63 to add T
STREAM = tl.constexpr(STREAM_TRIPLETS)
BLOCK_T, BLOCK_C = 16, 512


@triton.jit(do_not_specialize=["P", "C", "T", "steps_of_search", "seed", "first"])
def _pick_kernel(
    positives_ptr,
    negatives_ptr,
    group_positives_ptr,
    step_of_ptr,
    ends_ptr,
    group_negatives_ptr,
    steps_ptr,
    anchor_rows_ptr,
    P,
    C,
    T,
    steps_of_search,
    seed,
    first,
    ARE_LISTED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """positives, negatives [b, t] of the pair number rank(b, t), -1 where there is no such pair.

    ends[b, p] is the number of pairs of the positives up to p. The rank is first + t where first
    >= 0, t where there are at most T pairs, otherwise floor(x pairs / 2^64) with x the 64 bits that
    Philox gives (t, row, stream) under the seed. Grid: (ceil(T / BLOCK_T), G).
    """
    i_b = tl.program_id(1).to(tl.int64)
    offs_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    anchor_row = tl.load(anchor_rows_ptr + i_b)
    ends_ptr += i_b * P
    steps_ptr += i_b * C
    pairs = tl.load(ends_ptr + P - 1)

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

    # The positive: the first whose pairs reach beyond the rank.
    place, above = tl.zeros((BLOCK_T,), tl.int32), tl.zeros((BLOCK_T,), tl.int32) + P
    for _ in range(0, steps_of_search):
        unsure = is_pair & (place < above)
        middle = place + (above - place) // 2
        passed = unsure & (tl.load(ends_ptr + middle, mask=unsure, other=0) <= rank)
        place = tl.where(passed, middle + 1, place)
        above = tl.where(unsure & (passed == 0), middle, above)
    place = tl.where(is_pair, place, 0)
    before = tl.load(ends_ptr + place - 1, mask=is_pair & (place > 0), other=0)
    left = (rank - before).to(tl.int32)  # this many of its negatives come first; below N
    positive = tl.load(group_positives_ptr + i_b * P + place, mask=is_pair, other=-1)
    step = tl.load(step_of_ptr + i_b * P + place, mask=is_pair, other=-1).to(tl.int32)

    # The block of rows that its negative is in, and then its place there.
    block = tl.zeros((BLOCK_T,), tl.int32)
    is_open = is_pair
    start = 0
    while (start < C) & (tl.max(is_open.to(tl.int32), axis=0) > 0):
        offs_c = start + tl.arange(0, BLOCK_C)
        here = tl.load(steps_ptr + offs_c, mask=offs_c < C, other=P)
        number = tl.sum((here[None, :] <= step[:, None]).to(tl.int32), axis=1)
        is_here = is_open & (number > left)
        block = tl.where(is_here, start, block)
        is_open = is_open & (is_here == 0)
        left -= tl.where(is_open, number, 0)
        start += BLOCK_C
    offs = block[:, None] + tl.arange(0, BLOCK_C)[None, :]
    here = tl.load(steps_ptr + offs, mask=is_pair[:, None] & (offs < C), other=P)
    is_valid = here <= step[:, None]
    number = tl.cumsum(is_valid.to(tl.int32), axis=1)  # [BLOCK_T, BLOCK_C]
    is_it = is_valid & (number == left[:, None] + 1)
    negative = tl.max(tl.where(is_it, offs, -1), axis=1)
    if ARE_LISTED:
        negative = tl.load(group_negatives_ptr + i_b * C + negative, mask=is_pair, other=-1)

    offs_out = i_b * T + offs_t
    tl.store(positives_ptr + offs_out, tl.where(is_pair, positive, -1), mask=offs_t < T)
    negative = tl.where(is_pair, negative, -1).to(tl.int64)
    tl.store(negatives_ptr + offs_out, negative, mask=offs_t < T)


def picked(
    group: Group, anchor_rows: Tensor, triplets: int, seed: int, first: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(positives [G, T], negatives [G, T], counts [G]) of a group."""
    G, P = group.positives.shape
    shape, device = (G, triplets), group.positives.device
    positives = torch.full(shape, -1, dtype=torch.int64, device=device)
    negatives = torch.full_like(positives, -1)
    if P == 0:
        return positives, negatives, positives.new_zeros(G)
    ends = group.counts().cumsum(1)
    listed = group.negatives is not None
    _pick_kernel[(triton.cdiv(triplets, BLOCK_T), G)](
        positives,
        negatives,
        group.positives,
        group.step_of,
        ends,
        group.negatives if listed else group.steps,
        group.steps,
        anchor_rows[group.which],
        P,
        group.steps.shape[1],
        triplets,
        P.bit_length(),
        seed,
        -1 if first is None else min(first, MAX_FIRST),
        ARE_LISTED=listed,
        BLOCK_T=BLOCK_T,
        BLOCK_C=BLOCK_C,
        num_warps=4,
    )
    return positives, negatives, ends[:, -1]


def launch_sample_triplets(
    anchors: Tensor,
    anchor_labels: Tensor,
    anchor_rows: Tensor,
    embeddings: Tensor,
    labels: Tensor,
    by_label: Tensor | None = None,
    sketch: Tensor | None = None,
    *,
    triplets: int,
    margin: float,
    seed: int = 0,
    first: int | None = None,
    tries: int | None = None,
    config: TriesConfig | None = None,
) -> Triplets:
    """Draw or list valid pairs, as :func:`gcfast.ops.sample_triplets`, which checks the input."""
    del sketch  # rows come from memory fast enough
    B, N, device = len(anchors), len(labels), anchors.device
    positives = torch.full((B, triplets), -1, dtype=torch.int64, device=device)
    negatives = torch.full_like(positives, -1)
    counts = torch.zeros(B, dtype=torch.int64, device=device)
    hardest = torch.full((B, 2), -1, dtype=torch.int64, device=device)
    exact = torch.ones(B, dtype=torch.bool, device=device)
    if B == 0 or N == 0:
        return Triplets(positives, negatives, positives >= 0, counts, hardest, exact)
    tries = default_tries(N) if tries is None or first is not None else tries
    labels, anchor_labels, anchor_rows, by_label = (
        ids.contiguous()
        for ids in (
            labels,
            anchor_labels,
            anchor_rows,
            label_order(labels) if by_label is None else by_label,
        )
    )
    with torch.cuda.device_of(anchors):
        ranges = label_ranges(anchor_labels, anchor_rows, labels, by_label)
        tried = None
        if first is None:
            tried = try_pairs(
                anchors,
                anchor_rows,
                ranges,
                embeddings,
                by_label,
                triplets=triplets,
                margin=torch.full((1,), margin, dtype=torch.float64, device=device),
                seed=seed,
                tries=tries,
                config=config,
            )
            exact = tried.different <= triplets
            positives = tried.keys[:, :triplets] // N
            negatives = tried.keys[:, :triplets] % N
            start, end, own = ranges.T
            every = (end - start - (own >= 0).long()).double() * (N - end + start)
            share = every / (tried.found.double() - 1)
            counts = torch.where(exact, 0, (share * triplets).round().nan_to_num().long())
        scan = Scan(anchors, anchor_labels, embeddings, labels, by_label, ranges, margin)
        for group in scan.groups(exact.nonzero().flatten()):
            some = picked(group, anchor_rows, triplets, seed, first)
            which = group.which
            counts[which], hardest[which] = some[2], group.hardest
            replaced = torch.ones_like(some[0], dtype=torch.bool)
            if tried is not None:
                draw = torch.arange(triplets, device=device)
                replaced = (draw >= tried.kept[which, None]) | (some[2] <= triplets)[:, None]
            positives[which] = torch.where(replaced, some[0], positives[which])
            negatives[which] = torch.where(replaced, some[1], negatives[which])
    return Triplets(positives, negatives, positives >= 0, counts, hardest, exact)
