"""From a batch's embeddings to the grad-weights of its nearest rows: exactly, or through FAISS."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from gcfast._extras import import_faiss
from gcfast.builder.given.on_demand import OnDemandDatabase
from gcfast.database.database import Database
from gcfast.database.index import rows_at
from gcfast.database.shards import Shard
from gcfast.errors import GcfastError
from gcfast.ops.precision import full_precision
from gcfast.search.faiss_gpu import in_turn
from gcfast.search.faiss_search import (
    ExactSearch,
    check_count,
    mean_distance,
    open_index,
    temperature,
    temperature_queries,
)
from gcfast.search.transferred import Tables, Transferred, from_tables, mixing_weights

if TYPE_CHECKING:
    from gcfast import _core

_Arrays = tuple[np.ndarray[Any, Any], ...]  # as the engine returns them
_Buffers = tuple[Tensor, Tensor, Tensor]  # channels, weights and offsets in pinned memory

COLUMNS = ("embeddings", "channels", "weights", "offsets", "labels")  # what the engine reads
MEMORY_BYTES = 64 * 2**20  # of temporary memory that the engine holds at once for one batch


class Transfer(Protocol):
    """Search in one database, and gather from it.

    Attributes:
        k: how many neighbors are searched for.
        labels: [N] of the rows on the device, or None where each batch brings its neighbors'.
    """

    k: int
    labels: Tensor | None

    def __call__(self, embeddings: Tensor) -> Transferred:
        """Look up unit embeddings [B, D] on the database's device."""

    def start(self, embeddings: Tensor) -> Callable[[], Transferred]:
        """Do the same in the background, where that gains anything.

        Returns:
            A function that waits for the result and returns it, or raises its exception.
        """


class ExactTransfer:
    """Exact search over the whole table on one device.

    Args:
        database: whose rows.
        device: where the table is kept and embeddings come from.
        k: neighbors.
    """

    def __init__(self, database: Database, device: torch.device, k: int) -> None:
        self.k = k
        self.on_demand = database if isinstance(database, OnDemandDatabase) else None
        rows = database if self.on_demand is None else self.on_demand.so_far
        self.tables = Tables(
            channels=rows.channels.to(device),
            weights=rows.weights.to(device),
            offsets=rows.offsets.to(device),
            labels=rows.labels.to(device),
        )
        self.labels: Tensor | None = self.tables.labels
        table = database.embeddings.to(device)
        self.search = ExactSearch(table)
        self.temperature = temperature(table, k) if k > 1 else 1.0

    def __call__(self, embeddings: Tensor) -> Transferred:
        """See :class:`Transfer`."""
        distances, neighbors = self.search(embeddings, self.k)
        return self.lent(distances, neighbors)

    def lent(self, distances: Tensor, neighbors: Tensor) -> Transferred:
        """Return what neighbors [B, K] at ``distances`` lend; makes rows that are on demand."""
        if self.on_demand is not None:
            rows = self.on_demand.make(neighbors)
            if neighbors.device.type != "cpu":  # whose tables are not the database's own
                for kept, own in zip(self.tables, self.on_demand.so_far[1:], strict=False):
                    kept[rows.to(kept.device)] = own[rows].to(kept.device)
        return from_tables(distances, neighbors, self.tables, self.temperature)

    def start(self, embeddings: Tensor) -> Callable[[], Transferred]:
        """See :class:`Transfer`: at once, since it runs where the model runs."""
        found = self(embeddings)
        return lambda: found


class IndexTransfer:
    """Search through a FAISS index and gather from the shards, in C++.

    What the index finds is measured again exactly (float32 differences, summed in double) and
    ordered by that, ties to the lower row, so that results do not depend on the number of threads.
    Transfers that are started run on one thread, in the order they came; the C++ runs without the
    interpreter lock, so that the model goes on meanwhile.

    Args:
        database: whose rows; they stay where they are, memory-mapped if they are.
        device: where embeddings come from and results go.
        k: neighbors.
        index: as :func:`gcfast.search.faiss_search.open_index`.
        ids: as there.

    Raises:
        MissingExtraError, TypeError, ValueError: as :func:`gcfast.search.faiss_search.open_index`.
    """

    def __init__(
        self, database: Database, device: torch.device, k: int, index: Any, ids: Any = None
    ) -> None:
        faiss = import_faiss("index")
        self.on_demand = database if isinstance(database, OnDemandDatabase) else None
        shards = database.shards if self.on_demand is None else [self.on_demand.so_far]
        self.k = k
        self.labels: Tensor | None = None
        # What float16 weights were multiplied by to keep their digits.
        self.weight_scale = database.weight_scale
        self.device = device
        self.index = open_index(index, shards, device, ids, k + 1)
        self.count = len(database)
        self.width = shards[0].channels.shape[1]
        # Rows of cotangents, if they are: gathered here.
        self.lent = shards if not self.width and shards[0].weights.shape[1] else None
        self.real_labels = shards[0].labels.is_floating_point()
        self.engine = make_engine(self.index, shards, threads=torch.get_num_threads())
        self._process = os.getpid()
        # FAISS keeps its number of threads per thread; a new one starts with the default.
        self._worker = ThreadPoolExecutor(
            1, "gcfast-transfer", faiss.omp_set_num_threads, (faiss.omp_get_max_threads(),)
        )
        self.temperature = 1.0
        if k > 1:
            # By the index too: an exact search among millions of rows would take minutes.
            queries = temperature_queries(shards).numpy()
            # The row itself is the nearest; a twin in its place has the same distance, 0.
            distances, _ = self.engine.search(queries, k=k + 1)
            self.temperature = mean_distance(torch.from_numpy(distances[:, k]))

    def __call__(self, embeddings: Tensor) -> Transferred:
        """See :class:`Transfer`.

        Raises:
            GcfastError: this process was forked from the one that made it.
            ValueError: the index has got or lost rows, or returned an id that is no row.
            Exception: whatever the index raises.
        """
        if self.device.type == "cuda":
            return self.start(embeddings)()
        self.check_process()
        queries = embeddings.detach().float().contiguous()
        return self._transferred(self._search(queries.numpy()))

    def start(self, embeddings: Tensor) -> Callable[[], Transferred]:
        """See :class:`Transfer`; raises GcfastError as a call does."""
        self.check_process()
        embeddings = embeddings.detach().float()
        if self.device.type != "cuda":
            queries = embeddings.contiguous()
            # They are read later, and the model may give the same memory again.
            if queries.data_ptr() == embeddings.data_ptr():
                queries = queries.clone()
            return partial(self._wait, self._worker.submit(self._search, queries.numpy()))
        with torch.cuda.device(self.device):
            B, M, K = len(embeddings), self.width, self.k
            pinned = (
                torch.empty(B * K * M, dtype=torch.int64, pin_memory=True),
                torch.empty(B * K * M, dtype=torch.float32, pin_memory=True),
                torch.empty(B, dtype=torch.float32, pin_memory=True),
            )
            queries = torch.empty(embeddings.shape, dtype=torch.float32, pin_memory=True)
            queries.copy_(embeddings, non_blocking=True)
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record()  # in order with the caller's stream
        found = self._worker.submit(self._search, queries.numpy(), pinned, copied)
        return partial(self._wait, found, pinned)

    def _wait(self, found: Future[_Arrays], pinned: _Buffers | None = None) -> Transferred:
        self.check_process()  # a forked process would wait for a thread it does not have
        return self._transferred(found.result(), pinned)

    def check_process(self) -> None:
        """Refuse a forked process, where FAISS's threads and the worker are missing.

        Raises:
            GcfastError: this process was forked from the one that made it.
        """
        if os.getpid() != self._process:
            raise GcfastError(
                f"the search through an index belongs to process {self._process} and cannot be "
                f"used in process {os.getpid()}, forked from it: make the Explainer after the "
                'fork, or start processes by "spawn"'
            )

    def _search(
        self,
        queries: np.ndarray[Any, Any],
        pinned: _Buffers | None = None,
        copied: torch.cuda.Event | None = None,
    ) -> _Arrays:
        if copied is not None:
            copied.synchronize()
        check_count(self.index, self.count)
        if self.on_demand is not None:
            _, rows = self.engine.search(queries, k=self.k)
            self.on_demand.make(torch.from_numpy(rows))
        return self.engine.transfer(
            queries,
            k=self.k,
            temperature=self.temperature,
            buffers=None if pinned is None else tuple(buffer.numpy() for buffer in pinned),
        )

    def _transferred(self, arrays: _Arrays, pinned: _Buffers | None = None) -> Transferred:
        tensors = [torch.from_numpy(array) for array in arrays]
        if self.lent is not None:
            neighbors = tensors[0]
            tensors[3] = torch.arange(neighbors.numel()).view(neighbors.shape)
            tensors[3] = torch.where(neighbors >= 0, tensors[3], -1)
            numbers = neighbors.flatten().clamp(min=0).numpy()
            tensors[5] = rows_at(self.lent, numbers, "weights").float()
        if pinned is not None:
            # The pinned tensors themselves: PyTorch must know when their copy is over.
            buffers = dict(zip(range(4, 7), pinned, strict=True))
            if self.lent is not None:
                del buffers[5]
            # The others pinned too: from elsewhere a copy may wait for the stream, and so for the
            # next batch.
            tensors = [
                buffers[i][: tensor.numel()].view(tensor.shape)
                if i in buffers
                else tensor.pin_memory()
                for i, tensor in enumerate(tensors)
            ]
        neighbors, distances, labels, rows, channels, weights, offsets = (
            tensor.to(self.device, non_blocking=pinned is not None) for tensor in tensors
        )
        if self.real_labels:
            labels = labels.view(torch.float64)
        mixing = None
        if self.width == 0 and self.k > 1:
            # Nothing was mixed: the rows have no channels, and their classes are mixed by this; NaN
            # is where no row was found.
            mixing = mixing_weights(distances, self.temperature).nan_to_num()
        if self.weight_scale != 1:
            weights, offsets = weights / self.weight_scale, offsets / self.weight_scale
        return Transferred(
            neighbors=neighbors,
            distances=distances,
            rows=rows,
            channels=channels,
            weights=weights,
            offsets=offsets,
            mixing=mixing,
            labels=labels,
        )


def make_engine(
    index: Any,
    shards: list[Shard],
    *,
    threads: int,
    memory_bytes: int = MEMORY_BYTES,
) -> _core.TransferEngine:
    """Make the C++ engine over an index of the shards' rows.

    Args:
        index: from :func:`gcfast.search.faiss_search.open_index`.
        shards: the rows.
        threads: of measuring and gathering. FAISS uses its own for the calling thread.
        memory_bytes: held at once beyond a batch's result; the batch is split to stay below
            (FAISS's own memory for a search shrinks with it, and is not counted). Rows that are
            mixed, for k > 1, are made in the result.
    """
    from gcfast import _core

    parts = []
    for shard in shards:
        if not shard.channels.shape[1]:  # cotangents, which it does not gather
            shard = shard._replace(weights=shard.weights[:, :0])
        tensors = [getattr(shard, name).detach().contiguous() for name in COLUMNS]
        if tensors[-1].is_floating_point():
            # The engine copies eight bytes per label, whatever they mean; its -1 for "none" is
            # all ones, which as float64 is NaN.
            tensors[-1] = tensors[-1].view(torch.int64)
        parts.append(tuple(tensor.numpy() for tensor in tensors))
    return _core.TransferEngine(
        in_turn(index),
        parts,
        dim=shards[0].embeddings.shape[1],
        width=shards[0].channels.shape[1],
        threads=threads,
        memory_bytes=memory_bytes,
    )


def make_transfer(
    database: Database, device: torch.device, k: int, index: Any, ids: Any = None
) -> Transfer:
    """Make the transfer that ``Explainer(index=…, ids=…)`` asks for."""
    with torch.no_grad(), full_precision(device):
        if isinstance(index, str) and index == "exact":
            return ExactTransfer(database, device, k)
        return IndexTransfer(database, device, k, index, ids)
