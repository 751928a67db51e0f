"""The valid pairs of anchors that are scanned, by where distances come among thresholds.

A positive's threshold is D(a, p) + margin. With the P thresholds of an anchor in ascending order, a
negative's step is the first of them above its distance: it is valid with the positives of this step
and all above, P less the step in number, and a positive with all negatives at its step and below.

Most anchors have few negatives under their largest threshold, and these are listed
(:mod:`gcfast.kernels.triplets.near_rows`); where there are more, every row gets a step
(:mod:`gcfast.kernels.triplets.thresholds`). Whatever decides is measured in float64 in the order of
the specification. The host waits to learn how many rows there are.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from gcfast.kernels.launch import NearConfig, multiprocessors, near_config
from gcfast.kernels.triplets.near_rows import NearRows, exact_distances
from gcfast.kernels.triplets.thresholds import threshold_steps

SCRATCH_BYTES = 512 * 2**20  # for the anchors of one group
PAIR_BYTES = 48  # of a positive or of a negative that is listed
FEW_NEGATIVES = 4096  # that are listed for an anchor at most
SAMPLE_ROWS = 4096  # that bound the distance of the nearest negative


class Group(NamedTuple):
    """Anchors with the rows that their valid pairs are made of."""

    which: Tensor  # [G] int64: numbers of the anchors
    positives: Tensor  # [G, P] int64, ascending; N where there is none
    step_of: Tensor  # [G, P] int64: the place of each one's threshold
    negatives: Tensor | None  # [G, C] int32, ascending, then N; None where they are all the rows
    steps: Tensor  # [G, C] int32, P where nothing is valid
    totals: Tensor  # [G, P + 1]: negatives at each step but the last
    hardest: Tensor  # [G, 2] int64

    def counts(self) -> Tensor:
        """[G, P] int64: the negatives that each positive is valid with."""
        return self.totals.cumsum(1).gather(1, self.step_of)


class Scan:
    """Measures rows for anchors.

    Args:
        anchors: [B, D] float32.
        anchor_labels: [B] int64, contiguous.
        embeddings: [N, D] float32.
        labels: [N] int64, contiguous.
        by_label: [N] int64, contiguous.
        ranges: [B, 3], of :func:`gcfast.kernels.triplets.tries.label_ranges`.
        margin: of the hinge.
        config: how near rows are looked for; None for the usual way.
    """

    def __init__(
        self,
        anchors: Tensor,
        anchor_labels: Tensor,
        embeddings: Tensor,
        labels: Tensor,
        by_label: Tensor,
        ranges: Tensor,
        margin: float,
        config: NearConfig | None = None,
    ) -> None:
        self.anchors = anchors
        self.anchor_labels = anchor_labels
        self.embeddings = embeddings
        self.labels = labels
        self.by_label = by_label
        self.ranges = ranges
        self.margin = margin
        self.config = config or near_config(multiprocessors(anchors.device))

    @cached_property
    def near(self) -> NearRows:
        """The table made ready to be searched, where an anchor is scanned at all."""
        return NearRows(self.embeddings, self.labels, self.config)

    def groups(self, which: Tensor) -> Iterator[Group]:
        """The anchors ``which``, as they fit into ``SCRATCH_BYTES``."""
        if not len(which):
            return
        widest = int((self.ranges[which, 1] - self.ranges[which, 0]).max())
        capacity = min(FEW_NEGATIVES, len(self.labels))
        size = max(1, SCRATCH_BYTES // (PAIR_BYTES * (widest + capacity)))
        for part in which.split(size):
            yield from self._measured(part, widest, capacity)

    def _measured(self, which: Tensor, widest: int, capacity: int) -> Iterator[Group]:
        N = len(self.labels)
        start, end, own = self.ranges[which].T[..., None]
        places = start + torch.arange(widest, device=which.device)
        is_positive = (places < end) & (places != own)
        positives = torch.where(is_positive, self.by_label[places.clamp(max=N - 1)], N)
        distances = exact_distances(positives, self.anchors[which], self.embeddings)
        farthest = _first_extreme(positives, distances, -1.0)
        thresholds = distances + self.margin
        thresholds = torch.where(thresholds == thresholds, thresholds, -torch.inf)
        ascending, order = thresholds.sort(1)
        step_of = order.argsort(1)
        top = ascending[:, -1] if widest else ascending.new_full((len(which),), -torch.inf)

        least = self._least(which)
        ids, counts = self._near(which, torch.maximum(top, least), capacity)
        fits = counts <= capacity
        few, many = fits.nonzero().flatten(), (fits == 0).nonzero().flatten()
        if len(few):
            negatives = ids[few, : int(torch.where(fits, counts, 0).max())].sort(1).values
            near = exact_distances(negatives, self.anchors[which[few]], self.embeddings)
            hardest = torch.stack([farthest[few], _first_extreme(negatives, -near, -torch.inf)], 1)
            near = torch.where(near == near, near, torch.inf)
            steps = torch.searchsorted(ascending[few], near, right=True, out_int32=True)
            totals = torch.zeros((len(few), widest + 1), dtype=torch.int32, device=which.device)
            totals.scatter_add_(1, steps.long(), torch.ones_like(steps))
            yield Group(which[few], positives[few], step_of[few], negatives, steps, totals, hardest)
        for part in many.split(max(1, SCRATCH_BYTES // (4 * N))) if len(many) else ():
            steps, totals = threshold_steps(
                self.anchors[which[part]],
                self.anchor_labels[which[part]],
                self.embeddings,
                self.labels,
                ascending[part],
            )
            hardest = torch.stack([farthest[part], self._nearest(which[part], least[part])], 1)
            yield Group(which[part], positives[part], step_of[part], None, steps, totals, hardest)

    def _least(self, which: Tensor) -> Tensor:
        """What the nearest negative's distance does not exceed: the nearest of a sample's."""
        N = len(self.labels)
        sample = torch.arange(0, N, -(-N // SAMPLE_ROWS), device=which.device)
        rows, anchors = self.embeddings[sample], self.anchors[which]
        squares = anchors.square().sum(1)[:, None] + self.near.squares[sample]
        # However the library multiplies float32: TF32 keeps 10 bits.
        bound = squares - 2 * (anchors @ rows.T) + squares * (2.0**-8 + 2.0**-21 * rows.shape[1])
        same = self.labels[sample] == self.anchor_labels[which][:, None]
        bound = torch.where(same | (bound != bound), torch.inf, bound)
        return bound.amin(1).double()

    def _nearest(self, which: Tensor, least: Tensor) -> Tensor:
        """The nearest negative of each anchor, whose distance is at most ``least``."""
        room = min(FEW_NEGATIVES, len(self.labels))
        ids, counts = self._near(which, least, room)
        if int(counts.max()) > room:
            ids, _ = self._near(which, least, int(counts.max()))
        ids = ids[:, : int(counts.max())]
        distances = exact_distances(ids, self.anchors[which], self.embeddings)
        return _first_extreme(ids, -distances, -torch.inf)

    def _near(self, which: Tensor, limits: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
        return self.near.negatives(self.anchors[which], self.anchor_labels[which], limits, capacity)


def _first_extreme(rows: Tensor, values: Tensor, floor: float) -> Tensor:
    """[G] int64: the lowest row with the largest value above the floor; -1 where there is none."""
    last = torch.iinfo(torch.int64).max
    if not values.shape[1]:
        return torch.full((len(values),), -1, dtype=torch.int64, device=values.device)
    values = torch.where(values > floor, values, floor)  # NaN is above nothing
    best = values.amax(1, keepdim=True)
    first = torch.where(values == best, rows.long(), last).amin(1)
    return torch.where(best[:, 0] > floor, first, -1)
