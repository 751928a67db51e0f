"""The operations of an exported explainer in PyTorch's own, for runtimes that have only those.

For ``ExportedProgram.run_decompositions(DECOMPOSITIONS)``. Nothing depends on a value, and the
numbers of images and rows may be symbols. What the specification (:mod:`gcfast.reference`) does in
tiles is done at once here, which a runtime may cut up again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gcfast import reference
from gcfast.reference.refining import refined


def knn(
    queries: Tensor,
    table: Tensor,
    k: int,
    squares: Tensor | None = None,
    *,
    metric: str = "l2",
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """``ops.knn`` with B (N + K) scores in memory at once.

    The candidates are the ``k + KNN_SPARE`` smallest of ``|t|^2 - 2 <q, t>``, measured again by the
    difference. ``topk`` may take any of those that tie for the last place, so that the scores are
    compared in float64 after a step for each row which is less than their own rounding.
    """
    del backend
    dtype = reference.accumulator(queries, table)
    queries = queries.to(dtype)
    rows = table.to(dtype)
    N = table.shape[0]
    # The table on the left, which then need not be transposed: a runtime would keep both.
    if metric == "l2":
        squares = rows.square().sum(1) if squares is None else squares.to(dtype)
        scores = torch.addmm(squares[:, None], rows, queries.T, alpha=-2).T  # [B, N]
        bound = squares.amax(0) + queries.square().sum(1, keepdim=True)  # half of the largest score
    else:
        scores = -(rows @ queries.T).T
        bound = scores.abs().amax(1, keepdim=True)
    step = 2 * torch.finfo(torch.float64).eps * bound.double()  # [B, 1]
    scores = scores.double() + step * torch.arange(N, device=table.device)
    spare = k + reference.KNN_SPARE
    lacking = spare if isinstance(N, torch.SymInt) else max(0, spare - N)
    if lacking:
        scores = F.pad(scores, (0, lacking), value=torch.inf)
    ids = scores.topk(spare, dim=1, largest=False).indices  # [B, spare]; N and above: no row

    candidates = table[ids.clamp(max=N - 1)].to(dtype)  # [B, spare, D]
    if metric == "l2":
        distances = (candidates - queries[:, None]).square().sum(-1)
    else:
        distances = -(candidates * queries[:, None]).sum(-1)
    if lacking:
        distances = torch.where(ids < N, distances, torch.inf)
    # How many come before each: sorts need not keep the order of equals.
    one, other = distances[:, :, None], distances[:, None]
    before = (other < one) | ((other == one) & (ids[:, None] < ids[:, :, None]))
    places = before.sum(2).topk(k, dim=1, largest=False).indices
    distances, ids = distances.gather(1, places), ids.gather(1, places)
    if lacking:
        ids = torch.where(ids < N, ids, -1)
    return distances if metric == "l2" else -distances, ids


def sparse_cam(
    activations: Tensor,
    neighbors: Tensor,
    channels: Tensor,
    weights: Tensor,
    mixing: Tensor | None = None,
    offsets: Tensor | None = None,
    *,
    backend: str = "auto",
    **options: Any,
) -> Tensor:
    """``ops.sparse_cam``."""
    del backend
    return reference.sparse_cam(
        activations, neighbors, channels, weights, mixing=mixing, offsets=offsets, **options
    )


def dense_cam(
    activations: Tensor, weights: Tensor, *, backend: str = "auto", **options: Any
) -> Tensor:
    """``ops.dense_cam``."""
    del backend
    return reference.dense_cam(activations, weights, **options)


def refine(maps: Tensor, finer: Tensor, *, backend: str = "auto") -> Tensor:
    """``ops.refine``."""
    del backend
    return refined(maps, finer, [slice(None)])


def index(values: Tensor, indices: list[Tensor | None]) -> Any:
    """``values[ids]``, of whole rows: ONNX's exporter would write it with a transposed table."""
    (ids,) = indices if len(indices) == 1 else (None,)
    if ids is None or ids.dtype != torch.int64:
        return NotImplemented  # leaves it as it is
    return values.index_select(0, ids.reshape(-1)).reshape(*ids.shape, *values.shape[1:])


DECOMPOSITIONS: dict[torch._ops.OpOverload, Callable[..., Any]] = {
    torch.ops.gcfast.knn.default: knn,
    torch.ops.gcfast.sparse_cam.default: sparse_cam,
    torch.ops.gcfast.dense_cam.default: dense_cam,
    torch.ops.gcfast.refine.default: refine,
    torch.ops.aten.index.Tensor: index,
}
