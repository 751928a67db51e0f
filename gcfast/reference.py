"""The specification of every operation in plain PyTorch, and the CPU path of all but one.

Each function has the name and the signature of its twin in :mod:`gcfast.ops`, where the arguments
are checked and documented; here they are trusted. Whatever another backend computes is right when
it agrees with this file and wrong when it does not. ``sample_triplets`` and ``mean_cotangents`` are
written for clarity, one anchor after another: on the CPU their C++ twins run instead.

Sources: the paper is Chen et al., *Adapting Grad-CAM for Embedding Networks*, WACV 2020; Grad-CAM++
is Chattopadhay et al., arXiv:1710.11063.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

KNN_TILE_BYTES = 64 * 2**20  # of distances held at once by `knn`
KNN_SPARE = 8  # neighbours kept beyond K until their distances are known exactly
PHILOX_ROUNDS = 10
STREAM_TRIPLETS = 0  # the generator's last counter word: one stream for each use


class Triplets(NamedTuple):
    """Pairs drawn for each anchor, as row numbers of the table."""

    positives: Tensor  # [B, T] int64, -1 where not valid
    negatives: Tensor  # [B, T] int64, -1 where not valid
    valid: Tensor  # [B, T] bool
    counts: Tensor  # [B] int64: valid pairs of the anchor
    hardest: Tensor  # [B, 2] int64: farthest positive, nearest negative; -1 where there is none


def accumulator(*tensors: Tensor) -> torch.dtype:
    """float32, or float64 where an input already is."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _valid_mean(values: Tensor, valid: Tensor) -> Tensor:
    """Mean over T of [B, T, X] where ``valid`` [B, T]; zero where an anchor has none."""
    kept = torch.where(valid[..., None], values, 0.0)
    return kept.sum(1) / valid.sum(1).clamp(min=1)[:, None]


def grad_weights(
    gradients: Tensor,
    valid: Tensor | None = None,
    *,
    activations: Tensor | None = None,
    method: str = "gradcam",
) -> Tensor:
    r"""Channel weights from gradients, averaged over the valid triplets.

    Grad-CAM (paper Eq. 1 and 5): ``w_k = mean_t mean_ij g[t,k,i,j]``.

    Grad-CAM++ (arXiv:1710.11063, Eq. 19, with Y the objective itself and so without the factor
    exp(Y)): ``alpha = g^2 / (2 g^2 + S_k g^3) = 1 / (2 + S_k g)`` and
    ``w_k = mean_t sum_ij relu(g) / (2 + S_k g)`` with ``S_k = max(0, sum_ij A[k,i,j])``. A term
    with ``g <= 0`` is zero, and S is clamped because activations that can be negative would
    otherwise bring the denominator to zero.
    """
    dtype = accumulator(gradients)
    gradients = gradients.to(dtype)  # [B, T, C, H, W]
    if valid is None:
        valid = gradients.new_ones(gradients.shape[:2], dtype=torch.bool)
    if method == "gradcam":
        per_triplet = gradients.mean((3, 4))
    else:
        assert activations is not None
        sums = activations.to(dtype).sum((2, 3)).clamp(min=0)[:, None, :, None, None]
        positive = gradients.clamp(min=0)
        per_triplet = (positive / (2 + positive * sums)).sum((3, 4))
    return _valid_mean(per_triplet, valid)


def head_grad_weights(
    cotangents: Tensor,
    weight: Tensor,
    valid: Tensor | None = None,
    *,
    pixels: int,
    embeddings: Tensor | None = None,
    norms: Tensor | None = None,
    activation_sums: Tensor | None = None,
    method: str = "gradcam",
    precision: str = "ieee",
) -> Tensor:
    r"""Channel weights of a network whose head is affine in the spatially averaged activations.

    With ``u = W mean(A) + b``, ``f = u / |u|`` and a cotangent c on f, back-propagation gives
    ``c' = (c - f <f, c>) / |u|`` and ``dL/dA[k,i,j] = g_k = (W^T c')_k / P``, the same at every
    pixel. Grad-CAM is its mean over t, Grad-CAM++ ``mean_t P relu(g_k) / (2 + S_k g_k)``.
    ``precision`` allows rounding and obliges to none: nothing is rounded here.
    """
    del precision
    dtype = accumulator(cotangents)
    cotangents = cotangents.to(dtype)  # [B, T, D]
    if valid is None:
        valid = cotangents.new_ones(cotangents.shape[:2], dtype=torch.bool)
    if norms is not None:
        assert embeddings is not None
        unit = embeddings.to(dtype)[:, None]  # [B, 1, D]
        along = (cotangents * unit).sum(-1, keepdim=True)
        cotangents = (cotangents - along * unit) / norms.to(dtype)[:, None, None]
    weight = weight.to(dtype)
    if method == "gradcam":
        return _valid_mean(cotangents, valid) @ weight / pixels
    assert activation_sums is not None
    positive = (cotangents @ weight / pixels).clamp(min=0)  # [B, T, C]
    sums = activation_sums.to(dtype).clamp(min=0)[:, None]
    return _valid_mean(pixels * positive / (2 + positive * sums), valid)


def top_m(weights: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """The m largest of each row, largest first, ties to the lower channel: (channels, weights)."""
    # Sorting on a GPU tells NaN of one sign from NaN of the other, which comes last.
    weights = weights.where(~weights.isnan(), torch.nan)
    ordered, channels = weights.sort(dim=1, descending=True, stable=True)
    return channels[:, :m].contiguous(), ordered[:, :m].contiguous()


def sparse_cam(
    activations: Tensor,
    neighbors: Tensor,
    channels: Tensor,
    weights: Tensor,
    *,
    size: tuple[int, int],
    mixing: Tensor | None = None,
    offsets: Tensor | None = None,
    center: float = 0.0,
    relu: bool = True,
    normalize: str | None = "max",
    grid: tuple[int, int] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    r"""Heat maps from neighbours' sparse channel weights (paper Eq. 6 and section 3.3).

    ``map[b] = relu(sum_k x_bk (sum_m w[n_bk,m] A[b,ch[n_bk,m]] - center o[n_bk]))``, divided by its
    maximum (or min-max scaled) at low resolution and then resized bilinearly, half-pixel centres.
    """
    if activations.ndim == 3:  # tokens [B, P, C]
        assert grid is not None
        activations = activations.transpose(1, 2).reshape(len(activations), -1, *grid)
    B, _, H, W = activations.shape
    if 0 in (B, len(channels), neighbors.shape[1], channels.shape[1]):
        return activations.new_zeros((B, *size), dtype=dtype)
    summed = accumulator(activations, weights)

    found = neighbors >= 0  # [B, K]
    if mixing is None:
        mixing = found / found.sum(1, keepdim=True).clamp(min=1)
    mixing = torch.where(found, mixing.to(summed), 0.0)
    rows = neighbors.clamp(min=0)
    kept = channels[rows].flatten(1)  # [B, K*M]
    kept_weights = (weights[rows].to(summed) * mixing[..., None]).flatten(1)
    # The kept channels are gathered, not the others multiplied by zero: 0 * inf would be NaN.
    picked = activations.gather(1, kept[..., None, None].expand(-1, -1, H, W)).to(summed)
    cam = torch.bmm(kept_weights[:, None], picked.flatten(2)).view(B, H, W)
    if offsets is not None and center != 0:
        cam = cam - center * (offsets[rows].to(summed) * mixing).sum(1)[:, None, None]
    if relu:
        cam = cam.clamp(min=0)
    if normalize == "minmax":
        cam = cam - cam.amin((1, 2), keepdim=True)
    if normalize is not None:
        peak = cam.abs().amax((1, 2), keepdim=True)
        cam = torch.where(peak == 0, 0.0, cam / peak)  # NaN stays NaN
    maps = F.interpolate(cam[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]
    if dtype == torch.uint8:
        maps = (maps.clamp(0, 1) * 255).round()
    return maps.to(dtype)


def knn(
    queries: Tensor, table: Tensor, k: int, *, metric: str = "l2", squares: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The k nearest table rows of each query, nearest first, ties to the lower id.

    Where the table has fewer than k rows, the rest is row -1 at the worst distance.
    The table is read in tiles, so memory does not grow with N. Candidates are found by
    ``|q|^2 + |t|^2 - 2 <q, t>``, whose rounding can reorder rows closer together than about 1e-7,
    and so the best ``k + KNN_SPARE`` are measured again by the difference and ordered by that.
    """
    dtype = accumulator(queries, table)
    queries = queries.to(dtype)
    B, N = len(queries), len(table)
    spare = min(N, k + KNN_SPARE)
    tile = max(spare, KNN_TILE_BYTES // (8 * max(B, 1)))
    best = queries.new_empty((B, 0))
    best_ids = torch.empty((B, 0), dtype=torch.int64, device=queries.device)
    for start in range(0, N, tile):
        rows = table[start : start + tile].to(dtype)
        if metric == "l2":  # |q|^2 is the same for every row and left out
            square = rows.square().sum(1) if squares is None else squares[start : start + tile]
            scores = torch.addmm(square.to(dtype), queries, rows.T, alpha=-2)  # [B, tile]
        else:
            scores = -(queries @ rows.T)
        near, ids = _smallest(scores, min(spare, scores.shape[1]))
        best, best_ids = torch.cat([best, near], 1), torch.cat([best_ids, ids + start], 1)
        if best.shape[1] > spare:
            # Tiles come in order and so do ids among equals, which a stable sort leaves so.
            best, order = best.sort(dim=1, stable=True)
            best, best_ids = best[:, :spare], best_ids.gather(1, order[:, :spare])

    ids = best_ids.sort(1).values  # by id first, so that the stable sort below settles ties by id
    candidates = table[ids].to(dtype)  # [B, spare, D]
    if metric == "l2":
        distances = (candidates - queries[:, None]).square().sum(-1)
    else:
        distances = -(candidates * queries[:, None]).sum(-1)
    distances, order = distances.sort(dim=1, stable=True)
    distances, ids = distances[:, :k], ids.gather(1, order)[:, :k]
    return filled_neighbors(distances if metric == "l2" else -distances, ids, k, metric)


def filled_neighbors(distances: Tensor, ids: Tensor, k: int, metric: str) -> tuple[Tensor, Tensor]:
    """Distances and ids [B, k], contiguous: where fewer are given, the rest is row -1."""
    missing = k - ids.shape[1]
    if missing:
        worst = math.inf if metric == "l2" else -math.inf
        distances, ids = (
            F.pad(distances, (0, missing), value=worst),
            F.pad(ids, (0, missing), value=-1),
        )
    return distances.contiguous(), ids.contiguous()


def _smallest(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The smallest of each row with their columns, in order, ties to the lower column."""
    if not scores.is_cpu:
        return _smallest_by_sort(scores, count)
    near, ids = scores.topk(count, largest=False)
    ids, order = ids.sort(dim=1)
    near, order = near.gather(1, order).sort(dim=1, stable=True)
    ids = ids.gather(1, order)
    # `topk` takes any of those that tie for the last place. Looking whether there are such rows
    # waits for a device, so elsewhere all are sorted.
    tied = ((scores <= near[:, -1:]).sum(1) > count).nonzero().flatten()
    if len(tied):
        near[tied], ids[tied] = _smallest_by_sort(scores[tied], count)
    return near, ids


def _smallest_by_sort(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    ordered, columns = scores.sort(dim=1, stable=True)
    return ordered[:, :count], columns[:, :count]


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


def uniform_ranks(
    rows: Tensor, draws: int, counts: Tensor, seed: int, stream: int = STREAM_TRIPLETS
) -> Tensor:
    """Integers uniform in [0, counts), a function of (seed, row, draw, stream) alone.

    A 64-bit word x becomes ``floor(x * count / 2^64)``; its probabilities differ from uniform by
    less than count / 2^64.

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
    count_low, count_high = (counts & mask)[:, None], (counts >> 32)[:, None]
    # The upper half of a 64 x 64-bit product, by 32-bit halves; shifts are masked to be unsigned.
    middle = high * count_low + ((low * count_low >> 32) & mask)
    carry = low * count_high + (middle & mask)
    return high * count_high + ((middle >> 32) & mask) + ((carry >> 32) & mask)


def _anchor_distances(anchor: Tensor, embeddings: Tensor) -> Tensor:
    """Squared distances [N] in float64, summed over D in order and without fused multiply-add.

    The order is part of the specification: it decides which pairs at the hinge are valid, so every
    backend keeps to it, bit for bit.
    """
    total = torch.zeros(len(embeddings), dtype=torch.float64, device=embeddings.device)
    for d in range(embeddings.shape[1]):
        difference = embeddings[:, d].double() - anchor[d].double()
        total = total + difference * difference
    return total


class _AnchorPairs(NamedTuple):
    positives: Tensor  # row numbers [P]
    negatives: Tensor  # row numbers [Q]
    valid: Tensor  # [P, Q] bool
    hardest: tuple[int, int]


def _pairs_of(
    anchor: Tensor, label: Tensor, row: Tensor, embeddings: Tensor, labels: Tensor, margin: float
) -> _AnchorPairs:
    same = labels == label
    ids = torch.arange(len(labels), device=labels.device)
    positives, negatives = ids[same & (ids != row)], ids[~same]
    distances = _anchor_distances(anchor, embeddings)
    valid = distances[positives][:, None] + margin > distances[negatives][None]
    hardest = (
        int(positives[distances[positives].argmax()]) if len(positives) else -1,
        int(negatives[distances[negatives].argmin()]) if len(negatives) else -1,
    )
    return _AnchorPairs(positives, negatives, valid, hardest)


def sample_triplets(
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
) -> Triplets:
    """T draws, uniform over the valid (positive, negative) pairs of each anchor.

    The valid pairs of an anchor are ordered by (positive's row, negative's row). Where there are at
    most T of them each is taken once, in that order; otherwise draw t is the pair number
    ``uniform_ranks(...)[t]``. With ``first``, pairs ``first … first + T - 1`` are listed instead.
    """
    B, device = len(anchors), anchors.device
    positives = torch.full((B, triplets), -1, dtype=torch.int64, device=device)
    negatives = positives.clone()
    counts = torch.zeros(B, dtype=torch.int64, device=device)
    hardest = torch.full((B, 2), -1, dtype=torch.int64, device=device)
    for b in range(B):
        pairs = _pairs_of(anchors[b], anchor_labels[b], anchor_rows[b], embeddings, labels, margin)
        valid = pairs.valid.nonzero()  # [V, 2], ordered
        counts[b], hardest[b] = len(valid), torch.tensor(pairs.hardest)
        if first is not None:
            chosen = valid[first : first + triplets]
        elif len(valid) <= triplets:
            chosen = valid
        else:
            ranks = uniform_ranks(anchor_rows[b : b + 1], triplets, counts[b : b + 1], seed)
            chosen = valid[ranks[0]]
        positives[b, : len(chosen)] = pairs.positives[chosen[:, 0]]
        negatives[b, : len(chosen)] = pairs.negatives[chosen[:, 1]]
    return Triplets(positives, negatives, positives >= 0, counts, hardest)


def mean_cotangents(
    anchors: Tensor,
    anchor_labels: Tensor,
    anchor_rows: Tensor,
    embeddings: Tensor,
    labels: Tensor,
    *,
    margin: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The mean over *all* valid pairs of dL/df_a = 2 (f_n - f_p), without drawing any.

    ``2 / V (sum_n m_n f_n - sum_p n_p f_p)``, where n_p counts the negatives that p is valid with
    and m_n the positives that n is valid with. Returns (cotangents [B, D] float32, counts [B],
    hardest [B, 2]).
    """
    cotangents = torch.zeros(anchors.shape, dtype=torch.float64, device=anchors.device)
    counts = torch.zeros(len(anchors), dtype=torch.int64, device=anchors.device)
    hardest = torch.full((len(anchors), 2), -1, dtype=torch.int64, device=anchors.device)
    table = embeddings.double()
    for b in range(len(anchors)):
        pairs = _pairs_of(anchors[b], anchor_labels[b], anchor_rows[b], embeddings, labels, margin)
        counts[b], hardest[b] = pairs.valid.sum(), torch.tensor(pairs.hardest)
        if counts[b]:
            valid = pairs.valid.double()
            pull = valid.sum(0) @ table[pairs.negatives] - valid.sum(1) @ table[pairs.positives]
            cotangents[b] = 2 * pull / counts[b]
    return cotangents.float(), counts, hardest
