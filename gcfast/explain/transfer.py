"""From a batch's embeddings to the grad-weights of its nearest rows: exactly, or through FAISS."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from gcfast.database.database import Database
from gcfast.database.shards import Shard
from gcfast.explain.faiss_search import (
    ExactSearch,
    mean_distance,
    one_at_a_time,
    open_index,
    temperature,
    temperature_queries,
)
from gcfast.explain.maps import Tables, Transferred, from_tables
from gcfast.ops.precision import full_precision

if TYPE_CHECKING:
    from gcfast import _core

COLUMNS = ("embeddings", "channels", "weights", "offsets", "labels")  # what the engine reads
MEMORY_BYTES = 64 * 2**20  # of temporary memory that the engine holds at once for a batch


class Pending(Protocol):
    """A transfer under way."""

    def wait(self) -> Transferred:
        """What came of it, or its exception."""


class Transfer(Protocol):
    """Search in one database, and gather from it.

    Attributes:
        k: how many neighbors are searched for.
        labels: [N] of the rows on the device, or None where each batch brings its neighbors'.
    """

    k: int
    labels: Tensor | None

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
        self.tables = Tables(
            channels=database.channels.to(device),
            weights=database.weights.to(device),
            offsets=database.offsets.to(device),
            labels=database.labels.to(device),
        )
        self.labels: Tensor | None = self.tables.labels
        table = database.embeddings.to(device)
        self.search = ExactSearch(table)
        self.temperature = temperature(table, k) if k > 1 else 1.0

    def __call__(self, embeddings: Tensor) -> Transferred:
        """See :class:`Transfer`."""
        distances, neighbors = self.search(embeddings, self.k)
        return from_tables(distances, neighbors, self.tables, self.temperature)

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
        index: as :func:`gcfast.explain.faiss_search.open_index`.

    Raises:
        MissingExtraError, TypeError, ValueError: as :func:`gcfast.explain.faiss_search.open_index`.
    """

    def __init__(self, database: Database, device: torch.device, k: int, index: Any) -> None:
        shards = database.shards
        self.k = k
        self.labels: Tensor | None = None
        # What float16 weights were multiplied by to keep their digits.
        self.weight_scale = database.weight_scale
        self.device = device
        self.index = open_index(index, shards, device)
        self.width = shards[0].channels.shape[1]
        self.real_labels = shards[0].labels.is_floating_point()
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
        if self.real_labels:
            labels = labels.view(torch.float64)
        if self.weight_scale != 1:
            weights, offsets = weights / self.weight_scale, offsets / self.weight_scale
        return Transferred(
            neighbors=neighbors,
            distances=distances,
            rows=rows,
            channels=channels,
            weights=weights,
            offsets=offsets,
            mixing=None,
            labels=labels,
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
    index: Any,
    shards: list[Shard],
    *,
    threads: int,
    memory_bytes: int = MEMORY_BYTES,
) -> _core.TransferEngine:
    """The C++ engine over an index of the shards' rows.

    Args:
        index: from :func:`gcfast.explain.faiss_search.open_index`.
        shards: the rows.
        threads: of measuring and gathering. FAISS takes as many as it does in this thread.
        memory_bytes: what is held at once beyond a batch's result; the batch is split to stay below
            (FAISS's own memory for a search shrinks with it, and is not counted). Rows that are
            mixed, for k > 1, are made in the result.
    """
    import faiss

    from gcfast import _core

    parts = []
    for shard in shards:
        tensors = [getattr(shard, name).detach().contiguous() for name in COLUMNS]
        if tensors[-1].is_floating_point():
            # The engine moves eight bytes a label, whatever they mean; its -1 for "none" is all
            # ones, which as float64 is NaN.
            tensors[-1] = tensors[-1].view(torch.int64)
        parts.append(tuple(tensor.numpy() for tensor in tensors))
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
