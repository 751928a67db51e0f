"""From an objective and a table of embeddings to the cotangents of its anchors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from gcfast import ops, reference
from gcfast.method.objectives import Objective, Partners
from gcfast.ops import Triplets

LIST_CHUNK = 4096  # pairs of an anchor that are held at once when all are listed
FUNCTION_CHUNK = 65536  # pairs a user's function is evaluated on at once
# Which labels the partners of ranked pairs have, beside the anchor's.
_COMPARED = {"ranked": torch.ne, "lower": torch.lt, "higher": torch.gt}
STREAM_PARTNERS = 1  # of the counter-based generator; 0 is `sample_triplets`


class Anchors(NamedTuple):
    """Rows whose partners are wanted."""

    embeddings: Tensor  # [B, D] float32
    labels: Tensor  # [B] int64; float64 for ranked pairs
    rows: Tensor  # [B] int64; N or more for anchors from outside the table


class Cotangents(NamedTuple):
    """dL/df of each anchor's triplets."""

    values: Tensor  # [B, T, D] float32
    valid: Tensor  # [B, T] bool
    counts: Tensor  # [B] int64: valid pairs found, all of them


class PairSource:
    """The valid pairs of any anchor: how many, T drawn from them, or all in order.

    Args:
        objective: what makes a pair valid.
        embeddings: [N, D] float32.
        labels: [N] int64 (float64 for ranked pairs), on the same device.
        hardest: take the farthest positive and the nearest negative, hinge ignored, where an
            anchor has no valid pair. Not for a user's function, whose hinge cannot be taken off.
    """

    def __init__(
        self, objective: Objective, embeddings: Tensor, labels: Tensor, *, hardest: bool
    ) -> None:
        self.objective = objective
        self.embeddings = embeddings
        self.labels = labels
        self.hardest = hardest

    def draw(self, anchors: Anchors, triplets: int, seed: int) -> Cotangents:
        """T draws for each anchor: [B, T, D]."""
        if self.objective.hinge is not None:
            drawn = ops.sample_triplets(
                *anchors,
                self.embeddings,
                self.labels,
                triplets=triplets,
                margin=self.objective.hinge,
                seed=seed,
            )
        else:
            drawn = self._listed(anchors, triplets, seed, first=None)
        return self._cotangents(anchors, self._with_hardest(drawn))

    def mean(self, anchors: Anchors) -> Cotangents:
        """The mean over all valid pairs, as one triplet: [B, 1, D]."""
        if self.objective.hinge is not None:
            values, counts, hardest = ops.mean_cotangents(
                *anchors, self.embeddings, self.labels, margin=self.objective.hinge
            )
            found = counts > 0
            if not self.hardest:
                return Cotangents(values[:, None], found[:, None], counts)
            pairs = torch.where(found[:, None], -1, hardest)  # [B, 2]
            one = Triplets(pairs[:, :1], pairs[:, 1:], (pairs >= 0).all(1)[:, None], counts, pairs)
            fallback = self._cotangents(anchors, one)
            values = torch.where(found[:, None], values, fallback.values[:, 0])
            return Cotangents(values[:, None], found[:, None] | fallback.valid, counts)

        total = torch.zeros(anchors.embeddings.shape, dtype=torch.float64)
        used = torch.zeros(len(total), dtype=torch.int64)
        counts = used
        for part in self.all(anchors):
            kept = torch.where(part.valid[..., None], part.values, 0.0)
            total = total + kept.sum(1, dtype=torch.float64).cpu()
            used, counts = used + part.valid.sum(1).cpu(), part.counts
        mean = (total / used.clamp(min=1)[:, None]).float().to(anchors.embeddings.device)
        return Cotangents(mean[:, None], (used > 0).to(mean.device)[:, None], counts)

    def all(self, anchors: Anchors) -> Iterator[Cotangents]:
        """Every valid pair, at most LIST_CHUNK of each anchor at a time."""
        first = 0
        while True:
            if self.objective.hinge is not None:
                listed = ops.sample_triplets(
                    *anchors,
                    self.embeddings,
                    self.labels,
                    triplets=LIST_CHUNK,
                    margin=self.objective.hinge,
                    first=first,
                )
            else:
                listed = self._listed(anchors, LIST_CHUNK, 0, first=first)
            if first == 0:
                listed = self._with_hardest(listed)
            width = int(listed.valid.sum(1).max()) if len(listed.valid) else 0
            yield self._cotangents(
                anchors,
                Triplets(
                    listed.positives[:, :width],
                    listed.negatives[:, :width],
                    listed.valid[:, :width],
                    listed.counts,
                    listed.hardest,
                ),
            )
            first += LIST_CHUNK
            if first >= (int(listed.counts.max()) if len(listed.counts) else 0):
                return

    def count(self, anchors: Anchors) -> Tensor:
        """Valid pairs of each anchor, [B] int64."""
        if self.objective.hinge is not None:
            return ops.mean_cotangents(
                *anchors, self.embeddings, self.labels, margin=self.objective.hinge
            )[1]
        return self._listed(anchors, 1, 0, first=0).counts

    def _with_hardest(self, drawn: Triplets) -> Triplets:
        """Anchors without a valid pair get their hardest one, where that is wanted and exists."""
        if not self.hardest or self.objective.hinge is None:
            return drawn
        use = (drawn.counts == 0) & (drawn.hardest >= 0).all(1)
        if not bool(use.any()):
            return drawn
        positives, negatives = drawn.positives.clone(), drawn.negatives.clone()
        positives[use, 0], negatives[use, 0] = drawn.hardest[use, 0], drawn.hardest[use, 1]
        return drawn._replace(positives=positives, negatives=negatives, valid=positives >= 0)

    def _cotangents(self, anchors: Anchors, drawn: Triplets) -> Cotangents:
        pairs = self.objective.pairs
        if self.objective.real_labels:
            others = drawn.negatives.clamp(min=0)
            above = anchors.labels[:, None] > self.labels[others]
            partners = Partners(None, None, self.embeddings[others], above)
        else:
            partners = Partners(
                self.embeddings[drawn.positives.clamp(min=0)] if pairs != "negative" else None,
                self.embeddings[drawn.negatives.clamp(min=0)] if pairs != "positive" else None,
            )
        # Which pairs are valid was settled when they were drawn, in float64.
        values, _ = self.objective.cotangent(anchors.embeddings, partners)
        return Cotangents(values, drawn.valid, drawn.counts)

    def _listed(self, anchors: Anchors, triplets: int, seed: int, *, first: int | None) -> Triplets:
        """As ``ops.sample_triplets``, for objectives whose pairs must be listed to be counted."""
        B, device = len(anchors.labels), anchors.labels.device
        chosen = torch.full((B, triplets, 2), -1, dtype=torch.int64, device=device)
        valid = torch.zeros((B, triplets), dtype=torch.bool, device=device)
        counts = torch.zeros(B, dtype=torch.int64, device=device)
        hardest = torch.full((B, 2), -1, dtype=torch.int64, device=device)
        for b in range(B):
            pairs = self._valid_pairs(anchors, b)
            counts[b] = len(pairs)
            if first is not None:
                pairs = pairs[first : first + triplets]
            elif len(pairs) > triplets:
                ranks = reference.uniform_ranks(
                    anchors.rows[b : b + 1], triplets, counts[b : b + 1], seed, STREAM_PARTNERS
                )
                pairs = pairs[ranks[0]]
            chosen[b, : len(pairs)] = pairs
            valid[b, : len(pairs)] = True
        return Triplets(chosen[..., 0], chosen[..., 1], valid, counts, hardest)

    def _valid_pairs(self, anchors: Anchors, b: int) -> Tensor:
        """The valid pairs [V, 2] of one anchor, ordered by row; -1 for a partner without use.

        The one partner of a ranked pair stands in the second column.
        """
        if self.objective.real_labels:
            others = _COMPARED[self.objective.pairs](self.labels, anchors.labels[b]).nonzero()
            return torch.cat([torch.full_like(others, -1), others], 1)
        same = self.labels == anchors.labels[b]
        negatives = (~same).nonzero()  # [Q, 1]
        if anchors.rows[b] < len(same):
            same = same.clone()
            same[anchors.rows[b]] = False
        positives = same.nonzero()  # [P, 1]
        if self.objective.pairs == "positive":
            return torch.cat([positives, torch.full_like(positives, -1)], 1)
        if self.objective.pairs == "negative":
            return torch.cat([torch.full_like(negatives, -1), negatives], 1)
        if not len(positives) or not len(negatives):
            return positives.new_empty((0, 2))

        anchor = anchors.embeddings[b]
        # A chunk is whole positives, each with every negative, so that the order is by row.
        step = max(1, FUNCTION_CHUNK // len(negatives))
        found = []
        for start in range(0, len(positives), step):
            some = positives[start : start + step]
            pairs = torch.cat(
                [some.repeat_interleave(len(negatives), 0), negatives.repeat(len(some), 1)], 1
            )
            _, valid = self.objective.cotangent(
                anchor, Partners(self.embeddings[pairs[:, 0]], self.embeddings[pairs[:, 1]])
            )
            found.append(pairs[valid])
        return torch.cat(found)
