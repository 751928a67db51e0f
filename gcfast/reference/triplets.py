"""The specification of the operations on triplets; part of :mod:`gcfast.reference`.

Written for clarity, one anchor after another: on the CPU the C++ twins run instead.

**How T pairs are drawn from the valid ones of an anchor.** Pairs that are uniform over all
positives × negatives and kept where they are valid are uniform over the valid pairs, so a row tries
pairs before it looks at the whole table:

1. Try j is a pair by the generator's words for (seed, row, j): the i-th positive and the k-th
   negative in the order of (label, row). Tries come in rounds of ``TRY_ROUND``. Before each round
   the row goes on only while the round fits into its tries, ``64 · tried < tries · (4 + kept)``,
   fewer than 2 (T + 1) pairs are kept, and at most T of these are different pairs.
2. T + 1 different valid pairs prove that there are more than T, and the row is done. Its count is
   then an estimate, P Q T / (j − 1) where try j found valid pair number T + 1: unbiased (Haldane,
   *Biometrika* 33, 1945), but for rows that use up nearly all of their tries.
3. Any other row is scanned: its valid pairs are counted. Where there are at most T, each is used
   once, in the order of (positive's row, negative's row). Otherwise draw t is the t-th valid try
   where there is one, and else the pair number ``uniform_ranks(...)[t]``.

Which pair is drawn says nothing of when a row stops, so draws are independent and uniform over the
valid pairs whether a row is scanned or not, and draw t is the same for every T below the count.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

PHILOX_ROUNDS = 10
# The generator's last counter word: one stream for each use (others in method.pairs and
# metrics.controls).
STREAM_TRIPLETS, STREAM_TRIES = 0, 4
TRY_ROUND = 256  # tries between two looks at whether a row has enough
# Rows of a table for each try that a row may make: a scan of so many costs about as much.
ROWS_PER_TRY = 16
SKETCHED_ROWS = 2**14  # that are sketched at once


class Triplets(NamedTuple):
    """Pairs drawn for each anchor, as row numbers of the table."""

    positives: Tensor  # [B, T] int64, -1 where not valid
    negatives: Tensor  # [B, T] int64, -1 where not valid
    valid: Tensor  # [B, T] bool
    counts: Tensor  # [B] int64: valid pairs of the anchor
    hardest: Tensor  # [B, 2] int64: farthest positive, nearest negative; -1 where there is none
    exact: Tensor  # [B] bool: the row was scanned; elsewhere its count is estimated, hardest -1


def philox(counter: tuple[Tensor | int, ...], seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 (Salmon et al., SC 2011): four 32-bit words, each in an int64 tensor.

    Args:
        counter: four words of 32 bits, int64 tensors that broadcast, or ints.
        seed: the key, 64 bits.
    """
    mask = 0xFFFFFFFF
    c0, c1, c2, c3 = (torch.as_tensor(c) for c in counter)
    k0, k1 = seed & mask, (seed >> 32) & mask
    for _ in range(PHILOX_ROUNDS):
        # The products wrap round in int64, which leaves both 32-bit halves as they should be.
        product0, product1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            ((product1 >> 32) & mask) ^ c1 ^ k0,
            product1 & mask,
            ((product0 >> 32) & mask) ^ c3 ^ k1,
            product0 & mask,
        )
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return c0, c1, c2, c3


def _scaled(low: Tensor, high: Tensor, counts: Tensor) -> Tensor:
    """``floor(x * count / 2^64)``, x the 64-bit word: uniform in [0, count).

    Its probabilities differ from uniform by less than count / 2^64.
    """
    mask = 0xFFFFFFFF
    count_low, count_high = counts & mask, counts >> 32
    # The upper half of a 64 x 64-bit product, by 32-bit halves; shifts are masked to be unsigned.
    middle = high * count_low + ((low * count_low >> 32) & mask)
    carry = low * count_high + (middle & mask)
    return high * count_high + ((middle >> 32) & mask) + ((carry >> 32) & mask)


def uniform_ranks(
    rows: Tensor, draws: int, counts: Tensor, seed: int, stream: int = STREAM_TRIPLETS
) -> Tensor:
    """Integers uniform in [0, counts), a function of (seed, row, draw, stream) alone.

    Args:
        rows: [B] int64.
        draws: T.
        counts: [B] int64, at least 1.
        seed: 0 to 2^63 - 1.
        stream: which use of the generator.

    Returns:
        [B, T] int64.
    """
    mask = 0xFFFFFFFF
    draw = torch.arange(draws, device=rows.device)[None]
    row = rows[:, None]
    low, high, _, _ = philox((draw, row & mask, (row >> 32) & mask, stream), seed)
    return _scaled(low, high, counts[:, None])


def label_order(labels: Tensor) -> Tensor:
    """Row numbers in the order of (label, row), [N] int64."""
    return labels.argsort(stable=True)


def label_sketch(embeddings: Tensor, by_label: Tensor) -> Tensor:
    """Return the rows in eight bits and in the order of labels, which makes tries faster in C++.

    A row is its codes, D signed bytes; the float32 that these are multiples of; and a float32 that
    the distance from the row to the multiples does not exceed. Draws do not depend on it.

    Args:
        embeddings: [N, D] float32.
        by_label: [N] int64.

    Returns:
        [N, D + 8] uint8.
    """
    N, D = embeddings.shape
    sketch = torch.empty((N, D + 8), dtype=torch.uint8)
    for start in range(0, N, SKETCHED_ROWS):
        rows = embeddings[by_label[start : start + SKETCHED_ROWS]]
        largest = rows.abs().amax(1, keepdim=True) if D else rows.new_zeros((len(rows), 1))
        scale = torch.where(largest > 0, largest / 127, 1.0)
        codes = (rows / scale).round()
        off = (rows.double() - scale.double() * codes.double()).norm(dim=1, keepdim=True)
        # What rounds in float32: a multiple, and this sum itself.
        off = off * (1 + 1e-6) + 2.0**-22 * rows.double().norm(dim=1, keepdim=True) + 1e-30
        part = sketch[start : start + SKETCHED_ROWS]
        part[:, :D] = codes.nan_to_num().to(torch.int8).view(torch.uint8)
        part[:, D:] = torch.cat([scale, off.float()], 1).contiguous().view(torch.uint8)
    return sketch


def default_tries(rows: int) -> int:
    """How many pairs an anchor may try before it is scanned, for a table of so many rows."""
    return rows // ROWS_PER_TRY


def _distances(anchor: Tensor, embeddings: Tensor) -> Tensor:
    """Squared distances [N] in float64, summed over D in order and without fused multiply-add.

    The order is part of the specification: it decides which pairs at the hinge are valid, so every
    backend keeps to it, bit for bit.
    """
    total = torch.zeros(len(embeddings), dtype=torch.float64, device=embeddings.device)
    for d in range(embeddings.shape[1]):
        difference = embeddings[:, d].double() - anchor[d].double()
        total = total + difference * difference
    return total


class _Anchor(NamedTuple):
    embedding: Tensor  # [D]
    label: Tensor
    row: Tensor


class _Scan(NamedTuple):
    positives: Tensor  # row numbers [P]
    negatives: Tensor  # row numbers [Q]
    valid: Tensor  # [P, Q] bool
    hardest: tuple[int, int]


def _scan(anchor: _Anchor, embeddings: Tensor, labels: Tensor, margin: float) -> _Scan:
    same = labels == anchor.label
    ids = torch.arange(len(labels), device=labels.device)
    positives, negatives = ids[same & (ids != anchor.row)], ids[~same]
    distances = _distances(anchor.embedding, embeddings)
    valid = distances[positives][:, None] + margin > distances[negatives][None]
    hardest = (
        int(positives[distances[positives].argmax()]) if len(positives) else -1,
        int(negatives[distances[negatives].argmin()]) if len(negatives) else -1,
    )
    return _Scan(positives, negatives, valid, hardest)


class _Tried(NamedTuple):
    kept: Tensor  # [k, 2]: positives and negatives of the valid tries, in order
    estimate: int | None  # of the valid pairs, where the tries are enough


def _tried(
    anchor: _Anchor,
    embeddings: Tensor,
    labels: Tensor,
    by_label: Tensor,
    *,
    triplets: int,
    margin: float,
    seed: int,
    tries: int,
) -> _Tried:
    same = labels[by_label] == anchor.label
    positives, negatives = by_label[same & (by_label != anchor.row)], by_label[~same]
    kept = by_label.new_empty((0, 2))
    found = by_label.new_empty((0,))  # the try that found each, from 1 on
    P, Q = torch.tensor(len(positives)), torch.tensor(len(negatives))
    tried, most, different = 0, 2 * (triplets + 1), 0
    while (
        P * Q > 0
        and tried + TRY_ROUND <= tries
        and 64 * tried < tries * (4 + len(kept))
        and len(kept) < most
        and different <= triplets
    ):
        number = torch.arange(tried, tried + TRY_ROUND, device=labels.device)
        row = anchor.row
        words = philox((number, row & 0xFFFFFFFF, (row >> 32) & 0xFFFFFFFF, STREAM_TRIES), seed)
        p = positives[_scaled(words[0], words[1], P)]
        n = negatives[_scaled(words[2], words[3], Q)]
        near, far = (_distances(anchor.embedding, embeddings[rows]) for rows in (n, p))
        valid = far + margin > near
        kept = torch.cat([kept, torch.stack([p, n], 1)[valid]])
        found = torch.cat([found, number[valid] + 1])
        tried += TRY_ROUND
        different = len(set(map(tuple, kept[:most].tolist())))
    if different <= triplets:
        return _Tried(kept, None)
    share = (P.double() * Q) / (found[triplets].double() - 1)
    return _Tried(kept, int((share * triplets).round()))


def sample_triplets(
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
) -> Triplets:
    """T draws for each anchor, as the head of this file says.

    With ``first``, the pairs ``first … first + T - 1`` of the valid ones are listed instead.
    """
    del sketch  # which makes other backends faster
    B, device = len(anchors), anchors.device
    if by_label is None:
        by_label = label_order(labels)
    if tries is None:
        tries = default_tries(len(labels))
    positives = torch.full((B, triplets), -1, dtype=torch.int64, device=device)
    negatives = positives.clone()
    counts = torch.zeros(B, dtype=torch.int64, device=device)
    hardest = torch.full((B, 2), -1, dtype=torch.int64, device=device)
    exact = torch.ones(B, dtype=torch.bool, device=device)
    for b in range(B):
        anchor = _Anchor(anchors[b], anchor_labels[b], anchor_rows[b])
        kept = by_label.new_empty((0, 2))
        if first is None:
            kept, estimate = _tried(
                anchor,
                embeddings,
                labels,
                by_label,
                triplets=triplets,
                margin=margin,
                seed=seed,
                tries=tries,
            )
            if estimate is not None:
                counts[b], exact[b] = estimate, False
                positives[b], negatives[b] = kept[:triplets].T
                continue
        scan = _scan(anchor, embeddings, labels, margin)
        pairs = scan.valid.nonzero()  # [V, 2], ordered
        counts[b], hardest[b] = len(pairs), torch.tensor(scan.hardest)
        if first is not None:
            pairs = pairs[first : first + triplets]
        elif len(pairs) > triplets:
            ranks = uniform_ranks(anchor_rows[b : b + 1], triplets, counts[b : b + 1], seed)
            pairs = pairs[ranks[0]]
        chosen = torch.stack([scan.positives[pairs[:, 0]], scan.negatives[pairs[:, 1]]], 1)
        if counts[b] > triplets:
            chosen[: len(kept)] = kept[:triplets]
        positives[b, : len(chosen)], negatives[b, : len(chosen)] = chosen.T
    return Triplets(positives, negatives, positives >= 0, counts, hardest, exact)


def mean_cotangents(
    anchors: Tensor,
    anchor_labels: Tensor,
    anchor_rows: Tensor,
    embeddings: Tensor,
    labels: Tensor,
    by_label: Tensor | None = None,
    *,
    margin: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The mean over *all* valid pairs of dL/df_a = 2 (f_n - f_p), without drawing any.

    ``2 / V (sum_n m_n f_n - sum_p n_p f_p)``, where n_p counts the negatives that p is valid with
    and m_n the positives that n is valid with. Returns (cotangents [B, D] float32, counts [B],
    hardest [B, 2]).
    """
    del by_label  # which saves other backends a sort
    cotangents = torch.zeros(anchors.shape, dtype=torch.float64, device=anchors.device)
    counts = torch.zeros(len(anchors), dtype=torch.int64, device=anchors.device)
    hardest = torch.full((len(anchors), 2), -1, dtype=torch.int64, device=anchors.device)
    table = embeddings.double()
    for b in range(len(anchors)):
        anchor = _Anchor(anchors[b], anchor_labels[b], anchor_rows[b])
        scan = _scan(anchor, embeddings, labels, margin)
        counts[b], hardest[b] = scan.valid.sum(), torch.tensor(scan.hardest)
        if counts[b]:
            valid = scan.valid.double()
            pull = valid.sum(0) @ table[scan.negatives] - valid.sum(1) @ table[scan.positives]
            cotangents[b] = 2 * pull / counts[b]
    return cotangents.float(), counts, hardest
