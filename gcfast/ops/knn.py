"""Exact nearest neighbours."""

from __future__ import annotations

import torch
from torch import Tensor

from gcfast._checks import FLOATS, Dimensions, require_choice, require_int
from gcfast.ops._operation import BACKENDS, Outputs, operation
from gcfast.reference import accumulator


@operation()
def knn(
    queries: Tensor,
    table: Tensor,
    k: int,
    *,
    metric: str = "l2",
    squares: Tensor | None = None,
    backend: str = "auto",
) -> Outputs[tuple[Tensor, Tensor]]:
    """Return the exact k nearest rows of a table, nearest first, ties to the lower row.

    The table is read in tiles of bounded memory; the distances returned are measured by the
    difference and so are exactly 0 for equal rows.

    Args:
        queries: [B, D] floating point, finite.
        table: [N, D] floating point, finite.
        k: K, at least 1; where it exceeds N the rest is filled as below.
        metric: "l2" (squared Euclidean, smallest first) or "ip" (inner product, largest first).
        squares: [N], the rows' squared norms, where they are at hand ("l2" only).
        backend: "auto", "triton" or "reference". The kernel is for K <= 32 and D <= 2,048; beyond
            them the reference runs.

    Returns:
        (distances [B, K] float32, or float64 for float64 inputs; rows [B, K] int64). Where fewer
        than K rows exist the row is -1 and the distance +inf (inner product: -inf).

    Raises:
        TypeError: not a tensor, or another dtype.
        ValueError: another shape or device, k below 1, an unknown metric.

    Source: paper, section 3.3 (weight transfer by nearest neighbour).
    """
    require_choice("backend", backend, BACKENDS)
    require_int("k", k, 1)
    require_choice("metric", metric, ("l2", "ip"))
    sizes = Dimensions()
    sizes.require("queries", queries, FLOATS, "B D")
    sizes.require("table", table, FLOATS, "N D")
    if squares is not None:
        sizes.require("squares", squares, FLOATS, "N")
    shape = (sizes["B"], k)
    return Outputs(queries, (shape, accumulator(queries, table)), (shape, torch.int64))
