"""Pairs without labels against a loop over all of them."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import clustered
from torch import Tensor

import gcfast
from gcfast.method import neighbors as module
from gcfast.method.neighbors import Neighbors, NeighborSource
from gcfast.method.pairs import Cotangents
from gcfast.method.partners import Anchors

N, K, MARGIN = 60, 3, 0.2


def table() -> Tensor:
    return torch.nn.functional.normalize(clustered(N, 5, 6, spread=0.5)[0], dim=1)


def source(
    f: Tensor, objective: gcfast.Objective | None = None, positives: int = K, hardest: bool = True
) -> NeighborSource:
    objective = gcfast.TripletLoss(MARGIN) if objective is None else objective
    return NeighborSource(objective, f, Neighbors(positives), seed=0, hardest=hardest)


def anchors(f: Tensor) -> Anchors:
    rows = torch.arange(len(f))
    return Anchors(f, rows, rows)


def valid_pairs(f: Tensor, row: int, margin: float, positives: int = K) -> list[tuple[int, int]]:
    """By the definition, in float64."""
    f = f.double()
    distances = (f - f[row]).square().sum(1)
    order = [r for r in distances.argsort().tolist() if r != row]
    near, others = order[:positives], order[positives:]
    return [(p, n) for p in near for n in others if distances[p] + margin > distances[n]]


def mean_by_loop(f: Tensor, pairs: list[tuple[int, int]]) -> Tensor:
    return torch.stack([2 * (f[n] - f[p]).double() for p, n in pairs]).mean(0)


@pytest.mark.parametrize("margin", [0.05, MARGIN, math.inf])
def test_the_mean_and_all_draws_equal_the_loop(margin: float) -> None:
    f = table()
    objective = gcfast.DistanceDifference() if margin == math.inf else gcfast.TripletLoss(margin)
    one = source(f, objective, hardest=False)
    mean = one.mean(anchors(f))
    drawn = one.draw(anchors(f), K * N, seed=0)  # more than there are: each is taken once
    assert bool(drawn.exact.all())
    for row in range(N):
        pairs = valid_pairs(f, row, margin)
        assert mean.counts[row] == drawn.counts[row] == len(pairs)
        assert mean.valid[row, 0] == (len(pairs) > 0)
        if pairs:
            wanted = mean_by_loop(f, pairs).float()
            torch.testing.assert_close(mean.values[row, 0], wanted, rtol=1e-5, atol=1e-6)
            got = drawn.values[row][drawn.valid[row]]
            assert len(got) == len(pairs)
            torch.testing.assert_close(got.mean(0), wanted, rtol=1e-5, atol=1e-6)


def test_few_draws_are_valid_pairs_and_depend_on_the_row_alone() -> None:
    f = table()
    one = source(f)
    drawn = one.drawn(anchors(f), 4, seed=1)
    for row in range(N):
        known = set(valid_pairs(f, row, MARGIN))
        if len(known) > 4:
            pairs = zip(drawn.positives[row].tolist(), drawn.negatives[row].tolist(), strict=True)
            assert set(pairs) <= known
    some = torch.tensor([3, 40])
    alone = one.drawn(Anchors(f[some], some, some), 4, seed=1)
    assert torch.equal(alone.negatives, drawn.negatives[some])
    assert not torch.equal(one.drawn(anchors(f), 4, seed=2).negatives, drawn.negatives)


def test_an_anchor_without_a_valid_pair_takes_the_hardest() -> None:
    f = table()
    strict = gcfast.TripletLoss(-1.0)
    row = 7
    assert not valid_pairs(f, row, -1.0)
    order = [r for r in (f - f[row]).square().sum(1).argsort().tolist() if r != row]
    wanted = 2 * (f[order[K]] - f[order[K - 1]])
    one = source(f, strict)

    def got(part: Cotangents) -> Tensor:
        return part.values[row][part.valid[row]][0]

    torch.testing.assert_close(got(one.mean(anchors(f))), wanted)
    torch.testing.assert_close(got(one.draw(anchors(f), 5, 0)), wanted)
    assert not bool(source(f, strict, hardest=False).mean(anchors(f)).valid[row].any())


def test_a_pool_gives_pairs_of_its_rows_and_an_estimate_of_their_number(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    f = table()
    whole = source(f, gcfast.DistanceDifference()).drawn(anchors(f), 5, 0)
    monkeypatch.setattr(module, "POOL_ROWS", 20)
    one = source(f, gcfast.DistanceDifference())
    drawn = one.drawn(anchors(f), 30, 0)
    assert set(drawn.negatives.flatten().tolist()) <= set(one.pool.tolist())
    assert not bool(drawn.exact.any())
    assert (drawn.counts - whole.counts).abs().max() <= 0.2 * whole.counts.max()


def test_an_approximate_search_may_find_too_few() -> None:
    f = table()

    def search(queries: Tensor, k: int) -> Tensor:
        found = torch.full((len(queries), k), -1)
        found[:, 0] = 5  # not even the anchor itself
        return found

    one = NeighborSource(gcfast.TripletLoss(MARGIN), f, Neighbors(K, search), seed=0, hardest=True)
    drawn = one.drawn(anchors(f), 4, 0)
    assert set(drawn.positives[drawn.valid].tolist()) <= {5}
    assert bool(torch.isfinite(one.mean(anchors(f)).values).all())
