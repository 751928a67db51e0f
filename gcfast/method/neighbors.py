"""Pairs without labels: an anchor's nearest rows are its positives, all others its negatives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from gcfast import ops, reference
from gcfast.method.objectives import Objective, Partners
from gcfast.method.pairs import STREAM_PARTNERS, Cotangents, PairSource
from gcfast.method.partners import Anchors
from gcfast.ops import Triplets

# Rows that negatives are drawn from; all of them where there are no more. Of a larger table they
# are drawn once for all anchors, so that one matrix product finds which are valid.
POOL_ROWS = 4096
ANCHORS_AT_ONCE = 256
CHUNK = 65_536  # rows that are compared at once, for the mean over all of them

Search = Callable[[Tensor, int], Tensor]  # queries [B, D] and k → the nearest rows [B, k], or -1


class Neighbors(NamedTuple):
    """What stands for labels."""

    positives: int  # K, how many of an anchor's nearest rows are its positives
    search: Search | None = None  # None: exactly, among all rows


class NeighborSource(PairSource):
    """As :class:`PairSource`, for rows without labels (instance discrimination).

    Args:
        objective: over triplets, with a hinge (infinity included).
        embeddings: [N, D] float32.
        neighbors: which rows are positives.
        seed: of the pool.
        hardest: as there: the farthest positive and the nearest other row.
    """

    def __init__(
        self,
        objective: Objective,
        embeddings: Tensor,
        neighbors: Neighbors,
        *,
        seed: int,
        hardest: bool,
    ) -> None:
        N, where = len(embeddings), embeddings.device
        # Every row is of a class of its own.
        super().__init__(objective, embeddings, torch.arange(N, device=where), hardest=hardest)
        self.positives = neighbors.positives
        self.search = neighbors.search or (lambda queries, k: ops.knn(queries, embeddings, k)[1])
        drawn = torch.randperm(N, generator=torch.Generator().manual_seed(seed))[:POOL_ROWS]
        self.pool = drawn.sort().values.to(where)

    def anchors_at_once(self, triplets: int) -> int:
        """Return for how many anchors to draw together."""
        del triplets
        return ANCHORS_AT_ONCE

    def drawn(self, anchors: Anchors, triplets: int, seed: int) -> Triplets:
        """T draws for each anchor, uniform over its valid pairs with rows of the pool."""
        near, other = self._nearest(anchors)
        distances, rows = self._to(anchors, self.pool, near).sort(dim=1)
        # A pair is valid up to a distance, so the valid rows of each positive come first.
        valid = torch.searchsorted(distances, self._bounds(anchors, near))  # [B, K]
        ends = valid.cumsum(1)
        found = ends[:, -1]
        every = torch.arange(triplets, device=found.device).expand(len(found), -1)
        ranks = reference.uniform_ranks(
            anchors.rows, triplets, found.clamp(min=1), seed, STREAM_PARTNERS
        )
        ranks = torch.where((found <= triplets)[:, None], every, ranks)
        used = ranks < found[:, None]
        which = torch.searchsorted(ends, ranks, right=True).clamp(max=self.positives - 1)
        place = ranks - (ends - valid).gather(1, which)
        negatives = self.pool[rows.gather(1, torch.where(used, place, 0).clamp(min=0))]
        positives = near.gather(1, which)
        # Of the rows that could be negatives, the pool has this share.
        whole = len(self.pool) == len(self.labels)
        scale = 1.0 if whole else len(self.labels) / len(self.pool)
        return self._with_hardest(
            Triplets(
                torch.where(used, positives, -1),
                torch.where(used, negatives, -1),
                used,
                (found * scale).round().long(),
                torch.stack([near[:, -1], other], 1),
                torch.full_like(found, whole, dtype=torch.bool),
            )
        )

    def mean(self, anchors: Anchors) -> Cotangents:
        """The mean over all valid pairs, as one triplet: [B, 1, D]; O(N D) an anchor."""
        near, other = self._nearest(anchors)
        bounds = self._bounds(anchors, near)
        counts = torch.zeros_like(near)
        total = torch.zeros_like(anchors.embeddings, dtype=torch.float64)
        for start in range(0, len(self.labels), CHUNK):
            rows = torch.arange(
                start, min(start + CHUNK, len(self.labels)), device=self.labels.device
            )
            distances = self._to(anchors, rows, near)
            uses = torch.zeros_like(distances)
            for k in range(self.positives):
                valid = distances < bounds[:, k : k + 1]
                counts[:, k] += valid.sum(1)
                uses += valid
            total += (uses @ self.embeddings[rows]).double()
        pairs = counts.sum(1)
        found = (pairs > 0)[:, None]
        shares = counts / pairs.clamp(min=1)[:, None]
        positives = (self.embeddings[near].double() * shares[..., None]).sum(1)
        negatives = total / pairs.clamp(min=1)[:, None]
        if self.hardest:
            positives = torch.where(found, positives, self.embeddings[near[:, -1]].double())
            negatives = torch.where(found, negatives, self.embeddings[other].double())
            found = torch.ones_like(found)
        values, _ = self.objective.cotangent(
            anchors.embeddings.double(), Partners(positives[:, None], negatives[:, None])
        )
        return Cotangents(values.float(), found, pairs)

    def all(self, anchors: Anchors) -> Iterator[Cotangents]:
        """Always an error: every row would be listed for every positive."""
        del anchors
        raise ValueError(
            "`triplets` must be a number for gradcam++ with labels='neighbors', got 'all'"
        )

    def _nearest(self, anchors: Anchors) -> tuple[Tensor, Tensor]:
        """Return (the K nearest rows [B, K], nearest first; the nearest of all others [B])."""
        k = self.positives + 2  # the anchor itself among them
        found = self.search(anchors.embeddings, k)
        own = found == anchors.rows[:, None]
        # The anchor, and what an approximate search leaves empty, go last.
        order = (own | (found < 0)).long().argsort(dim=1, stable=True)
        found = found.gather(1, order)
        # Fewer than asked for: the last one stands for those that are missing.
        some = found.gather(1, (~own & (found >= 0)).sum(1, keepdim=True).sub(1).clamp(min=0))
        found = torch.where(found < 0, some, found)
        return found[:, : self.positives], found[:, self.positives]

    def _bounds(self, anchors: Anchors, near: Tensor) -> Tensor:
        """Return the squared distance below which a negative is valid with each positive."""
        margin = self.objective.hinge
        assert margin is not None
        beyond = anchors.embeddings[:, None] - self.embeddings[near]
        return beyond.square().sum(2) + margin

    def _to(self, anchors: Anchors, rows: Tensor, near: Tensor) -> Tensor:
        """Return squared distances [B, n] to rows; +inf to the anchor and to its positives."""
        table = self.embeddings[rows]
        a = anchors.embeddings
        distances = a.square().sum(1, keepdim=True) + table.square().sum(1) - 2 * (a @ table.T)
        excluded = torch.cat([anchors.rows[:, None], near], 1)
        places = torch.searchsorted(rows, excluded).clamp(max=len(rows) - 1)
        there = rows[places] == excluded
        # Those that are not among the rows write where nothing is changed.
        spare = torch.nn.functional.pad(distances, (0, 1))
        spare.scatter_(1, torch.where(there, places, len(rows)), torch.inf)
        return spare[:, :-1]
