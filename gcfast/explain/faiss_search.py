"""Finding the nearest rows of a database: exactly in PyTorch, or through a FAISS index."""

from __future__ import annotations

import ctypes
import math
import threading
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gcfast import ops
from gcfast._extras import import_faiss
from gcfast.database.index import as_array, made, spread, spread_rows
from gcfast.database.shards import Shard

TEMPERATURE_ROWS = 1024  # rows that the mixing temperature is averaged over, evenly spread
NORM_ROWS = 1024  # rows whose norm is looked at, evenly spread
NORM_TOLERANCE = 1e-2  # of |row|: embeddings in float16 are within 1e-3


class ExactSearch:
    """Exact search over a table [N, D] on its device.

    Args:
        table: float32 or float16.
    """

    def __init__(self, table: Tensor) -> None:
        self.table = table
        dtype = torch.promote_types(table.dtype, torch.float32)
        self.squares = torch.linalg.vector_norm(table, dim=1, dtype=dtype).square()

    def __call__(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Return (squared L2 distances [B, K] float32, rows [B, K] int64); +inf and -1 for none.

        The caller has turned gradients and autocast off.

        Raises:
            ValueError: queries of another width than the table's.
        """
        # The table was checked when it was built; only the model's output can be wrong.
        fits = queries.ndim == 2 and queries.shape[1] == self.table.shape[1]
        search = ops.knn.trusted if fits else ops.knn
        return search(queries, self.table, k, squares=self.squares)


def open_index(index: Any, shards: list[Shard], device: torch.device) -> Any:
    """Return a FAISS index that holds the rows of the shards, in order.

    Args:
        index: a factory string ("HNSW32", "IVF256,Flat", …: made, trained and filled here, and
            moved to the device if FAISS can), a ``faiss.Index`` that holds the rows in order, or
            an empty trained one, which is filled.
        shards: the rows.
        device: where the queries come from.

    Raises:
        MissingExtraError: FAISS is not installed.
        ValueError: an unknown factory string; an index of another size, dimension or metric; an
            empty index that is not trained or takes no rows; inner products over rows that are not
            of unit length.
        TypeError: neither a string nor an index.
    """
    faiss = import_faiss("index")
    dim = shards[0].embeddings.shape[1]
    count = sum(len(shard.embeddings) for shard in shards)
    ours = isinstance(index, str)
    if ours:
        index = made(index, shards, name="index")
    elif not isinstance(index, faiss.Index):
        raise TypeError(
            "`index` must be 'exact', 'stored', a FAISS factory string or a faiss.Index, "
            f"got {type(index).__name__}"
        )
    if index.d != dim:
        raise ValueError(f"`index` must have the dimension of the database, {dim}, got {index.d}")
    _check_metric(faiss, index, shards)
    if index.ntotal == 0:
        if not index.is_trained:
            raise ValueError(
                f"`index` must hold the database's {count} rows or be trained to take them, got an "
                f"empty {type(index).__name__} that is not trained"
            )
        try:
            for shard in shards:
                index.add(as_array(shard.embeddings))
        except RuntimeError as error:  # an index that wants ids, for example
            raise ValueError(
                f"`index` must hold the database's {count} rows or take them, got an empty "
                f"{type(index).__name__}: {error}"
            ) from error
    if index.ntotal != count:
        raise ValueError(f"`index` must hold the database's {count} rows, got {index.ntotal}")
    if ours and device.type == "cuda":
        index = _on_gpu(faiss, index, device)
    return _Overridden(index) if _overrides_search(index) else index


def one_at_a_time(index: Any) -> bool:
    """Whether an index runs on a GPU, wholly or in part, and so allows one thread at a time."""
    faiss = import_faiss("index")
    if not hasattr(faiss, "GpuIndex"):
        return False
    if isinstance(index, _Overridden):
        index = index.index
    index = faiss.downcast_index(index) if hasattr(index, "this") else index
    if isinstance(index, faiss.GpuIndex):
        return True
    parts = [getattr(index, name) for name in ("index", "base_index") if hasattr(index, name)]
    if hasattr(index, "at") and hasattr(index, "count"):
        parts += [index.at(i) for i in range(index.count())]
    return any(one_at_a_time(part) for part in parts)


def temperature(table: Tensor, k: int) -> float:
    """Return the mean squared L2 distance of a row to its k-th nearest other row.

    It is taken over at most TEMPERATURE_ROWS rows, evenly spread.
    """
    rows = spread_rows(len(table), TEMPERATURE_ROWS)
    # The row itself is the nearest; a twin in its place has the same distance, 0.
    distances, _ = ops.knn(table[rows.to(table.device)], table, k + 1)
    return mean_distance(distances[:, k])


def temperature_queries(shards: list[Shard]) -> Tensor:
    """Return the rows [≤ TEMPERATURE_ROWS, D] that :func:`temperature` measures from."""
    return spread(shards, TEMPERATURE_ROWS).float()


def mean_distance(kth: Tensor) -> float:
    """Return the mean of the finite distances; 1 where there is none."""
    kth = kth[torch.isfinite(kth)]
    return float(kth.mean()) if len(kth) else 1.0


def _check_metric(faiss: Any, index: Any, shards: list[Shard]) -> None:
    if index.metric_type == faiss.METRIC_L2:
        return
    if index.metric_type != faiss.METRIC_INNER_PRODUCT:
        raise ValueError(
            "`index` must be of metric METRIC_L2, or METRIC_INNER_PRODUCT over rows of unit "
            f"length, got metric {index.metric_type}"
        )
    # Inner products order rows as distances do only where all rows are equally long.
    norms = torch.linalg.vector_norm(spread(shards, NORM_ROWS).float(), dim=1)
    if len(norms) and float((norms - 1).abs().max()) > NORM_TOLERANCE:
        raise ValueError(
            "`index` must be of metric METRIC_L2 where rows are not of unit length, got "
            f"METRIC_INNER_PRODUCT and rows of length {float(norms.min()):.3g} to "
            f"{float(norms.max()):.3g}"
        )


class _Overridden:
    """An index whose class overrides ``search`` in Python: calls that."""

    def __init__(self, index: Any) -> None:
        self.index = index

    def __getattr__(self, name: str) -> Any:
        return getattr(self.index, name)

    def search_c(self, n: int, queries: Any, k: int, distances: Any, ids: Any) -> None:
        """As FAISS's: through pointers."""
        D, I = self.index.search(_view(queries, ctypes.c_float, n, self.index.d), k)  # noqa: E741
        _view(distances, ctypes.c_float, n, k)[:] = D
        _view(ids, ctypes.c_int64, n, k)[:] = I


def _overrides_search(index: Any) -> bool:
    for kind in type(index).__mro__:
        if "search" in vars(kind):
            return not str(getattr(vars(kind)["search"], "__module__", "")).startswith("faiss")
    return False


def _view(pointer: Any, kind: Any, *shape: int) -> np.ndarray[Any, Any]:
    whole = (kind * math.prod(shape)).from_address(int(pointer))
    return np.ctypeslib.as_array(whole).reshape(shape)


_gpu = threading.local()


def _on_gpu(faiss: Any, index: Any, device: torch.device) -> Any:
    """Return the index on the device, or itself where FAISS has no GPU code for it."""
    number = device.index or 0
    if not hasattr(faiss, "StandardGpuResources") or number >= faiss.get_num_gpus():
        return index
    # They take about 0.1 s to make, and threads must not share them: one per thread and device.
    resources = vars(_gpu).setdefault("resources", {})
    if number not in resources:
        resources[number] = faiss.StandardGpuResources()
    try:
        return faiss.index_cpu_to_gpu(resources[number], number, index)
    except RuntimeError:  # HNSW, for example, has none
        return index
