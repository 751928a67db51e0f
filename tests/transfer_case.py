"""Tables, indices and brute force that the tests of the transfer share."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gcfast.database.database import Database
from gcfast.database.shards import Shard
from gcfast.search.transfer import IndexTransfer, make_engine

WIDTH, KEPT, CHANNELS = 16, 7, 20
CPU = torch.device("cpu")


def table(rows: int, *, half: bool = False) -> Shard:
    """Unit embeddings on a coarse grid (so that many distances tie), each row with its weights."""
    embeddings = torch.randint(-2, 3, (rows, WIDTH)).float() + 0.25
    embeddings = torch.nn.functional.normalize(embeddings, dim=1)
    channels = torch.rand(rows, CHANNELS).argsort(1)[:, :KEPT].contiguous()
    dtype = torch.float16 if half else torch.float32
    return Shard(
        embeddings.to(dtype),
        channels,
        torch.randn(rows, KEPT).to(dtype),
        torch.randn(rows),
        torch.randint(9, (rows,)),
        torch.ones(rows, dtype=torch.int64),
    )


def cut(whole: Shard, *ends: int) -> list[Shard]:
    """The rows in several shards that end where it is said."""
    starts = (0, *ends)
    return [
        Shard(*(tensor[a:b].clone() for tensor in whole))
        for a, b in zip(starts, (*ends, len(whole.labels)), strict=True)
    ]


def flat(whole: Shard) -> Any:
    import faiss

    index = faiss.IndexFlatL2(WIDTH)
    index.add(whole.embeddings.float().numpy())
    return index


def engine(index: Any, shards: list[Shard], **options: Any) -> Any:
    return make_engine(index, shards, **{"threads": 2, **options})


def transfer(
    index: Any, whole: Shard, k: int = 1, *, device: torch.device = CPU, ids: Any = None
) -> IndexTransfer:
    """A transfer from a database of these rows."""
    database = Database(whole._asdict(), [str(row) for row in range(len(whole.labels))], {})
    return IndexTransfer(database, device, k, index, ids)


def queries(count: int) -> np.ndarray[Any, Any]:
    return torch.nn.functional.normalize(torch.randn(count, WIDTH), dim=1).numpy()


def exact_distances(asked: np.ndarray[Any, Any], whole: Shard) -> np.ndarray[Any, Any]:
    """[B, N] float64."""
    rows = whole.embeddings.double().numpy()
    return ((asked[:, None].astype(np.float64) - rows[None]) ** 2).sum(2)


def assert_nearest(
    found: np.ndarray[Any, Any], distances: np.ndarray[Any, Any], wanted: np.ndarray[Any, Any]
) -> None:
    """The K nearest by rising distance, whichever of those that tie; wanted is [B, N]."""
    K = found.shape[1]
    order = np.sort(wanted, axis=1)[:, :K]
    np.testing.assert_allclose(distances, order, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        np.take_along_axis(wanted, found, 1), distances, rtol=1e-5, atol=1e-6
    )
    assert all(len(set(row)) == K for row in found.tolist())
    # Of equal distances the lower row comes first.
    tied = np.diff(distances, axis=1) == 0
    assert (np.diff(found, axis=1)[tied] > 0).all()


class Scripted:
    """Stands where a FAISS index does, and answers as it is told to."""

    def __init__(self, rows: int, answer: Callable[[Tensor, int], Any]) -> None:
        self.d, self.ntotal, self.answer = WIDTH, rows, answer

    def search_c(self, n: int, x: Any, k: int, distances: Any, ids: Any) -> None:
        del distances
        asked = (ctypes.c_float * (n * self.d)).from_address(int(x))
        given = (ctypes.c_int64 * (n * k)).from_address(int(ids))
        answer = self.answer(torch.tensor(asked[:]).view(n, self.d), k)
        np.ctypeslib.as_array(given)[:] = np.asarray(answer).reshape(-1)


def answering(rows: Tensor, answer: Callable[[np.ndarray[Any, Any], int], Any]) -> Any:
    """A FAISS index of rows that finds what it is told to."""
    import faiss

    class Answering(faiss.IndexFlatL2):  # type: ignore[misc]
        def search(self, queries: np.ndarray[Any, Any], k: int) -> Any:  # type: ignore[override]
            found = np.asarray(answer(queries, k)).reshape(len(queries), k)
            return np.zeros(found.shape, np.float32), found

    index = Answering(rows.shape[1])
    index.add(rows.float().numpy())
    return index
