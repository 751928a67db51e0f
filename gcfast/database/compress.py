"""The paper's compressed database: k-means centres in the place of rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from gcfast import ops
from gcfast._checks import require_int
from gcfast._extras import import_faiss
from gcfast.database.members import Members
from gcfast.database.shards import Shard

if TYPE_CHECKING:
    from gcfast.database.database import Database

SAMPLE_EACH = 256  # rows a centre that k-means is trained on; FAISS takes no more of its own
ROWS_AT_ONCE = 16_384
CENTRES_AT_ONCE = 1024


def compressed(database: Database, centers: int, *, seed: int, iterations: int) -> Database:
    """A database of k-means centres; see :meth:`gcfast.Database.compress`."""
    from gcfast.database.database import Database

    require_int("centers", centers, 1, len(database))
    require_int("seed", seed, 0, 2**31 - 1)
    require_int("iterations", iterations, 1)
    if "compressed" in database.manifest:
        raise ValueError("`database` must be a whole one, got one of centres already")
    centroids = _centroids(database, centers, seed, iterations)
    assignment, distances = _assigned(database, centroids)
    # FAISS splits clusters that run empty while it trains; one may still be, at the end.
    full = torch.bincount(assignment, minlength=centers) > 0
    assignment = (full.cumsum(0) - 1)[assignment]
    embeddings = centroids[full]
    counts = torch.bincount(assignment)
    weights = _mean_weights(database, assignment, counts)
    mean = torch.tensor(database.manifest["mean_activation"], dtype=torch.float64)
    channels, kept = _strongest(weights, database.m)
    tensors = Shard(
        embeddings=embeddings,
        channels=channels,
        weights=kept,
        offsets=(kept * mean[channels]).sum(1).float(),
        labels=_labels(assignment, counts, database.labels),
        triplet_counts=torch.zeros_like(counts).index_add_(0, assignment, database.triplet_counts),
    )
    # A distance to a centre says something else than one to a row.
    dropped = ("index", "shards", "older_rows", "weight_scale", "calibration")
    manifest = {key: value for key, value in database.manifest.items() if key not in dropped}
    manifest |= {
        "storage": "float32",
        "compressed": {
            "rows": len(database),
            "centers": len(counts),
            "seed": seed,
            "iterations": iterations,
            "counts": counts.tolist(),
        },
    }
    nearest = _nearest_members(assignment, distances, len(counts))
    ids = [database.ids[row] for row in nearest.tolist()]
    one = Database(tensors._asdict(), ids, manifest)
    one.members = Members.of(assignment, len(counts), database.ids)
    return one


def _pieces(database: Database) -> Iterator[tuple[int, Shard]]:
    """(first row, some rows) after one another."""
    first = 0
    for shard in database.shards:
        for start in range(0, len(shard.labels), ROWS_AT_ONCE):
            piece = Shard(*(column[start : start + ROWS_AT_ONCE] for column in shard))
            yield first + start, piece
        first += len(shard.labels)


def _centroids(database: Database, centers: int, seed: int, iterations: int) -> Tensor:
    """[centers, D] float32, by FAISS k-means on a sample of SAMPLE_EACH rows a centre."""
    faiss = import_faiss("compress")
    N, wanted = len(database), SAMPLE_EACH * centers
    chosen = np.arange(N)
    if wanted < N:
        chosen = np.sort(np.random.default_rng(seed).choice(N, wanted, replace=False))
    sample = np.empty((len(chosen), database.dim), dtype=np.float32)
    for first, piece in _pieces(database):
        low, high = np.searchsorted(chosen, [first, first + len(piece.labels)])
        sample[low:high] = piece.embeddings[chosen[low:high] - first].float().numpy()
    kmeans = faiss.Kmeans(
        database.dim,
        centers,
        niter=iterations,
        seed=seed,
        min_points_per_centroid=1,  # it would only warn, on standard output
        max_points_per_centroid=SAMPLE_EACH,
    )
    kmeans.train(sample)
    return torch.from_numpy(kmeans.centroids.copy())


def _assigned(database: Database, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """(nearest centre [N] int64, squared L2 distance to it [N]); ties to the smaller number."""
    index = import_faiss("compress").IndexFlatL2(database.dim)
    index.add(centroids.numpy())
    assignment = torch.empty(len(database), dtype=torch.int64)
    distances = torch.empty(len(database))
    for first, piece in _pieces(database):
        rows = piece.embeddings.float()
        ids = torch.from_numpy(index.search(rows.numpy(), 1)[1][:, 0])
        assignment[first : first + len(ids)] = ids
        distances[first : first + len(ids)] = (rows - centroids[ids]).square().sum(1)
    return assignment, distances


def _mean_weights(database: Database, assignment: Tensor, counts: Tensor) -> Tensor:
    """[centres, C] float64: each cluster's mean, 0 for a channel that a row did not keep."""
    C = len(database.manifest["mean_activation"])
    sums = torch.zeros(len(counts) * C, dtype=torch.float64)
    for first, piece in _pieces(database):
        centres = assignment[first : first + len(piece.labels), None]
        where = (centres * C + piece.channels).flatten()
        sums.index_add_(0, where, piece.weights.double().flatten())
    return sums.view(-1, C).div_(counts[:, None] * database.weight_scale)


def _strongest(weights: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """(channels [centres, M] int64, weights [centres, M] float32), by falling weight."""
    parts = [
        ops.top_m(weights[start : start + CENTRES_AT_ONCE].float(), m)
        for start in range(0, len(weights), CENTRES_AT_ONCE)
    ]
    channels, kept = zip(*parts, strict=True)
    return torch.cat(channels), torch.cat(kept)


def _labels(assignment: Tensor, counts: Tensor, labels: Tensor) -> Tensor:
    """The most frequent label of each centre's rows [centres], ties to the smaller; numbers' mean.

    A majority of prices would be any of them.
    """
    if labels.is_floating_point():
        return labels.new_zeros(len(counts)).index_add_(0, assignment, labels) / counts
    pairs: Any = np.stack([assignment.numpy(), labels.numpy()], 1)
    pairs, seen = np.unique(pairs, axis=0, return_counts=True)
    order = np.lexsort((pairs[:, 1], -seen, pairs[:, 0]))
    _, first = np.unique(pairs[order, 0], return_index=True)
    return torch.from_numpy(pairs[order[first], 1])


def _nearest_members(assignment: Tensor, distances: Tensor, centres: int) -> Tensor:
    """The row nearest to each centre [centres]; ties to the smaller row."""
    order: Any = np.lexsort((distances.numpy(), assignment.numpy()))
    _, first = np.unique(assignment.numpy()[order], return_index=True)
    assert len(first) == centres
    return torch.from_numpy(order[first])
