"""Every operation as ``torch.ops.gcfast.<name>``, with what torch.compile must know about it.

Each is registered by ``torch.library.custom_op`` with a fake implementation, which gives shapes and
dtypes without data, so that the operations survive ``torch.compile(fullgraph=True)`` and
``torch.export``. They are those of :mod:`gcfast.ops` with ``backend="auto"`` but for one thing: ids
and row numbers are not checked, since that would wait for the device. Tensors that are keyword-only
there come before the star here, as the registration wants them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gcfast.ops import dispatch
from gcfast.ops.knn import check_knn
from gcfast.ops.precision import sheltered
from gcfast.ops.sample_triplets import check_mean_cotangents, check_sample_triplets
from gcfast.ops.sparse_cam import check_sparse_cam
from gcfast.ops.weights import check_grad_weights, check_head_grad_weights, check_top_m


def _accumulator(*tensors: Tensor | None) -> torch.dtype:
    double = any(t is not None and t.dtype == torch.float64 for t in tensors)
    return torch.float64 if double else torch.float32


@torch.library.custom_op("gcfast::grad_weights", mutates_args=())
def grad_weights(
    gradients: Tensor,
    valid: Tensor | None = None,
    activations: Tensor | None = None,
    *,
    method: str = "gradcam",
    backend: str = "auto",
) -> Tensor:
    """:func:`gcfast.ops.grad_weights`."""
    check_grad_weights(gradients, valid, activations=activations, method=method)
    return sheltered(dispatch.grad_weights)(
        gradients, valid, activations=activations, method=method, backend=backend
    )


@grad_weights.register_fake
def _(
    gradients: Tensor,
    valid: Tensor | None = None,
    activations: Tensor | None = None,
    *,
    method: str = "gradcam",
    backend: str = "auto",
) -> Tensor:
    del backend
    check_grad_weights(gradients, valid, activations=activations, method=method)
    B, _, C, _, _ = gradients.shape
    return gradients.new_empty((B, C), dtype=_accumulator(gradients))


@torch.library.custom_op("gcfast::head_grad_weights", mutates_args=())
def head_grad_weights(
    cotangents: Tensor,
    weight: Tensor,
    valid: Tensor | None = None,
    embeddings: Tensor | None = None,
    norms: Tensor | None = None,
    activation_sums: Tensor | None = None,
    *,
    pixels: int,
    method: str = "gradcam",
    precision: str = "ieee",
    backend: str = "auto",
) -> Tensor:
    """:func:`gcfast.ops.head_grad_weights`."""
    check_head_grad_weights(
        cotangents,
        weight,
        valid,
        pixels=pixels,
        embeddings=embeddings,
        norms=norms,
        activation_sums=activation_sums,
        method=method,
        precision=precision,
    )
    return sheltered(dispatch.head_grad_weights)(
        cotangents,
        weight,
        valid,
        pixels=pixels,
        embeddings=embeddings,
        norms=norms,
        activation_sums=activation_sums,
        method=method,
        precision=precision,
        backend=backend,
    )


@head_grad_weights.register_fake
def _(
    cotangents: Tensor,
    weight: Tensor,
    valid: Tensor | None = None,
    embeddings: Tensor | None = None,
    norms: Tensor | None = None,
    activation_sums: Tensor | None = None,
    *,
    pixels: int,
    method: str = "gradcam",
    precision: str = "ieee",
    backend: str = "auto",
) -> Tensor:
    del backend
    check_head_grad_weights(
        cotangents,
        weight,
        valid,
        pixels=pixels,
        embeddings=embeddings,
        norms=norms,
        activation_sums=activation_sums,
        method=method,
        precision=precision,
    )
    return cotangents.new_empty(
        (cotangents.shape[0], weight.shape[1]), dtype=_accumulator(cotangents)
    )


@torch.library.custom_op("gcfast::top_m", mutates_args=())
def top_m(weights: Tensor, m: int, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """:func:`gcfast.ops.top_m`."""
    check_top_m(weights, m)
    return sheltered(dispatch.top_m)(weights, m, backend=backend)


@top_m.register_fake
def _(weights: Tensor, m: int, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    del backend
    check_top_m(weights, m)
    shape = (weights.shape[0], m)
    return weights.new_empty(shape, dtype=torch.int64), weights.new_empty(shape)


@torch.library.custom_op("gcfast::sparse_cam", mutates_args=())
def sparse_cam(
    activations: Tensor,
    neighbors: Tensor,
    channels: Tensor,
    weights: Tensor,
    mixing: Tensor | None = None,
    offsets: Tensor | None = None,
    *,
    size: Sequence[int],
    center: float = 0.0,
    relu: bool = True,
    normalize: str | None = "max",
    grid: Sequence[int] | None = None,
    dtype: torch.dtype = torch.float32,
    backend: str = "auto",
) -> Tensor:
    """:func:`gcfast.ops.sparse_cam`."""
    check_sparse_cam(
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
    height, width = size
    return sheltered(dispatch.sparse_cam)(
        activations,
        neighbors,
        channels,
        weights,
        size=(height, width),
        mixing=mixing,
        offsets=offsets,
        center=center,
        relu=relu,
        normalize=normalize,
        grid=None if grid is None else (grid[0], grid[1]),
        dtype=dtype,
        backend=backend,
    )


@sparse_cam.register_fake
def _(
    activations: Tensor,
    neighbors: Tensor,
    channels: Tensor,
    weights: Tensor,
    mixing: Tensor | None = None,
    offsets: Tensor | None = None,
    *,
    size: Sequence[int],
    center: float = 0.0,
    relu: bool = True,
    normalize: str | None = "max",
    grid: Sequence[int] | None = None,
    dtype: torch.dtype = torch.float32,
    backend: str = "auto",
) -> Tensor:
    del backend
    check_sparse_cam(
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
    return activations.new_empty((activations.shape[0], *size), dtype=dtype)


@torch.library.custom_op("gcfast::knn", mutates_args=())
def knn(
    queries: Tensor,
    table: Tensor,
    k: int,
    squares: Tensor | None = None,
    *,
    metric: str = "l2",
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """:func:`gcfast.ops.knn`."""
    check_knn(queries, table, k, metric=metric, squares=squares)
    return sheltered(dispatch.knn)(
        queries, table, k, metric=metric, squares=squares, backend=backend
    )


@knn.register_fake
def _(
    queries: Tensor,
    table: Tensor,
    k: int,
    squares: Tensor | None = None,
    *,
    metric: str = "l2",
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    del backend
    check_knn(queries, table, k, metric=metric, squares=squares)
    shape = (queries.shape[0], k)
    return (
        queries.new_empty(shape, dtype=_accumulator(queries, table)),
        queries.new_empty(shape, dtype=torch.int64),
    )


@torch.library.custom_op("gcfast::sample_triplets", mutates_args=())
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """:func:`gcfast.ops.sample_triplets`, the five parts of its result in order."""
    tensors = (anchors, anchor_labels, anchor_rows, embeddings, labels)
    check_sample_triplets(*tensors, triplets=triplets, margin=margin, seed=seed, first=first)
    drawn = sheltered(dispatch.sample_triplets)(
        *tensors, triplets=triplets, margin=margin, seed=seed, first=first, backend=backend
    )
    return (drawn.positives, drawn.negatives, drawn.valid, drawn.counts, drawn.hardest)


@sample_triplets.register_fake
def _(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    del backend
    tensors = (anchors, anchor_labels, anchor_rows, embeddings, labels)
    check_sample_triplets(*tensors, triplets=triplets, margin=margin, seed=seed, first=first)
    B = anchors.shape[0]
    return (
        labels.new_empty((B, triplets)),
        labels.new_empty((B, triplets)),
        labels.new_empty((B, triplets), dtype=torch.bool),
        labels.new_empty((B,)),
        labels.new_empty((B, 2)),
    )


@torch.library.custom_op("gcfast::mean_cotangents", mutates_args=())
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
    """:func:`gcfast.ops.mean_cotangents`."""
    tensors = (anchors, anchor_labels, anchor_rows, embeddings, labels)
    check_mean_cotangents(*tensors, margin=margin)
    return sheltered(dispatch.mean_cotangents)(*tensors, margin=margin, backend=backend)


@mean_cotangents.register_fake
def _(
    anchors: Tensor,
    anchor_labels: Tensor,
    anchor_rows: Tensor,
    embeddings: Tensor,
    labels: Tensor,
    *,
    margin: float,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    del backend
    tensors = (anchors, anchor_labels, anchor_rows, embeddings, labels)
    check_mean_cotangents(*tensors, margin=margin)
    B = anchors.shape[0]
    cotangents = anchors.new_empty(anchors.shape)
    return cotangents, labels.new_empty((B,)), labels.new_empty((B, 2))
