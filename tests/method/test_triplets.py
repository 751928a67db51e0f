"""The valid pairs of an anchor: drawn, averaged, listed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import clustered, norm_error
from loops import smooth, squared, valid_pairs
from torch import Tensor

import gcfast
from gcfast.method import pairs as triplets_module
from gcfast.method.objectives import as_objective
from gcfast.method.pairs import PairSource
from gcfast.method.partners import Anchors, LabelOrder
from gcfast.ops import Triplets

OBJECTIVES = {
    "triplet": gcfast.TripletLoss(0.2),
    "difference": gcfast.DistanceDifference(),
    "positive": gcfast.PairDistance("positive"),
    "negative": gcfast.PairDistance("negative"),
    "function": as_objective(smooth),
}
EVERY = pytest.mark.parametrize("name", OBJECTIVES)


def setup(name: str, rows: int = 20, *, hardest: bool = True) -> tuple[PairSource, Anchors]:
    embeddings, labels = clustered(rows, 4, 3)
    source = PairSource(OBJECTIVES[name], embeddings, labels, hardest=hardest)
    return source, Anchors(embeddings, labels, torch.arange(rows))


@EVERY
def test_the_mean_is_the_mean_of_all(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source, anchors = setup(name)
    mean = source.mean(anchors)
    monkeypatch.setattr(triplets_module, "LIST_CHUNK", 7)
    parts = list(source.all(anchors))
    assert len(parts) > 1 or name in ("positive",)
    total = sum(
        torch.where(p.valid[..., None], p.values, 0.0).sum(1, dtype=torch.float64) for p in parts
    )
    used = sum(p.valid.sum(1) for p in parts)
    assert norm_error(mean.values[:, 0], total / used[:, None]) < 1e-5
    assert torch.equal(used, mean.counts)
    assert torch.equal(source.count(anchors), mean.counts)


@EVERY
def test_with_fewer_pairs_than_draws_each_is_used_once(name: str) -> None:
    source, anchors = setup(name)
    drawn = source.draw(anchors, 500, seed=3)
    (listed,) = source.all(anchors)
    assert torch.equal(drawn.valid.sum(1), drawn.counts)
    width = listed.values.shape[1]
    assert torch.equal(drawn.values[:, :width][listed.valid], listed.values[listed.valid])


@EVERY
def test_draws_depend_on_seed_and_row_alone(name: str) -> None:
    source, anchors = setup(name)
    together = source.draw(anchors, 4, seed=3)
    for row in (0, 7, 19):
        alone = source.draw(Anchors(*(part[row : row + 1] for part in anchors)), 4, seed=3)
        torch.testing.assert_close(alone.values[0], together.values[row])
    assert not torch.equal(source.draw(anchors, 4, seed=4).values, together.values)


def test_draws_of_pairs_are_uniform() -> None:
    source, anchors = setup("negative")
    one = Anchors(*(part[:1] for part in anchors))
    drawn = source.draw(Anchors(one.embeddings, one.labels, torch.tensor([0])), 6, seed=1)
    count = int(drawn.counts[0])
    seen = torch.zeros(count)
    (listed,) = source.all(one)
    for seed in range(300):
        values = source.draw(one, 6, seed=seed).values[0]
        seen += (values[:, None] == listed.values[0][None]).all(2).sum(0)
    expected = 1800 / count
    assert float(((seen - expected) ** 2 / expected).sum()) < 3 * count


def test_an_anchor_is_never_its_own_positive() -> None:
    source, anchors = setup("positive")
    (listed,) = source.all(anchors)
    same = anchors.labels[:, None] == anchors.labels
    assert torch.equal(listed.counts, same.sum(1) - 1)
    outside = anchors._replace(rows=torch.full((20,), 20))
    (listed,) = source.all(outside)
    assert torch.equal(listed.counts, same.sum(1))


@pytest.mark.parametrize(
    "objective",
    [gcfast.TripletLoss(-10.0), as_objective(lambda a, p, n: -squared(a, p) - squared(a, n))],
    ids=["loss", "function"],
)
@pytest.mark.parametrize("hardest", [True, False])
def test_anchors_without_valid_pair(objective: Any, hardest: bool) -> None:
    embeddings, labels = clustered(12, 4, 2)
    source = PairSource(objective, embeddings, labels, hardest=hardest)
    anchors = Anchors(embeddings, labels, torch.arange(12))
    parts = [source.draw(anchors, 3, 0), source.mean(anchors), next(iter(source.all(anchors)))]
    falls_back = hardest and objective.hinge is not None
    for part in parts:
        assert part.counts.tolist() == [0] * 12
        assert part.valid.any(1).tolist() == [falls_back] * 12
    if not falls_back:
        return
    distances = torch.stack([squared(f, embeddings) for f in embeddings])
    for row in range(12):
        same = labels == labels[row]
        far = distances[row].masked_fill(~same, -1).argmax()
        near = distances[row].masked_fill(same, 99).argmin()
        wanted: Tensor = 2 * (embeddings[near] - embeddings[far])
        for part in parts:
            torch.testing.assert_close(part.values[row, 0], wanted)


def test_a_label_seen_once_has_nothing() -> None:
    embeddings, _ = clustered(5, 4, 2)
    labels = torch.tensor([0, 0, 1, 1, 2])
    for objective in (gcfast.TripletLoss(), as_objective(smooth)):
        source = PairSource(objective, embeddings, labels, hardest=True)
        anchors = Anchors(embeddings, labels, torch.arange(5))
        for part in (source.draw(anchors, 3, 0), source.mean(anchors)):
            assert part.valid.any(1).tolist() == [True] * 4 + [False]


def test_a_function_is_evaluated_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    source, anchors = setup("function")
    (whole,) = source.all(anchors)
    monkeypatch.setattr(triplets_module, "FUNCTION_CHUNK", 3)
    (chunked,) = source.all(anchors)
    assert torch.equal(whole.values, chunked.values)
    listed = valid_pairs(anchors.embeddings, anchors.labels.tolist(), 0)
    assert int(whole.counts[0]) == len(listed)


@pytest.mark.parametrize("kind", ["positive", "negative"])
def test_partners_by_number_are_those_of_the_labels(kind: str) -> None:
    embeddings, labels = clustered(30, 4, 5)
    order = LabelOrder(embeddings, labels)
    # Rows of the table; one from outside, of a known label and of a new one.
    anchors = Anchors(
        torch.cat([embeddings, embeddings[:2]]),
        torch.cat([labels, torch.tensor([int(labels[0]), 77])]),
        torch.cat([torch.arange(30), torch.tensor([30, 30])]),
    )
    counts = order.count(anchors, kind)
    numbers = torch.arange(30).expand(32, -1)
    rows = order.partners(anchors, kind, numbers)
    mean = order.mean(anchors, kind)
    for b in range(32):
        same = labels == anchors.labels[b]
        if b < 30:
            own = torch.arange(30) == b
            wanted = (same & ~own) if kind == "positive" else ~same
        else:
            wanted = same if kind == "positive" else ~same
        got = rows[b, : counts[b]]
        assert torch.equal(got.sort().values, wanted.nonzero().flatten())
        expected = embeddings[wanted].double().mean(0) if wanted.any() else torch.zeros(4)
        torch.testing.assert_close(mean[b], expected.double())
    assert (counts == 0).any() == (kind == "positive")


def test_draws_for_many_rows_are_those_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where rows are asked for across the ends of what was drawn together."""
    monkeypatch.setattr(triplets_module, "DRAWN_PAIRS", 1)
    source, anchors = setup("triplet", rows=300)
    assert source.anchors_at_once(50) == 64
    together = source.drawn(anchors, 5, seed=3)
    for start, stop in ((0, 64), (63, 70), (250, 300)):
        part = Anchors(*(column[start:stop] for column in anchors))
        for name, one, whole in zip(
            Triplets._fields, source.drawn(part, 5, seed=3), together, strict=True
        ):
            assert torch.equal(one, whole[start:stop]), name
