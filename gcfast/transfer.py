"""From a batch's embeddings to the grad-weights of its nearest rows: exactly, or through FAISS."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from gcfast.database import Database
from gcfast.mapped import Mappings
from gcfast.precision import full_precision
from gcfast.search import (
    ExactSearch,
    Shard,
    mean_distance,
    one_at_a_time,
    open_index,
    shards_of,
    temperature,
    temperature_queries,
)

if TYPE_CHECKING:
    from gcfast import _core

COLUMNS = ("embeddings", "channels", "weights", "offsets", "labels")  # what the engine reads
MEMORY_BYTES = 64 * 2**20  # of temporary memory that the engine holds at once for a batch


@dataclass(frozen=True)
class Transferred:
    """What a batch takes from the database, on the embeddings' device.

    ``rows``, ``channels``, ``weights``, ``offsets`` and ``mixing`` are as ``ops.sparse_cam`` takes
    them: the whole table with each neighbour's row and share, or, through an index, a small table
    of one row an image. Such a row is the neighbour's own for K = 1; for K > 1 it is the mixture of
    all: each of their channels once, with the sum of its weights times the neighbours' shares.
    """

    neighbors: Tensor  # [B, K] int64, rows of the database; -1: none
    distances: Tensor  # [B, K] float32, squared L2; +inf where there is none
    labels: Callable[[], Tensor]  # [B, K] int64, of the neighbours; -1 where there is none
    rows: Tensor  # [B, K or 1] int64, rows of the table below; -1: none
    channels: Tensor  # [N or B, M or more] int64
    weights: Tensor  # the same shape, floating point
    offsets: Tensor  # [N or B] float32
    mixing: Tensor | None  # [B, K]; None: one row, or those found equally


class Pending(Protocol):
    """A transfer under way."""

    def wait(self) -> Transferred:
        """What came of it, or its exception."""


class Transfer(Protocol):
    """Search in one database, and gather from it."""

    dim: int  # D

    def __call__(self, embeddings: Tensor) -> Transferred:
        """Of unit embeddings [B, D] on the database's device."""

    def start(self, embeddings: Tensor) -> Pending:
        """The same in the background, as far as that is any use."""


class _Done:
    def __init__(self, value: Transferred) -> None:
        self._value = value

    def wait(self) -> Transferred:
        return self._value


class ExactTransfer:
    """Exact search over the whole table on one device.

    Args:
        database: whose rows.
        device: where the table is kept and embeddings come from.
        k: neighbours.
    """

    def __init__(self, database: Database, device: torch.device, k: int) -> None:
        self.k = k
        self.channels = database.channels.to(device)
        self.weights = database.weights.to(device)
        self.offsets = database.offsets.to(device)
        self.labels = database.labels.to(device)
        table = database.embeddings.to(device)
        self.dim = table.shape[1]
        self.search = ExactSearch(table)
        self.temperature = temperature(table, k) if k > 1 else 1.0
        self.files = Mappings().files(
            (table, self.channels, self.weights, self.offsets, self.labels)
        )

    def __call__(self, embeddings: Tensor) -> Transferred:
        """See :class:`Transfer`; DamagedDatabaseError where a mapped file was cut short."""
        for file in self.files:
            file.check()
        distances, neighbors = self.search(embeddings, self.k)
        mixing = None
        if self.k > 1:
            scale = max(self.temperature, torch.finfo(torch.float32).tiny)
            # From the nearest on, so that where τ is 0 (a table of twins) that one weighs 1.
            beyond = distances - distances[:, :1]
            mixing = torch.softmax(-beyond / scale, dim=1)

        def labels() -> Tensor:
            return torch.where(neighbors >= 0, self.labels[neighbors.clamp(min=0)], -1)

        return Transferred(
            neighbors=neighbors,
            distances=distances,
            labels=labels,
            rows=neighbors,
            channels=self.channels,
            weights=self.weights,
            offsets=self.offsets,
            mixing=mixing,
        )

    def start(self, embeddings: Tensor) -> Pending:
        """See :class:`Transfer`: at once, since it runs on the device that the model runs on."""
        return _Done(self(embeddings))


class IndexTransfer:
    """Search through a FAISS index and gather from the shards, in C++.

    What the index finds is measured again exactly (float32 differences, summed in double), ordered
    by that, ties to the lower row, and so a result does not depend on the number of threads.

    Args:
        database: whose rows; they stay where they are, memory-mapped if they are.
        device: where embeddings come from and results go.
        k: neighbours.
        index: as :func:`gcfast.search.open_index`.

    Raises:
        MissingExtraError, TypeError, ValueError: as :func:`gcfast.search.open_index`.
    """

    def __init__(self, database: Database, device: torch.device, k: int, index: Any) -> None:
        shards = shards_of(database)
        self.k = k
        self.device = device
        self.index = open_index(index, shards, device)
        self.dim, self.width = shards[0].embeddings.shape[1], shards[0].channels.shape[1]
        # Shards in float16 hold their weights times a power of two.
        self.weight_scale = float(getattr(database, "weight_scale", 1.0))
        self.engine = make_engine(self.index, shards, threads=torch.get_num_threads())
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
            DamagedDatabaseError: a shard was deleted or truncated.
            GcfastError: the process was forked since the index was first used.
            ValueError: the index returned what is no row.
            Exception: whatever the index raises.
        """
        if self.device.type == "cuda":
            return self.start(embeddings).wait()
        queries = embeddings.detach().float().contiguous().numpy()
        return self._transferred(
            self.engine.transfer(queries, k=self.k, temperature=self.temperature)
        )

    def start(self, embeddings: Tensor) -> Pending:
        """See :class:`Transfer`: on the engine's worker."""
        embeddings = embeddings.detach().float()
        if self.device.type != "cuda":
            queries = embeddings.contiguous()
            # The worker reads them later, and the model may give the same memory again.
            if queries.data_ptr() == embeddings.data_ptr():
                queries = queries.clone()
            ticket = self.engine.submit(queries.numpy(), k=self.k, temperature=self.temperature)
            return _Submitted(self, ticket, None)
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
            copied.record()
        ticket = self.engine.submit(
            queries.numpy(),
            k=self.k,
            temperature=self.temperature,
            buffers=tuple(buffer.numpy() for buffer in pinned),
            ready=copied.synchronize,  # in order with the caller's stream
        )
        return _Submitted(self, ticket, pinned)

    def _transferred(
        self,
        arrays: tuple[np.ndarray[Any, Any], ...],
        pinned: tuple[Tensor, Tensor, Tensor] | None = None,
    ) -> Transferred:
        tensors = [torch.from_numpy(array) for array in arrays]
        if pinned is not None:
            # The pinned tensors themselves: PyTorch must know when their copy is over.
            for i, buffer in zip(range(4, 7), pinned, strict=True):
                tensors[i] = buffer[: tensors[i].numel()].view(tensors[i].shape)
        neighbors, distances, labels, rows, channels, weights, offsets = (
            tensor.to(self.device, non_blocking=pinned is not None) for tensor in tensors
        )
        if self.weight_scale != 1:
            weights, offsets = weights / self.weight_scale, offsets / self.weight_scale
        return Transferred(
            neighbors=neighbors,
            distances=distances,
            labels=lambda: labels,
            rows=rows,
            channels=channels,
            weights=weights,
            offsets=offsets,
            mixing=None,
        )


class _Submitted:
    def __init__(
        self,
        transfer: IndexTransfer,
        ticket: _core.Ticket,
        pinned: tuple[Tensor, Tensor, Tensor] | None,
    ) -> None:
        self._transfer, self._ticket, self._pinned = transfer, ticket, pinned

    def wait(self) -> Transferred:
        return self._transfer._transferred(self._ticket.wait(), self._pinned)


def make_engine(
    index: Any, shards: list[Shard], *, threads: int, memory_bytes: int = MEMORY_BYTES
) -> _core.TransferEngine:
    """The C++ engine over an index of the shards' rows.

    Args:
        index: from :func:`gcfast.search.open_index`.
        shards: the rows; their mapped files are looked at before each gather.
        threads: of measuring and gathering. FAISS takes as many as it does in this thread.
        memory_bytes: what is held at once beyond a batch's result; the batch is split to stay below
            (FAISS's own memory for a search shrinks with it, and is not counted).
    """
    import faiss

    from gcfast import _core

    mappings = Mappings()
    parts = []
    for shard in shards:
        tensors = [getattr(shard, name).detach().contiguous() for name in COLUMNS]
        files = [(f.path, f.device, f.inode, f.bytes) for f in mappings.files(tensors)]
        parts.append((*(tensor.numpy() for tensor in tensors), files))
    # FAISS keeps its number of threads for each thread; the worker would start with its default.
    faiss_threads = faiss.omp_get_max_threads()
    return _core.TransferEngine(
        index,
        parts,
        dim=shards[0].embeddings.shape[1],
        width=shards[0].channels.shape[1],
        threads=threads,
        memory_bytes=memory_bytes,
        exclusive=one_at_a_time(index),
        on_worker_start=lambda: faiss.omp_set_num_threads(faiss_threads),
    )


def make_transfer(database: Database, device: torch.device, k: int, index: Any) -> Transfer:
    """The transfer that ``Explainer(index=…)`` asks for."""
    with torch.no_grad(), full_precision(device):
        if isinstance(index, str) and index == "exact":
            return ExactTransfer(database, device, k)
        return IndexTransfer(database, device, k, index)
