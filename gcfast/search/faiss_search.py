"""Finding the nearest rows of a database: exactly in PyTorch, or through a FAISS index."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from gcfast import ops
from gcfast._extras import import_faiss
from gcfast.database.index import as_array, made, rows_at, spread, spread_rows
from gcfast.database.shards import Shard
from gcfast.search.faiss_gpu import gpus_of, on_gpu, readable, turn
from gcfast.search.wrapped import Overridden, numbered, overrides_search

TEMPERATURE_ROWS = 1024  # rows that the mixing temperature is averaged over, evenly spread
NORM_ROWS = 1024  # rows whose norm is looked at, evenly spread
NORM_TOLERANCE = 1e-2  # of |row|: embeddings in float16 are within 1e-3
IDENTITY_ROWS = 1024  # rows that are looked for in an index of the caller's, evenly spread
IDENTITY_TOLERANCE = 1e-2  # of |row|: the same network in float16 or with TF32 is within 5e-3
# Share of these rows that a lossy index must hold as it encodes them: a row that was embedded on
# another device may fall on the other side of a border between two codes.
SAME_CODES = 0.9
SEARCHED_NEIGHBORS = 16  # among which a row must find itself, where an index gives no vectors back


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


def open_index(
    index: Any, shards: list[Shard], device: torch.device, ids: Any = None, k: int = 1
) -> Any:
    """Return a FAISS index of the shards' rows, whose ids are the rows' numbers.

    An index of the caller's is compared with IDENTITY_ROWS rows, evenly spread: the vector that it
    holds for a row must be the row, within IDENTITY_TOLERANCE of its length. A lossy index must
    hold what it makes of the row when it encodes it, for SAME_CODES of the rows. Where the index
    does not give its vectors back, the rows are searched for. :func:`check_count` notices a later
    change of the count; rows that are exchanged afterwards, at the same count, go unnoticed.

    Args:
        index: a factory string ("HNSW32", "IVF256,Flat", …; made, trained and filled here, on the
            device if FAISS and the index can), or a ``faiss.Index`` that holds the rows, or an
            empty trained one on the CPU, a copy of which is filled.
        shards: the rows.
        device: where the queries come from.
        ids: [N] whole numbers, the id of each row in the caller's index; None where they are the
            rows' numbers.
        k: neighbors that will be searched for, at most; GPUs have a limit.

    Raises:
        MissingExtraError: FAISS is not installed.
        ValueError: an unknown factory string; an index of another size, dimension or metric, or of
            other rows; an empty one that is not trained or takes no rows; one of inner products
            over rows that are not of unit length; ``ids`` that are not one a row.
        TypeError: neither a string nor an index; ``ids`` that are not whole numbers.
    """
    faiss = import_faiss("index")
    dim = shards[0].embeddings.shape[1]
    count = sum(len(shard.embeddings) for shard in shards)
    if isinstance(index, str):
        index = made(index, shards, name="index")
        return on_gpu(index, device, k) if device.type == "cuda" else index
    if not isinstance(index, faiss.Index):
        raise TypeError(
            "`index` must be 'exact', 'stored', a FAISS factory string or a faiss.Index, "
            f"got {type(index).__name__}"
        )
    if index.d != dim:
        raise ValueError(
            f"`index` must have the dimension of the database, {dim}, got {index.d}: make it of "
            "the database's embeddings"
        )
    _check_metric(faiss, index, shards)
    numbers = None if ids is None else _row_ids(ids, count)
    if index.ntotal == 0:
        return numbered(_filled(faiss, index, shards, numbers), numbers)
    if index.ntotal != count:
        raise ValueError(
            f"`index` must hold the database's {count} rows, got {index.ntotal}: add or remove "
            "rows until both have the same, or take index='Flat', which is made of the database"
        )
    with turn(gpus_of(index)):  # another Explainer may be searching in it
        _check_rows(faiss, index, shards, numbers)
    return numbered(Overridden(index) if overrides_search(index) else index, numbers)


def check_count(index: Any, count: int) -> None:
    """Refuse an index that has got or lost rows since :func:`open_index`.

    Raises:
        ValueError: it does not hold ``count`` rows.
    """
    if index.ntotal != count:
        raise ValueError(
            f"`index` must hold the database's {count} rows, as it did when it was given, got "
            f"{index.ntotal}: make an Explainer with an index and a database that agree"
        )


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


def _row_ids(ids: Any, count: int) -> np.ndarray[Any, Any]:
    """Return the index's id of each row, [N] int64, checked."""
    numbers = np.asarray(ids.detach().cpu() if isinstance(ids, Tensor) else ids)
    if not (numbers.dtype.kind in "iu" and numbers.ndim == 1):
        raise TypeError(
            f"`ids` must be [N] whole numbers, the index's id of each row, got "
            f"{numbers.dtype} of shape {list(numbers.shape)}"
        )
    if len(numbers) != count:
        raise ValueError(
            f"`ids` must have one id for each of the database's {count} rows, got {len(numbers)}"
        )
    numbers = numbers.astype(np.int64)
    order = np.sort(numbers)
    twice = order[1:][np.diff(order) == 0]
    if len(twice):
        raise ValueError(f"`ids` must be unique, got {twice[0]} for more than one row")
    if (order == -1).any():
        raise ValueError("`ids` must not hold -1, which FAISS returns for no row")
    return numbers


def _filled(faiss: Any, index: Any, shards: list[Shard], numbers: Any) -> Any:
    """Return a copy of the caller's empty index, with the rows in it."""
    count = sum(len(shard.embeddings) for shard in shards)
    empty = f"`index` must hold the database's {count} rows or take them, got an empty "
    empty += type(index).__name__
    if not index.is_trained:
        raise ValueError(f"{empty} that is not trained: train it, or give its factory string")
    if overrides_search(index):
        raise ValueError(
            f"{empty}, which overrides `search` and cannot be copied: add the database's "
            "embeddings to it"
        )
    if gpus_of(index):
        raise ValueError(
            f"{empty} on a GPU, which FAISS does not copy: add the database's embeddings to it"
        )
    try:
        index = faiss.clone_index(index)
        if numbers is None and not isinstance(index, faiss.IndexIDMap):
            for shard in shards:
                index.add(as_array(shard.embeddings))
            return index
        numbers, first = np.arange(count) if numbers is None else numbers, 0
        for shard in shards:
            stop = first + len(shard.embeddings)
            index.add_with_ids(as_array(shard.embeddings), numbers[first:stop])
            first = stop
    except RuntimeError as error:
        raise ValueError(f"{empty}: {error}") from error
    return index


def _check_rows(faiss: Any, index: Any, shards: list[Shard], numbers: Any) -> None:
    """Refuse an index of other rows, or of these under other ids; see :func:`open_index`."""
    count = sum(len(shard.labels) for shard in shards)
    asked = spread_rows(count, IDENTITY_ROWS).numpy()
    rows = as_array(rows_at(shards, asked))
    keys = asked if numbers is None else numbers[asked]
    right = None
    copy = readable(index)
    held = _held(faiss, copy, keys, rows)
    if held is not None:
        keys, vectors = held
        asked = _rows_of(keys, numbers, count)
        right = _same(faiss, copy, vectors, as_array(rows_at(shards, asked.clip(min=0))))
    if right is None or (overrides_search(index) and not right.all()):
        asked = spread_rows(count, IDENTITY_ROWS).numpy()
        keys = asked if numbers is None else numbers[asked]
        right = _finds_itself(index, rows, asked, shards, numbers)
    right &= asked >= 0
    if not right.all():
        at = int(np.flatnonzero(~right)[0])
        what = f"row {asked[at]}" if asked[at] >= 0 else "any row"
        raise ValueError(
            f"`index` must hold the database's rows, and what it has under id {keys[at]} is not "
            f"{what}: make it of the database's embeddings in their order, say with `ids` which "
            "id each row has in it, or take index='Flat'"
        )


def _rows_of(keys: Any, numbers: Any, count: int) -> np.ndarray[Any, Any]:
    """Return the rows of an index's ids, -1 where an id is no row's."""
    if numbers is None:
        return np.where((keys >= 0) & (keys < count), keys, -1)
    order = numbers.argsort()
    places = order[np.searchsorted(numbers, keys, sorter=order).clip(max=count - 1)]
    return np.where(numbers[places] == keys, places, -1)


def _held(faiss: Any, index: Any, keys: Any, rows: Any) -> tuple[Any, Any] | None:
    """Return (ids [n], vectors [n, D]) of an index; None where it does not give its vectors.

    They are those under the keys, or, of an index that does not find a vector by its id, those
    that a search for the rows finds; -1 is an id of none.
    """
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexIDMap):
        ids = faiss.vector_to_array(index.id_map)
        places = _rows_of(keys, ids, len(ids))
        if (places < 0).any():
            return keys, np.where((places < 0)[:, None], np.nan, rows)
        inner = _held(faiss, index.index, places, rows)
        return None if inner is None else (np.where(inner[0] < 0, -1, ids[inner[0]]), inner[1])
    try:
        # A flat index reads whatever is at such a place, and on a GPU that ends the process.
        if isinstance(index, faiss.IndexIVF) or (keys.min() >= 0 and keys.max() < index.ntotal):
            # Of more than 1000 FAISS asks from several threads, which ends the process on a GPU.
            parts = np.array_split(keys, -(-len(keys) // 1000))
            return keys, np.concatenate([index.reconstruct_batch(part) for part in parts])
    except RuntimeError:
        pass
    try:
        _, found, vectors = index.search_and_reconstruct(rows, 1)
        return found[:, 0], vectors[:, 0]
    except RuntimeError:
        return None


def _same(faiss: Any, index: Any, vectors: Any, rows: Any) -> np.ndarray[Any, Any] | None:
    """Whether an index holds these rows [n] bool; None where it is lossy and cannot tell."""

    def near(vectors: Any, rows: Any) -> np.ndarray[Any, Any]:
        # What FAISS below 1.14 gives for a refined index may be no numbers at all.
        with np.errstate(over="ignore", invalid="ignore"):
            distances = np.linalg.norm(vectors - rows, axis=1)
            return np.asarray(distances <= IDENTITY_TOLERANCE * np.linalg.norm(rows, axis=1))

    right = near(vectors, rows)
    if right.all():
        return right
    index = faiss.downcast_index(index)
    while isinstance(index, (faiss.IndexIDMap, faiss.IndexHNSW)):
        index = index.index if isinstance(index, faiss.IndexIDMap) else index.storage
        index = faiss.downcast_index(index)
    if hasattr(faiss, "GpuIndexFlat") and isinstance(index, faiss.GpuIndexFlat):
        return right  # not lossy
    try:
        decoded = index.sa_decode(index.sa_encode(rows))
    except RuntimeError:
        return None
    if near(decoded, rows).all():
        return right  # not lossy, and so other rows
    coded = near(vectors, decoded)
    return np.ones_like(coded) if coded.mean() >= SAME_CODES else coded


def _finds_itself(
    index: Any, rows: Any, asked: Any, shards: list[Shard], numbers: Any
) -> np.ndarray[Any, Any]:
    """Whether an index finds each of these rows [n] bool, as far as a search can tell.

    One that is not lossy must find SAME_CODES of them in the first place; a lossy one must find
    half of them among SEARCHED_NEIGHBORS, and in the first place the rows more often than those
    before or after them, which it would find if a row were missing from it.
    """
    count = sum(len(shard.labels) for shard in shards)
    _, ids = index.search(rows, min(count, SEARCHED_NEIGHBORS))
    found = _rows_of(ids, numbers, count)
    first = found[:, 0]
    twins = np.linalg.norm(as_array(rows_at(shards, first.clip(min=0))) - rows, axis=1)
    itself = (twins <= IDENTITY_TOLERANCE * np.linalg.norm(rows, axis=1)) & (first >= 0)
    among = (found == asked[:, None]).any(1)
    others = max((first == asked - 1).mean(), (first == asked + 1).mean())
    if itself.mean() >= SAME_CODES or (among.mean() >= 0.5 and itself.mean() > others):
        return np.ones(len(rows), dtype=bool)
    return np.asarray(itself)
