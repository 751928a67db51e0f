"""The operations behind their checks: empty input, the choice of a backend, the call.

The signatures are those of :mod:`gcfast.ops`, which checks and documents the arguments; here they
are trusted, and nothing waits for the device. The caller has turned gradients and autocast off
(:mod:`gcfast.ops.precision`). The explainer's forward pass and :mod:`gcfast.ops.library` come in
here.

A channel id outside [0, C) or a row number of N or more is read by no kernel: it weighs nothing.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from gcfast import reference
from gcfast.ops.backend import uses_triton
from gcfast.reference import Triplets

KNN_MAX_K, KNN_MAX_D = 32, 2048  # of the kernel; beyond them the reference runs


def grad_weights(
    gradients: Tensor,
    valid: Tensor | None = None,
    *,
    activations: Tensor | None = None,
    method: str = "gradcam",
    backend: str = "auto",
) -> Tensor:
    """See :func:`gcfast.ops.grad_weights`."""
    run: Callable[..., Tensor] = reference.grad_weights
    if uses_triton(backend, gradients, activations if method == "gradcam++" else None):
        from gcfast.kernels.grad_weights import launch_grad_weights

        run = launch_grad_weights
    return run(gradients, valid, activations=activations, method=method)


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
    backend: str = "auto",
) -> Tensor:
    """See :func:`gcfast.ops.head_grad_weights`."""
    run: Callable[..., Tensor] = reference.head_grad_weights
    if uses_triton(backend, cotangents, weight, embeddings, norms, activation_sums):
        from gcfast.kernels.head_grad_weights import launch_head_grad_weights

        run = functools.partial(launch_head_grad_weights, precision=precision)
    return run(
        cotangents,
        weight,
        valid,
        pixels=pixels,
        embeddings=embeddings,
        norms=norms,
        activation_sums=activation_sums,
        method=method,
    )


def top_m(weights: Tensor, m: int, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """See :func:`gcfast.ops.top_m`."""
    run: Callable[..., tuple[Tensor, Tensor]] = reference.top_m
    if uses_triton(backend, weights):
        from gcfast.kernels.top_m import launch_top_m

        run = launch_top_m
    return run(weights, m)


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
    backend: str = "auto",
) -> Tensor:
    """See :func:`gcfast.ops.sparse_cam`."""
    B = len(activations)
    if 0 in (B, len(channels), neighbors.shape[1], channels.shape[1]):
        return torch.zeros((B, *size), dtype=dtype, device=activations.device)
    run: Callable[..., Tensor] = reference.sparse_cam
    if uses_triton(backend, activations, weights, mixing, offsets):
        from gcfast.kernels.sparse_cam import launch_sparse_cam

        run = launch_sparse_cam
    return run(
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


def knn(
    queries: Tensor,
    table: Tensor,
    k: int,
    *,
    metric: str = "l2",
    squares: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """See :func:`gcfast.ops.knn`."""
    run: Callable[..., tuple[Tensor, Tensor]] = reference.knn
    fits = k <= KNN_MAX_K and queries.shape[1] <= KNN_MAX_D
    if uses_triton(backend, queries, table, squares) and fits:
        from gcfast.kernels.knn import launch_knn

        run = launch_knn
    distances, ids = run(queries, table, min(k, max(len(table), 1)), metric=metric, squares=squares)
    missing = k - ids.shape[1]
    if missing:
        distances = torch.nn.functional.pad(
            distances, (0, missing), value=math.inf if metric == "l2" else -math.inf
        )
        ids = torch.nn.functional.pad(ids, (0, missing), value=-1)
    return distances.contiguous(), ids.contiguous()


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
    """See :func:`gcfast.ops.sample_triplets`."""
    tensors = (anchors, anchor_labels, anchor_rows, embeddings, labels)
    run: Callable[..., Triplets] = reference.sample_triplets
    if uses_triton(backend, *tensors):
        from gcfast.kernels.sample_triplets import launch_sample_triplets

        run = launch_sample_triplets
    elif backend == "auto" and not anchors.is_cuda:
        from gcfast import _core

        positives, negatives, counts, hardest = (
            torch.from_numpy(out)
            for out in _core.sample_triplets(
                *_as_numpy(*tensors),
                triplets=triplets,
                margin=margin,
                seed=seed,
                first=-1 if first is None else first,
                threads=torch.get_num_threads(),
            )
        )
        return Triplets(positives, negatives, positives >= 0, counts, hardest)
    return run(*tensors, triplets=triplets, margin=margin, seed=seed, first=first)


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
    """See :func:`gcfast.ops.mean_cotangents`."""
    tensors = (anchors, anchor_labels, anchor_rows, embeddings, labels)
    run: Callable[..., tuple[Tensor, Tensor, Tensor]] = reference.mean_cotangents
    if uses_triton(backend, *tensors):
        from gcfast.kernels.mean_cotangents import launch_mean_cotangents

        run = launch_mean_cotangents
    elif backend == "auto" and not anchors.is_cuda:
        from gcfast import _core

        cotangents, counts, hardest = _core.mean_cotangents(
            *_as_numpy(*tensors), margin=margin, threads=torch.get_num_threads()
        )
        return torch.from_numpy(cotangents), torch.from_numpy(counts), torch.from_numpy(hardest)
    return run(*tensors, margin=margin)


def _as_numpy(*tensors: Tensor):  # type: ignore[no-untyped-def]
    return (tensor.contiguous().numpy() for tensor in tensors)
