"""The six operations: checked, documented, and sent to the backend that runs them.

``backend="auto"`` runs the C++ twin of ``sample_triplets`` and ``mean_cotangents`` for tensors on
the CPU and the PyTorch reference, on the tensors' device, for everything else.
``backend="reference"`` always runs the reference (:mod:`gcfast.reference`), which is the
specification.

None of them is differentiable. Inputs may have any strides and are not changed.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gcfast import reference
from gcfast._checks import (
    FLOATS,
    MAX_SEED,
    require_choice,
    require_dtype,
    require_ids,
    require_int,
    require_same_device,
    require_shape,
    require_tensor,
)
from gcfast.reference import Triplets

__all__ = [
    "METHODS",
    "Triplets",
    "grad_weights",
    "head_grad_weights",
    "knn",
    "mean_cotangents",
    "sample_triplets",
    "sparse_cam",
    "top_m",
]

METHODS = ("gradcam", "gradcam++")
BACKENDS = ("auto", "reference")
MAP_DTYPES = (torch.float32, torch.float16, torch.uint8)


@torch.no_grad()
def grad_weights(
    gradients: Tensor,
    valid: Tensor | None = None,
    *,
    activations: Tensor | None = None,
    method: str = "gradcam",
) -> Tensor:
    r"""One weight a channel from gradients at a feature map, averaged over the valid triplets.

    Grad-CAM: ``w_k = mean_t mean_ij g[t,k,i,j]``. Grad-CAM++:
    ``w_k = mean_t sum_ij relu(g) / (2 + S_k g)``, ``S_k = max(0, sum_ij A[k,i,j])``.

    Args:
        gradients: [B, T, C, H, W] floating point: dL_t/dA, with the sign of the evidence wanted.
        valid: [B, T] bool, which triplets count; None for all. An image without any gets zeros.
        activations: [B, C, H, W] floating point; needed by Grad-CAM++, ignored by Grad-CAM.
        method: "gradcam" or "gradcam++".

    Returns:
        [B, C] float32 (float64 for float64 gradients). NaN in a valid triplet gives NaN.

    Raises:
        TypeError: not a tensor, or another dtype.
        ValueError: another shape or device, an unknown method, Grad-CAM++ without activations.

    Source: paper, Eq. 1 and 5; Grad-CAM++ arXiv:1710.11063, Eq. 19, without the factor exp(Y).
    """
    require_dtype("gradients", require_tensor("gradients", gradients), FLOATS)
    sizes = require_shape("gradients", gradients, "B T C H W")
    require_choice("method", method, METHODS)
    _check_valid(valid, sizes)
    if method == "gradcam++":
        if activations is None:
            raise ValueError("`activations` must be given for gradcam++, got None")
        require_dtype("activations", require_tensor("activations", activations), FLOATS)
        require_shape("activations", activations, "B C H W", sizes)
    require_same_device(gradients=gradients, valid=valid, activations=activations)
    if sizes["H"] * sizes["W"] == 0:
        raise ValueError(f"`gradients` must have pixels, got {list(gradients.shape)}")
    return reference.grad_weights(gradients, valid, activations=activations, method=method)


@torch.no_grad()
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
) -> Tensor:
    r"""``grad_weights`` in closed form, for a head that is affine in the averaged activations.

    With ``u = W mean(A) + b``, ``f = u / |u|``: ``c' = (c - f <f, c>) / |u|`` and
    ``g_k = (W^T c')_k / P`` at every pixel.

    Args:
        cotangents: [B, T, D] floating point: dL_t/df, with the sign of the evidence wanted.
        weight: [D, C] floating point, W.
        valid: [B, T] bool, which triplets count; None for all. An image without any gets zeros.
        pixels: P = H W of the feature map.
        embeddings: [B, D], f; with ``norms``, or neither where nothing normalises u.
        norms: [B], |u|, positive.
        activation_sums: [B, C], the sum over pixels of A; needed by Grad-CAM++.
        method: "gradcam" or "gradcam++".

    Returns:
        [B, C] float32 (float64 for float64 cotangents).

    Raises:
        TypeError: not a tensor, or another dtype.
        ValueError: another shape or device, one of ``embeddings`` and ``norms`` alone, an unknown
            method, Grad-CAM++ without ``activation_sums``.

    Source: paper, Eq. 1, 4 and 5, for the head of its networks.
    """
    require_dtype("cotangents", require_tensor("cotangents", cotangents), FLOATS)
    sizes = require_shape("cotangents", cotangents, "B T D")
    require_dtype("weight", require_tensor("weight", weight), FLOATS)
    sizes = require_shape("weight", weight, "D C", sizes)
    require_choice("method", method, METHODS)
    require_int("pixels", pixels, 1)
    _check_valid(valid, sizes)
    if (embeddings is None) != (norms is None):
        raise ValueError("`embeddings` and `norms` must be given together, got one of them")
    if embeddings is not None and norms is not None:
        require_dtype("embeddings", require_tensor("embeddings", embeddings), FLOATS)
        require_dtype("norms", require_tensor("norms", norms), FLOATS)
        require_shape("embeddings", embeddings, "B D", sizes)
        require_shape("norms", norms, "B", sizes)
    if method == "gradcam++":
        if activation_sums is None:
            raise ValueError("`activation_sums` must be given for gradcam++, got None")
        require_dtype("activation_sums", require_tensor("activation_sums", activation_sums), FLOATS)
        require_shape("activation_sums", activation_sums, "B C", sizes)
    require_same_device(
        cotangents=cotangents,
        weight=weight,
        valid=valid,
        embeddings=embeddings,
        norms=norms,
        activation_sums=activation_sums,
    )
    return reference.head_grad_weights(
        cotangents,
        weight,
        valid,
        pixels=pixels,
        embeddings=embeddings,
        norms=norms,
        activation_sums=activation_sums,
        method=method,
    )


@torch.no_grad()
def top_m(weights: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """The m highest weights of each row with their channels, highest first.

    Ties go to the lower channel. NaN has no place in an order and is refused upstream, where the
    row can be named; here it sorts first.

    Args:
        weights: [B, C] floating point.
        m: M, from 1 to C.

    Returns:
        (channels [B, M] int64, weights [B, M] in the dtype of ``weights``).

    Raises:
        TypeError: not a tensor, or another dtype.
        ValueError: another shape, or m outside 1 to C.

    Source: paper, section 3.2 (the 50 highest grad-weights).
    """
    require_dtype("weights", require_tensor("weights", weights), FLOATS)
    sizes = require_shape("weights", weights, "B C")
    require_int("m", m, 1)
    if m > sizes["C"]:
        raise ValueError(f"`m` must be at most C = {sizes['C']}, got {m}")
    return reference.top_m(weights, m)


@torch.no_grad()
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
    r"""Heat maps from the channel weights of each image's neighbours in the database.

    ``relu(sum_k x_k (sum_m w[n_k,m] A[ch[n_k,m]] - center o[n_k]))``, normalised at low resolution,
    then resized bilinearly as ``F.interpolate(mode="bilinear", align_corners=False)``.

    Args:
        activations: [B, C, H, W], any memory format, or tokens [B, P, C] with ``grid``.
        neighbors: [B, K] int64 rows of the table; -1 weighs nothing.
        channels: [N, M] int64, in [0, C).
        weights: [N, M] floating point.
        size: (OH, OW).
        mixing: [B, K] floating point, the weight of each neighbour; None weighs those found
            equally.
        offsets: [N] floating point; needed when ``center`` is not 0.
        center: how much of the rows' offsets to subtract; 0 is the paper.
        relu: drop what is negative (the paper); False keeps signed maps.
        normalize: "max" divides by the largest magnitude, "minmax" scales to [0, 1], None is raw.
            A map that is flat zero (with "minmax": constant) stays zero.
        grid: (H, W) of tokens, H W = P.
        dtype: float32, float16, or uint8 (255 times the map, rounded; needs ``normalize``).

    Returns:
        [B, OH, OW] in ``dtype``, on the device of ``activations``. Sums are in float32.

    Raises:
        TypeError: not a tensor, or another dtype.
        ValueError: another shape or device, an id out of range, an unknown choice.

    Source: paper, Eq. 6 and section 3.3.
    """
    require_dtype("activations", require_tensor("activations", activations), FLOATS)
    if activations.ndim == 3:
        sizes = require_shape("activations", activations, "B P C")
        if grid is None or grid[0] * grid[1] != sizes["P"]:
            raise ValueError(f"`grid` must be (H, W) with H W = P = {sizes['P']}, got {grid}")
    else:
        sizes = require_shape("activations", activations, "B C H W")
        if sizes["H"] * sizes["W"] == 0:
            raise ValueError(f"`activations` must have pixels, got {list(activations.shape)}")
    for name, ids in (("neighbors", neighbors), ("channels", channels)):
        require_dtype(name, require_tensor(name, ids), (torch.int64,))
    sizes = require_shape("neighbors", neighbors, "B K", sizes)
    sizes = require_shape("channels", channels, "N M", sizes)
    require_dtype("weights", require_tensor("weights", weights), FLOATS)
    require_shape("weights", weights, "N M", sizes)
    if mixing is not None:
        require_dtype("mixing", require_tensor("mixing", mixing), FLOATS)
        require_shape("mixing", mixing, "B K", sizes)
    if offsets is not None:
        require_dtype("offsets", require_tensor("offsets", offsets), FLOATS)
        require_shape("offsets", offsets, "N", sizes)
    elif center != 0:
        raise ValueError(f"`offsets` must be given when `center` is {center}, got None")
    if not math.isfinite(center):
        raise ValueError(f"`center` must be finite, got {center}")
    require_choice("normalize", normalize, ("max", "minmax", None))
    require_choice("dtype", dtype, MAP_DTYPES)
    if dtype == torch.uint8 and (normalize is None or (not relu and normalize == "max")):
        raise ValueError("`dtype` must be a float for maps outside [0, 1], got torch.uint8")
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"`size` must be (OH, OW), both at least 1, got {size}")
    require_same_device(
        activations=activations,
        neighbors=neighbors,
        channels=channels,
        weights=weights,
        mixing=mixing,
        offsets=offsets,
    )
    require_ids("neighbors", neighbors, -1, sizes["N"])
    if sizes["B"] == 0:
        return torch.empty((0, *size), dtype=dtype, device=activations.device)
    if sizes["N"] == 0 or sizes["K"] == 0:
        return torch.zeros((sizes["B"], *size), dtype=dtype, device=activations.device)
    # Only the rows that are read: the table may be a memory-mapped file of millions of rows.
    require_ids("channels", channels[neighbors.clamp(min=0)], 0, sizes["C"])
    return reference.sparse_cam(
        activations,
        neighbors,
        channels,
        weights,
        size=size,
        mixing=mixing,
        offsets=offsets,
        center=center,
        relu=relu,
        normalize=normalize,
        grid=grid,
        dtype=dtype,
    )


@torch.no_grad()
def knn(
    queries: Tensor, table: Tensor, k: int, *, metric: str = "l2", squares: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The exact k nearest rows of a table, nearest first, ties to the lower row.

    The table is read in tiles of bounded memory; the distances returned are measured by the
    difference and so are exactly 0 for equal rows.

    Args:
        queries: [B, D] floating point, finite.
        table: [N, D] floating point, finite.
        k: K, at least 1; where it exceeds N the rest is filled as below.
        metric: "l2" (squared Euclidean, smallest first) or "ip" (inner product, largest first).
        squares: [N], the rows' squared norms, where they are at hand ("l2" only).

    Returns:
        (distances [B, K] float32, or float64 for float64 inputs; rows [B, K] int64). Where fewer
        than K rows exist the row is -1 and the distance +inf (inner product: -inf).

    Raises:
        TypeError: not a tensor, or another dtype.
        ValueError: another shape or device, k below 1, an unknown metric.

    Source: paper, section 3.3 (weight transfer by nearest neighbour).
    """
    for name, tensor in (("queries", queries), ("table", table)):
        require_dtype(name, require_tensor(name, tensor), FLOATS)
    sizes = require_shape("queries", queries, "B D")
    sizes = require_shape("table", table, "N D", sizes)
    require_int("k", k, 1)
    require_choice("metric", metric, ("l2", "ip"))
    if squares is not None:
        require_shape("squares", squares, "N", sizes)
    require_same_device(queries=queries, table=table, squares=squares)
    distances, ids = reference.knn(
        queries, table, min(k, max(sizes["N"], 1)), metric=metric, squares=squares
    )
    missing = k - ids.shape[1]
    if missing:
        distances = torch.nn.functional.pad(
            distances, (0, missing), value=math.inf if metric == "l2" else -math.inf
        )
        ids = torch.nn.functional.pad(ids, (0, missing), value=-1)
    return distances, ids


@torch.no_grad()
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
    backend: str = "auto",
) -> Triplets:
    """Draws (positive, negative) pairs uniformly from those that are valid with each anchor.

    A pair is valid when ``D(a, p) + margin > D(a, n)``, with p of the anchor's label and another
    row, n of another label, D the squared Euclidean distance in float64 (summed in the order of the
    dimensions, so that every backend agrees at the hinge). Draws are with replacement and depend on
    (seed, anchor's row, draw number) and on nothing else; where an anchor has at most T valid pairs
    each is used once.

    Args:
        anchors: [B, D] float32.
        anchor_labels: [B] int64.
        anchor_rows: [B] int64: the anchor's own row, which is never its positive; N or more for an
            anchor from outside the table.
        embeddings: [N, D] float32.
        labels: [N] int64.
        triplets: T, at least 1.
        margin: the margin of the hinge; infinity makes every pair valid.
        seed: 0 to 2^63 - 1.
        first: None draws; a number lists the valid pairs from that one on, in the order of
            (positive, negative), T at a time.
        backend: "auto" or "reference".

    Returns:
        Triplets: positives, negatives [B, T] int64 (-1 where there is none), valid [B, T] bool,
        counts [B] int64 (all the valid pairs of the anchor), hardest [B, 2] int64 (farthest
        positive, nearest negative; ties to the lower row; -1 where there is none).

    Raises:
        TypeError: not a tensor, or another dtype.
        ValueError: another shape or device, a number out of range, margin NaN.

    Source: paper, section 3.1 (triplets with non-zero loss).
    """
    _check_triplet_inputs(anchors, anchor_labels, anchor_rows, embeddings, labels, margin)
    require_int("triplets", triplets, 1)
    require_int("seed", seed, 0, MAX_SEED)
    if first is not None:
        require_int("first", first, 0)
    require_choice("backend", backend, BACKENDS)
    if backend == "reference" or anchors.is_cuda:
        return reference.sample_triplets(
            anchors,
            anchor_labels,
            anchor_rows,
            embeddings,
            labels,
            triplets=triplets,
            margin=margin,
            seed=seed,
            first=first,
        )
    from gcfast import _core

    positives, negatives, counts, hardest = (
        torch.from_numpy(out)
        for out in _core.sample_triplets(
            *_as_numpy(anchors, anchor_labels, anchor_rows, embeddings, labels),
            triplets=triplets,
            margin=margin,
            seed=seed,
            first=-1 if first is None else first,
            threads=torch.get_num_threads(),
        )
    )
    return Triplets(positives, negatives, positives >= 0, counts, hardest)


@torch.no_grad()
def mean_cotangents(
    anchors: Tensor,
    anchor_labels: Tensor,
    anchor_rows: Tensor,
    embeddings: Tensor,
    labels: Tensor,
    *,
    margin: float,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """The mean of dL/df_a = 2 (f_n - f_p) over every valid pair of each anchor.

    ``2 / V (sum_n m_n f_n - sum_p n_p f_p)``: n_p counts the negatives that p is valid with, m_n
    the positives that n is valid with, V all pairs. Nothing is drawn; nothing N x N is held.

    Args:
        anchors: [B, D] float32.
        anchor_labels: [B] int64.
        anchor_rows: [B] int64, as in :func:`sample_triplets`.
        embeddings: [N, D] float32.
        labels: [N] int64.
        margin: the margin of the hinge; infinity makes every pair valid.
        backend: "auto" or "reference".

    Returns:
        (cotangents [B, D] float32, zero where there is no valid pair; counts [B] int64, V;
        hardest [B, 2] int64 as in :func:`sample_triplets`).

    Raises:
        TypeError: not a tensor, or another dtype.
        ValueError: another shape or device, margin NaN.

    Source: the mean over triplets of the paper's section 3.1 in the limit of all of them.
    """
    _check_triplet_inputs(anchors, anchor_labels, anchor_rows, embeddings, labels, margin)
    require_choice("backend", backend, BACKENDS)
    if backend == "reference" or anchors.is_cuda:
        return reference.mean_cotangents(
            anchors, anchor_labels, anchor_rows, embeddings, labels, margin=margin
        )
    from gcfast import _core

    cotangents, counts, hardest = _core.mean_cotangents(
        *_as_numpy(anchors, anchor_labels, anchor_rows, embeddings, labels),
        margin=margin,
        threads=torch.get_num_threads(),
    )
    return torch.from_numpy(cotangents), torch.from_numpy(counts), torch.from_numpy(hardest)


def _check_valid(valid: Tensor | None, sizes: dict[str, int]) -> None:
    if valid is not None:
        require_dtype("valid", require_tensor("valid", valid), (torch.bool,))
        require_shape("valid", valid, "B T", sizes)


def _check_triplet_inputs(
    anchors: Tensor,
    anchor_labels: Tensor,
    anchor_rows: Tensor,
    embeddings: Tensor,
    labels: Tensor,
    margin: float,
) -> None:
    for name, tensor in (("anchors", anchors), ("embeddings", embeddings)):
        require_dtype(name, require_tensor(name, tensor), (torch.float32,))
    sizes = require_shape("anchors", anchors, "B D")
    sizes = require_shape("embeddings", embeddings, "N D", sizes)
    for name, ids, letter in (
        ("anchor_labels", anchor_labels, "B"),
        ("anchor_rows", anchor_rows, "B"),
        ("labels", labels, "N"),
    ):
        require_dtype(name, require_tensor(name, ids), (torch.int64,))
        require_shape(name, ids, letter, sizes)
    require_same_device(
        anchors=anchors,
        anchor_labels=anchor_labels,
        anchor_rows=anchor_rows,
        embeddings=embeddings,
        labels=labels,
    )
    if math.isnan(margin):
        raise ValueError("`margin` must be a number, got nan")


def _as_numpy(*tensors: Tensor):  # type: ignore[no-untyped-def]
    return (tensor.contiguous().numpy() for tensor in tensors)
