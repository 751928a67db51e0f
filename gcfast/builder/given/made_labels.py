"""What stands for labels where there are none: an image's neighbors, or k-means clusters."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

import torch
from torch import Tensor

from gcfast._checks import require_int
from gcfast._extras import import_faiss
from gcfast.database.compress import clusters
from gcfast.method.neighbors import Neighbors, Search
from gcfast.method.settings import Settings

NEIGHBORS, KMEANS = "neighbors", "kmeans"
POSITIVES = 5  # of "neighbors" alone
# Tables of up to so many rows are searched exactly; larger ones through inverted lists.
EXACT_ROWS = 100_000
PROBES = 16  # of the lists that are searched
TRAINING_PER_LIST = 64


class MadeLabels(NamedTuple):
    """Labels that nobody gave."""

    numbers: Tensor  # [N] int64
    names: list[str]
    neighbors: Neighbors | None
    described: str  # for the manifest


def is_made(labels: object) -> bool:
    """Whether this names a way to make labels, rather than being some."""
    return isinstance(labels, str)


def make_labels(how: str, table: Tensor, settings: Settings) -> MadeLabels:
    """Make labels of embeddings.

    Args:
        how: "neighbors" or "neighbors:K", "kmeans:CENTERS".
        table: [N, D] float32, the embeddings as they are compared.
        settings: of the build.

    Raises:
        ValueError: another name, a number that does not fit the table, or settings that need
            classes, or real labels.
        MissingExtraError: FAISS is needed, and not installed.
    """
    known = re.fullmatch(rf"({NEIGHBORS}|{KMEANS})(?::(\d+))?", how)
    if known is None or (known[1] == KMEANS and known[2] is None):
        raise ValueError(
            "`labels` must be one label a row, or 'neighbors', 'neighbors:3' or 'kmeans:1000' "
            f"where there are none, got {how!r}"
        )
    N, objective = len(table), settings.objective
    if objective.real_labels:
        raise ValueError(f"`labels` must be given for {objective!r}, got {how!r}")
    if known[1] == KMEANS:
        import_faiss("labels")
        centers = require_int("labels", int(known[2]), 2, N)
        numbers = clusters(table, centers, seed=settings.seed % 2**31)
        names = [f"cluster {number}" for number in range(centers)]
        return MadeLabels(numbers, names, None, how)
    if settings.is_proxy or objective.hinge is None:
        what = "method='proxy'" if settings.is_proxy else repr(objective)
        raise ValueError(
            f"`labels` must be labels or 'kmeans:…' with {what}, which needs classes, got {how!r}"
        )
    if settings.method == "gradcam++" and settings.triplets == "all":
        raise ValueError(
            "`triplets` must be a number for gradcam++ with labels='neighbors', got 'all'"
        )
    positives = require_int("labels", int(known[2] or POSITIVES), 1, max(1, N - 2))
    neighbors = Neighbors(positives, None if N <= EXACT_ROWS else _through_lists(table))
    return MadeLabels(torch.arange(N), [], neighbors, f"{NEIGHBORS}:{positives}")


def _lists(rows: int) -> int:
    """Return into how many lists rows are sorted."""
    return 4 * math.isqrt(rows)


def _through_lists(table: Tensor) -> Search:
    """Return a search in inverted lists: exact ones for all rows cost their number squared."""
    faiss = import_faiss("labels")
    count = _lists(len(table))
    index = faiss.index_factory(table.shape[1], f"IVF{count},Flat")
    generator = torch.Generator().manual_seed(0)
    some = torch.randperm(len(table), generator=generator)[: TRAINING_PER_LIST * count]
    index.train(table[some.sort().values].numpy())
    index.add(table.numpy())
    index.nprobe = PROBES

    def search(queries: Tensor, k: int) -> Tensor:
        found = index.search(queries.detach().cpu().contiguous().numpy(), k)[1]
        return torch.from_numpy(found).to(queries.device)

    return search
