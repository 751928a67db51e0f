"""Rows grouped by label: any partner of an anchor by its number, without a search."""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from gcfast import reference

SUM_ROWS = 2**16  # of the table that are held in float64 at once


class Anchors(NamedTuple):
    """Rows whose partners are wanted."""

    embeddings: Tensor  # [B, D] float32
    labels: Tensor  # [B] int64; float64 for ranked pairs
    rows: Tensor  # [B] int64; N or more for anchors from outside the table


class LabelOrder:
    """A table's rows in the order of (label, row), made once for all anchors.

    The partners of an anchor are numbered in that order. Its kind is one of
    :attr:`gcfast.method.objectives.Objective.pairs` but "triplet".

    Args:
        embeddings: [N, D] float32.
        labels: [N] int64, or float64.
    """

    def __init__(self, embeddings: Tensor, labels: Tensor) -> None:
        self.embeddings = embeddings
        self.labels = labels

    @cached_property
    def rows(self) -> Tensor:
        """[N] int64: the rows in order."""
        return reference.label_order(self.labels)

    @cached_property
    def _ascending(self) -> Tensor:
        return self.labels[self.rows]

    def range(self, anchors: Anchors) -> tuple[Tensor, Tensor]:
        """Return where the anchors' labels start and end in the order, [B] int64 each."""
        start = torch.searchsorted(self._ascending, anchors.labels)
        return start, torch.searchsorted(self._ascending, anchors.labels, right=True)

    def count(self, anchors: Anchors, kind: str) -> Tensor:
        """Return how many partners of a kind each anchor has, [B] int64."""
        start, end = self.range(anchors)
        if kind == "positive":
            return end - start - self._is_inside(anchors).long()
        if kind == "lower":
            return start
        return len(self.labels) - (end if kind == "higher" else end - start)

    def partners(self, anchors: Anchors, kind: str, numbers: Tensor) -> Tensor:
        """Return the rows of partners by number, [B, K] int64: any row for one that is not there.

        The table must have a row.
        """
        start, end = (place[:, None] for place in self.range(anchors))
        last = len(self.labels) - 1
        if kind == "positive":
            places = start + numbers
            # Rows of one label ascend: from the anchor's own on, each is one place further.
            is_behind = self.rows[places.clamp(max=last)] >= anchors.rows[:, None]
            places = places + (is_behind & self._is_inside(anchors)[:, None]).long()
        elif kind == "lower":
            places = numbers
        elif kind == "higher":
            places = end + numbers
        else:
            places = numbers + torch.where(numbers >= start, end - start, 0)
        return self.rows[places.clamp(max=last)]

    def mean(self, anchors: Anchors, kind: str) -> Tensor:
        """Return the mean embedding of each anchor's "positive" or "negative" partners.

        Returns:
            [B, D] float64, zeros where there is none.
        """
        if not len(self.labels):
            return torch.zeros_like(anchors.embeddings, dtype=torch.float64)
        place = self._place_of_label(anchors.labels)
        own = self._sums[place] * self._is_known(anchors.labels)[:, None]
        if kind == "negative":
            total = self._sums.sum(0) - own
        else:
            inside = self._is_inside(anchors)[:, None]
            total = own - torch.where(inside, anchors.embeddings.double(), 0.0)
        return total / self.count(anchors, kind).clamp(min=1)[:, None]

    def _is_inside(self, anchors: Anchors) -> Tensor:
        """[B] bool: the anchor is a row of the table, of the label it has there."""
        N = len(self.labels)
        if N == 0:
            return torch.zeros_like(anchors.rows, dtype=torch.bool)
        row = anchors.rows.clamp(0, N - 1)
        return (anchors.rows == row) & (self.labels[row] == anchors.labels)

    @cached_property
    def _known(self) -> Tensor:
        return self._ascending.unique_consecutive()  # type: ignore[no-untyped-call, no-any-return]

    def _place_of_label(self, labels: Tensor) -> Tensor:
        return torch.searchsorted(self._known, labels).clamp(max=max(len(self._known) - 1, 0))

    def _is_known(self, labels: Tensor) -> Tensor:
        return self._known[self._place_of_label(labels)] == labels

    @cached_property
    def _sums(self) -> Tensor:
        """[labels, D] float64: the sum of the embeddings of each label."""
        sums = torch.zeros(
            (len(self._known), self.embeddings.shape[1]),
            dtype=torch.float64,
            device=self.embeddings.device,
        )
        for start in range(0, len(self.labels), SUM_ROWS):
            part = slice(start, start + SUM_ROWS)
            place = self._place_of_label(self.labels[part])
            sums.index_add_(0, place, self.embeddings[part].double())
        return sums
