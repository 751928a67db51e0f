"""Finding the nearest rows of a database: exactly in PyTorch, or through a FAISS index."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from gcfast import ops
from gcfast.errors import MissingExtraError

TEMPERATURE_ROWS = 1024  # rows that the mixing temperature is averaged over, evenly spread


class Search(Protocol):
    """Anything that finds nearest rows."""

    def __call__(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """(squared L2 distances [B, K] float32, rows [B, K] int64; +inf and -1 where none)."""


class ExactSearch:
    """Exact search over a table [N, D] on its device, tiled."""

    def __init__(self, table: Tensor) -> None:
        self.table = table
        self.squares = torch.linalg.vector_norm(table, dim=1).square()

    def __call__(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """See :class:`Search`."""
        return ops.knn(queries, self.table, k, squares=self.squares)


class FaissSearch:
    """Search through a FAISS index, whose candidates are measured again against the table.

    Args:
        index: a factory string ("HNSW32", "IVF256,Flat", …; made, trained and filled here), or a
            ``faiss.Index`` that holds the table's rows in order, or an empty trained one, which is
            filled.
        table: [N, D] float32 on any device.

    Raises:
        MissingExtraError: FAISS is not installed.
        ValueError: an unknown factory string, or an index of another size or dimension.
        TypeError: neither a string nor an index.
    """

    def __init__(self, index: Any, table: Tensor) -> None:
        faiss = _faiss()
        rows = np.ascontiguousarray(table.detach().float().cpu().numpy())
        if isinstance(index, str):
            try:
                index = faiss.index_factory(table.shape[1], index)
            except RuntimeError as error:
                raise ValueError(
                    f"`index` must be a FAISS factory string, got {index!r}: {error}"
                ) from error
            try:
                if not index.is_trained:
                    index.train(rows)
            except RuntimeError as error:
                raise ValueError(
                    f"`index` must be trainable on the database's {len(rows)} rows: {error}"
                ) from error
        elif not isinstance(index, faiss.Index):
            raise TypeError(
                f"`index` must be 'exact', a FAISS factory string or a faiss.Index, "
                f"got {type(index).__name__}"
            )
        if index.d != table.shape[1]:
            raise ValueError(
                f"`index` must have the dimension of the database, {table.shape[1]}, got {index.d}"
            )
        if index.ntotal == 0 and index.is_trained:
            index.add(rows)
        if index.ntotal != len(rows):
            raise ValueError(
                f"`index` must hold the database's {len(rows)} rows, got {index.ntotal}"
            )
        self.index = index
        self.table = table

    def __call__(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """See :class:`Search`; ordered by the exact distance to the rows that FAISS found."""
        _, found = self.index.search(np.ascontiguousarray(queries.float().cpu().numpy()), k)
        ids = torch.from_numpy(found).to(queries.device)
        rows = self.table[ids.clamp(min=0)].to(queries.device)
        distances = (rows - queries[:, None]).square().sum(-1)
        distances = distances.masked_fill(ids < 0, float("inf"))
        distances, order = distances.sort(dim=1, stable=True)
        return distances, ids.gather(1, order)


def make_search(index: Any, table: Tensor) -> Search:
    """The search that ``Explainer(index=…)`` asks for."""
    if isinstance(index, str) and index == "exact":
        return ExactSearch(table)
    return FaissSearch(index, table)


def temperature(table: Tensor, k: int) -> float:
    """The mean distance (squared L2) of a row to its k-th nearest other row.

    Over TEMPERATURE_ROWS rows spread evenly where there are more.
    """
    count = min(len(table), TEMPERATURE_ROWS)
    rows = torch.linspace(0, len(table) - 1, count, dtype=torch.float64).round().long()
    # The row itself is the nearest; a twin in its place has the same distance, 0.
    distances, _ = ops.knn(table[rows.to(table.device)], table, k + 1)
    kth = distances[:, k]
    kth = kth[torch.isfinite(kth)]
    return float(kth.mean()) if len(kth) else 1.0


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise MissingExtraError(
            "`index` needs FAISS, which is not installed: pip install 'gcfast[cpu]' "
            "(or 'gcfast[gpu]')"
        ) from error
    return faiss
