"""The paper's compressed database: k-means centers instead of rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gcfast import ops
from gcfast._checks import require_int
from gcfast._extras import import_faiss
from gcfast.database.manifest import CALIBRATION
from gcfast.database.members import Members
from gcfast.database.shards import Shard, offsets_of

SAMPLE_EACH = 256  # rows for each center that k-means is trained on; FAISS's own limit
ROWS_AT_ONCE = 16_384
ITERATIONS = 25  # of k-means
CENTERS_AT_ONCE = 1024


class Compressed(NamedTuple):
    """What makes a database of centers."""

    rows: Shard
    ids: list[str]
    manifest: dict[str, Any]
    members: Members


def compressed(
    shards: list[Shard],
    ids: Sequence[str],
    manifest: dict[str, Any],
    centers: int,
    *,
    seed: int,
    iterations: int,
) -> Compressed:
    """Compress a database's rows to k-means centers; see :meth:`gcfast.Database.compress`.

    Args:
        shards: the rows as they are stored.
        ids: theirs.
        manifest: the database's.
        centers: as for :meth:`gcfast.Database.compress`.
        seed: as there.
        iterations: as there.
    """
    N = len(ids)
    require_int("centers", centers, 1, N)
    require_int("seed", seed, 0, 2**31 - 1)
    require_int("iterations", iterations, 1)
    if "compressed" in manifest:
        raise ValueError("`database` must be a whole one, got one of centers already")
    centroids = _centroids(shards, centers, seed, iterations)
    assignment, distances = _assigned(shards, centroids)
    # FAISS splits clusters that run empty while it trains; one may still be, at the end.
    full = torch.bincount(assignment, minlength=centers) > 0
    assignment = (full.cumsum(0) - 1)[assignment]
    counts = torch.bincount(assignment)
    mean = torch.tensor(manifest["mean_activation"], dtype=torch.float64)
    m = shards[0].channels.shape[1]
    # Rows of class proxies have no weights, and those of cotangents no channels.
    C = len(mean) if m else shards[0].weights.shape[1]
    weights = _mean_weights(shards, C, assignment, counts)
    weights /= float(manifest.get("weight_scale", 1.0))
    channels, kept = torch.zeros((len(counts), 0), dtype=torch.int64), weights.float()
    if m:
        channels, kept = _strongest(weights, m)
    triplets = torch.cat([shard.triplet_counts for shard in shards])
    rows = Shard(
        embeddings=centroids[full],
        channels=channels,
        weights=kept,
        offsets=offsets_of(channels, kept, mean),
        labels=_labels(assignment, counts, torch.cat([shard.labels for shard in shards])),
        triplet_counts=torch.zeros_like(counts).index_add_(0, assignment, triplets),
    )
    # A distance to a center means something else than one to a row.
    dropped = ("index", "shards", "older_rows", "weight_scale", CALIBRATION)
    manifest = {key: value for key, value in manifest.items() if key not in dropped}
    manifest |= {
        "storage": "float32",
        "compressed": {
            "rows": N,
            "centers": len(counts),
            "seed": seed,
            "iterations": iterations,
            "counts": counts.tolist(),
        },
    }
    nearest = _nearest_members(assignment, distances, len(counts))
    members = Members.of(assignment, len(counts), ids)
    return Compressed(rows, [ids[row] for row in nearest.tolist()], manifest, members)


def clusters(table: Tensor, centers: int, *, seed: int) -> Tensor:
    """Return the k-means cluster [N] int64 of each row of a table [N, D] float32.

    Raises:
        MissingExtraError: FAISS is not installed.
    """
    N = len(table)
    none = torch.zeros((N, 0))
    rows = [Shard(table, none.long(), none, none, none, none)]
    return _assigned(rows, _centroids(rows, centers, seed, ITERATIONS))[0]


def _pieces(shards: list[Shard]) -> Iterator[tuple[int, Shard]]:
    """Yield (first row, some rows), one after another."""
    first = 0
    for shard in shards:
        for start in range(0, len(shard.labels), ROWS_AT_ONCE):
            piece = Shard(*(column[start : start + ROWS_AT_ONCE] for column in shard))
            yield first + start, piece
        first += len(shard.labels)


def _centroids(shards: list[Shard], centers: int, seed: int, iterations: int) -> Tensor:
    """Return [centers, D] float32: FAISS k-means on SAMPLE_EACH sampled rows for each center."""
    faiss = import_faiss("compress")
    N, wanted = sum(len(shard.labels) for shard in shards), SAMPLE_EACH * centers
    D = shards[0].embeddings.shape[1]
    chosen = np.arange(N)
    if wanted < N:
        chosen = np.sort(np.random.default_rng(seed).choice(N, wanted, replace=False))
    sample = np.empty((len(chosen), D), dtype=np.float32)
    for first, piece in _pieces(shards):
        low, high = np.searchsorted(chosen, [first, first + len(piece.labels)])
        sample[low:high] = piece.embeddings[chosen[low:high] - first].float().numpy()
    kmeans = faiss.Kmeans(
        D,
        centers,
        niter=iterations,
        seed=seed,
        min_points_per_centroid=1,  # it would only warn, on standard output
        max_points_per_centroid=SAMPLE_EACH,
    )
    kmeans.train(sample)
    return torch.from_numpy(kmeans.centroids.copy())


def _assigned(shards: list[Shard], centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Return (nearest center [N] int64, squared L2 distance [N]); ties to the smaller number."""
    index = import_faiss("compress").IndexFlatL2(centroids.shape[1])
    index.add(centroids.numpy())
    assignment, distances = [], []
    for _, piece in _pieces(shards):
        rows = piece.embeddings.float()
        nearest = torch.from_numpy(index.search(rows.numpy(), 1)[1][:, 0])
        assignment.append(nearest)
        distances.append((rows - centroids[nearest]).square().sum(1))
    return torch.cat(assignment), torch.cat(distances)


def _mean_weights(shards: list[Shard], C: int, assignment: Tensor, counts: Tensor) -> Tensor:
    """Return [centers, C] float64: each cluster's mean, 0 for a channel that a row did not keep.

    Weights of rows without channels are C numbers each, in their order.
    """
    sums = torch.zeros(len(counts) * C, dtype=torch.float64)
    for first, piece in _pieces(shards):
        centers = assignment[first : first + len(piece.labels), None]
        channels = piece.channels if piece.channels.shape[1] else torch.arange(C)
        where = (centers * C + channels).flatten()
        sums.index_add_(0, where, piece.weights.double().flatten())
    return sums.view(len(counts), C).div_(counts[:, None])


def _strongest(weights: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """Return (channels [centers, M] int64, weights [centers, M] float32), highest weight first."""
    parts = [
        ops.top_m(weights[start : start + CENTERS_AT_ONCE].float(), m)
        for start in range(0, len(weights), CENTERS_AT_ONCE)
    ]
    channels, kept = zip(*parts, strict=True)
    return torch.cat(channels), torch.cat(kept)


def _labels(assignment: Tensor, counts: Tensor, labels: Tensor) -> Tensor:
    """Return the label of each center [centers]: that of most of its rows, ties to the smaller.

    Real-valued labels give their mean: two prices are seldom the same.
    """
    if labels.is_floating_point():
        return labels.new_zeros(len(counts)).index_add_(0, assignment, labels) / counts
    pairs: Any = np.stack([assignment.numpy(), labels.numpy()], 1)
    pairs, seen = np.unique(pairs, axis=0, return_counts=True)
    order = np.lexsort((pairs[:, 1], -seen, pairs[:, 0]))
    _, first = np.unique(pairs[order, 0], return_index=True)
    return torch.from_numpy(pairs[order[first], 1])


def _nearest_members(assignment: Tensor, distances: Tensor, centers: int) -> Tensor:
    """Return the row nearest to each center [centers]; ties to the smaller row."""
    order: Any = np.lexsort((distances.numpy(), assignment.numpy()))
    _, first = np.unique(assignment.numpy()[order], return_index=True)
    assert len(first) == centers
    return torch.from_numpy(order[first])
