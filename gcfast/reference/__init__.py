"""The specification of every operation in plain PyTorch, and the CPU path of all but one.

Each function has the name and the signature of its twin in :mod:`gcfast.ops`, where the arguments
are checked and documented (``elementwise_cam`` has none); here they are trusted. Whatever another
backend computes is right when it agrees with this package and wrong when it does not.
``sample_triplets`` and ``mean_cotangents`` are in :mod:`gcfast.reference.triplets`, ``refine`` in
:mod:`gcfast.reference.refining`.

Sources: the paper is Chen et al., *Adapting Grad-CAM for Embedding Networks*, WACV 2020; Grad-CAM++
is Chattopadhay et al., arXiv:1710.11063.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from gcfast.reference.refining import refine
from gcfast.reference.triplets import (
    STREAM_TRIES,
    STREAM_TRIPLETS,
    TRY_ROUND,
    Triplets,
    default_tries,
    label_order,
    label_sketch,
    mean_cotangents,
    philox,
    sample_triplets,
    uniform_ranks,
)

__all__ = [
    "STREAM_TRIES",
    "STREAM_TRIPLETS",
    "TRY_ROUND",
    "Triplets",
    "accumulator",
    "default_tries",
    "dense_cam",
    "elementwise_cam",
    "filled_neighbors",
    "grad_weights",
    "head_grad_weights",
    "knn",
    "label_order",
    "label_sketch",
    "mean_cotangents",
    "philox",
    "refine",
    "sample_triplets",
    "sparse_cam",
    "top_m",
    "uniform_ranks",
]

KNN_TILE_BYTES = 64 * 2**20  # of distances held at once by `knn`
KNN_SPARE = 8  # neighbours kept beyond K until their distances are known exactly


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
    return _finished(cam, size, relu, normalize, dtype)


def dense_cam(
    activations: Tensor,
    weights: Tensor,
    *,
    size: tuple[int, int],
    relu: bool = True,
    normalize: str | None = "max",
    grid: tuple[int, int] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Heat maps from a weight for each channel of each image.

    ``map[b] = relu(sum_c w[b,c] A[b,c])``, finished as by :func:`sparse_cam`.
    """
    if activations.ndim == 3:  # tokens [B, P, C]
        assert grid is not None
        places, (H, W) = activations.transpose(1, 2), grid
    else:
        places, (H, W) = activations.flatten(2), activations.shape[2:]
    B, C, _ = places.shape
    if 0 in (B, C):
        return activations.new_zeros((B, *size), dtype=dtype)
    summed = accumulator(activations, weights)
    # A row times a matrix: the column of its transpose took a hundred times as long on a CPU.
    cam = torch.bmm(weights.to(summed)[:, None], places.to(summed)).view(B, H, W)
    return _finished(cam, size, relu, normalize, dtype)


def elementwise_cam(
    activations: Tensor,
    gradients: Tensor,
    *,
    size: tuple[int, int],
    relu: bool = True,
    normalize: str | None = "max",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Heat maps of gradient times activation, both [B, C, H, W].

    ``map[b] = relu(sum_c G[b,c] A[b,c])``, place by place, finished as by :func:`sparse_cam`.
    The path makes it by a product, a sum and ``dense_cam`` of one channel.
    """
    if 0 in activations.shape[:2]:
        return activations.new_zeros((len(activations), *size), dtype=dtype)
    summed = accumulator(activations, gradients)
    cam = torch.einsum("bchw,bchw->bhw", activations.to(summed), gradients.to(summed))
    return _finished(cam, size, relu, normalize, dtype)


def _finished(
    cam: Tensor, size: tuple[int, int], relu: bool, normalize: str | None, dtype: torch.dtype
) -> Tensor:
    """The sums [B, H, W] as maps [B, OH, OW]: what ``sparse_cam`` and ``dense_cam`` share."""
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
