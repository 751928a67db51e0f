"""The rows of a database as tensors: shard by shard, a range of rows, or a whole column."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from gcfast.database.manifest import MADE_LABELS, RELATIVE
from gcfast.database.shards import MappedFile, Shard
from gcfast.errors import GcfastError

VERIFY_THREADS = 4


class Columns:
    """Rows in shards; any number of threads may read them.

    Args:
        shards: in order.
        manifest: the database's.
        unverified: files to compare with their checksums before the first use of any row.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        manifest: dict[str, Any],
        *,
        unverified: Sequence[MappedFile] = (),
    ) -> None:
        self.manifest = manifest
        self._shards = shards
        self._ends = list(accumulate((len(shard.labels) for shard in shards), initial=0))
        self._unverified = unverified
        self._columns: dict[str, Tensor] = {}
        self._lock = threading.RLock()

    def __len__(self) -> int:
        return self._ends[-1]

    @property
    def dim(self) -> int:
        """D, the size of an embedding."""
        return self._shards[0].embeddings.shape[1]

    @property
    def m(self) -> int:
        """M, how many channels a row keeps."""
        return self._shards[0].channels.shape[1]

    @property
    def storage(self) -> str:
        """How embeddings and weights are kept: "float32" or "float16"."""
        return str(self.manifest.get("storage", "float32"))

    @property
    def weight_scale(self) -> float:
        """The power of two that weights and offsets of ``shards`` are multiplied by; 1 mostly."""
        return float(self.manifest.get("weight_scale", 1.0))

    @property
    def relative(self) -> bool:
        """Whether each row's weights are known but for a positive factor.

        So are those of embeddings without their norms: a normalized map does not depend on it.
        """
        return bool(self.manifest.get(RELATIVE, False))

    def require_scale(self) -> None:
        """Raise ValueError where rows are ``relative``, for maps that are not normalized."""
        if self.relative:
            raise ValueError(
                "`normalize` must be 'max' or 'minmax' with this database, whose rows were made of "
                "embeddings without their norms and have no scale, got None: give `norms` or "
                "`pooled` to build_from_embeddings"
            )

    def warn_of_mixing(self, k: int, stacklevel: int) -> None:
        """Warn where k rows are mixed that are ``relative``."""
        if self.relative and k > 1:
            warnings.warn(
                f"the rows of this database have no scale of their own: with k={k} they are mixed "
                "as if all embeddings had been equally long before they were normalized (`norms` "
                "or `pooled` of build_from_embeddings tell)",
                stacklevel=stacklevel,
            )

    @property
    def made_labels(self) -> str | None:
        """What stands for labels that nobody gave ("neighbors:5", "kmeans:1000"), or None."""
        made: str | None = self.manifest.get(MADE_LABELS)
        return made

    def require_labels(self, what: str) -> None:
        """Raise GcfastError where labels are made, which no label of the caller's fits.

        Args:
            what: needs them, as the subject of a sentence.
        """
        if self.made_labels is not None:
            raise GcfastError(
                f"{what} needs labels, and those of this database are made of its embeddings "
                f"({self.made_labels}): build it with labels"
            )

    @property
    def shards(self) -> list[Shard]:
        """The rows as they are stored, shard by shard, without a copy.

        Raises:
            DamagedDatabaseError: a shard is not what was written, where checksums are compared at
                first use.
        """
        self._verify()
        return list(self._shards)

    def rows(self, start: int, stop: int) -> Shard:
        """Return consecutive rows as they are stored; a copy only where they span shards.

        Raises:
            DamagedDatabaseError: as ``shards``.
        """
        self._verify()
        pieces = []
        for (first, end), shard in zip(pairwise(self._ends), self._shards, strict=True):
            if first < stop and start < end:
                where = slice(max(start - first, 0), stop - first)
                pieces.append(Shard(*(column[where] for column in shard)))
        if len(pieces) == 1:
            return pieces[0]
        return Shard(*(torch.cat(parts) for parts in zip(*pieces, strict=True)))

    @property
    def embeddings(self) -> Tensor:
        """[N, D] float32 or float16."""
        return self._column("embeddings")

    @property
    def channels(self) -> Tensor:
        """[N, M] int64, by falling weight."""
        return self._column("channels")

    @property
    def weights(self) -> Tensor:
        """[N, M] float32, raw; [N, D] where they are cotangents."""
        return self._column("weights")

    @property
    def offsets(self) -> Tensor:
        """[N] float32."""
        return self._column("offsets")

    @property
    def labels(self) -> Tensor:
        """[N] int64; float64 where they are real numbers."""
        return self._column("labels")

    @property
    def triplet_counts(self) -> Tensor:
        """[N] int64."""
        return self._column("triplet_counts")

    def _column(self, name: str) -> Tensor:
        with self._lock:
            if name not in self._columns:
                parts = [getattr(shard, name) for shard in self.shards]
                column = parts[0] if len(parts) == 1 else torch.cat(parts)
                if name in ("weights", "offsets"):
                    column = column.float()
                    if self.weight_scale != 1:
                        column = column / self.weight_scale
                self._columns[name] = column
            return self._columns[name]

    def _verify(self) -> None:
        with self._lock:
            if self._unverified:
                with ThreadPoolExecutor(VERIFY_THREADS) as pool:
                    list(pool.map(MappedFile.verify, self._unverified))
                self._unverified = ()
