"""From an objective and a table of embeddings to the cotangents of its anchors."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gcfast import ops, reference
from gcfast.method.objectives import Objective, Partners, RankLoss
from gcfast.method.partners import Anchors, LabelOrder
from gcfast.ops import Triplets

# The rules that triplets are drawn by; databases say which theirs were. 1: every row is scanned.
DRAWS = 2
DRAWN_PAIRS = 2**18  # of all anchors, that are drawn together: those that are scanned share it
# A sketch of the rows for tries on the CPU is made when a row in so many has been an anchor, for
# then it pays; for tables of so many rows (those of fewer are scanned) and of up to so many bytes.
SKETCH_SHARE, SKETCH_ROWS, SKETCH_BYTES = 256, 4096, 2**31
LIST_CHUNK = 4096  # pairs of an anchor that are held at once when all are listed
FUNCTION_CHUNK = 65536  # pairs a user's function is evaluated on at once
STREAM_PARTNERS = 1  # of the counter-based generator; `gcfast.reference.triplets` has others


class Cotangents(NamedTuple):
    """dL/df of each anchor's triplets."""

    values: Tensor  # [B, T, D] float32
    valid: Tensor  # [B, T] bool
    counts: Tensor  # [B] int64: valid pairs found, all of them
    exact: Tensor | None = None  # [B] bool: the count is no estimate; None where none is

    @classmethod
    def one_each(cls, values: Tensor) -> Cotangents:
        """One gradient for each anchor, [B, D], or of its output's shape."""
        valid = values.new_ones((len(values), 1), dtype=torch.bool)
        return cls(values[:, None], valid, valid[:, 0].long())

    def to(self, device: torch.device) -> Cotangents:
        """Return the gradients on a device; the counts stay where they are."""
        return self._replace(values=self.values.to(device), valid=self.valid.to(device))


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
        self.order = LabelOrder(embeddings, labels)
        self._along: Tensor | None = None
        self._sketch: Tensor | None = None
        self._anchors = 0  # that triplets were drawn for

    def anchors_at_once(self, triplets: int) -> int:
        """Return for how many anchors to draw together, where there are so many."""
        if self._is_function:
            return 1
        return max(64, DRAWN_PAIRS // triplets)

    def draw(self, anchors: Anchors, triplets: int, seed: int) -> Cotangents:
        """T draws for each anchor: [B, T, D]."""
        return self.cotangents(anchors, self.drawn(anchors, triplets, seed))

    def drawn(self, anchors: Anchors, triplets: int, seed: int) -> Triplets:
        """T draws for each anchor, as rows of the table; -1 for a partner without use.

        The one partner of a ranked pair is a negative.
        """
        if self._is_function:
            return self._listed(anchors, triplets, seed, first=None)
        if self.objective.hinge is None:
            counts = self.order.count(anchors, self.objective.pairs)
            ranks = reference.uniform_ranks(
                anchors.rows, triplets, counts.clamp(min=1), seed, STREAM_PARTNERS
            )
            every = torch.arange(triplets, device=counts.device)
            few = (counts <= triplets)[:, None]
            return self._partners(anchors, counts, torch.where(few, every, ranks))
        return self._with_hardest(self._sampled(anchors, triplets=triplets, seed=seed))

    def mean(self, anchors: Anchors) -> Cotangents:
        """The mean over all valid pairs, as one triplet: [B, 1, D]."""
        if self.objective.is_affine:
            return self._mean_of_means(anchors)
        if isinstance(self.objective, RankLoss):
            return self._mean_of_slopes(self.objective, anchors)
        if self.objective.hinge is not None:
            values, counts, hardest = ops.mean_cotangents(
                *anchors,
                self.embeddings,
                self.labels,
                self.order.rows,
                margin=self.objective.hinge,
            )
            found = counts > 0
            if not self.hardest:
                return Cotangents(values[:, None], found[:, None], counts)
            pairs = torch.where(found[:, None], -1, hardest)  # [B, 2]
            valid = (pairs >= 0).all(1)[:, None]
            one = Triplets(pairs[:, :1], pairs[:, 1:], valid, counts, pairs, counts >= 0)
            fallback = self.cotangents(anchors, one)
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
            if self._is_function:
                listed = self._listed(anchors, LIST_CHUNK, 0, first=first)
            elif self.objective.hinge is None:
                counts = self.order.count(anchors, self.objective.pairs)
                numbers = first + torch.arange(LIST_CHUNK, device=counts.device)
                listed = self._partners(anchors, counts, numbers.expand(len(counts), -1))
            else:
                listed = self._sampled(anchors, triplets=LIST_CHUNK, first=first)
                if first == 0:
                    listed = self._with_hardest(listed)
            width = int(listed.valid.sum(1).max()) if len(listed.valid) else 0
            yield self.cotangents(
                anchors,
                listed._replace(
                    positives=listed.positives[:, :width],
                    negatives=listed.negatives[:, :width],
                    valid=listed.valid[:, :width],
                ),
            )
            first += LIST_CHUNK
            if first >= (int(listed.counts.max()) if len(listed.counts) else 0):
                return

    def count(self, anchors: Anchors) -> Tensor:
        """Valid pairs of each anchor, [B] int64."""
        if self.objective.is_affine or self.objective.real_labels:
            pairs = self.objective.pairs
            kinds = ("positive", "negative") if pairs == "triplet" else (pairs,)
            return torch.stack([self.order.count(anchors, kind) for kind in kinds]).prod(0)
        if self._is_function:
            return self._listed(anchors, 1, 0, first=0).counts
        return self._sampled(anchors, triplets=1, tries=0).counts

    def cotangents(self, anchors: Anchors, drawn: Triplets) -> Cotangents:
        """Cotangents [B, T, D] of pairs of rows."""
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
        return Cotangents(values, drawn.valid, drawn.counts, drawn.exact)

    @property
    def _is_function(self) -> bool:
        """Whether only the loss itself can tell which pairs are valid."""
        return self.objective.hinge is None and self.objective.pairs == "triplet"

    def _sampled(self, anchors: Anchors, **options: Any) -> Triplets:
        margin = self.objective.hinge
        assert margin is not None
        self._anchors += len(anchors.rows)
        N, D = self.embeddings.shape
        pays = self._anchors * SKETCH_SHARE > N >= SKETCH_ROWS and N * (D + 8) <= SKETCH_BYTES
        if self._sketch is None and pays and not self.embeddings.is_cuda:
            self._sketch = reference.label_sketch(self.embeddings, self.order.rows)
        return ops.sample_triplets(
            *anchors,
            self.embeddings,
            self.labels,
            self.order.rows,
            self._sketch,
            margin=margin,
            **options,
        )

    def _partners(self, anchors: Anchors, counts: Tensor, numbers: Tensor) -> Triplets:
        """The partners of pairs that have but one, by numbers [B, T]."""
        kind = self.objective.pairs
        valid = numbers < counts[:, None]
        rows = torch.full_like(numbers, -1)
        if len(self.labels):
            some = self.order.partners(anchors, kind, torch.where(valid, numbers, 0).clamp(min=0))
            rows = torch.where(valid, some, -1)
        none = torch.full_like(rows, -1)
        positives, negatives = (rows, none) if kind == "positive" else (none, rows)
        hardest = torch.full((len(counts), 2), -1, dtype=torch.int64, device=counts.device)
        return Triplets(positives, negatives, valid, counts, hardest, counts >= 0)

    def _mean_of_means(self, anchors: Anchors) -> Cotangents:
        """The mean where the gradient is affine in the partners and every pair is valid."""
        kind, counts = self.objective.pairs, self.count(anchors)
        mean = partial(self.order.mean, anchors)
        partners = Partners(
            mean("positive")[:, None] if kind != "negative" else None,
            mean("negative")[:, None] if kind != "positive" else None,
        )
        values, _ = self.objective.cotangent(anchors.embeddings.double(), partners)
        return Cotangents(values.float(), (counts > 0)[:, None], counts)

    def _mean_of_slopes(self, objective: RankLoss, anchors: Anchors) -> Cotangents:
        """The mean of gradients that lie on one line: that of their slopes along it."""
        counts = self.count(anchors)
        start, end = (place[:, None] for place in self.order.range(anchors))
        direction = objective.direction(anchors.embeddings.double())
        own = (anchors.embeddings.double() @ direction)[:, None]
        total = torch.zeros_like(own)
        for first in range(0, len(self.labels), FUNCTION_CHUNK):
            rows = self.order.rows[first : first + FUNCTION_CHUNK]
            places = first + torch.arange(len(rows), device=rows.device)
            above = places < start
            slopes = objective.slopes(own - self._scores(objective)[rows], above)
            lower, higher = objective.pairs != "higher", objective.pairs != "lower"
            used = (above & lower) | ((places >= end) & higher)
            total += torch.where(used, slopes, 0.0).sum(1, keepdim=True)
        values = total / counts.clamp(min=1)[:, None] * direction
        return Cotangents(values.float()[:, None], (counts > 0)[:, None], counts)

    def _scores(self, objective: RankLoss) -> Tensor:
        """[N] float64: the rows along the line of all gradients, worked out once."""
        if self._along is None:
            direction = objective.direction(self.embeddings[:1].double())
            starts = range(0, len(self.embeddings), FUNCTION_CHUNK)
            parts = (self.embeddings[i : i + FUNCTION_CHUNK].double() for i in starts)
            self._along = torch.cat([part @ direction for part in parts])
        return self._along

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

    def _listed(self, anchors: Anchors, triplets: int, seed: int, *, first: int | None) -> Triplets:
        """As ``ops.sample_triplets``, where pairs must be listed to be counted."""
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
        return Triplets(chosen[..., 0], chosen[..., 1], valid, counts, hardest, counts >= 0)

    def _valid_pairs(self, anchors: Anchors, b: int) -> Tensor:
        """The valid pairs [V, 2] of one anchor, ordered by row."""
        same = self.labels == anchors.labels[b]
        negatives = (~same).nonzero()  # [Q, 1]
        if anchors.rows[b] < len(same):
            same = same.clone()
            same[anchors.rows[b]] = False
        positives = same.nonzero()  # [P, 1]
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
