"""Drawing valid triplets, and the mean over all of them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from gcfast._checks import MAX_SEED, Dimensions, require_choice, require_int
from gcfast.ops._operation import BACKENDS, Outputs, operation
from gcfast.reference import Triplets, default_tries, label_order

MAX_TRIES = 2**31 - 2**16  # the number of a try is a 32-bit word of the generator


def _sample_in_cpp(
    *tensors: Any,
    triplets: int,
    margin: float,
    seed: int = 0,
    first: int | None = None,
    tries: int | None = None,
) -> Triplets:
    from gcfast import _core

    arrays = _arrays(*tensors)
    positives, negatives, counts, hardest, exact = _tensors(
        _core.sample_triplets(
            **arrays,
            triplets=triplets,
            margin=margin,
            seed=seed,
            first=-1 if first is None else first,
            tries=default_tries(len(arrays["labels"])) if tries is None else tries,
            threads=torch.get_num_threads(),
        )
    )
    return Triplets(positives, negatives, positives >= 0, counts, hardest, exact)


def _mean_in_cpp(*tensors: Any, margin: float) -> tuple[Tensor, Tensor, Tensor]:
    from gcfast import _core

    arrays = _arrays(*tensors)
    del arrays["sketch"]
    cotangents, counts, hardest = _tensors(
        _core.mean_cotangents(**arrays, margin=margin, threads=torch.get_num_threads())
    )
    return cotangents, counts, hardest


def _arrays(
    anchors: Tensor,
    anchor_labels: Tensor,
    anchor_rows: Tensor,
    embeddings: Tensor,
    labels: Tensor,
    by_label: Tensor | None = None,
    sketch: Tensor | None = None,
) -> Any:
    tensors = {
        "anchors": anchors,
        "anchor_labels": anchor_labels,
        "anchor_rows": anchor_rows,
        "embeddings": embeddings,
        "labels": labels,
        "by_label": label_order(labels) if by_label is None else by_label,
        "sketch": sketch,
    }
    return {k: None if t is None else t.contiguous().numpy() for k, t in tensors.items()}


def _tensors(arrays: Iterable[NDArray[Any]]) -> tuple[Tensor, ...]:
    return tuple(torch.from_numpy(array) for array in arrays)


@operation(cpp=_sample_in_cpp)
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
    backend: str = "auto",
) -> Outputs[Triplets]:
    """Draw (positive, negative) pairs uniformly from those that are valid with each anchor.

    A pair is valid when ``D(a, p) + margin > D(a, n)``, with p of the anchor's label and another
    row, n of another label, D the squared Euclidean distance in float64 (summed in the order of the
    dimensions, so that every backend agrees at the hinge). Draws are with replacement and depend on
    (seed, anchor's row, draw number) and the table alone; where an anchor has at most T valid
    pairs each is used once.

    An anchor first tries pairs drawn from all positives and negatives. When more than T different
    ones turn out to be valid, the rest of the table is not read, and the count is an estimate.
    :mod:`gcfast.reference.triplets` has the rules, which all backends follow draw for draw.

    Args:
        anchors: [B, D] float32.
        anchor_labels: [B] int64.
        anchor_rows: [B] int64: the anchor's own row, which is never its positive; N or more for an
            anchor from outside the table.
        embeddings: [N, D] float32.
        labels: [N] int64.
        by_label: [N] int64, the rows in the order of (label, row); None sorts them in every call.
        sketch: [N, D + 8] uint8, of :func:`gcfast.reference.label_sketch`, with which tries are
            faster on the CPU. Draws do not depend on it.
        triplets: T, at least 1.
        margin: the margin of the hinge; infinity makes every pair valid.
        seed: 0 to 2^63 - 1.
        first: None draws; a number lists the valid pairs from that one on, in the order of
            (positive, negative), T at a time.
        tries: pairs that an anchor may try before the table is scanned for it; None takes N // 16,
            0 scans for every anchor, so that all counts are exact.
        backend: "auto", "triton" or "reference".

    Returns:
        Triplets: positives, negatives [B, T] int64 (-1 where there is none), valid [B, T] bool,
        counts [B] int64 (all the valid pairs of the anchor), hardest [B, 2] int64 (farthest
        positive, nearest negative; ties to the lower row; -1 where there is none), exact [B] bool
        (the table was scanned for this anchor; elsewhere its count is an unbiased estimate and
        hardest is -1).

    Raises:
        TypeError: not a tensor, or another dtype.
        ValueError: another shape or device, a number out of range, margin NaN.

    Source: paper, section 3.1 (triplets with non-zero loss).
    """
    require_choice("backend", backend, BACKENDS)
    require_int("triplets", triplets, 1)
    require_int("seed", seed, 0, MAX_SEED)
    if first is not None:
        require_int("first", first, 0)
    if tries is not None:
        require_int("tries", tries, 0, MAX_TRIES)
    B = _checked_rows(anchors, anchor_labels, anchor_rows, embeddings, labels, by_label, margin)
    if sketch is not None:
        Dimensions(N=len(labels), W=embeddings.shape[1] + 8).require(
            "sketch", sketch, (torch.uint8,), "N W"
        )
    ids = torch.int64
    drawn = (B, triplets)
    return Outputs(
        labels,
        (drawn, ids),
        (drawn, ids),
        (drawn, torch.bool),
        ((B,), ids),
        ((B, 2), ids),
        ((B,), torch.bool),
    )


@operation(cpp=_mean_in_cpp)
def mean_cotangents(
    anchors: Tensor,
    anchor_labels: Tensor,
    anchor_rows: Tensor,
    embeddings: Tensor,
    labels: Tensor,
    by_label: Tensor | None = None,
    *,
    margin: float,
    backend: str = "auto",
) -> Outputs[tuple[Tensor, Tensor, Tensor]]:
    """Return the mean of dL/df_a = 2 (f_n - f_p) over every valid pair of each anchor.

    ``2 / V (sum_n m_n f_n - sum_p n_p f_p)``: n_p counts the negatives that p is valid with, m_n
    the positives that n is valid with, V all pairs. Nothing is drawn; nothing N x N is held.

    Args:
        anchors: [B, D] float32.
        anchor_labels: [B] int64.
        anchor_rows: [B] int64, as in :func:`sample_triplets`.
        embeddings: [N, D] float32.
        labels: [N] int64.
        by_label: [N] int64, the rows in the order of (label, row); None sorts them in every call.
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
    B = _checked_rows(anchors, anchor_labels, anchor_rows, embeddings, labels, by_label, margin)
    return Outputs(
        anchors, (anchors.shape, torch.float32), ((B,), torch.int64), ((B, 2), torch.int64)
    )


def _checked_rows(
    anchors: Tensor,
    anchor_labels: Tensor,
    anchor_rows: Tensor,
    embeddings: Tensor,
    labels: Tensor,
    by_label: Tensor | None,
    margin: float,
) -> int:
    """Check what both operations take; returns B."""
    sizes = Dimensions()
    sizes.require("anchors", anchors, (torch.float32,), "B D")
    sizes.require("embeddings", embeddings, (torch.float32,), "N D")
    sizes.require("anchor_labels", anchor_labels, (torch.int64,), "B")
    sizes.require("anchor_rows", anchor_rows, (torch.int64,), "B")
    sizes.require("labels", labels, (torch.int64,), "N")
    if by_label is not None:
        sizes.require("by_label", by_label, (torch.int64,), "N")
    if math.isnan(margin):
        raise ValueError("`margin` must be a number, got nan")
    return sizes["B"]
