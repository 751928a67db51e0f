"""Drawing valid triplets, and the mean over all of them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gcfast._checks import (
    MAX_SEED,
    require_choice,
    require_dtype,
    require_int,
    require_same_device,
    require_shape,
    require_tensor,
)
from gcfast.ops import dispatch
from gcfast.ops.backend import BACKENDS
from gcfast.ops.precision import operation
from gcfast.reference import Triplets


@operation
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
        backend: "auto", "triton" or "reference".

    Returns:
        Triplets: positives, negatives [B, T] int64 (-1 where there is none), valid [B, T] bool,
        counts [B] int64 (all the valid pairs of the anchor), hardest [B, 2] int64 (farthest
        positive, nearest negative; ties to the lower row; -1 where there is none).

    Raises:
        TypeError: not a tensor, or another dtype.
        ValueError: another shape or device, a number out of range, margin NaN.

    Source: paper, section 3.1 (triplets with non-zero loss).
    """
    require_choice("backend", backend, BACKENDS)
    check_sample_triplets(
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
    return dispatch.sample_triplets(
        anchors,
        anchor_labels,
        anchor_rows,
        embeddings,
        labels,
        triplets=triplets,
        margin=margin,
        seed=seed,
        first=first,
        backend=backend,
    )


@operation
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
        backend: "auto", "triton" or "reference".

    Returns:
        (cotangents [B, D] float32, zero where there is no valid pair; counts [B] int64, V;
        hardest [B, 2] int64 as in :func:`sample_triplets`).

    Raises:
        TypeError: not a tensor, or another dtype.
        ValueError: another shape or device, margin NaN.

    Source: the mean over triplets of the paper's section 3.1 in the limit of all of them.
    """
    require_choice("backend", backend, BACKENDS)
    check_mean_cotangents(anchors, anchor_labels, anchor_rows, embeddings, labels, margin=margin)
    return dispatch.mean_cotangents(
        anchors, anchor_labels, anchor_rows, embeddings, labels, margin=margin, backend=backend
    )


def check_sample_triplets(
    anchors: Tensor,
    anchor_labels: Tensor,
    anchor_rows: Tensor,
    embeddings: Tensor,
    labels: Tensor,
    *,
    triplets: int,
    margin: float,
    seed: int,
    first: int | None,
) -> None:
    """Raise unless all is as :func:`sample_triplets` says."""
    check_mean_cotangents(anchors, anchor_labels, anchor_rows, embeddings, labels, margin=margin)
    require_int("triplets", triplets, 1)
    require_int("seed", seed, 0, MAX_SEED)
    if first is not None:
        require_int("first", first, 0)


def check_mean_cotangents(
    anchors: Tensor,
    anchor_labels: Tensor,
    anchor_rows: Tensor,
    embeddings: Tensor,
    labels: Tensor,
    *,
    margin: float,
) -> None:
    """Raise unless all is as :func:`mean_cotangents` says."""
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
