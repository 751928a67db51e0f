"""A database whose rows are made when they are first asked for."""

from __future__ import annotations

import math
import mmap
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gcfast.builder.describe import describe, identity, report_of
from gcfast.builder.embed import Embedded
from gcfast.builder.rows import ROWS_AT_ONCE, Rows
from gcfast.database.database import Database
from gcfast.database.shards import Shard
from gcfast.method.settings import Settings
from gcfast.model.network import Network


class OnDemandDatabase(Database):
    """Embeddings and labels, and rows that are made by the closed form when they are needed.

    A row is what a build would have made, with the same triplets, and is kept once it is made. A
    search needs its neighbors' rows alone (:meth:`make`, ``so_far``). Whatever asks for a column or
    for all rows gets all of them, made first: :meth:`save` takes as long as a build would have.

    Args:
        rows: what makes rows of images.
        images: [N] int64, the number of each row's image.
        ids: [N] strings.
        manifest: as of a build of these rows, its report without what is not known yet.
    """

    def __init__(
        self, rows: Rows, images: Tensor, ids: Sequence[str], manifest: dict[str, Any]
    ) -> None:
        N, embedded = len(images), rows.embedded
        everything = len(embedded.ids) == N
        table = Shard(
            embeddings=embedded.embeddings if everything else embedded.embeddings[images],
            channels=_untouched((N, rows.m), torch.int64),
            weights=_untouched((N, rows.width), torch.float32),
            offsets=_untouched((N,), torch.float32),
            labels=embedded.labels if everything else embedded.labels[images],
            triplet_counts=_untouched((N,), torch.int64),
        )
        super().__init__(table._asdict(), ids, manifest)
        self._source, self._images = rows, images
        self._made = torch.zeros(N, dtype=torch.bool)
        self._making = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as any database: by the folder it was saved to."""
        return Database.open, super().__reduce__()[1]

    @property
    def so_far(self) -> Shard:
        """The rows in one piece; of those that are not made yet embeddings and labels alone."""
        return self._shards[0]

    @property
    def made(self) -> int:
        """How many rows have been made."""
        return int(self._made.sum())

    @property
    def shards(self) -> list[Shard]:
        """See :class:`Database`; makes all rows."""
        self.make(torch.arange(len(self)))
        return super().shards

    def rows(self, start: int, stop: int) -> Shard:
        """See :class:`Database`; makes these rows."""
        self.make(torch.arange(start, min(stop, len(self))))
        return super().rows(start, stop)

    def make(self, rows: Tensor) -> Tensor:
        """Make rows that are not there yet; any number of threads may ask.

        Args:
            rows: int64 of any shape, numbers of rows; -1 for none.

        Returns:
            [n] int64 on the CPU, the same rows, rising and each once, all of which are there now.

        Raises:
            ValueError: NaN in a row's weights.
        """
        asked: Tensor = torch.unique(rows.cpu())
        asked = asked[asked >= 0]
        with self._making:
            missing = asked[~self._made[asked]]
            for start in range(0, len(missing), ROWS_AT_ONCE):
                self._make(missing[start : start + ROWS_AT_ONCE])
        return asked

    def _make(self, rows: Tensor) -> None:
        columns = self._source.of(self._images[rows])
        if not bool(columns["finite"].all()):
            bad = int(rows[~columns["finite"]][0])
            raise ValueError(f"`grad-weights` must be finite, got NaN or infinity in row {bad}")
        channels, values, table = columns["channels"], columns["values"], self.so_far
        table.channels[rows] = channels
        table.weights[rows] = values
        table.offsets[rows] = self._source.offsets(channels, values)
        table.triplet_counts[rows] = columns["counts"]
        report = self.manifest["report"]
        report["hardest_triplet"] += int((columns["counts"] == 0).sum())
        report["estimated_counts"] += int((~columns["exact"]).sum())
        report["zero_rows"] += int((values == 0).all(1).sum())
        self._made[rows] = True

    def _column(self, name: str) -> Tensor:
        if name in ("embeddings", "labels"):
            column: Tensor = getattr(self.so_far, name)
            return column
        return super()._column(name)


def on_demand(
    network: Network,
    embedded: Embedded,
    settings: Settings,
    preprocessing: dict[str, Any] | None = None,
) -> OnDemandDatabase:
    """Return a database of embeddings whose rows are made when they are asked for.

    Args:
        network: the model and its layer.
        embedded: the results of stage 1, with the common head.
        settings: of the rows.
        preprocessing: for the manifest.

    Raises:
        ValueError: settings by which an image may have no row, which shows only when it is made;
            no class of more than one image.
    """
    objective = settings.objective
    why = None
    if settings.is_proxy:
        why = "method='proxy', whose rows have no weights of their own"
    elif objective.real_labels or (objective.hinge is None and not objective.is_affine):
        why = f"{objective!r}, by which an image may have no row"
    elif settings.on_no_triplet == "skip" and not objective.is_affine:
        why = "on_no_triplet='skip', by which an image may have no row"
    if why is not None:
        raise ValueError(f"`rows` must be 'all' with {why}, got 'on-demand'")
    images = torch.arange(len(embedded.ids))
    if objective.pairs in ("triplet", "positive") and embedded.neighbors is None:
        _, inverse, seen = torch.unique(embedded.labels, return_inverse=True, return_counts=True)
        images = images[seen[inverse] > 1]
    report = report_of(embedded.labels, len(images), 0, 0, 0, settings, alone=embedded.alone)
    same = identity(network, settings, preprocessing, "float32")
    manifest = describe(network, embedded, same, report)
    ids = embedded.ids
    if len(images) < len(ids):
        ids = [ids[image] for image in images.tolist()]
    return OnDemandDatabase(Rows(network, embedded, settings), images, ids, manifest)


def _untouched(shape: tuple[int, int] | tuple[int], dtype: torch.dtype) -> Tensor:
    """Return zeros that take no memory before they are written.

    Not NumPy's, which asks for pages of 2 MiB: each row would have one cleared.
    """
    size = math.prod(shape) * dtype.itemsize
    if not size:
        return torch.zeros(shape, dtype=dtype)
    return torch.frombuffer(mmap.mmap(-1, size), dtype=dtype).view(shape)
